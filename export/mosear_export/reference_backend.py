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

    def step(self, tensors: Tensors) -> Tensors:
        outputs = self.backend.run(DECODER, {**tensors, **self.cache})
        self.cache = {name: outputs.pop(written) for name, written in self.names.items()}
        return outputs
