"""The builder's child process on TensorRT's real bindings: what it asks of them, and in which order, printed as JSON.

The library's objects are stood in for by recorders that have the real classes' names alone: a call or an attribute that
TensorRT 11.4 has not is an error here. Enums, loggers, monitors and stream writers are the real ones.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import tensorrt as trt

from mosear.backends import tensorrt_child

ASKED: list[list[str]] = []


class Recorder:
    """Has what a class of TensorRT has; answers as told."""

    def __init__(self, real: Any, **answers: Any) -> None:
        self.__dict__.update(_real=real, _answers=answers)

    def __getattr__(self, name: str) -> Any:
        assert hasattr(self._real, name), f"{self._real.__name__} has no {name}"
        answer = self._answers.get(name)
        if name in self._answers and not callable(answer):
            return answer

        def call(*arguments: Any) -> Any:
            ASKED.append([f"{self._real.__name__}.{name}", *map(shown, arguments)])
            return answer(*arguments) if callable(answer) else None

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        assert hasattr(self._real, name), f"{self._real.__name__} has no {name}"
        ASKED.append([f"{self._real.__name__}.{name} =", shown(value)])


def shown(value: Any) -> str:
    return type(value).__name__ if isinstance(value, Recorder) or "object at" in str(value) else str(value)


def parser_of(network: Any, logger: Any) -> Recorder:
    ASKED.append(["OnnxParser"])
    return Recorder(trt.OnnxParserReal, parse_from_file=lambda path: True)


def stand_in(takes_timings: bool, level: Any) -> None:
    """Put recorders in the place of what the library makes."""
    timings = iter([takes_timings, True])
    cache = Recorder(trt.ITimingCache, serialize=lambda: b"timings")
    config = Recorder(
        trt.IBuilderConfig, add_optimization_profile=lambda profile: 0, create_timing_cache=lambda data: cache,
        set_timing_cache=lambda made, mismatch: next(timings), get_timing_cache=lambda: cache,
    )  # fmt: skip
    tensor = Recorder(trt.ITensor, name="x", dtype=trt.float16, shape=(1, 2))
    network = Recorder(
        trt.INetworkDefinition, num_inputs=1, num_outputs=1, get_input=lambda i: tensor, get_output=lambda i: tensor
    )

    def write(network: Any, config: Any, stream: Any) -> bool:
        return bool(stream.write(b"plan") == 4)

    inspector = Recorder(trt.EngineInspector, get_engine_information=lambda form: json.dumps({"Layers": [LAYER]}))
    engine = Recorder(
        trt.ICudaEngine, hardware_compatibility_level=level, num_optimization_profiles=2, device_memory_size_v2=123,
        create_engine_inspector=lambda: inspector,
    )  # fmt: skip
    profile: Callable[[], Recorder] = lambda: Recorder(trt.IOptimizationProfile)  # noqa: E731
    builder = Recorder(
        trt.Builder, create_network=lambda flags: network, create_builder_config=lambda: config,
        create_optimization_profile=profile, build_serialized_network_to_stream=write,
    )  # fmt: skip
    runtime = Recorder(trt.Runtime, deserialize_cuda_engine=lambda data: engine)
    trt.OnnxParserReal = trt.OnnxParser
    trt.Builder, trt.OnnxParser, trt.Runtime = lambda log: builder, parser_of, lambda log: runtime


LAYER = {
    "Name": "fused [profile 1]", "LayerType": "Plugin", "TacticName": "decode_merge",
    "Metadata": "[ONNX Layer: layers.0/x]",
}  # fmt: skip


def main(folder: Path, job: dict[str, Any], *, takes_timings: bool, level: str) -> dict[str, Any]:
    plugins = ModuleType("recorded_plugins")
    plugins.register = lambda **given: ASKED.append(["register", json.dumps(given)])  # type: ignore[attr-defined]
    sys.modules["recorded_plugins"] = plugins
    stand_in(takes_timings, trt.HardwareCompatibilityLevel.__members__[level])
    said: list[dict[str, Any]] = []
    tensorrt_child.tell = lambda **words: said.append(words)  # type: ignore[assignment]
    status = tensorrt_child.build(job)
    return {"status": status, "asked": ASKED, "said": said}


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    print(json.dumps(main(Path(told.pop("folder")), **told)))
