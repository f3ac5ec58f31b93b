"""A request that a scheduler has taken, and who hears what becomes of it."""

import logging
from typing import Protocol

from mosear.errors import CancelledError, DeadlineError, MosearError
from mosear.runtime.decode import Said, Work
from mosear.runtime.prompt import Task
from mosear.runtime.sampling import Sampler

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Hears what is said of one request, in the thread that decodes: it must be quick."""

    def said(self, event: Said) -> None: ...

    def ended(self, error: MosearError | None) -> None:
        """The last call: the answer is complete (None), or cannot be completed."""
        ...


class Ticket:
    """A request that was taken, and how far it is."""

    def __init__(self, work: Work, listener: Listener, *, room: int) -> None:
        """`room`: how many positions may follow the prompt."""
        self.work, self.listener, self.room = work, listener, room
        self.rows = len(work.muted)  # of the cache
        self.sampler = Sampler(work.sampling)
        self.withdrawn = self.admitted = False
        self.written, self.last = 0, -1  # tokens, and the last one's id

    def cancel(self) -> None:
        """Give the request up; its rows are free within one step. From any thread, at any time."""
        self.withdrawn = True

    def need(self, ahead: int) -> int:
        """Positions that are filled when at most `ahead` more tokens are written; labels need all their room at once."""
        return len(self.work.ids) + (
            min(self.room, self.written + ahead) if self.work.task is Task.REASON else self.room
        )

    def over(self, now_s: float) -> MosearError | None:
        """Why the request may not go on."""
        if self.withdrawn:
            return CancelledError("the request was withdrawn")
        if self.work.deadline_s is None or now_s < self.work.deadline_s:
            return None
        if not self.admitted:
            return DeadlineError("the deadline passed while the request waited in the queue: allow more time")
        return DeadlineError(
            f"the deadline passed while answering, {self.written} tokens written: allow more time or ask for fewer tokens"
        )

    def say(self, event: Said) -> None:
        try:
            self.listener.said(event)
        except Exception:  # a listener's own failure must not end the others
            log.exception("a listener failed: its request is cancelled")
            self.cancel()

    def end(self, error: MosearError | None) -> None:
        try:
            self.listener.ended(error)
        except Exception:
            log.exception("a listener failed at the end of its request")
