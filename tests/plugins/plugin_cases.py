"""Nodes of both mechanisms, in profiles and at sizes: what the bindings, the compiler and the launchers are all asked about.

A size is a number or a letter; `at` says what the letters are worth in one call.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from mosear.kernels.modality_experts.plugin import EXPERTS_EXPAND, EXPERTS_SHRINK, MOST_PARTS
from mosear.kernels.plugins.op import Attribute, PluginOp, Range, Ranges
from mosear.kernels.reallocated_attention.plugin import (
    ATTENTION_FINISH,
    ATTENTION_FINISH_RUNS,
    ATTENTION_SPLIT,
    ATTENTION_SPLIT_PAGED,
)

Axes = tuple[int | str, ...]
G, P, PAGE, TILE = 3, 8, 64, 32
Profile = Mapping[str, tuple[int, int]]
Calls = tuple[Mapping[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCase:
    """A node whose axes are numbers and letters, a profile for the letters, and calls within it."""

    op: PluginOp
    axes: Mapping[str, Axes]
    attributes: Mapping[str, Attribute]
    profile: Profile
    calls: Calls = field(repr=False)

    def ranges(self, profile: Profile | None = None) -> Ranges:
        """Of the case's own profile, or of another."""
        ends = [self.at({k: v[end] for k, v in (profile or self.profile).items()}) for end in (0, 1)]
        return Ranges(
            inputs={
                name: tuple(Range(least=a, most=b) for a, b in zip(ends[0][name], ends[1][name])) for name in self.axes
            }
        )

    def at(self, call: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Every input's shape in a call."""
        return {name: tuple(worth(a, call) for a in axes) for name, axes in self.axes.items()}


def worth(axis: int | str, letters: Mapping[str, int]) -> int:
    """`B*S`, say, in numbers."""
    return axis if isinstance(axis, int) else math.prod(letters[letter] for letter in axis.split("*"))


def attention(op: PluginOp, *, heads: int, kv_heads: int, size: int, profile: Profile, calls: Calls) -> NodeCase:
    cache: Axes = ("N", kv_heads, PAGE, size) if op is ATTENTION_SPLIT_PAGED else ("B", kv_heads, "L", size)
    known: dict[str, Axes] = {
        "query": ("B", heads, "S", size), "key": cache, "value": cache, "key_group": ("B", "L"),
        "block_table": ("B", "PAGES"), "tile_group": ("B", "T"), "query_position": ("B", "S"), "key_length": ("B",),
        "first_row": ("B",), "policy_params": (heads, P), "strength": ("B",), "group_bias": ("B", G),
        "partial_output": ("B", heads, "X", G, size), "partial_max": ("B", heads, "X", G),
        "partial_sum": ("B", heads, "X", G), "partial_count": ("B", "X", G),
    }  # fmt: skip
    every: dict[str, Attribute] = {
        "groups": G, "policy": "balance", "statistic": "mean", "scale": size**-0.5, "tile": TILE,
    }  # fmt: skip
    return NodeCase(
        op=op, axes={name: known[name] for name in op.inputs}, attributes={name: every[name] for name in op.attributes},
        profile=profile, calls=calls,
    )  # fmt: skip


def experts(
    op: PluginOp, *, width: int, columns: tuple[int, ...], share_a: bool, profile: Profile, calls: Calls,
) -> NodeCase:  # fmt: skip
    targets, wide, rank, count = len(columns), sum(columns), 8, 4
    known: dict[str, Axes] = {
        "x": ("B", "S", width), "group": ("B", "S"), "a": (targets * rank * (1 if share_a else G), width),
        "gate": (targets * G * count, width), "base": ("B", "S", wide), "partial": (MOST_PARTS, "B*S", targets, rank + count),
        "gates_in": ("B", "S", count) if targets == 1 else ("B", "S", targets, count), "b": (G * count * rank, wide),
        "weight": (G,), "column_start": (targets + 1,),
    }  # fmt: skip
    every: dict[str, Attribute] = {
        "columns": ",".join(map(str, columns)), "width": width, "groups": G, "experts": count, "rank": rank,
        "share_a": int(share_a), "scale": 2.0, "select": "soft", "route": "token",
    }  # fmt: skip
    return NodeCase(op=op, axes={n: known[n] for n in op.inputs}, attributes=every, profile=profile, calls=calls)


DECODE: Profile = {"B": (1, 8), "S": (1, 1), "L": (64, 8192), "X": (1, 64), "N": (1, 4096), "PAGES": (1, 128)}
DECODE_CALLS = tuple(
    {"B": b, "S": 1, "L": length, "X": 2, "N": 200, "PAGES": length // PAGE}
    for b, length in ((1, 64), (1, 4096), (3, 576), (8, 8192))
)
PREFILL: Profile = {
    "B": (1, 4),
    "S": (2, 1024),
    "L": (64, 8192),
    "X": (1, 64),
    "N": (1, 64),
    "PAGES": (1, 128),
    "T": (2, 256),
}
PREFILL_CALLS = tuple(
    {"B": b, "S": s, "L": n, "T": n // TILE, "X": 3} for b, s, n in ((1, 2, 64), (3, 77, 544), (4, 1024, 8192))
)
SMALL, LARGE = {"heads": 9, "kv_heads": 3, "size": 64}, {"heads": 32, "kv_heads": 32, "size": 128}

_ROWS = {"decode": (DECODE, DECODE_CALLS), "prefill": (PREFILL, PREFILL_CALLS)}
_LAYERS = {"one": (576, (576,), True), "two": (576, (576, 192), False)}
CASES: dict[str, NodeCase] = {
    **{
        f"{op.name} {kind} D{shape['size']}": attention(op, **shape, profile=profile, calls=calls)
        for op in (ATTENTION_SPLIT, ATTENTION_FINISH)
        for kind, (profile, calls) in _ROWS.items()
        for shape in (SMALL, LARGE)
    },
    "AttentionSplitPaged decode D64": attention(ATTENTION_SPLIT_PAGED, **SMALL, profile=DECODE, calls=DECODE_CALLS),
    "AttentionFinishRuns prefill D128": attention(ATTENTION_FINISH_RUNS, **LARGE, profile=PREFILL, calls=PREFILL_CALLS),
    **{
        f"{op.name} {kind} {layers}": experts(op, width=w, columns=c, share_a=a, profile=profile, calls=calls)
        for op in (EXPERTS_SHRINK, EXPERTS_EXPAND)
        for kind, (profile, calls) in _ROWS.items()
        for layers, (w, c, a) in _LAYERS.items()
        if (kind, layers) != ("prefill", "two")
    },
}  # fmt: skip
# Those that are driven through the bindings: the one left out compiles its largest tile to find that it takes too much memory.
BOUND = {name: case for name, case in CASES.items() if name != "AttentionFinish prefill D128"}
