"""Makes and reads small media files of known content: every frame carries its number, every sound is a sine."""

import struct
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from numpy.typing import NDArray

from mosear.runtime.media import Clip, MediaLimits, MediaReader

RATE = 16000  # Hz, of decoded sound
FRAMES = 8  # that a reader takes from a clip
BITS = 10  # a frame's number is painted as this many black or white columns in the lower half


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """How one kind of file is written: muxer, codecs (None: the container has no such stream), pixel format."""

    muxer: str
    video: str | None
    audio: str
    pixels: str = "yuv420p"
    sample_rate: int = 48000


CONTAINERS = {
    "mp4": Container(muxer="mp4", video="libx264", audio="aac"),
    "mov": Container(muxer="mov", video="libx264", audio="aac"),
    "mkv": Container(muxer="matroska", video="libx264", audio="aac"),
    "webm": Container(muxer="webm", video="libvpx-vp9", audio="libopus"),
    "flv": Container(muxer="flv", video="libx264", audio="aac", sample_rate=44100),
    "wav": Container(muxer="wav", video=None, audio="pcm_s16le"),
    "flac": Container(muxer="flac", video=None, audio="flac"),
    "mp3": Container(muxer="mp3", video=None, audio="libmp3lame"),
    "ogg": Container(muxer="ogg", video=None, audio="libopus"),
    "png-mov": Container(muxer="mov", video="png", audio="pcm_s16le", pixels="rgb24"),
    "float-wav": Container(muxer="wav", video=None, audio="pcm_f32le"),
}
VIDEO = ("mp4", "mov", "mkv", "webm", "flv")
SOUND = ("wav", "flac", "mp3", "ogg")
_OPTIONS = {
    "libx264": {"preset": "ultrafast", "crf": "18"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "20", "b": "0", "row-mt": "0"},
}


def frame_colour(number: int) -> tuple[int, int, int]:
    """RGB of the upper half of frame `number`."""
    palette = ((200, 40, 40), (40, 180, 40), (40, 40, 200), (200, 200, 40), (180, 180, 180))
    return palette[number % len(palette)]


def picture(number: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Frame `number` as RGB [height, width, 3]: its colour above, its number in black and white columns below."""
    width, height = size
    image = np.empty((height, width, 3), np.uint8)
    image[:] = frame_colour(number)
    columns = np.arange(width) * BITS // width
    image[height // 2 :] = np.where((number >> columns) & 1, 235, 16).astype(np.uint8)[None, :, None]
    return image


def read_number(image: NDArray[np.uint8]) -> int:
    """The number painted in a frame, RGB [height, width, 3] at any scale."""
    height, width = image.shape[:2]
    row = image[height * 3 // 4].mean(axis=1)
    return sum(int(row[int((bit + 0.5) * width / BITS)] > 128) << bit for bit in range(BITS))


def sine(seconds: float, *, sample_rate: int, channels: int, tone_hz: float, amplitude: float) -> NDArray[np.float32]:
    """The same sine on every channel, [channels, samples]."""
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    return np.tile((amplitude * np.sin(2 * np.pi * tone_hz * time)).astype(np.float32), (channels, 1))


def make_clip(
    container: str,
    *,
    seconds: float = 3.0,
    size: tuple[int, int] = (64, 48),
    fps: int = 25,
    sound: bool = True,
    video: bool = True,
    keyframe_every: int = 12,
    skip: Collection[int] = (),
    sample_rate: int | None = None,
    layout: str = "mono",
    tone_hz: float = 440.0,
    amplitude: float = 0.5,
    samples: NDArray[np.float32] | None = None,
    frames: list[NDArray[np.uint8]] | None = None,
    options: dict[str, str] | None = None,
    video_options: dict[str, str] | None = None,
) -> bytes:
    """A file of kind `container`, a key of CONTAINERS.

    size is (width, height); frames u8 [height, width, 3] and samples f32 [channels, n] replace the painted numbers and
    the sine; the frames in `skip` are left out, so that the one before lasts longer; options are the muxer's,
    video_options the picture encoder's.
    """
    kind = CONTAINERS[container]
    rate = sample_rate or kind.sample_rate
    with tempfile.NamedTemporaryFile() as file:  # movflags=faststart reads the file again, by its name
        # All pictures are written before all sound: the muxer must wait for both (0), not give up after 10 s.
        muxing = {"max_interleave_delta": "0"} | (options or {})
        with av.open(file.name, "w", format=kind.muxer, options=muxing) as out:
            pictures = track = None
            if kind.video and video:
                extra = _OPTIONS.get(kind.video, {}) | (video_options or {})
                pictures = cast(av.VideoStream, out.add_stream(kind.video, rate=fps, options=extra))
                pictures.width, pictures.height = size
                pictures.pix_fmt = kind.pixels
                pictures.codec_context.gop_size = keyframe_every
                pictures.codec_context.thread_count = 1
            if sound:
                track = cast(av.AudioStream, out.add_stream(kind.audio, rate=rate, layout=layout))
            if track and kind.audio == "aac":
                track.bit_rate = 128_000  # PyAV's 70 kbit/s give a pure sine peaks that are 1.7 times too high
            out.start_encoding()  # so that a clip of 0 seconds has its header
            if pictures:
                images = frames or [picture(i, size) for i in range(round(seconds * fps))]
                _write_pictures(out, pictures, {i: image for i, image in enumerate(images) if i not in skip}, fps)
            if track:
                if samples is None:
                    channels = track.codec_context.layout.nb_channels
                    samples = sine(seconds, sample_rate=rate, channels=channels, tone_hz=tone_hz, amplitude=amplitude)
                _write_sound(out, track, samples, rate)
        return Path(file.name).read_bytes()


def _write_pictures(
    out: av.container.OutputContainer, stream: av.VideoStream, frames: dict[int, NDArray[np.uint8]], fps: int
) -> None:
    for number, image in frames.items():
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts, frame.time_base = number, Fraction(1, fps)
        out.mux(stream.encode(frame))
    if frames:
        out.mux(stream.encode(None))


def _write_sound(
    out: av.container.OutputContainer, stream: av.AudioStream, samples: NDArray[np.float32], rate: int
) -> None:
    layout = stream.codec_context.layout.name
    resampler = av.AudioResampler(
        format=stream.codec_context.format, layout=layout, rate=rate, frame_size=stream.codec_context.frame_size or None
    )
    block, position = rate // 5, 0
    while position < samples.shape[1]:
        piece = samples[:, position : position + block]
        # interleaved: PyAV 18 cannot fill 8 planes
        frame = av.AudioFrame.from_ndarray(piece.T.reshape(1, -1).astype(np.float32), format="flt", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, position, Fraction(1, rate)
        for ready in resampler.resample(frame):
            out.mux(stream.encode(ready))
        position += piece.shape[1]
    if position:
        for ready in resampler.resample(None):
            out.mux(stream.encode(ready))
        out.mux(stream.encode(None))


def rotate(mp4: bytes, quarter_turns: int) -> bytes:
    """Say in an mp4's track header that its pictures are shown turned clockwise by `quarter_turns` of 90 degrees."""
    cosine, sine_ = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarter_turns % 4]
    matrix = struct.pack(">9i", cosine << 16, sine_ << 16, 0, -sine_ << 16, cosine << 16, 0, 0, 0, 1 << 30)
    at = mp4.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    return mp4[:at] + matrix + mp4[at + 36 :]


def raw_wav(channels: int, rate: int, samples: NDArray[np.int16]) -> bytes:
    """A wav with the plain header of 44 bytes, which does not say which channel is which; samples i16 [channels, n]."""
    pcm = samples.T.astype("<i2").tobytes()
    form = struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * channels * 2, channels * 2, 16)
    return b"".join(
        [b"RIFF", struct.pack("<I", 36 + len(pcm)), b"WAVEfmt ", form, b"data", struct.pack("<I", len(pcm)), pcm]
    )


def new_reader(**limits: float) -> MediaReader:
    """A reader as the tests use it; limits are fields of MediaLimits."""
    return MediaReader(MediaLimits(**limits), frames=FRAMES, sample_rate=RATE)  # type: ignore[arg-type]


def numbers(clip: Clip) -> list[int]:
    """The numbers painted in the frames of a decoded clip."""
    return [read_number(frame) for frame in clip.frames]


def tone_of(waveform: NDArray[np.float32]) -> tuple[float, float]:
    """Frequency (Hz) and amplitude of a sine, without its ends."""
    inner = waveform[len(waveform) // 4 : -len(waveform) // 4].astype(np.float64)
    spectrum = np.abs(np.fft.rfft(inner * np.hanning(len(inner))))
    return float(spectrum.argmax() * RATE / len(inner)), float(np.sqrt(2 * np.mean(inner**2)))


def assert_tone(waveform: NDArray[np.float32], hertz: float, amplitude: float) -> None:
    """Check that f32 [n] at RATE is this sine, as nearly as lossy codecs keep it."""
    found = tone_of(waveform)
    assert abs(found[0] - hertz) < 3
    assert abs(found[1] - amplitude) < 0.06 * amplitude  # LAME scales by 0.95; lossless sound is tested more sharply
