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
    ]
    share = report.share_of_bandwidth("toy", "reason", tokens_s=10.0, bytes_per_token=500, bandwidth=20000.0)
    limits = {"read_bytes_s": 20000.0, "multiply_adds_s": 1.0}
    return report.Result(
        machine={"cpu": "toy", "cores": 2}, limits=limits, settings={"n": 3}, checks={}, rows=rows, shares=[share]
    )


def test_percentiles_of_known_numbers() -> None:
    row = report.summarise("s", "c", "m", "ms", [float(i) for i in range(100, -1, -1)], repeats=5)
    assert (row.n, row.repeats) == (101, 5)
    assert (row.min, row.p50, row.p90, row.p99, row.max) == pytest.approx((0, 50, 90, 99, 100))


def test_share_of_known_numbers() -> None:
    share = report.share_of_bandwidth("s", "c", tokens_s=20.0, bytes_per_token=500, bandwidth=40000.0)
    assert (share.bytes_s, share.share) == (10000.0, 0.25)


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
    assert [(row["measure"], float(row["p50"])) for row in rows] == [("face", 2.0), ("decode", 10.0)]
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_table_names_every_row() -> None:
    text = report.text(toy())
    assert "25.0%" in text and "tokens/s" in text and text.count("toy ") >= 3
