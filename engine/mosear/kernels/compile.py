"""A kernel in one configuration, compiled for an architecture: no device, no driver.

What the compiler may assume is decided here and nowhere else:
- every pointer is a multiple of 16 bytes (allocations are; a launcher checks it), without which no 16-byte copies;
- an int32 scalar is a multiple of 16 where the case's value is: what a launch with that value would assume too;
- no scalar is folded for being 1: the binary serves any value of the same divisibility;
- multiply and add are fused (Triton's default today, said aloud because later versions change it);
- no line information unless asked for: it would put the paths of this machine into the binary.

The binary is assembled here from Triton's PTX with Triton's assembler and options. ptxas for sm_100 writes a few internal
functions in an order that follows its addresses in memory, so that two runs give two files (the kernel is the same):
`fix_addresses` ends that.
"""

import contextlib
import ctypes
import functools
import hashlib
import io
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosear.errors import KernelError
from mosear.kernels.chips import chip_of
from mosear.kernels.launch import Case, KernelOp, Kind

ALIGNMENT = 16  # bytes of a pointer, and the divisor that a scalar's value is tested for
HIDDEN = ("global_scratch", "profile_scratch")  # pointers that Triton adds behind the kernel's own parameters; null
POINTER_BYTES, SCALAR_BYTES = 8, 4
ASSEMBLER_OPTIONS = (
    "-lineinfo",
    "-suppress-debug-info",
    "--regAllocOptLevel=2",
)  # Triton's own without line information
ADDR_NO_RANDOMIZE, QUERY = 0x0040000, 0xFFFFFFFF  # personality(2)
TRIES = 8  # where addresses cannot be fixed


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of the binary: `type` as Triton writes it; `aligned`: its value is a multiple of 16."""

    name: str
    type: str
    size: int
    aligned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What ptxas -v tells: registers, stack and spills of a thread, static shared memory; all but registers in bytes."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_shared: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A binary and what its launch needs. `parameters` holds the hidden pointers too, last."""

    name: str
    symbol: str
    arch: int
    data: str
    cubin: bytes
    ptx: str
    usage: Usage
    parameters: tuple[Parameter, ...]
    warps: int
    shared_bytes: int
    tensor_columns: int
    seconds: float


def parameters_of(case: Case, data: str) -> tuple[Parameter, ...]:
    """The kernel's own parameters in order; raises KernelError where the function disagrees with its KernelOp."""
    op = case.op
    types = {Kind.DATA: data, Kind.F32: "fp32", Kind.I32: "i32"}
    found = [_pointer(name, types[kind]) for name, kind in op.inputs.items()]
    for name in op.scalars:
        if not -(2**31) <= case.scalars[name] < 2**31:
            raise KernelError(f"{op.name}: {name} is {case.scalars[name]} in {case.label!r}: it does not fit in int32")
        aligned = case.scalars[name] % ALIGNMENT == 0
        found.append(Parameter(name=name, type="i32", size=SCALAR_BYTES, aligned=aligned))
    found += [_pointer(name, types[kind]) for name, kind in op.outputs.items()]
    stated = [*(p.name for p in found), *case.launch.constants]
    actual = list(argument_names(op))
    if stated[: len(found)] != actual[: len(found)] or sorted(stated) != sorted(actual):
        raise KernelError(
            f"{op.name}: its function takes {actual}, its op and launch state {stated}: "
            "the order is inputs, scalars, outputs, constants"
        )
    return tuple(found)


def argument_names(op: KernelOp) -> tuple[str, ...]:
    """Names of the function's parameters, constants among them."""
    return tuple(op.function.arg_names)


def _pointer(name: str, element: str) -> Parameter:
    return Parameter(name=name, type=f"*{element}", size=POINTER_BYTES, aligned=True)


def variant_key(case: Case, data: str) -> str:
    """What tells one binary of an op from another: element type, constants, warps, stages, divisibility."""
    aligned = [p.name for p in parameters_of(case, data) if p.type == "i32" and p.aligned]
    launch = case.launch
    constants = [f"{name}={value}" for name, value in launch.constants.items()]
    return ",".join([data, *constants, f"warps={launch.warps}", f"stages={launch.stages}", "16|" + "+".join(aligned)])


def variant_name(case: Case, data: str) -> str:
    """A file name for a binary without its architecture."""
    digest = hashlib.sha256(f"{case.op.name},{variant_key(case, data)}".encode()).hexdigest()
    return f"{case.op.name}-{data}-{digest[:8]}"


def compile_case(case: Case, *, arch: int, data: str, lines: bool = False) -> Compiled:
    """Compile a case for `arch` with activations of type `data` (fp32, fp16 or bf16).

    `lines`: the binary is Triton's own, with line information, for reading the disassembly. Raises ConfigError for an
    unknown arch, KernelError where the compiler fails or Triton runs in its interpreter.
    """
    chip_of(arch)
    from triton import compile as triton_compile
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = case.op.function
    if not hasattr(function, "cache_key"):
        raise KernelError(
            f"{case.op.name} was made for Triton's interpreter: compile in a process without TRITON_INTERPRET"
        )
    own = parameters_of(case, data)
    types = {p.name: p.type for p in own}
    names = argument_names(case.op)
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=dict(case.launch.constants),
        attrs={(names.index(p.name),): [["tt.divisibility", ALIGNMENT]] for p in own if p.aligned},
    )
    options = {"num_warps": case.launch.warps, "num_stages": case.launch.stages, "enable_fp_fusion": True}
    start = time.perf_counter()
    printed = io.StringIO()
    try:
        with knobs.compilation.scope(), contextlib.redirect_stdout(printed):  # where it fails it prints all the PTX
            knobs.compilation.disable_line_info = not lines
            made = triton_compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # whatever the compiler raises
        said = next((line for line in str(error).splitlines() if line.strip()), "") or type(error).__name__
        raise KernelError(f"{case.op.name} for sm_{arch}, {case.label!r}: the compiler failed: {said}") from error
    metadata = made.metadata
    cubin, usage = assemble(made.asm["ptx"], arch)
    if lines:
        cubin = made.asm["cubin"]
    elif cubin != made.asm["cubin"] and arch < 100:
        raise KernelError(f"{case.op.name} for sm_{arch}: assembled again it is another binary than Triton's")
    if scratch := (metadata.global_scratch_size, metadata.profile_scratch_size) != (0, 0):
        raise KernelError(f"{case.op.name} for sm_{arch} wants scratch memory ({scratch}), which no launcher gives it")
    return Compiled(
        name=variant_name(case, data),
        symbol=metadata.name,
        arch=arch,
        data=data,
        cubin=cubin,
        ptx=made.asm["ptx"],
        usage=usage,
        parameters=(*own, *(Parameter(name=n, type="*i8", size=POINTER_BYTES, aligned=False) for n in HIDDEN)),
        warps=metadata.num_warps,
        shared_bytes=metadata.shared,
        tensor_columns=metadata.tmem_size or 0,
        seconds=time.perf_counter() - start,
    )


@functools.cache
def tool(name: str) -> Path:
    """A binary utility of the Triton package: ptxas, ptxas-blackwell, nvdisasm, cuobjdump."""
    from triton.backends import nvidia

    return Path(nvidia.__file__).parent / "bin" / name


def assembler(arch: int) -> Path:
    """The assembler that Triton uses for an architecture (3.7: the newer one from sm_100 on)."""
    from triton.backends.nvidia.compiler import get_ptxas

    return Path(get_ptxas(arch).path)


def assemble(ptx: str, arch: int) -> tuple[bytes, Usage]:
    """A binary from PTX, and what the assembler says of it."""
    target = f"sm_{arch}" + ("a" if arch >= 90 else "")
    made = []
    for _ in range(1 if arch < 100 or addresses_are_fixed() else TRIES):
        with on_disk(ptx.encode(), ".ptx") as source, on_disk(b"", ".cubin") as result:
            arguments = ["-v", *ASSEMBLER_OPTIONS, f"--gpu-name={target}", source, "-o", result]
            _, said = call(assembler(arch), *arguments)
            made.append(result.read_bytes())
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    used = re.search(r"Used (\d+) registers", said)
    if not frame or not used:
        raise KernelError(f"ptxas -v tells no registers for sm_{arch}: {said[:200]}")
    static = re.search(r"(\d+) bytes smem", said)
    stack, stores, loads = map(int, frame.groups())
    usage = Usage(
        registers=int(used[1]), stack=stack, spill_stores=stores, spill_loads=loads,
        static_shared=int(static[1]) if static else 0,
    )  # fmt: skip
    return min(made), usage


def fix_addresses() -> None:
    """Programs that this process starts from now on get the same addresses every time, where the system allows it.

    Where it does not (some containers), sm_100 is assembled `TRIES` times and the first file in order is taken.
    """
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).personality(ctypes.c_ulong(ADDR_NO_RANDOMIZE))


def addresses_are_fixed() -> bool:
    """Whether `fix_addresses` had its way."""
    try:
        found = ctypes.CDLL(None).personality(ctypes.c_ulong(QUERY))
    except (OSError, AttributeError):
        return False
    return found != -1 and bool(found & ADDR_NO_RANDOMIZE)


def call(program: Path, *arguments: str | Path) -> tuple[str, str]:
    """Run a binary utility; returns stdout and stderr. Raises KernelError where it fails."""
    found = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if found.returncode:
        raise KernelError(f"{program.name} failed with status {found.returncode}: {found.stderr.strip()[:300]}")
    return found.stdout, found.stderr


@contextlib.contextmanager
def on_disk(content: bytes, suffix: str) -> Any:  # Any: contextlib's decorator types the result
    """A file that lasts as long as the block."""
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(content)
        file.flush()
        yield Path(file.name)


def versions() -> Mapping[str, str]:
    """Versions of all that makes a binary."""
    import triton

    found = {"triton": str(triton.__version__)}
    for arch, name in ((80, "ptxas"), (100, "ptxas_blackwell")):
        text, _ = call(assembler(arch), "--version")
        found[name] = text.split("release ")[1].split("\n")[0].split(", ")[-1]
    return found
