"""Files that are empty, cut, damaged, too large or hostile are refused with what, where and what to do."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import media_factory
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from media_factory import (
    FRAMES,
    RATE,
    SOUND,
    VIDEO,
    make_clip,
    new_reader,
    numbers,
    raw_wav,
)

from mosear.errors import ConfigError, MediaError
from mosear.runtime.media import MediaLimits, MediaReader


@pytest.fixture(scope="module")
def reader() -> Iterator[MediaReader]:
    with new_reader() as made:
        yield made


def with_sample(value: float) -> bytes:
    wave = media_factory.sine(0.5, sample_rate=48_000, channels=1, tone_hz=440, amplitude=0.5)
    wave[0, 5000] = value
    return make_clip("float-wav", sample_rate=48_000, samples=wave)


def huge_frame() -> bytes:
    return make_clip("mp4", size=(7680, 4320), sound=False, frames=[np.zeros((4320, 7680, 3), np.uint8)])


BAD: dict[str, tuple[Callable[[], bytes | None], Callable[[], bytes | None], tuple[str, ...]]] = {
    "nothing": (lambda: None, lambda: None, ("video_bytes", "audio_bytes", "send at least one")),
    "empty video": (lambda: b"", lambda: None, ("video_bytes is empty",)),
    "empty audio": (lambda: make_clip("mp4"), lambda: b"", ("audio_bytes is empty",)),
    "text": (lambda: b"to be or not to be\n" * 99, lambda: None, ("video_bytes is no media file", "send mp4, mov")),
    "no moov": (lambda: make_clip("mp4")[:9000], lambda: None, ("video_bytes", "without its index (moov)")),
    "0 s": (lambda: make_clip("mp4", seconds=0), lambda: None, ("video_bytes has no pictures", "more than 0 s")),
    "0 s webm": (lambda: make_clip("webm", seconds=0), lambda: None, ("video_bytes", "more than 0 s")),
    "0 s sound": (lambda: None, lambda: make_clip("wav", seconds=0), ("audio_bytes has no sound", "more than 0 s")),
    "10-byte wav": (lambda: None, lambda: make_clip("wav")[:10], ("audio_bytes is no media file", "wav")),
    "no sound in it": (lambda: None, lambda: make_clip("mp4", sound=False), ("audio_bytes has no sound",)),
    "long video": (
        lambda: make_clip("mp4", seconds=31, sound=False),
        lambda: None,
        ("video_bytes", "longer than 30 s"),
    ),
    "long sound": (lambda: None, lambda: make_clip("flac", seconds=31), ("audio_bytes", "longer than 30 s")),
    "8K": (huge_frame, lambda: None, ("video_bytes", "7680x4320", "max_pixels = 9437184", "scale")),
    "16 channels": (
        lambda: None,
        lambda: make_clip("wav", layout="hexadecagonal", seconds=0.1),
        ("audio_bytes has 16 sound channels", "max_channels = 8"),
    ),
    "NaN": (lambda: None, lambda: with_sample(np.nan), ("audio_bytes", "NaN or infinite")),
    "infinity": (lambda: None, lambda: with_sample(-np.inf), ("audio_bytes", "NaN or infinite")),
    "100 MHz": (lambda: None, lambda: raw_wav(1, 10**8, np.zeros((1, 99), np.int16)), ("audio_bytes", "100000000 Hz")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_what_where_and_what_to_do(reader: MediaReader, name: str) -> None:
    video, audio, words = BAD[name]
    with pytest.raises(MediaError) as caught:
        reader.read(video(), audio())
    for word in words:
        assert word in str(caught.value)
    assert len(reader.read(None, make_clip("wav", seconds=0.1)).waveform) == RATE // 10


def test_thirty_seconds_are_allowed(reader: MediaReader) -> None:
    clip = reader.read(make_clip("mp4", seconds=30, fps=5), None)  # its AAC sound is a block longer
    assert len(clip.waveform) >= 30 * RATE and numbers(clip) == [int((i + 0.5) * 150 / FRAMES) for i in range(FRAMES)]


def test_max_bytes() -> None:
    data = make_clip("wav", seconds=0.1)
    with new_reader(max_bytes=len(data) - 1) as reader:
        with pytest.raises(
            MediaError, match=rf"audio_bytes has {len(data)} bytes, the limit is {len(data) - 1}: .*clip_bytes"
        ):
            reader.read(None, data)
        assert len(reader.read(None, data[:-1]).waveform) > 0


@pytest.mark.parametrize("name", ["max_seconds", "max_bytes", "timeout_s"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_limits_are_checked(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        MediaLimits(**{name: value})  # type: ignore[arg-type]


def test_playlists_cannot_reach_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.wav").write_bytes(make_clip("wav", seconds=1))
    playlist = b"ffconcat version 1.0\nfile secret.wav\n"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.ffconcat").write_bytes(playlist)
    with av.open("list.ffconcat") as opened:
        assert opened.streams.audio  # an FFmpeg without our bounds follows it
    with new_reader() as reader, pytest.raises(MediaError, match="is no media file"):
        reader.read(playlist, None)


@functools.cache
def intact(container: str) -> bytes:
    return make_clip(container, seconds=0.5)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    container=st.sampled_from([*VIDEO, *SOUND]),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=20),
    keep=st.floats(0.01, 1),
)
def test_damaged_bytes_give_a_clip_or_a_media_error(
    reader: MediaReader,
    container: str,
    changes: list[tuple[float, int]],
    keep: float,
) -> None:
    data = bytearray(intact(container))
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        clip = reader.read(bytes(data[: max(1, int(keep * len(data)))]), None)
    except MediaError as error:
        assert "cannot be decoded (" not in str(error)  # the answer to an exception that we did not foresee
        return
    assert len(clip.frames) in (0, FRAMES) and np.isfinite(clip.waveform).all()
    assert np.abs(clip.waveform).max(initial=0) <= 1
