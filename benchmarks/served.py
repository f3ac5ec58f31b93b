"""What a server adds: the same requests through a running server and on the same engine in process, in turn."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import machine
import report
from load import Ask, Timed, time_events
from workload import STRENGTH, request, say

from mosear.engine import Engine
from mosear.errors import EngineError
from mosear.runtime.prompt import Task
from mosear.serving.client import Client

NAME = "served"
SERVER, LOCAL, DIFFERENCE = "server", "in process", "difference"
SCORE_TOLERANCE = 1e-3  # log-probability of a label
NOTES = (
    "total and first token: at the caller, from the call on. Other measures of classify: what the answer says of its stages.",
    "inter-token: time between two events of words. difference: server minus in process in the same round, by pair; for "
    "inter-token, between the medians of the two answers.",
    "one request at a time; one side idles (20 ms at least, no thread spins) while the other works; who begins changes.",
    "percentiles interpolate linearly between ranks; with few samples p99 is nearly the maximum.",
)
Samples = dict[str, list[float]]  # by measure
Pair = tuple[Timed, Timed]  # server, in process


def compare(url: str, folder: Path, clip_path: Path, *, n: int, tokens: int) -> report.Result:
    """Both tasks, n times each; raises EngineError where the server's label or text is another than the engine's."""
    clip = clip_path.read_bytes()
    requests = {task: request(task, clip, tokens=tokens) for task in (Task.CLASSIFY, Task.REASON)}
    rows: list[report.Row] = []
    with Client(url) as client, Engine(folder) as engine:
        sides = {
            task: (partial(client.stream, asked), partial(engine.pipeline.stream, asked))
            for task, asked in requests.items()
        }
        checks = {str(task): check(task, *(time_events(side()) for side in both)) for task, both in sides.items()}
        stamp = machine.stamp()
        say("checked; timing")
        for task, both in sides.items():
            pairs = time_pairs(*both, n=n, quiet_s=machine.QUIET_S)
            rows += tabulate(str(task), pairs, stages=task is Task.CLASSIFY)
            say(f"timed: {task}")
        threads = engine.recipe.used_threads
    stamp["load_average_after"] = machine.stamp()["load_average"]
    settings = {"url": url, "engine": folder.name, "n": n, "tokens": tokens, "threads": threads, "strength": STRENGTH}
    return report.Result(
        machine=stamp, limits={}, settings=settings, checks=checks, rows=rows, shares=(), notes=NOTES
    )  # fmt: skip


def check(task: Task, server: Timed, local: Timed) -> Mapping[str, object]:
    """What was verified of the first pair; raises EngineError where they differ."""
    a, b = server.answer, local.answer
    error = 0.0
    if a.joint and b.joint:
        error = max(abs(a.joint.scores[label] - score) for label, score in b.joint.scores.items())
    same = (a.text, a.tokens, a.prompt_tokens, bool(a.joint)) == (b.text, b.tokens, b.prompt_tokens, bool(b.joint))
    if not same or error > SCORE_TOLERANCE:
        raise EngineError(
            f"{task}: the server says {a.text!r} ({a.prompt_tokens} tokens read), the engine {b.text!r} ({b.prompt_tokens}); "
            f"scores differ by {error:.1e}: is it the same engine? Nothing was timed"
        )
    return {"text": a.text, "tokens": a.tokens, "prompt_tokens": a.prompt_tokens, "largest score difference": error}


def time_pairs(server: Ask, local: Ask, *, n: int, quiet_s: float) -> list[Pair]:
    """n pairs; in every other round the engine in process begins."""
    calls: tuple[Callable[[], Timed], ...] = (lambda: time_events(server()), lambda: time_events(local()))
    pairs = []
    for round_ in range(n):
        found: dict[int, Timed] = {}
        for side in ((0, 1), (1, 0))[round_ % 2]:
            time.sleep(quiet_s)
            found[side] = calls[side]()
        pairs.append((found[0], found[1]))
    return pairs


def tabulate(case: str, pairs: Sequence[Pair], *, stages: bool) -> list[report.Row]:
    """Rows of server, in process and difference for each measure."""
    found: dict[str, Samples] = {name: defaultdict(list) for name in (SERVER, LOCAL, DIFFERENCE)}
    for pair in pairs:
        both = [measures(timed, stages=stages) for timed in pair]
        for name, samples in zip((SERVER, LOCAL), both):
            for measure, values in samples.items():
                found[name][measure] += values
        for measure in both[0].keys() & both[1].keys():
            middle = [statistics.median(samples[measure]) for samples in both]
            found[DIFFERENCE][measure].append(middle[0] - middle[1])
    return [
        report.summarise(name, case, measure, "ms", found[name][measure], repeats=len(pairs))
        for measure in found[SERVER]
        for name in found
        if found[name][measure]
    ]


def measures(timed: Timed, *, stages: bool) -> Samples:
    """Of one answer; with `stages`, what it says of them instead of the first token and the gaps."""
    if stages:
        told = {name: [ms] for name, ms in timed.answer.timings_ms.items() if name in report.STAGES}
        return {"total": [timed.total_ms], **told}
    return {"first token": [timed.first_token_ms], "inter-token": timed.gaps_ms, "total": [timed.total_ms]}
