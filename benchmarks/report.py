"""From samples to rows, and from rows to a table, JSON, CSV and a picture."""

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

NAME = "latency"
COLUMNS = ("subject", "case", "measure", "unit", "repeats", "n", "min", "p50", "p90", "p99", "max")
STAGES = ("media", "face_detector", "face", "scene", "voice", "prefill", "labels")
DECODE, SHARE = "decode", "share of bandwidth"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measure of one case. `n` samples from `repeats` runs (a decode run gives a sample for each token)."""

    subject: str
    case: str
    measure: str
    unit: str
    repeats: int
    n: int
    min: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Decode against the measured read bandwidth: share = tokens/s * bytes per token / bandwidth.

    share: the median over runs, each against the readings just before and after it; share_of_best: the median rate
    against the best reading of all.
    """

    subject: str
    case: str
    tokens_s: float
    bytes_per_token: int
    bytes_s: float
    share: float
    share_of_best: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All of a run."""

    machine: Mapping[str, object]
    limits: Mapping[str, float]
    settings: Mapping[str, object]
    checks: Mapping[str, object]
    rows: Sequence[Row]
    shares: Sequence[Share]
    memory: Mapping[str, object] = field(default_factory=dict)
    notes: Sequence[str] = ()


def summarise(subject: str, case: str, measure: str, unit: str, samples: Sequence[float], *, repeats: int) -> Row:
    """Percentiles with linear interpolation between ranks (numpy's default)."""
    p50, p90, p99 = map(float, np.percentile(samples, (50, 90, 99)))
    return Row(
        subject=subject, case=case, measure=measure, unit=unit, repeats=repeats, n=len(samples),
        min=float(min(samples)), p50=p50, p90=p90, p99=p99, max=float(max(samples)),
    )  # fmt: skip


def shares_of_bandwidth(rows: Sequence[Row], bytes_per_token: Mapping[str, int], best: float) -> list[Share]:
    """One for each case that has a row SHARE beside its row DECODE."""
    found = {(row.subject, row.case, row.measure): row.p50 for row in rows}
    shares = []
    for (subject, case, measure), share in found.items():
        if measure == SHARE:
            rate, size = found[subject, case, DECODE], bytes_per_token[subject]
            shares.append(
                Share(
                    subject=subject, case=case, tokens_s=rate, bytes_per_token=size, bytes_s=rate * size,
                    share=share, share_of_best=rate * size / best,
                )
            )  # fmt: skip
    return shares


def write(result: Result, folder: Path) -> list[Path]:
    """Write latency.json, latency.csv and latency.png into `folder`; returns their paths."""
    paths = [*write_tables(result, folder, name=NAME), folder / f"{NAME}.png"]
    draw(result, paths[-1])
    return paths


def write_tables(result: Result, folder: Path, *, name: str) -> list[Path]:
    """The JSON and the CSV alone."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("json", "csv")]
    paths[0].write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n")
    with paths[1].open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(map(dataclasses.asdict, result.rows))
    return paths


def text(result: Result) -> str:
    """A plain table of everything."""
    lines = [f"{key}: {value}" for key, value in (*result.machine.items(), *result.settings.items())]
    lines += [f"measured limit {key}: {value:.4g}" for key, value in result.limits.items()]
    lines += [f"checked {key}: {value}" for key, value in result.checks.items()]
    form = "{:<22}{:<16}{:<18}{:<9}{:>4}{:>6}{:>9}{:>9}{:>9}{:>9}{:>9}"
    lines += ["", form.format(*COLUMNS)]
    for row in result.rows:
        values = list(dataclasses.asdict(row).values())
        lines.append(form.format(*values[:6], *(f"{value:.2f}" for value in values[6:])))
    if result.shares:
        lines += [
            "",
            f"{'subject':<22}{'case':<16}{'tokens/s':>9}{'MB/token':>10}{'GB/s':>8}{'share':>8}{'of best':>9}",
        ]
    lines += [
        f"{s.subject:<22}{s.case:<16}{s.tokens_s:>9.2f}{s.bytes_per_token / 1e6:>10.1f}{s.bytes_s / 1e9:>8.2f}{s.share:>8.1%}"
        f"{s.share_of_best:>9.1%}"
        for s in result.shares
    ]
    lines += ["", *(f"memory {key}: {value}" for key, value in result.memory.items())]
    return "\n".join([*lines, *(f"note: {note}" for note in result.notes)])


def draw(result: Result, path: Path) -> None:
    """Left: median ms of each stage of classify, stacked. Right: decode tokens/s, with the bandwidth's limit marked."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    stages = {(row.subject, row.measure): row.p50 for row in result.rows if row.case == "classify"}
    subjects = list(dict.fromkeys(subject for subject, _ in stages))
    start = np.zeros(len(subjects))
    for stage in STAGES:
        widths = np.array([stages.get((subject, stage), 0.0) for subject in subjects])
        left.barh(subjects, widths, left=start, label=stage)
        start += widths
    left.set(xlabel="ms, sum of the stages' medians", title="classify: bytes to answer")
    left.invert_yaxis()
    left.legend(fontsize="small")
    names = [f"{share.subject}\n{share.case}" for share in result.shares]
    right.barh(names, [share.tokens_s for share in result.shares], color="tab:blue")
    marks = [share.tokens_s / share.share for share in result.shares]
    right.plot(marks, names, "k|", markersize=18, label="read bandwidth beside it / weight bytes per token")
    right.set(xlabel="tokens/s, median", title="greedy decode")
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize="small")
    right.legend(fontsize="small")
    figure.suptitle(f"{result.machine.get('cpu', '?')}, {result.machine.get('cores', '?')} cores")
    figure.savefig(path, dpi=120)
    plt.close(figure)
