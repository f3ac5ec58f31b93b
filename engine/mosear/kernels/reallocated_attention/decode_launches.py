"""How decode attention is launched: a committed table, the splits that a shape gets, and the bytes that they move."""

from collections.abc import Sequence
from dataclasses import dataclass

from mosear.config import Policy, Statistic
from mosear.errors import KernelError
from mosear.kernels.chips import chip_of
from mosear.kernels.launch import TENSOR_ROWS, Case, Launch, power_of_two
from mosear.kernels.reallocated_attention.arguments import HEAD_SIZES
from mosear.kernels.reallocated_attention.decode import MERGE, SPLIT, SPLIT_PAGED
from mosear.kernels.reallocated_attention.models import BATCHES, DEMO, GROUPS, LLAMA, Shape
from mosear.kernels.reallocated_attention.policy_kernel import POLICY_CODE, STATISTIC_CODE

MAX_SHARED = 8  # query heads of one key/value head
MERGE_BLOCK, MERGE_ROWS, MERGE_WARPS = 128, 16, 4  # a merge reads all statistics of up to 42 splits of 3 groups at once
MIN_KEYS = 128  # of a split: its partials are then at most 1/128 of its keys and values per row and group
MAX_KEYS = 4096  # of a split: bounds how long one program runs when a batch mixes short and long caches


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A tile of the split kernel for one architecture and head size, and how many CTAs a multiprocessor holds of it."""

    block_n: int
    warps: int
    stages: int
    ctas: int
    reason: str


# A tile's keys and values travel while `stages - 1` tiles are under way: bytes on their way are ctas * (stages - 1) * tile.
# What hides the memory's latency is bandwidth of a multiprocessor * about 0.8 us: 12 to 20 KiB (A100, H100), 43 (B200), 9
# or less (others). All figures computed or read from the binaries, nothing measured on a device. No row spills.
_BIG = "2 CTAs have {keys} KiB on their way, of 3 or more that fit: another CTA or stage adds workspace, not speed"
_SMALL = "100 KiB of shared memory: 2 CTAs fit, {keys} KiB on their way; {other}"
TABLE = {
    (80, 64): Row(block_n=64, warps=4, stages=3, ctas=2, reason=_BIG.format(keys=64)),
    (90, 64): Row(block_n=64, warps=4, stages=3, ctas=2, reason=_BIG.format(keys=64)),
    (100, 64): Row(block_n=64, warps=4, stages=3, ctas=2, reason=_BIG.format(keys=64)),
    (80, 128): Row(block_n=64, warps=4, stages=3, ctas=2, reason=_BIG.format(keys=128)),
    (90, 128): Row(block_n=64, warps=4, stages=3, ctas=2, reason=_BIG.format(keys=128)),
    (100, 128): Row(block_n=64, warps=4, stages=3, ctas=2, reason=_BIG.format(keys=128)),
} | {
    (arch, size): Row(block_n=block_n, warps=4, stages=3, ctas=2, reason=_SMALL.format(keys=64, other=other))
    for arch in (86, 89, 120)
    for size, block_n, other in (
        (64, 64, "a fourth stage leaves room for 1"),
        (128, 32, "tiles of 64 keys leave room for 1, or with 2 stages spill 8 bytes on sm_120"),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Both launches of a decode step, and why this tile."""

    splits: int
    split: Launch
    merge: Launch
    reason: str


def rows_of(heads: int, kv_heads: int, groups: int) -> tuple[int, int]:
    """Rows of a group in the split kernel's tile, and of the whole tile."""
    pitch = power_of_two(heads // kv_heads)
    return pitch, max(TENSOR_ROWS, pitch * power_of_two(groups))


def splits_for(*, batch: int, kv_heads: int, longest: int, programs: int) -> int:
    """Fewest splits that fill `programs` places at once, within MIN_KEYS and MAX_KEYS keys to each split."""
    wanted = -(-programs // (batch * kv_heads))
    return max(min(wanted, -(-longest // MIN_KEYS)), -(-longest // MAX_KEYS), 1)


def choose_launch(
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    groups: int,
    longest: int,
    policy: Policy,
    statistic: Statistic,
    scale: float,
    causal: bool,
    arch: int,
    multiprocessors: int | None = None,
    page: int = 0,
) -> Plan:
    """Launches for caches of at most `longest` keys; `page` is a paged cache's page size; pure.

    Raises KernelError for a head size without a row, ConfigError for an architecture that we do not compile for.
    """
    chip = chip_of(arch)
    if (arch, head_size) not in TABLE:
        raise KernelError(f"head_size is {head_size}: decode attention serves {' and '.join(map(str, HEAD_SIZES))}")
    row = TABLE[arch, head_size]
    programs = row.ctas * (chip.multiprocessors if multiprocessors is None else multiprocessors)
    splits = splits_for(batch=batch, kv_heads=kv_heads, longest=longest, programs=programs)
    pitch, rows = rows_of(heads, kv_heads, groups)
    kinds = {"GROUPS": groups, "GROUPS_POW2": power_of_two(groups)}
    tile = {"PITCH": pitch, "ROWS": rows, "D": head_size, "BLOCK_N": row.block_n, "MIN_KEYS": MIN_KEYS}
    split = Launch(
        grid=(splits, kv_heads, batch),
        constants={"SCALE": scale, "CAUSAL": causal} | kinds | tile | ({"PAGE": page} if page else {}),
        warps=row.warps,
        stages=row.stages,
    )
    merge = Launch(
        grid=(heads, batch, 1),
        constants={"POLICY": POLICY_CODE[policy], "STATISTIC": STATISTIC_CODE[statistic]}
        | kinds
        | {"D": head_size, "BLOCK": MERGE_BLOCK, "BLOCK_ROWS": MERGE_ROWS},
        warps=MERGE_WARPS,
        stages=1,
    )
    return Plan(splits=splits, split=split, merge=merge, reason=row.reason)


LENGTHS, PAGE = (512, 4096, 32768), 64


def cases(arch: int) -> list[Case]:
    """Every decode kernel in the configurations that `choose_launch` picks: both models, 512, 4k and 32k keys, batches
    of 1, 8 and 64 (contiguous), and a paged cache of 4k keys."""
    found = []
    for shape in (DEMO, LLAMA):
        for keys in LENGTHS:
            for batch in BATCHES:
                found += _cases(arch, shape, keys=keys, batch=batch, page=0)
        found += _cases(arch, shape, keys=4096, batch=8, page=PAGE)[:1]  # the merge is the contiguous one's
    return found


def _cases(arch: int, shape: Shape, *, keys: int, batch: int, page: int) -> list[Case]:
    plan = choose_launch(
        batch=batch,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_size=shape.head_size,
        groups=GROUPS,
        longest=keys,
        policy=Policy.BALANCE,
        statistic=Statistic.SUM,
        scale=shape.head_size**-0.5,
        causal=True,
        arch=arch,
        page=page,
    )
    label = f"{shape.name} decode {keys} x{batch}" + (" paged" if page else "")
    return step_cases(label, plan, heads=shape.heads, kv_heads=shape.kv_heads, capacity=keys)


def step_cases(label: str, plan: Plan, *, heads: int, kv_heads: int, capacity: int) -> list[Case]:
    """Both kernels of a step: the split, then the merge."""
    split = SPLIT_PAGED if "PAGE" in plan.split.constants else SPLIT
    scalars = {"heads": heads, "kv_heads": kv_heads, "capacity": capacity, "splits": plan.splits}
    return [
        Case(label=label, op=split, launch=plan.split, scalars=scalars),
        Case(label=label, op=MERGE, launch=plan.merge, scalars={name: scalars[name] for name in MERGE.scalars}),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """Bytes of a decode step (computed): what each program reads or writes once. A second look by one program is a hit."""

    cache: int  # keys and values
    ids: int  # of the keys, by every key/value head: an upper bound, as they share a cache level
    partials: int  # weighted values, written and read
    statistics: int  # maxima, sums and counts, written and read
    ends: int  # query and output, masses

    @property
    def total(self) -> int:
        return self.cache + self.ids + self.partials + self.statistics + self.ends


def split_keys(n_keys: int, splits: int, *, block_n: int, min_keys: int = MIN_KEYS) -> list[tuple[int, int]]:
    """Keys [low, high) of each split: what the kernel computes for itself."""
    tiles = -(-max(-(-n_keys // splits), min_keys) // block_n)
    keys = tiles * block_n
    return [(min(s * keys, n_keys), min(s * keys + keys, n_keys)) for s in range(splits)]


def bytes_moved(
    requests: Sequence[Sequence[int]], *, plan: Plan, heads: int, kv_heads: int, item_bytes: int = 2
) -> Moved:
    """Bytes of a step over `requests`, each the group ids of its visible keys in order."""
    constants = plan.split.constants
    size, groups, block_n = (int(constants[name]) for name in ("D", "GROUPS", "BLOCK_N"))
    keys = sum(len(ids) for ids in requests)
    bounds = [(ids, split_keys(len(ids), plan.splits, block_n=block_n)) for ids in requests]
    seen = sum(len(set(ids[low:high])) for ids, splits in bounds for low, high in splits)
    slots = len(requests) * plan.splits * groups
    return Moved(
        cache=2 * keys * kv_heads * size * item_bytes,
        ids=4 * keys * kv_heads,
        partials=2 * item_bytes * seen * heads * size,
        statistics=2 * 8 * slots * heads + 4 * slots * (1 + heads),
        ends=len(requests) * heads * (2 * size * item_bytes + 2 * 4 * groups),
    )
