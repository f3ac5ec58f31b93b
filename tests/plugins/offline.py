"""Drives our plugins as TensorRT's builder would, through its own Python, and prints what came of it as JSON.

What the library would pass is stood in for: dimensions that are evaluated later (`Dim`, `Builder` for IDimensionExpr and
IExprBuilder), the lists that hold them, and what receives launch parameters. All else is TensorRT's code and ours.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import tensorrt as trt
import tensorrt.plugin as trtp
from plugin_cases import BOUND, NodeCase, worth
from tensorrt_bindings.plugin import _lib, _tensor
from tensorrt_bindings.plugin._plugin_class import _TemplateAOTPlugin

from mosear.errors import MosearError
from mosear.kernels.launch import Kind
from mosear.kernels.modality_experts import plugin as experts
from mosear.kernels.plugins.binding import Device, define
from mosear.kernels.reallocated_attention import plugin as attention

OPERATIONS: dict[Any, Callable[[int, int], int]] = {
    trt.DimensionOperation.SUM: lambda a, b: a + b,
    trt.DimensionOperation.SUB: lambda a, b: a - b,
    trt.DimensionOperation.PROD: lambda a, b: a * b,
    trt.DimensionOperation.FLOOR_DIV: lambda a, b: a // b,
    trt.DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
    trt.DimensionOperation.MAX: max,
    trt.DimensionOperation.MIN: min,
}


class Dim:
    """A dimension: a number (`constant`), or what it is worth once the letters are known."""

    def __init__(self, value: Callable[[Mapping[str, int]], int], constant: int | None = None) -> None:
        self.value, self.constant = value, constant

    def is_constant(self) -> bool:
        return self.constant is not None

    def get_constant_value(self) -> int | None:
        return self.constant


class Builder:
    def constant(self, number: int) -> Dim:
        return Dim(lambda letters: number, number)

    def operation(self, kind: Any, a: Dim, b: Dim) -> Dim:
        run = OPERATIONS[kind]
        known = run(a.constant, b.constant) if a.constant is not None and b.constant is not None else None
        return Dim(lambda letters: run(a.value(letters), b.value(letters)), known)


class Setter(SimpleNamespace):
    """Takes the scalars' expressions by index."""

    def __setitem__(self, index: int, expression: Any) -> None:
        setattr(self, f"at_{index}", expression)


def axis(letter: int | str) -> Dim:
    return Builder().constant(letter) if isinstance(letter, int) else Dim(lambda letters: worth(letter, letters))


def described(axes: tuple[Any, ...], kind: Any, profile: Mapping[str, tuple[int, int]]) -> Any:
    """A DynamicPluginTensorDesc: -1 where a dimension varies, and the profile's ends."""
    found = trt.DynamicPluginTensorDesc()
    ends = [[worth(a, {k: v[end] for k, v in profile.items()}) for a in axes] for end in (0, 1)]
    found.desc.type, found.desc.format = kind, trt.TensorFormat.LINEAR
    found.desc.dims = trt.Dims([a if isinstance(a, int) else -1 for a in axes])
    found.min, found.max, found.opt = (trt.Dims(e) for e in (ends[0], ends[1], ends[1]))
    return found


def drive(case: NodeCase, data: Any) -> dict[str, Any]:
    """One node through one build: types, shapes, formats, tactics, launches, kernels."""
    definition = _lib.QDP_REGISTRY[f"mosear::{case.op.name}"]
    node = _TemplateAOTPlugin(case.op.name, "mosear", definition.num_outputs)
    node.init(
        definition.register_func, dict(case.attributes), definition.aot_impl_attr_names, definition.aot_impl_func,
        definition.autotune_attr_names, definition.autotune_func,
    )  # fmt: skip
    types = {Kind.DATA: data, Kind.F32: trt.float32, Kind.I32: trt.int32}
    kinds = [types[kind] for kind in case.op.inputs.values()]
    out = node.get_output_data_types(kinds, [len(case.axes[name]) for name in case.op.inputs])
    symbols = [[axis(a) for a in case.axes[name]] for name in case.op.inputs]
    shapes = node.get_output_shapes(symbols, [], Builder())
    inputs = [described(case.axes[n], kind, case.profile) for n, kind in zip(case.op.inputs, kinds)]
    # What an output is at a profile's ends nobody asks: its wildcards will do.
    wild = ["B" if d.constant is None else d.constant for shape in shapes for d in shape]
    outputs, place = [], 0
    for shape, kind in zip(shapes, out):
        outputs.append(described(tuple(wild[place : place + len(shape)]), kind, case.profile))
        place += len(shape)
    combinations = node.get_supported_format_combinations(inputs + outputs, len(inputs))
    node.configure_plugin(inputs, outputs)
    found = []
    for number in node.get_valid_tactics():
        node.set_tactic(number)
        launch, extras = SimpleNamespace(), Setter()
        node.get_launch_params(symbols, inputs + outputs, len(inputs), launch, extras, Builder())
        name, ptx = node.get_kernel([d.desc for d in inputs], [d.desc for d in outputs])
        fields = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")
        launches = [
            {
                "launch": [getattr(launch, f).expr.value(call) for f in fields],
                "scalars": [getattr(extras, f"at_{i}").expr.value(call) for i in range(extras.nbSymExprs)],
            }
            for call in case.calls
        ]
        found.append({"number": number, "name": name, "ptx": ptx.decode(), "calls": launches})
    return {
        "types": [str(t) for t in out],
        "shapes": [[[d.value(call) for d in shape] for shape in shapes] for call in case.calls],
        "formats": [[str(d.type), str(d.format)] for d in combinations],
        "tactics": found,
    }


def refused(call: Callable[[], Any]) -> str:
    """The error's kind and words."""
    try:
        call()
    except (ValueError, MosearError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def wrong_signature() -> None:
    """An implementation that forgets the attributes."""

    @trtp.aot_impl("mosear::AttentionSplit")  # type: ignore[untyped-decorator]
    def implement(query: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc], tactic: int) -> tuple[str, str, Any, Any]:
        raise AssertionError


def main(arch: int, names: Sequence[str]) -> dict[str, Any]:
    ops = (*attention.OPS, *experts.OPS)
    early = refused(lambda: define((), Device(arch=arch)))
    bindings = define(ops, Device(arch=arch), lazy=True)
    trt.IDimensionExpr, trt.DimsExprs = Dim, lambda length: [None] * length
    _tensor.SymExprImpl = lambda symbol: SimpleNamespace(expr=symbol._expr)
    registered = {
        name: {
            "inputs": found.input_tensor_names, "attributes": {k: v.__name__ for k, v in found.input_attrs.items()},
            "outputs": found.num_outputs, "aot": found.aot_impl_func is not None,
        }
        for name, found in _lib.QDP_REGISTRY.items()
    }  # fmt: skip
    cases = {name: drive(BOUND[name], trt.bfloat16) for name in names}
    some = BOUND["AttentionFinish decode D64"]
    return {
        "version": trt.__version__, "early": early, "registered": registered, "cases": cases,
        "fp16": drive(some, trt.float16), "fp32": drive(some, trt.float32),
        "refused": {
            "signature": refused(wrong_signature),
            "again": refused(lambda: define(ops[:1], Device(arch=arch), lazy=True)),
            "type": refused(lambda: drive(some, trt.int8)),
            "tactic": refused(lambda: bindings[0].implement(*[None] * 8, (), 7)),
        },
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2:])))
