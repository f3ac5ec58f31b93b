"""Reallocated attention for TensorRT: one fused attention whose mask carries the factors of the groups.

exp(s_j) * m'_g / m_g = exp(s_j + log m'_g - log m_g): a group's factor is a bias of its keys, which rides in the mask of
a fused attention at no cost. So a layer needs the masses of its rows first, and there is one row to reallocate in a call:
rows before `first_row` keep their masses, and `first_row` is the last row of a prompt or the row of a decoded token. Here,
unlike in `plain`, a call reallocates its last row alone, and gives masses of that row alone: [B, H, 1, G].

The last row's scores are sums of products rather than a matrix product: fp32 without a copy of the cache, one kernel.
Each group has its own maximum, and its mass is a log-sum-exp, so that no group is lost however far below the others it
lies. A group is a tensor of its own, not a place on an axis: then TensorRT makes one or two kernels of all that lies
between the scores and the mask (with an axis it makes three).
"""

import numpy as np
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper

from mosear.config import ModelConfig, Policy, Statistic
from mosear.contract import Tensors
from mosear.kernels.reallocated_attention.policy import AUDIO, VIDEO
from mosear_export.fuse import replace_nodes
from mosear_export.ops import DOMAIN
from mosear_export.pack import PACKED_ATTENTION, PARAMS
from mosear_export.plain import function

CALL, ATTENTION = "AttentionCall", "MaskedAttention"
CALL_INPUTS = ("key_group", "query_position", "key_length", "first_row", "strength", "group_bias")
FLOOR = -30000.0  # of a mask: finite in 16 bits, and nothing after the exponential
MOST = 80.0  # a group is raised or lowered by at most so much (in logits)

_CALL = """
    zero = Constant <value = int64 {{0}}> ()
    one = Constant <value = int64 {{1}}> ()
    axis0 = Constant <value = int64[1] {{0}}> ()
    axis1 = Constant <value = int64[1] {{1}}> ()
    last_axis = Constant <value = int64[1] {{-1}}> ()
    around = Constant <value = int64[2] {{1, 2}}> ()
    one_value = Constant <value = int64[3] {{1, 2, 3}}> ()
    one_i32 = Constant <value = int32 {{1}}> ()
    zero_i32 = Constant <value = int32[1] {{0}}> ()
    floor = Constant <value = float {{{floor}}}> ()
    open_floor = Constant <value = float {{{floor} + 1.0}}> ()
    nothing = Constant <value = float {{0.0}}> ()
    never = Constant <value = float {{-1e30}}> ()

    key_shape = Shape(key_group)
    capacity = Gather(key_shape, one)
    slot_long = Range(zero, capacity, one)
    slot = Cast <to = 6> (slot_long)
    row_shape = Shape(query_position)
    rows = Gather(row_shape, one)
    row_long = Range(zero, rows, one)
    row = Cast <to = 6> (row_long)
    length = Unsqueeze(key_length, axis1)
    filled = Less(slot, length)
    filled_rows = Unsqueeze(filled, axis1)
    row_position = Unsqueeze(query_position, last_axis)
    reached = LessOrEqual(slot, row_position)
    seen = And(reached, filled_rows)
    finite_bias = Max(group_bias, floor)
    key_group_long = Cast <to = 7> (key_group)
    key_bias = GatherElements <axis = 1> (finite_bias, key_group_long)
    key_bias_rows = Unsqueeze(key_bias, axis1)
    mask_rows = Where(seen, key_bias_rows, floor)
    mask = Unsqueeze(mask_rows, axis1)

    last_position = Sub(length, one_i32)
    first_position = Gather <axis = 1> (query_position, zero_i32)
    last_unbound = Sub(last_position, first_position)
    rows_i32 = Cast <to = 6> (rows)
    highest = Sub(rows_i32, one_i32)
    last_row_high = Min(last_unbound, highest)
    last_row = Max(last_row_high, zero_i32)
    is_last_flat = Equal(row, last_row)
    is_last_row = Unsqueeze(is_last_flat, axis1)
    is_last = Unsqueeze(is_last_row, last_axis)
    last_long = Cast <to = 7> (last_row)
    last_index = Unsqueeze(last_long, around)

    is_open_key = Greater(key_bias, open_floor)
    is_open = And(is_open_key, filled)
    row_bias_flat = Where(filled, key_bias, floor)
    row_bias = Unsqueeze(row_bias_flat, around)
{groups}
    last_position_flat = Squeeze(last_position, axis1)
    is_later = GreaterOrEqual(last_position_flat, first_row)
    later = Cast <to = 1> (is_later)
    row_strength = Mul(later, strength)
    fewest = Min({count_video}, {count_audio})
    is_both = Greater(fewest, nothing)
    both = Cast <to = 1> (is_both)
    row_strength_column = Unsqueeze(row_strength, one_value)
    row_gate = Mul(row_strength_column, both)
"""
_CALL_GROUP = """
    id_{g} = Constant <value = int32 {{{g}}}> ()
    is_member_{g} = Equal(key_group, id_{g})
    member_flat_{g} = Cast <to = 1> (is_member_{g})
    member_{g} = Unsqueeze(member_flat_{g}, around)
    is_open_{g} = And(is_member_{g}, is_open)
    row_mask_flat_{g} = Where(is_open_{g}, key_bias, never)
    row_mask_{g} = Unsqueeze(row_mask_flat_{g}, around)
    open_{g} = Cast <to = 1> (is_open_{g})
    count_flat_{g} = ReduceSum(open_{g}, axis1)
    count_{g} = Unsqueeze(count_flat_{g}, around)
"""

_ATTENTION = """
    axis2 = Constant <value = int64[1] {{2}}> ()
    axis3 = Constant <value = int64[1] {{3}}> ()
    axis4 = Constant <value = int64[1] {{4}}> ()
    tiny = Constant <value = float {{1e-37}}> ()
    scale_factor = Constant <value_float: float = @scale> ()
    one_row = Constant <value = int64[4] {{1, {H}, 1, {D}}}> ()
    by_group = Constant <value = int64[5] {{0, {K}, {rep}, 1, {D}}}> ()
    by_head = Constant <value = int64[4] {{0, {H}, 1, -1}}> ()

    row_index = Expand(last_index, one_row)
    row = GatherElements <axis = 2> (query, row_index)
    grouped_row = Reshape(row, by_group)
    shared_key = Unsqueeze(key, axis2)
    products = Mul(grouped_row, shared_key)
    sums = ReduceSum <keepdims = 0> (products, axis4)
    scaled = Mul(sums, scale_factor)
    scores = Reshape(scaled, by_head)
{groups}
    top = Max({lses})
{masses}
    total = Sum({parts})
    log_total = Log(total)
    lse = Add(log_total, top)
{policy}
    mass_before = Concat <axis = 3> ({before})
    mass_after = Concat <axis = 3> ({after})
{bias}
    output = Attention <scale: float = @scale> (query, key, value, row_masks)
"""
_GROUP = """
    masked_{g} = Add(scores, row_mask_{g})
    top_{g} = ReduceMax(masked_{g}, axis3)
    relative_{g} = Sub(masked_{g}, top_{g})
    e_{g} = Exp(relative_{g})
    sum_{g} = ReduceSum(e_{g}, axis3)
    log_sum_{g} = Log(sum_{g})
    lse_{g} = Add(log_sum_{g}, top_{g})
"""
_MASS = """
    below_{g} = Sub(lse_{g}, top)
    part_{g} = Exp(below_{g})
"""
_SHARE = "    before_{g} = Div(part_{g}, total)"

_FLOW = """
    nothing = Constant <value = float {{0.0}}> ()
    unit = Constant <value = float {{1.0}}> ()
    pair = Add(before_{V}, before_{A})
{flow}
    moved = Mul(flow, row_gate)
    after_{V} = Add(before_{V}, moved)
    after_{A} = Sub(before_{A}, moved)
"""
_BALANCE = """
{statistic}
    statistic_sum = Add(statistic_v, statistic_a)
    divisor = Max(statistic_sum, tiny)
    share_v = Div(statistic_v, divisor)
    share_a = Div(statistic_a, divisor)
    above_v = Sub(share_v, tau_v)
    above_a = Sub(share_a, tau_a)
    on_ramp_v = Div(above_v, ramp_v)
    on_ramp_a = Div(above_a, ramp_a)
    excess_v = Clip(on_ramp_v, nothing, unit)
    excess_a = Clip(on_ramp_a, nothing, unit)
    gives_v = Mul(excess_v, move_v)
    gives_a = Mul(excess_a, move_a)
    flow_v = Mul(before_{V}, gives_v)
    flow_a = Mul(before_{A}, gives_a)
    net = Sub(flow_a, flow_v)
    is_enough = GreaterOrEqual(pair, sigma)
    flow = Where(is_enough, net, nothing)
"""
_SUM = """
    statistic_v = Identity(before_{V})
    statistic_a = Identity(before_{A})
"""
_MEAN = """
    keys_v = Max(count_{V}, unit)
    keys_a = Max(count_{A}, unit)
    statistic_v = Div(before_{V}, keys_v)
    statistic_a = Div(before_{A}, keys_a)
"""
_TARGET = """
    wanted = Mul(audio_share, pair)
    away = Sub(before_{A}, wanted)
    flow = Mul(away, move_a)
"""
_BIAS = """
    most = Constant <value = float {{{most}}}> ()
    least = Constant <value = float {{-{most}}}> ()
{groups}
    key_bias = Add({bias})
    is_row = Identity(is_last)
    no_bias = Constant <value = float {{0.0}}> ()
    row_bias_here = Where(is_row, key_bias, no_bias)
    row_masks = Add(mask, row_bias_here)
"""
_BIAS_GROUP = """
    log_before_{g} = Sub(lse_{g}, lse)
    safe_after_{g} = Max(after_{g}, tiny)
    log_after_{g} = Log(safe_after_{g})
    log_factor_{g} = Sub(log_after_{g}, log_before_{g})
    factor_{g} = Clip(log_factor_{g}, least, most)
    key_bias_{g} = Mul(factor_{g}, member_{g})
"""


def attend_masked(model: ModelProto, config: ModelConfig, heads: Tensors) -> Tensors:
    """Replace a packed decoder's reallocated attention in place, and give its masses the last row alone.

    Returns the heads that its inputs now are: each policy parameter a column of its own, [1, H, 1, 1].
    """
    heads = _split_columns(model, heads)
    shared = _shared(config)
    names = [f"attention_call.{name}" for name in shared]
    result: list[NodeProto] = []
    for node in model.graph.node:
        if (node.domain, node.op_type) != (DOMAIN, PACKED_ATTENTION):
            result.append(node)
            continue
        query, key, value, group, position, length, first = node.input[:7]
        params, (strength, bias) = node.input[7 : 7 + len(PARAMS)], node.input[7 + len(PARAMS) :]
        if not any(earlier.op_type == CALL for earlier in result):
            inputs = [group, position, length, first, strength, bias]
            result.append(helper.make_node(CALL, inputs, names, domain=DOMAIN, name=CALL))
        columns = [column for name in params for column in columns_of(name)]
        scale = next(attribute.f for attribute in node.attribute if attribute.name == "scale")
        result.append(
            helper.make_node(
                ATTENTION, [query, key, value, *columns, *names], list(node.output), name=node.name, domain=DOMAIN,
                scale=scale,
            )
        )  # fmt: skip
    _one_row_of_masses(model, result, config)
    replace_nodes(model, result)
    model.functions.extend(functions(config))
    return heads


def columns_of(name: str) -> list[str]:
    """A policy parameter's inputs: for video and audio, or the one for both."""
    kind = name.rsplit(".", 1)[-1]
    places = PARAMS[kind]
    return [f"{name}_v", f"{name}_a"] if places.stop - places.start == 2 else [name]


def _split_columns(model: ModelProto, heads: Tensors) -> Tensors:
    """Every `ar_params.<kind>` [H, 1, n] becomes n inputs of [1, H, 1, 1]: slices would be kernels of their own."""
    made: Tensors = {}
    for name, value in heads.items():
        if ".ar_params." in name:
            made |= {
                column: np.ascontiguousarray(value[None, :, :, at, None]) for at, column in enumerate(columns_of(name))
            }
        else:
            made[name] = value
    kept = [value for value in model.graph.input if ".ar_params." not in value.name]
    new = [(name, value) for name, value in made.items() if ".ar_params." in name]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.input.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in new)
    return made


def functions(config: ModelConfig) -> list[FunctionProto]:
    """What a call computes once, and what each layer does."""
    return [_call(config), _attention(config)]


def _shared(config: ModelConfig) -> list[str]:
    """What all layers of a call share."""
    kinds = [f"{kind}_{g}" for kind in ("row_mask", "member", "count") for g in range(len(config.groups))]
    return ["mask", "is_last", "last_index", "row_gate", *kinds]


def _one_row_of_masses(model: ModelProto, nodes: list[NodeProto], config: ModelConfig) -> None:
    shape = [0, config.backbone.layers, config.backbone.heads, 1, len(config.groups)]
    name = "shape_of_masses"
    for at, node in enumerate(nodes):
        if node.output[0] in ("mass_before", "mass_after"):
            nodes[at] = helper.make_node("Reshape", [node.input[0], name], list(node.output), name=node.name)
    model.graph.initializer.append(helper.make_tensor(name, 7, [len(shape)], shape))
    for value in model.graph.output:
        if value.name in ("mass_before", "mass_after"):
            value.type.tensor_type.shape.dim[3].Clear()
            value.type.tensor_type.shape.dim[3].dim_value = 1


def _call(config: ModelConfig) -> FunctionProto:
    groups = "".join(_CALL_GROUP.format(g=g) for g in range(len(config.groups)))
    body = _CALL.format(
        floor=FLOOR, groups=groups, count_video=f"count_{VIDEO}", count_audio=f"count_{AUDIO}",
    ).replace(f"{{{FLOOR} + 1.0}}", f"{{{FLOOR + 1.0}}}")  # fmt: skip
    return function(CALL, CALL_INPUTS, tuple(_shared(config)), (), body)


def _attention(config: ModelConfig) -> FunctionProto:
    backbone, groups = config.backbone, range(len(config.groups))
    ar, names = config.ar, {"V": VIDEO, "A": AUDIO}
    moved = (VIDEO, AUDIO) if ar.policy is not Policy.OFF else ()
    masses = "".join(_MASS.format(g=g) for g in groups)
    shares = "\n".join(_SHARE.format(g=g) for g in groups)
    policy, bias = "", "    row_masks = Identity(mask)"
    if moved:
        statistic = (_MEAN if ar.statistic is Statistic.MEAN else _SUM).format(**names)
        flow = _BALANCE.format(statistic=statistic, **names) if ar.policy is Policy.BALANCE else _TARGET.format(**names)
        policy = _FLOW.format(flow=flow, **names)
        biases = "".join(_BIAS_GROUP.format(g=g) for g in moved)
        bias = _BIAS.format(most=MOST, groups=biases, bias=listed_names("key_bias", moved))
    body = _ATTENTION.format(
        H=backbone.heads, K=backbone.kv_heads, D=backbone.head_size, rep=backbone.heads // backbone.kv_heads,
        groups="".join(_GROUP.format(g=g) for g in groups), lses=listed_names("lse", groups), masses=masses,
        parts=listed_names("part", groups), policy=f"{shares}\n{policy}", before=listed_names("before", groups),
        after=", ".join(f"{'after' if g in moved else 'before'}_{g}" for g in groups), bias=bias,
    )  # fmt: skip
    params = [column for name in PARAMS for column in columns_of(name)]
    inputs = ("query", "key", "value", *params, *_shared(config))
    return function(ATTENTION, inputs, ("output", "mass_before", "mass_after"), ("scale",), body)


def listed_names(stem: str, groups: "range | tuple[int, ...]") -> str:
    return ", ".join(f"{stem}_{g}" for g in groups)
