"""From a clip to features: faces found and cut out, encoders run, each stage timed; and from features to prompt tokens."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mosear.backends.session import Runner
from mosear.config import ModelConfig
from mosear.runtime import preprocess
from mosear.runtime.media import Clip
from mosear.runtime.sampling import FloatArray

T = TypeVar("T")
Picture = npt.NDArray[np.uint8]


class Stages:
    """Wall time of named stages, in ms; a stage that runs again adds up."""

    def __init__(self) -> None:
        self.times_ms: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.add(name, (time.perf_counter() - start) * 1e3)

    def add(self, name: str, ms: float) -> None:
        self.times_ms[name] = self.times_ms.get(name, 0.0) + ms


Timer = Callable[[str], AbstractContextManager[None]]


def encode(backend: Runner, config: ModelConfig, clip: Clip, stage: Timer) -> tuple[dict[str, FloatArray], list[str]]:
    """Features [n, size] of each field that the clip brings (face, scene, voice), and notes for the user."""
    features: dict[str, FloatArray] = {}
    notes: list[str] = []
    if len(clip.frames):
        with stage("face_detector"):
            crops, found = _faces(backend, config, clip.frames)
        if found < len(clip.frames):
            notes.append(
                f"no face was found in {len(clip.frames) - found} of {len(clip.frames)} frames: centre crop used"
            )
        with stage("face"):
            features["face"] = _f32(backend.run("face", {"crops": crops})["face_features"])
        with stage("scene"):
            image = preprocess.scene_image(clip.frames[0], config.scene.image_size)
            features["scene"] = _f32(backend.run("scene", {"images": image[None]})["scene_features"][0])
    if len(clip.waveform):
        with stage("voice"):
            mel, frames = preprocess.log_mel(clip.waveform, config.voice)
            heard = backend.run("voice", {"mel": mel[None], "voice_frames": np.array([frames], np.int32)})
            features["voice"] = _f32(heard["voice_features"][0])
    return features, notes


def project(backend: Runner, features: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Prompt tokens [n, d] of each field from its features [n, size]."""
    return {field: _projected(backend, field, values) for field, values in features.items()}


def _projected(backend: Runner, field: str, values: FloatArray) -> FloatArray:
    one_by_one = field == "face"  # its axis of pictures is the batch; other fields are one picture, one sound each
    given = values if one_by_one else values[None]
    found = _f32(backend.run(f"{field}_projector", {f"{field}_features": given})[f"{field}_tokens"])
    return found if one_by_one else found[0]


def _faces(backend: Runner, config: ModelConfig, frames: Picture) -> tuple[Picture, int]:
    """Face crops u8 [F, crop, crop, 3], and in how many frames a face was found."""
    face = config.face
    pictures = np.stack([preprocess.square(frame, face.detector_size, center=False) for frame in frames])
    out = backend.run("face_detector", {"pictures": pictures})
    boxes = [
        preprocess.best_face(_f32(box), _f32(score), face.detector_threshold)
        for box, score in zip(out["boxes"], out["box_scores"], strict=True)
    ]
    crops = [
        preprocess.square(preprocess.crop_face(frame, box), face.crop_size, center=True)
        for frame, box in zip(frames, boxes, strict=True)
    ]
    return np.stack(crops), sum(box is not None for box in boxes)


def _f32(array: npt.NDArray[np.generic]) -> FloatArray:
    return np.asarray(array, np.float32)
