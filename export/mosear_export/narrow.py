"""Products in 16 bits: what TensorRT's tensor cores do in fp16 or bf16, and all else in fp32.

Linear layers, convolutions, fused attention and the cache are in 16 bits; what lies between them (norms, residual sums,
gates, masses, rotary embedding, pooling) is in fp32 with casts at its borders, which TensorRT fuses into the kernels that
it makes there anyway. So a residual sum cannot overflow in fp16, and the plan holds each weight in 16 bits.

`emulate` gives the same arithmetic to a runtime without 16-bit products (ONNX Runtime on a CPU): operands and results are
rounded to 16 bits, the products themselves are in fp32, as tensor cores sum.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from mosear_export.fuse import replace_nodes

# Inputs of an operator that are numbers of its product.
OPERANDS = {"MatMul": 2, "Gemm": 3, "Conv": 3, "Attention": 4, "TensorScatter": 2, "Gather": 1}
SIXTEEN = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
NUMPY = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
BOOLEAN = {"And", "Or", "Not", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"}
VIEWS = {"Unsqueeze", "Squeeze", "Reshape", "Expand", "Transpose", "Identity", "Split", "Slice"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A weight narrower than 16 bits: its tensors, the node that makes 16 bits of them, and the numbers that come out."""

    tensors: tuple[TensorProto, ...]
    node: NodeProto
    value: NDArray[np.float32]


# Of a custom operator, by its type: which inputs and which outputs are numbers of a product.
Typed = Mapping[str, tuple[Sequence[bool], Sequence[bool]]]
# From a weight's name, numbers and the name of its form in 16 bits; None leaves it in 16 bits.
Quantise = Callable[[str, NDArray[np.float32], str], Weight | None]


class Narrow:
    """One model's change to 16 bits."""

    def __init__(
        self,
        model: ModelProto,
        kind: str,
        *,
        stored: Collection[str],
        quantise: Quantise | None,
        typed: Typed,
        emulate: bool,
    ) -> None:
        self.model, self.kind, self.stored, self.quantise, self.typed = model, kind, set(stored), quantise, typed
        self.emulate = emulate
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.inputs = {value.name for value in model.graph.input}
        self.producer = {output: node for node in model.graph.node for output in node.output}
        self.made: dict[str, str] = {}  # a tensor, and its form in 16 bits
        self.wide = self.inputs - self.stored  # tensors that exist in fp32
        self.nodes: list[NodeProto] = []

    def run(self) -> None:
        for value in [] if self.emulate else [*self.model.graph.input, *self.model.graph.output]:
            if value.name in self.stored:
                value.type.tensor_type.elem_type = SIXTEEN[self.kind]
        self.made |= {value.name: value.name for value in self.model.graph.input if value.name in self.stored}
        for node in self.model.graph.node:
            if node.domain and node.op_type in self.typed:
                self.custom(node)
            elif self.is_product(node):
                self.product(node)
            elif node.op_type == "Shape" and node.input[0] not in self.weights:
                self.size(node)
            elif node.op_type in VIEWS and node.input[0] in self.made and node.input[0] not in self.weights:
                self.view(node)
            else:
                self.other(node)
        for value in self.model.graph.output:
            if value.name not in self.stored:
                self.widen(value.name)
        replace_nodes(self.model, self.nodes)
        used = {name for node in self.model.graph.node for name in node.input}
        kept = [tensor for tensor in self.model.graph.initializer if tensor.name in used]
        del self.model.graph.initializer[:]
        self.model.graph.initializer.extend(kept)

    def is_product(self, node: NodeProto) -> bool:
        """A linear layer has a constant matrix, or a head; other matrix products sum over rows, and stay in fp32."""
        if node.domain or node.op_type not in OPERANDS:
            return False
        if node.op_type == "Gather":  # an embedding's table
            return node.input[0] in self.weights and self.weights[node.input[0]].data_type == TensorProto.FLOAT
        return node.op_type != "MatMul" or node.input[1] in self.weights or node.input[1] in self.inputs

    def product(self, node: NodeProto) -> None:
        for at, name in enumerate(node.input[: OPERANDS[node.op_type]]):
            if name and not self.is_boolean(name):
                node.input[at] = self.narrow(name)
        name = node.output[0]
        self.give(node)
        if self.emulate:
            node.output[0] = f"{name}.exact"
            self.nodes += self.round(node.output[0], self.made[name])

    def custom(self, node: NodeProto) -> None:
        """Each tensor as the operator's kernels take it or give it."""
        inputs, outputs = self.typed[node.op_type]
        for at, (name, narrow) in enumerate(zip(node.input, inputs, strict=True)):
            node.input[at] = self.narrow(name) if narrow else self.widen(name)
        self.nodes.append(node)
        for at, (name, narrow) in enumerate(zip(list(node.output), outputs, strict=True)):
            if not narrow:
                self.wide.add(name)
                continue
            self.made[name] = f"{name}.{self.kind}"
            node.output[at] = self.made[name]
            if self.emulate:
                node.output[at] = f"{name}.exact"
                self.nodes += self.round(node.output[at], self.made[name])

    def size(self, node: NodeProto) -> None:
        """The shape of a tensor is the same in any type."""
        node.input[0] = self.made.get(node.input[0], node.input[0])
        self.wide.update(node.output)
        self.nodes.append(node)

    def view(self, node: NodeProto) -> None:
        """What moves numbers and computes nothing moves them in 16 bits."""
        node.input[0] = self.made[node.input[0]]
        self.give(node)

    def other(self, node: NodeProto) -> None:
        for at, name in enumerate(node.input):
            node.input[at] = self.widen(name)
        self.wide.update(node.output)
        self.nodes.append(node)

    def give(self, node: NodeProto) -> None:
        """Outputs in 16 bits alone, until somebody wants them in fp32."""
        for at, name in enumerate(node.output):
            self.made[name] = name if name in self.stored else f"{name}.{self.kind}"
            node.output[at] = self.made[name]
        self.nodes.append(node)

    def round(self, source: str, target: str) -> list[NodeProto]:
        """Nodes from fp32 to 16 bits, where products are emulated and back."""
        if not self.emulate:
            return [self.cast(source, target, SIXTEEN[self.kind])]
        rounded = f"{target}.rounded"
        return [self.cast(source, rounded, SIXTEEN[self.kind]), self.cast(rounded, target, TensorProto.FLOAT)]

    def widen(self, name: str) -> str:
        """The name of a tensor's form in fp32."""
        narrow = self.made.get(name)
        if narrow is None or name in self.weights or name in self.wide:
            return name
        wide = name if narrow != name else f"{name}.fp32"
        if wide not in self.wide:
            self.nodes.append(self.cast(narrow, wide, TensorProto.FLOAT))
            self.wide.add(wide)
        return wide

    def narrow(self, name: str) -> str:
        """The name of a tensor's form in 16 bits, made where it is needed first."""
        if name not in self.made:
            self.made[name] = f"{name}.{self.kind}"
            if name in self.weights:
                self.narrow_weight(name)
            else:
                self.nodes += self.round(name, self.made[name])
        return self.made[name]

    def narrow_weight(self, name: str) -> None:
        target, value = self.made[name], numpy_helper.to_array(self.weights[name])
        found = self.quantise(name, value, target) if self.quantise else None
        if found and not self.emulate:
            self.nodes.append(found.node)
            self.model.graph.initializer.extend(found.tensors)
            return
        rounded = (found.value if found else value).astype(NUMPY[self.kind])
        tensor = numpy_helper.from_array(rounded.astype(np.float32), target) if self.emulate else None
        self.model.graph.initializer.append(tensor or sixteen(rounded, target, self.kind))

    def cast(self, source: str, target: str, to: int) -> NodeProto:
        return helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=to)

    def is_boolean(self, name: str) -> bool:
        node = self.producer.get(name)
        if node is None:
            return False
        if node.op_type in VIEWS:
            return self.is_boolean(node.input[0])
        to = next((attribute.i for attribute in node.attribute if attribute.name == "to"), 0)
        return node.op_type in BOOLEAN or (node.op_type == "Cast" and to == TensorProto.BOOL)


def sixteen(value: NDArray[np.generic], name: str, kind: str) -> TensorProto:
    """A tensor of 16-bit numbers."""
    return helper.make_tensor(name, SIXTEEN[kind], value.shape, value.tobytes(), raw=True)


def narrow(
    model: ModelProto,
    kind: str,
    *,
    stored: Collection[str] = (),
    quantise: Quantise | None = None,
    typed: Typed | None = None,
    emulate: bool = False,
) -> None:
    """Change a model without functions in place. kind: fp16 or bf16; stored: graph inputs and outputs in 16 bits.

    typed: custom operators that the model calls. emulate: all tensors stay in fp32, with the roundings that 16 bits bring.
    """
    Narrow(model, kind, stored=stored, quantise=quantise, typed=typed or {}, emulate=emulate).run()
