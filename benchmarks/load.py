"""Load: closed loops (so many askers, each with one request under way) and open loops (requests sent by the clock)."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mosear.errors import BusyError, MosearError
from mosear.runtime.pipeline import Event, Words
from mosear.runtime.request import Answer

RETRY_S = 0.5  # from a refusal as busy to the next try
Ask = Callable[[], Iterable[Event]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Timed:
    """One answered request. Seconds are those of time.perf_counter."""

    start_s: float
    words_s: tuple[float, ...]
    end_s: float
    answer: Answer

    @property
    def first_token_ms(self) -> float:
        return (self.words_s[0] - self.start_s) * 1e3

    @property
    def gaps_ms(self) -> list[float]:
        """Between one event of words and the next: a token each, but where a character takes several."""
        return [(after - before) * 1e3 for before, after in zip(self.words_s, self.words_s[1:])]

    @property
    def total_ms(self) -> float:
        return (self.end_s - self.start_s) * 1e3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Load:
    """What came of a loop. failed: by kind, every refused try counted.

    Rates hold for a window, so that neither the rise nor the end of the load counts: from the end of answer number `rise`
    (0: the begin; at most half of them) to `full_s`, when there was nothing left to begin (or the last answer, where that
    came earlier or none came in time). A request counts with the share of its time that lies in the window: those of a
    closed loop end in waves, and a window that counts ends takes one wave more or less.
    """

    answered: Sequence[Timed]
    failed: Counter[str]
    begun_s: float
    full_s: float
    rise: int
    late_ms: float = 0.0  # open loop: the most that a request was sent behind the clock

    @property
    def steady(self) -> list[Timed]:
        """Those answered while the load was whole (all, if none was), as they ended."""
        done = sorted(self.answered, key=lambda timed: timed.end_s)
        return [timed for timed in done if timed.end_s <= self.full_s] or done

    @property
    def window_s(self) -> tuple[float, float]:
        """Begin and end of what the rates hold for."""
        rise = min(self.rise, len(self.steady) // 2)
        last = max(timed.end_s for timed in self.answered)
        in_time = self.steady[-1].end_s <= self.full_s
        return self.steady[rise - 1].end_s if rise else self.begun_s, min(self.full_s, last) if in_time else last

    @property
    def seconds(self) -> float:
        start_s, end_s = self.window_s
        return end_s - start_s

    @property
    def counted(self) -> float:
        """Requests in the window."""
        return sum(self._share(timed) for timed in self.answered)

    @property
    def requests_s(self) -> float:
        return self.counted / self.seconds

    @property
    def tokens_s(self) -> float:
        return sum(self._share(timed) * timed.answer.tokens for timed in self.answered) / self.seconds

    def _share(self, timed: Timed) -> float:
        start_s, end_s = self.window_s
        return max(0.0, min(timed.end_s, end_s) - max(timed.start_s, start_s)) / (timed.end_s - timed.start_s)

    @property
    def tries(self) -> int:
        return len(self.answered) + self.failed.total()

    @property
    def busy_share(self) -> float:
        return self.failed[BusyError.__name__] / self.tries if self.tries else 0.0


def time_events(events: Iterable[Event], start_s: float | None = None) -> Timed:
    """Hear a request to its end. start_s: when it should have begun (None: now); raises what the stream raises."""
    start_s, words, found = time.perf_counter() if start_s is None else start_s, [], None
    for event in events:
        now = time.perf_counter()
        if isinstance(event, Words):
            words.append(now)
        elif isinstance(event, Answer):
            # The stream is heard to its very end: leaving it here would cancel a call that is over but for its status.
            found = Timed(start_s=start_s, words_s=tuple(words), end_s=now, answer=event)
    assert found is not None, "a stream ends with its answer"
    return found


def closed_loop(asks: Sequence[Ask], *, requests: int, limit_s: float) -> Load:
    """Each asker in a thread, until so many requests are answered or given up, or `limit_s` is over.

    One refused as busy is tried again after RETRY_S; any other failure gives its request up. The load is whole until the
    first asker has nothing left to begin, and has risen when as many answers came as there are askers.
    """
    left, lock = [requests], threading.Lock()
    answered: list[Timed] = []
    failed: Counter[str] = Counter()
    start_s = time.perf_counter()

    def work(ask: Ask) -> float:
        while time.perf_counter() - start_s < limit_s:
            with lock:
                if not left[0]:
                    break
                left[0] -= 1
            try:
                timed = time_events(ask())
            except MosearError as error:
                busy = isinstance(error, BusyError)
                with lock:
                    failed[type(error).__name__] += 1
                    left[0] += busy
                time.sleep(RETRY_S if busy else 0)
            else:
                with lock:
                    answered.append(timed)
        return time.perf_counter()

    with ThreadPoolExecutor(len(asks)) as pool:
        full_s = min(pool.map(work, asks))
    return Load(answered=answered, failed=failed, begun_s=start_s, full_s=full_s, rise=len(asks))


def arrivals(rate_hz: float, *, count: int, limit_s: float, seed: int) -> list[float]:
    """Seconds from the start at which requests of a Poisson process arrive: at most `count`, none after `limit_s`."""
    times = np.random.default_rng(seed).exponential(1 / rate_hz, count).cumsum()
    return [float(time_s) for time_s in times if time_s <= limit_s]


def open_loop(ask: Ask, times: Sequence[float]) -> Load:
    """A request at each of these seconds, whatever became of those before; none is tried again.

    A request's time begins when it should have been sent. The window is from the begin to the last answer.
    """
    failed: Counter[str] = Counter()
    start_s, late_s = time.perf_counter(), 0.0

    def work(due_s: float) -> Timed | str:
        try:
            return time_events(ask(), due_s)
        except MosearError as error:
            return type(error).__name__

    with ThreadPoolExecutor(max(1, len(times))) as pool:
        futures = []
        for moment in times:
            time.sleep(max(0.0, start_s + moment - time.perf_counter()))
            late_s = max(late_s, time.perf_counter() - start_s - moment)
            futures.append(pool.submit(work, start_s + moment))
        outcomes = [future.result() for future in futures]
    failed.update(kind for kind in outcomes if isinstance(kind, str))
    answered = [timed for timed in outcomes if isinstance(timed, Timed)]
    full_s = time.perf_counter()
    return Load(
        answered=answered, failed=failed, begun_s=start_s, full_s=full_s, rise=0, late_ms=late_s * 1e3
    )  # fmt: skip
