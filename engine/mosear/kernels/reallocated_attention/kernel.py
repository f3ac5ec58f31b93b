"""Prefill kernels of reallocated attention: flash-style, no matrix of rows by keys in memory.

A tile of rows that all lie before first_row needs no policy: it is flash attention with one sum per group. Any other tile
is swept twice. The first sweep takes the masses alone (q . k and sums); from them the policy gives m', and with it the
weight of every key to its last factor: p'_j = m'_g / l_g * exp(s_j - top). The second sweep sums p'_j v_j: weights of at
most 1 whose sum is 1, so it needs no rescaling.

A group far below the others is exact because its sum is: the first sweep multiplies no values, so its p stay in fp32 and
are lifted by 2^100, and fp32 holds them down to 2^-226 of the row's largest (a gap of 156 in the logits). A group that
lies deeper still counts as not visible: it keeps its mass. See docs/kernels.md.

Most tiles of keys hold one group alone: where `tile_group` says so, a tile costs what it costs in flash attention.
"""

import triton
import triton.language as tl

from mosear.kernels.launch import KernelOp, Kind
from mosear.kernels.reallocated_attention.policy_kernel import AUDIO, LOG2E, MEAN, OFF, VIDEO, audio_to_video

NOTHING = tl.constexpr(float("-inf"))
MUTED = tl.constexpr(-1e30)  # stands for -inf where a product with 0 must be 0
LEAST = tl.constexpr(2.0**-126)  # fp32 loses digits below
SUM_LIFT = tl.constexpr(100.0)  # log2; 2^100 times 2^17 keys stays below fp32's 2^128
# Weights of the second sweep are lifted by 2^13 (at most 8192; fp16 holds 65504): fp16 keeps its digits down to 7e-9.
WEIGHT_LIFT = tl.constexpr(13.0)


@triton.jit
def keys_of(key_ptr, slots, length, D: tl.constexpr, MASKED: tl.constexpr):
    """Keys of the slots, [D, N]."""
    at = key_ptr + slots[None, :] * D + tl.arange(0, D)[:, None]
    return tl.load(at, mask=(slots < length)[None, :], other=0.0) if MASKED else tl.load(at)


@triton.jit
def values_of(value_ptr, slots, length, D: tl.constexpr, MASKED: tl.constexpr):
    """Values of the slots, [N, D]."""
    at = value_ptr + slots[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(at, mask=(slots < length)[:, None], other=0.0) if MASKED else tl.load(at)


@triton.jit
def groups_of(key_group_ptr, slots, length, MASKED: tl.constexpr):
    """Group of each slot, [N]; -1 behind the length."""
    at = key_group_ptr + slots
    return tl.load(at, mask=slots < length, other=-1) if MASKED else tl.load(at)


@triton.jit
def finite(top):
    """A maximum to subtract: 0 where nothing was seen, or only what is muted."""
    return tl.where(top <= MUTED, 0.0, top)


@triton.jit
def _pick(one, values, GROUPS: tl.constexpr):
    """values[one]."""
    picked = values[0]
    for g in tl.static_range(1, GROUPS):
        picked = tl.where(one == g, values[g], picked)
    return picked


@triton.jit
def _members(group, GROUPS: tl.constexpr):
    """1.0 where a slot is of a group, else 0.0: a tuple of f32 [N]. Whatever is of no other group counts as group 0.

    Numbers, not predicates: a sum over members is then one FFMA a number, and no predicate waits in a register.
    """
    members, rest = (), tl.full(group.shape, 1.0, tl.float32)
    for g in tl.static_range(1, GROUPS):
        member = tl.where(group == g, 1.0, 0.0)
        members += (member,)
        rest -= member
    return (rest,) + members  # noqa: RUF005 (Triton knows no unpacking)


@triton.jit
def _spread(members, values, GROUPS: tl.constexpr):
    """values of each group at its members: the sum of member * value, exact since all but one are 0."""
    spread = members[0] * values[0]
    for g in tl.static_range(1, GROUPS):
        spread += members[g] * values[g]
    return spread


@triton.jit
def _add_tile(sums, fade, total, one, GROUPS: tl.constexpr):
    """The sums per group after a tile whose keys are all of group `one`."""
    added = ()
    for g in tl.static_range(GROUPS):
        added += (sums[g] * fade + tl.where(one == g, total, 0.0),)
    return added


@triton.jit
def _add_mixed(sums, fade, p, members, GROUPS: tl.constexpr):
    """The sums per group after a tile of any groups."""
    added = ()
    for g in tl.static_range(GROUPS):
        added += (sums[g] * fade + tl.sum(p * members[g][None, :], 1),)
    return added


@triton.jit
def _raised(top, here, VALUES: tl.constexpr):
    """The maximum after a tile; a whole number where sums are lifted, so that what is subtracted from it stays exact."""
    top = tl.maximum(top, here)
    return top if VALUES else tl.ceil(top)


@triton.jit
def _sweep(
    state, q, first, last, key_ptr, value_ptr, key_group_ptr, tile_group_ptr, biases, reach, length,
    SCALE: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, VALUES: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Online softmax over tiles of keys, one sum per group: (top, sums, acc, visible keys of video and audio if COUNT).

    Without VALUES the sums are lifted and acc is left alone.
    """
    top, sums, acc, video_keys, audio_keys = state
    LIFT: tl.constexpr = 0.0 if VALUES else SUM_LIFT
    for tile in tl.range(first, last):
        slots = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        k = keys_of(key_ptr, slots, length, D, MASKED)
        scores = tl.dot(q, k, input_precision="ieee")
        if MASKED:
            inside = tl.arange(0, BLOCK_N)[None, :] <= (reach - tile * BLOCK_N)[:, None]
            scores = tl.where(inside, scores, NOTHING)
        one = -1 if tile_group_ptr is None else tl.load(tile_group_ptr + tile)
        if one >= 0:
            shift = _pick(one, biases, GROUPS)
            new_top = _raised(top, tl.max(scores, 1) * SCALE + shift, VALUES)
            fade = tl.exp2(top - finite(new_top))
            p = tl.exp2(scores * SCALE - (finite(new_top) - shift - LIFT)[:, None])
            sums = _add_tile(sums, fade, tl.sum(p, 1), one, GROUPS)
            if COUNT:
                new = tl.minimum(tl.maximum(reach + 1 - tile * BLOCK_N, 0), BLOCK_N) * (shift > MUTED)
                video_keys, audio_keys = video_keys + new * (one == VIDEO), audio_keys + new * (one == AUDIO)
        else:
            group = groups_of(key_group_ptr, slots, length, MASKED)
            members = _members(group, GROUPS)
            shifted = scores * SCALE + _spread(members, biases, GROUPS)[None, :]
            new_top = _raised(top, tl.max(shifted, 1), VALUES)
            fade = tl.exp2(top - finite(new_top))
            p = tl.exp2(shifted - (finite(new_top) - LIFT)[:, None])
            sums = _add_mixed(sums, fade, p, members, GROUPS)
            if COUNT:
                seen = shifted > MUTED / 2
                video_keys += tl.sum((seen & (group == VIDEO)[None, :]).to(tl.int32), 1)
                audio_keys += tl.sum((seen & (group == AUDIO)[None, :]).to(tl.int32), 1)
        top = new_top
        if VALUES:
            v = values_of(value_ptr, slots, length, D, MASKED)
            acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return top, sums, acc, video_keys, audio_keys


@triton.jit
def _weigh(shifted, members, weights, GROUPS: tl.constexpr):
    """Scores [M, N] in log2 and the weight [M] of each key's group."""
    for g in tl.static_range(GROUPS):
        shifted += members[g][None, :] * weights[g][:, None]
    return shifted


@triton.jit
def _weighted_sweep(
    acc, q, first, last, weights, key_ptr, value_ptr, key_group_ptr, tile_group_ptr, reach, length,
    SCALE: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Sum of exp2(q . k_j * SCALE + weight of j's group) v_j over tiles of keys; weights [M] of each group, in log2."""
    for tile in tl.range(first, last):
        slots = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        k = keys_of(key_ptr, slots, length, D, MASKED)
        scores = tl.dot(q, k, input_precision="ieee")
        if MASKED:
            inside = tl.arange(0, BLOCK_N)[None, :] <= (reach - tile * BLOCK_N)[:, None]
            scores = tl.where(inside, scores, NOTHING)
        one = -1 if tile_group_ptr is None else tl.load(tile_group_ptr + tile)
        if one >= 0:
            p = tl.exp2(scores * SCALE + _pick(one, weights, GROUPS)[:, None])
        else:
            group = groups_of(key_group_ptr, slots, length, MASKED)
            p = tl.exp2(_weigh(scores * SCALE, _members(group, GROUPS), weights, GROUPS))
        v = values_of(value_ptr, slots, length, D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc


@triton.jit
def _store_masses(ptr, row, inside, masses, GROUPS: tl.constexpr):
    for g in tl.static_range(GROUPS):
        tl.store(ptr + row * GROUPS + g, masses[g], mask=inside)


@triton.jit
def _normalised(sums, live, GROUPS: tl.constexpr):
    """Masses per group and the inverse of their sum; zeros where a row sees nothing."""
    total = sums[0]
    for g in tl.static_range(1, GROUPS):
        total += sums[g]
    live = live & (total > 0.0)
    inverse = tl.where(live, 1.0 / tl.where(live, total, 1.0), 0.0)
    masses = ()
    for g in tl.static_range(GROUPS):
        masses += (sums[g] * inverse,)
    return masses, inverse


@triton.jit
def _moved(masses, flow, GROUPS: tl.constexpr):
    """Masses after `flow` went from audio to video."""
    after = ()
    for g in tl.static_range(GROUPS):
        after += (masses[g] + flow if g == VIDEO else (masses[g] - flow if g == AUDIO else masses[g]),)
    return after


@triton.jit
def _weights(after, sums, biases, top, GROUPS: tl.constexpr):
    """What the second sweep adds to a score of each group, in log2: log2(m'_g / l_g) - top + b_g and the lift."""
    weights = ()
    for g in tl.static_range(GROUPS):
        here = sums[g] >= LEAST
        ratio = after[g] / tl.where(here, sums[g], 1.0)
        # The sum's lift is taken out as a factor where nothing overflows: in a logarithm it would cost digits. The rest
        # of the offset is a whole number.
        low = ratio < 1.0
        weight = tl.log2(tl.where(low, ratio * tl.exp2(SUM_LIFT), ratio)) + biases[g]
        weight += tl.where(low, WEIGHT_LIFT, WEIGHT_LIFT + SUM_LIFT) - top
        weights += (tl.maximum(tl.where(here, weight, MUTED), MUTED),)
    return weights


@triton.jit
def _prefill(
    query_ptr, key_ptr, value_ptr, key_group_ptr, tile_group_ptr, query_position_ptr, key_length_ptr, first_row_ptr,
    policy_params_ptr, strength_ptr, group_bias_ptr, heads, kv_heads, rows, capacity, output_ptr, before_ptr, after_ptr,
    POLICY: tl.constexpr, STATISTIC: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Where am I: a tile of rows of one head of one request; the tiles with most keys start first.
    head, batch = tl.program_id(1), tl.program_id(2)
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    length = tl.minimum(tl.load(key_length_ptr + batch), capacity)
    position = tl.load(query_position_ptr + batch * rows + row, mask=row < rows, other=-1)
    reach = tl.minimum(position, length - 1) if CAUSAL else tl.where(position < 0, -1, length - 1)
    live = reach >= 0
    last = tl.cdiv(tl.max(reach, 0) + 1, BLOCK_N)
    # Tiles before `whole` are seen in full by every live row: they need no mask.
    whole = tl.minimum((tl.min(tl.where(live, reach, capacity), 0) + 1) // BLOCK_N, last)
    cache = (batch * kv_heads + head // (heads // kv_heads)).to(tl.int64) * capacity * D
    key_ptr, value_ptr = key_ptr + cache, value_ptr + cache
    key_group_ptr += batch.to(tl.int64) * capacity
    if tile_group_ptr is not None:
        tile_group_ptr += batch * tl.cdiv(capacity, BLOCK_N)
    at = (batch * heads + head).to(tl.int64) * rows + row
    element = at[:, None] * D + tl.arange(0, D)[None, :]
    q = tl.load(query_ptr + element, mask=(row < rows)[:, None], other=0.0)
    first_row, strength = tl.load(first_row_ptr + batch), tl.load(strength_ptr + batch)
    biases = ()
    sums = ()
    for g in tl.static_range(GROUPS):
        biases += (tl.maximum(tl.load(group_bias_ptr + batch * GROUPS + g) * LOG2E, MUTED),)
        sums += (tl.zeros([BLOCK_M], tl.float32),)
    acc, counts = tl.zeros([BLOCK_M, D], tl.float32), tl.zeros([BLOCK_M], tl.int32)
    start = (tl.full([BLOCK_M], NOTHING, tl.float32), sums, acc, counts, counts)
    moves = (tl.max(position, 0) >= first_row) & (strength != 0.0)
    if POLICY == OFF:
        moves = False
    if not moves:
        seen = _sweep(
            start, q, 0, whole, key_ptr, value_ptr, key_group_ptr, tile_group_ptr, biases, reach, length,
            SCALE * LOG2E, GROUPS, D, BLOCK_N, False, True, False,
        )  # fmt: skip
        seen = _sweep(
            seen, q, whole, last, key_ptr, value_ptr, key_group_ptr, tile_group_ptr, biases, reach, length,
            SCALE * LOG2E, GROUPS, D, BLOCK_N, True, True, False,
        )  # fmt: skip
        before, inverse = _normalised(seen[1], live, GROUPS)
        after, output = before, seen[2] * inverse[:, None]
    else:
        found = _sweep(
            start, q, 0, whole, key_ptr, value_ptr, key_group_ptr, tile_group_ptr, biases, reach, length,
            SCALE * LOG2E, GROUPS, D, BLOCK_N, False, False, STATISTIC == MEAN,
        )  # fmt: skip
        top, sums, acc, video_keys, audio_keys = _sweep(
            found, q, whole, last, key_ptr, value_ptr, key_group_ptr, tile_group_ptr, biases, reach, length,
            SCALE * LOG2E, GROUPS, D, BLOCK_N, True, False, STATISTIC == MEAN,
        )  # fmt: skip
        before, inverse = _normalised(sums, live, GROUPS)
        if STATISTIC != MEAN:
            video_keys, audio_keys = counts + 1, counts + 1
        flow = audio_to_video(
            before[VIDEO], before[AUDIO], video_keys, audio_keys, policy_params_ptr, head, strength, POLICY, STATISTIC
        )
        reached = (sums[VIDEO] >= LEAST) & (sums[AUDIO] >= LEAST) & (position >= first_row)
        after = _moved(before, tl.where(reached, flow, 0.0), GROUPS)
        weights = _weights(after, sums, biases, finite(top), GROUPS)
        acc = _weighted_sweep(
            acc, q, 0, whole, weights, key_ptr, value_ptr, key_group_ptr, tile_group_ptr, reach, length,
            SCALE * LOG2E, GROUPS, D, BLOCK_N, False,
        )  # fmt: skip
        acc = _weighted_sweep(
            acc, q, whole, last, weights, key_ptr, value_ptr, key_group_ptr, tile_group_ptr, reach, length,
            SCALE * LOG2E, GROUPS, D, BLOCK_N, True,
        )  # fmt: skip
        output = tl.where(live[:, None], acc * tl.exp2(-WEIGHT_LIFT), 0.0)
    inside = row < rows
    tl.store(output_ptr + element, output.to(output_ptr.dtype.element_ty), mask=inside[:, None])
    _store_masses(before_ptr, at, inside, before, GROUPS)
    _store_masses(after_ptr, at, inside, after, GROUPS)


@triton.jit
def prefill(
    query_ptr, key_ptr, value_ptr, key_group_ptr, query_position_ptr, key_length_ptr, first_row_ptr, policy_params_ptr,
    strength_ptr, group_bias_ptr, heads, kv_heads, rows, capacity, output_ptr, before_ptr, after_ptr,
    POLICY: tl.constexpr, STATISTIC: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """o = sum over g of m'_g * o_g, with m' = m + strength * (pi(m) - m) at rows from first_row on: groups in any order.

    query, output [B, H, S, D]; key, value [B, K, L, D]; group i32 [B, L]; position i32 [B, S]; length, first_row i32 [B];
    params f32 [H, P]; strength f32 [B]; bias f32 [B, G]; before, after f32 [B, H, S, G]. Grid (ceil(S / BLOCK_M), H, B).
    """
    _prefill(
        query_ptr, key_ptr, value_ptr, key_group_ptr, None, query_position_ptr, key_length_ptr, first_row_ptr, policy_params_ptr,
        strength_ptr, group_bias_ptr, heads, kv_heads, rows, capacity, output_ptr, before_ptr, after_ptr,
        POLICY, STATISTIC, GROUPS, D, SCALE, CAUSAL, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def prefill_runs(
    query_ptr, key_ptr, value_ptr, key_group_ptr, tile_group_ptr, query_position_ptr, key_length_ptr, first_row_ptr,
    policy_params_ptr, strength_ptr, group_bias_ptr, heads, kv_heads, rows, capacity, output_ptr, before_ptr, after_ptr,
    POLICY: tl.constexpr, STATISTIC: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`prefill`'s formula where most tiles of keys hold one group alone.

    tile_group i32 [B, ceil(L / BLOCK_N)]: the group of all filled slots of a tile, or -1 where they differ.
    """
    _prefill(
        query_ptr, key_ptr, value_ptr, key_group_ptr, tile_group_ptr, query_position_ptr, key_length_ptr, first_row_ptr,
        policy_params_ptr, strength_ptr, group_bias_ptr, heads, kv_heads, rows, capacity, output_ptr, before_ptr, after_ptr,
        POLICY, STATISTIC, GROUPS, D, SCALE, CAUSAL, BLOCK_M, BLOCK_N,
    )  # fmt: skip


_CACHE = {"query_ptr": Kind.DATA, "key_ptr": Kind.DATA, "value_ptr": Kind.DATA, "key_group_ptr": Kind.I32}
_REQUEST = {
    "query_position_ptr": Kind.I32,
    "key_length_ptr": Kind.I32,
    "first_row_ptr": Kind.I32,
    "policy_params_ptr": Kind.F32,
    "strength_ptr": Kind.F32,
    "group_bias_ptr": Kind.F32,
}
_OUTPUTS = {"output_ptr": Kind.DATA, "before_ptr": Kind.F32, "after_ptr": Kind.F32}
_SCALARS = ("heads", "kv_heads", "rows", "capacity")

PREFILL = KernelOp(
    name="prefill", function=prefill, inputs=_CACHE | _REQUEST, scalars=_SCALARS, outputs=_OUTPUTS
)  # fmt: skip
PREFILL_RUNS = KernelOp(
    name="prefill_runs",
    function=prefill_runs,
    inputs=_CACHE | {"tile_group_ptr": Kind.I32} | _REQUEST,
    scalars=_SCALARS,
    outputs=_OUTPUTS,
)
OPS = (PREFILL, PREFILL_RUNS)
