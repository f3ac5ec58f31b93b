"""Clips as arrays: media bytes are decoded in another process, which may crash or hang without harm to the caller."""

import dataclasses
import io
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
from subprocess import DEVNULL, PIPE
from typing import Any, Self, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from mosear.errors import ConfigError, MediaError

T = TypeVar("T")
Message = tuple[dict[str, Any], list[NDArray[np.uint8]]]  # Any: values of JSON

MAX_SIDE = 640  # pixels: 8 frames of 640x480 cross the pipe in a few ms, 8 of 4K would be 200 MB
_START_TIMEOUT_S = 60.0
_MODULE = "mosear.runtime.media_worker"
_LENGTH = struct.Struct("<I")
_HEADER_BYTES = 1 << 20


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

    frames: u8 [F, H, W, 3] RGB, upright, pixels taken as square; F is 0 without pictures.
    frame_times_s: f32 [F], each frame's own time since the first one.
    waveform: f32 [n], mono in -1..1; n is 0 without sound.
    notes: for the user, about what could not be read or was altered.
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
        """Sample `frames` pictures of a clip, resample sound to `sample_rate` Hz; MediaError if no worker starts."""
        self._limits = limits
        self._frames = frames
        self._lock = threading.Lock()
        settings = [json.dumps(dataclasses.asdict(limits)), str(frames), str(sample_rate)]
        self._command = [_python(), "-P", "-m", _MODULE, *settings]
        sound_bytes = 4 * sample_rate * math.ceil(limits.max_seconds + 1)
        self._answer_bytes = frames * (MAX_SIDE * MAX_SIDE * 3 + 4) + sound_bytes
        self._worker: _Worker | None = _Worker(self._command)
        self._worker.wait_ready()

    def read(self, video: bytes | None, audio: bytes | None) -> Clip:
        """Decode one clip.

        video: mp4, mov, mkv, webm or flv, or a file with sound alone; audio: wav, flac, mp3, ogg or any of the former.
        Sound comes from `audio` if given, else from `video`. Its channels are mixed with the ITU weights, their sum at
        most 1. Frames lie at the middles of equal spans of the time that the pictures really last (headers are not
        believed), and are scaled down to at most MAX_SIDE pixels on the long side. A picture that is shown during
        several spans is given several times.
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
                self._replace(self._worker)
            worker = self._worker
            try:
                worker.wait_ready()
                answer, last = worker.within(self._limits.timeout_s, lambda: self._exchange(worker, blobs))
            except BaseException as error:  # also an interrupt: the pipes would be left in the middle of a message
                self._replace(worker)
                if isinstance(error, _WorkerLostError):
                    raise MediaError(self._lost(error, " and ".join(given))) from None
                raise
            if last:
                self._replace(worker)
        if isinstance(answer, str):
            raise MediaError(answer)
        return answer

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

    def _replace(self, worker: "_Worker") -> None:
        worker.stop()
        self._worker = _Worker(self._command)

    def _exchange(self, worker: "_Worker", blobs: Sequence[bytes | None]) -> tuple[Clip | str, bool]:
        """Send a request, get the clip or the text of an error, and whether the worker wants to be replaced.

        Raises ValueError, TypeError or KeyError for an answer that makes no sense: hostile bytes may have taken over
        the process that decoded them, so none of its sizes is believed.
        """
        send(worker.outbox, {"given": [blob is not None for blob in blobs]}, [blob or b"" for blob in blobs])
        header, parts = receive(worker.inbox, self._answer_bytes)
        if "error" in header:
            return str(header["error"]), bool(header.get("last"))
        (frames, height, width), (pictures, times, waveform) = header["shape"], parts
        if frames > self._frames or max(height, width) > MAX_SIDE:
            raise ValueError(f"{frames} frames of {width}x{height} cannot be")
        clip = Clip(
            frames=pictures.reshape(frames, height, width, 3),
            frame_times_s=times.view(np.float32).reshape(frames),
            waveform=waveform.view(np.float32),
            notes=tuple(str(note) for note in header["notes"]),
        )
        return clip, False

    def _lost(self, lost: "_WorkerLostError", where: str) -> str:
        if lost.timed_out:
            return (
                f"{where}: decoding took longer than timeout_s = {self._limits.timeout_s:g} and was stopped: "
                "send a shorter or smaller clip, or raise MediaLimits.timeout_s"
            )
        return (
            f"{where}: the decoding process ended ({lost}) while reading it: the data may be damaged, "
            "re-encode it (ffmpeg -i clip -c:v libx264 -c:a aac clip.mp4) and try again"
        )


class _WorkerLostError(Exception):
    """The worker died, hung or broke the protocol."""

    def __init__(self, what: str, *, timed_out: bool) -> None:
        super().__init__(what)
        self.timed_out = timed_out


class _Worker:
    """One decoding process and the pipes to it."""

    def __init__(self, command: list[str]) -> None:
        # The child finds the modules that we do; one BLAS thread and one arena keep its address space small.
        path = os.pathsep.join(filter(None, sys.path))
        env = os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        try:  # in a session of its own: Ctrl-C is for the parent, whose end ends the worker
            self._process = subprocess.Popen(
                command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, bufsize=0, env=env, start_new_session=True
            )
        except OSError as error:
            raise MediaError(f"the decoding process {command[0]} cannot be started: {error}") from error
        self._ready = False
        self.inbox = cast(io.FileIO, self._process.stdout)  # bufsize=0 makes raw files
        self.outbox = cast(io.FileIO, self._process.stdin)

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
            self.within(_START_TIMEOUT_S, lambda: receive(self.inbox, 0))
        except _WorkerLostError as lost:
            raise MediaError(
                f"the decoding process did not start ({lost}): check MediaLimits.max_memory_bytes, "
                f"and run `python -m {_MODULE} '{{}}' 8 16000` to see why"
            ) from None
        self._ready = True

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self.inbox.close()
        self.outbox.close()

    def within(self, timeout_s: float, work: Callable[[], T]) -> T:
        """Run `work` on the pipes; a late worker is killed, which ends any read or write. Raises _WorkerLostError."""
        late = threading.Event()

        def expire() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(timeout_s, expire)
        timer.daemon = True
        timer.start()
        try:
            result = work()
        except (OSError, EOFError, ValueError, TypeError, KeyError, RecursionError) as error:
            self._process.kill()
            code = self._process.wait()
            how = f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"
            raise _WorkerLostError(f"{how}; {error}", timed_out=late.is_set()) from error
        finally:
            timer.cancel()
            timer.join()
        if late.is_set():
            raise _WorkerLostError("late", timed_out=True)
        return result


def send(pipe: io.FileIO, header: dict[str, Any], blobs: Sequence[bytes | NDArray[Any]]) -> None:  # Any: see Message
    """Write one message: length of the JSON header (u32), the header with the sizes of the blobs, the blobs."""
    views = [blob if isinstance(blob, bytes) else blob.reshape(-1).view(np.uint8).data for blob in blobs]
    text = json.dumps(header | {"sizes": [len(view) for view in views]}).encode()
    for view in (_LENGTH.pack(len(text)) + text, *views):
        rest = memoryview(view)
        while rest:
            rest = rest[pipe.write(rest) :]


def receive(pipe: io.FileIO, most: int) -> Message:
    """Read one message with blobs u8 [n] of together at most `most` bytes; EOFError, ValueError, KeyError."""
    (length,) = _LENGTH.unpack(_take(pipe, _LENGTH.size).tobytes())
    if length > _HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    header: dict[str, Any] = json.loads(_take(pipe, length).tobytes())
    if sum(header["sizes"]) > most:
        raise ValueError(f"blobs of {header['sizes']} bytes")
    return header, [_take(pipe, size) for size in header["sizes"]]


def _take(pipe: io.FileIO, size: int) -> NDArray[np.uint8]:
    taken = np.empty(size, np.uint8)
    rest = taken.data
    while rest:
        count = pipe.readinto(rest)
        if not count:
            raise EOFError("the pipe ended")
        rest = rest[count:]
    return taken


def _checked(blob: bytes | None, where: str, limits: MediaLimits) -> bytes | None:
    if blob is not None and not blob:
        raise MediaError(f"{where} is empty: leave it out, or send the bytes of a media file")
    if blob and len(blob) > limits.max_bytes:
        raise MediaError(
            f"{where} has {len(blob)} bytes, the limit is {limits.max_bytes}: send a smaller file, or raise clip_bytes in "
            "the recipe"
        )
    return blob


def _python() -> str:
    """The interpreter to start: a program that embeds Python (a Triton Server stub) may be its own sys.executable."""
    if Path(sys.executable).name.startswith("python"):
        return sys.executable
    return str(Path(sys.exec_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")
