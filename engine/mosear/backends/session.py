"""What the runtime asks of a backend, whatever it runs on."""

from typing import Protocol

from mosear.contract import Tensors


class DecoderState(Protocol):
    """A batch of sequences with its cache. Each call writes its rows into the cache at their positions."""

    def step(self, tensors: Tensors) -> Tensors:
        """Run the decoder on the contract's inputs (cache and heads left out); outputs but for the cache."""
        ...


class Backend(Protocol):
    """An engine that is loaded: every part of the contract can be run."""

    device: str
    provider: str

    def run(self, part: str, tensors: Tensors) -> Tensors:
        """Outputs of a part without state, by the contract's names."""
        ...

    def start(self, *, batch: int, capacity: int) -> DecoderState:
        """An empty cache of `capacity` slots for each of `batch` sequences."""
        ...

    def close(self) -> None: ...
