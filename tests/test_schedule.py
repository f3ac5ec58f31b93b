"""A request's answer does not depend on what else is in the decoder, and nobody is left waiting."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tolerance import assert_close
from toy import FULL, GROUPED, toy_config, toy_model

from mosear.backends.onnxruntime_cpu import BoundDecoder, OnnxRuntimeBackend, optimise
from mosear.backends.session import Backend, DecoderState
from mosear.config import ModelConfig, MoSEConfig, Route, Target
from mosear.contract import DECODER, EMBEDDING, HOLES, Tensors, parts
from mosear.errors import BusyError, CancelledError, DeadlineError, EngineError, MosearError, RequestError
from mosear.recipe import CAPACITY_STEP, Recipe
from mosear.runtime.decode import Prefilled, Said, Scored, Token, Work
from mosear.runtime.encode import project
from mosear.runtime.generate import Generation, Rows, score_labels, stream
from mosear.runtime.prompt import AUDIO, TEXT, VIDEO, Prompt, Task
from mosear.runtime.sampling import Sampler, Sampling, log_softmax
from mosear.runtime.schedule import Scheduler
from mosear_export.build import prepare_decoder
from mosear_export.export import head_tensors
from mosear_export.model.decoder import ReferenceOps
from mosear_export.model.whole import ReferenceModel
from mosear_export.ops import ExportOps
from mosear_export.reference_backend import ReferenceBackend
from mosear_export.to_onnx import export_part

PARTS = (EMBEDDING, *(f"{field}_projector" for field in HOLES), DECODER)
LABELS, STOP = ([5], [7, 9], [11, 3, 8]), 2
LONGEST = 250
KINDS = {"face": VIDEO, "scene": VIDEO, "voice": AUDIO}
MOSE = MoSEConfig(targets=(Target.Q_PROJ, Target.V_PROJ), rank=2, experts=2, route=Route.MODALITY)
CONFIGS = {
    "grouped, token route": toy_config(backbone=dataclasses.replace(GROUPED, max_positions=256)),
    "full, modality route": toy_config(backbone=dataclasses.replace(FULL, max_positions=256), mose=MOSE),
}


@dataclasses.dataclass
class Toy:
    """What a scheduler needs of an engine."""

    backend: Backend
    config: ModelConfig
    model: ReferenceModel

    def scheduler(self, *, backend: Backend | None = None, **changes: Any) -> Scheduler:  # Any: a parameter each
        settings = {"slots": 5, "queue": 64, "capacity": LONGEST, "prefill_rows": 7, **changes}
        return Scheduler(backend or self.backend, self.config, labels=LABELS, stop=STOP, **settings)


def build(model: ReferenceModel, folder: Path) -> Backend:
    """The decoder and what stands before it, as an engine has them."""
    folder.mkdir()
    config, model.decoder.ops = model.config, ExportOps()
    heads: Tensors = {name: value.numpy() for name, value in head_tensors(model).items()}
    for name in PARTS:
        path = folder / f"exported_{name}.onnx"
        export_part(model, parts(config)[name], path)
        if name == DECODER:
            decoder, heads = prepare_decoder(onnx.load(path), config, Recipe(name="toy"), heads)
            onnx.save_model(decoder, path)
        optimise(path, folder / f"{name}.onnx")
    model.decoder.ops = ReferenceOps()
    return OnnxRuntimeBackend(folder, config, heads=heads, threads=1, names=PARTS)


@pytest.fixture(
    scope="module", params=["grouped, token route", pytest.param("full, modality route", marks=pytest.mark.full)]
)
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toy]:
    model = toy_model(CONFIGS[request.param])
    backend = build(model, tmp_path_factory.mktemp("toy") / "engine")
    yield Toy(backend, model.config, model)
    backend.close()


def make_work(config: ModelConfig, seed: int, **changes: Any) -> Work:  # Any: a field of Work each
    """A random prompt: words, then what some fields bring, then words; a task, a strength and a sampling."""
    rng = np.random.default_rng(seed)
    sizes = {
        "face": (int(rng.integers(1, 4)), config.face.feature_size),
        "scene": (config.scene.tokens, config.scene.feature_size),
        "voice": (config.voice.tokens, config.voice.feature_size),
    }
    there = [field for field in KINDS if rng.random() < 0.7]
    features = {field: rng.standard_normal(sizes[field]).astype(np.float32) for field in there}
    ids, group = list(rng.integers(3, 60, rng.integers(1, 20))), []
    group = [TEXT] * len(ids)
    for field, values in features.items():
        ids += [HOLES[field]] * len(values)
        group += [KINDS[field]] * len(values)
    ids += list(rng.integers(3, 60, rng.integers(1, 60)))
    group += [TEXT] * (len(ids) - len(group))
    greedy = rng.random() < 0.6
    settings = {
        "ids": np.array(ids, np.int32), "group": np.array(group, np.int32), "features": features,
        "task": list(Task)[rng.integers(0, 3)], "strength": float(rng.random()), "max_tokens": int(rng.integers(1, 50)),
        "sampling": Sampling() if greedy else Sampling(temperature=1.3, top_p=0.9, seed=seed),
    }  # fmt: skip
    return Work(**{**settings, **changes})


def reason(config: ModelConfig, seed: int, **changes: Any) -> Work:  # Any: a field of Work each
    """Writes max_tokens tokens: the stop token is out of reach."""
    most = changes.setdefault("max_tokens", 20)
    return make_work(config, seed, task=Task.REASON, **{"min_tokens": most, **changes})


def alone(toy: Toy, work: Work) -> list[Said]:
    """What a request gets that has the decoder to itself, by the loop that parity is measured with."""
    fields = {field: slice(*np.flatnonzero(work.ids == HOLES[field])[[0, -1]] + [0, 1]) for field in work.features}
    prompt = Prompt(ids=work.ids, group=work.group, fields=fields)
    rows = Rows(muted=work.muted, strength=work.strength)
    generation = Generation(toy.backend, toy.config, prompt, rows, room=max(work.max_tokens, 3))
    out = generation.prefill(project(toy.backend, work.features))
    mass = np.stack([out[name][0, :, :, -1].mean(1) for name in ("mass_before", "mass_after")], axis=1)
    weights = out["expert_weights"][0].mean(0)
    none = np.zeros(weights.shape[1])
    experts = np.stack([weights[work.group == g].mean(0) if (work.group == g).any() else none for g in range(3)])
    logits = np.array(out["logits"][:, 0])
    said: list[Said] = [Prefilled(mass=mass, experts=experts)]
    if work.task is not Task.REASON:
        return [*said, Scored(scores=score_labels(generation, logits, LABELS))]
    stop = -1 if work.min_tokens else STOP
    sampler = Unstopped(work.sampling) if work.min_tokens else Sampler(work.sampling)
    first = [ids[0] for ids in LABELS]
    for token, seen in stream(generation, logits[0], sampler, stop=stop, limit=work.max_tokens):
        said.append(Token(id=token, scores=log_softmax(seen)[first] if token in first else None))
    return said


class Unstopped(Sampler):
    """Never picks the stop token."""

    def pick(self, logits: np.ndarray) -> int:  # type: ignore[type-arg]
        return super().pick(np.where(np.arange(len(logits)) == STOP, -np.inf, logits).astype(np.float32))


class Record:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.events: list[Said] = []
        self.error: MosearError | None = None
        self.ends = 0

    def said(self, event: Said) -> None:
        assert not self.ends
        self.events.append(event)

    def ended(self, error: MosearError | None) -> None:
        self.error, self.ends = error, self.ends + 1

    @property
    def tokens(self) -> list[int]:
        return [event.id for event in self.events if isinstance(event, Token)]


def assert_same(found: list[Said], wanted: list[Said]) -> None:
    assert [type(event) for event in found] == [type(event) for event in wanted]
    for one, two in zip(found, wanted):
        if isinstance(one, Token):
            assert isinstance(two, Token) and one.id == two.id
            assert (one.scores is None) == (two.scores is None)
            if one.scores is not None and two.scores is not None:
                assert_close(one.scores, two.scores, "toy")
        elif isinstance(one, Prefilled):
            assert isinstance(two, Prefilled)
            assert_close(one.mass, two.mass, "toy")
            assert_close(one.experts, two.experts, "toy")
        else:
            assert isinstance(two, Scored)
            assert_close(one.scores, two.scores, "toy")


def run_until_done(scheduler: Scheduler, records: list[Record], *, most: int = 2000) -> None:
    for _ in range(most):
        if all(record.ends for record in records):
            break
        scheduler.step()
    assert all(record.ends == 1 for record in records)
    assert scheduler.load.rows_used == 0 == scheduler.load.queued


def submit(scheduler: Scheduler, *works: Work) -> list[Record]:
    records = [Record() for _ in works]
    for work, record in zip(works, records):
        scheduler.submit(work, record)
    return records


@pytest.mark.parametrize("seed", range(12))
def test_an_answer_is_the_same_alone_and_in_every_mix(toy: Toy, seed: int) -> None:
    """Ten random requests arrive at random steps; three of them are withdrawn at random steps, wherever they are."""
    rng = np.random.default_rng(seed)
    scheduler = toy.scheduler(slots=int(rng.integers(3, 7)), prefill_rows=int(rng.integers(1, 40)))
    works = [make_work(toy.config, 1000 * seed + i) for i in range(10)]
    records = [Record() for _ in works]
    arrival = rng.integers(0, 60, len(works))
    leave = {int(i): int(arrival[i] + rng.integers(0, 40)) for i in rng.choice(len(works), 3, replace=False)}
    tickets = {}
    for now in range(110):
        for i in np.flatnonzero(arrival == now):
            tickets[i] = scheduler.submit(works[i], records[i])
        for i, when in leave.items():
            if when == now:
                tickets[i].cancel()
        scheduler.step()
    run_until_done(scheduler, records)
    for i, (work, record) in enumerate(zip(works, records)):
        wanted = alone(toy, work)
        if isinstance(record.error, CancelledError):
            assert i in leave
            wanted = wanted[: len(record.events)]
        else:
            assert record.error is None
        assert_same(record.events, wanted)


def test_one_caller_steps_it_without_a_thread(toy: Toy) -> None:
    scheduler = toy.scheduler(queue=1)
    for seed in range(4):
        work = make_work(toy.config, seed)
        assert_same(list(scheduler.decode(work)), alone(toy, work))
    assert scheduler.load.rows_used == 0 and scheduler.load.tokens_read > 0


def test_the_reference_has_the_same_cache(toy: Toy) -> None:
    """Moves, growth and blocks of rows in PyTorch too."""
    scheduler = toy.scheduler(backend=ReferenceBackend(toy.model))
    works = [reason(toy.config, seed, max_tokens=3 + 3 * seed) for seed in range(3)]
    works.append(make_work(toy.config, 9, task=Task.CONFLICT))
    records = submit(scheduler, *works)
    run_until_done(scheduler, records)
    for work, record in zip(works, records):
        assert_same(record.events, alone(toy, work))


def test_the_last_row_fills_a_hole(toy: Toy) -> None:
    """Rows end from the first to the last, so that each end moves another one."""
    works = [reason(toy.config, seed, max_tokens=12 + 6 * seed) for seed in range(5)]
    scheduler = toy.scheduler(prefill_rows=1000)
    records = submit(scheduler, *works)
    run_until_done(scheduler, records)
    for work, record in zip(works, records):
        assert len(record.tokens) == work.max_tokens
        assert_same(record.events, alone(toy, work))


def test_capacity_follows_what_runs(toy: Toy) -> None:
    """A long request makes the rows of a short one longer while it runs, and shorter again after it."""
    long_ids = np.random.default_rng(0).integers(3, 60, 190).astype(np.int32)
    short = reason(toy.config, 1, ids=long_ids[:20], group=np.zeros(20, np.int32), features={}, max_tokens=40)
    longer = reason(toy.config, 2, ids=long_ids, group=np.zeros(190, np.int32), features={}, max_tokens=4)
    scheduler = toy.scheduler(prefill_rows=50)
    records = submit(scheduler, short)
    scheduler.step()
    assert scheduler.load.capacity == CAPACITY_STEP
    records += submit(scheduler, longer)
    seen = []
    while not all(record.ends for record in records):
        scheduler.step()
        seen.append(scheduler.load.capacity)
    assert max(seen) > 190 and seen[-1] == CAPACITY_STEP
    for work, record in zip((short, longer), records):
        assert_same(record.events, alone(toy, work))


def test_capacity_changes_while_another_prompt_is_half_read(toy: Toy) -> None:
    """A decoding row crosses the capacity, or a long one ends, between two chunks of a prompt whose groups are known."""
    group = np.array([TEXT] * 30 + [AUDIO] * 3 + [VIDEO] * 20 + [TEXT] * 4, np.int32)
    ids = np.random.default_rng(3).integers(3, 60, 190).astype(np.int32)
    plain: dict[str, Any] = {"group": np.zeros(190, np.int32), "ids": ids, "features": {}}  # Any: a field of Work each
    short = {**plain, "group": plain["group"][:20], "ids": ids[:20]}
    then = make_work(toy.config, 2, ids=ids[:57], group=group, features={}, task=Task.CONFLICT)
    grows = [reason(toy.config, 1, **short, max_tokens=140)]
    shrinks = [reason(toy.config, 1, **plain, max_tokens=30), reason(toy.config, 1, **short, max_tokens=40)]
    for before, written in ((grows, 80), (shrinks, 15)):
        scheduler = toy.scheduler(prefill_rows=1)
        records = submit(scheduler, *before)
        while len(records[0].tokens) < written:
            scheduler.step()
        records += submit(scheduler, then)
        run_until_done(scheduler, records)
        for work, record in zip([*before, then], records):
            assert_same(record.events, alone(toy, work))


def test_a_conflict_report_beside_reasons_and_first_come_first_served(toy: Toy) -> None:
    scheduler = toy.scheduler(slots=4)
    whole = next(w for w in (make_work(toy.config, s, task=Task.CONFLICT) for s in range(99)) if len(w.muted) == 3)
    works = [reason(toy.config, 1), reason(toy.config, 2, max_tokens=40), whole, make_work(toy.config, 3)]
    records = submit(scheduler, *works)
    while not records[0].ends:  # two rows are free, three are needed; the last request fits but waits its turn
        assert not records[2].events and not records[3].events
        scheduler.step()
    run_until_done(scheduler, records)
    scored = records[2].events[-1]
    assert isinstance(scored, Scored) and scored.scores.shape == (3, 3)
    for work, record in zip(works, records):
        assert_same(record.events, alone(toy, work))


def test_the_stop_token_ends_a_reason_but_not_before_min_tokens(toy: Toy) -> None:
    sampling = Sampling(temperature=5.0, seed=0)
    found = (make_work(toy.config, s, task=Task.REASON, sampling=sampling, max_tokens=80) for s in range(99))
    work = next(w for w in found if 1 < len(alone(toy, w)) < 40)
    wanted = len(alone(toy, work)) - 1
    assert len(list(toy.scheduler().decode(work))) - 1 == wanted
    work = dataclasses.replace(work, min_tokens=wanted + 5)
    tokens = [event.id for event in toy.scheduler().decode(work) if isinstance(event, Token)]
    assert STOP not in tokens and len(tokens) >= wanted + 5


def test_cancelling_frees_the_rows_within_one_step(toy: Toy) -> None:
    scheduler = toy.scheduler(slots=3, prefill_rows=1)
    works = [reason(toy.config, 1), reason(toy.config, 2), reason(toy.config, 3)]
    records = [Record() for _ in works]
    tickets = [scheduler.submit(work, record) for work, record in zip(works, records)]
    scheduler.step()  # the first decodes
    scheduler.step()  # the second reads
    assert scheduler.load.rows_used == 2 and scheduler.load.queued == 1
    for ticket in tickets:
        ticket.cancel()
    scheduler.step()
    assert scheduler.load.rows_used == 0 == scheduler.load.queued
    assert all(isinstance(record.error, CancelledError) and record.ends == 1 for record in records)
    run = scheduler.decode(works[0])
    next(run)
    assert scheduler.load.rows_used == 1
    run.close()
    assert scheduler.load.rows_used == 0


def test_a_full_queue_is_said_and_taken_up_later(toy: Toy) -> None:
    scheduler = toy.scheduler(slots=1, queue=2)
    works = [reason(toy.config, seed, max_tokens=3) for seed in range(3)]
    records = submit(scheduler, *works[:2])
    with pytest.raises(BusyError, match=r"2 requests wait.*again"):
        scheduler.submit(works[2], Record())
    scheduler.step()
    records += submit(scheduler, works[2])
    run_until_done(scheduler, records)
    assert all(record.error is None for record in records)


def test_a_deadline_ends_what_waits_and_what_runs(toy: Toy) -> None:
    scheduler = toy.scheduler(slots=1)
    runs = reason(toy.config, 1, max_tokens=100, deadline_s=time.monotonic() + 0.15)
    waits = reason(toy.config, 2, deadline_s=time.monotonic() + 0.05)
    records = submit(scheduler, runs, waits, reason(toy.config, 3))
    scheduler.step()
    time.sleep(0.06)
    scheduler.step()
    assert isinstance(records[1].error, DeadlineError) and "queue" in str(records[1].error)
    time.sleep(0.1)
    scheduler.step()
    said = f"while answering, {len(records[0].tokens)} tokens written"
    assert isinstance(records[0].error, DeadlineError) and said in str(records[0].error)
    run_until_done(scheduler, records)
    assert records[2].error is None


BAD: dict[str, tuple[Callable[[Work], Work], type[MosearError], str]] = {
    "features missing": (lambda w: dataclasses.replace(w, features={}), RequestError, "4 places for voice"),
    "features too many": (
        lambda w: dataclasses.replace(w, ids=w.ids.clip(min=0)), RequestError, "0 places for voice .* 4 tokens",
    ),
    "features nan": (
        lambda w: dataclasses.replace(w, features={"voice": w.features["voice"] * np.nan}), RequestError, "not finite",
    ),
    "features huge": (
        lambda w: dataclasses.replace(w, features={"voice": np.full_like(w.features["voice"], 3e38)}),
        EngineError, "logits are not finite",
    ),
    "features of another size": (
        lambda w: dataclasses.replace(w, features={"voice": w.features["voice"][:, :3]}), RequestError, "voice_features",
    ),
    "an unknown hole": (lambda w: dataclasses.replace(w, ids=w.ids * 0 - 9), RequestError, "none of face"),
    "an unknown token": (lambda w: dataclasses.replace(w, ids=w.ids.clip(min=0) + 900, features={}), EngineError, "failed"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_ends_alone(toy: Toy, case: str) -> None:
    """Also for the request that comes after it into the same row."""
    spoil, kind, said = BAD[case]
    found = (make_work(toy.config, seed, task=Task.REASON) for seed in range(99))
    bad = spoil(next(work for work in found if list(work.features) == ["voice"]))
    goods = [reason(toy.config, seed, max_tokens=30) for seed in range(3)]
    scheduler = toy.scheduler(slots=3)
    records = submit(scheduler, *goods[:2], bad, goods[2])
    run_until_done(scheduler, records)
    assert isinstance(records[2].error, kind)
    with pytest.raises(kind, match=said):
        raise records[2].error
    for work, record in zip(goods, (*records[:2], records[3])):
        assert_same(record.events, alone(toy, work))


def test_what_can_never_fit_is_refused_at_once(toy: Toy) -> None:
    scheduler = toy.scheduler(slots=2)
    whole = next(w for w in (make_work(toy.config, s, task=Task.CONFLICT) for s in range(99)) if len(w.muted) == 3)
    with pytest.raises(RequestError, match=r"3 rows .* has 2"):
        scheduler.submit(whole, Record())
    with pytest.raises(RequestError, match=rf"600 may follow.*{LONGEST}"):
        scheduler.submit(reason(toy.config, 1, max_tokens=600), Record())
    with pytest.raises(RequestError, match="0 ids"):
        scheduler.submit(reason(toy.config, 1, ids=np.zeros(0, np.int32)), Record())
    assert scheduler.load.queued == 0


class Failing:
    """A backend whose decoder fails on the calls of so many sequences, as long as it is told to, and spoils the cache."""

    device, provider = "cpu", "failing"

    def __init__(self, backend: Backend) -> None:
        self.backend, self.sequences = backend, 0

    def run(self, part: str, tensors: Tensors) -> Tensors:
        return self.backend.run(part, tensors)

    def start(self, *, batch: int, capacity: int) -> DecoderState:
        return FailingState(self, self.backend.start(batch=batch, capacity=capacity))

    def close(self) -> None: ...


class FailingState:
    def __init__(self, owner: Failing, state: DecoderState) -> None:
        self.owner, self.move, self.clear, self.resize = owner, state.move, state.clear, state.resize
        self.state = state

    def step(self, tensors: Tensors, *, first: int = 0) -> Tensors:
        if len(tensors["hidden"]) == self.owner.sequences:
            assert isinstance(self.state, BoundDecoder)
            for array in self.state.cache.values():
                array[:] = np.nan
            raise OSError("the device is gone")
        return self.state.step(tensors, first=first)


def test_a_failed_step_ends_its_requests_and_those_that_wait_are_answered(toy: Toy) -> None:
    backend = Failing(toy.backend)
    scheduler = toy.scheduler(backend=backend, slots=2, prefill_rows=1000)
    works = [reason(toy.config, seed, max_tokens=30) for seed in range(4)]
    records = submit(scheduler, *works)
    while not records[1].tokens:
        scheduler.step()
    backend.sequences = 2
    scheduler.step()
    assert all("device is gone" in str(record.error) for record in records[:2])
    assert all(isinstance(record.error, EngineError) for record in records[:2])
    assert scheduler.load.rows_used == 0 and not records[2].ends
    backend.sequences = 0
    run_until_done(scheduler, records)
    for work, record in zip(works[2:], records[2:]):
        assert_same(record.events, alone(toy, work))


def test_a_listener_that_fails_is_cancelled_alone(toy: Toy) -> None:
    class Deaf(Record):
        def said(self, event: Said) -> None:
            raise ValueError("no")

    scheduler = toy.scheduler()
    deaf, heard = Deaf(), Record()
    works = [reason(toy.config, 1), reason(toy.config, 2)]
    scheduler.submit(works[0], deaf)
    scheduler.submit(works[1], heard)
    run_until_done(scheduler, [deaf, heard])
    assert isinstance(deaf.error, CancelledError)
    assert_same(heard.events, alone(toy, works[1]))


def test_eight_callers_at_once(toy: Toy) -> None:
    works = [make_work(toy.config, seed) for seed in range(40, 64)]
    with toy.scheduler() as scheduler, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda work: list(scheduler.decode(work)), works))
        run = scheduler.decode(reason(toy.config, 1, max_tokens=150))
        next(run)
        run.close()
        end = time.monotonic() + 5
        while scheduler.load.rows_used and time.monotonic() < end:
            time.sleep(0.001)
        assert scheduler.load.rows_used == 0
    for work, said in zip(works, found):
        assert_same(said, alone(toy, work))


def test_eight_callers_without_a_thread(toy: Toy) -> None:
    works, scheduler = [make_work(toy.config, seed) for seed in range(40, 56)], toy.scheduler()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda work: list(scheduler.decode(work)), works))
    for work, said in zip(works, found):
        assert_same(said, alone(toy, work))


@pytest.mark.parametrize("threaded", [True, False])
def test_closing_leaves_nobody_waiting(toy: Toy, threaded: bool) -> None:
    scheduler = toy.scheduler(slots=2)
    if threaded:
        scheduler.start()
    errors: list[MosearError] = []
    begun = threading.Semaphore(0)

    def ask(seed: int) -> None:
        try:
            for event in scheduler.decode(reason(toy.config, seed, max_tokens=150)):
                if isinstance(event, Prefilled):
                    begun.release()
        except MosearError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        assert begun.acquire(timeout=10)
    scheduler.close()
    for thread in threads:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in threads)
    assert all(isinstance(error, CancelledError) for error in errors) and len(errors) >= 2
    with pytest.raises(CancelledError, match="closed"):
        next(scheduler.decode(reason(toy.config, 1)))
    scheduler.close()
