"""Fusions of a decoder's graph that ONNX Runtime does not make on its own: fewer calls for each token, the same numbers."""

from collections import defaultdict

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"


def fuse_decoder(model: ModelProto) -> None:
    """Apply all fusions in place."""
    merge_linears(model)
    skip_norms(model)


def merge_linears(model: ModelProto) -> None:
    """Products of one input with constant weights [d_in, d_out] become one, then a Split (q, k and v; gate and up)."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    siblings: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            siblings[node.input[0]].append(node)
    first = {nodes[0].output[0]: nodes for nodes in siblings.values() if len(nodes) > 1}
    others = {node.output[0] for nodes in first.values() for node in nodes[1:]}
    result: list[NodeProto] = []
    for node in graph.node:
        nodes = first.get(node.output[0])
        if nodes:
            result += _merged(model, nodes, [weights[n.input[1]] for n in nodes])
        elif node.output[0] not in others:
            result.append(node)
    replace_nodes(model, result)


def _merged(model: ModelProto, nodes: list[NodeProto], weights: list[TensorProto]) -> list[NodeProto]:
    arrays = [numpy_helper.to_array(weight) for weight in weights]
    name = "_".join(weight.name for weight in weights)
    for weight in weights:
        model.graph.initializer.remove(weight)
    model.graph.initializer.extend([
        numpy_helper.from_array(np.concatenate(arrays, axis=1), name),
        numpy_helper.from_array(np.array([array.shape[1] for array in arrays]), f"{name}_sizes"),
    ])  # fmt: skip
    joined, outputs = f"{name}_out", [node.output[0] for node in nodes]
    return [
        helper.make_node("MatMul", [nodes[0].input[0], name], [joined], name=f"{name}_product"),
        helper.make_node("Split", [joined, f"{name}_sizes"], outputs, name=f"{name}_split", axis=-1),
    ]


def skip_norms(model: ModelProto) -> None:
    """A residual Add and the RMSNormalization of its sum become ONNX Runtime's SkipSimplifiedLayerNormalization."""
    adds = {node.output[0]: node for node in model.graph.node if node.op_type == "Add"}
    norms = {node.input[0]: node for node in model.graph.node if node.op_type == "RMSNormalization"}
    pairs = {total: (adds[total], norms[total]) for total in adds.keys() & norms.keys()}
    gone = {norm.output[0] for _, norm in pairs.values()}
    result = []
    for node in model.graph.node:
        if node.output[0] in pairs:
            add, norm = pairs[node.output[0]]
            epsilon = next(a.f for a in norm.attribute if a.name == "epsilon")
            result.append(
                helper.make_node(
                    "SkipSimplifiedLayerNormalization", [*add.input, norm.input[1]], [norm.output[0], "", "", add.output[0]],
                    name=norm.name, domain=MICROSOFT, epsilon=epsilon,
                )
            )  # fmt: skip
        elif node.output[0] not in gone:
            result.append(node)
    replace_nodes(model, result)
    if MICROSOFT not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))


def replace_nodes(model: ModelProto, nodes: list[NodeProto]) -> None:
    """Put `nodes`, some of which may be the graph's own, in the place of all that a graph has."""
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
