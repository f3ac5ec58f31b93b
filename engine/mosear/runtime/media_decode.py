"""Bytes of a media file to pictures and sound, by PyAV. Runs in the worker of `MediaReader`, never in the caller."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import av
import numpy as np
from numpy.typing import NDArray

from mosear.errors import MediaError
from mosear.runtime.media import MAX_SIDE, Clip, MediaLimits
from mosear.runtime.media_file import MediaFile, Packets, open_media

_LONE_FRAME_S = 1 / 25  # how long a single picture without a rate is shown

Pictures = tuple[NDArray[np.uint8], NDArray[np.float32]]
_NO_PICTURES: Pictures = (np.zeros((0, 0, 0, 3), np.uint8), np.zeros(0, np.float32))
_NO_SOUND = np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is wanted of each clip: within these limits, so many pictures, sound at this rate in Hz."""

    limits: MediaLimits
    frames: int
    sample_rate: int


def decode(video: NDArray[np.uint8] | None, audio: NDArray[np.uint8] | None, job: Job) -> Clip:
    """Decode the bytes u8 [n] of a clip as `MediaReader.read` says; raises MediaError."""
    notes: list[str] = []
    pictures, waveform = _NO_PICTURES, _NO_SOUND
    if video is not None:
        with open_media(video, "video_bytes", job.limits, notes) as source:
            source.demux(pictures=True, sound=audio is None)
            pictures, waveform = _pictures(source, job), _sound(source, job)
        if not len(pictures[0]) and not len(waveform) and audio is None:
            raise MediaError(source.nothing("no pictures and no sound"))
        if not len(pictures[0]) and audio is not None:
            source.note("no pictures in it, and its sound was not wanted: nothing of it was used")
    if audio is not None:
        with open_media(audio, "audio_bytes", job.limits, notes) as source:
            source.demux(pictures=False, sound=True)
            waveform = _sound(source, job)
        if not len(waveform):
            raise MediaError(source.nothing("no sound"))
    return Clip(frames=pictures[0], frame_times_s=pictures[1], waveform=waveform, notes=tuple(notes))


class _Player:
    """Decodes a stream forwards; on the way to a later time it leaps to the last key frame before it."""

    def __init__(self, stream: av.VideoStream, packets: Packets) -> None:
        self._stream = stream
        self._packets = packets
        self._keys = [
            (i, p.pts) for i, p in enumerate(packets) if p.is_keyframe and p.pts is not None and not p.is_discard
        ]
        self._next = 0  # the packet to be decoded next; past the end once the decoder was drained
        self._ready: deque[av.VideoFrame] = deque()
        self._shown: av.VideoFrame | None = None
        self.damaged = 0

    def at(self, ticks: float) -> av.VideoFrame | None:
        """The frame that is shown at a time (in the stream's time base); the first one after it if none is."""
        key = max((i for i, pts in self._keys if pts <= ticks), default=0)
        if key > self._next:
            self._stream.codec_context.flush_buffers()
            self._next, self._shown = key, None
            self._ready.clear()
        while self._ready or self._next <= len(self._packets):
            if not self._ready:
                self._decode()
            elif _ticks(self._ready[0]) <= ticks:
                self._shown = self._ready.popleft()
            else:
                break
        return self._shown or (self._ready[0] if self._ready else None)

    def _decode(self) -> None:
        packet = self._packets[self._next] if self._next < len(self._packets) else None
        self._next += 1
        try:
            self._ready.extend(f for f in self._stream.decode(packet) if f.pts is not None)
        except MemoryError:
            raise
        except av.FFmpegError:
            self.damaged += 1


def _pictures(source: MediaFile, job: Job) -> Pictures:
    """RGB u8 [F, H, W, 3] and times f32 [F] in seconds of the frames at the middles of `job.frames` equal spans."""
    stream = source.video
    packets = source.packets[stream.index] if stream else []
    shown = [p for p in packets if p.pts is not None and not p.is_discard]
    if stream is None or not shown:
        return _NO_PICTURES
    if stream.codec_context is None:
        source.note("no decoder for its pictures, which were left out")
        return _NO_PICTURES
    source.check_pixels(stream.codec_context.width, stream.codec_context.height)
    start, length = _span(shown)
    times = [start + length * (i + 0.5) / job.frames for i in range(job.frames)]
    stream.codec_context.thread_count = 1  # two take 15 ms, not 12, for a small clip, and only a quarter less for 1080p
    player = _Player(stream, packets)
    frames = [frame for time in times if (frame := player.at(time)) is not None]
    if player.damaged:
        source.note(f"{player.damaged} of its {len(packets)} picture packets cannot be decoded; the others were used")
    if not frames:
        return _NO_PICTURES
    seconds = [(_ticks(frame) - start) * float(shown[0].time_base) for frame in frames]
    return _rgb(frames, source), np.array(seconds, np.float32)


def _span(packets: Packets) -> tuple[int, float]:
    """When the first picture is shown and for how long all of them are, in ticks."""
    times = sorted({p.pts for p in packets if p.pts is not None})
    last = next(p for p in packets if p.pts == times[-1])
    if last.duration:
        duration = float(last.duration)
    elif len(times) > 1:
        duration = float(np.median(np.diff(times)))
    else:
        duration = _LONE_FRAME_S / float(last.time_base)
    return times[0], times[-1] + duration - times[0]


def _ticks(frame: av.VideoFrame) -> int:
    assert frame.pts is not None, "_Player keeps no frame without a time"
    return frame.pts


def _rgb(frames: Sequence[av.VideoFrame], source: MediaFile) -> NDArray[np.uint8]:
    """Frames as RGB u8 [F, H, W, 3], upright, all of the first one's size, which is scaled down to MAX_SIDE."""
    first = frames[0]
    scale = min(1.0, MAX_SIDE / max(first.width, first.height))
    width, height = (max(1, round(side * scale)) for side in (first.width, first.height))
    images: list[NDArray[np.uint8]] = []
    for i, frame in enumerate(frames):
        if i and frame is frames[i - 1]:
            images.append(images[-1])
            continue
        source.check_pixels(frame.width, frame.height)
        small = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA", threads=1)
        images.append(np.rot90(small.to_ndarray(), round(first.rotation / 90)))
    return np.stack(images)


def _sound(source: MediaFile, job: Job) -> NDArray[np.float32]:
    """The sound track, mixed down and resampled, f32 [n] in -1..1; empty where there is none."""
    stream = source.audio
    if stream is None:
        return _NO_SOUND
    if stream.codec_context is None:
        source.note("no decoder for its sound, which was left out")
        return _NO_SOUND
    source.check_sound(stream.codec_context.channels, stream.codec_context.sample_rate)
    mixer = _Mixer(job.sample_rate)
    damaged = 0
    for packet in [*source.packets[stream.index], None]:
        try:
            for frame in stream.decode(packet):
                source.check_sound(frame.layout.nb_channels, frame.sample_rate)
                mixer.add(frame)
                source.check_seconds(mixer.samples / job.sample_rate)
        except MemoryError:
            raise
        except av.FFmpegError:
            damaged += 1
    if damaged:
        source.note(f"{damaged} of its sound packets cannot be decoded; the others were used")
    return source.check_samples(mixer.finish())


class _Mixer:
    """Mixes sound down to one channel (ITU weights, their sum at most 1, so that nothing overflows) at one rate."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._kind: tuple[str, str, int] | None = None
        self._resampler: av.AudioResampler | None = None
        self._pieces: list[NDArray[np.float32]] = [_NO_SOUND]
        self.samples = 0

    def add(self, frame: av.AudioFrame) -> None:
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if kind != self._kind:  # a stream may change its format on the way
            self._push(None)
            # Without a ceiling, floats of 7.1 sound come out 4.4 times too loud.
            ceiling = {"rematrix_maxval": "1.0"}
            self._resampler = av.AudioResampler(format="flt", layout="mono", rate=self._rate, options=ceiling)
            self._kind = kind
        frame.pts = None
        self._push(frame)

    def finish(self) -> NDArray[np.float32]:
        """All samples, f32 [n]."""
        self._push(None)
        return np.concatenate(self._pieces)

    def _push(self, frame: av.AudioFrame | None) -> None:
        for mixed in self._resampler.resample(frame) if self._resampler else ():
            if mixed is not None:
                self._pieces.append(mixed.to_ndarray()[0].astype(np.float32, copy=False))
                self.samples += mixed.samples
