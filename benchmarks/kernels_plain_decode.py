"""Plain split-K decode attention, in the style of ours and with its tiles and splits: what reallocation is costed against.

One softmax over all visible keys; no groups, no policy, no masses. A peer for figures, served by no launcher.
"""

import dataclasses
from collections.abc import Sequence

import triton
import triton.language as tl

from mosear.kernels.launch import TENSOR_ROWS, Case, KernelOp, Kind, Launch
from mosear.kernels.reallocated_attention import decode, decode_launches
from mosear.kernels.reallocated_attention.decode import split_bounds, visible_keys
from mosear.kernels.reallocated_attention.policy_kernel import LOG2E


@triton.jit
def plain_decode_split(
    query_ptr,
    key_ptr,
    value_ptr,
    query_position_ptr,
    key_length_ptr,
    heads,
    kv_heads,
    capacity,
    splits,
    partial_output_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_KEYS: tl.constexpr,
):
    """m = max of s    l = sum of 2^(s - m)    acc = sum of 2^(s - m) * v    s = q . k * SCALE * log2 e. Grid (splits, K, B).

    query [B, H, D]; key, value [B, K, capacity, D]; query_position, key_length i32 [B]. Out: acc f32 [B, H, splits, D],
    m and l f32 [B, H, splits]; an empty split writes m alone.
    """
    split, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    position, length = tl.load(query_position_ptr + batch), tl.load(key_length_ptr + batch)
    n_keys = visible_keys(position, length, capacity, CAUSAL)
    low, high = split_bounds(n_keys, split, splits, MIN_KEYS, BLOCK_N)
    shared = heads // kv_heads
    row, dim, slot = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, BLOCK_N)
    live = row < shared
    head = batch * heads + kv_head * shared + row  # int64 [ROWS]
    query = tl.load(query_ptr + head[:, None] * D + dim, mask=live[:, None], other=0.0)
    cache_row = (batch * kv_heads + kv_head) * capacity

    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for start in tl.range(low, high, BLOCK_N):
        inside = start + slot < high
        at = cache_row + start + slot
        key = tl.load(key_ptr + at[:, None] * D + dim, mask=inside[:, None], other=0.0)
        scores = tl.dot(query, key.T, input_precision="ieee") * (SCALE * LOG2E)
        scores = tl.where(inside[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        rescale = tl.exp2(top - new_top)
        weight = tl.exp2(scores - new_top[:, None])
        total = total * rescale + tl.sum(weight, 1)
        value = tl.load(value_ptr + at[:, None] * D + dim, mask=inside[:, None], other=0.0)
        acc = tl.dot(weight.to(value.dtype), value, acc * rescale[:, None], input_precision="ieee")
        top = new_top

    partial = head * splits + split
    tl.store(partial_max_ptr + partial, top, mask=live)
    seen = live & (low < high)
    tl.store(partial_sum_ptr + partial, total, mask=seen)
    tl.store(partial_output_ptr + partial[:, None] * D + dim, acc, mask=seen[:, None])


@triton.jit
def plain_decode_merge(
    partial_output_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    heads,
    splits,
    output_ptr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """o = sum over splits of 2^(m - M) * acc / sum over splits of 2^(m - M) * l. Grid (H, B). Output [B, H, D]."""
    row = tl.program_id(1).to(tl.int64) * heads + tl.program_id(0)
    dim, every, offset = tl.arange(0, D), tl.arange(0, BLOCK), tl.arange(0, BLOCK_ROWS)
    top = -float("inf")
    total = 0.0
    for start in range(0, splits, BLOCK):
        at = start + every
        tops = tl.load(partial_max_ptr + row * splits + at, mask=at < splits, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(tops, 0))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        seen = tops > -float("inf")
        sums = tl.load(partial_sum_ptr + row * splits + at, mask=seen, other=0.0)
        total = total * tl.exp2(top - base) + tl.sum(sums * tl.exp2(tops - base), 0)
        top = new_top
    base = tl.where(top == -float("inf"), 0.0, top)
    acc = tl.zeros([BLOCK_ROWS, D], tl.float32)
    for start in range(0, splits, BLOCK_ROWS):
        at = start + offset
        tops = tl.load(partial_max_ptr + row * splits + at, mask=at < splits, other=-float("inf"))
        seen = tops > -float("inf")
        partial = tl.load(partial_output_ptr + (row * splits + at)[:, None] * D + dim, mask=seen[:, None], other=0.0)
        acc += tl.exp2(tops - base)[:, None] * partial
    output = tl.sum(acc, 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(output_ptr + row * D + dim, output.to(output_ptr.dtype.element_ty))


PARTIALS = {"partial_output_ptr": Kind.F32, "partial_max_ptr": Kind.F32, "partial_sum_ptr": Kind.F32}
SPLIT = KernelOp(
    name="plain_decode_split",
    function=plain_decode_split,
    inputs={"query_ptr": Kind.DATA, "key_ptr": Kind.DATA, "value_ptr": Kind.DATA}
    | {"query_position_ptr": Kind.I32, "key_length_ptr": Kind.I32},
    scalars=("heads", "kv_heads", "capacity", "splits"),
    outputs=PARTIALS,
)
MERGE = KernelOp(
    name="plain_decode_merge",
    function=plain_decode_merge,
    inputs=PARTIALS,
    scalars=("heads", "splits"),
    outputs={"output_ptr": Kind.DATA},
)
OPS = (SPLIT, MERGE)


def peer(case: Case) -> Case:
    """The plain counterpart of a case of contiguous decode attention: the same tile, splits and label."""
    ours = case.launch.constants
    if case.op is decode.SPLIT:
        same = ("SCALE", "CAUSAL", "D", "BLOCK_N", "MIN_KEYS")
        rows = max(TENSOR_ROWS, int(ours["PITCH"]))
        op, constants = SPLIT, {name: ours[name] for name in same} | {"ROWS": rows}
    else:
        op, constants = MERGE, {name: ours[name] for name in ("D", "BLOCK", "BLOCK_ROWS")}
    launch: Launch = dataclasses.replace(case.launch, constants=constants)
    return dataclasses.replace(case, op=op, launch=launch)


def cases(arch: int) -> list[Case]:
    """Plain counterparts of all contiguous cases, in their order."""
    return [peer(case) for case in decode_launches.cases(arch) if case.op is not decode.SPLIT_PAGED]


def bytes_moved(
    lengths: Sequence[int], *, plan: decode_launches.Plan, heads: int, kv_heads: int, item_bytes: int = 2
) -> int:
    """Bytes of a plain step with the tiles and splits of `plan`, counted as decode_launches.bytes_moved does (computed)."""
    size, block_n = (int(plan.split.constants[name]) for name in ("D", "BLOCK_N"))
    full = sum(high > low for n in lengths for low, high in decode_launches.split_keys(n, plan.splits, block_n=block_n))
    cache = 2 * sum(lengths) * kv_heads * size * item_bytes
    partials = 2 * 4 * full * heads * size
    statistics = 2 * 4 * heads * (len(lengths) * plan.splits + full)  # an empty split leaves its maximum alone
    return cache + partials + statistics + len(lengths) * heads * 2 * size * item_bytes
