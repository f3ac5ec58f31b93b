"""From loads to levels, and from levels to a table, JSON, CSV and a picture."""

import csv
import dataclasses
import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from load import Load

from mosear.runtime.prompt import Task

NAME = "throughput"
SHARES = (50, 90, 99)


class Loop(enum.StrEnum):
    """closed: offered is the concurrency. open: offered is the rate in requests/s."""

    CLOSED = "closed"
    OPEN = "open"


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """With linear interpolation between ranks (numpy's default). n: samples."""

    n: int
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Percentiles | None":
        """None of no samples."""
        if not samples:
            return None
        p50, p90, p99 = map(float, np.percentile(samples, SHARES))
        return cls(n=len(samples), p50=p50, p90=p90, p99=p99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """What one load came to.

    counted, seconds: of the window that the rates hold for. speedup: requests/s over those of concurrency 1. server_tokens:
    what the server says it wrote (a label is no written token). server_pss_bytes: of all its processes after the level, 0
    where they cannot be seen.
    """

    task: Task
    loop: Loop
    offered: float
    answered: int
    counted: float
    seconds: float
    requests_s: float
    speedup: float | None
    tokens_s: float
    total_ms: Percentiles | None
    first_token_ms: Percentiles | None
    inter_token_ms: Percentiles | None
    inter_token_p99_over_p50: float | None
    busy_share: float
    failed: Mapping[str, int]
    other_text: int
    late_ms: float
    server_tokens: float
    server_counted: Mapping[str, float]
    server_pss_bytes: int

    def flat(self) -> dict[str, object]:
        """A row of the CSV: percentiles as `NAME_pXX`, failures as `KIND 3`; what the server counted stays in the JSON."""
        found: dict[str, object] = {}
        for name, value in dataclasses.asdict(self).items():
            if name.endswith("_ms") and name != "late_ms":
                found |= {f"{name}_p{share}": value[f"p{share}"] if value else None for share in SHARES}
            elif name == "failed":
                found[name] = "; ".join(f"{kind} {count}" for kind, count in value.items())
            elif name != "server_counted":
                found[name] = value
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All of a run."""

    machine: Mapping[str, object]
    settings: Mapping[str, object]
    checks: Mapping[str, object]
    levels: Sequence[Level]
    server_times_s: Mapping[str, float]
    stopped_by_itself: bool | None
    server_pss_bytes: Mapping[str, Mapping[str, int]]
    server_counted: Mapping[str, float]
    notes: Sequence[str] = ()


def summarise(
    task: Task, loop: Loop, offered: float, load: Load, *, text: str, alone: float | None,
    server_counted: Mapping[str, float], server_pss_bytes: int,
) -> Level:  # fmt: skip
    """`text`: of the answer asked alone. `alone`: requests/s of concurrency 1 (None: not held against it)."""
    steady = load.steady
    gaps = Percentiles.of([gap for timed in steady for gap in timed.gaps_ms])
    return Level(
        task=task, loop=loop, offered=offered, answered=len(load.answered), counted=load.counted, seconds=load.seconds,
        requests_s=load.requests_s, speedup=load.requests_s / alone if alone else None, tokens_s=load.tokens_s,
        total_ms=Percentiles.of([timed.total_ms for timed in steady]),
        first_token_ms=Percentiles.of([timed.first_token_ms for timed in steady if timed.words_s]),
        inter_token_ms=gaps, inter_token_p99_over_p50=gaps.p99 / gaps.p50 if gaps else None,
        busy_share=load.busy_share, failed=dict(load.failed),
        other_text=sum(timed.answer.text != text for timed in load.answered), late_ms=load.late_ms,
        server_tokens=server_counted.get("mosear_tokens_total", 0.0), server_counted=server_counted,
        server_pss_bytes=server_pss_bytes,
    )  # fmt: skip


HEAD = (
    f"{'task':<10}{'loop':<8}{'offered':>8}{'n':>5}{'req/s':>8}{'speedup':>9}{'tok/s':>8}{'total p50':>11}{'p99':>8}"
    f"{'first p50':>11}{'p90':>8}{'p99':>8}{'inter p50':>11}{'p90':>8}{'p99':>8}{'p99/p50':>9}{'busy':>7}  failed"
)


def line(level: Level) -> str:
    """A level as a row below HEAD; times in ms."""

    def cell(value: float | None, width: int, form: str) -> str:
        return f"{'-' if value is None else format(value, form):>{width}}"

    row, failed = level.flat(), level.flat()["failed"]
    numbers = (
        ("requests_s", 8, ".2f"), ("speedup", 9, ".2f"), ("tokens_s", 8, ".1f"), ("total_ms_p50", 11, ".0f"),
        ("total_ms_p99", 8, ".0f"), ("first_token_ms_p50", 11, ".0f"), ("first_token_ms_p90", 8, ".0f"),
        ("first_token_ms_p99", 8, ".0f"), ("inter_token_ms_p50", 11, ".1f"), ("inter_token_ms_p90", 8, ".1f"),
        ("inter_token_ms_p99", 8, ".1f"), ("inter_token_p99_over_p50", 9, ".2f"), ("busy_share", 7, ".0%"),
    )  # fmt: skip
    values: dict[str, Any] = row  # Any: of several types
    cells = "".join(cell(values[name], width, form) for name, width, form in numbers)
    wrong = f" other text {level.other_text}" if level.other_text else ""
    return f"{level.task:<10}{level.loop:<8}{level.offered:>8.3g}{level.answered:>5}{cells}  {failed}{wrong}"


def text(result: Result) -> str:
    """A plain table of everything."""
    lines = [f"{key}: {value}" for key, value in (*result.machine.items(), *result.settings.items())]
    lines += [f"checked {key}: {value}" for key, value in result.checks.items()]
    lines += ["", HEAD, *map(line, result.levels), ""]
    for when, parts in result.server_pss_bytes.items():
        shown = ", ".join(f"{name} {size / 1e6:.0f}" for name, size in parts.items())
        lines.append(f"memory {when}: {sum(parts.values()) / 1e6:.0f} MB ({shown})")
    lines += [f"server {what}: {seconds:.1f} s" for what, seconds in result.server_times_s.items()]
    lines += [f"server counted {name}: {value:g}" for name, value in result.server_counted.items()]
    if result.stopped_by_itself is False:
        lines.append("the server had to be stopped by force")
    return "\n".join([*lines, *(f"note: {note}" for note in result.notes)])


def write(result: Result, folder: Path) -> list[Path]:
    """Write throughput.json, throughput.csv and throughput.png into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{NAME}.{suffix}" for suffix in ("json", "csv", "png")]
    paths[0].write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n")
    rows = [level.flat() for level in result.levels]
    with paths[1].open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    draw(result, paths[2])
    return paths


def draw(result: Result, path: Path) -> None:
    """A row for each task: requests/s and time to the first token by concurrency, inter-token time, open loop."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    tasks = list(dict.fromkeys(level.task for level in result.levels))
    figure, grid = plt.subplots(len(tasks), 4, figsize=(18, 4 * len(tasks)), layout="constrained", squeeze=False)
    for row, task in zip(grid, tasks):
        closed, opened = (
            [level for level in result.levels if (level.task, level.loop) == (task, loop)] for loop in Loop
        )
        _rates(row[0], task, closed)
        _times(row[1], closed, "first_token_ms", title="time to first token", xlabel="concurrency")
        several = any(level.inter_token_ms for level in closed)  # a label comes in one piece
        measure, title = ("inter_token_ms", "inter-token time") if several else ("total_ms", "whole answer")
        _times(row[2], closed, measure, title=title, xlabel="concurrency")
        _times(row[3], opened, "total_ms", title="open loop: whole answer", xlabel="arrivals/s")
        busy = row[3].twinx()
        busy.plot([level.offered for level in opened], [level.busy_share for level in opened], "k:", marker="x")
        busy.set(ylabel="refused as busy (dotted)", ylim=(-0.02, 1.02))
    figure.suptitle(f"{result.machine.get('cpu', '?')}, {result.machine.get('cores', '?')} cores")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _rates(axes: Any, task: Task, levels: Sequence[Level]) -> None:  # Any: of matplotlib, which has no types
    at = [level.offered for level in levels]
    axes.plot(at, [level.requests_s for level in levels], "o-", label="answered")
    axes.axhline(levels[0].requests_s, color="gray", linestyle="--", linewidth=1, label="concurrency 1")
    axes.set(title=f"{task}: closed loop", xlabel="concurrency", ylabel="requests/s")
    axes.set_ylim(0, 1.1 * max(level.requests_s for level in levels))
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, [f"{value:g}" for value in at])
    axes.legend(fontsize="small")


def _times(axes: Any, levels: Sequence[Level], measure: str, *, title: str, xlabel: str) -> None:  # Any: as above
    shown = [(level.offered, found) for level in levels if (found := getattr(level, measure))]
    axes.set(title=title, xlabel=xlabel, ylabel="ms")
    if not shown:
        return
    at = [offered for offered, _ in shown]
    for share in SHARES:
        axes.plot(at, [getattr(found, f"p{share}") for _, found in shown], "o-", label=f"p{share}")
    axes.set_ylim(0, 1.1 * max(found.p99 for _, found in shown))
    if xlabel == "concurrency":
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, [f"{value:g}" for value in at])
    axes.legend(fontsize="small")
