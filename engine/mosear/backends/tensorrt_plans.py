"""Plans of TensorRT or TensorRT-RTX, loaded on a GPU: contexts, bindings, calls. One code for both modules."""

import importlib
import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mosear.backends.cuda_driver import Driver, Slab
from mosear.contract import Tensors
from mosear.errors import EngineError

log = logging.getLogger(__name__)

BINDINGS = 24  # kept at most, as on the CPU
# Element types by TensorRT's names; of bf16, which numpy has not, the bits.
KINDS: dict[str, np.dtype[Any]] = {
    "FLOAT": np.dtype(np.float32), "HALF": np.dtype(np.float16), "BF16": np.dtype(np.uint16), "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64), "UINT8": np.dtype(np.uint8), "INT8": np.dtype(np.int8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
Array = NDArray[Any]  # of any element type
Trt = Any  # the module tensorrt or tensorrt_rtx, and what it gives: no types


def to_plan(value: Array, kind: str) -> Array:
    """An array in a plan's element type: numbers of fp32 rounded to fp16 or bf16 (to nearest, ties to even)."""
    if kind != "BF16":
        return value.astype(KINDS[kind], copy=False)
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_plan(value: Array, kind: str) -> Array:
    """The same back: 16-bit numbers as fp32, others as they are."""
    if kind == "BF16":
        return (value.astype(np.uint32) << 16).view(np.float32)
    return value.astype(np.float32) if kind == "HALF" else value


def open_runtime(module: str) -> tuple[Trt, Trt]:
    """The module and its runtime; raises EngineError where its library cannot be loaded."""
    try:
        trt = importlib.import_module(module)
    except ImportError as error:
        raise EngineError(f"{module} cannot be loaded: {error}") from error

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Trt, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                log.warning("%s: %s", module, message)

    return trt, trt.Runtime(Logger())


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Buffers for calls of one profile and one set of shapes."""

    inputs: Slab
    outputs: Slab


class Plan:
    """One plan with a context for each profile. Tensors that stay on the GPU (`held`) are the caller's."""

    def __init__(self, trt: Trt, runtime: Trt, path: Path, driver: Driver) -> None:
        """Raises EngineError where TensorRT does not take the file: its log says why."""
        self.path, self.driver = path, driver
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise EngineError(f"{path} cannot be loaded, TensorRT's log says why: build the engine again")
        self.engine = engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        self.kinds = {name: str(engine.get_tensor_dtype(name)).rsplit(".", 1)[-1] for name in names}
        self.inputs = [name for name in names if modes[name] == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in self.inputs]
        self.contexts = [self._context(profile) for profile in range(engine.num_optimization_profiles)]
        self.addresses: list[dict[str, int]] = [{} for _ in self.contexts]  # as each context has them now
        self.bound: OrderedDict[object, Bound] = OrderedDict()  # the one used last stands last
        driver.wait()

    def _context(self, profile: int) -> Trt:
        context = self.engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(profile, self.driver.stream):
            raise EngineError(f"{self.path}: no context for profile {profile}: the GPU's memory may be full")
        return context

    def shape(self, name: str) -> tuple[int, ...]:
        """As it was built, -1 where it varies."""
        return tuple(self.engine.get_tensor_shape(name))

    def most(self, name: str, profile: int) -> tuple[int, ...]:
        """The largest shape of an input in a profile."""
        return tuple(self.engine.get_tensor_profile_shape(name, profile)[2])

    def run(
        self,
        tensors: Mapping[str, Array],
        *,
        profile: int = 0,
        held: Mapping[str, int] | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> Tensors:
        """Outputs but for those held, as buffers: read them before the next call. 16-bit numbers are given as fp32.

        held: addresses on the GPU of tensors that are neither sent nor fetched (a cache is input and output at once); shapes:
        of those among them whose shape varies.
        Raises EngineError where a shape lies outside the profile, or the run fails.
        """
        held = held or {}
        given = {name: tensors[name] for name in self.inputs if name not in held}
        key = (profile, *((name, array.shape) for name, array in given.items()))
        context = self.contexts[profile]
        for name, shape in ({name: array.shape for name, array in given.items()} | dict(shapes or {})).items():
            if not context.set_input_shape(name, shape):
                low, _, high = self.engine.get_tensor_profile_shape(name, profile)
                raise EngineError(
                    f"{self.path.name}: input {name} is {list(shape)}, its profile goes from {list(low)} to {list(high)}: "
                    "raise the recipe's [tensorrt] sizes"
                )
        if key not in self.bound:
            self.bound[key] = self._bind(context, given, held)
            if len(self.bound) > BINDINGS:
                _, old = self.bound.popitem(last=False)
                old.inputs.close()
                old.outputs.close()
        self.bound.move_to_end(key)
        bound = self.bound[key]
        for name, array in given.items():
            np.copyto(bound.inputs.host[name], to_plan(array, self.kinds[name]))
        self._point(profile, {**bound.inputs.addresses, **bound.outputs.addresses, **held})
        bound.inputs.upload()
        if not context.execute_async_v3(self.driver.stream):
            raise EngineError(f"{self.path.name}: TensorRT refused to run, its log says why")
        bound.outputs.download()
        self.driver.wait()
        return {name: from_plan(array, self.kinds[name]) for name, array in bound.outputs.host.items()}

    def hold(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Memory on the GPU, zeros, for tensors of the plan's types; to be freed by the caller."""
        found = {}
        for name, shape in shapes.items():
            size = KINDS[self.kinds[name]].itemsize * int(np.prod(shape, dtype=np.int64))
            found[name] = self.driver.allocate(size)
            self.driver.zero(found[name], width=size)
        return found

    def close(self) -> None:
        for bound in self.bound.values():
            bound.inputs.close()
            bound.outputs.close()
        self.bound.clear()
        self.contexts.clear()
        self.engine = None

    def _bind(self, context: Trt, given: Tensors, held: Mapping[str, int]) -> Bound:
        inputs = {name: (KINDS[self.kinds[name]], array.shape) for name, array in given.items()}
        names = [name for name in self.outputs if name not in held]
        outputs = {name: (KINDS[self.kinds[name]], tuple(context.get_tensor_shape(name))) for name in names}
        for name, (_, shape) in outputs.items():
            if min(shape, default=0) < 0:
                raise EngineError(
                    f"{self.path.name}: output {name} has a shape that is not known beforehand: {list(shape)}"
                )
        return Bound(inputs=Slab(self.driver, inputs), outputs=Slab(self.driver, outputs))

    def _point(self, profile: int, wanted: Mapping[str, int]) -> None:
        """Tell the context the addresses that it does not have yet: most stay as they are from call to call."""
        known, context = self.addresses[profile], self.contexts[profile]
        for name, address in wanted.items():
            if known.get(name) != address:
                if not context.set_tensor_address(name, address):
                    raise EngineError(f"{self.path.name} has no tensor {name}: build the engine again")
                known[name] = address
