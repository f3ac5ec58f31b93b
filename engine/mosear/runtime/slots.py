"""Rows of one cache, and what the decoder is told of each: length, groups, settings and gates."""

from typing import Any

import numpy as np
import numpy.typing as npt

from mosear.backends.session import Backend
from mosear.config import ModelConfig, Route
from mosear.contract import EMBEDDING, HOLES, Tensors
from mosear.errors import EngineError, RequestError
from mosear.recipe import CAPACITY_STEP
from mosear.runtime.decode import IntArray, Work
from mosear.runtime.encode import project
from mosear.runtime.sampling import FloatArray


class Slots:
    """A pool of cache rows. Calls run on neighbouring rows; each row has a prompt and settings of its own."""

    def __init__(self, backend: Backend, config: ModelConfig, *, count: int) -> None:
        groups, mose = len(config.groups), config.mose
        self.backend, self.count = backend, count
        self.cache = backend.start(batch=count, capacity=CAPACITY_STEP)
        self.capacity = CAPACITY_STEP
        self.length = np.zeros(count, np.int32)  # positions filled
        self.first_row, self.strength = np.zeros(count, np.int32), np.zeros(count, np.float32)
        self.bias = np.zeros((count, groups), np.float32)
        self.key_group = np.zeros((count, CAPACITY_STEP), np.int32)
        self.gates: FloatArray | None = None
        if mose.route is Route.MODALITY:
            adapted = config.backbone.layers * len(mose.targets)
            self.gates = np.full((count, adapted, groups, mose.experts), -1, np.float32)

    def open(self, first: int, work: Work) -> None:
        """Give the rows from `first` on, one for each of work.muted, to a prompt that is still to be read."""
        block = slice(first, first + len(work.muted))
        self.length[block], self.first_row[block], self.strength[block] = 0, len(work.ids) - 1, work.strength
        self.key_group[block] = 0  # what is written behind a prompt is text
        self.key_group[block, : len(work.ids)] = work.group
        self.bias[block] = 0
        for row, muted in enumerate(work.muted, first):
            self.bias[row, list(muted)] = -np.inf
        if self.gates is not None:
            self.gates[block] = -1

    def run(self, first: int, hidden: FloatArray, group: IntArray, *, wanted: int = 1, keep: bool = True) -> Tensors:
        """Run hidden [B, S, d] of groups [S] on rows first to first + B, each behind what it has.

        Logits are those of the last `wanted` positions. Not to keep means that the next call writes over this one.
        """
        batch, count = hidden.shape[:2]
        block = slice(first, first + batch)
        position = self.length[block, None] + np.arange(count, dtype=np.int32)  # [B, S]
        tensors: Tensors = {
            "hidden": hidden,
            "position": position,
            "group": np.broadcast_to(group, (batch, count)),
            "key_group": self.key_group[block],
            "key_length": position[:, -1] + np.int32(1),
            "first_row": self.first_row[block],
            "strength": self.strength[block],
            "group_bias": self.bias[block],
            "logit_row": np.broadcast_to(np.arange(count - wanted, count, dtype=np.int32), (batch, wanted)),
        }
        if self.gates is not None:
            tensors["gate_state"] = self.gates[block]
        outputs = self.cache.step(tensors, first=first)
        if self.gates is not None:
            self.gates[block] = outputs["gate_state_out"]
        if keep:
            self.length[block] += count
        return outputs

    def move(self, source: int, target: int) -> None:
        """Let row `target` go on in the place of row `source`."""
        if source == target:
            return
        self.cache.move(source, target, int(self.length[source]))
        rows: tuple[npt.NDArray[Any], ...] = (  # Any: floats and integers
            self.length, self.first_row, self.strength, self.bias, self.key_group,
            *(() if self.gates is None else (self.gates,)),
        )  # fmt: skip
        for array in rows:
            array[target] = array[source]

    def clear(self, first: int, rows: int) -> None:
        """Zero rows whose keys or values may not be finite: the next prompt there would meet them (0 * nan is nan)."""
        for row in range(first, first + rows):
            self.cache.clear(row)

    def drop(self) -> None:
        """Forget the cache after a failure: the next `fit` makes a new one."""
        self.capacity = 0

    def fit(self, end: int, need: int, *, rows: int) -> None:
        """Make the capacity right for positions below `end` now and `need` soon; the first `rows` rows are in use.

        The decoder's time grows with the capacity, filled or not: it is the smallest multiple of CAPACITY_STEP that does.

        It grows only when it must, and shrinks where it is more than twice what is needed, or nothing would be copied.
        """
        target = -(-need // CAPACITY_STEP) * CAPACITY_STEP
        if self.capacity >= end and self.capacity <= 2 * target and (rows or self.capacity == target):
            return
        length = min(int(self.length[:rows].max(initial=0)), target)  # a row that was given up may be longer
        self.cache.resize(target, rows=rows, length=length)
        groups = np.zeros((self.count, target), np.int32)
        kept = min(target, self.key_group.shape[1])  # a prompt's groups are known before its keys are there
        groups[:rows, :kept] = self.key_group[:rows, :kept]
        self.key_group, self.capacity = groups, target


def embedded(backend: Backend, work: Work) -> FloatArray:
    """The prompt [S, d], projected features in their places.

    Raises RequestError where a field's features are not finite or not as many as its places.
    """
    unknown = set(work.features) - set(HOLES)
    if unknown or work.ids.min() < min(HOLES.values()):
        raise RequestError(f"the prompt has places or features of none of {', '.join(HOLES)}: use the prompt builder")
    hidden = np.array(embed(backend, work.ids.clip(min=0)[None])[0])
    given = {field: values for field, values in work.features.items() if values.size}
    for field, values in given.items():
        if not np.isfinite(values).all():
            raise RequestError(f"{field}_features holds values that are not finite: send what the encoder gave")
    tokens = project(backend, given)
    for field, hole in HOLES.items():
        places, count = work.ids == hole, len(tokens.get(field, ()))
        if count != places.sum():
            raise RequestError(
                f"the prompt has {places.sum()} places for {field} and its features make {count} tokens: send as many"
            )
        if count:
            hidden[places] = tokens[field]
    return hidden


def embed(backend: Backend, ids: npt.ArrayLike) -> FloatArray:
    """Hidden states [B, S, d] of token ids [B, S]."""
    return np.asarray(backend.run(EMBEDDING, {"token_ids": np.asarray(ids, np.int32)})["hidden"], np.float32)


def finite(logits: FloatArray) -> FloatArray:
    """These logits; raises EngineError where some are not finite."""
    if not np.isfinite(logits).all():
        raise EngineError("the decoder's logits are not finite: the features lie far outside what the encoders give")
    return logits
