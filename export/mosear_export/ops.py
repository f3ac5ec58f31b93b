"""The two mechanisms and the cache write as torch custom ops, and as nodes of an exported program.

The CPU body of an op is its reference. In ONNX the mechanisms are nodes of domain `mosear`, whose plain flavour
(`mosear_export.plain`) any runtime inlines; the cache write is the standard TensorScatter.
"""

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnx.defs import OpSchema
from onnxscript.values import Opset
from torch import Tensor

from mosear.config import Policy, Route, Select, Statistic
from mosear.kernels.modality_experts.reference import modality_experts
from mosear.kernels.reallocated_attention.reference import reallocated_attention
from mosear_export.model.decoder import write_cache

DOMAIN, VERSION, OPSET = "mosear", 1, 24
ATTENTION, EXPERTS = "ReallocatedAttention", "ModalityExperts"
ATTENTION_INPUTS = (
    "query", "key", "value", "key_group", "query_position", "key_length", "first_row", "policy_params", "strength",
    "group_bias",
)  # fmt: skip
ATTENTION_OUTPUTS = ("output", "mass_before", "mass_after")
EXPERTS_INPUTS = ("base", "x", "group", "gates_in", "a", "gate", "b", "weight")
EXPERTS_OUTPUTS = ("y", "gates")
INTEGERS = {"key_group", "query_position", "key_length", "first_row", "group"}


@torch.library.custom_op("mosear::reallocated_attention", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, key_group: Tensor, query_position: Tensor, key_length: Tensor,
    first_row: Tensor, policy_params: Tensor, strength: Tensor, group_bias: Tensor, policy: str, statistic: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    output, before, after = reallocated_attention(
        query, key, value, key_group, query_position, key_length, first_row, policy_params, strength, group_bias,
        policy=Policy(policy), statistic=Statistic(statistic), scale=scale,
    )  # fmt: skip
    return output, before, after.clone() if after is before else after


@_attend.register_fake
def _attend_shape(query: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    group_bias = others[8]
    assert isinstance(group_bias, Tensor)
    masses = query.new_empty(*query.shape[:3], group_bias.shape[1])
    return torch.empty_like(query), masses, torch.empty_like(masses)


@torch.library.custom_op("mosear::modality_experts", mutates_args=())
def _adapt(
    base: Tensor, x: Tensor, group: Tensor, gates_in: Tensor, a: Tensor, gate: Tensor, b: Tensor, weight: Tensor,
    scale: float, select: str, route: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return modality_experts(
        base, x, group, gates_in, a, gate, b, weight, scale=scale, select=Select(select), route=Route(route)
    )


@_adapt.register_fake
def _adapt_shape(base: Tensor, x: Tensor, group: Tensor, gates_in: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(base), torch.empty_like(gates_in)


@torch.library.custom_op("mosear::write_cache", mutates_args=())
def _write(cache: Tensor, rows: Tensor, start: Tensor) -> Tensor:
    return write_cache(cache, rows, start)


@_write.register_fake
def _write_shape(cache: Tensor, rows: Tensor, start: Tensor) -> Tensor:
    return torch.empty_like(cache)


class ExportOps:
    """`Ops` whose calls stay visible by name in an exported program."""

    def attend(self, *tensors: Tensor, policy: str, statistic: str, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.mosear.reallocated_attention(
            *tensors, policy, statistic, scale
        )
        return result

    def adapt(self, *tensors: Tensor, scale: float, select: str, route: str) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = torch.ops.mosear.modality_experts(*tensors, scale, select, route)
        return result

    def write(self, cache: Tensor, rows: Tensor, start: Tensor) -> Tensor:
        result: Tensor = torch.ops.mosear.write_cache(cache, rows, start)
        return result

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> Tensor:
        return torch.onnx.ops.rotary_embedding(x, cos, sin, position.long())


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:  # Any: the exporter calls them with symbols
    """How the torch ops become ONNX nodes: for `torch.onnx.export(custom_translation_table=...)`."""
    _register_schema(ATTENTION, ATTENTION_INPUTS, ATTENTION_OUTPUTS, ("policy", "statistic"))
    _register_schema(EXPERTS, EXPERTS_INPUTS, EXPERTS_OUTPUTS, ("select", "route"))
    ours, standard = Opset(DOMAIN, VERSION), Opset("", OPSET)

    def attend(  # type: ignore[no-untyped-def]
               query, key, value, key_group, query_position, key_length, first_row, policy_params, strength,
               group_bias, policy: str, statistic: str, scale: float):  # fmt: skip
        return ours.ReallocatedAttention(
            query, key, value, key_group, query_position, key_length, first_row, policy_params, strength, group_bias,
            policy=policy, statistic=statistic, scale=scale,
        )  # fmt: skip

    def adapt(base, x, group, gates_in, a, gate, b, weight, scale: float, select: str, route: str):  # type: ignore[no-untyped-def]
        return ours.ModalityExperts(
            base, x, group, gates_in, a, gate, b, weight, scale=scale, select=select, route=route
        )

    def write(cache, rows, start):  # type: ignore[no-untyped-def]
        return standard.TensorScatter(
            cache, rows, standard.Cast(start, to=onnx.TensorProto.INT64), axis=2, mode="linear"
        )

    ops = torch.ops.mosear
    return {
        ops.reallocated_attention.default: attend,
        ops.modality_experts.default: adapt,
        ops.write_cache.default: write,
    }


def _register_schema(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], words: tuple[str, ...]) -> None:
    if onnx.defs.has(name, domain=DOMAIN):
        return
    attributes = [OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT, "", required=True)]
    attributes += [OpSchema.Attribute(word, OpSchema.AttrType.STRING, "", required=True) for word in words]
    types = [("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], ""), ("I", ["tensor(int32)"], "")]
    formal = OpSchema.FormalParameter
    onnx.defs.register_schema(
        OpSchema(
            name, DOMAIN, VERSION,
            inputs=[formal(n, "I" if n in INTEGERS else "T") for n in inputs],
            outputs=[formal(n, "T") for n in outputs],
            type_constraints=types, attributes=attributes,
        )
    )  # fmt: skip
