"""How the two kernels of modality experts are launched: a committed table, and the bytes that a call moves."""

from collections.abc import Sequence
from dataclasses import dataclass

from mosear.config import MoSEConfig, Route, Select
from mosear.errors import KernelError
from mosear.kernels.chips import chip_of
from mosear.kernels.launch import TENSOR_ROWS, Case, Launch, power_of_two
from mosear.kernels.modality_experts.kernel import EXPAND, SHRINK

MAX_GROUPS = 8
MAX_COLUMNS = 512  # of A's and of the gate's rows of all targets: a tile of 16 rows then takes 64 registers a thread
MAX_MIXED = 256  # E * R
TILE = 4096  # numbers of the shrink's sums and of the expand's mixed gates in one program: 32 registers a thread
WORKSPACE_SHARE = 16  # partial sums, written and read, are at most 1/16 of the bytes that a call must move
ALIGNMENT = 16
F32, I32 = 4, 4  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One call: N rows of width d; `columns` are d_out of each target; all targets have the same experts and rank."""

    rows: int
    width: int
    columns: tuple[int, ...]
    groups: int
    experts: int
    rank: int
    share_a: bool

    @property
    def targets(self) -> int:
        return len(self.columns)

    @property
    def a_rows(self) -> int:
        """Rows of A of all targets."""
        return self.targets * self.rank * (1 if self.share_a else self.groups)

    @property
    def gate_rows(self) -> int:
        return self.targets * self.groups * self.experts

    @property
    def sums(self) -> int:
        """Numbers that shrink leaves of a row: R + E for each target."""
        return self.targets * (self.rank + self.experts)

    def needed_bytes(self, element: int, present: int) -> int:
        """What a call cannot do without moving, `present` groups being among its rows: the floor of its bytes.

        x, A, the gate's rows and B's of the present groups, base in, y out, ids, weights and gates; no workspace.
        """
        a = self.targets * self.rank * self.width * (1 if self.share_a else present)
        gate = self.targets * present * self.experts * self.width
        b = present * self.experts * self.rank * sum(self.columns)
        rows = self.rows * (self.width + 2 * sum(self.columns))
        return (
            element * (a + gate + b + rows) + self.rows * (I32 + F32 * self.targets * self.experts) + F32 * self.groups
        )

    def workspace_bytes(self, splits: int) -> int:
        """Partial sums of `splits` parts of d."""
        return F32 * splits * self.rows * self.sums


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Tiles for calls of up to `most_rows` rows; `splits`: parts of d at most. Both kernels have 4 warps."""

    most_rows: int
    shrink_m: int
    block_k: int
    stages: int
    splits: int
    expand_m: int
    block_n: int
    reason: str


# Registers, spills and CTAs a multiprocessor of every row and chip: benchmarks/results/kernel_resources.json.
TABLE = (
    Row(
        most_rows=16, shrink_m=16, block_k=128, stages=2, splits=16, expand_m=16, block_n=128,
        reason="a step of decoding: A, gate and B are the bytes, so d and d_out are cut until the device is full",
    ),
    Row(
        most_rows=64, shrink_m=32, block_k=128, stages=2, splits=8, expand_m=32, block_n=128,
        reason="a large batch of it: rows share what they read of A and B; half the parts, as their sums weigh more",
    ),
    Row(
        most_rows=1 << 31, shrink_m=64, block_k=64, stages=3, splits=4, expand_m=32, block_n=128,
        reason="prefill: 64 rows fill a warp group's tensor-core tile; in expand 32 rows hold 24 warps on a multiprocessor "
        "(sm_90: 79 registers; 64 rows: 151 and 12 warps), and it waits for base and y alone",
    ),
)  # fmt: skip
WARPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Both launches of a call, and why so."""

    splits: int
    shrink: Launch
    expand: Launch
    reason: str


def choose_launch(shape: Shape, *, scale: float, select: Select, route: Route, arch: int, element: int = 2) -> Plan:
    """Launches for a call whose activations have `element` bytes each; pure.

    Raises KernelError for more groups, experts or rank than the tiles hold, ConfigError for an unknown architecture.
    """
    check_shape(shape)
    row = next(row for row in TABLE if shape.rows <= row.most_rows)
    gated = route is Route.TOKEN
    a_columns, gate_columns = (power_of_two(n, TENSOR_ROWS) for n in (shape.a_rows, shape.gate_rows))
    mixed = power_of_two(shape.experts * shape.rank, TENSOR_ROWS)
    shrink_m = max(TENSOR_ROWS, min(row.shrink_m, TILE // max(a_columns, gate_columns)))
    expand_m = max(TENSOR_ROWS, min(row.expand_m, TILE // mixed))
    tiles = -(-shape.rows // shrink_m)
    splits = _splits(shape, row, tiles=tiles, multiprocessors=chip_of(arch).multiprocessors, element=element)
    common = {
        "TARGETS": shape.targets, "GROUPS": shape.groups, "EXPERTS": shape.experts, "RANK": shape.rank,
        "GATED": gated, "SPLITS": splits,
    }  # fmt: skip
    block_k = row.block_k * 2 // max(2, element)  # the same bytes
    shrink = Launch(
        grid=(tiles, splits, 1),
        constants=common
        | {
            "SHARE_A": shape.share_a,
            "BLOCK_M": shrink_m,
            "BLOCK_K": block_k,
            "A_COLUMNS": a_columns,
            "GATE_COLUMNS": gate_columns,
        },
        warps=WARPS,
        stages=row.stages,
    )
    aligned = all(width % ALIGNMENT == 0 for width in shape.columns)
    expand = Launch(
        grid=(-(-shape.rows // expand_m), -(-max(shape.columns) // row.block_n), shape.targets),
        constants=common
        | {"SCALE": scale, "TOP1": select is Select.TOP1, "BLOCK_M": expand_m, "BLOCK_N": row.block_n}
        | {"MIXED": mixed, "ALIGNMENT": ALIGNMENT if aligned else 1},
        warps=WARPS,
        stages=1,
    )
    return Plan(splits=splits, shrink=shrink, expand=expand, reason=row.reason)


def check_shape(shape: Shape) -> None:
    """Raises KernelError naming the size that no tile holds."""
    limits: Sequence[tuple[str, int, int]] = (
        ("groups (rows of weight)", shape.groups, MAX_GROUPS),
        ("rows of a, all targets together,", shape.a_rows, MAX_COLUMNS),
        ("rows of gate, all targets together,", shape.gate_rows, MAX_COLUMNS),
        ("experts times rank", shape.experts * shape.rank, MAX_MIXED),
    )
    for name, value, limit in limits:
        if not 1 <= value <= limit:
            raise KernelError(f"{name} are {value}: the kernel of modality experts serves 1 to {limit}")


def _splits(shape: Shape, row: Row, *, tiles: int, multiprocessors: int, element: int) -> int:
    """Parts of d: enough to fill the device, none empty, partial sums a small share of the bytes."""
    affordable = shape.needed_bytes(element, 1) // WORKSPACE_SHARE // (2 * max(1, shape.workspace_bytes(1)))
    wanted = max(1, min(row.splits, multiprocessors // max(1, tiles), affordable))
    blocks = -(-shape.width // row.block_k)
    return -(-blocks // -(-blocks // wanted))


GROUPS, BATCHES = 3, (1, 8, 64)
MODELS = {"demo": (576, (576, 192)), "llama2-7b": (4096, (4096, 4096))}  # d, and d_out of q and v
PROMPTS = (400, 4096)


def cases(arch: int) -> list[Case]:
    """Both kernels as `choose_launch` picks them: q and v of both models at decode (batch 1, 8, 64) and prefill."""
    found = []
    for name, (width, columns) in MODELS.items():
        for kind, rows in [*(("decode x", n) for n in BATCHES), *(("prefill ", n) for n in PROMPTS)]:
            found += cases_of(f"{name} {kind}{rows}", shape_of(width, columns, rows=rows), arch=arch)
    return found


def shape_of(width: int, columns: tuple[int, ...], *, rows: int, mose: MoSEConfig | None = None) -> Shape:
    """A call of the demo's configuration, or of another."""
    mose = mose or MoSEConfig()
    return Shape(
        rows=rows, width=width, columns=columns, groups=GROUPS, experts=mose.experts, rank=mose.rank,
        share_a=mose.share_a,
    )  # fmt: skip


def cases_of(label: str, shape: Shape, *, arch: int, mose: MoSEConfig | None = None) -> list[Case]:
    """The two launches of a call."""
    mose = mose or MoSEConfig()
    plan = choose_launch(shape, scale=mose.scale, select=mose.select, route=mose.route, arch=arch)
    columns = sum(shape.columns)
    return [
        Case(label=label, op=SHRINK, launch=plan.shrink, scalars={"n_rows": shape.rows, "width": shape.width}),
        Case(label=label, op=EXPAND, launch=plan.expand, scalars={"n_rows": shape.rows, "columns": columns}),
    ]
