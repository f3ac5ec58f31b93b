"""A server under load: `python benchmarks/throughput.py --serve`, or --url HOST:PORT of one that runs (see --help).

Closed loops at rising concurrency, then open loops at rates around the most that the closed ones reached.
"""

import argparse
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import machine
import throughput_report as report
from load import Load, arrivals, closed_loop, open_loop, time_events
from observed import Observed, growth
from throughput_report import Level, Loop
from workload import STRENGTH, make_demo_clip, request, say

from mosear.cli import REPOSITORY
from mosear.errors import MosearError, ServingError
from mosear.runtime.prompt import Task
from mosear.serving.client import Client

NOTES = (
    "closed loop: so many askers, one request under way each; one refused as busy is asked again after 0.5 s. Percentiles are of "
    "answers that came while no asker was out of work; rates leave out the first answers too, as many as there are askers; a "
    "request counts with the share of its time in the window.",
    "open loop: Poisson arrivals, nothing is asked again; a request's time begins when it should have been sent. "
    "Rates: from the begin to the last answer.",
    "first token: from the call (or arrival) to the first event of words, clip and encoders included. inter-token: between "
    "two events of words, which is a token each unless a character takes several.",
    "busy share: tries refused as busy, of all tries. other text: answers that differ from the one asked alone.",
    "tokens/s: of classify, answers (a label counts once, the server's mosear_tokens_total leaves it out).",
    "the askers share this machine's cores with the server.",
    "percentiles interpolate linearly between ranks; with few samples p99 is nearly the maximum.",
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="host:port of a running server's gRPC")
    where.add_argument("--serve", action="store_true", help="start a server for this run, on free ports")
    parser.add_argument(
        "--repository", type=Path, default=REPOSITORY, help="what --serve serves (default: %(default)s)"
    )
    parser.add_argument("--metrics-url", help="page of a running server's metrics (default: port 8002 of its host)")
    parser.add_argument("--server-pid", type=int, help="whose memory is read (default: whoever listens at the port)")
    parser.add_argument("--tasks", nargs="+", type=Task, default=[Task.REASON, Task.CLASSIFY], metavar="TASK")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], metavar="N")
    parser.add_argument("--requests", type=int, default=2, help="for each asker (default: %(default)s)")
    parser.add_argument("--least", type=int, default=50, help="requests of each closed loop (default: %(default)s)")
    parser.add_argument(
        "--limit-s", type=float, default=300, help="no request begins later in a level (default: %(default)s)"
    )
    parser.add_argument(
        "--loads", nargs="*", type=float, default=[0.5, 0.8, 1.2], metavar="X",
        help="rates of the open loops, in the most requests/s of the closed ones (default: 0.5 0.8 1.2; none: no open loops)",
    )  # fmt: skip
    parser.add_argument(
        "--rates", nargs="+", type=float, metavar="HZ", help="rates of the open loops, in requests/s instead"
    )
    parser.add_argument("--open-requests", type=int, default=40, help="for each rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    parser.add_argument("--tokens", type=int, default=128, help="of each reason (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results") / machine.slug())
    options = parser.parse_args()
    numbers = (options.requests, options.least, options.limit_s, options.open_requests, *options.concurrency, *options.loads,
               *(options.rates or ()))  # fmt: skip
    if min(numbers) <= 0 or options.tokens < 2 or options.least < 3:
        parser.error(
            "numbers must be above 0, --tokens 2 or more, --least 3 or more: the first and the last do not count"
        )
    options.concurrency = sorted({1, *options.concurrency})  # all else is held against 1
    return options


def run(options: argparse.Namespace, clip_path: Path) -> report.Result:
    """Everything, with the server stopped again if it was started here."""
    clip, levels, checks = clip_path.read_bytes(), list[Level](), {}
    memory: dict[str, dict[str, int]] = {}
    stamp = machine.stamp()
    target = Observed(
        options.url, repository=options.repository, metrics_url=options.metrics_url, pid=options.server_pid
    )  # fmt: skip
    with target:
        settings = target.settings()
        memory["before any request" if options.serve else "at the start"] = target.pss()
        start = target.counters()
        for task in options.tasks:
            bench = Bench(target, options, task, clip)
            checks[str(task)] = bench.check()
            memory[f"after {task} asked alone"] = target.pss()
            levels += bench.closed()
            levels += bench.open(max(level.requests_s for level in levels if level.task == task))
            memory[f"after {task} under load"] = target.pss()
        counted = growth(start, target.counters())
    stamp["load_average_after"] = machine.stamp()["load_average"]
    return report.Result(
        machine=stamp,
        settings={
            "tokens": options.tokens, "requests for each asker": options.requests,
            "least": options.least, "limit_s": options.limit_s,
            "open requests": options.open_requests, "seed": options.seed, "strength": STRENGTH, "served": settings,
        },
        checks=checks, levels=levels, server_times_s=target.times_s, stopped_by_itself=target.stopped_by_itself,
        server_pss_bytes=memory, server_counted=counted, notes=NOTES,
    )  # fmt: skip


class Bench:
    """One task on one server."""

    def __init__(self, target: Observed, options: argparse.Namespace, task: Task, clip: bytes) -> None:
        self.target, self.options, self.task = target, options, task
        self.request, self.clip_bytes = request(task, clip, tokens=options.tokens), len(clip)
        self.text = ""

    def check(self) -> dict[str, object]:
        """Ask twice, the first time to warm up; raises ServingError where the answers differ or have the wrong length."""
        with self._client() as client:
            answers = [time_events(client.stream(self.request)).answer for _ in range(2)]
        self.text, wanted = answers[0].text, self.options.tokens if self.task is Task.REASON else 1
        if answers[1].text != self.text or answers[1].tokens != wanted:
            raise ServingError(
                f"{self.task}: {answers[1].tokens} tokens where {wanted} were asked for, or two texts: {self.text!r} and "
                f"{answers[1].text!r}. Nothing was timed"
            )
        return {"text": self.text, "tokens": wanted, "prompt_tokens": answers[1].prompt_tokens}

    def closed(self) -> list[Level]:
        levels: list[Level] = []
        for concurrency in self.options.concurrency:
            with ExitStack() as stack:
                clients = [stack.enter_context(self._client()) for _ in range(concurrency)]
                asks = [partial(client.stream, self.request) for client in clients]
                count = max(self.options.least, self.options.requests * concurrency)
                before = self.target.counters()
                load = closed_loop(asks, requests=count, limit_s=self.options.limit_s)
            alone = levels[0].requests_s if levels else load.requests_s
            levels.append(self._level(Loop.CLOSED, concurrency, load, before=before, alone=alone))
        return levels

    def open(self, most_hz: float) -> list[Level]:
        options, levels = self.options, []
        for rate_hz in options.rates or [most_hz * share for share in options.loads]:
            limit_s = options.open_requests / rate_hz * 2
            times = arrivals(rate_hz, count=options.open_requests, limit_s=limit_s, seed=options.seed)
            before = self.target.counters()
            with self._client() as client:
                load = open_loop(partial(client.stream, self.request), times)
            levels.append(self._level(Loop.OPEN, rate_hz, load, before=before))
        return levels

    def _level(
        self, loop: Loop, offered: float, load: Load, *, before: dict[str, float], alone: float | None = None
    ) -> Level:
        if not load.answered:
            raise ServingError(f"{self.task}, {loop} loop at {offered:g}: no answer at all, but {dict(load.failed)}")
        level = report.summarise(
            self.task, loop, offered, load, text=self.text, alone=alone,
            server_counted=growth(before, self.target.counters()), server_pss_bytes=sum(self.target.pss().values()),
        )  # fmt: skip
        say(report.line(level))
        return level

    def _client(self) -> Client:
        return Client(self.target.url, clip_bytes=self.clip_bytes)


def main() -> int:
    options = parse_arguments()
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = run(options, make_demo_clip(Path(folder)))
    except MosearError as error:
        say(f"error: {error}")
        return 1
    print(report.text(result))
    for path in report.write(result, options.out):
        say(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
