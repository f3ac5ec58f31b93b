"""What a binary takes of a chip, read from the binary itself: registers, spills, shared memory, occupancy, instructions."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mosear.errors import KernelError
from mosear.kernels.chips import chip_of, occupancy
from mosear.kernels.compile import Compiled, call, on_disk, tool
from mosear.kernels.sass import disassemble

# What is counted: tensor-core instructions, then copies into shared memory, then local memory (spills show there too).
COUNTED = {
    "HMMA": r"HMMA",
    "HGMMA": r"HGMMA",
    "UTCMMA": r"UTC\w*MMA",
    "LDGSTS": r"LDGSTS",
    "TMA": r"UTMA\w*|UBLK\w*",
    "LDG": r"LDG",
    "STG": r"STG",
    "LDSM": r"LDSM",
    "LDTM": r"LDTM|STTM",
    "local": r"LDL|STL",
}
TENSOR = ("HMMA", "HGMMA", "UTCMMA")
KPARAM = re.compile(r"Ordinal\s*:\s*0x([0-9a-f]+)\s+Offset\s*:\s*0x([0-9a-f]+)\s+Size\s*:\s*0x([0-9a-f]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """Of one thread: registers and spill bytes. Of a CTA: shared memory. `ctas` of them share a multiprocessor."""

    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    shared_bytes: int
    shared_limit_bytes: int
    tensor_columns: int
    ctas: int
    limits: tuple[str, ...]
    instructions: int
    counts: Mapping[str, int]
    parameter_sizes: tuple[int, ...]

    @property
    def spills(self) -> int:
        return self.spill_store_bytes + self.spill_load_bytes

    @property
    def tensor_instructions(self) -> int:
        return sum(self.counts.get(name, 0) for name in TENSOR)


def measure(compiled: Compiled) -> Resources:
    """Read a binary; raises KernelError where its parameters are not those that its launcher passes."""
    usage = compiled.usage
    sizes = parameter_sizes(compiled.cubin)
    stated = tuple(p.size for p in compiled.parameters)
    if sizes != stated:
        raise KernelError(f"{compiled.name} for sm_{compiled.arch}: parameters of {sizes} bytes, stated {stated}")
    chip = chip_of(compiled.arch)
    shared = usage.static_shared + compiled.shared_bytes
    fit = occupancy(
        chip, registers=usage.registers, shared_bytes=shared, warps=compiled.warps,
        tensor_columns=compiled.tensor_columns,
    )  # fmt: skip
    code = disassemble(compiled.cubin)
    bases = code.counts()
    counts = {
        name: sum(n for base, n in bases.items() if re.fullmatch(rule, base)) for name, rule in COUNTED.items()
    }  # fmt: skip
    return Resources(
        registers=usage.registers,
        spill_store_bytes=usage.spill_stores,
        spill_load_bytes=usage.spill_loads,
        stack_bytes=usage.stack,
        shared_bytes=shared,
        shared_limit_bytes=chip.shared_per_cta,
        tensor_columns=compiled.tensor_columns,
        ctas=fit.ctas,
        limits=fit.limits,
        instructions=len(code.instructions),
        counts={name: n for name, n in counts.items() if n},
        parameter_sizes=sizes,
    )


def parameter_sizes(cubin: bytes) -> tuple[int, ...]:
    """Sizes in bytes of a kernel's parameters in order, from the binary's KPARAM_INFO."""
    with on_disk(cubin, ".cubin") as path:
        text, _ = call(tool("cuobjdump"), "-elf", path)
    found = sorted({(int(a, 16), int(b, 16), int(c, 16)) for a, b, c in KPARAM.findall(text)})
    if [ordinal for ordinal, _, _ in found] != list(range(len(found))):
        raise KernelError(f"the binary's parameters are numbered {[n for n, _, _ in found]}")
    return tuple(size for _, _, size in found)
