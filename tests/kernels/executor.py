"""How kernel tests run without a GPU: two executors.

interpret()  Triton's interpreter (numpy), quick to start; for numbers. It holds bf16 as bit patterns and computes with
             them as if they were integers, without an error; `_Bfloat16` widens around every operation and rounds to
             nearest even on the way back. It neither sees accesses out of bounds nor races.
sanitise()   ttsem, in a process of its own: Triton's own front end, its IR executed on the CPU. True bf16 and tf32; an
             access out of bounds, a race between program instances or an undefined operation is reported with the
             kernel's line; what nobody wrote is NaN. Seconds per launch.

Triton decides when a function is decorated whether it is interpreted, and decorates functions of its own at import: so
`interpret` must come before Triton is imported. It leaves no trace in the environment: a process that a test starts
compiles as usual.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent
BITS_ONLY = ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal")  # numpy operations that give bools
Handle = Any  # triton's TensorHandle: untyped, and importable only once the mode is set


def interpret(*, bfloat16: bool = True) -> None:
    """Have all kernels that are decorated from now on interpreted; with `bfloat16`, faithfully so."""
    if "triton" in sys.modules:
        import triton

        if not triton.knobs.runtime.interpret:
            raise RuntimeError("Triton was imported before executor.interpret(): collect tests/kernels first")
    os.environ["TRITON_INTERPRET"] = "1"
    import triton
    import triton.language

    triton.knobs.propagate_env = False  # a knob of this process; children read the environment
    triton.knobs.runtime.interpret = True
    triton.knobs.propagate_env = True
    del os.environ["TRITON_INTERPRET"]
    if bfloat16:
        _Bfloat16().install()


def widen(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bf16 bit patterns as fp32: exact."""
    return (np.asarray(bits, np.uint32) << 16).view(np.float32)


def narrow(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """fp32 to bf16 bit patterns, to nearest even; a NaN stays one."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # past the largest number: infinity
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


class _Bfloat16:
    """The interpreter's operations with bf16 operands widened to fp32 and their results rounded back."""

    def __init__(self) -> None:
        import triton.language as tl
        from triton.runtime import interpreter

        self.tl, self.interpreter = tl, interpreter

    def is_bf16(self, handle: Handle) -> bool:
        return isinstance(handle, self.interpreter.TensorHandle) and handle.dtype.scalar == self.tl.bfloat16

    def up(self, handle: Handle) -> Handle:
        if not self.is_bf16(handle):
            return handle
        return self.interpreter.TensorHandle(widen(handle.data), self.tl.float32)

    def down(self, handle: Handle) -> Handle:
        return self.interpreter.TensorHandle(narrow(handle.data), self.tl.bfloat16)

    def install(self) -> None:
        builder = self.interpreter.InterpreterBuilder
        if hasattr(builder, "get_bf16"):
            return
        builder.get_bf16 = lambda _, value: self.down(
            self.interpreter.TensorHandle(np.array([value], np.float32), self.tl.float32)
        )
        for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_rsqrt", "create_erf"):
            setattr(builder, name, self.rounded(getattr(builder, name)))
        builder.create_dot = self.widened(builder.create_dot)
        builder.cast_impl = self.cast(builder.cast_impl)
        builder.create_fp_to_fp = self.cast(builder.create_fp_to_fp)
        for operations in (self.interpreter.ReduceOps, self.interpreter.ScanOps):
            operations.apply = self.reduced(operations.apply)

    def widened(self, plain: Callable[..., Handle]) -> Callable[..., Handle]:
        """`plain` on fp32 copies of what is bf16; the result as it comes (a product's type is its accumulator's)."""

        def call(builder: Any, *arguments: Any) -> Handle:
            return plain(builder, *map(self.up, arguments))

        return call

    def rounded(self, plain: Callable[..., Handle]) -> Callable[..., Handle]:
        """`plain` in fp32, rounded back; comparisons and selections need no rounding."""

        def call(builder: Any, *arguments: Any) -> Handle:
            if not any(map(self.is_bf16, arguments)) or arguments[-1] is np.where:
                return plain(builder, *arguments)
            result = plain(builder, *map(self.up, arguments))
            return result if getattr(arguments[-1], "__name__", "") in BITS_ONLY else self.down(result)

        return call

    def cast(self, plain: Callable[..., Handle]) -> Callable[..., Handle]:
        def call(builder: Any, source: Handle, target: Any, *rest: Any) -> Handle:
            wanted = target.scalar
            if self.is_bf16(source):
                source = self.up(source)
                if wanted == self.tl.float32:
                    return source
            if wanted != self.tl.bfloat16:
                return plain(builder, source, target, *rest)
            values = source.data.astype(np.float32)
            return self.down(self.interpreter.TensorHandle(values, self.tl.float32))

        return call

    def reduced(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """Reductions and scans work on the numpy array behind a tensor: hand them a widened one."""
        tl = self.tl

        def convert(tensor: Any, data: Handle, dtype: Any) -> Any:
            kind = tl.block_type(dtype, list(tensor.shape)) if tensor.type.is_block() else dtype
            return tl.core.tensor(data, kind)

        def call(operation: Any, tensors: Any) -> Any:
            if not isinstance(tensors, tuple):
                return call(operation, (tensors,))[0]
            if not any(self.is_bf16(t.handle) for t in tensors):
                return plain(operation, tensors)
            wide = tuple(convert(t, self.up(t.handle), tl.float32) if self.is_bf16(t.handle) else t for t in tensors)
            results = plain(operation, wide)
            return tuple(
                convert(r, self.down(r.handle), tl.bfloat16) if self.is_bf16(t.handle) and r.dtype == tl.float32 else r
                for r, t in zip(results, tensors, strict=False)
            )

        return call


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What ttsem says of one program: `kind` is ok, oob_read, oob_write, race, poison, or failed (it raised)."""

    kind: str
    launches: int
    line: str  # of the kernel's source, where there is a fault
    message: str
    races_unchecked: int  # launches too large to look for races in

    @property
    def clean(self) -> bool:
        return self.kind == "ok" and self.launches > 0 and self.races_unchecked == 0


def sanitise(programs: Sequence[str], *, cache: Path, timeout_s: float = 300.0) -> dict[str, Verdict]:
    """Run functions under ttsem, each "module:function" or "module:function:argument", the module in this folder.

    All in one process, so that Triton is imported once; `cache` is a folder for compiled kernels. A launcher needs no
    change: it is given CPU tensors. Whatever a function raises is its verdict, so it may assert numbers as well.
    """
    folders = [str(HERE), str(HERE.parent), *filter(None, sys.path)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(folders), "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(HERE / "executor.py"), *programs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    found = [json.loads(line.removeprefix(MARK)) for line in lines]
    if done.returncode or len(found) != len(programs):
        raise RuntimeError(f"ttsem's process ended with {done.returncode}: {done.stderr[-3000:]}{done.stdout[-1000:]}")
    return {name: Verdict(**verdict) for name, verdict in zip(programs, found, strict=True)}


MARK = "verdict: "


def _see_through_calls() -> None:
    """Have ttsem 0.1.0 name lines in functions that a kernel calls: it does not follow `callsite` in its locations."""
    from ttsem import sanitize

    plain = sanitize._source_of

    def source_of(operation: str, ir: str = "", kernel_file: str = "") -> tuple[str, int, str]:
        return plain(
            operation.replace("loc(callsite(unknown at ", "loc(").replace("loc(callsite(", "loc("), ir, kernel_file
        )

    sanitize._source_of = source_of


def _sanitise_here(program: str) -> dict[str, Any]:
    """One program's verdict, in this process."""
    import importlib
    import traceback

    from ttsem.sanitize import KernelFault, session

    module, function, *arguments = program.split(":", 2)
    kind, line, message = "ok", "", ""
    with session(source=program) as state:
        try:
            getattr(importlib.import_module(module), function)(*arguments)
        except KernelFault as stop:
            kind, line, message = stop.fault.kind, stop.fault.source_text, str(stop)
        except Exception:  # whatever it is, it is the verdict
            kind, message = "failed", traceback.format_exc()
    return {
        "kind": kind,
        "launches": state.launches,
        "line": line,
        "message": message,
        "races_unchecked": state.races_unchecked,
    }


if __name__ == "__main__":
    _see_through_calls()
    for program in sys.argv[1:]:
        print(MARK + json.dumps(_sanitise_here(program)), flush=True)
