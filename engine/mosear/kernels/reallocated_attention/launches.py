"""How prefill attention is launched: a committed table, and which of its two kernels a prompt gets."""

import dataclasses
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mosear.config import Policy, Statistic
from mosear.errors import KernelError
from mosear.kernels.chips import chip_of
from mosear.kernels.launch import Case, KernelOp, Launch
from mosear.kernels.reallocated_attention.arguments import HEAD_SIZES
from mosear.kernels.reallocated_attention.kernel import PREFILL, PREFILL_RUNS
from mosear.kernels.reallocated_attention.models import BATCHES, DEMO, GROUPS, LAYOUT, LLAMA, TEXT, Shape
from mosear.kernels.reallocated_attention.policy_kernel import POLICY_CODE, STATISTIC_CODE
from mosear.kernels.reallocated_attention.runs import Run, mixed_share

ANY_ROWS = 1 << 31
# Share of mixed tiles up to which runs pay. On sm_90 with D 128 a tile of one group takes 378 instructions of a warp, a
# mixed one 626 (plain flash attention 364), and the branch between them a handful.
MOST_MIXED = 0.9


# Groups up to which the kernel for runs serves an architecture, where not all: with eight it spills about 4,000 bytes on
# sm_100, the one for any order at most 48.
MOST_GROUPS = {100: GROUPS}


class Kernel(enum.StrEnum):
    """Which kernel a prefill runs."""

    GENERAL = "general"
    RUNS = "runs"

    @property
    def op(self) -> KernelOp:
        return PREFILL_RUNS if self is Kernel.RUNS else PREFILL


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Tiles of one kernel for some architectures and a head size, for prefills of up to `most_rows` rows."""

    kernel: Kernel
    archs: tuple[int, ...]
    head_size: int
    block_m: int
    block_n: int
    warps: int
    stages: int
    reason: str
    most_rows: int = ANY_ROWS


GENERAL, RUNS = Kernel.GENERAL, Kernel.RUNS
_SHORT = "two CTAs share a multiprocessor, and the tile that is swept twice for the last row is a small one"
_LONG = "128 rows share what they read of keys and values: half the reads from L2 of a tile of 64"
_HALVED = "the largest tile whose sums of three groups leave no register spilled"
# Of the tiles from 32 x 32 to 128 x 128 with 4 or 8 warps those that spill nothing, compiled for each architecture.
TABLE = (
    Row(
        kernel=RUNS, archs=(90,), head_size=64, most_rows=1024, block_m=64, block_n=64, warps=4, stages=2, reason=_SHORT
    ),
    Row(kernel=RUNS, archs=(90,), head_size=64, block_m=128, block_n=64, warps=8, stages=2, reason=_LONG),
    Row(
        kernel=RUNS, archs=(90,), head_size=128, most_rows=1024, block_m=64, block_n=64, warps=4, stages=2, reason=_SHORT
    ),
    Row(kernel=RUNS, archs=(90,), head_size=128, block_m=128, block_n=64, warps=8, stages=2, reason=_LONG),
    Row(kernel=GENERAL, archs=(90,), head_size=64, block_m=64, block_n=64, warps=4, stages=2, reason=_SHORT),
    Row(kernel=GENERAL, archs=(90,), head_size=128, block_m=128, block_n=64, warps=8, stages=2, reason=_LONG),
    Row(
        kernel=RUNS, archs=(100,), head_size=64, most_rows=1024, block_m=64, block_n=64, warps=4, stages=2, reason=_SHORT
    ),
    Row(kernel=RUNS, archs=(100,), head_size=64, block_m=128, block_n=64, warps=8, stages=2, reason=_LONG),
    Row(
        kernel=RUNS, archs=(100,), head_size=128, most_rows=1024, block_m=64, block_n=64, warps=4, stages=3, reason=_SHORT
    ),
    Row(kernel=RUNS, archs=(100,), head_size=128, block_m=128, block_n=64, warps=8, stages=2, reason=_LONG),
    Row(kernel=GENERAL, archs=(100,), head_size=64, block_m=64, block_n=64, warps=8, stages=2, reason=_HALVED),
    Row(kernel=GENERAL, archs=(100,), head_size=128, block_m=64, block_n=64, warps=8, stages=2, reason=_HALVED),
    Row(kernel=RUNS, archs=(80, 86, 89, 120), head_size=64, block_m=64, block_n=64, warps=4, stages=2, reason=_SHORT),
    Row(kernel=GENERAL, archs=(80, 86, 89, 120), head_size=64, block_m=128, block_n=32, warps=8, stages=2, reason=_HALVED),
    Row(kernel=RUNS, archs=(80, 86, 89, 120), head_size=128, block_m=64, block_n=32, warps=4, stages=2, reason=_HALVED),
    Row(kernel=GENERAL, archs=(80,), head_size=128, block_m=64, block_n=32, warps=4, stages=2, reason=_HALVED),
    Row(kernel=GENERAL, archs=(86, 89, 120), head_size=128, block_m=64, block_n=64, warps=8, stages=2, reason=_HALVED),
)  # fmt: skip
# An element of 4 bytes takes twice the shared memory and registers of the 16-bit ones that the table is for.
FP32_TILE: dict[str, Any] = {
    "block_m": 32,
    "block_n": 32,
    "warps": 4,
    "stages": 1,
    "reason": "fp32 serves tests: it fits everywhere",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A prefill's launch: which kernel, and why so."""

    kernel: Kernel
    launch: Launch
    reason: str


def row_for(*, kernel: Kernel, arch: int, head_size: int, rows: int, element: int = 2) -> Row:
    """The table's row; raises KernelError for a head size without one, ConfigError for an unknown architecture."""
    chip_of(arch)
    for row in TABLE:
        if row.kernel is kernel and arch in row.archs and row.head_size == head_size and rows <= row.most_rows:
            return row if element == 2 else dataclasses.replace(row, **FP32_TILE)
    raise KernelError(f"head_size is {head_size}: prefill attention serves {' and '.join(map(str, HEAD_SIZES))}")


def choose_kernel(runs: Sequence[Sequence[Run]] | None, *, block_n: int) -> Kernel:
    """RUNS where the prompts' runs are known and leave enough tiles of `block_n` keys with one group; pure."""
    if runs is None or mixed_share(runs, block=block_n) > MOST_MIXED:
        return Kernel.GENERAL
    return Kernel.RUNS


def choose_launch(
    *,
    batch: int,
    heads: int,
    head_size: int,
    rows: int,
    groups: int,
    policy: Policy,
    statistic: Statistic,
    scale: float,
    causal: bool,
    arch: int,
    runs: Sequence[Sequence[Run]] | None = None,
    element: int = 2,
) -> Plan:
    """The launch for `rows` query rows of `batch` requests with elements of `element` bytes; pure.

    Raises what `row_for` raises.
    """

    def row_of(kernel: Kernel) -> Row:
        return row_for(kernel=kernel, arch=arch, head_size=head_size, rows=rows, element=element)

    kernel = choose_kernel(runs, block_n=row_of(Kernel.RUNS).block_n)
    if groups > MOST_GROUPS.get(arch, groups):
        kernel = Kernel.GENERAL
    row = row_of(kernel)
    launch = Launch(
        grid=(-(-rows // row.block_m), heads, batch),
        constants={
            "POLICY": POLICY_CODE[policy],
            "STATISTIC": STATISTIC_CODE[statistic],
            "GROUPS": groups,
            "D": head_size,
            "SCALE": scale,
            "CAUSAL": causal,
            "BLOCK_M": row.block_m,
            "BLOCK_N": row.block_n,
        },
        warps=row.warps,
        stages=row.stages,
    )
    return Plan(kernel=kernel, launch=launch, reason=row.reason)


LENGTHS = (400, 4096)


def cases(arch: int) -> list[Case]:
    """Prefill of both models at 400 and 4096 tokens, batches of 1, 8 and 64, by runs; and one case of any order each."""
    found = []
    for model in (DEMO, LLAMA):
        for tokens in LENGTHS:
            found += [_case(model, tokens, batch=batch, arch=arch, by_runs=True) for batch in BATCHES]
            found.append(_case(model, tokens, batch=1, arch=arch, by_runs=False))
    return found


def _case(model: Shape, tokens: int, *, batch: int, arch: int, by_runs: bool) -> Case:
    layout = (*LAYOUT, (tokens - sum(keys for keys, _ in LAYOUT), TEXT))
    plan = choose_launch(
        batch=batch, heads=model.heads, head_size=model.head_size, rows=tokens, groups=GROUPS,
        policy=Policy.BALANCE, statistic=Statistic.SUM, scale=model.head_size**-0.5, causal=True, arch=arch,
        runs=(layout,) * batch if by_runs else None,
    )  # fmt: skip
    scalars = {"heads": model.heads, "kv_heads": model.kv_heads, "rows": tokens, "capacity": tokens}
    label = f"{model.name} prefill {tokens} x{batch}" + ("" if by_runs else " any order")
    return Case(label=label, op=plan.kernel.op, launch=plan.launch, scalars=scalars)
