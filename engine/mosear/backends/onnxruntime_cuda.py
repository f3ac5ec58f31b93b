"""ONNX Runtime on a GPU: sessions of the CUDA provider, or of TensorRT within ONNX Runtime; the cache stays on the GPU.

ONNX Runtime leaves a graph to the CPU where a provider cannot be had, and says so in its log alone. Here that is an error.
"""

import logging
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from mosear.backends.cuda_driver import Driver
from mosear.backends.onnxruntime_cpu import PROVIDER as CPU
from mosear.backends.onnxruntime_cpu import check
from mosear.config import ModelConfig
from mosear.contract import DECODER, Tensors, parts
from mosear.errors import EngineError
from mosear.recipe import Provider

log = logging.getLogger(__name__)

DEVICE = "cuda"
CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
# Of each choice, the providers in their order and what each is told. The first one must take the graph.
PROVIDERS: dict[Provider, tuple[tuple[str, dict[str, str]], ...]] = {
    Provider.CUDA: ((CUDA, {"device_id": "0", "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}),),
    Provider.TENSORRT: (
        (TENSORRT, {"device_id": "0", "trt_max_workspace_size": str(4 << 30), "trt_fp16_enable": "0"}),
        (CUDA, {"device_id": "0", "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}),
    ),
}
INSTALL = "pip uninstall onnxruntime, then pip install 'mosear-engine[gpu]' (both packages have the same module)"
ASSIGNMENT = "session.record_ep_graph_assignment_info"  # which nodes each provider took; of ONNX Runtime 1.24 and later


def check_provider(choice: Provider) -> None:
    """Raises EngineError where this ONNX Runtime has not what a choice needs."""
    available = ort.get_available_providers()
    if missing := [name for name, _ in PROVIDERS[choice] if name not in available]:
        raise EngineError(
            f"ONNX Runtime {ort.__version__} here has no {missing[0]} (it has {', '.join(available)}): {INSTALL}"
        )


def open_session(path: Path, choice: Provider) -> ort.InferenceSession:
    """A session whose graph the choice's first provider took.

    Raises EngineError where the provider is missing or does not start, or the file cannot be loaded: there is no fallback.
    """
    check_provider(choice)
    options = ort.SessionOptions()
    options.add_session_config_entry(ASSIGNMENT, "1")
    try:
        session = ort.InferenceSession(str(path), options, providers=list(PROVIDERS[choice]))
    except Exception as error:  # onnxruntime raises classes of its own without a common base
        raise EngineError(f"ONNX Runtime cannot load {path} on the GPU: {error}") from error
    session.disable_fallback()  # of a run that fails, which would be tried again on the CPU
    wanted, found = PROVIDERS[choice][0][0], session.get_providers()
    if wanted not in found:
        raise EngineError(
            f"{path}: {wanted} did not start, ONNX Runtime would answer with {', '.join(found)}: its log says what is missing "
            "(a driver, a GPU, CUDA's libraries). To answer on the CPU choose a recipe of the target onnxruntime-cpu"
        )
    if left := _left_to_cpu(session):
        log.warning("%s: nodes that no provider on the GPU took: %s", path.name, ", ".join(left))
    return session


def _left_to_cpu(session: Any) -> list[str]:  # Any: a session, and what an older ONNX Runtime cannot tell
    """Operators that run on the CPU, with how often; nothing where this cannot be told."""
    try:
        subgraphs = session.get_provider_graph_assignment_info()
    except Exception:  # not recorded
        return []
    counts = Counter(node.op_type for graph in subgraphs if graph.ep_name == CPU for node in graph.get_nodes())
    return [f"{count} {name}" for name, count in counts.most_common()]


def on_gpu(value: NDArray[np.generic]) -> ort.OrtValue:
    """A copy in the GPU's memory."""
    return ort.OrtValue.ortvalue_from_numpy(value, DEVICE, 0)


class OnnxRuntimeCudaBackend:
    """Sessions for every part in a folder of graphs."""

    device = DEVICE

    def __init__(
        self, folder: Path, config: ModelConfig, *, heads: Tensors, provider: Provider, names: Collection[str] = ()
    ) -> None:
        """As `OnnxRuntimeBackend`; raises EngineError where there is no GPU."""
        self.config, self.provider = config, PROVIDERS[provider][0][0]
        self.parts = {name: part for name, part in parts(config).items() if not names or name in names}
        self.sessions = {name: open_session(folder / f"{name}.onnx", provider) for name in self.parts}
        self.driver = Driver()
        self.heads = {name: on_gpu(value) for name, value in heads.items()}

    def run(self, part: str, tensors: Tensors) -> Tensors:
        spec = self.parts[part]
        check(spec, tensors)
        names = [output.name for output in spec.outputs]
        return dict(zip(names, self.sessions[part].run(names, dict(tensors)), strict=True))

    def start(self, *, batch: int, capacity: int) -> "CudaDecoder":
        return CudaDecoder(self, batch=batch, capacity=capacity)

    def close(self) -> None:
        self.sessions.clear()
        self.heads.clear()
        self.driver.close()


class CudaDecoder:
    """A cache in the GPU's memory, bound as input and output at once."""

    def __init__(self, backend: OnnxRuntimeCudaBackend, *, batch: int, capacity: int) -> None:
        self.backend, self.spec, self.batch, self.capacity = backend, backend.parts[DECODER], batch, capacity
        self.state = dict(self.spec.state)
        cache = next(spec for spec in self.spec.inputs if spec.name in self.state)
        _, heads, _, width = cache.axes
        self.heads, self.width = int(heads), int(width)
        self.cache = self._empty(capacity)

    @property
    def row_bytes(self) -> int:
        """Of one sequence in one tensor, fp32."""
        return self.heads * self.capacity * self.width * 4

    def step(self, tensors: Tensors, *, first: int = 0) -> Tensors:
        driver, session = self.backend.driver, self.backend.sessions[DECODER]
        shape = (len(tensors["hidden"]), self.heads, self.capacity, self.width)
        example = {name: np.broadcast_to(np.zeros((), np.float32), shape) for name in self.state}
        check(self.spec, {**tensors, **example})
        driver.wait()  # for what was moved in the cache
        binding = session.io_binding()
        for name, array in tensors.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, value in self.backend.heads.items():
            binding.bind_ortvalue_input(name, value)
        for name, address in self.cache.items():
            at = address + first * self.row_bytes
            binding.bind_input(name, DEVICE, 0, np.float32, shape, at)
            binding.bind_output(self.state[name], DEVICE, 0, np.float32, shape, at)
        wanted = [spec.name for spec in self.spec.outputs if spec.name not in self.state.values()]
        for name in wanted:
            binding.bind_output(name, "cpu")
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises classes of its own without a common base
            raise EngineError(f"ONNX Runtime failed in the decoder: {error}") from error
        known = dict(zip(self._names(session), binding.get_outputs(), strict=True))
        return {name: known[name].numpy() for name in wanted}

    def _names(self, session: ort.InferenceSession) -> list[str]:
        """Outputs in the order that they were bound in."""
        bound = [*self.state.values()]
        return [*bound, *(spec.name for spec in self.spec.outputs if spec.name not in bound)]

    def move(self, source: int, target: int, length: int) -> None:
        for address in self.cache.values():  # a row in one copy
            self.backend.driver.copy(
                address + target * self.row_bytes, address + source * self.row_bytes, self.row_bytes
            )

    def clear(self, row: int) -> None:
        for address in self.cache.values():
            self.backend.driver.zero(address + row * self.row_bytes, width=self.row_bytes)

    def resize(self, capacity: int, *, rows: int, length: int) -> None:
        old, strip = self.cache, self.capacity * self.width * 4
        self.cache, self.capacity = self._empty(capacity), capacity
        kept, new_strip, driver = length * self.width * 4, capacity * self.width * 4, self.backend.driver
        for name, address in self.cache.items():
            for at in range(rows * self.heads) if kept else ():
                driver.copy(address + at * new_strip, old[name] + at * strip, kept)
        driver.wait()
        for address in old.values():
            driver.free(address)

    def _empty(self, capacity: int) -> dict[str, int]:
        size = self.batch * self.heads * capacity * self.width * 4
        made = {name: self.backend.driver.allocate(size) for name in self.state}
        for address in made.values():
            self.backend.driver.zero(address, width=size)
        return made
