"""Continuous batching: requests wait in a queue and are taken in between decode steps."""

import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Self

from mosear.backends.session import Backend
from mosear.config import ModelConfig
from mosear.errors import BusyError, CancelledError, MosearError, RequestError
from mosear.runtime.batch import Batch
from mosear.runtime.decode import Said, Work
from mosear.runtime.prompt import Task
from mosear.runtime.slots import Slots
from mosear.runtime.ticket import Listener, Ticket

PREFILL_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How busy a scheduler is, and what it has done. capacity: positions of each cache row, filled or not."""

    rows_used: int
    rows_free: int
    queued: int
    capacity: int
    tokens_read: int
    tokens_written: int


class Inbox(SimpleQueue[Said | MosearError | None]):
    """A listener that keeps what it hears for the thread that asked."""

    def said(self, event: Said) -> None:
        self.put(event)

    def ended(self, error: MosearError | None) -> None:
        self.put(error)


class Scheduler:
    """Runs many requests on one decoder. Until `start`, whoever waits in `decode` steps it."""

    def __init__(
        self, backend: Backend, config: ModelConfig, *, labels: Sequence[Sequence[int]], stop: int, slots: int,
        queue: int, capacity: int, prefill_rows: int = PREFILL_ROWS,
    ) -> None:  # fmt: skip
        """labels: token ids of each; stop: token that ends a reason; slots: cache rows; queue: requests that may wait;
        capacity: most positions of a row; prefill_rows: most positions times rows of a prompt that are read between two
        decode steps."""
        self.labels, self.queue_limit = labels, queue
        self.longest = min(capacity, config.backbone.max_positions)
        self._slots = Slots(backend, config, count=slots)
        self._batch = Batch(backend, config, self._slots, labels=labels, stop=stop, prefill_rows=prefill_rows)
        self._queue: deque[Ticket] = deque()
        self._closed = False
        self._wake = threading.Condition()  # guards queue and closed; no listener is called under it
        self._stepping = threading.Lock()  # guards the batch
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Step in a thread of its own from now on, whenever there is something to do."""
        assert self._thread is None, "started already"
        self._thread = threading.Thread(target=self._run, name="mosear-scheduler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, and every request with CancelledError."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if self._thread is None:
            self._end_all()
        else:
            self._thread.join()

    @property
    def load(self) -> Load:
        used = self._batch.rows_used
        return Load(
            rows_used=used, rows_free=self._slots.count - used, queued=len(self._queue), capacity=self._slots.capacity,
            tokens_read=self._batch.tokens_read, tokens_written=self._batch.tokens_written,
        )  # fmt: skip

    def submit(self, work: Work, listener: Listener) -> Ticket:
        """Queue a request. Raises RequestError where it can never be answered here, BusyError where the queue is full."""
        room = work.max_tokens if work.task is Task.REASON else max(map(len, self.labels)) - 1
        ticket = Ticket(work, listener, room=room)
        self._check(ticket)
        with self._wake:
            if self._closed:
                raise CancelledError("the engine is closed: load it again")
            if len(self._queue) >= self.queue_limit:
                raise BusyError(f"{len(self._queue)} requests wait, which is the most that may: ask again in a moment")
            self._queue.append(ticket)
            self._wake.notify()
        return ticket

    def decode(self, work: Work) -> Generator[Said]:
        """As `decode.Decoding` says; the request is queued at the first `next`."""
        inbox = Inbox()
        ticket = self.submit(work, inbox)
        try:
            while (event := self._next(inbox)) is not None:
                if isinstance(event, MosearError):
                    raise event
                yield event
        finally:
            ticket.cancel()
            # With no thread, the rows are freed here. The collector may close a generator amid a step: so no waiting.
            if self._thread is None and self._stepping.acquire(blocking=False):
                try:
                    self._end_those_over()
                finally:
                    self._stepping.release()

    def step(self) -> None:
        """End what is over, admit what waits, read a piece of a prompt, decode a token of every row that decodes."""
        with self._stepping:
            self._step()

    def _next(self, inbox: Inbox) -> Said | MosearError | None:
        while self._thread is None:
            with self._stepping:
                if inbox.empty():  # else another caller's step has brought it
                    self._step()
            try:
                return inbox.get_nowait()
            except Empty:
                pass
        return inbox.get()

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._closed or self._queue or self._batch.active)
                    if self._closed:
                        return
                self.step()
        finally:  # also where a fault of ours ends the thread: nobody may wait for ever
            with self._wake:
                self._closed = True
            self._end_all()

    def _end_all(self) -> None:
        with self._stepping:
            self._end({t: CancelledError("the engine was closed before the answer was complete") for t in self._all()})

    def _step(self) -> None:
        self._end_those_over()
        self._admit()
        self._batch.step()

    def _end_those_over(self) -> None:
        now_s = time.monotonic()
        self._end({ticket: error for ticket in self._all() if (error := ticket.over(now_s))})

    def _admit(self) -> None:
        """First come, first served: a request that needs more rows than are free holds up those behind it."""
        while True:
            with self._wake:
                if not self._queue or not self._batch.takes(self._queue[0]):
                    return
                ticket = self._queue.popleft()
            self._batch.admit(ticket)

    def _all(self) -> list[Ticket]:
        with self._wake:
            return [*self._batch.active, *self._queue]

    def _end(self, errors: dict[Ticket, MosearError]) -> None:
        """Take requests out, wherever they stand."""
        for ticket, error in errors.items():
            if ticket.admitted:
                self._batch.end(ticket, error)
            else:
                with self._wake:
                    self._queue.remove(ticket)
                ticket.end(error)

    def _check(self, ticket: Ticket) -> None:
        length, groups = len(ticket.work.ids), len(ticket.work.group)
        if not length or groups != length:
            raise RequestError(f"the prompt has {length} ids and {groups} groups: as many of both, at least one")
        if length + ticket.room > self.longest:
            raise RequestError(
                f"the prompt has {length} tokens and {ticket.room} may follow; together this engine takes "
                f"{self.longest}: shorten the prompt or lower max_tokens"
            )
        if ticket.rows > self._slots.count:
            raise RequestError(
                f"a conflict report takes {ticket.rows} rows of the cache, this engine has {self._slots.count}: "
                "ask for classify, or give the engine more slots"
            )
