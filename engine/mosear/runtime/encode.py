"""From a clip to projected tokens: faces found and cut out, encoders and projectors run, each stage timed."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mosear.backends.session import Backend
from mosear.config import ModelConfig
from mosear.runtime import preprocess
from mosear.runtime.media import Clip
from mosear.runtime.sampling import FloatArray

T = TypeVar("T")
Picture = npt.NDArray[np.uint8]


class Stages:
    """Wall time of named stages, in ms; a stage that runs again adds up."""

    def __init__(self, report: Callable[[str, float], None] | None = None) -> None:
        self.times_ms: dict[str, float] = {}
        self._report = report

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        spent = (time.perf_counter() - start) * 1e3
        self.times_ms[name] = self.times_ms.get(name, 0.0) + spent
        if self._report:
            self._report(name, spent)


Timer = Callable[[str], AbstractContextManager[None]]


def encode(backend: Backend, config: ModelConfig, clip: Clip, stage: Timer) -> tuple[dict[str, FloatArray], list[str]]:
    """Projected tokens [n, d] of each field that the clip brings (face, scene, voice), and notes for the user."""
    tokens: dict[str, FloatArray] = {}
    notes: list[str] = []
    if len(clip.frames):
        with stage("face_detector"):
            crops, found = _faces(backend, config, clip.frames)
        if found < len(clip.frames):
            notes.append(
                f"no face was found in {len(clip.frames) - found} of {len(clip.frames)} frames: centre crop used"
            )
        with stage("face"):
            features = backend.run("face", {"crops": crops})
            tokens["face"] = _f32(backend.run("face_projector", features)["face_tokens"])
        with stage("scene"):
            image = preprocess.scene_image(clip.frames[0], config.scene.image_size)
            features = backend.run("scene", {"images": image[None]})
            tokens["scene"] = _f32(backend.run("scene_projector", features)["scene_tokens"][0])
    if len(clip.waveform):
        with stage("voice"):
            mel, frames = preprocess.log_mel(clip.waveform, config.voice)
            features = backend.run("voice", {"mel": mel[None], "voice_frames": np.array([frames], np.int32)})
            tokens["voice"] = _f32(backend.run("voice_projector", features)["voice_tokens"][0])
    return tokens, notes


def _faces(backend: Backend, config: ModelConfig, frames: Picture) -> tuple[Picture, int]:
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
