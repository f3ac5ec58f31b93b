"""The executors: the interpreter's bf16 is torch's to the bit and would not be without the shim; ttsem sees faults."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import bfloat16_kernels
import numpy as np
import pytest
import torch
import triton
from executor import HERE, Verdict, narrow, sanitise, widen
from torch import Tensor

N = 64
BINARY = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "abs": lambda a, b: a.abs(),
    "neg": lambda a, b: -a,
    "where": lambda a, b: torch.where(a > b, a, b),
    "less": lambda a, b: (a < b).bfloat16(),
    "equal": lambda a, b: (a == b).bfloat16(),
    "scaled": lambda a, b: a * torch.tensor(0.3, dtype=torch.bfloat16),
    "full": lambda a, b: torch.full_like(a, 0.3),
}
REDUCTIONS = {"sum": lambda a: a.float().sum().bfloat16(), "max": torch.max, "min": torch.min}


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def operation_errors() -> dict[str, float]:
    """Largest difference to torch of each bf16 operation, under whichever interpreter this process has."""
    a, b = noise(0, N), noise(1, N)
    b[::5] = a[::5]
    found = {}

    def note(name: str, actual: Tensor, expected: Tensor) -> None:
        difference = (actual.double() - expected.double()).abs()
        found[name] = float(torch.nan_to_num(difference, nan=torch.inf).max())

    def run(name: str, kernel: object, *tensors: Tensor, **constants: object) -> bool:
        try:
            kernel[(1,)](*tensors, **constants, N=N)  # type: ignore[index]
        except Exception:  # an operation that the interpreter refuses is as wrong as a wrong number
            found[name] = float("inf")
            return False
        return True

    for name, exact in BINARY.items():
        y = torch.full_like(a, torch.nan)
        if run(name, bfloat16_kernels.elementwise, a, b, y, OP=name):
            note(name, y, exact(a, b))
    for name, reduce in REDUCTIONS.items():
        y = torch.full((1,), torch.nan, dtype=torch.bfloat16)
        if run(name, bfloat16_kernels.reduction, a, b, y, OP=name):
            note(name, y, reduce(a).reshape(1))
    y = torch.full_like(a, torch.nan)
    if run("cumsum", bfloat16_kernels.scan, a, b, y, OP="sum"):
        note("cumsum", y, a.float().cumsum(0).bfloat16())
    for dtype in (torch.float32, torch.float16):
        x = torch.randn(N, generator=torch.Generator().manual_seed(2)).to(dtype)
        y = torch.full((2, N), torch.nan, dtype=torch.bfloat16)
        if run(f"from {dtype}", bfloat16_kernels.to_bf16, x, y):
            note(f"from {dtype}", y, x.bfloat16().expand(2, N))
        x = torch.full((N,), torch.nan, dtype=dtype)
        if run(f"to {dtype}", bfloat16_kernels.from_bf16, a, x):
            note(f"to {dtype}", x, a.to(dtype))
    left, right, y = noise(3, N, N), noise(4, N, N), torch.full((N, N), torch.nan)
    if run("dot", bfloat16_kernels.product, left, right, y):
        note("dot", y, left.double() @ right.double())
    return found


def test_every_bf16_operation_is_torchs() -> None:
    errors = operation_errors()
    assert errors.pop("dot") < 1e-5  # the order of 64 sums in fp32
    assert len(errors) == 20 and not any(errors.values()), errors


@pytest.mark.full
def test_without_the_shim_they_are_wrong() -> None:
    """Only what Triton widens by itself (extrema), moves and exact conversions are right: why `_Bfloat16` exists."""
    program = "import json, executor; executor.interpret(bfloat16=False); import test_executor; "
    program += "print(json.dumps(test_executor.operation_errors()))"
    command, path = [sys.executable, "-W", "ignore", "-c", program], os.pathsep.join([str(HERE), *sys.path])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, cwd=HERE, capture_output=True, text=True, check=True
    )
    errors = json.loads(done.stdout.splitlines()[-1])
    wrong = {name for name, error in errors.items() if error}
    assert wrong >= {"add", "sub", "mul", "neg", "dot", "sum", "cumsum", "less", "equal", "where", "from torch.float32"}
    assert errors["dot"] > 1e3


def test_rounding_is_to_nearest_even_for_every_kind_of_number() -> None:
    bits = torch.arange(-(2**31), 2**31, 65521, dtype=torch.int64).int()  # an odd step: all exponents, both signs
    halfway = torch.arange(0, 2**15, dtype=torch.int64).mul(2**16).add(2**15).int()
    values = torch.cat([bits, halfway, halfway + 1, halfway - 1]).view(torch.float32)
    expected = values.bfloat16()
    ours = torch.from_numpy(widen(narrow(values.numpy()))).bfloat16()
    number = ~values.isnan()
    assert ours[number].equal(expected[number]) and ours[~number].isnan().all() and (~number).any()
    every = torch.arange(-(2**15), 2**15).short().view(torch.bfloat16)
    assert np.array_equal(widen(every.view(torch.int16).numpy().view(np.uint16)), every.float().numpy(), equal_nan=True)


def faulty(*, mask: bool, race: bool) -> None:
    """A copy of 100 elements by blocks of 64; without the mask it leaves the tensors, with a race all write one block."""
    import faulty_kernels

    x, y = torch.ones(100), torch.zeros(100)
    faulty_kernels.copy[(2,)](x, y, 100, MASK=mask, RACE=race, N=64)
    assert race or y.equal(x)


def clean() -> None:
    faulty(mask=True, race=False)


def out_of_bounds() -> None:
    faulty(mask=False, race=False)


def racing() -> None:
    faulty(mask=True, race=True)


def wrong_number() -> None:
    clean()
    raise AssertionError("no such number")


def no_launch() -> None:
    """Nothing was run: that is no proof of anything."""


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verdict]:
    names = ("clean", "out_of_bounds", "racing", "wrong_number", "no_launch", "bfloat16")
    found = sanitise([f"test_executor:{name}" for name in names], cache=tmp_path_factory.mktemp("cache"))
    return {name: found[f"test_executor:{name}"] for name in names}


def test_ttsem_names_the_line_of_a_fault(verdicts: dict[str, Verdict]) -> None:
    assert verdicts["clean"].clean and verdicts["clean"].launches == 1
    bad = verdicts["out_of_bounds"]
    assert (
        bad.kind == "oob_read"
        and bad.line == "return tl.load(x_ptr + at)"
        and re.search(r"reads \d+ element\(s\) past the end", bad.message)
    )
    assert verdicts["racing"].kind == "race" and "tl.store(y_ptr" in verdicts["racing"].line
    assert verdicts["wrong_number"].kind == "failed" and "no such number" in verdicts["wrong_number"].message
    assert verdicts["no_launch"].kind == "ok" and not verdicts["no_launch"].clean
    assert not any(verdict.clean for name, verdict in verdicts.items() if name not in ("clean", "bfloat16"))


def bfloat16() -> None:
    errors = operation_errors()
    assert errors.pop("dot") < 1e-5
    assert not any(errors.values()), errors


def test_ttsem_computes_bf16_as_torch_does(verdicts: dict[str, Verdict]) -> None:
    assert verdicts["bfloat16"].clean, verdicts["bfloat16"].message


def test_a_child_process_compiles(tmp_path: Path) -> None:
    """The mode is this process's own: what a test starts finds Triton as it is."""
    assert triton.knobs.runtime.interpret and "TRITON_INTERPRET" not in os.environ
    program = "import triton; from triton.language.standard import cdiv; print(type(cdiv).__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["JITFunction"]


def test_triton_must_not_be_there_before(tmp_path: Path) -> None:
    program = "import triton, executor; executor.interpret()"
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode and "collect tests/kernels first" in done.stderr
