"""Bytes and operations that a call must move and do, and what our kernels and their plain peers move with workspace.

Everything counts once, as if caches held nothing between launches and everything within one: the least that a launch moves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import kernels_plain_decode
from kernels_counts import DECODE_ROWS, ELEMENT, F32, I32, layout

from mosear.kernels.launch import Case
from mosear.kernels.modality_experts import launches as experts
from mosear.kernels.reallocated_attention import decode_launches


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """A call: bytes moved, of them workspace (written and read), and operations (2 for a multiply-add), no padding."""

    bytes: int
    workspace_bytes: int
    operations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One label's launches of one op, and what it is compared with."""

    ours: Traffic
    peer: Traffic  # the plain kernel of the same shape, or for the experts the floor: no workspace
    peer_name: str


def call(cases: Sequence[Case]) -> Call:
    """Traffic of a call, from its launches in order."""
    name = cases[0].op.name
    if name.startswith("decode"):
        return _decode(cases)
    return _experts(cases) if name.startswith("modality") else _prefill(cases[0])


def _decode(cases: Sequence[Case]) -> Call:
    split, batch = cases[0], cases[0].launch.grid[2]
    heads, kv_heads, keys = (split.scalars[name] for name in ("heads", "kv_heads", "capacity"))
    plan = decode_launches.Plan(splits=split.scalars["splits"], split=split.launch, merge=cases[-1].launch, reason="")
    moved = decode_launches.bytes_moved([layout(keys)] * batch, plan=plan, heads=heads, kv_heads=kv_heads)
    plain = kernels_plain_decode.bytes_moved([keys] * batch, plan=plan, heads=heads, kv_heads=kv_heads)
    size = int(split.launch.constants["D"])
    operations = 4 * batch * heads * keys * size
    needed = batch * (2 * kv_heads * keys + 2 * heads) * size * ELEMENT
    return Call(
        ours=Traffic(bytes=moved.total, workspace_bytes=moved.partials + moved.statistics, operations=operations),
        peer=Traffic(bytes=plain, workspace_bytes=plain - needed, operations=operations),
        peer_name="plain split-K",
    )


def _experts(cases: Sequence[Case]) -> Call:
    shrink, expand = cases
    name = shrink.label.split()[0]
    width, columns = experts.MODELS[name]
    shape = experts.shape_of(width, columns, rows=shrink.scalars["n_rows"])
    present = 1 if shape.rows <= DECODE_ROWS else shape.groups
    workspace = 2 * shape.workspace_bytes(int(expand.launch.constants["SPLITS"]))
    floor = shape.needed_bytes(ELEMENT, present)
    gate_rows = shape.targets * shape.experts  # of a row's own group
    operations = (
        2
        * shape.rows
        * (shape.width * (shape.targets * shape.rank + gate_rows) + shape.experts * shape.rank * sum(shape.columns))
    )
    return Call(
        ours=Traffic(bytes=floor + workspace, workspace_bytes=workspace, operations=operations),
        peer=Traffic(bytes=floor, workspace_bytes=0, operations=operations),
        peer_name="byte floor",
    )


def _prefill(case: Case) -> Call:
    batch, rows = case.launch.grid[2], case.scalars["rows"]
    heads, kv_heads = case.scalars["heads"], case.scalars["kv_heads"]
    size, groups = int(case.launch.constants["D"]), int(case.launch.constants["GROUPS"])
    qkvo = batch * rows * size * ELEMENT * (2 * heads + 2 * kv_heads)
    pairs = rows * (rows + 1) // 2
    masses = 2 * batch * heads * rows * groups * F32
    places = 2 * batch * rows * I32  # group ids of the keys and positions of the rows
    plain = 4 * batch * heads * pairs * size
    again = 2 * batch * heads * rows * size  # q . k of the last row a second time
    return Call(
        ours=Traffic(bytes=qkvo + masses + places, workspace_bytes=0, operations=plain + again),
        peer=Traffic(bytes=qkvo + places // 2, workspace_bytes=0, operations=plain),
        peer_name="plain flash",
    )
