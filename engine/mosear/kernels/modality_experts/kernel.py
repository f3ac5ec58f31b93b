"""Modality experts in two launches for all adapted linears that share an input (q and v, say): shrink, then expand.

shrink  reads x once: x A^T and the gate's logits of all targets in one sweep over d, of which each row keeps its own
        group's. The sweep may be split along d into partial sums, so that a handful of rows still fills the device.
expand  adds the partials up, makes the gate's weights of them (R + E numbers a row: cheaper to do again in each column
        tile than to write E * R mixed numbers and read them back) and adds w_m * sum over e of s_e * B_{m,e} u to base.

Rows may be of any groups in any order. A tile whose rows are of one group reads one B; a tile at a border of two runs
reads two. What no row of a tile needs (another group's gate, a B of weight 0) is not read.
"""

import triton
import triton.language as tl

from mosear.kernels.launch import KernelOp, Kind


@triton.jit
def present(group, owner):
    """Which owners [C] have a row among group [M]."""
    return tl.max((group[:, None] == owner[None, :]).to(tl.int32), 0) > 0


@triton.jit
def shrink(
    x_ptr,
    group_ptr,
    a_ptr,
    gate_ptr,
    n_rows,
    width,
    partial_ptr,
    TARGETS: tl.constexpr,
    GROUPS: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    SHARE_A: tl.constexpr,
    GATED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    A_COLUMNS: tl.constexpr,
    GATE_COLUMNS: tl.constexpr,
):
    """partial[s, n, t] = sum over the s-th part of d of (A_{t,m} x_n, Gate_{t,m} x_n) with m = group[n]: R + E numbers.

    x [N, d]; group i32 [N]; a [T * (1 or G) * R, d]; gate [T * G * E, d] (unread without GATED); partial f32 [S, N, T, R + E].
    """
    split = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < n_rows
    group = tl.load(group_ptr + row, mask=live, other=-1)
    part = tl.cdiv(tl.cdiv(width, BLOCK_K), SPLITS) * BLOCK_K
    k = tl.arange(0, BLOCK_K)
    pitch: tl.constexpr = RANK + EXPERTS
    sets: tl.constexpr = 1 if SHARE_A else GROUPS

    a_column = tl.arange(0, A_COLUMNS)
    a_used = a_column < TARGETS * sets * RANK
    a_owner = a_column // RANK % sets
    if not SHARE_A:
        a_used = a_used & present(group, a_owner)
    gate_column = tl.arange(0, GATE_COLUMNS)
    gate_owner = gate_column // EXPERTS % GROUPS
    gate_used = (gate_column < TARGETS * GROUPS * EXPERTS) & present(group, gate_owner)

    u = tl.zeros([BLOCK_M, A_COLUMNS], tl.float32)
    logits = tl.zeros([BLOCK_M, GATE_COLUMNS], tl.float32)
    for start in tl.range(split * part, tl.minimum(split * part + part, width), BLOCK_K):
        at = start + k
        inside = at < width
        x = tl.load(x_ptr + row[:, None] * width + at, mask=live[:, None] & inside, other=0.0)
        a = tl.load(a_ptr + a_column * width + at[:, None], mask=a_used & inside[:, None], other=0.0)
        u = tl.dot(x, a, u, input_precision="ieee")
        if GATED:
            gate = tl.load(gate_ptr + gate_column * width + at[:, None], mask=gate_used & inside[:, None], other=0.0)
            logits = tl.dot(x, gate, logits, input_precision="ieee")

    out = ((split * n_rows.to(tl.int64) + row) * TARGETS * pitch)[:, None]
    own = live[:, None] & a_used
    if not SHARE_A:
        own = own & (group[:, None] == a_owner)
    tl.store(partial_ptr + out + a_column // (sets * RANK) * pitch + a_column % RANK, u, mask=own)
    if GATED:
        own = live[:, None] & gate_used & (group[:, None] == gate_owner)
        place = gate_column // (GROUPS * EXPERTS) * pitch + RANK + gate_column % EXPERTS
        tl.store(partial_ptr + out + place, logits, mask=own)


@triton.jit
def gate_weights(logits, expert, used, EXPERTS: tl.constexpr, RANK: tl.constexpr, TOP1: tl.constexpr):
    """Weights [M, C] of logits [M, C] in which column c stands for expert[c]; each expert has RANK columns."""
    logits = tl.where(used, logits, -float("inf"))
    top = tl.max(logits, 1)[:, None]
    if TOP1:
        best = tl.min(tl.where(logits == top, expert, EXPERTS), 1)[:, None]  # ties: the lowest index
        return (expert == best).to(tl.float32)
    weight = tl.exp(logits - top)
    return weight * (RANK / tl.sum(weight, 1)[:, None])


@triton.jit
def expand(
    base_ptr,
    group_ptr,
    partial_ptr,
    gates_in_ptr,
    b_ptr,
    weight_ptr,
    column_start_ptr,
    n_rows,
    columns,
    y_ptr,
    gates_ptr,
    SCALE: tl.constexpr,
    TARGETS: tl.constexpr,
    GROUPS: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    GATED: tl.constexpr,
    TOP1: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIXED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """y = base + SCALE * w_m * sum over e, r of s_e * u_r * B[m, e, r] for one target's columns; gates = s.

    (u, logits) = the sum of partial f32 [S, N, T, R + E] over S; s = softmax(logits) or its one-hot; without GATED s is
    gates_in f32 [N, T, E]. base, y [N, O]: the targets' columns side by side, target t from column_start[t] to
    column_start[t + 1]; group i32 [N]; b [G * E * R, O]; weight f32 [G]; gates f32 [N, T, E]. MIXED: E * R, padded.
    """
    tile, target = tl.program_id(1), tl.program_id(2)
    first = tl.multiple_of(tl.load(column_start_ptr + target), ALIGNMENT)
    column = first + tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < tl.multiple_of(tl.load(column_start_ptr + target + 1), ALIGNMENT)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < n_rows
    group = tl.load(group_ptr + row, mask=live, other=-1)
    weight = tl.load(weight_ptr + group, mask=(group >= 0) & (group < GROUPS), other=0.0)
    pitch: tl.constexpr = RANK + EXPERTS
    out, mask = row[:, None] * columns + column, live[:, None] & inside

    c = tl.arange(0, MIXED)
    expert, used = c // RANK, live[:, None] & (c < EXPERTS * RANK)
    at = ((row * TARGETS + target) * pitch)[:, None]
    u = tl.zeros([BLOCK_M, MIXED], tl.float32)
    s = tl.zeros([BLOCK_M, MIXED], tl.float32)
    for split in tl.range(0, SPLITS, loop_unroll_factor=8):
        part = partial_ptr + split * n_rows.to(tl.int64) * TARGETS * pitch + at
        u += tl.load(part + c % RANK, mask=used, other=0.0)
        if GATED:
            s += tl.load(part + RANK + expert, mask=used, other=0.0)
    gate_at = ((row * TARGETS + target) * EXPERTS)[:, None] + expert
    if GATED:
        s = gate_weights(s, expert, c < EXPERTS * RANK, EXPERTS, RANK, TOP1)
    else:
        s = tl.load(gates_in_ptr + gate_at, mask=used, other=0.0)
    tl.store(gates_ptr + gate_at, s, mask=used & (c % RANK == 0) & (tile == 0))

    mixed = u * s * (SCALE * weight)[:, None]
    active = live & (weight != 0.0)
    low, high = tl.min(tl.where(active, group, GROUPS), 0), tl.max(tl.where(active, group, -1), 0)
    y = tl.load(base_ptr + out, mask=mask, other=0.0).to(tl.float32)
    for m in tl.range(low, high + 1):  # one turn where all rows are of one group
        mine = active & (group == m)
        needed = (tl.max(mine.to(tl.int32), 0) > 0) & (c < EXPERTS * RANK)
        b_at = (m * EXPERTS * RANK + c)[:, None] * columns + column
        b = tl.load(b_ptr + b_at, mask=needed[:, None] & inside, other=0.0)
        y = tl.dot(tl.where(mine[:, None], mixed, 0.0).to(b.dtype), b, y, input_precision="ieee")

    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)


SHRINK = KernelOp(
    name="modality_experts_shrink",
    function=shrink,
    inputs={"x_ptr": Kind.DATA, "group_ptr": Kind.I32, "a_ptr": Kind.DATA, "gate_ptr": Kind.DATA},
    scalars=("n_rows", "width"),
    outputs={"partial_ptr": Kind.F32},
)
EXPAND = KernelOp(
    name="modality_experts_expand",
    function=expand,
    inputs={
        "base_ptr": Kind.DATA,
        "group_ptr": Kind.I32,
        "partial_ptr": Kind.F32,
        "gates_in_ptr": Kind.F32,
        "b_ptr": Kind.DATA,
        "weight_ptr": Kind.F32,
        "column_start_ptr": Kind.I32,
    },
    scalars=("n_rows", "columns"),
    outputs={"y_ptr": Kind.DATA, "gates_ptr": Kind.F32},
)
OPS = (SHRINK, EXPAND)
