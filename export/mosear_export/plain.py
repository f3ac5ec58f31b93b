"""Plain flavour of the two mechanisms: ONNX local functions made of standard operators, which any runtime inlines.

What depends on neither layer nor query (visibility, membership, the row gate) is written inside the function too: a
runtime's common-subexpression pass leaves one copy for all layers.

One maximum serves all groups of a row. It is lowered by SHIFT before the exponential, so that a group whose logits lie
up to about 140 below the row's largest keeps full fp32 precision (e^60 times 16k keys fits, and so does e^-87).
"""

import onnx.parser
from onnx import FunctionProto

from mosear.config import ModelConfig, Policy, Route, Select, Statistic
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
    axis0 = Constant <value = int64[1] {{0}}> ()
    axis1 = Constant <value = int64[1] {{1}}> ()
    axis2 = Constant <value = int64[1] {{2}}> ()
    axis3 = Constant <value = int64[1] {{3}}> ()
    floor = Constant <value = float {{-1e30}}> ()
    half_floor = Constant <value = float {{-5e29}}> ()
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
    is_open = Greater(mask, half_floor)
    open = Cast <to = 1> (is_open)
    count = MatMul(open, member)
    is_visible = Greater(count, nothing)
    visible = Cast <to = 1> (is_visible)

    query_shape = Constant <value = int64[4] {{0, {K}, -1, {D}}}> ()
    by_head = Constant <value = int64[4] {{0, {H}, -1, 0}}> ()
    by_kv_head = Constant <value = int64[4] {{0, {K}, -1, 0}}> ()
    scale_factor = Constant <value_float: float = @scale> ()
    scaled = Mul(query, scale_factor)
    packed = Reshape(scaled, query_shape)
    key_t = Transpose <perm = [0, 1, 3, 2]> (key)
    packed_scores = MatMul(packed, key_t)
    scores = Reshape(packed_scores, by_head)
    masked = Add(scores, mask)
    top = ReduceMax(masked, axis3)
    lowered = Sub(top, shift)
    relative = Sub(masked, lowered)
    e = Exp(relative)
    sums = MatMul(e, member)
    l = Mul(sums, visible)
    total = ReduceSum(l, axis3)
    safe_total = Max(total, tiny)
    mass_before = Div(l, safe_total)
{policy}
    safe_l = Max(l, tiny)
    factor = Div(mass_after, safe_l)
    key_factor = MatMul(factor, member_t)
    weights = Mul(e, key_factor)
    packed_weights = Reshape(weights, by_kv_head)
    packed_output = MatMul(packed_weights, value)
    output = Reshape(packed_output, by_head)
"""

_OFF = "    mass_after = Identity(mass_before)"

_FLOW = """
    from_row = Unsqueeze(first_row, axis1)
    is_later = GreaterOrEqual(query_position, from_row)
    later = Cast <to = 1> (is_later)
    strength_column = Unsqueeze(strength, axis1)
    row_strength = Mul(later, strength_column)
    row_strength_heads = Unsqueeze(row_strength, axis1)
    row_strength_column = Unsqueeze(row_strength_heads, axis3)
    {visible_split} = Split <axis = 3, num_outputs = {G}> (visible)
    both = Mul(visible_1, visible_2)
    row_gate = Mul(row_strength_column, both)

    params_rows = Unsqueeze(policy_params, axis1)
    move, tau_lo, tau_hi, ramp, sigma, audio_share = Split <axis = 2, num_outputs = 6> (params_rows)
    {before_split} = Split <axis = 3, num_outputs = {G}> (mass_before)
    pair = Add(before_1, before_2)
{flow}
    moved = Mul(move, flow)
    gated = Mul(moved, row_gate)
    video_after = Add(before_1, gated)
    audio_after = Sub(before_2, gated)
    mass_after = Concat <axis = 3> ({after_parts})
"""

_BALANCE = """
{statistic}
    stat_pair = Add(stat_video, stat_audio)
    safe_pair = Max(stat_pair, tiny)
    rho = Div(stat_audio, safe_pair)
    unit = Constant <value = float {{1.0}}> ()
    above = Sub(rho, tau_hi)
    above_ramp = Div(above, ramp)
    excess_audio = Clip(above_ramp, nothing, unit)
    below = Sub(tau_lo, rho)
    below_ramp = Div(below, ramp)
    excess_video = Clip(below_ramp, nothing, unit)
    to_video = Mul(before_2, excess_audio)
    to_audio = Mul(before_1, excess_video)
    net = Sub(to_video, to_audio)
    is_enough = GreaterOrEqual(pair, sigma)
    flow = Where(is_enough, net, nothing)
"""

_MEAN = """
    {count_split} = Split <axis = 3, num_outputs = {G}> (count)
    least = Constant <value = float {{1.0}}> ()
    count_video = Max(count_1, least)
    count_audio = Max(count_2, least)
    stat_video = Div(before_1, count_video)
    stat_audio = Div(before_2, count_audio)
"""

_SUM = """
    stat_video = Identity(before_1)
    stat_audio = Identity(before_2)
"""

_TARGET = """
    wanted = Mul(audio_share, pair)
    flow = Sub(before_2, wanted)
"""

_EXPERTS = """
    axis1 = Constant <value = int64[1] {{1}}> ()
    axis2 = Constant <value = int64[1] {{2}}> ()
    axis3 = Constant <value = int64[1] {{3}}> ()
    groups = Constant <value = int32[{G}] {{{group_ids}}}> ()
    scale_factor = Constant <value_float: float = @scale> ()
    flat_a = Constant <value = int64[2] {{{AR}, -1}}> ()
    flat_b = Constant <value = int64[2] {{{GER}, -1}}> ()
    split_u = Constant <value = int64[4] {{-1, {A}, 1, {R}}}> ()
    flat_mixed = Constant <value = int64[2] {{-1, {GER}}}> ()

    group_column = Unsqueeze(group, axis1)
    is_member = Equal(group_column, groups)
    member = Cast <to = 1> (is_member)
    member_column = Unsqueeze(member, axis2)
    a_flat = Reshape(a, flat_a)
    a_t = Transpose <perm = [1, 0]> (a_flat)
    u_flat = MatMul(x, a_t)
    u = Reshape(u_flat, split_u)
{gates}
    scaled_weight = Mul(weight, scale_factor)
    share = Mul(member, scaled_weight)
    share_column = Unsqueeze(share, axis2)
    coefficient = Mul(share_column, s)
    coefficient_column = Unsqueeze(coefficient, axis3)
    mixed = Mul(coefficient_column, u)
    mixed_flat = Reshape(mixed, flat_mixed)
    b_flat = Reshape(b, flat_b)
    delta = MatMul(mixed_flat, b_flat)
    y = Add(base, delta)
"""

_GIVEN = """
    s = Unsqueeze(gates_in, axis1)
    gates = Identity(gates_in)
"""

_TOKEN = """
    flat_gate = Constant <value = int64[2] {{{GE}, -1}}> ()
    split_s = Constant <value = int64[3] {{-1, {G}, {E}}}> ()
    gate_flat = Reshape(gate, flat_gate)
    gate_t = Transpose <perm = [1, 0]> (gate_flat)
    logits_flat = MatMul(x, gate_t)
    logits = Reshape(logits_flat, split_s)
    soft = Softmax <axis = 2> (logits)
{select}
    own = Mul(s, member_column)
    gates = ReduceSum <keepdims = 0> (own, axis1)
"""

_SOFT = "    s = Identity(soft)"

_TOP1 = """
    best = ArgMax <axis = 2, keepdims = 1> (soft)
    experts = Constant <value = int64[{E}] {{{expert_ids}}}> ()
    is_best = Equal(best, experts)
    s = Cast <to = 1> (is_best)
"""


def functions(config: ModelConfig) -> list[FunctionProto]:
    """The local functions that a decoder of this configuration calls."""
    return [_attention(config), _experts(config)]


def _attention(config: ModelConfig) -> FunctionProto:
    backbone, size = config.backbone, len(config.groups)

    def split(name: str) -> str:
        return ", ".join(f"{name}_{g}" for g in range(size))

    policy = _OFF
    if config.ar.policy is not Policy.OFF:
        mean = config.ar.statistic is Statistic.MEAN
        statistic = _MEAN.format(count_split=split("count"), G=size) if mean else _SUM
        flow = _BALANCE.format(statistic=statistic) if config.ar.policy is Policy.BALANCE else _TARGET
        after = ["before_0", "video_after", "audio_after", *(f"before_{g}" for g in range(3, size))]
        policy = _FLOW.format(
            visible_split=split("visible"), before_split=split("before"), flow=flow, G=size, after_parts=", ".join(after)
        )
    body = _ATTENTION.format(
        G=size, H=backbone.heads, K=backbone.kv_heads, D=backbone.head_size, group_ids=_ids(size), shift=SHIFT,
        policy=policy,
    )  # fmt: skip
    return _function(ATTENTION, ATTENTION_INPUTS, ATTENTION_OUTPUTS, ("policy", "statistic", "scale"), body)


def _experts(config: ModelConfig) -> FunctionProto:
    mose, size = config.mose, len(config.groups)
    sets = 1 if mose.share_a else size
    gates = _GIVEN
    if mose.route is Route.TOKEN:
        top1 = mose.select is Select.TOP1
        select = _TOP1.format(E=mose.experts, expert_ids=_ids(mose.experts)) if top1 else _SOFT
        gates = _TOKEN.format(GE=size * mose.experts, G=size, E=mose.experts, select=select)
    body = _EXPERTS.format(
        G=size, group_ids=_ids(size), A=sets, R=mose.rank, AR=sets * mose.rank,
        GER=size * mose.experts * mose.rank, gates=gates,
    )  # fmt: skip
    return _function(EXPERTS, EXPERTS_INPUTS, EXPERTS_OUTPUTS, ("scale", "select", "route"), body)


def _ids(count: int) -> str:
    return ", ".join(map(str, range(count)))


def _function(
    name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], attributes: tuple[str, ...], body: str
) -> FunctionProto:
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n'
        f"{name} <{', '.join(attributes)}> ({', '.join(inputs)}) => ({', '.join(outputs)})\n{{{body}\n}}"
    )
    return onnx.parser.parse_function(text)
