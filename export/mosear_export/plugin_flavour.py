"""Plugin flavour of a decoder: its mechanisms as nodes bound to ahead-of-time TensorRT plugins, partial results between them.

The plain flavour's local functions go; names, axes and all other nodes stay. Each launch is a node:

    ReallocatedAttention -> AttentionSplit, AttentionFinish      ModalityExperts -> ExpertsShrink, ExpertsExpand

Or each mechanism stays one node, for the C++ plugin library, which chooses its launches when it is called.

What the node said in attributes, and sizes that a kernel has as constants, become the new nodes' attributes. TensorRT bakes
them into the kernels at build and keeps none of them. Heads stay inputs.
"""

import enum
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.defs import OpSchema

from mosear.config import ModelConfig
from mosear.errors import EngineError
from mosear.kernels.launch import Kind
from mosear.kernels.modality_experts.plugin import EXPERTS_EXPAND, EXPERTS_SHRINK
from mosear.kernels.modality_experts.plugin import OPS as EXPERTS_OPS
from mosear.kernels.plugins.binding import NAMESPACE, VERSION
from mosear.kernels.plugins.op import Attribute, PluginOp
from mosear.kernels.reallocated_attention.arguments import HEAD_SIZES
from mosear.kernels.reallocated_attention.decode_launches import MAX_SHARED
from mosear.kernels.reallocated_attention.plugin import ATTENTION_FINISH, ATTENTION_SPLIT
from mosear.kernels.reallocated_attention.plugin import OPS as ATTENTION_OPS
from mosear_export.fuse import replace_nodes
from mosear_export.narrow import Typed
from mosear_export.ops import (
    ATTENTION,
    ATTENTION_INPUTS,
    ATTENTION_OUTPUTS,
    DOMAIN,
    EXPERTS,
    EXPERTS_INPUTS,
    EXPERTS_OUTPUTS,
)
from mosear_export.ops import VERSION as DOMAIN_VERSION

ELEMENTS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
LIBRARY_ELEMENTS = ("fp16", "bf16")  # of the kernels that the C++ library embeds
BINDING: dict[str, Attribute] = {"plugin_namespace": NAMESPACE, "plugin_version": VERSION, "aot": 1}
# The library's node for experts: those of our operator, and where each linear's columns begin.
LIBRARY_EXPERTS = f"{EXPERTS}Columns"
LIBRARY_INPUTS = (*EXPERTS_INPUTS, "column_start")
LIBRARY_KINDS = {**ATTENTION_FINISH.inputs, **EXPERTS_SHRINK.inputs, **EXPERTS_EXPAND.inputs}
_ATTRIBUTE_TYPES = {str: OpSchema.AttrType.STRING, int: OpSchema.AttrType.INT, float: OpSchema.AttrType.FLOAT}


class Plugins(enum.StrEnum):
    """Which plugins serve the mechanisms."""

    LAUNCHES = "launches"  # a node for each launch, ahead-of-time plugins
    LIBRARY = "library"  # a node for each mechanism, libmosear_trt_plugin.so


def plugin_flavour(
    model: ModelProto, config: ModelConfig, *, data: str = "fp32", plugins: Plugins = Plugins.LAUNCHES
) -> ModelProto:
    """A copy of a decoder whose mechanisms are plugin nodes, their activations of type `data` (fp32, fp16 or bf16).

    Raises EngineError where the model calls no mechanism, or has sizes or types that no kernel serves.
    """
    served = tuple(ELEMENTS) if plugins is Plugins.LAUNCHES else LIBRARY_ELEMENTS
    if data not in served:
        raise EngineError(f"data is {data!r}: plugins serve {', '.join(served)}")
    check(config)
    copy: ModelProto = ModelProto.FromString(model.SerializeToString())
    writer = _Writer(copy, config, data, plugins)
    nodes = [made for node in copy.graph.node for made in writer.replace(node)]
    if not writer.replaced:
        raise EngineError(
            f"the model calls neither {ATTENTION} nor {EXPERTS} of {DOMAIN}: export the decoder with `mosear export onnx`"
        )
    replace_nodes(copy, nodes)
    copy.graph.initializer.extend(writer.constants.values())
    kept = [function for function in copy.functions if function.domain != DOMAIN]
    del copy.functions[:]
    copy.functions.extend(kept)
    register_schemas()
    onnx.checker.check_model(copy)
    return copy


def check(config: ModelConfig) -> None:
    """Raises EngineError naming a size of the model that no kernel serves, and the sizes that are served."""
    backbone = config.backbone
    shared = backbone.heads // backbone.kv_heads
    if backbone.head_size not in HEAD_SIZES:
        raise EngineError(
            f"head_size is {backbone.head_size}: attention plugins serve {' and '.join(map(str, HEAD_SIZES))}"
        )
    if shared > MAX_SHARED:
        raise EngineError(f"{shared} heads share a key/value head: attention plugins serve up to {MAX_SHARED}")


def register_schemas() -> None:
    """Make the plugins' nodes known to ONNX's checker, once."""
    binding = {name: type(value) for name, value in BINDING.items()}
    nodes = [(op.name, op.inputs, op.outputs, {**op.attributes, **binding}) for op in (*ATTENTION_OPS, *EXPERTS_OPS)]
    fields: dict[str, type] = {"columns": str, "select": str, "route": str, "scale": float}
    nodes.append(
        (LIBRARY_EXPERTS, {name: LIBRARY_KINDS[name] for name in LIBRARY_INPUTS}, EXPERTS_EXPAND.outputs, fields)
    )
    formal, kinds = OpSchema.FormalParameter, {Kind.DATA: "T", Kind.F32: "tensor(float)", Kind.I32: "tensor(int32)"}
    for node, inputs, outputs, types in nodes:
        if onnx.defs.has(node, domain=DOMAIN):
            continue
        onnx.defs.register_schema(
            OpSchema(
                node, DOMAIN, DOMAIN_VERSION,
                inputs=[formal(n, kinds[kind]) for n, kind in inputs.items()],
                outputs=[formal(n, kinds[kind]) for n, kind in outputs.items()],
                type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
                attributes=[OpSchema.Attribute(n, _ATTRIBUTE_TYPES[t], "", required=True) for n, t in types.items()],
            )
        )  # fmt: skip


def typed_operators() -> Typed:
    """Of plugin nodes, and of the nodes that they stand for: which tensors are activations."""
    ops = (*ATTENTION_OPS, *EXPERTS_OPS)
    activations = {name for op in ops for name, kind in (*op.inputs.items(), *op.outputs.items()) if kind is Kind.DATA}
    found = {op.name: (op.inputs, op.outputs) for op in ops}
    whole = {ATTENTION: (ATTENTION_INPUTS, ATTENTION_OUTPUTS), EXPERTS: (EXPERTS_INPUTS, EXPERTS_OUTPUTS)}
    return {
        name: ([n in activations for n in inputs], [n in activations for n in outputs])
        for name, (inputs, outputs) in {**found, **whole}.items()
    }


class _Writer:
    """Writes nodes in the place of a decoder's own, and collects the constants that they need."""

    def __init__(self, model: ModelProto, config: ModelConfig, data: str, plugins: Plugins) -> None:
        self.config, self.data, self.plugins = config, data, plugins
        self.constants: dict[str, TensorProto] = {}
        self.shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        for value in model.graph.input:
            self.shapes[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        self.replaced = 0

    def replace(self, node: NodeProto) -> list[NodeProto]:
        """The nodes in `node`'s place; itself where it calls no mechanism."""
        if node.domain != DOMAIN:
            return [node]
        self.replaced += 1
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        attributes = {n: v.decode() if isinstance(v, bytes) else v for n, v in given.items()}
        return (self._attention if node.op_type == ATTENTION else self._experts)(node, attributes)

    def _attention(self, node: NodeProto, attributes: dict[str, Attribute]) -> list[NodeProto]:
        if self.plugins is Plugins.LIBRARY:
            return self._library_node(node, ATTENTION_INPUTS)
        tensors = dict(zip(ATTENTION_INPUTS, node.input, strict=True))
        tensors |= {name: f"{node.name}.{name}" for name in ATTENTION_SPLIT.outputs}
        tensors |= dict(zip(ATTENTION_FINISH.outputs, node.output, strict=True))
        attributes["groups"] = len(self.config.groups)
        return self._calls(node.name, (ATTENTION_SPLIT, ATTENTION_FINISH), tensors, attributes)

    def _library_node(self, node: NodeProto, inputs: Sequence[str]) -> list[NodeProto]:
        """The node as it is, its activations cast. TensorRT finds the plugin by the node's type and domain."""
        made = NodeProto.FromString(node.SerializeToString())
        before = []
        for i, name in enumerate(inputs):
            if LIBRARY_KINDS[name] is Kind.DATA:
                made.input[i] = f"{node.name}.{name}.{self.data}"
                before.append(_cast(node.input[i], made.input[i], ELEMENTS[self.data]))
        made.output[0] = f"{node.name}.output.{self.data}"
        return [*before, made, _cast(made.output[0], node.output[0], TensorProto.FLOAT)]

    def _experts(self, node: NodeProto, attributes: dict[str, Attribute]) -> list[NodeProto]:
        tensors = dict(zip(EXPERTS_INPUTS, node.input, strict=True))
        width, columns = (self._last(node, tensors[name]) for name in ("a", "b"))
        start = f"{EXPERTS_EXPAND.name}.column_start.{columns}"
        self.constants[start] = numpy_helper.from_array(np.array([0, columns], np.int32), start)
        if self.plugins is Plugins.LIBRARY:
            node.op_type = LIBRARY_EXPERTS
            node.input.append(start)
            node.attribute.append(helper.make_attribute("columns", str(columns)))
            return self._library_node(node, LIBRARY_INPUTS)
        tensors |= {"partial": f"{node.name}.partial", "column_start": start}
        tensors |= dict(zip(EXPERTS_EXPAND.outputs, node.output, strict=True))
        mose = self.config.mose
        attributes |= {
            "columns": str(columns), "width": width, "groups": len(self.config.groups), "experts": mose.experts,
            "rank": mose.rank, "share_a": int(mose.share_a),
        }  # fmt: skip
        return self._calls(node.name, (EXPERTS_SHRINK, EXPERTS_EXPAND), tensors, attributes)

    def _last(self, node: NodeProto, name: str) -> int:
        """The last axis of a head."""
        shape = self.shapes.get(name, ())
        if not shape or not shape[-1]:
            raise EngineError(
                f"{node.name}: {name} is neither an input nor a constant of known width, which its kernel has as a constant"
            )
        return int(shape[-1])

    def _calls(
        self, name: str, ops: Sequence[PluginOp], tensors: dict[str, str], attributes: Mapping[str, Attribute]
    ) -> list[NodeProto]:
        """One node for each op, and the casts around them; `tensors`: the graph's names of the ops' tensors."""
        kinds = {n: kind for op in ops for n, kind in (*op.inputs.items(), *op.outputs.items())}
        before, after, names = [], [], dict(tensors)
        for tensor in (n for n, kind in kinds.items() if kind is Kind.DATA and self.data != "fp32"):
            names[tensor] = f"{name}.{tensor}.{self.data}"
            if any(tensor in op.outputs for op in ops):
                after.append(_cast(names[tensor], tensors[tensor], TensorProto.FLOAT))
            else:
                before.append(_cast(tensors[tensor], names[tensor], ELEMENTS[self.data]))
        calls = []
        for op in ops:
            given: dict[str, Any] = {n: attributes[n] for n in op.attributes} | BINDING  # Any: of several types
            inputs, outputs = [names[n] for n in op.inputs], [names[n] for n in op.outputs]
            calls.append(helper.make_node(op.name, inputs, outputs, name=f"{name}.{op.name}", domain=DOMAIN, **given))
        return [*before, *calls, *after]


def _cast(source: str, target: str, kind: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=kind)
