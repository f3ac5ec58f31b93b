"""Reallocated attention for one query row per request over a long cache: a split and a merge kernel.

A group is a row. A tile of the split kernel holds every query head of one key/value head once for each group, and a row
sees the keys of its own group alone. So one running maximum, sum and weighted value per row is o_g without further ado, in
any order of groups and however far a group's logits lie from another's; and since a tensor core takes 16 rows or none,
the groups of up to 4 heads cost no product that plain split-K decode would not compute as well.

A split leaves the partials of the groups that it saw and no others, each as an average in the activations' own type:
bytes are those of plain split-K where groups come in runs. The merge puts the splits of each group together, applies the
policy once and sums m'_g * o_g.
"""

import triton
import triton.language as tl

from mosear.kernels.launch import KernelOp, Kind
from mosear.kernels.reallocated_attention.policy_kernel import LOG2E, reallocate_block


@triton.jit
def split_bounds(n_keys, split, splits, MIN_KEYS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys [low, high) of a split: whole tiles, at least MIN_KEYS, so that a short request leaves later splits empty."""
    keys = tl.cdiv(tl.maximum(tl.cdiv(n_keys, splits), MIN_KEYS), BLOCK_N) * BLOCK_N
    return split * keys, tl.minimum(split * keys + keys, n_keys)


@triton.jit
def visible_keys(position, length, capacity, CAUSAL: tl.constexpr):
    """How many slots a row at `position` may see; none at a padding row."""
    n_keys = tl.minimum(length, capacity)
    if CAUSAL:
        n_keys = tl.minimum(n_keys, position + 1)
    return tl.where(position < 0, 0, n_keys)


@triton.jit
def _split(
    query_ptr,
    key_ptr,
    value_ptr,
    group_ptr,
    page_ptr,
    partial_output_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    partial_count_ptr,
    n_keys,
    heads,
    kv_heads,
    capacity,
    splits,
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_POW2: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    PAGE: tl.constexpr,
):
    """One program: a request, a key/value head, a split. Row g * PITCH + i is query head i of the key/value head in group g.

    m = max over the split's keys of g of s    l = sum of 2^(s - m)    o = sum of 2^(s - m) * v / l    s = q . k * SCALE * log2 e
    """
    split, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    low, high = split_bounds(n_keys, split, splits, MIN_KEYS, BLOCK_N)
    shared = heads // kv_heads
    row, dim, slot = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, BLOCK_N)
    row_head, row_group = row % PITCH, row // PITCH
    live = (row_head < shared) & (row_group < GROUPS)
    row_group = tl.where(live, row_group, -2)  # no key's: its id is at least 0, or -1 outside the split
    head = batch * heads + kv_head * shared + row_head  # int64 [ROWS]
    groups = tl.arange(0, GROUPS_POW2)

    query = tl.load(query_ptr + head[:, None] * D + dim, mask=live[:, None], other=0.0)
    cache_row = (batch * kv_heads + kv_head) * capacity

    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    hits = tl.zeros([GROUPS_POW2, BLOCK_N], tl.int32)
    for start in tl.range(low, high, BLOCK_N):
        inside = start + slot < high
        ids = tl.load(group_ptr + batch * capacity + start + slot, mask=inside, other=0)
        ids = tl.where((ids > 0) & (ids < GROUPS), ids, 0)  # what is of no other group counts as group 0
        ids = tl.where(inside, ids, -1)
        if PAGE == 0:
            at = cache_row + start + slot
        elif PAGE % BLOCK_N == 0:
            page = tl.load(page_ptr + batch * (capacity // PAGE) + start // PAGE).to(tl.int64)
            at = (page * kv_heads + kv_head) * PAGE + start % PAGE + slot
        else:
            page = tl.load(page_ptr + batch * (capacity // PAGE) + (start + slot) // PAGE, mask=inside, other=0)
            at = (page.to(tl.int64) * kv_heads + kv_head) * PAGE + (start + slot) % PAGE
        key = tl.load(key_ptr + at[:, None] * D + dim, mask=inside[:, None], other=0.0)
        scores = tl.dot(query, key.T, input_precision="ieee") * (SCALE * LOG2E)
        scores = tl.where(row_group[:, None] == ids[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)  # a row that has seen nothing yet
        rescale = tl.exp2(top - base)
        weight = tl.exp2(scores - base[:, None])
        total = total * rescale + tl.sum(weight, 1)
        value = tl.load(value_ptr + at[:, None] * D + dim, mask=inside[:, None], other=0.0)
        acc = tl.dot(weight.to(value.dtype), value, acc * rescale[:, None], input_precision="ieee")
        hits += (groups[:, None] == ids[None, :]).to(tl.int32)
        top = new_top

    partial = (head * splits + split) * GROUPS + row_group  # int64 [ROWS]
    tl.store(partial_max_ptr + partial, top, mask=live)
    tl.store(partial_sum_ptr + partial, total, mask=live)
    seen = live & (top > -float("inf"))  # what the split did not see, it does not write
    average = acc / tl.where(seen, total, 1.0)[:, None]
    average = average.to(partial_output_ptr.dtype.element_ty)
    tl.store(partial_output_ptr + partial[:, None] * D + dim, average, mask=seen[:, None])
    count_at = partial_count_ptr + (batch * splits + split) * GROUPS + groups
    tl.store(count_at, tl.sum(hits, 1), mask=(groups < GROUPS) & (kv_head == 0))


@triton.jit
def decode_split(
    query_ptr,
    key_ptr,
    value_ptr,
    key_group_ptr,
    query_position_ptr,
    key_length_ptr,
    heads,
    kv_heads,
    capacity,
    splits,
    partial_output_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    partial_count_ptr,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_POW2: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_KEYS: tl.constexpr,
):
    """Partials of each split and group over a contiguous cache: see `_split`. Grid (splits, K, B).

    query [B, H, D]; key, value [B, K, capacity, D]; key_group i32 [B, capacity]; query_position, key_length i32 [B].
    Out: o [B, H, splits, GROUPS, D] (rows of groups that a split saw), m and l f32 [B, H, splits, GROUPS], visible keys
    i32 [B, splits, GROUPS].
    """
    batch = tl.program_id(2)
    position, length = tl.load(query_position_ptr + batch), tl.load(key_length_ptr + batch)
    n_keys = visible_keys(position, length, capacity, CAUSAL)
    _split(
        query_ptr, key_ptr, value_ptr, key_group_ptr, key_group_ptr,
        partial_output_ptr, partial_max_ptr, partial_sum_ptr, partial_count_ptr,
        n_keys, heads, kv_heads, capacity, splits,
        SCALE, GROUPS, GROUPS_POW2, PITCH, ROWS, D, BLOCK_N, MIN_KEYS, 0,
    )  # fmt: skip


@triton.jit
def decode_split_paged(
    query_ptr,
    key_ptr,
    value_ptr,
    block_table_ptr,
    key_group_ptr,
    query_position_ptr,
    key_length_ptr,
    heads,
    kv_heads,
    capacity,
    splits,
    partial_output_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    partial_count_ptr,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_POW2: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    PAGE: tl.constexpr,
):
    """As `decode_split`, over pages: key, value [N, K, PAGE, D]; block_table i32 [B, capacity / PAGE] names a slot's page."""
    batch = tl.program_id(2)
    position, length = tl.load(query_position_ptr + batch), tl.load(key_length_ptr + batch)
    n_keys = visible_keys(position, length, capacity, CAUSAL)
    _split(
        query_ptr, key_ptr, value_ptr, key_group_ptr, block_table_ptr,
        partial_output_ptr, partial_max_ptr, partial_sum_ptr, partial_count_ptr,
        n_keys, heads, kv_heads, capacity, splits,
        SCALE, GROUPS, GROUPS_POW2, PITCH, ROWS, D, BLOCK_N, MIN_KEYS, PAGE,
    )  # fmt: skip


@triton.jit
def _totals(
    max_ptr, sum_ptr, count_ptr, n_partials, GROUPS: tl.constexpr, GROUPS_POW2: tl.constexpr, BLOCK: tl.constexpr
):
    """Over the splits of a row: each group's maximum, sum of weights at that maximum, and visible keys: [GROUPS_POW2]."""
    groups, offset = tl.arange(0, GROUPS_POW2), tl.arange(0, BLOCK)
    top = tl.full([GROUPS_POW2], -float("inf"), tl.float32)
    total = tl.zeros([GROUPS_POW2], tl.float32)
    count = tl.zeros([GROUPS_POW2], tl.int32)
    for start in range(0, n_partials, BLOCK):
        at = start + offset
        mine = (at % GROUPS)[None, :] == groups[:, None]  # [GROUPS_POW2, BLOCK]
        tops = tl.load(max_ptr + at, mask=at < n_partials, other=-float("inf"))
        sums = tl.load(sum_ptr + at, mask=at < n_partials, other=0.0)
        counts = tl.load(count_ptr + at, mask=at < n_partials, other=0)
        new_top = tl.maximum(top, tl.max(tl.where(mine, tops[None, :], -float("inf")), 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        scaled = sums[None, :] * tl.exp2(tl.where(mine, tops[None, :] - base[:, None], -float("inf")))
        total = total * tl.exp2(top - base) + tl.sum(scaled, 1)
        count += tl.sum(tl.where(mine, counts[None, :], 0), 1)
        top = new_top
    return top, total, count


@triton.jit
def decode_merge(
    partial_output_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    partial_count_ptr,
    query_position_ptr,
    first_row_ptr,
    policy_params_ptr,
    strength_ptr,
    group_bias_ptr,
    heads,
    splits,
    output_ptr,
    before_ptr,
    after_ptr,
    POLICY: tl.constexpr,
    STATISTIC: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_POW2: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One program: a request and a head, grid (H, B).

    m_g = softmax over visible g of M_g + log l_g + b_g   m' = policy(m)   o = sum over splits of m'_g / l_g * 2^(m - M_g) * l * o

    Inputs as `decode_split` leaves them; query_position, first_row i32 [B]; policy_params f32 [H, P]; strength f32 [B];
    group_bias f32 [B, GROUPS]. Out: output [B, H, D]; masses before and after, f32 [B, H, GROUPS].
    """
    head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = batch * heads + head
    n_partials = splits * GROUPS
    groups, dim, offset = tl.arange(0, GROUPS_POW2), tl.arange(0, D), tl.arange(0, BLOCK_ROWS)
    max_ptr, sum_ptr = partial_max_ptr + row * n_partials, partial_sum_ptr + row * n_partials

    top, total, count = _totals(
        max_ptr, sum_ptr, partial_count_ptr + batch * n_partials, n_partials, GROUPS, GROUPS_POW2, BLOCK
    )
    bias = tl.load(group_bias_ptr + batch * GROUPS + groups, mask=groups < GROUPS, other=-float("inf")) * LOG2E
    visible = (count > 0) & (bias > -float("inf"))
    level = tl.where(visible, top + bias, -float("inf"))
    highest = tl.max(level, 0)
    mass = tl.where(visible, total * tl.exp2(level - tl.where(highest == -float("inf"), 0.0, highest)), 0.0)
    sum_of_masses = tl.sum(mass, 0)
    before = mass / tl.where(sum_of_masses > 0.0, sum_of_masses, 1.0)
    changes = tl.load(query_position_ptr + batch) >= tl.load(first_row_ptr + batch)
    keys = tl.where(visible, count, 0)
    strength = tl.load(strength_ptr + batch)
    after = reallocate_block(
        before[None, :], keys[None, :], policy_params_ptr, head, strength, changes, GROUPS_POW2, POLICY, STATISTIC
    )
    after = tl.sum(after, 0)  # [1, GROUPS_POW2] to [GROUPS_POW2]
    share = tl.where(visible, after / tl.where(visible, total, 1.0), 0.0)
    base = tl.where(visible, top, 0.0)

    acc = tl.zeros([BLOCK_ROWS, D], tl.float32)
    for start in range(0, n_partials, BLOCK_ROWS):
        at = start + offset
        mine = (at % GROUPS)[:, None] == groups[None, :]  # [BLOCK_ROWS, GROUPS_POW2]
        tops = tl.load(max_ptr + at, mask=at < n_partials, other=-float("inf"))
        # Else nobody wrote the row, or nobody may see it: its share is 0.
        shown = (tops > -float("inf")) & (tl.sum(tl.where(mine & visible[None, :], 1, 0), 1) > 0)
        row_share = tl.sum(tl.where(mine, share[None, :], 0.0), 1)
        row_base = tl.sum(tl.where(mine, base[None, :], 0.0), 1)
        sums = tl.load(sum_ptr + at, mask=shown, other=0.0)
        weight = row_share * sums * tl.exp2(tl.where(shown, tops - row_base, -float("inf")))
        partial = tl.load(
            partial_output_ptr + (row * n_partials + at)[:, None] * D + dim, mask=shown[:, None], other=0.0
        )
        acc += weight[:, None] * partial

    tl.store(output_ptr + row * D + dim, tl.sum(acc, 0).to(output_ptr.dtype.element_ty))
    tl.store(before_ptr + row * GROUPS + groups, before, mask=groups < GROUPS)
    tl.store(after_ptr + row * GROUPS + groups, after, mask=groups < GROUPS)


PARTIALS = {
    "partial_output_ptr": Kind.DATA,
    "partial_max_ptr": Kind.F32,
    "partial_sum_ptr": Kind.F32,
    "partial_count_ptr": Kind.I32,
}
_CACHE = {"query_ptr": Kind.DATA, "key_ptr": Kind.DATA, "value_ptr": Kind.DATA}
_PLACE = {"key_group_ptr": Kind.I32, "query_position_ptr": Kind.I32, "key_length_ptr": Kind.I32}
_SPLIT_SCALARS = ("heads", "kv_heads", "capacity", "splits")

SPLIT = KernelOp(
    name="decode_split", function=decode_split, inputs=_CACHE | _PLACE, scalars=_SPLIT_SCALARS, outputs=PARTIALS
)
SPLIT_PAGED = KernelOp(
    name="decode_split_paged",
    function=decode_split_paged,
    inputs=_CACHE | {"block_table_ptr": Kind.I32} | _PLACE,
    scalars=_SPLIT_SCALARS,
    outputs=PARTIALS,
)
MERGE = KernelOp(
    name="decode_merge",
    function=decode_merge,
    inputs=PARTIALS
    | {"query_position_ptr": Kind.I32, "first_row_ptr": Kind.I32, "policy_params_ptr": Kind.F32}
    | {"strength_ptr": Kind.F32, "group_bias_ptr": Kind.F32},
    scalars=("heads", "splits"),
    outputs={"output_ptr": Kind.DATA, "before_ptr": Kind.F32, "after_ptr": Kind.F32},
)
OPS = (SPLIT, SPLIT_PAGED, MERGE)
