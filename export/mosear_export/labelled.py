"""Labelled voices and faces of a data folder, and what the frozen encoders say of one clip: free of torch.

Layout: `voices/labels.csv` (file, emotion, speaker) beside the sounds, `faces/<split>/labels.csv` (file, emotion) beside
the photos.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from mosear.backends.session import Runner
from mosear.config import ModelConfig
from mosear.errors import ConfigError
from mosear.runtime.preprocess import log_mel, square

FloatArray = npt.NDArray[np.float32]
FRAMES = 4  # how many times a photo stands for a frame


def rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a labels.csv; raises ConfigError where it cannot be read, is empty or lacks one of `columns`."""
    try:
        with path.open(newline="") as file:
            found = list(csv.DictReader(file))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error}): give a folder with voices/ and faces/") from error
    if not found or (missing := set(columns) - set(found[0])):
        raise ConfigError(
            f"{path} must have rows with {', '.join(columns)}: {sorted(missing) if found else 'it is empty'}"
        )
    return found


def read_sound(path: Path) -> FloatArray:
    """A sound file as f32 [n] at its own rate, first channel."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
    sound = np.concatenate(frames, axis=-1)[0]
    samples: FloatArray = sound.astype(np.float32) / (np.iinfo(sound.dtype).max if sound.dtype.kind == "i" else 1)
    return samples


def trim(sound: FloatArray) -> FloatArray:
    """Without the digital silence at the end, which would tell how long the utterance was."""
    loud = np.flatnonzero(np.abs(sound) > 1e-3)
    return sound[: loud[-1] + 1] if len(loud) else sound


def voice_features(runner: Runner, config: ModelConfig, path: Path) -> FloatArray:
    """[tokens, F] of a sound file, trimmed."""
    mel, frames = log_mel(trim(read_sound(path)), config.voice)
    found = runner.run("voice", {"mel": mel[None], "voice_frames": np.array([frames], np.int32)})
    return np.asarray(found["voice_features"][0], np.float32)


def face_features(runner: Runner, config: ModelConfig, path: Path) -> FloatArray:
    """[F] of a photo that shows a face alone: the whole of it is the crop."""
    crop = square(np.asarray(Image.open(path).convert("RGB")), config.face.crop_size, center=True)
    return np.asarray(runner.run("face", {"crops": crop[None]})["face_features"][0], np.float32)
