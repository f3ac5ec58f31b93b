"""The benchmark's arithmetic and its report, on known numbers."""

import csv
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cases
import report


def toy() -> report.Result:
    rows = [
        report.summarise("toy", "classify", "face", "ms", [1.0, 2.0, 3.0], repeats=3),
        report.summarise("toy", "reason", "decode", "tokens/s", [10.0], repeats=1),
        report.summarise("toy", "reason", report.SHARE, "1", [0.2, 0.25, 0.5], repeats=3),
    ]
    shares = report.shares_of_bandwidth(rows, {"toy": 500}, best=25000.0)
    limits = {"read_bytes_s_best": 25000.0, "multiply_adds_s": 1.0}
    return report.Result(
        machine={"cpu": "toy", "cores": 2}, limits=limits, settings={"n": 3}, checks={}, rows=rows, shares=shares
    )


def test_percentiles_of_known_numbers() -> None:
    row = report.summarise("s", "c", "m", "ms", [float(i) for i in range(100, -1, -1)], repeats=5)
    assert (row.n, row.repeats) == (101, 5)
    assert (row.min, row.p50, row.p90, row.p99, row.max) == pytest.approx((0, 50, 90, 99, 100))


def test_shares_of_known_numbers() -> None:
    (share,) = toy().shares
    assert (share.subject, share.case, share.tokens_s, share.bytes_s) == ("toy", "reason", 10.0, 5000.0)
    assert (share.share, share.share_of_best) == (0.25, 0.2)


class Steady:
    """A memory that is read at a steady rate, and a subject that decodes at another."""

    name, bytes_per_token = "steady", 100

    def __init__(self) -> None:
        self.cases = {"reason": lambda: {("decode", "tokens/s"): [20.0]}, "classify": lambda: {("total", "ms"): [1.0]}}

    def bytes_s(self) -> float:
        return 8000.0


def test_each_decode_is_held_against_the_bandwidth_beside_it() -> None:
    timed, best = cases.time_all([(Steady(), 3)], Steady(), print)  # type: ignore[list-item, arg-type]
    assert timed["steady", "reason"][report.SHARE, "1"] == [0.25] * 3 and best == 8000.0
    assert (report.SHARE, "1") not in timed["steady", "classify"]


def test_decode_rate_leaves_the_first_token_out() -> None:
    samples = cases.Decoded(tokens=[1, 2, 3], prefill_ms=900.0, step_ms=[50.0, 150.0]).samples
    assert samples["decode", "tokens/s"] == pytest.approx([10.0])
    assert samples["prefill", "ms"] == [900.0]


@pytest.mark.parametrize(("count", "rounds"), [(1, 1), (3, 3), (5, 50), (3, 7), (2, 3)])
def test_runs_are_spread_over_all_rounds(count: int, rounds: int) -> None:
    assert sum(cases.due(i, count, rounds) for i in range(rounds)) == count
    assert cases.due(0, count, rounds)


def test_report_is_written(tmp_path: Path) -> None:
    paths = report.write(toy(), tmp_path / "new")
    assert [path.name for path in paths] == ["latency.json", "latency.csv", "latency.png"]
    data = json.loads(paths[0].read_text())
    assert data["shares"][0]["share"] == 0.25
    with paths[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["measure"], float(row["p50"])) for row in rows] == [
        ("face", 2.0),
        ("decode", 10.0),
        ("share of bandwidth", 0.25),
    ]
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_table_names_every_row() -> None:
    text = report.text(toy())
    assert "25.0%" in text and "tokens/s" in text and text.count("toy ") >= 3
