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
from mosear_export import masked_body
from mosear_export.fuse import replace_nodes
from mosear_export.ops import DOMAIN
from mosear_export.pack import PACKED_ATTENTION, PARAMS
from mosear_export.plain import function

CALL, ATTENTION = "AttentionCall", "MaskedAttention"
CALL_INPUTS = ("key_group", "query_position", "key_length", "first_row", "strength", "group_bias")
FLOOR = -30000.0  # of a mask: finite in 16 bits, and nothing after the exponential
MOST = 80.0  # a group is raised or lowered by at most so much (in logits)


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
    groups = "".join(masked_body.CALL_GROUP.format(g=g) for g in range(len(config.groups)))
    body = masked_body.CALL.format(
        floor=FLOOR, groups=groups, count_video=f"count_{VIDEO}", count_audio=f"count_{AUDIO}",
    ).replace(f"{{{FLOOR} + 1.0}}", f"{{{FLOOR + 1.0}}}")  # fmt: skip
    return function(CALL, CALL_INPUTS, tuple(_shared(config)), (), body)


def _attention(config: ModelConfig) -> FunctionProto:
    backbone, groups = config.backbone, range(len(config.groups))
    ar, names = config.ar, {"V": VIDEO, "A": AUDIO}
    moved = (VIDEO, AUDIO) if ar.policy is not Policy.OFF else ()
    masses = "".join(masked_body.MASS.format(g=g) for g in groups)
    shares = "\n".join(masked_body.SHARE.format(g=g) for g in groups)
    policy, bias = "", "    row_masks = Identity(mask)"
    if moved:
        statistic = (masked_body.MEAN if ar.statistic is Statistic.MEAN else masked_body.SUM).format(**names)
        flow = (
            masked_body.BALANCE.format(statistic=statistic, **names)
            if ar.policy is Policy.BALANCE
            else masked_body.TARGET.format(**names)
        )
        policy = masked_body.FLOW.format(flow=flow.format(statistic=statistic, **names), **names)
        biases = "".join(masked_body.BIAS_GROUP.format(g=g) for g in moved)
        bias = masked_body.BIAS.format(most=MOST, groups=biases, bias=listed_names("key_bias", moved))
    body = masked_body.ATTENTION.format(
        H=backbone.heads, K=backbone.kv_heads, D=backbone.head_size, rep=backbone.heads // backbone.kv_heads,
        groups="".join(masked_body.GROUP.format(g=g) for g in groups), lses=listed_names("lse", groups), masses=masses,
        parts=listed_names("part", groups), policy=f"{shares}\n{policy}", before=listed_names("before", groups),
        after=", ".join(f"{'after' if g in moved else 'before'}_{g}" for g in groups), bias=bias,
    )  # fmt: skip
    params = [column for name in PARAMS for column in columns_of(name)]
    inputs = ("query", "key", "value", *params, *_shared(config))
    return function(ATTENTION, inputs, ("output", "mass_before", "mass_after"), ("scale",), body)


def listed_names(stem: str, groups: "range | tuple[int, ...]") -> str:
    return ", ".join(f"{stem}_{g}" for g in groups)
