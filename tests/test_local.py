"""The decoder's door: what is said comes through, who hangs up has cancelled, and nobody waits for one that died."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Client
from pathlib import Path

import numpy as np
import pytest

from mosear.errors import BusyError, CancelledError, EngineError, MosearError, RequestError, ServingError
from mosear.runtime.decode import Prefilled, Said, Scored, Token, Work
from mosear.runtime.prompt import Task
from mosear.runtime.ticket import Listener, Ticket
from mosear.serving.local import Door, LocalDecoder, door_of

EVENTS = (
    Prefilled(mass=np.arange(12, dtype=np.float32).reshape(2, 2, 3), experts=np.ones((3, 2), np.float32)),
    Token(id=7, scores=np.float32([0.5, 0.25])),
    Token(id=8),
    Scored(scores=np.eye(2, dtype=np.float32)),
)


def work(tokens: int = 1) -> Work:
    ids = np.arange(5, dtype=np.int32)
    features = {"voice": np.full((1, 4), 0.5, np.float32)}
    return Work(
        ids=ids, group=np.zeros(5, np.int32), features=features, task=Task.REASON, strength=0.5, max_tokens=tokens
    )


Decode = Callable[[Ticket], MosearError | None]


class Hall:
    """Behind a door: each piece of work in a thread of its own, decoded as the test wants."""

    def __init__(self, decode: Decode) -> None:
        self.decode, self.tickets = decode, list[Ticket]()

    def submit(self, given: Work, listener: Listener) -> Ticket:
        ticket = Ticket(given, listener, room=1)
        self.tickets.append(ticket)
        threading.Thread(target=lambda: ticket.end(self.decode(ticket))).start()
        return ticket


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[Decode], tuple[Hall, LocalDecoder]]]:
    doors = []

    def make(decode: Decode) -> tuple[Hall, LocalDecoder]:
        hall, path = Hall(decode), tmp_path / "private" / "decoder"
        doors.append(Door(path, hall.submit))
        return hall, LocalDecoder(path)

    yield make
    for door in doors:
        door.close()
    assert not (tmp_path / "private").exists()


def say_all(ticket: Ticket) -> None:
    for event in EVENTS:
        ticket.say(event)


def same(found: Said, wanted: Said) -> bool:
    fields = wanted.__slots__  # type: ignore[union-attr]
    return type(found) is type(wanted) and all(
        np.array_equal(getattr(found, name), getattr(wanted, name)) for name in fields
    )


def test_work_and_events_come_through_whole(opened: Callable[[Decode], tuple[Hall, LocalDecoder]]) -> None:
    hall, decoder = opened(say_all)
    found = list(decoder.decode(work()))
    assert len(found) == len(EVENTS) and all(map(same, found, EVENTS))
    given = hall.tickets[0].work
    assert (given.task, given.strength) == (Task.REASON, 0.5)
    np.testing.assert_array_equal(given.features["voice"], work().features["voice"])


def test_many_at_once_hear_their_own(opened: Callable[[Decode], tuple[Hall, LocalDecoder]]) -> None:
    def decode(ticket: Ticket) -> None:
        for _ in range(200):
            ticket.say(Token(id=ticket.work.max_tokens))

    _, decoder = opened(decode)
    with ThreadPoolExecutor(16) as pool:
        heard = pool.map(lambda i: [event.id for event in decoder.decode(work(i))], range(1, 65))
        assert list(heard) == [[i] * 200 for i in range(1, 65)]


@pytest.mark.parametrize("kind", [RequestError, BusyError, CancelledError])
def test_an_error_ends_the_answer(
    opened: Callable[[Decode], tuple[Hall, LocalDecoder]], kind: type[MosearError]
) -> None:
    def decode(ticket: Ticket) -> MosearError:
        ticket.say(EVENTS[1])
        return kind("said why: é")

    answer = opened(decode)[1].decode(work())
    assert same(next(answer), EVENTS[1])
    with pytest.raises(kind, match="said why: é"):
        next(answer)


def test_work_that_is_refused(opened: Callable[[Decode], tuple[Hall, LocalDecoder]]) -> None:
    _, decoder = opened(say_all)

    def refuse(given: Work, listener: Listener) -> Ticket:
        raise BusyError("8 requests wait")

    door = Door(decoder.path.with_name("other"), refuse)
    with pytest.raises(BusyError, match="8 requests wait"):
        next(LocalDecoder(door.path).decode(work()))
    door.close()


def test_who_hangs_up_has_cancelled(opened: Callable[[Decode], tuple[Hall, LocalDecoder]]) -> None:
    def decode(ticket: Ticket) -> MosearError:
        while not ticket.withdrawn:
            ticket.say(EVENTS[2])
            time.sleep(0.001)
        return CancelledError("withdrawn")

    hall, decoder = opened(decode)
    answer = decoder.decode(work())
    next(answer)
    answer.close()
    end = time.monotonic() + 2
    while not hall.tickets[0].withdrawn:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert same(next(decoder.decode(work())), EVENTS[2])


def test_a_caller_that_says_nothing_or_leaves_costs_nobody_else(
    opened: Callable[[Decode], tuple[Hall, LocalDecoder]],
) -> None:
    _, decoder = opened(say_all)
    Client(str(decoder.path), "AF_UNIX").close()
    with Client(str(decoder.path), "AF_UNIX"):
        assert len(list(decoder.decode(work()))) == len(EVENTS)


DIES = """
import sys, time, threading
from pathlib import Path
from mosear.serving.local import Door
from mosear.runtime.decode import Token
from mosear.runtime.ticket import Ticket

def submit(work, listener):
    ticket = Ticket(work, listener, room=1)
    ticket.say(Token(id=1))
    return ticket

Door(Path(sys.argv[1]), submit)
print("open", flush=True)
time.sleep(60)
"""


def test_a_decoder_that_is_killed_is_noticed_at_once_and_can_come_back(tmp_path: Path) -> None:
    path = tmp_path / "private" / "decoder"
    command = [sys.executable, "-c", DIES, str(path)]
    for _ in range(2):  # the second finds the socket of the first
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout
            assert process.stdout.readline() == b"open\n"
            answer = LocalDecoder(path).decode(work())
            assert next(answer).id == 1  # type: ignore[union-attr]
            os.kill(process.pid, signal.SIGKILL)
            with pytest.raises(EngineError, match="process died"):
                next(answer)
        with pytest.raises(ServingError, match="does not listen"):
            next(LocalDecoder(path).decode(work()))


def test_a_folder_that_others_can_open_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    with pytest.raises(ServingError, match="not a folder of this user alone"):
        Door(folder / "decoder", Hall(say_all).submit)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ServingError, match="not a folder of this user alone"):
        Door(tmp_path / "link" / "decoder", Hall(say_all).submit)
    with pytest.raises(ServingError, match="let TMPDIR name a folder"):
        Door(tmp_path / "file" / "not there" / "decoder", Hall(say_all).submit)


def test_the_place_may_have_a_long_name(tmp_path: Path) -> None:
    door = Door(tmp_path / ("long" * 40) / "decoder", Hall(say_all).submit)
    assert len(list(LocalDecoder(door.path).decode(work()))) == len(EVENTS)
    door.close()
    assert not door.path.parent.exists()


def test_each_server_has_its_own_place() -> None:
    assert len({door_of(1, "decoder"), door_of(2, "decoder"), door_of(1, "other")}) == 3
