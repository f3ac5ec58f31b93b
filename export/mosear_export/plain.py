"""Plain flavour of the two mechanisms: ONNX local functions made of standard operators, which any runtime inlines.

What depends on neither layer nor query (visibility, membership, the row gate) is written inside the function too: a
runtime's common-subexpression pass leaves one copy for all layers.

One maximum serves all groups of a row. It is lowered by SHIFT before the exponential, so that a group whose logits lie
up to about 140 below the row's largest keeps full fp32 precision (e^60 times 16k keys fits, and so does e^-87).
"""

from collections.abc import Iterable

import numpy as np
import onnx.parser
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

    query_shape = Constant <value = int64[4] {{0, {K}, -1, {D}}}> ()
    by_head = Constant <value = int64[4] {{0, {H}, -1, 0}}> ()
    by_kv_head = Constant <value = int64[4] {{0, {K}, -1, 0}}> ()
    scale_factor = Constant <value_float: float = @scale> ()
    packed = Reshape(query, query_shape)
    key_t = Transpose <perm = [0, 1, 3, 2]> (key)
    products = MatMul(packed, key_t)
    packed_scores = Mul(products, scale_factor)
    scores = Reshape(packed_scores, by_head)
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
    packed_weights = Reshape(weights, by_kv_head)
    packed_output = MatMul(packed_weights, value)
    output = Reshape(packed_output, by_head)
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

    params_split = Constant <value = int64[5] {{2, 2, 2, 1, 1}}> ()
    params_rows = Unsqueeze(policy_params, axis1)
    tau, ramp, move, sigma, audio_share = Split <axis = 2> (params_rows, params_split)
    pair = Slice(mass_before, pair_start, pair_end, axis3)
    pair_mass = ReduceSum(pair, axis3)
{flow}
    gated = Mul(flow, row_gate)
    moved = MatMul(gated, spread)
    mass_after = Add(mass_before, moved)
"""

_BALANCE = """
    unit = Constant <value = float {{1.0}}> ()
{statistic}
    safe_sum = Max(statistic_sum, tiny)
    share = Div(statistic, safe_sum)
    above = Sub(share, tau)
    above_ramp = Div(above, ramp)
    excess = Clip(above_ramp, nothing, unit)
    part = Mul(excess, move)
    given = Mul(pair, part)
    is_enough = GreaterOrEqual(pair_mass, sigma)
    flow = Where(is_enough, given, nothing)
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
    return [_attention(config), _experts(config)]


def _attention(config: ModelConfig) -> FunctionProto:
    backbone, size = config.backbone, len(config.groups)
    policy = _OFF
    if config.ar.policy is not Policy.OFF:
        statistic = (_MEAN if config.ar.statistic is Statistic.MEAN else _SUM).format()
        flow = _BALANCE if config.ar.policy is Policy.BALANCE else _TARGET
        spread = np.zeros((2, size))
        spread[:, VIDEO : AUDIO + 1] = [[-1, 1], [1, -1]]  # what each gains when video gives, and when audio does
        policy = _FLOW.format(flow=flow.format(statistic=statistic), G=size, spread=_list(spread.ravel().tolist()))
    body = _ATTENTION.format(
        G=size, H=backbone.heads, K=backbone.kv_heads, D=backbone.head_size, group_ids=_list(range(size)), shift=SHIFT,
        policy=policy,
    )  # fmt: skip
    return _function(ATTENTION, ATTENTION_INPUTS, ATTENTION_OUTPUTS, ("policy", "statistic", "scale"), body)


def _experts(config: ModelConfig) -> FunctionProto:
    mose, size = config.mose, len(config.groups)
    sets, experts = 1 if mose.share_a else size, size * mose.experts
    gates = _GIVEN.format()
    if mose.route is Route.TOKEN:
        select = _TOP1.format(GE=experts, places=_list(range(experts))) if mose.select is Select.TOP1 else _SOFT
        gates = _TOKEN.format(select=select)
    fold = np.tile(np.eye(mose.experts), (size, 1))  # [G * E, E]: the gates of a row's group, which alone are not 0
    body = _EXPERTS.format(
        A=sets, each=experts // sets, R=mose.rank, E=mose.experts, GE=experts, GER=experts * mose.rank,
        fold=_list(fold.ravel().tolist()), owner=_list((np.arange(experts) // mose.experts).tolist()), gates=gates,
    )  # fmt: skip
    return _function(EXPERTS, EXPERTS_INPUTS, EXPERTS_OUTPUTS, ("scale", "select", "route"), body)


def _list(values: Iterable[float]) -> str:
    return ", ".join(map(str, values))


def _function(
    name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], attributes: tuple[str, ...], body: str
) -> FunctionProto:
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n'
        f"{name} <{', '.join(attributes)}> ({', '.join(inputs)}) => ({', '.join(outputs)})\n{{{body}\n}}"
    )
    return onnx.parser.parse_function(text)
