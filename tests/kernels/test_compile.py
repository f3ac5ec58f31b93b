"""Compiling without a device: what the binary is, what the compiler was told, and what is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny_kernels import tiny

from mosear.errors import KernelError
from mosear.kernels.catalogue import Order, make, variants
from mosear.kernels.chips import ARCHS, CHIPS
from mosear.kernels.compile import compile_case

HERE = Path(__file__).parent
TENSOR = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCMMA", 120: "HMMA"}


@pytest.fixture(scope="module")
def probe() -> Mapping[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, str(HERE / "probe_compile.py")]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    result: Mapping[str, Any] = json.loads(found.stdout)
    return result


@pytest.mark.parametrize("arch", ARCHS)
def test_a_binary_for_every_arch(probe: Mapping[str, Any], arch: int) -> None:
    row = probe["rows"][str(arch)]
    assert row["target"].startswith(f".target sm_{arch}" + ("a" if arch >= 90 else ""))
    assert row["counts"].get(TENSOR[arch], 0) > 0, row["counts"]
    assert row["counts"].get("LDGSTS", 0) > 0, "no asynchronous copies: pointers are not known to be aligned"
    assert (row["spill_store_bytes"], row["spill_load_bytes"]) == (0, 0)
    assert row["parameter_sizes"] == [8, 8, 8, 4, 4, 8, 8, 8]  # two hidden pointers last
    assert 0 < row["shared_bytes"] <= row["shared_limit_bytes"]
    assert (row["tensor_columns"] > 0) == (arch == 100)
    assert not row["says_where"], "the binary holds a path of this machine"


@pytest.mark.parametrize("arch", ARCHS)
def test_the_same_ptx_gives_the_same_binary(probe: Mapping[str, Any], arch: int) -> None:
    if arch == 100 and not probe["addresses_are_fixed"]:
        pytest.skip(
            "this system does not let a process fix its addresses: sm_100 binaries vary in two functions' order"
        )
    assert probe["rows"][str(arch)]["again"]


def test_divisibility_is_what_the_case_says(probe: Mapping[str, Any]) -> None:
    # x, w, row_group, rows, cols, y, two hidden: 56 rows, then 48; 512 columns.
    assert probe["aligned"] == ["yyynyynn", "yyyyyynn"]
    assert probe["aligned_differs"]


def test_a_spill_is_seen(probe: Mapping[str, Any]) -> None:
    row = probe["spilling"]
    assert row["spill_store_bytes"] > 0 and row["spill_load_bytes"] > 0 and row["counts"]["local"] > 0


def test_the_loop_is_found_with_its_lines(probe: Mapping[str, Any]) -> None:
    loop = probe["loop"]
    assert loop["loops"] == 1 and loop["HMMA inside"] == loop["HMMA"] > 0
    assert loop["lines"] == ["total = tl.dot(x, w, total)"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("order", "KernelError: wrong_order: its function takes"),
        ("arch", "ConfigError: arch is 75: kernels are compiled for 80, 86, 89, 90, 100, 120"),
        ("data", "KernelError: tiny_product for sm_80, 'tiny': the compiler failed"),
        ("int32", "KernelError: tiny_product: rows is 2147483648"),
        ("parameters", "parameters of (8, 8, 8, 4, 4, 8, 8, 8) bytes, stated (4, 8,"),
    ],
)
def test_what_is_refused(probe: Mapping[str, Any], what: str, message: str) -> None:
    assert message in probe["refused"][what]


def test_an_interpreted_kernel_is_refused() -> None:
    with pytest.raises(KernelError, match="without TRITON_INTERPRET"):
        compile_case(tiny(), arch=80, data="bf16")


def order(**changes: Any) -> Order:
    return Order(**{"archs": (80,), "modules": ("tiny_kernels",), "paths": (str(HERE),), "data": ("bf16",)} | changes)


def test_cases_that_share_a_binary_are_compiled_once() -> None:
    found = variants(order(data=("bf16", "fp16"), archs=(80, 90)))
    labels = [[case.label for case in variant.cases] for variant in found]
    assert labels == [["tiny", "again"]] * 2 + [["aligned"]] * 2 + [["large"]] * 2 + labels[6:]
    assert len(found) == 12 and len({(v.name, v.arch) for v in found}) == 12


def test_an_unknown_label_is_refused() -> None:
    with pytest.raises(KernelError, match="no case has the label 'x'"):
        variants(order(labels=("tiny", "x")))


@pytest.mark.full
def test_workers_give_every_variant_once_and_in_order() -> None:
    said: list[str] = []
    rows = make(order(), workers=2, say=said.append)
    assert [[case["label"] for case in row["cases"]] for row in rows] == [["tiny", "again"], ["aligned"], ["large"]]
    assert sorted(line.split()[0] for line in said) == ["1/3", "2/3", "3/3"]


@pytest.mark.full
def test_a_worker_tells_what_failed() -> None:
    with pytest.raises(KernelError, match="no case has the label 'x'"):
        make(order(labels=("x",)), workers=1)


def test_tensor_rates_are_the_data_sheets_peak() -> None:
    """A wrong clock, count or rate would not give the peak that the maker states."""
    for chip in CHIPS:
        rate = chip.tensor_flops_s / (2 * chip.multiprocessors * chip.boost_hz)
        assert rate == pytest.approx(chip.tensor_rate, rel=0.01), chip.name
