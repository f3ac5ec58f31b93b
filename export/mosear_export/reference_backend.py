"""The PyTorch reference behind the runtime's backend interface: the same pipeline, the whiteboard arithmetic."""

import numpy as np
import torch

from mosear.backends.session import Runner
from mosear.config import ModelConfig
from mosear.contract import DECODER, Tensors, parts
from mosear_export.model.decoder import empty_cache
from mosear_export.model.whole import ReferenceModel


class ReferenceBackend:
    """Runs every part in PyTorch, fp32, on the CPU."""

    device, provider = "cpu", "torch"

    def __init__(self, model: ReferenceModel) -> None:
        self.model = model

    def run(self, part: str, tensors: Tensors) -> Tensors:
        outputs = self.model.run(part, {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()})
        return {name: value.numpy() for name, value in outputs.items()}

    def start(self, *, batch: int, capacity: int) -> "CopiedState":
        return CopiedState(self, self.model.config, batch=batch, capacity=capacity)

    def close(self) -> None: ...


class CopiedState:
    """A cache that each call is given whole and gives back whole, copied in between."""

    def __init__(self, runner: Runner, config: ModelConfig, *, batch: int, capacity: int, written: bool = True) -> None:
        """Not written: the runner's decoder gives no cache back."""
        self.runner, self.written = runner, written
        self.names = dict(parts(config)[DECODER].state)
        cache = empty_cache(config.backbone, batch=batch, capacity=capacity)
        self.cache: Tensors = {name: value.numpy() for name, value in zip(self.names, cache, strict=True)}

    def step(self, tensors: Tensors, *, first: int = 0) -> Tensors:
        block = slice(first, first + len(tensors["hidden"]))
        outputs = self.runner.run(DECODER, {**tensors, **{name: array[block] for name, array in self.cache.items()}})
        for name, written in self.names.items() if self.written else ():
            self.cache[name][block] = outputs.pop(written)
        return outputs

    def move(self, source: int, target: int, length: int) -> None:
        for array in self.cache.values():
            array[target, :, :length] = array[source, :, :length]

    def clear(self, row: int) -> None:
        for array in self.cache.values():
            array[row] = 0

    def resize(self, capacity: int, *, rows: int, length: int) -> None:
        for name, old in self.cache.items():
            self.cache[name] = np.zeros((*old.shape[:2], capacity, old.shape[3]), old.dtype)
            self.cache[name][:rows, :, :length] = old[:rows, :, :length]
