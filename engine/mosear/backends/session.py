"""What the runtime asks of a backend, whatever it runs on."""

from typing import Protocol

from mosear.contract import Tensors


class DecoderState(Protocol):
    """A cache of some rows, one sequence each: [rows, K, capacity, D] for each layer's keys and values.

    A call runs a block of neighbouring rows and writes into them, at its positions, in place. What lies behind a row's
    sequence is never seen, but it must be finite.
    """

    def step(self, tensors: Tensors, *, first: int = 0) -> Tensors:
        """Run the decoder on rows first to first + B; tensors are the contract's inputs without cache and heads.

        Gives the outputs but for the cache. They may be buffers: read them before the next call.
        """
        ...

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of row `source` to row `target`."""
        ...

    def clear(self, row: int) -> None:
        """Fill a row with zeros."""
        ...

    def resize(self, capacity: int, *, rows: int, length: int) -> None:
        """Change the capacity; of the first `rows` rows the first `length` positions stay, all else becomes zeros."""
        ...


class Runner(Protocol):
    """Runs parts without state, wherever they are."""

    def run(self, part: str, tensors: Tensors) -> Tensors:
        """Outputs of a part without state, by the contract's names."""
        ...


class Backend(Runner, Protocol):
    """An engine that is loaded: every part of the contract can be run."""

    device: str
    provider: str

    def start(self, *, batch: int, capacity: int) -> DecoderState:
        """An empty cache of `capacity` slots for each of `batch` sequences."""
        ...

    def close(self) -> None: ...
