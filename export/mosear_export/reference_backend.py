"""The PyTorch reference behind the runtime's backend interface: the same pipeline, the whiteboard arithmetic."""

import numpy as np
import torch

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

    def start(self, *, batch: int, capacity: int) -> "ReferenceState":
        return ReferenceState(self, batch=batch, capacity=capacity)

    def close(self) -> None: ...


class ReferenceState:
    """A cache of torch tensors."""

    def __init__(self, backend: ReferenceBackend, *, batch: int, capacity: int) -> None:
        self.backend = backend
        self.names = dict(parts(backend.model.config)[DECODER].state)
        cache = empty_cache(backend.model.config.backbone, batch=batch, capacity=capacity)
        self.cache: Tensors = {name: value.numpy() for name, value in zip(self.names, cache, strict=True)}

    def step(self, tensors: Tensors, *, first: int = 0) -> Tensors:
        block = slice(first, first + len(tensors["hidden"]))
        outputs = self.backend.run(DECODER, {**tensors, **{name: array[block] for name, array in self.cache.items()}})
        for name, written in self.names.items():
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
