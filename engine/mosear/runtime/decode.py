"""What a decoder is asked and what it says: the same in this process and behind a server."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mosear.runtime.prompt import AUDIO, VIDEO, Task
from mosear.runtime.sampling import FloatArray, Sampling

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Work:
    """A prompt and how to go on from it, checked.

    ids i32 [S]: contract.HOLES where a field's features go; group i32 [S]: modality of each position; features: f32
    [n, size] of each field, from the encoders. deadline_s: on time.monotonic's clock.
    """

    ids: IntArray
    group: IntArray
    features: Mapping[str, FloatArray]
    task: Task
    strength: float
    max_tokens: int = 1
    min_tokens: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    deadline_s: float | None = None

    @property
    def muted(self) -> tuple[tuple[int, ...], ...]:
        """The muted groups of each row: a conflict report asks without the voice and without the face too."""
        both = (self.group == AUDIO).any() and (self.group == VIDEO).any()
        return ((), (AUDIO,), (VIDEO,)) if self.task is Task.CONFLICT and both else ((),)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prefilled:
    """The prompt was read. mass f32 [layers, 2, G]: before and after, head mean of its last row, nothing muted.
    experts f32 [G, E]: mean gates over the layers' adapted linears and each group's positions (0: no position)."""

    mass: FloatArray
    experts: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Token:
    """One token of a reason. scores f32 [labels]: log-probability of each label's first token, where this is one."""

    id: int
    scores: FloatArray | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """The answer to classify and conflict. scores f32 [rows, labels]: sums of the log-probabilities of a label's tokens."""

    scores: FloatArray


Said = Prefilled | Token | Scored


class Decoding(Protocol):
    """A decoder that takes one prompt at a time from each caller."""

    def decode(self, work: Work) -> Generator[Said]:
        """Prefilled, then Token after Token or one Scored. Closing the generator cancels.

        Raises BusyError where the queue is full, DeadlineError where the time is over, RequestError for a bad prompt.
        """
        ...
