"""How often each loop of a kernel turns for a case, how much its tensor cores multiply, and what must be moved.

Prompts have Emotion-LLaMA's layout: text | 258 video | 1 audio | 1 video | text. Prefill reallocates at the last row
alone, as the engine does. Caches are full, tokens at decode are text.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mosear.kernels.launch import Case
from mosear.kernels.reallocated_attention.decode_launches import split_keys
from mosear.kernels.reallocated_attention.models import usual_layout

ELEMENT, F32, I32 = 2, 4, 4  # bytes: 16-bit activations
UNROLLED = 8  # expand's loop over splits says so itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """`count` programs of a grid that do the same: turns of each loop by key (kernels_cycles.LoopWork), `key|arm` for what
    stands in an arm of an `if` in it; multiply-adds on tensor cores, with padding."""

    count: int
    turns: Mapping[str, float]
    products: float


def programs(case: Case) -> Sequence[Programs]:
    """A case's grid, programs of equal work together."""
    return MODELS[case.op.name](case)


def layout(keys: int) -> list[int]:
    """Group ids of a prompt of `keys` tokens."""
    return usual_layout(keys)


def _constant(case: Case, name: str) -> int:
    return int(case.launch.constants[name])


def _split(case: Case) -> list[Programs]:
    block, rows, size = (_constant(case, name) for name in ("BLOCK_N", "ROWS", "D"))
    splits, kv_heads, batch = case.launch.grid
    bounds = split_keys(case.scalars["capacity"], splits, block_n=block, min_keys=_constant(case, "MIN_KEYS"))
    sizes = Counter(-(-(high - low) // block) for low, high in bounds)
    return [
        Programs(
            count=n * kv_heads * batch, turns={f"{_function(case)}: start in tl.range(low, high, BLOCK_N)[]#0": tiles},
            products=2 * tiles * rows * block * size,
        )
        for tiles, n in sizes.items()
    ]  # fmt: skip


def _function(case: Case) -> str:
    return "plain_decode_split" if case.op.name.startswith("plain") else "_split"


def _merge(case: Case) -> list[Programs]:
    partials = case.scalars["splits"] * _constant(case, "GROUPS")
    return _merge_of(
        case, partials, "_totals: start in range(0, n_partials", "decode_merge: start in range(0, n_partials"
    )


def _plain_merge(case: Case) -> list[Programs]:
    header = "plain_decode_merge: start in range(0, splits"
    return _merge_of(case, case.scalars["splits"], header, header)


def _merge_of(case: Case, partials: int, *headers: str) -> list[Programs]:
    turns = {
        f"{header}, {block})[]#0": -(-partials // _constant(case, block))
        for header, block in zip(headers, ("BLOCK", "BLOCK_ROWS"), strict=True)
    }
    heads, batch, _ = case.launch.grid
    return [Programs(count=heads * batch, turns=turns, products=0)]


def _shrink(case: Case) -> list[Programs]:
    tiles, splits, _ = case.launch.grid
    width, block = case.scalars["width"], _constant(case, "BLOCK_K")
    blocks = -(-width // block)
    part = -(-blocks // splits) * block
    sizes = Counter(-(-max(0, min(s * part + part, width) - s * part) // block) for s in range(splits))
    columns = _constant(case, "A_COLUMNS") + (_constant(case, "GATE_COLUMNS") if case.launch.constants["GATED"] else 0)
    flags = "[GATED]" if case.launch.constants["GATED"] else "[]"
    key = f"shrink: start in tl.range(split * part, tl.minimum(split * part + part, width), BLOCK_K){flags}#0"
    products = _constant(case, "BLOCK_M") * columns * block
    return [Programs(count=n * tiles, turns={key: t}, products=t * products) for t, n in sizes.items()]


def _expand(case: Case) -> list[Programs]:
    row_tiles, column_tiles, targets = case.launch.grid
    rows, block, splits = case.scalars["n_rows"], _constant(case, "BLOCK_M"), _constant(case, "SPLITS")
    ids = layout(rows) if rows > DECODE_ROWS else [0] * rows
    spans = Counter(len(set(ids[at : at + block])) for at in range(0, rows, block))
    header = f"expand: split in tl.range(0, SPLITS, loop_unroll_factor={UNROLLED})" + (
        "[GATED]" if case.launch.constants["GATED"] else "[]"
    )
    whole, rest = divmod(splits, UNROLLED)
    products = block * _constant(case, "MIXED") * _constant(case, "BLOCK_N")
    assert sum(spans.values()) == row_tiles
    return [
        Programs(
            count=n * column_tiles * targets, products=groups * products,
            turns={f"{header}#0": whole or rest, f"{header}#1": rest, "expand: m in tl.range(low, high + 1)[]#0": groups},
        )
        for groups, n in spans.items()
    ]  # fmt: skip


DECODE_ROWS = 64  # up to here a call of the experts is a step of decoding, not a prompt


def _tiles(case: Case) -> list[tuple[int, int, int, bool]]:
    """For each tile of prefill's rows: tiles of keys seen whole, seen at all, the grid's copies, whether its rows move."""
    block_m, block_n = _constant(case, "BLOCK_M"), _constant(case, "BLOCK_N")
    row_tiles, heads, batch = case.launch.grid
    rows, found = case.scalars["rows"], []
    for tile in range(row_tiles):
        low, high = tile * block_m, min(tile * block_m + block_m, rows) - 1
        last = -(-(high + 1) // block_n)
        found.append((min((low + 1) // block_n, last), last, heads * batch, high >= rows - 1))
    return found


def _one_group(case: Case) -> list[bool]:
    """Which tiles of keys hold a single group."""
    block, ids = _constant(case, "BLOCK_N"), layout(case.scalars["rows"])
    return [len(set(ids[at : at + block])) == 1 for at in range(0, len(ids), block)]


SWEEP, WEIGHTED = "_sweep: tile in tl.range(first, last)", "_weighted_sweep: tile in tl.range(first, last)"
UNIFORM = "one >= 0"


def _plain_prefill(case: Case) -> list[Programs]:
    product = _constant(case, "BLOCK_M") * _constant(case, "BLOCK_N") * _constant(case, "D")
    return [
        Programs(
            count=n, turns={f"{SWEEP}[]#0": whole, f"{SWEEP}[MASKED]#0": last - whole}, products=2 * last * product
        )
        for whole, last, n, _ in _tiles(case)
    ]  # fmt: skip


def _prefill(case: Case) -> list[Programs]:
    """Flash (with values) where no row moves mass, else masses alone and then the weighted sum; each without mask, with."""
    product = _constant(case, "BLOCK_M") * _constant(case, "BLOCK_N") * _constant(case, "D")
    one = _one_group(case)
    if case.op.name == "prefill":  # groups in any order: it asks of no tile
        one = [False] * len(one)
    found = []
    for whole, last, n, moves in _tiles(case):
        spans = {
            f"{SWEEP}[VALUES]#0": (0, 0 if moves else whole),
            f"{SWEEP}[MASKED VALUES]#0": (whole, whole if moves else last),
            f"{SWEEP}[]#0": (0, whole if moves else 0),
            f"{SWEEP}[MASKED]#0": (whole, last if moves else whole),
            f"{WEIGHTED}[]#0": (0, whole if moves else 0),
            f"{WEIGHTED}[MASKED]#0": (whole, last if moves else whole),
        }
        turns: dict[str, float] = {}
        for key, (first, end) in spans.items():
            turns[key] = end - first
            turns[f"{key}|{UNIFORM}"] = sum(one[first:end])
            turns[f"{key}|not {UNIFORM}"] = end - first - sum(one[first:end])
        found.append(Programs(count=n, turns=turns, products=(3 if moves else 2) * last * product))
    return found


MODELS: Mapping[str, Callable[[Case], Sequence[Programs]]] = {
    "decode_split": _split,
    "decode_split_paged": _split,
    "decode_merge": _merge,
    "plain_decode_split": _split,
    "plain_decode_merge": _plain_merge,
    "modality_experts_shrink": _shrink,
    "modality_experts_expand": _expand,
    "prefill": _prefill,
    "prefill_runs": _prefill,
    "plain_prefill": _plain_prefill,
}
