"""The decoder as one graph of standard operators, and which of its products may leave 16 bits: one rule for every recipe.

A linear layer is a product with a constant matrix of the exported graph: the backbone's projections and its vocabulary
head. Experts, gates and policy parameters are inputs of that graph; norms, masses, residual sums and attention have no
constant matrix; what later steps add (which group owns an expert) is no weight. So all these stay in the wider type.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from mosear.artifacts import CONFIG, HEADS
from mosear.config import ModelConfig
from mosear.contract import DECODER, Tensors
from mosear.engine import load_heads
from mosear.recipe import LINEARS
from mosear_export import fuse, pack, tensorrt_graph

IN_A_LAYER, HEAD = LINEARS[:-1], LINEARS[-1]  # joined linears, in the order of a layer's graph


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A linear layer: its node, its weight [d_in, d_out], its layer (-1: the vocabulary head) and what it is there."""

    node: str
    weight: str
    layer: int
    kind: str

    @property
    def name(self) -> str:
        return self.kind if self.layer < 0 else f"layers.{self.layer}.{self.kind}"


def linear_weights(exported: ModelProto) -> list[str]:
    """The weights of the linear layers of an exported decoder, in the order of its graph. Ask before anything is packed."""
    matrices = {t.name for t in exported.graph.initializer if len(t.dims) == 2 and t.data_type == TensorProto.FLOAT}
    return [n.input[1] for n in exported.graph.node if n.op_type == "MatMul" and n.input[1] in matrices]


def place(index: int, count: int) -> tuple[int, str]:
    """Layer and kind of the linear layer at this index of `linear_weights`; the last of all is the vocabulary head."""
    return (-1, HEAD) if index == count - 1 else (index // len(IN_A_LAYER), IN_A_LAYER[index % len(IN_A_LAYER)])


def linears(model: ModelProto, weights: Sequence[str]) -> list[Linear]:
    """The products of these weights in a graph, in the order of the weights."""
    nodes = {node.input[1]: node.name for node in model.graph.node if node.op_type == "MatMul"}
    places = [place(i, len(weights)) for i in range(len(weights))]
    return [
        Linear(node=nodes[weight], weight=weight, layer=layer, kind=kind)
        for weight, (layer, kind) in zip(weights, places, strict=True)
    ]


def whole_graph(onnx_folder: Path) -> tuple[ModelProto, list[Linear], Tensors]:
    """The exported decoder, linears that share an input joined, functions in place, fp32; its linear layers; what its head
    inputs take."""
    config = ModelConfig.load(onnx_folder / CONFIG)
    model = onnx.load(onnx_folder / f"{DECODER}.onnx")
    fuse.merge_linears(model)
    weights = linear_weights(model)
    heads = pack.pack(model, config, load_heads(onnx_folder / HEADS))
    fuse.split_heads(model, config.backbone.head_size)
    model = tensorrt_graph.inlined(model)
    _sort(model)
    tensorrt_graph.name_by_layer(model)
    return model, linears(model, weights), heads


def _sort(model: ModelProto) -> None:
    """Put nodes behind those that they read: ONNX Runtime takes any order, ONNX's own checker does not."""
    makers = {output: node for node in model.graph.node for output in node.output if output}
    order: dict[str, NodeProto] = {}
    for last in model.graph.node:
        stack = [last]
        while stack:
            node = stack[-1]
            missing = [makers[name] for name in node.input if name in makers and makers[name].output[0] not in order]
            if missing:
                stack += missing
            else:
                order.setdefault(node.output[0], stack.pop())
    fuse.replace_nodes(model, list(order.values()))
