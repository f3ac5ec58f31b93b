"""Modality experts as TensorRT plugins: ExpertsShrink, then ExpertsExpand, for all linears that share an input.

Both nodes have the same attributes, so that both come to the same configuration without seeing each other's tensors. The
parts of d are a constant of both kernels: in a profile it is what the launcher takes for the profile's most rows. The
partial sums' first axis is the most parts that any row count gets; what a profile leaves of it is never touched.
"""

import functools

from mosear.config import Route, Select
from mosear.kernels.launch import KernelOp, Launch
from mosear.kernels.modality_experts.kernel import EXPAND, SHRINK
from mosear.kernels.modality_experts.launches import TABLE, Plan, Shape, choose_launch
from mosear.kernels.plugins.op import (
    Arithmetic,
    Geometry,
    PluginOp,
    Ranges,
    Site,
    Size,
    Sizes,
    Tactic,
    tactics_of,
    tensors,
    varied,
)

MOST_PARTS = max(row.splits for row in TABLE)
# columns: d_out of each linear, separated by commas; share_a: 1 or 0.
ATTRIBUTES: dict[str, type] = {
    "columns": str, "width": int, "groups": int, "experts": int, "rank": int, "share_a": int,
    "scale": float, "select": str, "route": str,
}  # fmt: skip


def _columns(site: Site) -> tuple[int, ...]:
    return tuple(map(int, site.word("columns").split(",")))


def _rows(leading: tuple[Size, ...], arithmetic: Arithmetic) -> Size:
    """Tokens of a call: the product of these axes."""
    return functools.reduce(arithmetic.times, leading, 1)


def _plan(rows: int, site: Site) -> Plan:
    """The launcher's own for so many rows."""
    shape = Shape(
        rows=rows, width=site.number("width"), columns=_columns(site), groups=site.number("groups"),
        experts=site.number("experts"), rank=site.number("rank"), share_a=bool(site.number("share_a")),
    )  # fmt: skip
    return choose_launch(
        shape, scale=site.real("scale"), select=Select(site.word("select")), route=Route(site.word("route")),
        arch=site.arch, element=site.element,
    )  # fmt: skip


def _tactics(ranges: Ranges, site: Site, *, kernel: KernelOp) -> list[Tactic]:
    """Configurations for the profile's most and fewest rows, the parts of d those for the most."""
    group = ranges.inputs["group"]
    least, most = (_rows(tuple(getattr(r, end) for r in group), Arithmetic()) for end in ("least", "most"))
    parts = _plan(most, site).splits

    def launch_for(rows: int) -> Launch:
        plan = _plan(rows, site)
        launch = plan.shrink if kernel is SHRINK else plan.expand
        return varied(launch, stages=launch.stages, SPLITS=parts)

    geometry = _shrink_geometry if kernel is SHRINK else functools.partial(_expand_geometry, columns=_columns(site))
    return tactics_of(kernel, [launch_for(rows) for rows in sorted({least, most}, reverse=True)], [], geometry)


def _shrink_geometry(launch: Launch, sizes: Sizes, arithmetic: Arithmetic) -> Geometry:
    rows = _rows(sizes["group"], arithmetic)
    tiles = arithmetic.cdiv(rows, int(launch.constants["BLOCK_M"]))
    return Geometry(grid=(tiles, int(launch.constants["SPLITS"]), 1), scalars=(rows, sizes["x"][-1]))


def _expand_geometry(launch: Launch, sizes: Sizes, arithmetic: Arithmetic, *, columns: tuple[int, ...]) -> Geometry:
    rows = _rows(sizes["group"], arithmetic)
    tiles = arithmetic.cdiv(rows, int(launch.constants["BLOCK_M"]))
    wide = -(-max(columns) // int(launch.constants["BLOCK_N"]))
    return Geometry(grid=(tiles, wide, len(columns)), scalars=(rows, sum(columns)))


def _shrink_shapes(sizes: Sizes, site: Site, arithmetic: Arithmetic) -> tuple[tuple[Size, ...], ...]:
    sums = site.number("rank") + site.number("experts")
    return ((MOST_PARTS, _rows(sizes["group"], arithmetic), len(_columns(site)), sums),)


def _expand_shapes(sizes: Sizes, site: Site, arithmetic: Arithmetic) -> tuple[tuple[Size, ...], ...]:
    return sizes["base"], sizes["gates_in"]


EXPERTS_SHRINK = PluginOp(
    name="ExpertsShrink", inputs=tensors(SHRINK.inputs), outputs=tensors(SHRINK.outputs), attributes=ATTRIBUTES,
    shapes=_shrink_shapes, tactics=functools.partial(_tactics, kernel=SHRINK),
)  # fmt: skip
EXPERTS_EXPAND = PluginOp(
    name="ExpertsExpand", inputs=tensors(EXPAND.inputs), outputs=tensors(EXPAND.outputs), attributes=ATTRIBUTES,
    shapes=_expand_shapes, tactics=functools.partial(_tactics, kernel=EXPAND),
)  # fmt: skip
OPS = (EXPERTS_SHRINK, EXPERTS_EXPAND)
