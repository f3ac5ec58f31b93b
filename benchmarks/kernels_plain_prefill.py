"""Plain flash attention, in the style of ours: what prefill with reallocation is costed against.

One softmax over all visible keys; no groups, no policy, no masses. A peer for figures, served by no launcher.
"""

import triton
import triton.language as tl

from mosear.kernels.reallocated_attention.kernel import LOG2E, NOTHING, finite, keys_of, values_of


@triton.jit
def _sweep(
    state, q, first, last, key_ptr, value_ptr, reach, length,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over tiles of keys: (top, total, acc)."""
    top, total, acc = state
    for tile in tl.range(first, last):
        slots = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        k = keys_of(key_ptr, slots, length, D, MASKED)
        scores = tl.dot(q, k, input_precision="ieee")
        if MASKED:
            inside = tl.arange(0, BLOCK_N)[None, :] <= (reach - tile * BLOCK_N)[:, None]
            scores = tl.where(inside, scores, NOTHING)
        new_top = tl.maximum(top, tl.max(scores, 1) * SCALE)
        fade = tl.exp2(top - finite(new_top))
        p = tl.exp2(scores * SCALE - finite(new_top)[:, None])
        total = total * fade + tl.sum(p, 1)
        top = new_top
        v = values_of(value_ptr, slots, length, D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return top, total, acc


@triton.jit
def plain_prefill(
    query_ptr, key_ptr, value_ptr, query_position_ptr, key_length_ptr, heads, kv_heads, rows, capacity, output_ptr,
    D: tl.constexpr, SCALE: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """o = softmax(q . k * SCALE) v over the visible keys; shapes as in `prefill`. Grid (ceil(S / BLOCK_M), H, B)."""
    head, batch = tl.program_id(1), tl.program_id(2)
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    length = tl.minimum(tl.load(key_length_ptr + batch), capacity)
    position = tl.load(query_position_ptr + batch * rows + row, mask=row < rows, other=-1)
    reach = tl.minimum(position, length - 1) if CAUSAL else tl.where(position < 0, -1, length - 1)
    live = reach >= 0
    last = tl.cdiv(tl.max(reach, 0) + 1, BLOCK_N)
    whole = tl.minimum((tl.min(tl.where(live, reach, capacity), 0) + 1) // BLOCK_N, last)
    cache = (batch * kv_heads + head // (heads // kv_heads)).to(tl.int64) * capacity * D
    key_ptr, value_ptr = key_ptr + cache, value_ptr + cache
    element = ((batch * heads + head).to(tl.int64) * rows + row)[:, None] * D + tl.arange(0, D)[None, :]
    q = tl.load(query_ptr + element, mask=(row < rows)[:, None], other=0.0)
    state = (
        tl.full([BLOCK_M], NOTHING, tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M, D], tl.float32),
    )
    state = _sweep(state, q, 0, whole, key_ptr, value_ptr, reach, length, SCALE * LOG2E, D, BLOCK_N, False)
    _top, total, acc = _sweep(state, q, whole, last, key_ptr, value_ptr, reach, length, SCALE * LOG2E, D, BLOCK_N, True)
    output = acc * tl.where(live, 1.0 / total, 0.0)[:, None]
    tl.store(output_ptr + element, output.to(output_ptr.dtype.element_ty), mask=(row < rows)[:, None])
