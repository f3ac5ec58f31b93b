"""The decoder's loop for one request: a prefill of one or more rows that share a prompt, label scores, greedy or sampled text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mosear.backends.session import Backend
from mosear.config import ModelConfig, Route
from mosear.contract import EMBEDDING, Tensors
from mosear.runtime.prompt import TEXT, Prompt
from mosear.runtime.sampling import FloatArray, Sampler, log_softmax

CAPACITY_STEP = 32  # cache capacities are multiples of this


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What differs between the rows of one request: muted groups (all rows share prompt and strength)."""

    muted: tuple[tuple[int, ...], ...]
    strength: float


class Generation:
    """A request in the decoder: its cache, and where it stands."""

    def __init__(self, backend: Backend, config: ModelConfig, prompt: Prompt, rows: Rows, *, room: int) -> None:
        """`room`: how many tokens may follow the prompt."""
        self.backend, self.config, self.prompt, self.rows = backend, config, prompt, rows
        batch, capacity = len(rows.muted), -(-(len(prompt) + room) // CAPACITY_STEP) * CAPACITY_STEP
        self.state = backend.start(batch=batch, capacity=capacity)
        self.key_group = np.zeros((batch, capacity), np.int32)
        self.key_group[:, : len(prompt)] = prompt.group
        self.bias = np.zeros((batch, len(config.groups)), np.float32)
        for row, muted in enumerate(rows.muted):
            self.bias[row, list(muted)] = -np.inf
        self.gate_state: FloatArray | None = None

    def prefill(self, tokens: dict[str, FloatArray]) -> Tensors:
        """Run the prompt; `tokens` are the projected tokens of each field. Logits of the last position only."""
        hidden = self._embed(self.prompt.ids.clip(min=0))
        self.prompt.fill(hidden, tokens)
        return self._call(hidden, 0, group=self.prompt.group, wanted=[len(self.prompt) - 1])

    def extend(self, ids: Sequence[int], start: int) -> Tensors:
        """Run text tokens, the same in every row, from position `start` on; logits after each of them."""
        return self._call(self._embed(ids), start, group=np.full(len(ids), TEXT, np.int32), wanted=range(len(ids)))

    def _embed(self, ids: npt.ArrayLike) -> FloatArray:
        out = self.backend.run(EMBEDDING, {"token_ids": np.asarray(ids, np.int32)[None]})
        return np.asarray(out["hidden"][0], np.float32)

    def _call(self, hidden: FloatArray, start: int, *, group: npt.NDArray[np.int32], wanted: Sequence[int]) -> Tensors:
        batch, count = len(self.key_group), len(hidden)

        def rows(values: npt.ArrayLike) -> npt.NDArray[np.int32]:
            return np.broadcast_to(np.asarray(values, np.int32), (batch, *np.shape(values)))

        tensors: Tensors = {
            "hidden": np.broadcast_to(hidden, (batch, *hidden.shape)),
            "position": rows(np.arange(start, start + count)),
            "group": rows(group),
            "key_group": self.key_group,
            "key_length": rows(start + count),
            "first_row": rows(len(self.prompt) - 1),
            "strength": np.full(batch, self.rows.strength, np.float32),
            "group_bias": self.bias,
            "logit_row": rows(list(wanted)),
        }
        if self.config.mose.route is Route.MODALITY:
            tensors["gate_state"] = self._gates(batch) if self.gate_state is None else self.gate_state
        outputs = self.state.step(tensors)
        if "gate_state_out" in outputs:
            self.gate_state = np.array(outputs["gate_state_out"], np.float32)
        return outputs

    def _gates(self, batch: int) -> FloatArray:
        mose, layers = self.config.mose, self.config.backbone.layers
        shape = (batch, layers * len(mose.targets), len(self.config.groups), mose.experts)
        return np.full(shape, -1, np.float32)


def score_labels(generation: Generation, logits: FloatArray, labels: Sequence[Sequence[int]]) -> FloatArray:
    """Sum of the log-probabilities of each label's tokens after the prompt: [rows, labels].

    logits [rows, V] are the prompt's last. Labels of one token cost nothing more, others one short pass each; these
    passes write over each other behind the prompt.
    """
    first = log_softmax(logits)  # [rows, V]
    scores: FloatArray = np.stack([first[:, ids[0]] for ids in labels], axis=1)
    for index, ids in enumerate(labels):
        if len(ids) > 1:
            out = generation.extend(ids[:-1], len(generation.prompt))["logits"]  # [rows, len - 1, V]
            rest = log_softmax(np.asarray(out, np.float32))
            scores[:, index] += sum(rest[:, i, token] for i, token in enumerate(ids[1:]))
    return scores


def stream(
    generation: Generation, logits: FloatArray, sampler: Sampler, *, stop: int, limit: int
) -> Iterator[tuple[int, FloatArray]]:
    """Tokens of a single-row generation, each with the logits [V] that it was chosen from, up to the stop token."""
    position = len(generation.prompt)
    for count in range(limit):
        token = sampler.pick(logits)
        if token == stop:
            return
        yield token, logits
        if count + 1 < limit:
            logits = np.array(generation.extend([token], position + count)["logits"][0, 0], np.float32)
