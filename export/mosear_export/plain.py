"""Plain flavour of the two mechanisms: ONNX local functions made of standard operators, which any runtime inlines.

What depends on neither layer nor query (visibility, membership, the row gate) is written inside the function too: a
runtime's common-subexpression pass leaves one copy for all layers.

One maximum serves all groups of a row. It is lowered by SHIFT before the exponential, so that a group whose logits lie
up to about 140 below the row's largest keeps full fp32 precision (e^60 times 16k keys fits, and so does e^-87).

Query heads that share a key head are an axis of their own, so that a decoded token is products of one row. The scale is
put on the query before they are grouped: next to the product it would be fused into it, and ONNX Runtime's fast path for
one row knows no factor (22 us a layer become 68).
"""

from collections.abc import Iterable, Sequence

import numpy as np
import onnx.parser
from numpy.typing import NDArray
from onnx import FunctionProto

from mosear.config import ModelConfig, Policy, Route, Select, Statistic
from mosear.kernels.reallocated_attention.policy import AUDIO, VIDEO
from mosear_export.ops import (
    ATTENTION,
    ATTENTION_INPUTS,
    ATTENTION_OUTPUTS,
    DOMAIN,
    EXPERTS,
    EXPERTS_INPUTS,
    EXPERTS_OUTPUTS,
    OPSET,
)

SHIFT = 60.0

_ATTENTION = """
    zero = Constant <value = int64 {{0}}> ()
    one = Constant <value = int64 {{1}}> ()
    any = Constant <value = int64[1] {{-1}}> ()
    axis0 = Constant <value = int64[1] {{0}}> ()
    axis1 = Constant <value = int64[1] {{1}}> ()
    axis2 = Constant <value = int64[1] {{2}}> ()
    axis3 = Constant <value = int64[1] {{3}}> ()
    floor = Constant <value = float {{-1e30}}> ()
    open_floor = Constant <value = float {{-1e29}}> ()
    nothing = Constant <value = float {{0.0}}> ()
    tiny = Constant <value = float {{1.2e-38}}> ()
    shift = Constant <value = float {{{shift}}}> ()
    groups = Constant <value = int32[{G}] {{{group_ids}}}> ()

    shape = Shape(key_group)
    capacity = Gather(shape, one)
    slot_long = Range(zero, capacity, one)
    slot = Cast <to = 6> (slot_long)
    length = Unsqueeze(key_length, axis1)
    filled = Less(slot, length)
    filled_rows = Unsqueeze(filled, axis1)
    row_position = Unsqueeze(query_position, axis2)
    reached = LessOrEqual(slot, row_position)
    seen = And(reached, filled_rows)
    seen_heads = Unsqueeze(seen, axis1)

    key_group_column = Unsqueeze(key_group, axis2)
    is_member = Equal(key_group_column, groups)
    member_flat = Cast <to = 1> (is_member)
    member = Unsqueeze(member_flat, axis1)
    member_t = Transpose <perm = [0, 1, 3, 2]> (member)
    finite_bias = Max(group_bias, floor)
    bias_column = Unsqueeze(finite_bias, axis2)
    key_bias_column = MatMul(member_flat, bias_column)
    key_bias = Transpose <perm = [0, 2, 1]> (key_bias_column)
    key_bias_heads = Unsqueeze(key_bias, axis1)
    mask = Where(seen_heads, key_bias_heads, floor)
    is_open = Greater(mask, open_floor)
    open = Cast <to = 1> (is_open)
    count = MatMul(open, member)

    head_shape = Constant <value = int64[5] {{0, {K}, {rep}, -1, {D}}}> ()
    cache_shape = Constant <value = int64[5] {{0, {K}, 1, -1, {D}}}> ()
    by_head = Constant <value = int64[4] {{0, {H}, -1, {D}}}> ()
    scale_factor = Constant <value_float: float = @scale> ()
    row_shape = Shape(query_position)
    row_count = Gather(row_shape, one)
    rows_of_heads = Constant <value = int64[2] {{0, {H}}}> ()
    rows_of_kv_heads = Constant <value = int64[3] {{0, {K}, {rep}}}> ()
    row_count_1 = Unsqueeze(row_count, axis0)
    last_two = Concat <axis = 0> (row_count_1, any)
    score_shape = Concat <axis = 0> (rows_of_heads, last_two)
    weight_shape = Concat <axis = 0> (rows_of_kv_heads, last_two)
    scaled_query = Mul(query, scale_factor)
    grouped_query = Reshape(scaled_query, head_shape)
    shared_key = Reshape(key, cache_shape)
    key_t = Transpose <perm = [0, 1, 2, 4, 3]> (shared_key)
    grouped_scores = MatMul(grouped_query, key_t)
    scores = Reshape(grouped_scores, score_shape)
    masked = Add(scores, mask)
    top = ReduceMax(masked, axis3)
    open_top = Max(top, open_floor)
    lowered = Sub(open_top, shift)
    relative = Sub(masked, lowered)
    e = Exp(relative)
    l = MatMul(e, member)
    total = ReduceSum(l, axis3)
    safe_total = Max(total, tiny)
    mass_before = Div(l, safe_total)
{policy}
    safe_l = Max(l, tiny)
    factor = Div(mass_after, safe_l)
    key_factor = MatMul(factor, member_t)
    weights = Mul(e, key_factor)
    grouped_weights = Reshape(weights, weight_shape)
    shared_value = Reshape(value, cache_shape)
    grouped_output = MatMul(grouped_weights, shared_value)
    output = Reshape(grouped_output, by_head)
"""

_OFF = "    mass_after = Identity(mass_before)"

# A flow is what moves from audio to video. `spread` adds it to one and takes it from the other.
_FLOW = """
    pair_start = Constant <value = int64[1] {{1}}> ()
    pair_end = Constant <value = int64[1] {{3}}> ()
    spread = Constant <value = float[2, {G}] {{{spread}}}> ()
    from_row = Unsqueeze(first_row, axis1)
    is_later = GreaterOrEqual(query_position, from_row)
    later = Cast <to = 1> (is_later)
    strength_column = Unsqueeze(strength, axis1)
    row_strength = Mul(later, strength_column)
    row_strength_heads = Unsqueeze(row_strength, axis1)
    row_strength_column = Unsqueeze(row_strength_heads, axis3)
    pair_count = Slice(count, pair_start, pair_end, axis3)
    fewest = ReduceMin(pair_count, axis3)
    is_both = Greater(fewest, nothing)
    row_gate = Where(is_both, row_strength_column, nothing)

{params}
    pair = Slice(mass_before, pair_start, pair_end, axis3)
    pair_mass = ReduceSum(pair, axis3)
{flow}
    gated = Mul(flow, row_gate)
    moved = MatMul(gated, spread)
    mass_after = Add(mass_before, moved)
"""

_PARAMS = """
    params_split = Constant <value = int64[5] {2, 2, 2, 1, 1}> ()
    params_rows = Unsqueeze(policy_params, axis1)
    tau, ramp, move, sigma, audio_share = Split <axis = 2> (params_rows, params_split)
"""

_BALANCE = """
    unit = Constant <value = float {{1.0}}> ()
    huge = Constant <value = float {{3e38}}> ()
{statistic}
    is_enough = GreaterOrEqual(pair_mass, sigma)
    divisor = Where(is_enough, statistic_sum, huge)
    share = Div(statistic, divisor)
    above = Sub(share, tau)
    above_ramp = Div(above, ramp)
    excess = Clip(above_ramp, nothing, unit)
    part = Mul(excess, move)
    flow = Mul(pair, part)
"""

_MEAN = """
    least = Constant <value = float {{1.0}}> ()
    keys = Max(pair_count, least)
    statistic = Div(pair, keys)
    statistic_sum = ReduceSum(statistic, axis3)
"""

_SUM = """
    statistic = Identity(pair)
    statistic_sum = Identity(pair_mass)
"""

_TARGET = """
    wanted = Mul(audio_share, pair_mass)
    video, audio = Split <axis = 3, num_outputs = 2> (pair)
    away = Sub(audio, wanted)
    video_move, audio_move = Split <axis = 2, num_outputs = 2> (move)
    audio_flow = Mul(away, audio_move)
    video_flow = Mul(audio_flow, nothing)
    flow = Concat <axis = 3> (video_flow, audio_flow)
"""

_EXPERTS = """
    last = Constant <value = int64[1] {{-1}}> ()
    scale_factor = Constant <value_float: float = @scale> ()
    split_s = Constant <value = int64[5] {{0, 0, {A}, {each}, 1}}> ()
    split_u = Constant <value = int64[5] {{0, 0, {A}, 1, {R}}}> ()
    flat_mixed = Constant <value = int64[3] {{0, 0, {GER}}}> ()
    fold = Constant <value = float[{GE}, {E}] {{{fold}}}> ()
    owner = Constant <value = int32[{GE}] {{{owner}}}> ()

    group_column = Unsqueeze(group, last)
    is_own = Equal(group_column, owner)
    weight_of_owner = Gather(weight, owner)
    scaled_weight = Mul(weight_of_owner, scale_factor)
    a_t = Transpose <perm = [1, 0]> (a)
    u_flat = MatMul(x, a_t)
    u = Reshape(u_flat, split_u)
{gates}
    coefficient_flat = Mul(s, scaled_weight)
    coefficient = Reshape(coefficient_flat, split_s)
    mixed = Mul(coefficient, u)
    mixed_flat = Reshape(mixed, flat_mixed)
    delta = MatMul(mixed_flat, b)
    y = Add(base, delta)
"""

_GIVEN = """
    own = Cast <to = 1> (is_own)
    unfold = Transpose <perm = [1, 0]> (fold)
    everywhere = MatMul(gates_in, unfold)
    s = Mul(everywhere, own)
    gates = Identity(gates_in)
"""

_TOKEN = """
    zero = Constant <value = float {{0.0}}> ()
    floor = Constant <value = float {{-1e30}}> ()
    hidden = Where(is_own, zero, floor)
    gate_t = Transpose <perm = [1, 0]> (gate)
    logits = MatMul(x, gate_t)
    own_logits = Add(logits, hidden)
{select}
    gates = MatMul(s, fold)
"""

_SOFT = "    s = Softmax <axis = -1> (own_logits)"

_TOP1 = """
    places = Constant <value = int64[{GE}] {{{places}}}> ()
    best = ArgMax <axis = -1, keepdims = 1> (own_logits)
    is_best = Equal(best, places)
    s = Cast <to = 1> (is_best)
"""


def functions(config: ModelConfig) -> list[FunctionProto]:
    """The local functions that a decoder of this configuration calls."""
    return [attention(config), _experts(config)]


def attention(config: ModelConfig, *, name: str = ATTENTION, params: Sequence[str] = ()) -> FunctionProto:
    """Reallocated attention; with `params`, inputs of these names stand in the place of policy_params, split already."""
    backbone, size = config.backbone, len(config.groups)
    policy = _OFF
    if config.ar.policy is not Policy.OFF:
        statistic = (_MEAN if config.ar.statistic is Statistic.MEAN else _SUM).format()
        flow = _BALANCE if config.ar.policy is Policy.BALANCE else _TARGET
        spread = np.zeros((2, size))
        spread[:, VIDEO : AUDIO + 1] = [[-1, 1], [1, -1]]  # what each gains when video gives, and when audio does
        policy = _FLOW.format(
            flow=flow.format(statistic=statistic), G=size, spread=listed(spread.ravel().tolist()),
            params="" if params else _PARAMS,
        )  # fmt: skip
    body = _ATTENTION.format(
        G=size, H=backbone.heads, K=backbone.kv_heads, D=backbone.head_size, rep=backbone.heads // backbone.kv_heads,
        group_ids=listed(range(size)), shift=SHIFT, policy=policy,
    )  # fmt: skip
    at = ATTENTION_INPUTS.index("policy_params")
    inputs = (*ATTENTION_INPUTS[:at], *params, *ATTENTION_INPUTS[at + 1 :]) if params else ATTENTION_INPUTS
    return function(name, inputs, ATTENTION_OUTPUTS, ("policy", "statistic", "scale"), body)


def _experts(config: ModelConfig) -> FunctionProto:
    mose, size = config.mose, len(config.groups)
    sets, experts = 1 if mose.share_a else size, size * mose.experts
    gates = _GIVEN.format()
    if mose.route is Route.TOKEN:
        gates = _TOKEN.format(select=select(config))
    body = _EXPERTS.format(
        A=sets, each=experts // sets, R=mose.rank, E=mose.experts, GE=experts, GER=experts * mose.rank,
        fold=listed(fold(config).ravel().tolist()), owner=owners(config), gates=gates,
    )  # fmt: skip
    return function(EXPERTS, EXPERTS_INPUTS, EXPERTS_OUTPUTS, ("scale", "select", "route"), body)


def fold(config: ModelConfig) -> NDArray[np.float32]:
    """[G * E, E]: from the gates of all groups, of which a row's own alone are not 0, to those of the row."""
    return np.tile(np.eye(config.mose.experts, dtype=np.float32), (len(config.groups), 1))


def owners(config: ModelConfig) -> str:
    """The group of each expert."""
    return listed((np.arange(len(config.groups) * config.mose.experts) // config.mose.experts).tolist())


def select(config: ModelConfig) -> str:
    """From own_logits to the gates s."""
    experts = len(config.groups) * config.mose.experts
    return _TOP1.format(GE=experts, places=listed(range(experts))) if config.mose.select is Select.TOP1 else _SOFT


def listed(values: Iterable[float]) -> str:
    """Values as they stand in a constant."""
    return ", ".join(map(str, values))


def function(
    name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], attributes: tuple[str, ...], body: str
) -> FunctionProto:
    """A local function of our domain from its text."""
    declared = f"<{', '.join(attributes)}> " if attributes else ""
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n'
        f"{name} {declared}({', '.join(inputs)}) => ({', '.join(outputs)})\n{{{body}\n}}"
    )
    return onnx.parser.parse_function(text)
