"""Fusions of a decoder's graph that ONNX Runtime does not make on its own: fewer calls for each token, the same numbers."""

from collections import defaultdict

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"


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


def split_heads(model: ModelProto, head_size: int) -> None:
    """A Split into q, k and v, each reshaped to heads and transposed, becomes one reshape, one transpose, one Split."""
    graph = model.graph
    users: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            users[name].append(node)
    gone, instead = set(), {}
    for split in [node for node in graph.node if node.op_type == "Split"]:
        views = [user for output in split.output for user in users[output]]
        if {view.op_type for view in views} != {"Reshape"} or len(views) != len(split.output):
            continue
        turns = [user for view in views for user in users[view.output[0]]]
        same = len({view.input[1] for view in views}) == 1 and {turn.op_type for turn in turns} == {"Transpose"}
        if not same or len(turns) != len(views):
            continue
        gone |= {node.output[0] for node in (*views, *turns)}
        instead[split.output[0]] = _heads_first(model, split, views[0], turns, head_size)
    result: list[NodeProto] = []
    for node in graph.node:
        result += instead.get(node.output[0], [] if node.output[0] in gone else [node])
    replace_nodes(model, result)


def _heads_first(
    model: ModelProto, split: NodeProto, view: NodeProto, turns: list[NodeProto], head_size: int
) -> list[NodeProto]:
    """The nodes in the place of `split`."""
    columns = next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == split.input[1])
    name = split.name
    model.graph.initializer.append(numpy_helper.from_array(columns // head_size, f"{name}_heads"))
    by_head, turned = f"{name}_by_head", f"{name}_turned"
    first = helper.make_node("Reshape", [split.input[0], view.input[1]], [by_head], name=f"{name}_view")
    first.attribute.extend(view.attribute)
    second = helper.make_node("Transpose", [by_head], [turned], name=f"{name}_transpose")
    second.attribute.extend(turns[0].attribute)
    outputs = [turn.output[0] for turn in turns]
    return [
        first,
        second,
        helper.make_node("Split", [turned, f"{name}_heads"], outputs, name=f"{name}_by_heads", axis=1),
    ]


def replace_nodes(model: ModelProto, nodes: list[NodeProto]) -> None:
    """Put `nodes`, some of which may be the graph's own, in the place of all that a graph has."""
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
