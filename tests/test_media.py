"""Media bytes to arrays: what is in a file of every container comes out, at the right time and strength."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import av
import media_factory
import numpy as np
import pytest
from media_factory import (
    FRAMES,
    RATE,
    SOUND,
    VIDEO,
    assert_tone,
    frame_colour,
    make_clip,
    new_reader,
    numbers,
    raw_wav,
    read_number,
    tone_of,
)
from numpy.typing import NDArray

from mosear.runtime import media_decode
from mosear.runtime.media import MAX_SIDE, MediaLimits, MediaReader

MIDDLES_3S = [int((i + 0.5) * 75 / FRAMES) for i in range(FRAMES)]  # of 75 frames


@pytest.fixture(scope="module")
def reader() -> Iterator[MediaReader]:
    with new_reader() as made:
        yield made


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


def covered(path: Path, codec: str, frames: list[NDArray[np.uint8]] | None) -> bytes:
    """A second of silence with a cover picture, and after it a stream of frames RGB [48, 64, 3] if there are any."""
    with av.open(str(path), "w") as out:
        sound = cast(av.AudioStream, out.add_stream(codec, rate=44100, layout="mono"))
        cover = out.add_stream("png")
        cover.width, cover.height, cover.pix_fmt = 64, 48, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        shown = out.add_stream("libx264", rate=25) if frames else None
        if shown:
            shown.width, shown.height, shown.pix_fmt = 64, 48, "yuv420p"
        out.start_encoding()
        out.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
        for image in frames or []:
            assert shown
            out.mux(shown.encode(av.VideoFrame.from_ndarray(image)))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.int16), format="s16", layout="mono")
        silence.sample_rate = 44100
        fitting = av.AudioResampler(sound.codec_context.format, "mono", 44100, sound.codec_context.frame_size)
        for frame in [*fitting.resample(silence), *fitting.resample(None)]:
            out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
        out.mux(shown.encode(None) if shown else [])
    return path.read_bytes()


@pytest.mark.parametrize(("suffix", "codec"), [("mp3", "libmp3lame"), ("mp4", "aac"), ("flac", "flac")])
def test_cover_art_is_no_video(reader: MediaReader, tmp_path: Path, suffix: str, codec: str) -> None:
    clip = reader.read(covered(tmp_path / f"cover.{suffix}", codec, None), None)
    assert len(clip.frames) == 0 and len(clip.waveform) > 0.9 * RATE


def test_cover_art_before_the_video(reader: MediaReader, tmp_path: Path) -> None:
    frames = [media_factory.picture(i, (64, 48)) for i in range(8)]
    clip = reader.read(covered(tmp_path / "cover.mp4", "aac", frames), None)
    assert numbers(clip) == list(range(8))


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


def flv_tags(data: bytes | bytearray) -> Iterator[tuple[int, int, int, int]]:
    """(kind, time in ms, start, end) of the tags of an flv file: kind 8 is sound, 9 pictures, 18 text."""
    start = 13
    while start + 11 < len(data):
        end = start + 15 + int.from_bytes(data[start + 1 : start + 4], "big")
        yield data[start], int.from_bytes(data[start + 4 : start + 7], "big"), start, end
        start = end


def test_sound_that_begins_late_is_found(reader: MediaReader) -> None:
    data = make_clip("flv", seconds=12)
    kept = [data[start:end] for kind, ms, start, end in flv_tags(data) if kind != 8 or ms == 0 or ms >= 8000]
    clip = reader.read(data[:13] + b"".join(kept), None)
    assert abs(len(clip.waveform) / RATE - 4) < 0.1 and clip.notes == ()


def test_a_stream_that_no_one_knew_of_is_left_out(reader: MediaReader) -> None:
    data = bytearray(make_clip("flv", seconds=12))
    late = [start for kind, ms, start, _ in flv_tags(data) if kind == 9 and ms > 11_000]
    data[late[0]] = 18
    clip = reader.read(bytes(data), None)
    assert numbers(clip) == [int((i + 0.5) * 300 / FRAMES) for i in range(FRAMES)]
    assert clip.notes == ("video_bytes: a stream that begins late was left out",)


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

    def counted(player: media_decode._Player) -> None:
        decoded.append(1)
        decode_next(player)

    monkeypatch.setattr(media_decode._Player, "_decode", counted)
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
