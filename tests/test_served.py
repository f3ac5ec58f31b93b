"""The whole way on a real server: a toy engine's answers over the wire, what clients do wrong, and how things end."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import media_factory
import numpy as np
import pytest
from test_server import traces
from toy_engine import BAD, LIMITS, Folders
from tritonclient import grpc as plain
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from mosear.contract import HOLES, Tensors
from mosear.engine import Engine
from mosear.errors import (
    BusyError,
    CancelledError,
    DeadlineError,
    EngineError,
    MediaError,
    MosearError,
    RequestError,
    ServingError,
)
from mosear.runtime.encode import Stages, encode
from mosear.runtime.pipeline import StageDone, Words
from mosear.runtime.prompt import Task
from mosear.runtime.request import Answer, Request
from mosear.runtime.sampling import Sampling
from mosear.serving import Client
from mosear.serving.client import infer_message, response_tensors
from mosear.serving.configs import Device, Settings
from mosear.serving.faults import decode_fault
from mosear.serving.ports import free_ports
from mosear.serving.repository import assemble
from mosear.serving.server import KILL_S, Server, ServerOptions
from mosear.serving.tensors import request_tensors

SETTINGS = Settings(slots=4, queue=8, workers=4)
WARM = Sampling(temperature=1.0, seed=3)  # its first tokens are whole characters
FREE_S = 1.0  # for what a request held, once nobody waits for it


def long(tokens: int = LIMITS.new_tokens, **more: Any) -> Request:
    """An answer of just so many tokens; the most takes seconds."""
    return Request(task="reason", words="hm", max_tokens=tokens, min_tokens=tokens, sampling=WARM, **more)


@pytest.fixture(scope="module")
def engine(folders: Folders) -> Iterator[Engine]:
    with Engine(folders.engine) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def repository(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    return assemble(
        folders.engine, root, target=Device.CPU, onnx_folder=folders.onnx, say=lambda line: None, settings=SETTINGS
    )


@contextlib.contextmanager
def serving(repository: Path, folder: Path, **more: Any) -> Iterator[Server]:
    """A server whose every trace is looked for in the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        with Server(ServerOptions(repository=repository, log=folder / "triton.log", **free_ports(), **more)) as running:
            assert traces(folder)
            yield running
            start = time.monotonic()
            running.close()
            assert time.monotonic() - start < running.options.drain_s + running.options.stop_s + KILL_S + 4
        assert not traces(folder)


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests that leave it well."""
    with serving(repository, tmp_path_factory.mktemp("served")) as running:
        yield running
        settle(running)
        assert running.alive() and not running.lost()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    settle(server)
    with client_of(server) as made:
        yield made


def client_of(server: Server, **more: Any) -> Client:
    return Client(f"127.0.0.1:{server.options.grpc_port}", **{"timeout_s": 20, **more})


def metrics(server: Server) -> dict[str, float]:
    """Our own, `name{labels}` to value, without the prefix and without empty labels."""
    url = f"http://127.0.0.1:{server.options.metrics_port}/metrics"
    text = urllib.request.urlopen(url, timeout=5).read().decode()
    found = re.findall(r"^mosear_(\S+) (\S+)$", text, re.MULTILINE)
    return {name.removesuffix("{}"): float(value) for name, value in found}


def until(true: Callable[[], bool], *, within_s: float) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, f"not so within {within_s} s"
        time.sleep(0.02)


def settle(server: Server, *, within_s: float = FREE_S) -> None:
    """Nothing is under way, no slot is held, nobody waits."""

    def idle() -> bool:
        now = metrics(server)
        return not (server.running() or now["slots_in_use"] or now["queue_length"])

    until(idle, within_s=within_s)


def call(server: Server, model: str, tensors: Tensors, outputs: Sequence[str] = ()) -> Any:  # Any: grpc's call
    """A stream of the server's protocol with one request, whatever is in it; no outputs named: all."""
    with grpc.insecure_channel(f"127.0.0.1:{server.options.grpc_port}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        message = infer_message(model, tensors)
        for name in outputs:
            message.outputs.add(name=name)
        yield from stub.ModelStreamInfer(iter([message]), timeout=20)


def heard(server: Server, model: str, tensors: Tensors, outputs: Sequence[str] = ()) -> list[Tensors]:
    """All responses until the server ends the stream; raises what it says."""
    found, failed = [], None
    for response in call(server, model, tensors, outputs):
        told = {} if response.error_message else response_tensors(response.infer_response)
        found += [told] if told else []
        if response.error_message:
            failed = decode_fault(response.error_message)
    if failed:
        raise failed
    return found


def asking(pool: ThreadPoolExecutor, client: Client, request: Request, *, begun: bool = True) -> Future[Answer]:
    """A request under way, and (where wanted) the decoder's first response there."""
    heard_of = threading.Event()

    def ask() -> Answer:
        event = None
        for event in client.stream(request):  # noqa: B007
            heard_of.set()
        assert isinstance(event, Answer)
        return event

    future = pool.submit(ask)
    until(lambda: not begun or heard_of.is_set() or future.done(), within_s=10)
    return future


def same(found: Answer, wanted: Answer) -> None:
    for name in ("task", "text", "tokens", "prompt_tokens", "conflict", "notes", "groups"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert list(found.timings_ms) == list(wanted.timings_ms)
    np.testing.assert_allclose(found.modality_mass, wanted.modality_mass, atol=1e-5)
    np.testing.assert_allclose(found.expert_weights, wanted.expert_weights, atol=1e-5)
    for one, two in ((found.joint, wanted.joint), (found.face, wanted.face), (found.voice, wanted.voice)):
        assert (one is None) == (two is None)
        if one and two:
            assert one.label == two.label and list(one.scores) == list(two.scores)
            np.testing.assert_allclose(list(one.scores.values()), list(two.scores.values()), rtol=1e-4)


# ---- Answers


@pytest.fixture(scope="module")
def asked(engine: Engine, clip: bytes) -> dict[str, Request]:
    """Every task and every kind of input."""
    read = engine.reader.read(clip, None)
    features, _ = encode(engine.backend, engine.config, read, Stages())
    ready: dict[str, Any] = {"features": features, "feature_schema": engine.files.schema}
    return {
        "classify": Request(video=clip, words="so it is"),
        "reason": Request(task="reason", video=clip, words="h\u00e9 \u4f60", max_tokens=30, min_tokens=9, strength=0.9),
        "sampled": Request(task="reason", video=clip, max_tokens=30, sampling=Sampling(temperature=1.5, top_p=0.9, seed=7)),
        "conflict": Request(task="conflict", video=clip, strength=0.0),
        "tensors": Request(task="conflict", frames=read.frames, waveform=read.waveform),
        "features": Request(task="conflict", **ready),
        "sound beside": Request(video=clip, audio=media_factory.make_clip("wav", video=False, seconds=0.5, tone_hz=900)),
        "no sound": Request(task="conflict", video=media_factory.make_clip("mp4", seconds=1.0, sound=False)),
        "no pictures": Request(audio=media_factory.make_clip("wav", seconds=1.0, video=False)),
        "words": Request(task="reason", words="just words", max_tokens=12, sampling=WARM),
    }  # fmt: skip


CASES = (
    "classify", "reason", "sampled", "conflict", "tensors", "features", "sound beside", "no sound", "no pictures", "words",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_served_answer_is_the_engines(client: Client, engine: Engine, asked: dict[str, Request], case: str) -> None:
    assert set(CASES) == set(asked)
    events, wanted = list(client.stream(asked[case])), list(engine.pipeline.stream(asked[case]))
    assert isinstance(events[-1], Answer) and isinstance(wanted[-1], Answer)
    same(events[-1], wanted[-1])
    for kind, name in ((StageDone, "name"), (Words, "text")):
        told, said = ([getattr(event, name) for event in some if isinstance(event, kind)] for some in (events, wanted))
        assert told == said
    same(client.ask_unary(asked[case]), wanted[-1])


def inputs(tensors: Tensors) -> list[Any]:
    """A plain client's, of whatever types and shapes these arrays are."""
    made = [plain.InferInput(name, list(a.shape), np_to_triton_dtype(a.dtype)) for name, a in tensors.items()]
    for one, array in zip(made, tensors.values(), strict=True):
        one.set_data_from_numpy(array)
    return made


def test_a_plain_client_is_enough(server: Server, client: Client, engine: Engine, clip: bytes) -> None:
    tensors: Tensors = {
        "task": np.array([b"conflict"], object),
        "video_bytes": np.frombuffer(clip, np.uint8),
        "ar_strength": np.array([0.7], np.float32),
    }
    wanted = engine.pipeline.answer(Request(task="conflict", video=clip, strength=0.7))
    with plain.InferenceServerClient(f"127.0.0.1:{server.options.grpc_port}") as other:
        results: list[Any] = []
        done = threading.Event()

        def take(result: Any, error: Any) -> None:
            results.append(error or result)
            if error or result.get_response().parameters["triton_final_response"].bool_param:
                done.set()

        other.start_stream(take)
        other.async_stream_infer("mosear", inputs(tensors), enable_empty_final_response=True)
        assert done.wait(20)
        other.stop_stream()
        streamed = [response_tensors(result.get_response()) for result in results]
        unary = other.infer("mosear_unary", inputs(tensors), client_timeout=20)
    assert [found["stage"].item().decode() for found in streamed if "stage" in found][-1] == "prefill"
    last = next(found for found in streamed if "final" in found)
    for found in (last, response_tensors(unary.get_response())):
        assert wanted.joint and wanted.face and wanted.voice
        for who, judgement in (("", wanted.joint), ("face_", wanted.face), ("voice_", wanted.voice)):
            assert found[f"{who}label"].item().decode() == judgement.label
            np.testing.assert_allclose(found[f"{who}label_scores"], list(judgement.scores.values()), rtol=1e-4)
        assert found["conflict"].item() is wanted.conflict
        np.testing.assert_allclose(found["modality_mass"], wanted.modality_mass, atol=1e-5)
        np.testing.assert_allclose(found["expert_weights"], wanted.expert_weights, atol=1e-5)
        assert json.loads(found["timings_ms"].item())["total"] > 0
    assert b"".join(found["text_output"].item() for found in streamed if "text_output" in found) == wanted.text.encode()
    assert unary.as_numpy("text_output").item() == wanted.text.encode()


def generate(server: Server, path: str, fields: dict[str, object]) -> str:
    url = f"http://127.0.0.1:{server.options.http_port}/v2/models/{path}"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(fields).encode()), timeout=20) as answer:
        return str(answer.read().decode())


def test_http_is_enough(server: Server, client: Client, engine: Engine) -> None:
    fields = {"task": "reason", "text_input": "just words", "max_tokens": 12, "temperature": 1.0, "seed": 3}
    wanted = engine.pipeline.answer(Request(task="reason", words="just words", max_tokens=12, sampling=WARM))
    lines = [line for line in generate(server, "mosear/generate_stream", fields).splitlines() if line]
    events = [json.loads(line.removeprefix("data:")) for line in lines]
    assert wanted.text and "".join(event.get("text_output", "") for event in events) == wanted.text
    assert json.loads(next(event["report_json"] for event in events if "report_json" in event))["text"] == wanted.text
    whole = json.loads(generate(server, "mosear_unary/generate", fields))
    assert whole["text_output"] == wanted.text and json.loads(whole["report_json"])["tokens"] == wanted.tokens
    for path in ("mosear/generate_stream", "mosear_unary/generate"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            generate(server, path, {"task": "guess"})
        assert refused.value.code == 400 and "RequestError: task is 'guess'" in refused.value.read().decode()
    late = fields | {"max_tokens": LIMITS.new_tokens, "min_tokens": LIMITS.new_tokens, "deadline_ms": 300}
    first, *_, last = generate(server, "mosear/generate_stream", late).strip().splitlines()
    assert "stage" in first and '"error"' in last and "DeadlineError: " in last


# ---- What clients do wrong


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_refused_as_in_process(client: Client, engine: Engine, case: str) -> None:
    request, said = BAD[case]
    with pytest.raises(RequestError) as wanted:
        engine.pipeline.answer(request)
    for ask in (client.ask, client.ask_unary):
        with pytest.raises(RequestError) as caught:
            ask(request)
        assert said in str(caught.value) and type(caught.value) is type(wanted.value)
        assert client.ask(Request(words="still there")).joint


def test_clips_that_are_none_or_too_much(server: Server, client: Client) -> None:
    noise = np.random.default_rng(0).bytes(64 << 20)
    limit = f"{LIMITS.clip_bytes}"
    with client_of(server, clip_bytes=1 << 30) as unguarded:
        for asking, request, said in (
            (client, Request(video=media_factory.make_clip("mp4", seconds=3.0)), r"longer than 2 s: .*clip_seconds"),
            (client, Request(video=noise[: LIMITS.clip_bytes]), "video_bytes"),
            (client, Request(audio=noise[:999]), "audio_bytes"),
            (client, Request(video=noise), rf"video_bytes has {len(noise)} bytes, the limit is {limit}"),
            (unguarded, Request(video=noise), rf"video_bytes.*{limit}"),
            (unguarded, Request(audio=noise), rf"audio_bytes.*{limit}"),
        ):
            with pytest.raises(MediaError, match=said):
                asking.ask(request)
            assert client.ask(Request(words="still there")).joint


WRONG: dict[str, tuple[str, Any]] = {
    "frames of floats": ("frames", np.zeros((1, 8, 8, 3), np.float32)),
    "frames of two axes": ("frames", np.zeros((8, 8), np.uint8)),
    "frames of four colours": ("frames", np.zeros((1, 8, 8, 4), np.uint8)),
    "no frames": ("frames", np.zeros((0, 8, 8, 3), np.uint8)),
    "waveform of doubles": ("waveform", np.zeros(9)),
    "waveform of two channels": ("waveform", np.zeros((2, 9), np.float32)),
    "empty waveform": ("waveform", np.zeros(0, np.float32)),
    "empty clip": ("video_bytes", np.zeros(0, np.uint8)),
    "clip of floats": ("video_bytes", np.zeros(9, np.float32)),
    "two texts": ("text_input", np.array([b"a", b"b"], object)),
    "text not utf-8": ("text_input", np.array([b"caf\xe9"], object)),
    "task not utf-8": ("task", np.array([b"\xff"], object)),
    "two limits": ("max_tokens", np.array([1, 2], np.int32)),
    "long limit": ("max_tokens", np.array([1], np.int64)),
    "min above max": ("min_tokens", np.array([9999], np.int32)),
    "negative temperature": ("temperature", np.array([-1], np.float32)),
    "temperature nan": ("temperature", np.array([np.nan], np.float32)),
    "top_p 0": ("top_p", np.array([0], np.float32)),
    "seed -1": ("seed", np.array([-1], np.int64)),
    "deadline 0": ("deadline_ms", np.array([0], np.int32)),
    "features of another size": ("face_features", np.zeros((1, 3), np.float32)),
    "features without a schema": ("scene_features", np.zeros((4, 12), np.float32)),
    "a tensor unknown": ("hands", np.zeros(3, np.float32)),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors_are_named(server: Server, client: Client, case: str) -> None:
    name, array = WRONG[case]
    tensors: Tensors = {"text_input": np.array([b"hm"], object), name: array}
    with plain.InferenceServerClient(f"127.0.0.1:{server.options.grpc_port}") as other:
        with pytest.raises(InferenceServerException) as refused:
            other.infer("mosear_unary", inputs(tensors), client_timeout=20)
        said = "feature_schema" if case == "features without a schema" else name
        assert said in str(refused.value)
    with pytest.raises((RequestError, ServingError), match=said) as caught:
        heard(server, "mosear", tensors)
    assert isinstance(caught.value, RequestError) or "the server says" in str(caught.value)
    assert client.ask(Request(words="still there")).joint


def text_prompt(engine: Engine) -> Tensors:
    prompt = engine.files.prompt_builder().build(Task.CLASSIFY, counts={}, words="hm")
    return {"token_ids": prompt.ids, "group": prompt.group}


def ints(*values: int) -> Any:
    return np.array(values, np.int32)


FACE = HOLES["face"]
ABUSE: dict[str, tuple[dict[str, Any], type[MosearError], str]] = {
    "no prompt": ({"token_ids": None, "group": None}, RequestError, "token_ids and group"),
    "no groups": ({"group": None}, RequestError, "token_ids and group"),
    "empty prompt": ({"token_ids": ints(), "group": ints()}, RequestError, "not empty"),
    "fewer groups": ({"token_ids": ints(1, 2), "group": ints(0)}, RequestError, "token_ids and group"),
    "id above": ({"token_ids": ints(300), "group": ints(0)}, RequestError, "300.*from -3 .* to 299"),
    "id below": ({"token_ids": ints(-4), "group": ints(0)}, RequestError, "-4.*from -3"),
    "group above": ({"token_ids": ints(1), "group": ints(3)}, RequestError, "group holds 3 to 3: from 0 to 2"),
    "group below": ({"token_ids": ints(1), "group": ints(-1)}, RequestError, "group holds -1"),
    "hole without features": ({"token_ids": ints(1, FACE, 2), "group": ints(0, 2, 0)}, RequestError, "1 places for face"),
    "features without a hole": ({"face_features": np.zeros((1, 16), np.float32)}, RequestError, "0 places for face"),
    "features nan": (
        {"token_ids": ints(FACE, 2), "group": ints(2, 0), "face_features": np.full((1, 16), np.nan, np.float32)},
        RequestError,
        "face_features .*not finite",
    ),
    "no tokens": ({"max_tokens": ints(0)}, RequestError, "max_tokens is 0"),
    "too many tokens": ({"max_tokens": ints(9999)}, RequestError, "max_tokens is 9999"),
    "strength nan": ({"ar_strength": np.array([np.nan], np.float32)}, RequestError, "ar_strength is nan"),
    "temperature nan": ({"temperature": np.array([np.nan], np.float32)}, RequestError, "temperature is nan"),
    "task unknown": ({"task": np.array([b"guess"], object)}, RequestError, "classify, reason, conflict"),
    "too long": ({"token_ids": ints(*[1] * 3999), "group": ints(*[0] * 3999)}, RequestError, "takes 3400"),
    "task not utf-8": ({"task": np.array([b"\xff"], object)}, RequestError, "task is not UTF-8"),
    "time over": ({"deadline_ms": ints(-1)}, DeadlineError, "deadline"),
}  # fmt: skip


@pytest.mark.parametrize("case", ABUSE)
def test_the_decoder_asked_wrongly_refuses(server: Server, client: Client, engine: Engine, case: str) -> None:
    changes, kind, said = ABUSE[case]
    tensors = {name: value for name, value in (text_prompt(engine) | changes).items() if value is not None}
    with pytest.raises(kind, match=said):
        heard(server, "decoder", tensors)
    assert "label_scores" in heard(server, "decoder", text_prompt(engine))[-1]
    assert client.ask(Request(words="still there")).joint


def test_only_the_outputs_that_are_asked_for_come(server: Server, client: Client, engine: Engine) -> None:
    (alone,) = [told for told in heard(server, "decoder", text_prompt(engine), outputs=["label_scores"]) if told]
    assert set(alone) == {"label_scores"}
    asked = request_tensors(Request(words="hm", task="classify"))
    found = heard(server, "mosear", asked, outputs=["label", "stage"])
    assert {"label", "stage"} == set().union(*found)


# ---- Several at once


def mixed(clip: bytes) -> list[Request]:
    return [
        Request(task=task, video=clip if i % 3 else None, words="hm" * (i + 1), strength=i / 8, max_tokens=20 * i + 9,
                min_tokens=9, sampling=Sampling(temperature=i % 2 * 1.2, seed=i))
        for i, task in enumerate(("reason", "classify", "reason", "conflict", "reason", "reason", "conflict", "reason"))
    ]  # fmt: skip


def test_eight_at_once_answer_as_each_alone(client: Client, clip: bytes, server: Server) -> None:
    requests = mixed(clip)
    alone = [client.ask(request) for request in requests]
    settle(server)
    with ThreadPoolExecutor(8) as pool:
        for found, wanted in zip(pool.map(client.ask, requests), alone, strict=True):
            assert found.text == wanted.text and found.tokens == wanted.tokens
            same(found, wanted)
    settle(server)
    bad, said = BAD["text as video"]
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(client.ask, request) for request in [*requests[:4], bad, *requests[5:]]]
        for i, (future, wanted) in enumerate(zip(futures, alone, strict=True)):
            if i == 4:
                with pytest.raises(MediaError, match=said):
                    future.result()
            else:
                same(future.result(), wanted)


# ---- Clients that go away, time that is over, queues that are full

VANISH = """
import sys
from mosear.runtime.request import Request
from mosear.serving import Client
for event in Client(sys.argv[1]).stream(Request(task="reason", words="hm", max_tokens=3000, min_tokens=3000)):
    print(type(event).__name__, getattr(event, "name", ""), flush=True)
"""


def test_a_client_that_vanishes_frees_its_slot(server: Server, client: Client) -> None:
    command = [sys.executable, "-c", VANISH, client.url]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout
        assert "StageDone prefill" in "".join(other.stdout.readline() for _ in range(2))
        until(lambda: metrics(server)["slots_in_use"] == 1 and server.running() == 1, within_s=FREE_S)
        other.kill()
    settle(server)
    assert client.ask(Request(words="still there")).joint


@pytest.mark.parametrize("count", [1, 8])
def test_clients_that_cancel_free_their_slots(server: Server, client: Client, count: int) -> None:
    with client_of(server) as other, ThreadPoolExecutor(count) as pool:
        futures = [asking(pool, other, long(), begun=False) for _ in range(count)]
        until(lambda: metrics(server)["slots_in_use"] == min(count, SETTINGS.slots), within_s=5)
        other.close()  # withdraws them all
        assert all(isinstance(future.exception(timeout=2), CancelledError) for future in futures)
    settle(server, within_s=FREE_S * (2 if count > SETTINGS.workers else 1))
    assert client.ask(Request(words="still there")).joint


def test_an_iterator_that_is_closed_frees_its_slot(server: Server, client: Client) -> None:
    events = client.stream(long())
    while not isinstance(next(events), Words):
        pass
    events.close()  # type: ignore[attr-defined]
    settle(server)


@pytest.mark.parametrize("way", ["stream", "unary", "by the server alone"])
def test_an_answer_that_takes_too_long_is_given_up(server: Server, client: Client, way: str) -> None:
    start, request = time.monotonic(), long(deadline_ms=300)
    tensors: Tensors = {"task": np.array([b"reason"], object), "text_input": np.array([b"hm"], object)}
    tensors |= {name: ints(LIMITS.new_tokens) for name in ("max_tokens", "min_tokens")}
    ways: dict[str, Callable[[], object]] = {
        "stream": lambda: client.ask(request),
        "unary": lambda: client.ask_unary(request),
        "by the server alone": lambda: heard(server, "mosear", tensors | {"deadline_ms": ints(300)}),
    }
    with pytest.raises(DeadlineError):
        ways[way]()
    assert 0.25 < time.monotonic() - start < 3
    settle(server)
    assert client.ask(Request(words="still there")).joint


def test_what_is_too_much_is_refused_as_busy(server: Server, client: Client, engine: Engine) -> None:
    with ThreadPoolExecutor(2 * SETTINGS.workers) as pool:
        waiting = [pool.submit(client.ask, long()) for _ in range(2 * SETTINGS.workers)]
        until(lambda: server.running() == len(waiting), within_s=5)
        for ask in (client.ask, lambda request: list(client.stream(request))):
            with pytest.raises(BusyError, match="8 requests are under way: try again"):
                ask(Request(words="one too many"))
        client.close()
        assert all(isinstance(future.exception(timeout=5), MosearError) for future in waiting)
    settle(server, within_s=2)
    work = text_prompt(engine) | {name: ints(LIMITS.new_tokens) for name in ("max_tokens", "min_tokens")}
    work |= {"task": np.array([b"reason"], object)}
    with grpc.insecure_channel(f"127.0.0.1:{server.options.grpc_port}") as channel:
        stub, message = service_pb2_grpc.GRPCInferenceServiceStub(channel), infer_message("decoder", work)
        calls = [stub.ModelStreamInfer(iter([message]), timeout=20) for _ in range(SETTINGS.slots)]
        until(lambda: metrics(server)["slots_in_use"] == SETTINGS.slots, within_s=5)
        calls += [stub.ModelStreamInfer(iter([message]), timeout=20) for _ in range(SETTINGS.queue)]
        until(lambda: metrics(server)["queue_length"] == SETTINGS.queue, within_s=5)
        with pytest.raises(BusyError, match="8 requests wait, which is the most"):
            heard(server, "decoder", work)
        with client_of(server) as other, pytest.raises(BusyError, match="8 requests wait, which is the most"):
            other.ask(Request(words="one too many"))
        for one in calls:
            one.cancel()
    settle(server)


# ---- Metrics


def test_metrics_tell_what_was_done(server: Server, client: Client, engine: Engine, clip: bytes) -> None:
    before = metrics(server)
    answers = [client.ask(Request(task="reason", video=clip, words="hm", max_tokens=40, min_tokens=40, sampling=WARM))]
    answers += [client.ask(Request(video=clip, strength=strength)) for strength in (0.0, 1.0)]
    settle(server)
    now = metrics(server)

    def more(name: str) -> float:
        return now[name] - before.get(name, 0.0)

    assert now["slots"] == SETTINGS.slots and now["queue_length"] == now["slots_in_use"] == 0
    assert more("tokens_total") == 40
    assert more('time_to_first_token_ms_count{model="mosear"}') == len(answers)
    shortest, total = min(a.timings_ms["first_token"] for a in answers), sum(a.timings_ms["total"] for a in answers)
    assert len(answers) * shortest < more('time_to_first_token_ms_sum{model="mosear"}') < total + 1000
    for row, moment in enumerate(("before", "after")):
        for index, group in enumerate(engine.config.groups):
            name, labels = "modality_mass", f'{{group="{group}",moment="{moment}"}}'
            assert more(f"{name}_count{labels}") == len(answers)
            wanted = sum(float(a.modality_mass.mean(0)[row, index]) for a in answers)
            assert more(f"{name}_sum{labels}") == pytest.approx(wanted, rel=1e-3)
    for g, group in enumerate(engine.config.groups):
        for e in range(engine.config.mose.experts):
            wanted = sum(float(a.expert_weights[g, e]) for a in answers)
            assert more(f'expert_weight_sum{{expert="{e}",group="{group}"}}') == pytest.approx(wanted, rel=1e-3)


# ---- Ends, each of a server of its own


@pytest.fixture
def fresh(repository: Path, tmp_path: Path) -> Callable[..., contextlib.AbstractContextManager[Server]]:
    return lambda **more: serving(repository, tmp_path, **more)


Fresh = Callable[..., contextlib.AbstractContextManager[Server]]


def stub_of(server: Server, model: str) -> int:
    return next(pid for pid, name in server._stubs.items() if name == model)


def test_a_decoder_that_dies_is_noticed_and_no_client_hangs(fresh: Fresh) -> None:
    with fresh() as server, client_of(server) as client, ThreadPoolExecutor(2) as pool:
        for ask in (client.ask, client.ask_unary):
            assert ask(Request(words="hm")).joint
        future = asking(pool, client, long())
        os.kill(stub_of(server, "decoder"), signal.SIGKILL)
        error = future.exception(timeout=5)
        assert isinstance(error, EngineError) and "the decoder's process died" in str(error)
        with pytest.raises(ServingError, match="the decoder does not listen"):
            client.ask(Request(words="hm"))
        with pytest.raises(ServingError, match=r"the process of decoder died|the server died"):
            server.run(threading.Event())
        start = time.monotonic()
        assert not server.close()
        assert time.monotonic() - start < 6


def test_a_server_that_dies_tells_its_clients(fresh: Fresh) -> None:
    with fresh() as server, client_of(server) as client, ThreadPoolExecutor(2) as pool:
        futures = [asking(pool, client, long(deadline_ms=10_000)) for _ in range(2)]
        assert server._process
        os.kill(server._process.pid, signal.SIGKILL)
        start = time.monotonic()
        for future in futures:
            assert type(future.exception(timeout=10)) is ServingError
        with pytest.raises(ServingError, match="cannot be reached"):
            client.ask(Request(words="hm", deadline_ms=3000))
        assert time.monotonic() - start < 9
        with pytest.raises(ServingError, match="the server died"):
            server.run(threading.Event())
        assert not server.close()


@pytest.mark.parametrize(("drain_s", "stop_s", "tokens"), [(10.0, 20, 900), (0.0, 1, LIMITS.new_tokens)])
def test_a_server_told_to_stop_ends_in_time(fresh: Fresh, drain_s: float, stop_s: int, tokens: int) -> None:
    with fresh(drain_s=drain_s, stop_s=stop_s) as server, client_of(server) as client, ThreadPoolExecutor(6) as pool:
        futures = [asking(pool, client, long(tokens)) for _ in range(4)]
        assert server.running()
        start = time.monotonic()
        clean = server.close()
        assert time.monotonic() - start < drain_s + stop_s + KILL_S + 4
        for future in futures:
            error = future.exception(timeout=2)
            assert error is None if drain_s else error is None or isinstance(error, ServingError), error
            if error is None:
                assert future.result().tokens == tokens
        assert clean or not drain_s
