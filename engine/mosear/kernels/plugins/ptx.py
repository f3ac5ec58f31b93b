"""A compiled kernel as what TensorRT embeds in a plan: PTX whose parameters are those that a plugin is launched with.

TensorRT passes pointers of all inputs, int32 scalars, pointers of all outputs; nothing else. Triton appends two pointers of
its own (scratch memory), and a node served by several kernels has tensors that a kernel does not know. PTX names its
parameters, and the body reads them by name: so the list is written anew in the node's order, what is not the kernel's is
declared under a name that the body never uses, and Triton's own are left out where the body never uses them.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from mosear.errors import KernelError
from mosear.kernels.chips import WARP
from mosear.kernels.compile import HIDDEN, Compiled, Parameter, compile_case, variant_key
from mosear.kernels.launch import Case
from mosear.kernels.plugins.op import PluginOp, Ranges, Site, Tactic

SHARED_WITHOUT_OPT_IN = 48 * 1024  # bytes of a CTA that every launch may have
NOTHING = "mosear_nothing"
PTX_VERSION = "8.7"  # the first that knows all of our architectures
POINTER = ".param .u64 .ptr .global .align 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """A tactic's PTX with its one entry, and the launch. `parameters`: names in the order that they are passed in.

    `number` is the tactic's for TensorRT: it follows from the variant that is compiled, so that one number never means two
    kernels, whatever the profile.
    """

    tactic: Tactic
    number: int
    symbol: str
    ptx: str
    threads: int
    shared_bytes: int
    parameters: tuple[str, ...]


def embed(op: PluginOp, tactic: Tactic, site: Site, ranges: Ranges) -> Embedded:
    """A tactic's kernel for a node; raises KernelError where it cannot be launched by TensorRT, or does not compile."""
    inputs, outputs = [f"{name}_ptr" for name in op.inputs], [f"{name}_ptr" for name in op.outputs]
    if tactic.kernel is None:
        return _nothing(tactic, site.arch, (*inputs, *outputs))
    case = tactic.case(ranges)
    key = f"{case.op.name},{variant_key(case, site.data)}"
    compiled = _compiled(key, case, site)
    order = (*inputs, *case.op.scalars, *outputs)
    return Embedded(
        tactic=tactic,
        number=_number(key),
        symbol=compiled.symbol,
        ptx=reordered(compiled.ptx, compiled.symbol, compiled.parameters, order),
        threads=compiled.warps * WARP,
        shared_bytes=compiled.shared_bytes,
        parameters=order,
    )


_COMPILED: dict[tuple[str, int], Compiled] = {}


def _compiled(key: str, case: Case, site: Site) -> Compiled:
    """Compile a variant once in a process: every layer asks for the same one."""
    if (key, site.arch) not in _COMPILED:
        _COMPILED[key, site.arch] = compile_case(case, arch=site.arch, data=site.data)
    return _COMPILED[key, site.arch]


def _number(key: str) -> int:
    """Positive, as TensorRT wants it."""
    return zlib.crc32(key.encode()) % (2**31 - 1) + 1


def reordered(ptx: str, symbol: str, own: Sequence[Parameter], order: Sequence[str]) -> str:
    """PTX whose entry takes `order`: the kernel's `own` parameters by name, others unused, hidden ones gone.

    Raises KernelError where the entry is not as expected, a hidden parameter is read, or one of its own is not in `order`.
    """
    entry = re.findall(rf"\.visible \.entry {re.escape(symbol)}\(\n(.*?)\n\)", ptx, re.DOTALL)
    if len(entry) != 1 or len(re.findall(r"^\s*\.visible \.entry ", ptx, re.MULTILINE)) != 1:
        raise KernelError(f"{symbol}: its PTX has not one entry of that name")
    declared = [line.strip().rstrip(",") for line in entry[0].splitlines()]
    if len(declared) != len(own):
        raise KernelError(f"{symbol}: its PTX takes {len(declared)} parameters, its compiler stated {len(own)}")
    known = {parameter.name: line for parameter, line in zip(own, declared)}
    for name in HIDDEN:
        line = known.pop(name, None)
        if line and len(re.findall(rf"\b{re.escape(line.split()[-1])}\b", ptx)) > 1:
            raise KernelError(f"{symbol} uses {name}, memory that TensorRT gives no plugin")
    if lost := [name for name in known if name not in order]:
        raise KernelError(f"{symbol} takes {', '.join(lost)}, which the plugin's node does not have")
    lines = [known.get(name) or f"{POINTER} {symbol}_unused_{i}" for i, name in enumerate(order)]
    return ptx.replace(entry[0], "\t" + ",\n\t".join(lines), 1)


def _nothing(tactic: Tactic, arch: int, pointers: tuple[str, ...]) -> Embedded:
    """A kernel that takes these pointers and returns."""
    target = f"sm_{arch}" + ("a" if arch >= 90 else "")
    lines = ",\n\t".join(f"{POINTER} {NOTHING}_param_{i}" for i in range(len(pointers)))
    ptx = (
        f".version {PTX_VERSION}\n.target {target}\n.address_size 64\n\n"
        f".visible .entry {NOTHING}(\n\t{lines}\n)\n{{\n\tret;\n}}\n"
    )
    return Embedded(
        tactic=tactic, number=_number(NOTHING), symbol=NOTHING, ptx=ptx, threads=1, shared_bytes=0, parameters=pointers
    )


def fitting(op: PluginOp, site: Site, ranges: Ranges, *, limit: int = SHARED_WITHOUT_OPT_IN) -> list[Embedded]:
    """What may serve a node in a profile: its tactics whose shared memory stays within `limit` bytes, each once.

    Of the spare ones the first that does, where no other does. Raises KernelError where none fits.
    """
    needs: list[int] = []
    found: dict[int, Embedded] = {}
    for tactic in sorted(op.tactics(ranges, site), key=lambda tactic: tactic.spare):
        if tactic.spare and found:
            break
        made = embed(op, tactic, site, ranges)
        needs.append(made.shared_bytes)
        if made.shared_bytes <= limit:
            found.setdefault(made.number, made)
    if not found:
        raise KernelError(
            f"{op.name} for sm_{site.arch} in {site.data} needs {min(needs)} bytes of shared memory: "
            f"a plugin may have {limit}, as nothing says that TensorRT opts in to more"
        )
    return list(found.values())
