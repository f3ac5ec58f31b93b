"""The chips that kernels are compiled for: limits of a multiprocessor, and the peaks of one card of each.

Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", the same as in NVIDIA's
cuda_occupancy.h, which a test compares.
Pipe rates: the same guide, "Throughput of Native Arithmetic Instructions". Compared for 8.0 and 8.6 with a transcript of that
table; the others are from memory.
Peaks: dense, 16-bit in, fp32 sums. `source` is the title of the maker's document. None was read itself: what was compared are
pages that quote them. These agree for A100, H100, RTX 3090 and RTX 5090, and for B200 but for its bandwidth (7.7 or 8 TB/s).
Of the L4 they give 58 or 60 multiprocessors: the data sheet's 30.3 TFLOPS of fp32 and 242 of fp16 at 2.04 GHz are 58.
The tensor rate of a multiprocessor is the peak divided by multiprocessors and boost clock: a power of two for every chip.
"""

from dataclasses import dataclass

from mosear.errors import ConfigError

REGISTERS = 65536  # of a multiprocessor, 32 bits each
REGISTER_UNIT = 256  # a warp's registers are allotted in such units
WARP = 32
SCHEDULERS = 4  # each issues one warp instruction a cycle
SHARED_RESERVED = 1024  # bytes that the system takes for each CTA
SHARED_UNIT = 128
TENSOR_MEMORY_COLUMNS = 512  # sm_100 alone has tensor memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One card: sizes in bytes, bandwidth in bytes/s, rates as operations of one multiprocessor in a cycle."""

    name: str
    arch: int
    multiprocessors: int
    boost_hz: float
    tensor_flops_s: float  # dense, fp16 or bf16 in, fp32 sums
    memory_bytes_s: float
    l2_bytes: int
    warps: int  # resident on a multiprocessor at most
    ctas: int
    shared_bytes: int  # of a multiprocessor
    tensor_rate: int  # multiply-adds of 16-bit numbers
    fp32_rate: int
    int_rate: int = 64  # of sm_120 too, whose fp32 lanes take integers as well: there a lower bound
    special_rate: int = 16  # ex2, lg2, rcp, rsqrt
    convert_rate: int = 64
    source: str

    @property
    def shared_per_cta(self) -> int:
        """Largest shared memory of a CTA (dynamic, after opting in)."""
        return self.shared_bytes - SHARED_RESERVED

    @property
    def shared_rate(self) -> int:
        """Lanes that shared memory serves in a cycle without conflicts."""
        return 32


KIB = 1024
CHIPS = (
    Chip(
        name="A100", arch=80, multiprocessors=108, boost_hz=1.41e9, tensor_flops_s=312e12, memory_bytes_s=2.039e12,
        l2_bytes=40 << 20, warps=64, ctas=32, shared_bytes=164 * KIB, tensor_rate=1024, fp32_rate=64,
        source="NVIDIA A100 Tensor Core GPU data sheet (80 GB SXM); NVIDIA A100 Tensor Core GPU Architecture white paper",
    ),
    Chip(
        name="RTX 3090", arch=86, multiprocessors=82, boost_hz=1.695e9, tensor_flops_s=71e12, memory_bytes_s=936e9,
        l2_bytes=6 << 20, warps=48, ctas=16, shared_bytes=100 * KIB, tensor_rate=256, fp32_rate=128,
        source="NVIDIA Ampere GA102 GPU Architecture white paper V2.0, appendix A",
    ),
    Chip(
        name="L4", arch=89, multiprocessors=58, boost_hz=2.04e9, tensor_flops_s=121e12, memory_bytes_s=300e9,
        l2_bytes=48 << 20, warps=48, ctas=24, shared_bytes=100 * KIB, tensor_rate=512, fp32_rate=128,
        source="NVIDIA L4 Tensor Core GPU data sheet (242 TFLOPS with sparsity, halved)",
    ),
    Chip(
        name="H100", arch=90, multiprocessors=132, boost_hz=1.83e9, tensor_flops_s=989e12, memory_bytes_s=3.35e12,
        l2_bytes=50 << 20, warps=64, ctas=32, shared_bytes=228 * KIB, tensor_rate=2048, fp32_rate=128,
        source="NVIDIA H100 Tensor Core GPU data sheet (SXM; 1,979 TFLOPS with sparsity, halved); clock as that peak implies",
    ),
    Chip(
        name="B200", arch=100, multiprocessors=148, boost_hz=1.85e9, tensor_flops_s=2250e12, memory_bytes_s=8e12,
        l2_bytes=126 << 20, warps=64, ctas=32, shared_bytes=228 * KIB, tensor_rate=4096, fp32_rate=128,
        source="NVIDIA Blackwell Architecture data sheet, HGX B200 (4.5 PFLOPS with sparsity, halved); clock as it implies",
    ),
    Chip(
        name="RTX 5090", arch=120, multiprocessors=170, boost_hz=2.407e9, tensor_flops_s=209.5e12,
        memory_bytes_s=1.792e12, l2_bytes=96 << 20, warps=48, ctas=24, shared_bytes=100 * KIB, tensor_rate=256,
        fp32_rate=128, source="NVIDIA RTX Blackwell GPU Architecture white paper, appendix A",
    ),
)  # fmt: skip
ARCHS = tuple(chip.arch for chip in CHIPS)


def chip_of(arch: int) -> Chip:
    """The card that stands for an architecture; raises ConfigError for one that we do not compile for."""
    for chip in CHIPS:
        if chip.arch == arch:
            return chip
    raise ConfigError(f"arch is {arch!r}: kernels are compiled for {', '.join(map(str, ARCHS))}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupancy:
    """CTAs that a multiprocessor holds at once, and what limits them (more than one thing at a tie)."""

    ctas: int
    limits: tuple[str, ...]


def occupancy(chip: Chip, *, registers: int, shared_bytes: int, warps: int, tensor_columns: int = 0) -> Occupancy:
    """How many CTAs of `warps` warps fit; `registers` of a thread, `shared_bytes` static and dynamic together.

    0 CTAs: it cannot run on this chip.
    """
    per_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    # Each scheduler has a quarter of the registers. One CTA is checked as if its warps were a multiple of four.
    fits = per_warp * -(-warps // SCHEDULERS) * SCHEDULERS <= REGISTERS
    by_registers = (REGISTERS // SCHEDULERS // per_warp * SCHEDULERS) // warps if fits else 0
    per_cta = -(-(shared_bytes + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT
    by_shared = 0 if shared_bytes > chip.shared_per_cta else chip.shared_bytes // per_cta
    found = {
        "registers": by_registers,
        "shared": by_shared,
        "warps": chip.warps // warps,
        "ctas": chip.ctas,
    }
    if tensor_columns:
        found["tensor memory"] = TENSOR_MEMORY_COLUMNS // tensor_columns
    ctas = min(found.values())
    return Occupancy(ctas=ctas, limits=tuple(name for name, count in found.items() if count == ctas))
