"""The requests that are in the decoder: one reads its prompt while others decode.

Rows 0 to n of the cache decode, one token each and step. Behind them at most one request reads its prompt, in chunks
while others decode. Where a row ends, the last decoding one moves into its place.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from mosear.backends.session import Backend
from mosear.config import ModelConfig, Route
from mosear.errors import EngineError, MosearError
from mosear.recipe import CAPACITY_STEP
from mosear.runtime.decode import Prefilled, Scored, Token
from mosear.runtime.prompt import TEXT, Task
from mosear.runtime.sampling import FloatArray, log_softmax
from mosear.runtime.slots import Slots, embed, embedded, finite
from mosear.runtime.ticket import Ticket

log = logging.getLogger(__name__)

# Prompt rows read between two decode steps, for each row that decodes and once more. On two cores an int8 step takes 16 ms
# for one row and 31 ms for eight, reading 16 rows 44 ms and 64 rows 109 ms: a token comes less than five times as late
# beside a prompt that is being read as it does without (measured p99 over median: 4.0 with one row, 4.2 with four).
ROWS_PER_WRITER = 6


class Reading:
    """A request whose prompt is being read, or whose labels are being scored, in rows `first` and following."""

    def __init__(self, ticket: Ticket, first: int) -> None:
        self.ticket, self.first = ticket, first
        self.hidden: FloatArray = np.zeros((0, 0), np.float32)  # [S, d]
        self.done = 0  # prompt positions read
        self.gates: FloatArray | None = None  # [G, E], sums over the positions read
        self.scores: FloatArray | None = None  # [rows, labels]
        self.unscored: list[int] = []  # labels of which `scores` holds the first token's alone

    @property
    def end(self) -> int:
        """The first row behind it."""
        return self.first + self.ticket.rows


class Batch:
    """Requests in rows of one cache. Not for several threads at once."""

    def __init__(
        self, backend: Backend, config: ModelConfig, slots: Slots, *, labels: Sequence[Sequence[int]], stop: int,
        prefill_rows: int,
    ) -> None:  # fmt: skip
        self.backend, self.config, self.slots = backend, config, slots
        self.labels, self.stop, self.prefill_rows = labels, stop, prefill_rows
        self.first_tokens = [ids[0] for ids in labels]
        self.decoding: list[Ticket] = []  # by row
        self.reading: Reading | None = None
        self.tokens_read = self.tokens_written = 0

    @property
    def active(self) -> list[Ticket]:
        reading = self.reading  # read once: other threads ask how busy this is
        return [*self.decoding, *([reading.ticket] if reading else [])]

    @property
    def rows_used(self) -> int:
        return sum(ticket.rows for ticket in self.active)

    def takes(self, ticket: Ticket) -> bool:
        """Whether it can be admitted now."""
        return self.reading is None and len(self.decoding) + ticket.rows <= self.slots.count

    def admit(self, ticket: Ticket) -> None:
        """Let it read its prompt from the next step on."""
        ticket.admitted = True
        reading = self.reading = Reading(ticket, len(self.decoding))
        with self._alone(ticket):
            reading.hidden = embedded(self.backend, ticket.work)
            self._fit(used=reading.first)
            self.slots.open(reading.first, ticket.work)

    def step(self) -> None:
        """Read a piece of a prompt, then decode a token of every row that decodes.

        A failure of the backend amid the decoding ends all requests with EngineError and empties the cache.
        """
        try:
            if self.reading is not None:
                with self._alone(self.reading.ticket):
                    self._read(self.reading)
            if self.decoding:
                self._decode()
        except Exception as error:  # whatever a backend raises: no caller may wait for ever
            log.exception("a decoder step failed")
            for ticket in self.active:
                self.end(ticket, _failure(error))
            self.slots.drop()

    def end(self, ticket: Ticket, error: MosearError | None = None) -> None:
        """Free its rows, and tell it so."""
        reading = self.reading if self.reading and self.reading.ticket is ticket else None
        row = reading.first if reading else self.decoding.index(ticket)
        if isinstance(error, EngineError):
            self.slots.clear(row, ticket.rows)
        if reading:
            self.reading = None
        else:
            last = self.decoding.pop()
            if last is not ticket:
                self.slots.move(len(self.decoding), row)
                self.decoding[row] = last
        ticket.end(error)

    def _read(self, reading: Reading) -> None:
        if reading.done < len(reading.hidden):
            self._read_prompt(reading)
        else:
            self._read_label(reading)

    def _read_prompt(self, reading: Reading) -> None:
        """A piece of it: all, where nobody waits for a token or gates are means over the prompt."""
        ticket, count = reading.ticket, len(reading.hidden) - reading.done
        if self.decoding and self.config.mose.route is Route.TOKEN:
            most = min(self.prefill_rows, ROWS_PER_WRITER * (1 + len(self.decoding)))
            count = min(count, max(1, most // ticket.rows))
        piece = slice(reading.done, reading.done + count)
        hidden, group = reading.hidden[piece], ticket.work.group[piece]
        out = self.slots.run(reading.first, np.broadcast_to(hidden, (ticket.rows, *hidden.shape)), group)
        logits = finite(np.array(out["logits"][:, -1], np.float32))  # [rows, V]
        weights = np.asarray(out["expert_weights"][0], np.float32).mean(0)  # [S, E]
        if reading.gates is None:
            reading.gates = np.zeros((len(self.config.groups), weights.shape[1]), np.float32)
        np.add.at(reading.gates, group, weights)
        reading.done += count
        self.tokens_read += count
        if reading.done == len(reading.hidden):
            masses = (np.asarray(out[name][0, :, :, -1], np.float32).mean(1) for name in ("mass_before", "mass_after"))
            positions = np.bincount(ticket.work.group, minlength=len(reading.gates))[:, None].clip(min=1)
            experts = (reading.gates / positions).astype(np.float32)
            ticket.say(Prefilled(mass=np.stack(list(masses), axis=1), experts=experts))
            self._begin(reading, logits)

    def _begin(self, reading: Reading, logits: FloatArray) -> None:
        """The prompt was read: write, or score labels, from its last logits [rows, V]."""
        ticket = reading.ticket
        if ticket.work.task is Task.REASON:
            self.slots.move(reading.first, len(self.decoding))
            self.decoding.append(ticket)
            self.reading = None
            self._choose(ticket, logits[0])
            return
        reading.scores = log_softmax(logits)[:, self.first_tokens]
        reading.unscored = [index for index, ids in enumerate(self.labels) if len(ids) > 1]
        self._say_scores(reading)

    def _read_label(self, reading: Reading) -> None:
        """One label of several tokens, written over the one before."""
        assert reading.scores is not None
        index = reading.unscored.pop(0)
        ids = self.labels[index]
        hidden = embed(self.backend, [ids[:-1]] * reading.ticket.rows)
        group = np.full(len(ids) - 1, TEXT, np.int32)
        out = self.slots.run(reading.first, hidden, group, wanted=len(group), keep=False)
        rest = log_softmax(finite(np.asarray(out["logits"], np.float32)))  # [rows, len - 1, V]
        reading.scores[:, index] += sum(rest[:, i, token] for i, token in enumerate(ids[1:]))
        self._say_scores(reading)

    def _say_scores(self, reading: Reading) -> None:
        if not reading.unscored:
            assert reading.scores is not None
            reading.ticket.say(Scored(scores=reading.scores))
            self.end(reading.ticket)

    def _decode(self) -> None:
        self._fit(used=self.reading.end if self.reading else len(self.decoding))
        hidden = embed(self.backend, [[ticket.last] for ticket in self.decoding])  # [n, 1, d]
        logits = self.slots.run(0, hidden, np.full(1, TEXT, np.int32))["logits"]  # [n, 1, V]
        for ticket, row in zip(list(self.decoding), np.asarray(logits[:, 0], np.float32)):
            with self._alone(ticket):
                self._choose(ticket, row)

    def _choose(self, ticket: Ticket, logits: FloatArray) -> None:
        """The next token of a row that decodes, from logits [V]."""
        allowed = finite(logits)
        if ticket.written < ticket.work.min_tokens:
            allowed = logits.copy()
            allowed[self.stop] = -np.inf
        token = ticket.sampler.pick(allowed)
        if token == self.stop:
            self.end(ticket)
            return
        ticket.last = token
        ticket.written += 1
        self.tokens_written += 1
        named = token in self.first_tokens
        ticket.say(Token(id=token, scores=log_softmax(logits)[self.first_tokens] if named else None))
        if ticket.written == ticket.work.max_tokens:
            self.end(ticket)

    def _fit(self, *, used: int) -> None:
        """Before a call: room for the positions that it writes; and for more, as most answers end before max_tokens."""
        now, soon = (max(ticket.need(ahead) for ticket in self.active) for ahead in (0, CAPACITY_STEP))
        self.slots.fit(now, soon, rows=used)

    @contextmanager
    def _alone(self, ticket: Ticket) -> Iterator[None]:
        """An error in what is done for one request ends that one alone."""
        try:
            yield
        except MosearError as error:
            self.end(ticket, error)
        except Exception as error:  # whatever a backend raises
            log.exception("a request failed in the decoder")
            self.end(ticket, _failure(error))


def _failure(error: Exception) -> EngineError:
    return EngineError(f"the decoder failed, and the request with it: {error}: send it again")
