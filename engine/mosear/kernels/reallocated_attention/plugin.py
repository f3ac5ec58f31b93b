"""Reallocated attention as TensorRT plugins: two nodes for prefill and decode alike, so that one engine serves both.

    AttentionSplit   in a profile of one row: `decode_split`; else nothing
    AttentionFinish  in a profile of one row: `decode_merge`; else `prefill`

TensorRT picks a tactic for each profile, from those that `autotune` lists for the profile's sizes. So the engine holds a
profile with S = 1 and one with S > 1, and each node runs the kernel of its profile (docs/decisions/0006). Sizes of partial
results do not depend on S: the same two nodes fit both. A profile of 1 to many rows is served by `prefill`, which is right
at one row too, only slower.

The variants for pages and for runs of keys differ in one input each.
"""

import functools

from mosear.config import Policy, Statistic
from mosear.errors import KernelError
from mosear.kernels.launch import KernelOp, Kind, Launch
from mosear.kernels.plugins.op import (
    Arithmetic,
    Geometry,
    PluginOp,
    Ranges,
    Site,
    Size,
    Sizes,
    Tactic,
    nothing,
    tactics_of,
    tensors,
    varied,
)
from mosear.kernels.reallocated_attention import decode_launches, launches
from mosear.kernels.reallocated_attention.decode import MERGE, PARTIALS, SPLIT, SPLIT_PAGED
from mosear.kernels.reallocated_attention.kernel import PREFILL, PREFILL_RUNS

# Where the table's own tile takes more shared memory than a plugin may have: smaller ones, largest first.
SPARE_DECODE = ((32, 3), (32, 2), (16, 2))  # keys of a tile, stages
SPARE_PREFILL = ((64, 32, 4, 2), (64, 32, 4, 1), (32, 32, 4, 1))  # rows, keys, warps, stages


def _splits(sizes: Sizes, site: Site, arithmetic: Arithmetic) -> Size:
    """`decode_launches.splits_for` with the cache's capacity as its longest request."""
    batch, kv_heads, capacity = sizes["query"][0], sizes["key"][1], sizes["key_group"][1]
    row = decode_launches.TABLE[site.arch, sizes["query"][3]]
    programs = row.ctas * site.all_multiprocessors
    wanted = arithmetic.cdiv(programs, arithmetic.times(batch, kv_heads))
    wanted = arithmetic.least(wanted, arithmetic.cdiv(capacity, decode_launches.MIN_KEYS))
    return arithmetic.most(arithmetic.most(wanted, arithmetic.cdiv(capacity, decode_launches.MAX_KEYS)), 1)


def _split_shapes(sizes: Sizes, site: Site, arithmetic: Arithmetic) -> tuple[tuple[Size, ...], ...]:
    batch, heads, _, head_size = sizes["query"]
    splits, groups = _splits(sizes, site, arithmetic), site.number("groups")
    rows = (batch, heads, splits, groups)
    return (*rows, head_size), rows, rows, (batch, splits, groups)


def _decode_plan(ranges: Ranges, site: Site, *, groups: int, page: int = 0) -> decode_launches.Plan:
    """The launcher's constants; its grids are of no use here, as the sizes vary."""
    return decode_launches.choose_launch(
        batch=1, heads=ranges.fixed("query", 1, "heads"), kv_heads=ranges.fixed("key", 1, "key/value heads"),
        head_size=ranges.fixed("query", 3, "head size"), groups=groups, longest=ranges.of("key_group", 1).most,
        policy=Policy(site.word("policy", Policy.OFF)), statistic=Statistic(site.word("statistic", Statistic.SUM)),
        scale=site.real("scale"), causal=True, arch=site.arch, page=page,
    )  # fmt: skip


def _split_tactics(ranges: Ranges, site: Site, *, kernel: KernelOp) -> list[Tactic]:
    if ranges.of("query", 2).most > 1:
        return [nothing()]
    page = ranges.fixed("key", 2, "a page's size") if kernel is SPLIT_PAGED else 0
    own = _decode_plan(ranges, site, groups=site.number("groups"), page=page).split

    def geometry(launch: Launch, sizes: Sizes, arithmetic: Arithmetic) -> Geometry:
        batch, heads = sizes["query"][:2]
        kv_heads, capacity = sizes["key"][1], sizes["key_group"][1]
        splits = _splits(sizes, site, arithmetic)
        return Geometry(grid=(splits, kv_heads, batch), scalars=(heads, kv_heads, capacity, splits))

    spare = [varied(own, stages=stages, BLOCK_N=block_n) for block_n, stages in SPARE_DECODE]
    return tactics_of(kernel, [own], spare, geometry)


def _finish_shapes(sizes: Sizes, site: Site, arithmetic: Arithmetic) -> tuple[tuple[Size, ...], ...]:
    masses = (*sizes["query"][:3], sizes["group_bias"][1])
    return sizes["query"], masses, masses


def _finish_tactics(ranges: Ranges, site: Site, *, kernel: KernelOp) -> list[Tactic]:
    groups = ranges.fixed("group_bias", 1, "groups")
    if ranges.of("query", 2).most > 1:
        return _prefill_tactics(ranges, site, groups=groups, kernel=kernel)
    return tactics_of(MERGE, [_decode_plan(ranges, site, groups=groups).merge], [], _merge_geometry)


def _merge_geometry(launch: Launch, sizes: Sizes, arithmetic: Arithmetic) -> Geometry:
    batch, heads = sizes["query"][:2]
    return Geometry(grid=(heads, batch, 1), scalars=(heads, sizes["partial_max"][2]))


def _prefill_tactics(ranges: Ranges, site: Site, *, groups: int, kernel: KernelOp) -> list[Tactic]:
    """The launcher's configurations for the fewest and the most rows of the profile."""
    by_runs, rows = kernel is PREFILL_RUNS, ranges.of("query", 2)

    def launch_for(count: int) -> Launch:
        return launches.choose_launch(
            batch=1, heads=ranges.fixed("query", 1, "heads"), head_size=ranges.fixed("query", 3, "head size"),
            rows=count, groups=groups, policy=Policy(site.word("policy")), statistic=Statistic(site.word("statistic")),
            scale=site.real("scale"), causal=True, arch=site.arch, element=site.element,
            runs=[[(1, 0)]] if by_runs else None,
        ).launch  # fmt: skip

    own = [launch_for(count) for count in sorted({rows.least, rows.most})]
    spare = [
        varied(own[0], warps=warps, stages=stages, BLOCK_M=block_m, BLOCK_N=block_n)
        for block_m, block_n, warps, stages in SPARE_PREFILL
    ]
    if by_runs:  # `tile_group` was made for tiles of so many keys
        tile = site.number("tile")
        own, spare = ([launch for launch in found if launch.constants["BLOCK_N"] == tile] for found in (own, spare))
        if not own and not spare:
            raise KernelError(f"tile is {tile}: no configuration for sm_{site.arch} has tiles of so many keys")
    return tactics_of(kernel, own, spare, _prefill_geometry)


def _prefill_geometry(launch: Launch, sizes: Sizes, arithmetic: Arithmetic) -> Geometry:
    batch, heads, rows, _ = sizes["query"]
    kv_heads, capacity = sizes["key"][1], sizes["key"][2]
    grid = (arithmetic.cdiv(rows, int(launch.constants["BLOCK_M"])), heads, batch)
    return Geometry(grid=grid, scalars=(heads, kv_heads, rows, capacity))


_MASSES = {"output": Kind.DATA, "before": Kind.F32, "after": Kind.F32}
_POLICY = {"policy": str, "statistic": str, "scale": float}


def _split_op(name: str, kernel: KernelOp) -> PluginOp:
    return PluginOp(
        name=name, inputs=tensors(kernel.inputs), outputs=tensors(PARTIALS),
        attributes={"groups": int, "scale": float}, shapes=_split_shapes,
        tactics=functools.partial(_split_tactics, kernel=kernel),
    )  # fmt: skip


def _finish_op(name: str, kernel: KernelOp, **more: type) -> PluginOp:
    return PluginOp(
        name=name, inputs=tensors(kernel.inputs) | tensors(PARTIALS), outputs=_MASSES, attributes=_POLICY | more,
        shapes=_finish_shapes, tactics=functools.partial(_finish_tactics, kernel=kernel),
    )  # fmt: skip


ATTENTION_SPLIT = _split_op("AttentionSplit", SPLIT)
ATTENTION_SPLIT_PAGED = _split_op("AttentionSplitPaged", SPLIT_PAGED)
ATTENTION_FINISH = _finish_op("AttentionFinish", PREFILL)
ATTENTION_FINISH_RUNS = _finish_op("AttentionFinishRuns", PREFILL_RUNS, tile=int)
OPS = (ATTENTION_SPLIT, ATTENTION_SPLIT_PAGED, ATTENTION_FINISH, ATTENTION_FINISH_RUNS)
