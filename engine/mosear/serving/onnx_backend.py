"""Serves ONNX files where Triton has no onnxruntime backend of its own: the same `config.pbtxt`, the same answers.

Of the native backend's settings it knows default_model_filename, max_batch_size, optimization.graph.level and the
parameters intra_op_thread_count, inter_op_thread_count, execution_mode and session.*; it runs on the CPU only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from mosear.contract import Tensors
from mosear.errors import ConfigError, EngineError, MosearError, RequestError

PROVIDER = "CPUExecutionProvider"
SPINNING = "session.intra_op.allow_spinning"  # off: models share the cores, waiting threads would take them from others
# The decoder's threads wait for one another at each node, so a core that an encoder takes from one of them stops both. With
# encoders at 5, eight askers' tokens come 1.14 times as fast, and p99 between two tokens falls from 5.4 to 4.0 medians.
NICENESS = 5
LEVELS = {  # of optimization.graph.level, by the native backend's documentation
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    0: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
TYPES = {
    "tensor(float)": "TYPE_FP32", "tensor(double)": "TYPE_FP64", "tensor(float16)": "TYPE_FP16",
    "tensor(int64)": "TYPE_INT64", "tensor(int32)": "TYPE_INT32", "tensor(int16)": "TYPE_INT16",
    "tensor(int8)": "TYPE_INT8", "tensor(uint64)": "TYPE_UINT64", "tensor(uint32)": "TYPE_UINT32",
    "tensor(uint16)": "TYPE_UINT16", "tensor(uint8)": "TYPE_UINT8", "tensor(bool)": "TYPE_BOOL",
    "tensor(string)": "TYPE_STRING",
}  # fmt: skip
Config = Mapping[str, Any]  # a model's configuration as Triton's JSON, whose values have as many types


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ask:
    """One request: its inputs (strings as bytes), and the names of the outputs that it wants."""

    inputs: Tensors
    outputs: tuple[str, ...]

    def alike(self) -> object:
        """Equal for requests that can be one batch: same tensors, same axes but for the first."""
        axes = sorted((name, array.dtype.str, array.shape[1:]) for name, array in self.inputs.items())
        return tuple(axes), frozenset(self.outputs)

    def rows(self) -> int | None:
        """Size of the batch axis; None where the inputs do not agree on one."""
        sizes = {array.shape[0] if array.ndim else None for array in self.inputs.values()}
        return sizes.pop() if len(sizes) == 1 else None


class Batching:
    """Answers several requests at once: what fits runs as one batch, and one bad request spoils no other."""

    name: str
    batched: bool  # inputs have a batch axis

    def answer(self, asks: Sequence[Ask]) -> list[Tensors | MosearError]:
        """Outputs, or the error, of each request, in their order; requests that fit run as one batch."""
        answers: dict[int, Tensors | MosearError] = {}
        groups: dict[object, list[int]] = {}
        for index, ask in enumerate(asks):
            apart = not self.batched or ask.rows() is None
            groups.setdefault(index if apart else ask.alike(), []).append(index)
        for group in groups.values():
            found: Sequence[Tensors | MosearError] | None = None
            if len(group) > 1:
                found = self._together([asks[index] for index in group])
            # Where a batch fails, or its outputs cannot be told apart, each is asked alone: one bad request spoils no other.
            answers |= zip(group, found or [self.alone(asks[index]) for index in group], strict=True)
        return [answers[index] for index in range(len(asks))]

    def _together(self, asks: Sequence[Ask]) -> list[Tensors] | None:
        ends = np.cumsum([ask.rows() for ask in asks])
        joined = Ask(
            inputs={name: np.concatenate([ask.inputs[name] for ask in asks]) for name in asks[0].inputs},
            outputs=asks[0].outputs,
        )
        outputs = self.alone(joined)
        if isinstance(outputs, MosearError) or any(array.shape[:1] != (ends[-1],) for array in outputs.values()):
            return None
        parts = {name: np.split(array, ends[:-1]) for name, array in outputs.items()}
        return [{name: part[index] for name, part in parts.items()} for index in range(len(asks))]

    def alone(self, ask: Ask) -> Tensors | MosearError:
        """The outputs of one request, or its error."""
        raise NotImplementedError


class OnnxModel(Batching):
    """A session for one model's file. `config`: Triton's; `folder`: of the model's version.

    Raises EngineError where the file cannot be loaded or is not what the configuration says, ConfigError for a setting.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.name = str(config["name"])
        self.batched = int(config.get("max_batch_size", 0)) > 0
        path = folder / (config.get("default_model_filename") or "model.onnx")
        if path.is_dir():  # as the native backend has it, for files with external data
            path /= "model.onnx"
        if not path.is_file():
            raise EngineError(f"{self.name}: {path} is missing")
        try:
            self.session = ort.InferenceSession(str(path), session_options(config), providers=[PROVIDER])
        except Exception as error:  # onnxruntime raises classes of its own without a common base
            raise EngineError(f"{self.name}: ONNX Runtime cannot load {path}: {error}") from error
        self._check(config)

    def _check(self, config: Config) -> None:
        """The configuration's tensors are the graph's, of its types, and none is left out that the graph must have."""
        graph = self.session
        needed = {node.name: node.type for node in graph.get_inputs()}
        known = needed | {node.name: node.type for node in graph.get_overridable_initializers()}
        given = {"input": known, "output": {node.name: node.type for node in graph.get_outputs()}}
        for kind, nodes in given.items():
            for tensor in config[kind]:
                name, data_type = tensor["name"], tensor["data_type"]
                if name not in nodes:
                    raise EngineError(f"{self.name}: the graph has no {kind} {name}; it has {', '.join(sorted(nodes))}")
                if TYPES.get(nodes[name]) != data_type:
                    raise EngineError(
                        f"{self.name}: {kind} {name} is {nodes[name]}, the configuration says {data_type}"
                    )
        if missing := sorted(needed.keys() - {tensor["name"] for tensor in config["input"]}):
            raise EngineError(f"{self.name}: the configuration leaves out the graph's input {', '.join(missing)}")

    def alone(self, ask: Ask) -> Tensors | MosearError:
        try:
            feeds = {name: _texts(array) for name, array in ask.inputs.items()}
            outputs = self.session.run(list(ask.outputs), feeds)
        except (InvalidArgument, UnicodeDecodeError, ValueError) as error:  # ValueError: a required input is missing
            return RequestError(f"{self.name}: {error}")
        except Exception as error:
            return EngineError(f"{self.name}: ONNX Runtime failed: {error}")
        return {name: _bytes(np.asarray(array)) for name, array in zip(ask.outputs, outputs, strict=True)}


def session_options(config: Config) -> ort.SessionOptions:
    """ONNX Runtime's options from a model's configuration; raises ConfigError for a value that is none."""
    name, parameters = (
        config["name"],
        {key: value["string_value"] for key, value in config.get("parameters", {}).items()},
    )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = _whole(name, parameters, "intra_op_thread_count")
    options.inter_op_num_threads = _whole(name, parameters, "inter_op_thread_count")
    if _whole(name, parameters, "execution_mode"):
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    if level not in LEVELS:
        raise ConfigError(f"{name}: optimization.graph.level {level}: it must be one of {', '.join(map(str, LEVELS))}")
    options.graph_optimization_level = LEVELS[level]
    for key, value in ({SPINNING: "0"} | parameters).items():
        if key.startswith("session."):
            options.add_session_config_entry(key, value)
    return options


def _whole(model: str, parameters: Mapping[str, str], key: str) -> int:
    value = parameters.get(key, "0")
    if not value.isdecimal():
        raise ConfigError(
            f"{model}: parameter {key} is {value!r}: it must be a whole number, 0 for ONNX Runtime's choice"
        )
    return int(value)


def _texts(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:  # Any: shape and type are the model's
    """Strings as ONNX Runtime takes them; other arrays as they are."""
    if array.dtype != object:
        return array
    return np.array([value.decode() for value in array.reshape(-1)], object).reshape(array.shape)


def _bytes(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Strings as Triton takes them; other arrays as they are."""
    if array.dtype != object:
        return array
    return np.array([str(value).encode() for value in array.reshape(-1)], object).reshape(array.shape)
