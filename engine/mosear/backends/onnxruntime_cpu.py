"""ONNX Runtime on the CPU: build (optimise and save each part) and load (sessions with preallocated, bound buffers)."""

from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from mosear.config import ModelConfig
from mosear.contract import DECODER, Part, Tensors, parts
from mosear.errors import EngineError, RequestError

PROVIDER = "CPUExecutionProvider"
SEVERITY_ERROR = 3
BINDINGS = 24  # kept at most: a steady mix of requests has a few for its prompts and one for each number of rows


def optimise(source: Path, target: Path) -> None:
    """Let ONNX Runtime inline, fuse and fold a part's graph, and save it with its weights beside it."""
    options = _options(threads=1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{target.name}.data")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    _session(source, options)


def _options(*, threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = SEVERITY_ERROR
    return options


def _session(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(str(path), options, providers=[PROVIDER])
    except Exception as error:  # onnxruntime raises classes of its own without a common base
        raise EngineError(f"ONNX Runtime cannot load {path}: {error}") from error


class OnnxRuntimeBackend:
    """Sessions for every part in a folder of optimised graphs."""

    device = "cpu"
    provider = PROVIDER

    def __init__(
        self, folder: Path, config: ModelConfig, *, heads: Tensors, threads: int, names: Collection[str] = ()
    ) -> None:
        """`heads` are bound to the decoder's head inputs once (none where they are baked into its graph).

        names: the parts to load (none named: all).
        """
        self.config = config
        self.parts = {name: part for name, part in parts(config).items() if not names or name in names}
        self.heads = {name: np.ascontiguousarray(value) for name, value in heads.items()}
        self.sessions = {}
        for name in self.parts:
            options = _options(threads=threads)
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            # The decoder runs many short calls in a row; elsewhere waiting threads would only take the cores from it.
            options.add_session_config_entry("session.intra_op.allow_spinning", "1" if name == DECODER else "0")
            self.sessions[name] = _session(folder / f"{name}.onnx", options)

    def run(self, part: str, tensors: Tensors) -> Tensors:
        spec = self.parts[part]
        check(spec, tensors)
        names = [output.name for output in spec.outputs]
        return dict(zip(names, self.sessions[part].run(names, dict(tensors)), strict=True))

    def start(self, *, batch: int, capacity: int) -> "BoundDecoder":
        return BoundDecoder(self, batch=batch, capacity=capacity)

    def close(self) -> None:
        self.sessions.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Buffers of one call's shapes on one block of rows, bound to the session."""

    binding: ort.IOBinding
    inputs: Tensors
    outputs: Tensors


class BoundDecoder:
    """A cache in preallocated memory, bound as input and output at once: the graph writes rows in place.

    A block of neighbouring rows is contiguous, so a call on some of them is bound to pointers into the whole. Calls with
    the block and the shapes of a recent one reuse its buffers, so a decoded token copies a few numbers only.
    """

    def __init__(self, backend: OnnxRuntimeBackend, *, batch: int, capacity: int) -> None:
        self.backend, self.spec, self.batch = backend, backend.parts[DECODER], batch
        self.state = dict(self.spec.state)
        self.cache = self._empty(capacity)
        self.bound: OrderedDict[object, Bound] = OrderedDict()  # the one used last stands last

    def step(self, tensors: Tensors, *, first: int = 0) -> Tensors:
        """Outputs are this object's buffers: read them before the next call."""
        key = (first, *((name, array.shape) for name, array in tensors.items()))
        if key not in self.bound:
            self.bound[key] = self._bind(tensors, first)
            if len(self.bound) > BINDINGS:
                self.bound.popitem(last=False)
        self.bound.move_to_end(key)
        bound = self.bound[key]
        for name, kept in bound.inputs.items():
            np.copyto(kept, tensors[name])
        try:
            self.backend.sessions[DECODER].run_with_iobinding(bound.binding)
        except Exception as error:  # onnxruntime raises classes of its own without a common base
            raise EngineError(f"ONNX Runtime failed in the decoder: {error}") from error
        return dict(bound.outputs)

    def move(self, source: int, target: int, length: int) -> None:
        for array in self.cache.values():
            array[target, :, :length] = array[source, :, :length]

    def clear(self, row: int) -> None:
        for array in self.cache.values():
            array[row] = 0

    def resize(self, capacity: int, *, rows: int, length: int) -> None:
        grown = self._empty(capacity)
        for name, array in grown.items() if rows and length else ():
            array[:rows, :, :length] = self.cache[name][:rows, :, :length]
        self.bound.clear()
        self.cache = grown

    def _empty(self, capacity: int) -> Tensors:
        sizes = {"B": self.batch, "L": capacity}
        return {
            spec.name: np.zeros(self._shape(spec.axes, sizes), spec.dtype.numpy)
            for spec in self.spec.inputs
            if spec.name in self.state
        }

    def _bind(self, tensors: Tensors, first: int) -> Bound:
        block = slice(first, first + len(tensors["hidden"]))
        cache = {name: array[block] for name, array in self.cache.items()}
        sizes = check(self.spec, {**tensors, **cache})
        binding = self.backend.sessions[DECODER].io_binding()
        inputs: Tensors = {
            spec.name: np.array(tensors[spec.name], order="C")
            for spec in self.spec.inputs
            if spec.name not in self.state
        }
        outputs: Tensors = {
            spec.name: np.empty(self._shape(spec.axes, sizes), spec.dtype.numpy)
            for spec in self.spec.outputs
            if spec.name not in self.state.values()
        }
        for name, array in {**inputs, **self.backend.heads, **cache}.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in {**outputs, **{self.state[name]: array for name, array in cache.items()}}.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return Bound(binding=binding, inputs=inputs, outputs=outputs)

    @staticmethod
    def _shape(axes: tuple[int | str, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in axes)


def check(part: Part, tensors: Tensors) -> dict[str, int]:
    """Sizes of the dynamic axes; raises RequestError naming the tensor whose type or shape is not the contract's."""
    sizes: dict[str, int] = {}
    for spec in part.inputs:
        array = tensors.get(spec.name)
        wanted = f"{spec.dtype} {list(spec.axes)}"
        if array is None:
            raise RequestError(f"{part.name}: input {spec.name} is missing; it must be {wanted}")
        fits = array.dtype == spec.dtype.numpy and array.ndim == len(spec.axes)
        for axis, size in zip(spec.axes, array.shape):
            expected = sizes.setdefault(axis, size) if isinstance(axis, str) else axis
            fits = fits and expected == size
        if not fits:
            known = {axis: size for axis, size in sizes.items() if axis in spec.axes}
            raise RequestError(
                f"{part.name}: input {spec.name} is {array.dtype} {list(array.shape)}; it must be {wanted}"
                + (f" with {known}" if known else "")
            )
    return sizes
