"""Choice of the next token from logits."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mosear.errors import RequestError

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Temperature 0 is greedy; top_p keeps the most likely tokens up to that probability; equal seeds, equal tokens."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 10):
            raise RequestError(f"temperature is {self.temperature}: it must lie from 0 (greedy) to 10")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p}: it must lie above 0 and be at most 1")
        if not 0 <= self.seed < 1 << 64:
            raise RequestError(f"seed is {self.seed}: it must lie from 0 to 2^64 - 1")


class Sampler:
    """Draws tokens for one request."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling, self.rng = sampling, np.random.default_rng(sampling.seed)

    def pick(self, logits: FloatArray) -> int:
        """A token id from logits [V]; ties of the greedy choice take the lowest id."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        probabilities = np.exp(log_softmax(logits / self.sampling.temperature).astype(np.float64))
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        kept = order[before < self.sampling.top_p]  # the most likely one always stays
        return int(self.rng.choice(kept, p=probabilities[kept] / probabilities[kept].sum()))


def log_softmax(logits: FloatArray) -> FloatArray:
    """Logarithm of softmax over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    result: FloatArray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
