"""Stands in for TensorRT's runtime, and for a GPU, where there is neither.

A "plan" here is the ONNX graph that TensorRT would be given, its 16 bits emulated, with the types of the real plan's tensors
and its profiles. Contexts run it by ONNX Runtime on the addresses that they are told. Memory is this process's, kept by a
library with the driver's calls (`stand_in_gpu.c`): whoever mixes up addresses, types, shapes or profiles gets wrong numbers,
a refusal, or an abort.
"""

import ctypes
import enum
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

from mosear.backends.tensorrt_plans import KINDS, from_plan, to_plan

HERE = Path(__file__).parent


def driver_library(folder: Path, compiler: str) -> Path:
    library = folder / "libcuda_stand_in.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "stand_in_gpu.c")]
    subprocess.run(command, check=True, capture_output=True)
    return library


def live(library: Path) -> int:
    """Allocations that were not freed."""
    return int(ctypes.CDLL(str(library)).stand_in_live())


def plan_bytes(graph: bytes, kinds: Mapping[str, str], profiles: list[Mapping[str, Any]]) -> bytes:
    """A stand-in's plan: what it is made of, as one file."""
    head = json.dumps({"kinds": dict(kinds), "profiles": profiles}).encode()
    return len(head).to_bytes(8, "little") + head + graph


class TensorIOMode(enum.Enum):
    INPUT = enum.auto()
    OUTPUT = enum.auto()


class Context:
    def __init__(self, engine: "Engine") -> None:
        self.engine, self.profile, self.shapes, self.addresses = engine, 0, {}, {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream
        self.profile = profile
        return profile < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: Any) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        fits = len(low) == len(shape) and all(a <= size <= b for a, size, b in zip(low, shape, high))
        if fits:
            self.shapes[name] = tuple(shape)
        return fits

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        axes = self.engine.axes[name]
        letters = {
            axis: size
            for given, shape in self.shapes.items()
            for axis, size in zip(self.engine.axes[given], shape)
            if isinstance(axis, str)
        }
        return tuple(letters.get(axis, -1) if isinstance(axis, str) else axis for axis in axes)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.axes

    def execute_async_v3(self, stream: int) -> bool:
        engine = self.engine
        memory = {}
        for name in engine.names:
            shape, dtype = self.get_tensor_shape(name), KINDS[engine.kinds[name]]
            size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            assert self.addresses[name] % 256 == 0, f"{name} is not aligned"
            raw = (ctypes.c_char * size).from_address(self.addresses[name])
            memory[name] = np.frombuffer(raw, dtype).reshape(shape)
        feeds = {}
        for name in engine.inputs:
            value = from_plan(memory[name], engine.kinds[name])
            assert value.dtype.kind != "f" or not np.isnan(value).any(), f"{name} holds what nobody wrote"
            feeds[name] = value
        outputs = [name for name in engine.names if name not in engine.inputs]
        for name, value in zip(outputs, engine.session.run(outputs, feeds), strict=True):
            memory[name][...] = to_plan(value, engine.kinds[name])
        return True


class Engine:
    def __init__(self, data: bytes) -> None:
        size = int.from_bytes(data[:8], "little")
        told = json.loads(data[8 : 8 + size])
        self.kinds, self.profiles = told["kinds"], told["profiles"]
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.session = ort.InferenceSession(data[8 + size :], options, providers=["CPUExecutionProvider"])
        nodes = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.axes = {node.name: tuple(node.shape) for node in nodes}
        self.inputs, self.names = [node.name for node in self.session.get_inputs()], list(self.axes)
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), max(1, len(self.profiles))

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> str:
        return f"DataType.{self.kinds[name]}"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(axis, str) else axis for axis in self.axes[name])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        ranges = self.profiles[profile].get(name) if self.profiles else None
        return [tuple(shape) for shape in ranges] if ranges else [self.get_tensor_shape(name)] * 3

    def create_execution_context(self) -> Context:
        return Context(self)


class Runtime:
    def __init__(self, logger: Any) -> None:
        assert logger is not None

    def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
        return Engine(data) if data[8:9] == b"{" else None


def module(name: str) -> ModuleType:
    made = ModuleType(name)
    severity = SimpleNamespace(WARNING=2)
    made.__dict__.update(
        ILogger=type("ILogger", (), {"Severity": severity, "__init__": lambda self: None}), Runtime=Runtime,
        TensorIOMode=TensorIOMode,
    )  # fmt: skip
    return made
