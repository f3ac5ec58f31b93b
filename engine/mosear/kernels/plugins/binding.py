"""Plugins made known to TensorRT 11 (`tensorrt.plugin`: register, autotune, aot_impl), from their definitions as data.

Attributes are not kept in a plan: they are constants of the PTX that it holds. Nothing of this is needed to run a plan.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import GenericAlias
from typing import Any

from mosear.errors import KernelError
from mosear.kernels.launch import Kind
from mosear.kernels.plugins.op import Arithmetic, Attribute, PluginOp, Range, Ranges, Site, Size, Sizes
from mosear.kernels.plugins.ptx import SHARED_WITHOUT_OPT_IN, Embedded, fitting

NAMESPACE, VERSION = "mosear", "1"
TYPE_NAMES = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16"}
ANY_SIZE = 64  # stands for every dimension while only types are asked for
Desc = Any  # tensorrt.plugin.TensorDesc: the bindings have no types


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What the plugins are built for. `multiprocessors`: 0 takes the card that stands for the architecture."""

    arch: int
    multiprocessors: int = 0
    shared_limit: int = SHARED_WITHOUT_OPT_IN


class Symbols(Arithmetic):
    """Operations on sizes of which some are symbols (which lack the operators with a number on the left)."""

    def __init__(self, trtp: Any) -> None:
        self.trtp = trtp

    def times(self, a: Size, b: Size) -> Size:
        return b * a if isinstance(a, int) else a * b

    def cdiv(self, a: Size, b: Size) -> Size:
        return super().cdiv(a, b) if _numbers(a, b) else self.trtp.cdiv(a, b)

    def most(self, a: Size, b: Size) -> Size:
        return super().most(a, b) if _numbers(a, b) else self.trtp.max(a, b)

    def least(self, a: Size, b: Size) -> Size:
        return super().least(a, b) if _numbers(a, b) else self.trtp.min(a, b)


def _numbers(*sizes: Size) -> bool:
    return all(isinstance(size, int) for size in sizes)


class Binding:
    """The three functions of one plugin."""

    def __init__(self, op: PluginOp, device: Device, trt: Any, trtp: Any) -> None:
        self.op, self.device, self.trt, self.trtp = op, device, trt, trtp
        self.arithmetic = Symbols(trtp)
        self.types = {trt.float32: "fp32", trt.float16: "fp16", trt.bfloat16: "bf16"}
        self.known: dict[int, Embedded] = {}  # every tactic that was ever listed, by its number

    def describe(self, *descs: Desc, **attributes: Attribute) -> tuple[Desc, ...]:
        """The outputs' descriptors; of their shapes only while shapes are asked for."""
        site, sizes = self.site(descs, attributes), self.sizes(descs)
        data = self._first_data(descs).dtype
        kinds = {Kind.DATA: data, Kind.F32: self.trt.float32, Kind.I32: self.trt.int32}
        shapes = self.op.shapes(sizes, site, self.arithmetic)
        return tuple(
            self.trtp.from_shape_expr(shape, kinds[kind])
            for shape, kind in zip(shapes, self.op.outputs.values(), strict=True)
        )

    def autotune(self, *arguments: Any) -> list[Any]:
        """One combination: the network's types, linear formats, and the tactics that serve this profile."""
        descs, attributes = self._split(arguments[:-1])
        site = self.site(descs, attributes)
        made = fitting(self.op, site, self.ranges(descs), limit=self.device.shared_limit)
        self.known |= {each.number: each for each in made}
        names = {Kind.DATA: TYPE_NAMES[site.data], Kind.F32: "FP32", Kind.I32: "INT32"}
        types = ", ".join(names[kind] for kind in (*self.op.inputs.values(), *self.op.outputs.values()))
        return [self.trtp.AutoTuneCombination(types, "LINEAR", [each.number for each in made])]

    def implement(self, *arguments: Any) -> tuple[str, str, Any, Any]:
        """Kernel name, PTX, launch and scalars of a tactic that `autotune` listed."""
        descs, _ = self._split(arguments[:-2])
        number = arguments[-1]
        if number not in self.known:
            raise KernelError(f"{self.op.name} has no tactic {number}: `autotune` listed {sorted(self.known)}")
        made = self.known[number]
        geometry = made.tactic.at(self.sizes(descs), self.arithmetic)
        launch = self.trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = geometry.grid
        launch.block_x, launch.shared_mem = made.threads, made.shared_bytes
        extras = self.trtp.SymIntExprs(len(geometry.scalars))
        for i, scalar in enumerate(geometry.scalars):
            extras[i] = self.trtp.SymInt32(scalar)
        return made.symbol, made.ptx, launch, extras

    def site(self, descs: Sequence[Desc], attributes: Mapping[str, Attribute]) -> Site:
        """Raises KernelError for a type of the activations that no kernel serves."""
        found = self._first_data(descs).dtype
        if found not in self.types:
            raise KernelError(f"{self.op.name} has activations of {found}: kernels serve {', '.join(TYPE_NAMES)}")
        return Site(
            arch=self.device.arch, data=self.types[found], attributes=attributes,
            multiprocessors=self.device.multiprocessors,
        )  # fmt: skip

    def sizes(self, descs: Sequence[Desc]) -> Sizes:
        """Numbers where dimensions are known, else symbols."""
        return {
            name: tuple(map(_size, desc.shape_expr)) for name, desc in zip(self.op.inputs, descs, strict=True)
        }  # fmt: skip

    def ranges(self, descs: Sequence[Desc]) -> Ranges:
        """Dimensions within the profile that is being built."""
        return Ranges(
            inputs={name: _range(desc.shape) for name, desc in zip(self.op.inputs, descs, strict=True)}
        )  # fmt: skip

    def _first_data(self, descs: Sequence[Desc]) -> Desc:
        return next(d for d, kind in zip(descs, self.op.inputs.values()) if kind is Kind.DATA)

    def _split(self, arguments: Sequence[Any]) -> tuple[Sequence[Desc], dict[str, Attribute]]:
        inputs = len(self.op.inputs)
        return arguments[:inputs], dict(zip(self.op.attributes, arguments[inputs:], strict=True))


def _size(dimension: Any) -> Size:
    if dimension.is_fake:
        return ANY_SIZE
    return int(dimension.constant_value()) if dimension.is_constant else dimension


def _range(shape: Any) -> tuple[Range, ...]:
    least, most = (shape.min, shape.max) if shape.is_dynamic else (tuple(shape), tuple(shape))
    return tuple(Range(least=int(a), most=int(b)) for a, b in zip(least, most, strict=True))


def define(ops: Sequence[PluginOp], device: Device, *, lazy: bool = False) -> list[Binding]:
    """Register plugins for networks that are built from now on, once in a process.

    `lazy`: without a plugin registry, where the library is not there. Raises KernelError where TensorRT's Python package
    is missing or a plugin of the name is there already.
    """
    try:
        trt, trtp = importlib.import_module("tensorrt"), importlib.import_module("tensorrt.plugin")
    except ImportError as error:
        raise KernelError(f"TensorRT's Python package cannot be loaded ({error}): install tensorrt 11") from error
    bindings = []
    for op in ops:
        binding, name = Binding(op, device, trt, trtp), f"{NAMESPACE}::{op.name}"
        inputs = dict.fromkeys(op.inputs, trtp.TensorDesc)
        outputs = {"outputs": GenericAlias(tuple, (trtp.TensorDesc,))}
        returned = GenericAlias(tuple, (trtp.TensorDesc,) * len(op.outputs))
        built = GenericAlias(tuple, (str, str, trtp.KernelLaunchParams, trtp.SymExprs))
        listed = GenericAlias(list, (trtp.AutoTuneCombination,))
        known = {**inputs, **op.attributes}
        try:
            trtp.register(name, lazy_register=lazy)(_signed(binding.describe, known, returned))
        except ValueError as error:
            raise KernelError(f"plugin {name} cannot be registered: {error}") from error
        trtp.autotune(name)(_signed(binding.autotune, {**known, **outputs}, listed))
        trtp.aot_impl(name)(_signed(binding.implement, {**known, **outputs, "tactic": int}, built))
        bindings.append(binding)
    return bindings


def _signed(call: Callable[..., Any], parameters: Mapping[str, Any], returned: Any) -> Callable[..., Any]:
    """`call` with the signature that TensorRT reads."""

    def function(*arguments: Any, **named: Any) -> Any:
        return call(*arguments, **named)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    listed = [inspect.Parameter(name, kind, annotation=value) for name, value in parameters.items()]
    function.__signature__ = inspect.Signature(listed, return_annotation=returned)  # type: ignore[attr-defined]
    return function
