"""The decoder's state over a plan: calls as the contract has them, cut to what the plan's two profiles take.

A plan has a prefill profile and one for a single row. Where its reallocation is of a call's last row alone (mechanisms =
operators), rows at or after `first_row` enter one by one; else only the profile's rows and batch cut a call.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mosear.backends.onnxruntime_cpu import check
from mosear.backends.tensorrt_plans import KINDS, Array, Plan, to_plan
from mosear.config import ModelConfig, Route
from mosear.contract import Part, Tensors
from mosear.errors import EngineError

PREFILL, DECODE = 0, 1
Call = Mapping[str, Array]  # the contract's inputs without cache and heads
BY_ROW = ("hidden", "position", "group")  # inputs with an axis S


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Columns start to stop of a call, for all its sequences."""

    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


class PlanDecoder:
    """A cache of some rows in the GPU's memory, of the plan's capacity whatever is asked for."""

    def __init__(
        self, plan: Plan, part: Part, config: ModelConfig, *, heads: dict[str, int], batch: int, capacity: int
    ) -> None:
        self.plan, self.part, self.config, self.heads, self.batch = plan, part, config, heads, batch
        cache = plan.shape(part.state[0][0])  # [-1, K, L, D]
        self.slots = cache[2]
        self.most = {profile: plan.most("position", profile) for profile in (PREFILL, DECODE)}  # [B, S]
        self.most_wanted = plan.most("logit_row", PREFILL)[1]
        self.last_row_alone = plan.shape("mass_before")[3] == 1
        self._check_capacity(capacity)
        if batch > self.most[DECODE][0]:
            raise EngineError(
                f"{batch} sequences are wanted at once, the plan takes {self.most[DECODE][0]}: raise tensorrt.decode_batch "
                "in the recipe, or lower the slots"
            )
        self.row_bytes = KINDS[plan.kinds[part.state[0][0]]].itemsize * int(np.prod(cache[1:]))
        self.cache = plan.hold({name: (batch, *cache[1:]) for name, _ in part.state})

    def step(self, tensors: Tensors, *, first: int = 0) -> Tensors:
        """As `session.DecoderState` says. Of masses, rows that are not reallocated are zeros where the plan gives one row."""
        position = tensors["position"]
        check(self.part, {**tensors, **self._example(tensors)})
        pieces = list(self._pieces(tensors))
        if len(pieces) > 1 and self.config.mose.route is Route.MODALITY and pieces[0].rows > 1 and pieces[1].rows > 1:
            raise EngineError(
                f"a prompt of {position.shape[1]} rows must enter in one call with route = modality: raise "
                f"tensorrt.prefill_rows (now {self.most[PREFILL][1]})"
            )
        found: Tensors = {}
        for piece in pieces:
            profile = DECODE if piece.rows == 1 else PREFILL
            most = self.most[profile][0]
            for at in range(0, len(position), most):
                block = slice(at, at + most)
                part = {name: value[block] for name, value in tensors.items()}
                self._place(found, tensors, part, piece, block, self._run(part, piece, profile, first + at))
            if "gate_state_out" in found:
                tensors = {**tensors, "gate_state": found["gate_state_out"]}
        return found

    def write(self, cache: Tensors) -> None:
        """Fill the first positions of each row: [rows, K, positions, D] by the contract's names."""
        kinds = self.plan.kinds
        for name, value in cache.items():
            _, heads, length, width = value.shape
            whole = np.zeros((self.batch, heads, self.slots, width), KINDS[kinds[name]])
            whole[: len(value), :, :length] = to_plan(value, kinds[name])
            self.plan.driver.upload(self.cache[name], whole)
            self.plan.driver.wait()

    def move(self, source: int, target: int, length: int) -> None:
        for (
            address
        ) in self.cache.values():  # all of a row: one copy, where `length` positions are a strip for each head
            self.plan.driver.copy(address + target * self.row_bytes, address + source * self.row_bytes, self.row_bytes)

    def clear(self, row: int) -> None:
        for address in self.cache.values():
            self.plan.driver.zero(address + row * self.row_bytes, width=self.row_bytes)

    def resize(self, capacity: int, *, rows: int, length: int) -> None:
        """The memory stays: what lies behind becomes zeros."""
        self._check_capacity(capacity)
        heads = self.plan.shape(self.part.state[0][0])[1]
        strip = self.row_bytes // heads  # all positions of one head
        kept = strip // self.slots * length
        for address in self.cache.values():
            self.plan.driver.zero(address + kept, width=strip - kept, height=rows * heads, pitch=strip)
            self.plan.driver.zero(address + rows * self.row_bytes, width=(self.batch - rows) * self.row_bytes)

    def close(self) -> None:
        for address in self.cache.values():
            self.plan.driver.free(address)
        self.cache = {}

    def _check_capacity(self, capacity: int) -> None:
        if capacity > self.slots:
            raise EngineError(
                f"{capacity} cache slots are wanted, the plan has {self.slots}: raise tensorrt.capacity in the recipe"
            )

    def _example(self, tensors: Tensors) -> Tensors:
        """Stands for the cache where a call's shapes are checked: no memory, one element seen everywhere."""
        kinds = {spec.name: spec for spec in self.part.inputs}
        sizes = {"B": len(tensors["position"]), "L": tensors["key_group"].shape[1]}
        made: Tensors = {}
        for name, _ in self.part.state:
            shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in kinds[name].axes)
            made[name] = np.broadcast_to(np.zeros((), kinds[name].dtype.numpy), shape)
        return made

    def _pieces(self, tensors: Call) -> Iterator[Piece]:
        position, rows = tensors["position"], tensors["position"].shape[1]
        together = rows
        if self.last_row_alone:
            reallocated = int((tensors["first_row"] - position[:, 0]).min())  # first column that may be reallocated
            together = min(rows, max(0, reallocated) + 1)
        at = 0
        while at < together:
            stop = min(at + self.most[PREFILL][1], together)
            while _wanted_in(tensors["logit_row"], at, stop).sum(1).max() > self.most_wanted:
                stop -= 1
            yield Piece(start=at, stop=stop)
            at = stop
        for at in range(together, rows):
            yield Piece(start=at, stop=at + 1)

    def _run(self, tensors: Call, piece: Piece, profile: int, first: int) -> Tensors:
        """One call of the plan, on cache rows from `first` on."""
        live = (tensors["position"] >= 0).sum(1)  # [B]
        late = live <= piece.start  # sequences that have no row here do their last one again: it writes what is there
        columns = np.tile(np.arange(piece.start, piece.stop), (len(live), 1))
        columns[late] = live[late, None] - 1
        given = dict(tensors)
        for name in BY_ROW:
            index = columns if tensors[name].ndim == 2 else columns[..., None]
            given[name] = np.take_along_axis(np.asarray(tensors[name]), index, axis=1)
        given["position"][late, 1:] = -1
        given["key_length"] = (given["position"].max(1) + 1).astype(np.int32)
        given["logit_row"] = self._wanted(tensors, piece)
        groups = np.zeros((len(live), self.slots), np.int32)
        groups[:, : tensors["key_group"].shape[1]] = tensors["key_group"]
        given["key_group"] = groups
        held = dict(self.heads)
        for name, output in self.part.state:
            held[name] = held[output] = self.cache[name] + first * self.row_bytes
        shapes = {name: (len(live), *self.plan.shape(name)[1:]) for name, _ in self.part.state}
        return self.plan.run(
            {n: v for n, v in given.items() if n in self.plan.inputs}, profile=profile, held=held, shapes=shapes
        )

    def _wanted(self, tensors: Call, piece: Piece) -> NDArray[np.int32]:
        """Rows of the piece whose logits are fetched, the same number for each sequence: at least one."""
        wanted = tensors["logit_row"]
        here = _wanted_in(wanted, piece.start, piece.stop)
        count = max(1, int(here.sum(1).max()))
        rows = np.zeros((len(wanted), count), np.int32)
        for b, chosen in enumerate(here):
            rows[b, : chosen.sum()] = wanted[b, chosen] - piece.start
        return rows

    def _place(self, found: Tensors, whole: Call, part: Call, piece: Piece, block: slice, outputs: Tensors) -> None:
        """Put a call's outputs where they belong in those of the whole step."""
        batch, rows = whole["position"].shape
        live = (part["position"] >= 0).sum(1)
        stop = np.minimum(piece.stop, live)  # [B]
        wanted = part["logit_row"]
        here = _wanted_in(wanted, piece.start, piece.stop)
        for name, value in outputs.items():
            if name == "gate_state_out":
                _into(found, name, (batch, *value.shape[1:]))[block] = value
            elif name == "logits":
                target = _into(found, name, (batch, whole["logit_row"].shape[1], value.shape[2]))[block]
                for b, chosen in enumerate(here):
                    target[b, chosen] = value[b, : chosen.sum()]
            elif name == "expert_weights" or not self.last_row_alone:
                axis = 2 if name == "expert_weights" else 3
                shape = (batch, *value.shape[1:axis], rows, *value.shape[axis + 1 :])
                target = np.moveaxis(_into(found, name, shape)[block], axis, 1)
                for b, end in enumerate(stop):
                    if end > piece.start:
                        target[b, piece.start : end] = np.moveaxis(value, axis, 1)[b, : end - piece.start]
            else:
                target = _into(found, name, (batch, *value.shape[1:3], rows, value.shape[4]))[block]
                for b, end in enumerate(stop):
                    if end > piece.start:
                        target[b, :, :, end - 1] = value[b, :, :, 0]


def _wanted_in(wanted: Array, start: int, stop: int) -> NDArray[np.bool_]:
    """Which of the rows whose logits are wanted lie in these columns, [B, Q]."""
    found: NDArray[np.bool_] = (wanted >= start) & (wanted < stop)
    return found


def _into(found: Tensors, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The whole step's output of that name, zeros where nothing was put yet."""
    if name not in found:
        found[name] = np.zeros(shape, np.float32)
    return found[name]  # type: ignore[return-value]
