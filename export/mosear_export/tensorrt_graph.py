"""A part's graph as TensorRT takes it: mechanisms that it fuses, products in 16 bits, weights in the recipe's type."""

import copy
import re
from collections.abc import Collection, Mapping

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, TensorProto, helper, inliner, numpy_helper

from mosear.config import ModelConfig
from mosear.contract import Part, Tensors
from mosear.recipe import Heads, Precision, Recipe
from mosear_export import fuse, pack
from mosear_export.masked import attend_masked
from mosear_export.narrow import Quantise, Typed, Weight, narrow
from mosear_export.plugin_flavour import plugin_flavour, typed_operators

BLOCK = 128  # int4 weights of a column that share a scale
KEPT = {"own_group"}  # constants of a product that are no weights
LAYER = re.compile(r"(?:\blayers\.|^(?:key|value)_)(\d+)")
HEAD_MATRICES = (".down", ".up", ".a", ".gate", ".b")


def prepare_decoder(
    model: ModelProto, config: ModelConfig, recipe: Recipe, heads: Tensors, part: Part, *, emulate: bool = False
) -> tuple[ModelProto, Tensors]:
    """The decoder's graph, and what its head inputs take (matrices in the recipe's 16 bits; none where they are baked)."""
    fuse.merge_linears(model)
    heads = pack.pack(model, config, heads)
    fuse.split_heads(model, config.backbone.head_size)
    heads = attend_masked(model, config, heads)
    model = inlined(model)
    return _narrowed(model, recipe, heads, part, emulate=emulate, quantise=quantiser(recipe))


def prepare_plugin_decoder(
    model: ModelProto, config: ModelConfig, recipe: Recipe, heads: Tensors, part: Part, *, emulate: bool = False
) -> tuple[ModelProto, Tensors]:
    """The decoder with its mechanisms as plugin nodes, which take and give 16 bits; heads as the contract has them.

    emulate: the mechanisms stay functions, between roundings, so that any runtime can run it.
    """
    if not emulate:
        model = plugin_flavour(model, config)
    _share_constants(model)
    return _narrowed(model, recipe, heads, part, emulate=emulate, typed=typed_operators())


def _narrowed(
    model: ModelProto, recipe: Recipe, heads: Tensors, part: Part, *, emulate: bool, quantise: Quantise | None = None,
    typed: Typed | None = None,
) -> tuple[ModelProto, Tensors]:  # fmt: skip
    """The graph without what nothing reads, in 16 bits, nodes named by layer; and the heads that it still takes."""
    used = _drop_dead(model)
    heads = {name: value for name, value in heads.items() if name in used}
    if recipe.heads is Heads.BAKED:
        model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in heads.items())
        used -= heads.keys()
        heads = {}
    stored = {name for pair in part.state for name in pair} | {name for name in heads if name.endswith(HEAD_MATRICES)}
    _keep_inputs(model, used)
    narrow(model, kind(recipe), stored=stored, quantise=quantise, typed=typed, emulate=emulate)
    name_by_layer(model)
    return model, heads


def prepare_part(model: ModelProto, recipe: Recipe, *, emulate: bool = False) -> ModelProto:
    """Any other part's graph."""
    model = inlined(model)
    _widen_bytes(model)
    narrow(model, kind(recipe), emulate=emulate)
    return model


def _widen_bytes(model: ModelProto) -> None:
    """Pictures become fp32 first of all: TensorRT takes bytes as an input, and can do nothing with them but a cast."""
    wide = {
        value.name: f"{value.name}.wide"
        for value in model.graph.input
        if value.type.tensor_type.elem_type == TensorProto.UINT8
    }
    nodes = [
        helper.make_node("Cast", [name], [made], name=f"cast_{name}", to=TensorProto.FLOAT)
        for name, made in wide.items()
    ]
    for node in model.graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = wide.get(name, name)
        nodes.append(node)
    fuse.replace_nodes(model, nodes)


def kind(recipe: Recipe) -> str:
    """The 16 bits of a recipe's products."""
    return "bf16" if recipe.precision is Precision.BF16 else "fp16"


def quantiser(recipe: Recipe) -> Quantise | None:
    """How a recipe stores the weights of linear layers where that is below 16 bits."""
    if recipe.precision in (Precision.FP16, Precision.BF16):
        return None

    def quantise(name: str, value: NDArray[np.float32], target: str) -> Weight | None:
        if name in KEPT or value.ndim != 2:
            return None
        if recipe.precision is Precision.FP8:
            return fp8(name, value, target)
        blocks = recipe.precision is Precision.INT4 and value.shape[0] % BLOCK == 0
        return integers(name, value, target, bits=4 if blocks else 8, block=BLOCK if blocks else 0)

    return quantise


def integers(name: str, value: NDArray[np.float32], target: str, *, bits: int, block: int) -> Weight:
    """A matrix [d_in, d_out] in symmetric integers with an fp16 scale for each column, or each block of a column's rows."""
    rows, columns = value.shape
    size = block or rows
    blocks = value.reshape(rows // size, size, columns)
    most = 2 ** (bits - 1) - 1
    scale = (np.abs(blocks).max(1, keepdims=True) / most).astype(np.float16)  # [rows / size, 1, columns]
    scale = np.maximum(scale, np.finfo(np.float16).smallest_normal)
    found = np.clip(np.rint(blocks / scale.astype(np.float32)), -most, most)
    made = (found * scale.astype(np.float32)).reshape(rows, columns).astype(np.float32)
    whole = found.reshape(rows, columns).astype(np.int8)
    stored = whole if bits == 8 else whole.astype(ml_dtypes.int4)
    attributes = {"axis": 0, "block_size": block} if block else {"axis": 1}
    return _weight(name, numpy_helper.from_array(stored, f"{name}.int{bits}"), scale[:, 0] if block else scale[0, 0],
                   target, made, attributes)  # fmt: skip


def fp8(name: str, value: NDArray[np.float32], target: str) -> Weight:
    """A matrix in fp8 E4M3 (largest number 448) with one fp16 scale."""
    scale = np.float16(np.abs(value).max() / 448)
    stored = (value / np.float32(scale)).astype(ml_dtypes.float8_e4m3fn)
    made = stored.astype(np.float32) * np.float32(scale)
    return _weight(name, numpy_helper.from_array(stored, f"{name}.fp8"), np.asarray(scale), target, made, {})


def _weight(
    name: str, stored: TensorProto, scale: NDArray[np.float16], target: str, value: NDArray[np.float32],
    attributes: Mapping[str, int],
) -> Weight:  # fmt: skip
    scales = numpy_helper.from_array(np.ascontiguousarray(scale), f"{name}.scale")
    node = helper.make_node("DequantizeLinear", [stored.name, scales.name], [target], name=f"dequantise_{name}")
    node.attribute.extend(helper.make_attribute(key, number) for key, number in attributes.items())
    return Weight(tensors=(stored, scales), node=node, value=value)


def fix_axis(model: ModelProto, axis: str, size: int) -> None:
    """Give a dynamic axis of the graph's inputs and outputs one size."""
    for value in (*model.graph.input, *model.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == axis:
                dimension.Clear()
                dimension.dim_value = size


def shapes(model: ModelProto) -> dict[str, tuple[int | str, ...]]:
    """Axes of each graph input: sizes, or names of dynamic ones."""
    return {
        value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in model.graph.input
    }


def stored_head(value: NDArray[np.generic], name: str, recipe: Recipe) -> NDArray[np.generic]:
    """A head as the plan's input takes it."""
    if not name.endswith(HEAD_MATRICES):
        return value
    return value.astype(np.float16 if kind(recipe) == "fp16" else ml_dtypes.bfloat16)


def inlined(model: ModelProto) -> ModelProto:
    """The model with its functions in place, each constant once."""
    weights = list(model.graph.initializer)
    del model.graph.initializer[:]  # the inliner would copy them
    inlined: ModelProto = inliner.inline_local_functions(model)
    inlined.graph.initializer.extend(weights)
    del inlined.graph.value_info[:]  # types that will not be right
    _share_constants(inlined)
    return inlined


def _share_constants(model: ModelProto) -> None:
    known: dict[tuple[str, tuple[int, ...], bytes], str] = {}
    renamed: dict[str, str] = {}
    nodes = []
    for node in model.graph.node:
        if node.op_type != "Constant":
            for at, name in enumerate(node.input):
                node.input[at] = renamed.get(name, name)
            nodes.append(copy.deepcopy(node))
            continue
        value = _constant(node.attribute[0])
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in known:
            known[key] = f"constant_{len(known)}"
            model.graph.initializer.append(numpy_helper.from_array(value, known[key]))
        renamed[node.output[0]] = known[key]
    fuse.replace_nodes(model, nodes)


def _constant(attribute: AttributeProto) -> NDArray[np.generic]:
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return numpy_helper.to_array(value)
    return np.asarray(value, np.float32 if "float" in attribute.name else np.int64)


def _drop_dead(model: ModelProto) -> set[str]:
    """Drop nodes that no output needs; returns the names that some node reads."""
    used = {value.name for value in model.graph.output}
    live = []
    for node in reversed(model.graph.node):
        if used.intersection(node.output):
            used.update(node.input)
            live.append(node)
    fuse.replace_nodes(model, live[::-1])
    return used


def name_by_layer(model: ModelProto) -> None:
    """Name nodes `layers.<n>/<output>`, so that a plan's kernels can be told apart: nodes stand in the order of layers."""
    layer = "call"
    for node in model.graph.node:
        found = [match[1] for name in node.input if (match := LAYER.search(name))]
        layer = f"layers.{found[-1]}" if found else layer
        node.name = f"{layer}/{node.output[0]}"


def drop_outputs(model: ModelProto, names: Collection[str]) -> None:
    """Leave out graph outputs, the nodes that serve them alone, and the inputs that these alone read."""
    kept = [value for value in model.graph.output if value.name not in names]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    _keep_inputs(model, _drop_dead(model))


def _keep_inputs(model: ModelProto, used: set[str]) -> None:
    """Leave out graph inputs that nothing reads: TensorRT would take no binding of them."""
    kept = [value for value in model.graph.input if value.name in used]
    del model.graph.input[:]
    model.graph.input.extend(kept)
