"""The client against a real server whose models `mosear` and `mosear_unary` are stand-ins that do as their words say."""

import contextlib
import dataclasses
import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from stand_in import ANSWER
from toy import toy_config

from mosear.contract import asked_tensors, feature_tensors, served
from mosear.errors import (
    BusyError,
    CancelledError,
    ConfigError,
    DeadlineError,
    EngineError,
    MediaError,
    MosearError,
    RequestError,
    ServingError,
)
from mosear.recipe import Limits, Recipe
from mosear.runtime.pipeline import StageDone, Words
from mosear.runtime.prompt import Task
from mosear.runtime.request import Answer, Request
from mosear.runtime.sampling import Sampling
from mosear.serving import Client
from mosear.serving.client import ModelState, event_of
from mosear.serving.configs import Device, Settings, config_text, model_configs
from mosear.serving.faults import KINDS, decode_fault, encode_fault, inner_fault
from mosear.serving.ports import free_ports
from mosear.serving.server import Server, ServerOptions
from mosear.serving.tensors import request_tensors

HERE = Path(__file__).parent
CLIP_BYTES = 1000


class StandIns:
    """A server of the stand-ins; a context manager."""

    def __init__(self, folder: Path, *, port: int | None = None) -> None:
        self.models = folder / "models"
        config, recipe = toy_config(), Recipe(name="toy", limits=Limits(clip_bytes=CLIP_BYTES))
        models = model_configs(config, recipe, device=Device.CPU, settings=Settings(), warm={})
        for name in ("mosear", "mosear_unary"):
            version = self.models / name / "1"
            version.mkdir(parents=True, exist_ok=True)
            shutil.copy(HERE / "stand_in_model.py", version / "model.py")
            shutil.copy(HERE / "stand_in.py", version)  # a model's own folder is on its path
            config.save(version / "config.json")
            (version.parent / "config.pbtxt").write_text(config_text(models[name], Device.CPU))
        self.options = ServerOptions(
            repository=self.models, log=folder / "triton.log", ready_s=60, drain_s=2, stop_s=3, watch=False,
            **free_ports() | ({"grpc_port": port} if port else {}),
        )  # fmt: skip
        self.url = f"127.0.0.1:{self.options.grpc_port}"

    def __enter__(self) -> "StandIns":
        self.server = Server(self.options)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()

    def signal(self, number: signal.Signals) -> None:
        assert self.server._process
        self.server._process.send_signal(number)

    def saw(self, name: str = "mosear") -> list[str]:
        """What a stand-in wrote of its requests."""
        path = self.models / name / "1" / "seen"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIns]:
    with StandIns(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def client(server: StandIns) -> Iterator[Client]:
    with Client(server.url, timeout_s=20) as client:
        yield client


def test_events_come_as_the_pipeline_tells_them(client: Client) -> None:
    events = list(client.stream(Request(task="reason", words="hello")))
    stages = [event for event in events if isinstance(event, StageDone)]
    assert [stage.name for stage in stages] == ["media", "prefill"] and stages[0].ms == pytest.approx(1.5)
    assert [event.text for event in events if isinstance(event, Words)] == ["She ", "smiles: ", "h\u00e9llo"]
    assert isinstance(events[-1], Answer) and events[-1].text == "She smiles: h\u00e9llo"


def test_words_come_before_the_answer_is_complete(client: Client) -> None:
    start, events = time.perf_counter(), client.stream(Request(words="slow", max_tokens=8))
    assert isinstance(next(events), Words)
    first = time.perf_counter() - start
    rest = list(events)
    assert isinstance(rest[-1], Answer) and time.perf_counter() - start - first > 0.3
    assert first < 0.3


@pytest.mark.parametrize("unary", [False, True])
def test_the_answer_is_rebuilt_to_the_bit(client: Client, unary: bool) -> None:
    ask = client.ask_unary if unary else client.ask
    assert ask(Request(words="hello")).record() == ANSWER.record()
    found = ask(Request(words="hello"))
    for name in ("modality_mass", "expert_weights"):
        value = getattr(found, name)
        assert value.dtype == np.float32 and (value == getattr(ANSWER, name)).all()
    assert (found.joint, found.face, found.voice) == (ANSWER.joint, ANSWER.face, ANSWER.voice)
    assert found.groups == ANSWER.groups and found.notes == ANSWER.notes and found.task is Task.CONFLICT


def test_all_that_is_set_arrives(client: Client, server: StandIns) -> None:
    random = np.random.default_rng(0)
    sent = Request(
        task="reason", video=b"\x00video\xff", audio=b"sound", frames=random.integers(0, 255, (2, 3, 4, 3)).astype(np.uint8),
        waveform=random.random(9).astype(np.float32), words="\u4f60 hello", feature_schema="abc", max_tokens=7, min_tokens=2,
        features={"face": random.random((2, 16)).astype(np.float32)}, strength=0.25,
        sampling=Sampling(temperature=0.5, top_p=0.75, seed=2**64 - 1), deadline_ms=9000,
    )  # fmt: skip
    for ask, name in ((client.ask, "mosear"), (client.ask_unary, "mosear_unary")):
        ask(sent)
        seen = json.loads(server.saw(name)[-1])
        assert (
            seen["words"] == "\u4f60 hello" and seen["video"] == sent.video.hex() and seen["audio"] == sent.audio.hex()
        )
        for field in ("task", "feature_schema", "max_tokens", "min_tokens", "strength", "deadline_ms"):
            assert seen[field] == getattr(sent, field), field
        assert seen["sampling"] == dataclasses.asdict(sent.sampling)
        assert (np.array(seen["frames"]) == sent.frames).all()
        assert (np.array(seen["waveform"], np.float32) == sent.waveform).all()
        assert (np.array(seen["features"]["face"], np.float32) == sent.features["face"]).all()
        assert set(seen["inputs"]) == {spec.name for spec in served(toy_config())[name].inputs} - {
            "scene_features", "voice_features"
        }  # fmt: skip


def test_what_is_not_set_is_not_sent(client: Client, server: StandIns) -> None:
    client.ask(Request(words="hello"))
    seen = json.loads(server.saw()[-1])
    assert seen["inputs"] == ["task", "text_input"]
    assert seen["max_tokens"] is None and seen["sampling"] == dataclasses.asdict(Sampling())


def test_tensors_have_the_contracts_types() -> None:
    request = Request(
        video=b"v", audio=b"a", frames=np.zeros((1, 2, 2, 3), np.uint8), waveform=np.zeros(3, np.float32), words="w",
        features={"face": np.zeros((1, 16), np.float32)}, feature_schema="s", max_tokens=1, min_tokens=1, strength=1,
        sampling=Sampling(temperature=1, top_p=0.5, seed=1), deadline_ms=1,
    )  # fmt: skip
    specs = {spec.name: spec for spec in (*asked_tensors(), *feature_tensors(toy_config()))}
    tensors = request_tensors(request)
    assert set(tensors) == set(specs) - {"scene_features", "voice_features"}
    for name, value in tensors.items():
        assert value.dtype == specs[name].dtype.numpy and value.ndim == len(specs[name].axes), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 2**31}, "max_tokens is 2147483648: it must be one int32"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"strength": "much"}, "ar_strength is 'much': it must be one float32"),
        ({"strength": 10**400}, "ar_strength is 1000"),
        ({"words": "\ud800"}, "text_input is not valid Unicode at character 0"),
        ({"frames": np.zeros((1, 2, 2), np.uint8)}, "frames is uint8 \\[1, 2, 2\\]"),
        ({"frames": np.zeros((1, 2, 2, 4), np.uint8)}, "frames is uint8"),
        ({"waveform": np.zeros(3)}, "waveform is float64 \\[3\\]: it must be float32"),
        ({"features": {"hands": np.zeros((1, 1), np.float32)}}, "features names 'hands': known are face"),
        ({"features": {"face": np.zeros(3, np.float32)}}, "face_features is float32 \\[3\\]"),
        ({"video": b""}, "video_bytes is empty"),
    ],
)
def test_what_cannot_be_sent_is_refused_here(changes: dict[str, object], message: str) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(RequestError, match=message):
        client.stream(Request(**changes))


def test_a_clip_above_the_servers_limit_is_not_sent(client: Client, server: StandIns) -> None:
    before = len(server.saw())
    for field in ("video", "audio"):
        with pytest.raises(MediaError, match=f"{field}_bytes has {CLIP_BYTES + 1} bytes, the limit is {CLIP_BYTES}"):
            client.ask(Request(**{field: bytes(CLIP_BYTES + 1)}))
    assert len(server.saw()) == before
    assert client.ask(Request(video=bytes(CLIP_BYTES)))


def test_a_clip_above_the_callers_limit_is_refused_without_a_server() -> None:
    with Client("127.0.0.1:1", clip_bytes=10) as client, pytest.raises(MediaError, match="the limit is 10"):
        client.ask(Request(video=bytes(11)))


def test_what_grpc_cannot_carry_is_not_sent(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosear.serving.client.MAX_MESSAGE_BYTES", 5000)
    with pytest.raises(RequestError, match=r"the request has \d+ bytes, gRPC takes 5000"):
        client.ask(Request(frames=np.zeros((1, 40, 50, 3), np.uint8)))


@pytest.mark.parametrize("deadline_s", [0, -1, float("nan"), float("inf"), 3601])
def test_a_deadline_that_is_none_is_refused(deadline_s: float) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(RequestError, match="deadline_s is"):
        client.ask(Request(words="hello"), deadline_s=deadline_s)


@pytest.mark.parametrize("unary", [False, True])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_errors_keep_their_kind(client: Client, kind: str, unary: bool) -> None:
    with pytest.raises(MosearError) as caught:
        (client.ask_unary if unary else client.ask)(Request(words=f"raise {kind}"))
    assert type(caught.value) is KINDS[kind] and str(caught.value) == "as it was said: \u00e9, two\nlines"


@pytest.mark.parametrize("unary", [False, True])
def test_a_failure_inside_the_model_is_the_engines(client: Client, unary: bool) -> None:
    with pytest.raises(EngineError, match=r"ZeroDivisionError: .* by zero"):
        (client.ask_unary if unary else client.ask)(Request(words="break"))


def test_an_error_comes_after_the_events_before_it(client: Client) -> None:
    stream = client.stream(Request(words="raise BusyError"))
    assert isinstance(next(stream), StageDone)
    with pytest.raises(BusyError):
        next(stream)


@pytest.mark.parametrize("words", ["nothing", "odd"])
def test_a_stream_without_an_answer_is_an_error(client: Client, words: str) -> None:
    with pytest.raises(ServingError, match=r"without an answer|not what this version understands"):
        client.ask(Request(words=words))


def test_closing_the_iterator_withdraws_the_request(client: Client, server: StandIns) -> None:
    stream = client.stream(Request(words="slow", max_tokens=200))
    assert isinstance(next(stream), Words)
    stream.close()
    assert wait_for(lambda: server.saw()[-1] == "cancelled", 3)
    assert client.ask(Request(words="hello")), "the client goes on"


def test_closing_the_client_withdraws_what_another_thread_asked(server: StandIns) -> None:
    client, raised = Client(server.url), []

    def ask() -> None:
        try:
            client.ask(Request(words="slow", max_tokens=200))
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=ask)
    before = len(server.saw())
    thread.start()
    assert wait_for(lambda: len(server.saw()) > before, 5)
    client.close()
    thread.join(3)
    assert [type(error) for error in raised] == [CancelledError]
    assert wait_for(lambda: server.saw()[-1] == "cancelled", 3)


@pytest.mark.parametrize("unary", [False, True])
def test_a_deadline_ends_a_request_that_the_server_ignores(client: Client, unary: bool) -> None:
    start = time.perf_counter()
    with pytest.raises(DeadlineError, match="did not answer within 400 ms"):
        (client.ask_unary if unary else client.ask)(Request(words="sleep"), deadline_s=0.4)
    assert time.perf_counter() - start < 1.0
    assert client.ask(Request(words="hello")), "the server goes on"


def test_without_a_deadline_the_clients_own_time_ends_it(server: StandIns) -> None:
    with Client(server.url, timeout_s=0.3) as client, pytest.raises(ServingError, match="did not answer in time"):
        client.ask(Request(words="sleep"))


def test_requests_of_several_threads_do_not_mix(client: Client) -> None:
    found: dict[int, str] = {}

    def ask(index: int) -> None:
        words = [e.text for e in client.stream(Request(words=f"slow {index}", max_tokens=5)) if isinstance(e, Words)]
        found[index] = "".join(words)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found == {index: f"slow {index} " * 5 for index in range(6)}


def test_health_lists_models(client: Client) -> None:
    health = client.health()
    assert health.live and health.ready
    assert health.models == tuple(
        ModelState(name=name, version="1", state="READY", reason="") for name in ("mosear", "mosear_unary")
    )


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "127.0.0.1", "", "host:port"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"name host and gRPC port, such as 127\.0\.0\.1:8001"):
        Client(url)


def test_nobody_there_is_said_at_once() -> None:
    start = time.perf_counter()
    with Client(f"127.0.0.1:{free_ports()['grpc_port']}") as client:
        for call in (
            client.health,
            lambda: client.ask(Request(words="hello")),
            lambda: client.ask(Request(video=b"v")),
        ):
            with pytest.raises(ServingError, match="cannot be reached, or went away"):
                call()
    assert time.perf_counter() - start < 5


def test_a_server_that_speaks_no_grpc_is_said_to_be_unreachable(server: StandIns) -> None:
    with Client(f"127.0.0.1:{server.options.http_port}", timeout_s=10) as client, pytest.raises(ServingError):
        client.ask(Request(words="hello"))


def test_a_server_that_dies_freezes_and_comes_back(tmp_path: Path) -> None:
    with StandIns(tmp_path) as first, Client(first.url, timeout_s=20) as client:
        first.signal(signal.SIGSTOP)
        start = time.perf_counter()
        with pytest.raises(DeadlineError):
            client.ask(Request(words="hello"), deadline_s=0.5)
        assert time.perf_counter() - start < 1.5
        first.signal(signal.SIGCONT)
        for unary in (False, True):
            assert (client.ask_unary if unary else client.ask)(Request(words="hello"))
        stream = client.stream(Request(words="slow", max_tokens=200))
        assert isinstance(next(stream), Words)
        first.signal(signal.SIGKILL)
        start = time.perf_counter()
        with pytest.raises(ServingError, match="cannot be reached, or went away"):
            list(stream)
        with pytest.raises(ServingError, match="cannot be reached, or went away"):
            client.ask(Request(words="hello"))
        assert time.perf_counter() - start < 3
        first.server.close()
        with StandIns(tmp_path, port=first.options.grpc_port):
            assert wait_for(lambda: answers(client), 10)


def answers(client: Client) -> bool:
    with contextlib.suppress(ServingError):
        return isinstance(client.ask(Request(words="hello")), Answer)
    return False


def wait_for(condition, seconds: float) -> bool:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_faults_are_read_as_they_were_written() -> None:
    for kind in KINDS.values():
        found = decode_fault(encode_fault(kind("a: b\nc")))
        assert type(found) is kind and str(found) == "a: b\nc"
    assert type(decode_fault(encode_fault(ConfigError("x")))) is EngineError
    assert str(decode_fault(encode_fault(KeyError("x")))) == "KeyError: 'x': the server's log has more"


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("[request id: 7] BusyError: full", BusyError, "full"),
        ("Failed to process ..., message: RequestError: bad\n\nAt:\n  model.py(3): execute\n", RequestError, "bad"),
        ("EngineError: model voice failed: RequestError: bad", EngineError, "model voice failed: RequestError: bad"),
        ("Exceeds maximum queue size", BusyError, "the server says: Exceeds maximum queue size"),
        ("Request timeout expired", DeadlineError, "the server says: Request timeout expired"),
        (
            "Stub process 'mosear_0_0' is not healthy.",
            ServingError,
            "the server says: Stub process 'mosear_0_0' is not healthy.",
        ),
        ("", ServingError, "the server says: nothing"),
    ],
)
def test_what_the_server_says_itself_is_understood(text: str, kind: type[MosearError], words: str) -> None:
    found = decode_fault(text)
    assert type(found) is kind and str(found) == words


def test_responses_of_another_version_are_refused() -> None:
    for tensors in ({"final": np.array([True])}, {"stage": np.array([b"x"], object)}, {"label": np.zeros(1)}):
        with pytest.raises(ServingError, match="use client and server of one version"):
            event_of(tensors)
    record = json.dumps({**ANSWER.record(), "task": "sing"}).encode()
    with pytest.raises(ServingError, match="one version"):
        event_of({"final": np.array([True]), "report_json": np.array([record], object)})


def test_an_answer_survives_json() -> None:
    for answer in (ANSWER, dataclasses.replace(ANSWER, joint=None, face=None, voice=None, conflict=None, notes=())):
        found = Answer.from_record(json.loads(json.dumps(answer.record())))
        assert found.record() == answer.record()


def test_a_model_call_that_the_stopping_server_refuses_is_no_fault_of_the_model() -> None:
    stopping = inner_fault("decoder", "Model decoder - Error when running inference: Server not ready")
    assert type(stopping) is type(decode_fault(encode_fault(stopping))) is ServingError
    failed = inner_fault("voice", "no memory")
    assert type(failed) is EngineError and str(failed) == "model voice failed: no memory"
