"""Media bytes to arrays: every container, every way in which a file is bad, and every way in which a worker ends."""

import functools
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import media_factory
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from media_factory import SOUND, VIDEO, frame_colour, make_clip, read_number
from mosear.errors import ConfigError, MediaError
from mosear.runtime import media, media_decode
from mosear.runtime.media import MAX_SIDE, Clip, MediaLimits, MediaReader
from numpy.typing import NDArray

RATE = 16000
FRAMES = 8
MIDDLES_3S = [int((i + 0.5) * 75 / FRAMES) for i in range(FRAMES)]  # of 75 frames


def new_reader(**limits: float) -> MediaReader:
    return MediaReader(MediaLimits(**limits), frames=FRAMES, sample_rate=RATE)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def reader() -> Iterator[MediaReader]:
    with new_reader() as made:
        yield made


def numbers(clip: Clip) -> list[int]:
    return [read_number(frame) for frame in clip.frames]


def tone_of(waveform: NDArray[np.float32]) -> tuple[float, float]:
    """Frequency (Hz) and amplitude of a sine, without its ends."""
    inner = waveform[len(waveform) // 4 : -len(waveform) // 4].astype(np.float64)
    spectrum = np.abs(np.fft.rfft(inner * np.hanning(len(inner))))
    return float(spectrum.argmax() * RATE / len(inner)), float(np.sqrt(2 * np.mean(inner**2)))


def assert_tone(waveform: NDArray[np.float32], hertz: float, amplitude: float) -> None:
    found = tone_of(waveform)
    assert abs(found[0] - hertz) < 3
    assert abs(found[1] - amplitude) < 0.06 * amplitude  # LAME scales by 0.95; lossless sound is tested more sharply


def stop_then(reader: MediaReader, act: Callable[[int], None], clip: bytes) -> MediaError:
    """The error of a request whose worker is stopped beforehand and meets `act` while the request waits."""
    pid = reader.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(reader.read, clip, None)
        time.sleep(0.1)
        act(pid)
        with pytest.raises(MediaError) as caught:
            waiting.result(timeout=10)
    return caught.value


def gone(pid: int, within_s: float = 5.0) -> bool:
    """Whether a process ends in time; a zombie that nobody reaps has ended."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("container", VIDEO)
def test_pictures_and_sound_of_every_video_container(reader: MediaReader, container: str) -> None:
    clip = reader.read(make_clip(container), None)
    assert clip.frames.shape == (FRAMES, 48, 64, 3) and clip.frames.dtype == np.uint8
    assert numbers(clip) == MIDDLES_3S
    np.testing.assert_allclose(clip.frame_times_s, np.array(MIDDLES_3S) / 25, atol=2e-3)
    for number, frame in zip(MIDDLES_3S, clip.frames, strict=True):
        assert np.abs(frame[:20].mean(axis=(0, 1)) - frame_colour(number)).max() < 8
    assert clip.waveform.dtype == np.float32 and abs(len(clip.waveform) / RATE - 3) < 0.06
    assert_tone(clip.waveform, 440, 0.5)
    assert clip.notes == ()


@pytest.mark.parametrize("container", SOUND)
def test_sound_of_every_sound_container(reader: MediaReader, container: str) -> None:
    data = make_clip(container, tone_hz=1000, seconds=1)
    as_audio, as_video = reader.read(None, data), reader.read(data, None)
    assert as_audio.frames.shape == (0, 0, 0, 3) and as_audio.frame_times_s.shape == (0,)
    assert abs(len(as_audio.waveform) / RATE - 1) < 0.06
    assert_tone(as_audio.waveform, 1000, 0.5)
    np.testing.assert_array_equal(as_audio.waveform, as_video.waveform)


def test_lossless_sound_is_exact(reader: MediaReader) -> None:
    wave = media_factory.sine(1, sample_rate=RATE, channels=1, tone_hz=300, amplitude=0.7)
    clip = reader.read(None, make_clip("float-wav", sample_rate=RATE, samples=wave))
    np.testing.assert_array_equal(clip.waveform, wave[0])


def test_audio_bytes_replace_the_sound_of_the_video(reader: MediaReader) -> None:
    clip = reader.read(make_clip("mp4", tone_hz=440), make_clip("mkv", tone_hz=2000, video=False))
    assert numbers(clip) == MIDDLES_3S
    assert_tone(clip.waveform, 2000, 0.5)
    sound_alone = reader.read(make_clip("wav", seconds=1), make_clip("wav", seconds=2))
    assert len(sound_alone.waveform) == 2 * RATE
    assert sound_alone.notes == (
        "video_bytes: no pictures in it, and its sound was not wanted: nothing of it was used",
    )


def test_silent_video(reader: MediaReader) -> None:
    clip = reader.read(make_clip("mp4", sound=False), None)
    assert numbers(clip) == MIDDLES_3S and clip.waveform.shape == (0,) and clip.notes == ()


@pytest.mark.parametrize("muxer", ["mp3", "mp4", "flac"])
def test_cover_art_is_no_video(reader: MediaReader, tmp_path: Path, muxer: str) -> None:
    path = tmp_path / f"cover.{muxer}"
    codec, cells = {"mp3": ("libmp3lame", "fltp"), "mp4": ("aac", "fltp"), "flac": ("flac", "s16")}[muxer]
    with av.open(str(path), "w") as out:
        sound, cover = out.add_stream(codec, rate=44100, layout="mono"), out.add_stream("png")
        assert isinstance(cover, av.VideoStream)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        out.start_encoding()
        out.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))))
        for block in range(40):
            silence = np.zeros((1, 1024), np.int16 if cells == "s16" else np.float32)
            frame = av.AudioFrame.from_ndarray(silence, format=cells, layout="mono")
            frame.sample_rate, frame.pts = 44100, 1024 * block
            out.mux(sound.encode(frame))  # type: ignore[union-attr,arg-type]  # PyAV: any stream
        out.mux(sound.encode(None))  # type: ignore[union-attr]
    with av.open(str(path)) as made:
        assert len(made.streams.video) == 1
    clip = reader.read(path.read_bytes(), None)
    assert len(clip.frames) == 0 and len(clip.waveform) > 0.8 * RATE


def patched(data: bytes, mark: bytes, value: float) -> bytes:
    at = data.index(mark) + len(mark)
    return data[:at] + struct.pack(">d", value) + data[at + 8 :]


@pytest.mark.parametrize(
    ("data", "noted"),
    [
        (lambda: make_clip("webm", options={"live": "1"}), False),  # no duration at all
        (lambda: make_clip("flv", options={"flvflags": "no_duration_filesize"}), False),
        (lambda: patched(make_clip("webm"), b"\x44\x89\x88", 1000.0), False),  # ms: too short
        (lambda: patched(make_clip("webm"), b"\x44\x89\x88", 100_000.0), True),
        (lambda: patched(make_clip("flv"), b"duration\0", 1.0), False),
        (lambda: patched(make_clip("flv"), b"duration\0", 100.0), True),
        (lambda: make_clip("mp4", sound=False, options={"movflags": "frag_keyframe+empty_moov"}), False),
    ],
)
def test_the_duration_in_the_header_is_not_believed(
    reader: MediaReader, data: Callable[[], bytes], noted: bool
) -> None:
    clip = reader.read(data(), None)
    assert numbers(clip) == MIDDLES_3S
    assert len(clip.notes) == noted and all("header promises 100.00 s, but it holds 3.0" in n for n in clip.notes)


@pytest.mark.parametrize("container", ["mp4", "mkv"])
@pytest.mark.parametrize(
    "options",
    [
        {"preset": "medium", "bf": "3"},
        {"preset": "medium", "bf": "3", "x264-params": "open-gop=1:keyint=12:min-keyint=12"},
        {"preset": "medium", "bf": "3", "g": "250"},
        {"g": "1"},
    ],
)
def test_frames_that_are_coded_out_of_order(reader: MediaReader, container: str, options: dict[str, str]) -> None:
    clip = reader.read(make_clip(container, sound=False, video_options=options), None)
    assert numbers(clip) == MIDDLES_3S


def test_frames_between_key_frames_that_no_one_asked_for_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode_next = media_decode._Player._decode
    monkeypatch.setattr(media_decode._Player, "_decode", lambda self: decoded.append(1) or decode_next(self))
    job = media_decode.Job(limits=MediaLimits(), frames=2, sample_rate=RATE)
    data = np.frombuffer(make_clip("mp4", sound=False, keyframe_every=5), np.uint8)
    clip = media_decode.decode(data, None, job)
    assert numbers(clip) == [18, 56]
    assert len(decoded) < 20  # of 75


def test_wrongly_marked_key_frames(reader: MediaReader) -> None:
    data = make_clip("mp4", sound=False, video_options={"preset": "medium", "bf": "3"})
    assert b"stss" in data  # the list of key frames: without it, all are said to be
    assert numbers(reader.read(data.replace(b"stss", b"free"), None)) == MIDDLES_3S


@pytest.mark.parametrize("container", VIDEO)
def test_frames_are_chosen_by_time_not_by_count(reader: MediaReader, container: str) -> None:
    clip = reader.read(make_clip(container, skip=range(20, 50), sound=False), None)
    assert numbers(clip) == [19 if 20 <= number < 50 else number for number in MIDDLES_3S]
    np.testing.assert_allclose(clip.frame_times_s, np.array(numbers(clip)) / 25, atol=2e-3)


def test_clips_of_few_frames_repeat_them(reader: MediaReader) -> None:
    one = reader.read(make_clip("mp4", seconds=0.04, sound=False), None)
    assert numbers(one) == [0] * FRAMES and not one.frame_times_s.any()
    three = reader.read(make_clip("webm", seconds=0.12, sound=False), None)
    assert numbers(three) == [0, 0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation(reader: MediaReader, turns: int) -> None:
    clip = reader.read(media_factory.rotate(make_clip("mp4", seconds=1), turns), None)
    assert clip.frames.shape[1:3] == ((64, 48) if turns % 2 else (48, 64))
    upright = [read_number(np.rot90(frame, turns)) for frame in clip.frames]  # rot90 turns the other way
    assert upright == [int((i + 0.5) * 25 / FRAMES) for i in range(FRAMES)]


def test_large_frames_are_scaled_down(reader: MediaReader) -> None:
    clip = reader.read(make_clip("mp4", size=(1280, 720), seconds=0.4, sound=False), None)
    assert clip.frames.shape == (FRAMES, 360, MAX_SIDE, 3)
    assert numbers(clip) == [int((i + 0.5) * 10 / FRAMES) for i in range(FRAMES)]


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (3, 2)])
def test_tiny_frames(reader: MediaReader, size: tuple[int, int]) -> None:
    image = np.full((size[1], size[0], 3), (200, 100, 50), np.uint8)
    clip = reader.read(make_clip("png-mov", size=size, frames=[image] * 3, sound=False), None)
    assert clip.frames.shape == (FRAMES, min(size[1], MAX_SIDE), min(size[0], MAX_SIDE), 3)
    assert (clip.frames == (200, 100, 50)).all()


@pytest.mark.parametrize(
    ("container", "options"),
    [("mp4", {"movflags": "faststart"}), ("mov", {"movflags": "faststart"}), ("mkv", {}), ("webm", {}), ("flv", {})],
)
def test_a_clip_cut_in_the_middle_is_used_and_noted(
    reader: MediaReader, container: str, options: dict[str, str]
) -> None:
    data = make_clip(container, options=options)
    clip = reader.read(data[: len(data) // 2], None)
    found = numbers(clip)
    count = found[-1] * FRAMES / (FRAMES - 0.5)  # frames that were left: about half of 75
    assert 25 < count < 50
    np.testing.assert_allclose(found, (np.arange(FRAMES) + 0.5) * count / FRAMES, atol=1.1)
    assert_tone(clip.waveform, 440, 0.5)
    assert any("header promises 3.0" in note and "were used" in note for note in clip.notes)


@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1", "7.1"])
def test_downmix_neither_overflows_nor_fades(reader: MediaReader, layout: str) -> None:
    clip = reader.read(None, make_clip("float-wav", layout=layout, sample_rate=192_000, seconds=1, amplitude=1))
    assert len(clip.waveform) == RATE and np.abs(clip.waveform).max() <= 1 and clip.notes == ()
    hertz, amplitude = tone_of(clip.waveform)
    assert abs(hertz - 440) < 3 and abs(amplitude - 1) < 1e-3


def raw_wav(channels: int, rate: int, samples: NDArray[np.int16]) -> bytes:
    """A wav with the plain header of 44 bytes, which does not say which channel is which; samples i16 [channels, n]."""
    pcm = samples.T.astype("<i2").tobytes()
    form = struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * channels * 2, channels * 2, 16)
    return b"".join(
        [b"RIFF", struct.pack("<I", 36 + len(pcm)), b"WAVEfmt ", form, b"data", struct.pack("<I", len(pcm)), pcm]
    )


@pytest.mark.parametrize("channels", [2, 3, 5, 7, 8])
def test_channels_without_names(reader: MediaReader, channels: int) -> None:
    wave = media_factory.sine(0.5, sample_rate=192_000, channels=channels, tone_hz=440, amplitude=0.9)
    clip = reader.read(None, raw_wav(channels, 192_000, (wave * 32767).astype(np.int16)))
    assert abs(tone_of(clip.waveform)[1] - 0.9) < 1e-3


def test_stereo_is_the_mean(reader: MediaReader) -> None:
    left = media_factory.sine(0.5, sample_rate=RATE, channels=1, tone_hz=440, amplitude=0.8)
    both = np.concatenate([left, np.zeros_like(left)])
    clip = reader.read(None, make_clip("float-wav", layout="stereo", sample_rate=RATE, samples=both))
    np.testing.assert_allclose(clip.waveform, left[0] / 2, atol=1e-6)


def test_sound_beyond_full_scale_is_scaled_and_noted(reader: MediaReader) -> None:
    wave = media_factory.sine(0.5, sample_rate=RATE, channels=1, tone_hz=440, amplitude=20_000)
    clip = reader.read(None, make_clip("float-wav", sample_rate=RATE, samples=wave))
    assert np.abs(clip.waveform).max() <= 1 and abs(tone_of(clip.waveform)[1] - 1) < 1e-3
    assert clip.notes == ("audio_bytes: sound with a peak of 2e+04 times full scale was scaled down to 1",)


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
        ("video_bytes", "max_seconds = 30"),
    ),
    "long sound": (lambda: None, lambda: make_clip("flac", seconds=31), ("audio_bytes", "max_seconds = 30")),
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
        with pytest.raises(MediaError, match=rf"audio_bytes has {len(data)} bytes, the limit is max_bytes = "):
            reader.read(None, data)
        assert len(reader.read(None, data[:-1]).waveform) > 0


@pytest.mark.parametrize("name", ["max_seconds", "max_bytes", "timeout_s"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_limits_are_checked(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        MediaLimits(**{name: value})  # type: ignore[arg-type]


def test_playlists_cannot_reach_other_files(reader: MediaReader, tmp_path: Path) -> None:
    secret = tmp_path / "secret.wav"
    secret.write_bytes(make_clip("wav", seconds=1))
    playlists = (
        f"ffconcat version 1.0\nfile '{secret}'\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret.as_uri()}\n#EXT-X-ENDLIST\n",
    )
    for playlist in playlists:
        with pytest.raises(MediaError, match="is no media file"):
            reader.read(playlist.encode(), None)


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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_worker_killed_during_a_request(reader: MediaReader, number: signal.Signals) -> None:
    data = make_clip("mp4", seconds=0.5)

    def kill(pid: int) -> None:
        os.kill(pid, number)
        os.kill(pid, signal.SIGCONT)

    before = reader.pid
    error = stop_then(reader, kill, data)
    assert f"video_bytes: the decoding process ended (signal {int(number)}" in str(error)
    assert "re-encode" in str(error)
    assert len(reader.read(data, None).frames) == FRAMES
    assert before is not None and reader.pid != before and gone(before)


def test_a_worker_that_hangs_is_replaced() -> None:
    data = make_clip("mp4", seconds=0.5)
    with new_reader(timeout_s=0.5) as reader:
        hung = reader.pid
        start = time.monotonic()
        error = stop_then(reader, lambda pid: None, data)
        assert 0.4 < time.monotonic() - start < 3
        assert "video_bytes: decoding took longer than timeout_s = 0.5" in str(error)
        assert hung is not None and gone(hung)
        assert len(reader.read(data, None).frames) == FRAMES


def test_a_request_too_large_for_the_pipe_also_times_out() -> None:
    with new_reader(timeout_s=0.5) as reader:
        error = stop_then(reader, lambda pid: None, bytes(1 << 22))  # the worker never reads it
        assert "timeout_s = 0.5" in str(error)


def test_a_worker_that_died_idle_is_replaced_unnoticed(reader: MediaReader) -> None:
    assert reader.pid is not None
    os.kill(reader.pid, signal.SIGKILL)
    assert gone(reader.pid)
    assert len(reader.read(None, make_clip("wav", seconds=0.1)).waveform) == RATE // 10


def test_memory_is_limited() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (2304, 4096, 3), np.uint8)
    data = make_clip("png-mov", size=(4096, 2304), sound=False, frames=[noise])
    with new_reader(max_memory_bytes=300 << 20) as reader:
        before = reader.pid
        with pytest.raises(MediaError, match="more memory than max_memory_bytes = 314572800"):
            reader.read(data, None)
        assert len(reader.read(make_clip("mp4", seconds=0.5), None).frames) == FRAMES
        assert reader.pid != before


def test_an_interrupt_leaves_no_half_read_answer(reader: MediaReader, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(media, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reader.read(make_clip("mp4", seconds=0.5), None)
    clip = reader.read(None, make_clip("wav", seconds=0.1))
    assert len(clip.frames) == 0 and len(clip.waveform) == RATE // 10


IMPOSSIBLE = {
    "noise": "os.write(1, bytes(64)); time.sleep(60)",
    "text": "print('hello', flush=True); time.sleep(60)",
    "exit": "sys.exit(3)",
    "too large": "text = b'{\"sizes\": [1000000000]}'; os.write(1, len(text).to_bytes(4, 'little') + text)",
    "long header": "os.write(1, b'\\xff\\xff\\xff\\x7f')",
    "too many": "send(out, {'shape': [9, 1, 1], 'notes': []}, [bytes(27), bytes(36), b''])",
    "wrong shape": "send(out, {'shape': [8, 9, 9], 'notes': []}, [bytes(27), bytes(32), b''])",
    "negative": "send(out, {'shape': [-1, -1, 9], 'notes': []}, [bytes(27), bytes(4), b''])",
    "two blobs": "send(out, {'shape': [0, 0, 0], 'notes': []}, [b'', b''])",
    "no shape": "send(out, {'notes': []}, [b'', b'', b''])",
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_answers_that_make_no_sense_are_not_believed(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "taken_over.py").write_text(
        "import io, os, sys, time\nfrom mosear.runtime.media import receive, send\n"
        "out = io.FileIO(1, 'w')\nsend(out, {'ready': True}, [])\n"
        f"receive(io.FileIO(0), 1 << 20)\n{IMPOSSIBLE[name]}\ntime.sleep(60)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(media, "_MODULE", "taken_over")
    with new_reader(timeout_s=5) as reader, pytest.raises(MediaError, match="the decoding process ended"):
        reader.read(None, b"anything")


def test_a_worker_that_cannot_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "_MODULE", "no_such_module")
    with pytest.raises(MediaError, match=r"did not start \(exit code 1"):
        new_reader()


def test_threads_take_turns(reader: MediaReader) -> None:
    clips = [make_clip("wav", seconds=0.1 * (i + 1)) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        lengths = list(pool.map(lambda i: len(reader.read(None, clips[i % 4]).waveform), range(16)))
    assert lengths == [RATE // 10 * (i % 4 + 1) for i in range(16)]


def test_nothing_is_printed(reader: MediaReader, capfd: pytest.CaptureFixture[str]) -> None:
    data = make_clip("mkv")
    reader.read(data[: len(data) // 2], None)
    assert capfd.readouterr() == ("", "")


def test_the_worker_is_light(reader: MediaReader) -> None:
    maps = Path(f"/proc/{reader.pid}/maps").read_text()
    assert "libavcodec" in maps
    assert not [name for name in ("torch", "onnxruntime", "scipy", "PIL") if f"/{name}/" in maps]


def test_close_ends_the_worker() -> None:
    reader = new_reader()
    pid = reader.pid
    assert pid is not None and not gone(pid, 0.05)
    reader.close()
    reader.close()
    assert gone(pid) and reader.pid is None
    with pytest.raises(MediaError, match="closed"):
        reader.read(None, b"x")


def orphan(script: str) -> int:
    """Run a parent that makes a reader and runs `script`, kill it, and return its worker's process id."""
    source = f"""
        import os, subprocess, sys, time
        from mosear.runtime.media import MediaLimits, MediaReader
        reader = MediaReader(MediaLimits(), frames=1, sample_rate={RATE})
        {script}
        print(reader.pid, flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(source)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid, 0.05)
        parent.kill()
    return pid


def test_the_worker_ends_with_its_parent() -> None:
    assert gone(orphan(""), 1.0)


def test_the_worker_ends_with_its_parent_though_another_child_holds_its_pipe() -> None:
    sleeper = "subprocess.Popen(['sleep', '4'], close_fds=False, pass_fds=[reader._worker.outbox.fileno()])"
    assert gone(orphan(sleeper), 3.0)


def test_readers_do_not_share_a_worker() -> None:
    with new_reader() as one, new_reader() as other:
        assert one.pid != other.pid
        one.close()
        assert len(other.read(None, make_clip("wav", seconds=0.1)).waveform) == RATE // 10
