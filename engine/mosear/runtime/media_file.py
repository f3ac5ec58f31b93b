"""An opened media file: the packets of its streams, what it may cost, and what is wrong with it."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any, TypeAlias

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from numpy.typing import NDArray

from mosear.errors import MediaError
from mosear.runtime.media import MediaLimits

# Nothing that opens other files or addresses by itself (playlists, ffconcat, sdp) may be probed.
_OPTIONS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,flv,wav,flac,mp3,ogg", "protocol_whitelist": ""}
_OPTIONS |= {
    "analyzeduration": "60000000",
    "probesize": str(1 << 30),
}  # us, bytes: flv names no stream that begins late
_NAMES = "mp4, mov, mkv, webm, flv, wav, flac, mp3 or ogg"
_WHOLE = "a whole clip that lasts more than 0 s"
_SLACK_S = 0.25  # encoders fill their last block: 1024 samples at 8 kHz are 0.13 s
_MAX_RATE = 768_000  # Hz: the filter for 100 MHz takes 5 s to build
_OVERSHOOT = 1.05  # times full scale: what filters and lossy codecs do to loud sound is not worth a note
_MISSING_S = 0.5  # a header that promises this much more than there is gets a note

# Any: of pictures or of sound. A string: PyAV's class is not generic at run time.
Packets: TypeAlias = "list[Packet[Any]]"


@contextlib.contextmanager
def open_media(data: NDArray[np.uint8], where: str, limits: MediaLimits, notes: list[str]) -> Iterator["MediaFile"]:
    """Open the bytes u8 [n] that the request calls `where`; what is odd about them is added to `notes`."""
    try:
        container = av.open(io.BytesIO(data.data), "r", options=_OPTIONS, metadata_errors="replace")
    except MemoryError:
        raise
    except av.FFmpegError as error:
        content = data.tobytes()
        if content[4:8] == b"ftyp" and b"moov" not in content:
            raise MediaError(
                f"{where} is an mp4 or mov file without its index (moov): it was cut short, send the whole file"
            ) from error
        advice = _WHOLE if isinstance(error, EOFError) else _NAMES
        raise MediaError(f"{where} is no media file that can be read ({error.strerror}): send {advice}") from error
    with container:
        yield MediaFile(container, where, limits, notes)


class MediaFile:
    """One opened file: the packets of the streams that matter, and where to report what is wrong with it."""

    def __init__(self, container: InputContainer, where: str, limits: MediaLimits, notes: list[str]) -> None:
        self._container = container
        self._notes = notes
        self._first_note = len(notes)
        self._where = where
        self._limits = limits
        self.video: av.VideoStream | None = None
        self.audio: av.AudioStream | None = None
        self.packets: dict[int, Packets] = {}

    def demux(self, *, pictures: bool, sound: bool) -> None:
        """Read all packets of the first video and sound stream; MediaError when they span more than max_seconds."""
        streams = self._container.streams
        self.video = next((s for s in streams.video if pictures and not s.disposition & Disposition.attached_pic), None)
        self.audio = streams.audio[0] if sound and streams.audio else None
        chosen = [s for s in (self.video, self.audio) if s is not None]
        self.packets = {s.index: [] for s in chosen}
        start: dict[int, int] = {}
        reached_s = 0.0
        try:
            for packet in self._container.demux(*chosen) if chosen else ():
                if packet.size:
                    self.packets[packet.stream_index].append(packet)
                if packet.size and packet.pts is not None and not packet.is_discard:
                    end = packet.pts + (packet.duration or 0)
                    first = start.setdefault(packet.stream_index, packet.pts)
                    reached_s = max(reached_s, (end - first) * float(packet.time_base))
                    self.check_seconds(reached_s)
        except MemoryError:
            raise
        except IndexError:  # PyAV 18 stumbles, after the last packet, over a stream that it did not know at the start
            self.note("a stream that begins late was left out")
        except av.FFmpegError as error:
            self.note(f"damaged after {reached_s:.2f} s ({error.strerror}); what comes before was used")
        promised_s = max((float(s.duration * s.time_base) for s in chosen if s.duration and s.time_base), default=0.0)
        if not promised_s and len(chosen) == len(streams.video) + len(streams.audio):
            promised_s = (self._container.duration or 0) / 1e6  # of the longest stream, so not that of one alone
        if reached_s and promised_s > reached_s + _MISSING_S:
            self.note(f"its header promises {promised_s:.2f} s, but it holds {reached_s:.2f} s, which were used")

    def note(self, text: str) -> None:
        self._notes.append(f"{self._where}: {text}")

    def nothing(self, what: str) -> str:
        """Message for a file of which nothing can be used."""
        reasons = "".join(f" ({note})" for note in self._notes[self._first_note :])
        return f"{self._where} has {what} that can be decoded{reasons}: send {_WHOLE}"

    def check_seconds(self, seconds: float) -> None:
        if seconds > self._limits.max_seconds + _SLACK_S:
            raise MediaError(
                f"{self._where} lasts longer than {self._limits.max_seconds:g} s: cut it, or raise clip_seconds in the "
                "recipe as far as the model hears"
            )

    def check_pixels(self, width: int, height: int) -> None:
        if width * height > self._limits.max_pixels:
            raise MediaError(
                f"{self._where} has frames of {width}x{height} = {width * height} pixels, the limit is "
                f"max_pixels = {self._limits.max_pixels}: scale it down (ffmpeg -i clip -vf scale=1280:-2 small.mp4)"
            )

    def check_sound(self, channels: int, rate: int) -> None:
        if channels > self._limits.max_channels:
            raise MediaError(
                f"{self._where} has {channels} sound channels, the limit is "
                f"max_channels = {self._limits.max_channels}: mix it down (ffmpeg -i clip -ac 2 stereo.wav)"
            )
        if rate > _MAX_RATE:
            raise MediaError(
                f"{self._where} has sound at {rate} Hz, at most {_MAX_RATE} can be resampled: its header may be damaged"
            )

    def check_samples(self, waveform: NDArray[np.float32]) -> NDArray[np.float32]:
        """The waveform f32 [n] within -1..1; MediaError if it holds NaN or infinity."""
        if not np.isfinite(waveform).all():
            raise MediaError(
                f"{self._where} holds sound samples that are NaN or infinite: "
                "they cannot be repaired, export the sound again"
            )
        peak = float(np.abs(waveform).max(initial=0.0))
        if peak <= 1:
            return waveform
        if peak > _OVERSHOOT:
            self.note(f"sound with a peak of {peak:.3g} times full scale was scaled down to 1")
        return waveform / np.float32(peak)
