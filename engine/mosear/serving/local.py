"""A server's decoder for the processes of its other models: work in, what is said of it out, over a Unix socket.

Triton's own way from model to model (a decoupled BLS call) does not bear many streams at once: in the Python backend of 24.10
a thread without the interpreter's lock frees a stream's tensors, which corrupts memory, and three threads can wait for one
another for ever (`ResponseIterator`, `response_iterator_map_`). Here nothing is shared but the socket.
"""

import logging
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

from mosear.errors import EngineError, MosearError, ServingError
from mosear.runtime.decode import Said, Work
from mosear.runtime.ticket import Listener as Hears
from mosear.runtime.ticket import Ticket

log = logging.getLogger(__name__)
FAMILY = "AF_UNIX"
WAITING = 64  # connections that are not taken yet
Submit = Callable[[Work, Hears], Ticket]


def door_of(server: int, model: str) -> Path:
    """Where the models of the server with this process number find `model`. The folder is this user's alone."""
    return Path(tempfile.gettempdir(), f"mosear-{os.getuid()}-{server}", model)


class Door:
    """Takes work at a socket until it is closed; raises ServingError where the socket cannot be made.

    One connection is one request. What is said goes back as it is, at the end None or the error. A caller that hangs up
    has cancelled.
    """

    def __init__(self, path: Path, submit: Submit) -> None:
        self.path, self.submit, self.short = path, submit, ExitStack()
        try:
            _make_private(path.parent)
            path.unlink(missing_ok=True)  # of a process that was killed
            self.listener = Listener(self.short.enter_context(_short(path)), FAMILY, WAITING)
        except OSError as error:
            raise ServingError(
                f"the decoder cannot listen at {path} ({error.strerror or error}): "
                "let TMPDIR name a folder that this user can write"
            ) from error
        threading.Thread(target=self._accept, name="mosear-door", daemon=True).start()

    def close(self) -> None:
        """Take no more work; what is under way goes on."""
        self.listener.close()
        self.short.close()
        with suppress(OSError):
            self.path.parent.rmdir()

    def _accept(self) -> None:
        while True:
            try:
                caller = self.listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(caller,), name="mosear-caller", daemon=True).start()

    def _serve(self, caller: Connection) -> None:
        with caller, suppress(EOFError, OSError):  # a caller that has hung up
            work, hears = caller.recv(), Caller(caller)
            try:
                ticket = self.submit(work, hears)
            except MosearError as error:
                caller.send(error)
                return
            with suppress(EOFError, OSError):
                caller.recv()  # callers say no more: this is the end of the connection
            ticket.cancel()
            hears.over.wait()


class Caller:
    """Passes on what the scheduler says. A caller's answer fits in the socket's buffer: sending does not wait."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.over = connection, threading.Event()

    def said(self, event: Said) -> None:
        self._send(event)

    def ended(self, error: MosearError | None) -> None:
        self._send(error)
        self.over.set()

    def _send(self, message: Said | MosearError | None) -> None:
        with suppress(OSError):  # gone: the thread that reads cancels
            self.connection.send(message)


class LocalDecoder:
    """The decoder behind a `Door`, as `runtime.decode.Decoding`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def decode(self, work: Work) -> Generator[Said]:
        """As `Decoding` says; EngineError where the decoder's process dies, ServingError where it does not listen."""
        try:
            with _short(self.path) as address:
                door = Client(address, FAMILY)
        except OSError as error:
            raise ServingError(
                f"the decoder does not listen ({error.strerror}): the server stops, or starts"
            ) from error
        with door:
            try:
                door.send(work)
                while (said := door.recv()) is not None:
                    if isinstance(said, MosearError):
                        raise said
                    yield said
            except (EOFError, ConnectionError) as error:
                raise EngineError("the decoder's process died: start the server again") from error


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """Another name of a file, as an address may have 107 characters. A listener unlinks it by that name too."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
        raise OSError(f"{folder} is not a folder of this user alone")
