"""Clips as arrays: media bytes are decoded in a process of its own, which may crash or hang without harm to the caller."""

import dataclasses
import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from mosear.errors import ConfigError, MediaError

T = TypeVar("T")

MAX_SIDE = 640  # pixels; 8 frames of 640x480 cross the pipe in a few ms, 8 of 4K would need 200 MB
_START_TIMEOUT_S = 60.0
_MODULE = "mosear.runtime.media_worker"
_LENGTH = struct.Struct("<I")
_REENCODE = "re-encode it (ffmpeg -i clip -c:v libx264 -c:a aac clip.mp4) and try again"


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaLimits:
    """What one request may cost. `max_memory_bytes` is the address space of the decoding process."""

    max_seconds: float = 30.0
    max_bytes: int = 64 << 20
    max_pixels: int = 4096 * 2304
    max_channels: int = 8
    timeout_s: float = 20.0
    max_memory_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"MediaLimits.{field.name} is {value!r}: it must be a number above 0")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clip:
    """A decoded clip.

    frames u8 [F, H, W, 3] RGB, upright, pixels taken as square, F is 0 without pictures; frame_times_s f32 [F], each
    frame's own time since the first one; waveform f32 [n] mono in -1..1, n is 0 without sound; notes for the user,
    about what could not be read or was altered.
    """

    frames: NDArray[np.uint8]
    frame_times_s: NDArray[np.float32]
    waveform: NDArray[np.float32]
    notes: tuple[str, ...]


class MediaReader:
    """Decodes clips in one worker process that is replaced whenever it crashes or hangs.

    Ready when constructed, safe to call from several threads (they take turns), a context manager.
    """

    def __init__(self, limits: MediaLimits, *, frames: int, sample_rate: int) -> None:
        """Sample `frames` pictures a clip and resample sound to `sample_rate` Hz; MediaError if no worker starts."""
        self._limits = limits
        self._frames = frames
        self._lock = threading.Lock()
        self._command = [_python(), "-P", "-m", _MODULE, json.dumps(dataclasses.asdict(limits))]
        self._command += [str(frames), str(sample_rate)]
        self._worker: _Worker | None = _Worker(self._command)
        self._worker.wait_ready()

    def read(self, video: bytes | None, audio: bytes | None) -> Clip:
        """Decode one clip.

        video: mp4, mov, mkv, webm or flv, or a file with sound alone; audio: wav, flac, mp3, ogg or any of the former.
        Sound comes from `audio` if given, else from `video`; it is mixed down so that no channel can overflow. Frames
        lie at the middles of equal spans of the pictures' real duration (headers are not believed), and are scaled
        down to at most MAX_SIDE pixels on the long side. A picture shown during several spans is given several times.
        Raises MediaError that says what is wrong, in which of video_bytes and audio_bytes, and what to do.
        """
        blobs = [_checked(video, "video_bytes", self._limits), _checked(audio, "audio_bytes", self._limits)]
        given = [name for name, blob in zip(("video_bytes", "audio_bytes"), blobs, strict=True) if blob is not None]
        if not given:
            raise MediaError("the request has neither video_bytes nor audio_bytes: send at least one")
        with self._lock:
            if self._worker is None:
                raise MediaError("this MediaReader is closed: make a new one")
            if not self._worker.alive:
                self._replace()
            try:
                self._worker.wait_ready()
                header, parts = self._worker.ask(blobs, self._limits.timeout_s)
                clip = None if "error" in header else self._clip(header, parts)
            except BaseException as error:  # also an interrupt: the pipes would be left in the middle of a message
                self._replace()
                if isinstance(error, _WorkerLost):
                    raise MediaError(self._lost(error, " and ".join(given))) from None
                raise
            if header.get("last"):
                self._replace()
        if clip is None:
            raise MediaError(str(header["error"]))
        return clip

    @property
    def pid(self) -> int | None:
        """Process id of the present worker; None once closed."""
        return self._worker.pid if self._worker else None

    def close(self) -> None:
        """End the worker, after the request that it is at. Later calls of `read` raise MediaError."""
        with self._lock:
            if self._worker is not None:
                self._worker.stop()
                self._worker = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _replace(self) -> None:
        if self._worker is not None:
            self._worker.stop()
        self._worker = _Worker(self._command)

    def _lost(self, lost: "_WorkerLost", where: str) -> str:
        if lost.timed_out:
            return (
                f"{where}: decoding took longer than timeout_s = {self._limits.timeout_s:g} and was stopped: "
                "send a shorter or smaller clip, or raise MediaLimits.timeout_s"
            )
        return f"{where}: the decoding process ended ({lost}) while reading it: the data is damaged, {_REENCODE}"

    def _clip(self, header: dict[str, Any], parts: list[NDArray[np.uint8]]) -> Clip:  # Any: parsed JSON
        """Take an answer apart, believing none of its sizes: what decoded hostile data may have been taken over."""
        frames, height, width = (int(n) for n in header["frames"])
        if not (0 <= frames <= self._frames and 0 <= height <= MAX_SIDE and 0 <= width <= MAX_SIDE):
            raise _WorkerLost("it answered with impossible sizes")
        pictures, times, waveform = parts
        return Clip(
            frames=pictures.reshape(frames, height, width, 3),
            frame_times_s=times.view(np.float32).reshape(frames),
            waveform=waveform.view(np.float32),
            notes=tuple(str(note) for note in header["notes"]),
        )


class _WorkerLost(Exception):
    """The worker died, hung or broke the protocol."""

    def __init__(self, what: str, *, timed_out: bool = False) -> None:
        super().__init__(what)
        self.timed_out = timed_out


class _Worker:
    """One decoding process and the pipes to it."""

    def __init__(self, command: list[str]) -> None:
        # One arena and one BLAS thread keep the address space small; the child sees the modules that we see.
        settings = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        settings |= {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        self._ready = False
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env=os.environ | settings,
                start_new_session=True,  # Ctrl-C is for the parent, whose end ends the worker
            )
        except OSError as error:
            raise MediaError(f"the decoding process {command[0]} cannot be started: {error}") from error
        assert self._process.stdin and self._process.stdout
        self._inbox: BinaryIO = self._process.stdout  # type: ignore[assignment]  # bufsize=0: a raw FileIO
        self._outbox: BinaryIO = self._process.stdin  # type: ignore[assignment]

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self) -> None:
        """Wait for the worker's first message; MediaError if it cannot start."""
        if self._ready:
            return
        try:
            self._within(_START_TIMEOUT_S, lambda: receive(self._inbox))
        except _WorkerLost as lost:
            raise MediaError(
                f"the decoding process did not start ({lost}): run `python -m {_MODULE}` by hand to see why, "
                "and check MediaLimits.max_memory_bytes"
            ) from None
        self._ready = True

    def ask(
        self, blobs: Sequence[bytes | None], timeout_s: float
    ) -> tuple[dict[str, Any], list[NDArray[np.uint8]]]:  # Any: parsed JSON
        """Send a request and wait for its answer; _WorkerLost if none comes within `timeout_s`."""

        def exchange() -> tuple[dict[str, Any], list[NDArray[np.uint8]]]:
            send(self._outbox, {"given": [blob is not None for blob in blobs]}, [blob or b"" for blob in blobs])
            return receive(self._inbox)

        return self._within(timeout_s, exchange)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._inbox.close()
        self._outbox.close()

    def _within(self, timeout_s: float, work: Callable[[], T]) -> T:
        """Run `work` on the pipes; a worker that is late is killed, which ends any read or write of ours."""
        late = threading.Event()

        def expire() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(timeout_s, expire)
        timer.daemon = True
        timer.start()
        try:
            result = work()
        except (OSError, EOFError, ValueError, KeyError, TypeError, MemoryError) as error:
            self._process.kill()
            code = self._process.wait()
            what = signal.Signals(-code).name if code < 0 else f"exit code {code}, {error}"
            raise _WorkerLost(what, timed_out=late.is_set()) from error
        finally:
            timer.cancel()
            timer.join()
        if late.is_set():
            raise _WorkerLost("late", timed_out=True)
        return result


def send(pipe: BinaryIO, header: dict[str, Any], blobs: Sequence[bytes | NDArray[Any]]) -> None:  # Any: JSON values
    """Write one message: length of the JSON header (u32), the header with the sizes of the blobs, the blobs."""
    views = [memoryview(blob).cast("B") if len(blob) else memoryview(b"") for blob in blobs]
    text = json.dumps(header | {"sizes": [view.nbytes for view in views]}).encode()
    for view in (memoryview(_LENGTH.pack(len(text)) + text), *views):
        done = 0
        while done < view.nbytes:
            done += pipe.write(view[done:])


def receive(pipe: BinaryIO) -> tuple[dict[str, Any], list[NDArray[np.uint8]]]:  # Any: JSON values
    """Read one message as (header, blobs u8 [n]); EOFError at the end of the pipe."""
    (length,) = _LENGTH.unpack(_take(pipe, _LENGTH.size))
    header: dict[str, Any] = json.loads(_take(pipe, length).tobytes())
    return header, [_take(pipe, size) for size in header["sizes"]]


def _take(pipe: BinaryIO, size: int) -> NDArray[np.uint8]:
    taken = np.empty(size, np.uint8)
    view, done = memoryview(taken), 0
    while done < size:
        count = pipe.readinto(view[done:])  # type: ignore[attr-defined]  # typeshed: BinaryIO lacks readinto
        if not count:
            raise EOFError("the pipe ended")
        done += count
    return taken


def _checked(blob: bytes | None, where: str, limits: MediaLimits) -> bytes | None:
    if blob is None:
        return None
    if not blob:
        raise MediaError(f"{where} is empty: leave it out, or send the bytes of a media file")
    if len(blob) > limits.max_bytes:
        raise MediaError(f"{where} has {len(blob)} bytes, the limit is max_bytes = {limits.max_bytes}: send a smaller file")
    return blob


def _python() -> str:
    """The interpreter to start: a program that embeds Python (a Triton Server stub) may be its own sys.executable."""
    if Path(sys.executable).name.startswith("python"):
        return sys.executable
    return str(Path(sys.exec_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")
