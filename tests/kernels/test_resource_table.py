"""The committed table of resources: complete, within the bars, and what the compiler gives today."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mosear.kernels import table
from mosear.kernels.catalogue import Order, make, variants
from mosear.kernels.chips import ARCHS, chip_of, occupancy
from mosear.kernels.compile import versions

PATH = Path(__file__).parents[2] / "benchmarks" / "results" / "kernel_resources.json"
VERSIONS, ROWS = table.read(PATH)
# Of each kernel, one case that the default run compiles (for both of the chips whose bar is no spill at all).
SAMPLED_ARCHS = (90, 100)
EXPECT_TENSOR = (
    "prefill",
    "prefill_runs",
    "decode_split",
    "decode_split_paged",
    "modality_experts_shrink",
    "modality_experts_expand",
)


def sample() -> tuple[str, ...]:
    """The first label of each kernel's last binary for sm_90: the largest shape."""
    last = {row["kernel"]: row["cases"][0] for row in ROWS if row["arch"] == 90}
    return tuple(sorted(set(last.values())))


def compare(order: Order) -> Sequence[str]:
    made = versions()
    assert made == VERSIONS, f"the table was made with {VERSIONS}, here is {dict(made)}: run `make kernel-tables`"
    found = [table.row_of(row) for row in make(order)]
    assert found
    wanted = {(row["name"], row["arch"]): row for row in ROWS}
    for row in found:  # a case may stand alone here that shares a binary there
        row["cases"] = wanted.get(table.key_of(row), row)["cases"]
    return table.differences(found, ROWS)


def test_the_table_is_of_this_catalogue() -> None:
    expected = [(variant.name, variant.arch) for variant in variants(Order(archs=ARCHS))]
    assert [table.key_of(row) for row in ROWS] == expected, "kernels or launches changed: run `make kernel-tables`"


def test_a_sample_compiles_to_what_the_table_says() -> None:
    assert not compare(Order(archs=SAMPLED_ARCHS, data=("bf16",), labels=sample()))


@pytest.mark.full
def test_everything_compiles_to_what_the_table_says() -> None:
    assert not compare(Order(archs=ARCHS))


@pytest.mark.parametrize("arch", ARCHS)
def test_every_binary_can_run(arch: int) -> None:
    rows = [row for row in ROWS if row["arch"] == arch]
    assert rows
    for row in rows:
        assert row["shared_bytes"] <= row["shared_limit_bytes"] == chip_of(arch).shared_per_cta, row["name"]
        assert row["ctas"] >= 1, row["name"]
        fit = occupancy(
            chip_of(arch), registers=row["registers"], shared_bytes=row["shared_bytes"], warps=row["warps"],
            tensor_columns=row["tensor_columns"],
        )  # fmt: skip
        assert (fit.ctas, list(fit.limits)) == (row["ctas"], row["limits"])


def test_no_spills_where_the_bar_is_none() -> None:
    spilling = [(row["name"], row["arch"]) for row in ROWS if row["arch"] in (90, 100) and row["spill_store_bytes"]]
    assert not spilling


def test_products_run_on_tensor_cores() -> None:
    for row in ROWS:
        if row["kernel"] in EXPECT_TENSOR:
            assert sum(row["counts"].get(name, 0) for name in ("HMMA", "HGMMA", "UTCMMA")) > 0, row["name"]


def test_parameters_end_with_the_hidden_pointers() -> None:
    for row in ROWS:
        assert row["parameters"][-2:] == ["global_scratch: *i8", "profile_scratch: *i8"]
        sizes = [8 if ": *" in parameter else 4 for parameter in row["parameters"]]
        assert row["parameter_sizes"] == sizes, row["name"]


def test_a_new_spill_is_a_difference() -> None:
    row: dict[str, Any] = dict(ROWS[0]) | {"spill_store_bytes": 8}
    (line,) = table.differences([row], ROWS)
    assert "spill_store_bytes is 8, the table has" in line
    assert table.differences([ROWS[0]], ROWS) == []
    assert "not in the table" in table.differences([dict(ROWS[0], name="x")], ROWS)[0]


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table.write(tmp_path / "t.json", ROWS[:3], VERSIONS)
    assert table.read(tmp_path / "t.json") == (VERSIONS, json.loads(json.dumps(ROWS[:3])))
