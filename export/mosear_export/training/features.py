"""Encoder outputs of the labelled voices and faces, computed once and kept: the encoders are frozen.

Data layout: `voices/labels.csv` (file, emotion, speaker, sentence) beside the sounds, `faces/train` and `faces/dev` with a
labels.csv (file, emotion) each. Every clip gets variants, so that heads do not learn a recording by heart.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from mosear.runtime.preprocess import log_mel, scene_image, square
from mosear_export.labelled import read_sound, trim
from mosear_export.model.whole import ReferenceModel

Array = npt.NDArray[np.float32]
Report = Callable[[str], None]
SCENES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """Features with labels: values [n, variants, ...], emotion and origin (speaker, or split) of each."""

    values: Array
    emotion: npt.NDArray[np.str_]
    origin: npt.NDArray[np.str_]

    def where(self, keep: npt.NDArray[np.bool_]) -> "Labelled":
        return Labelled(values=self.values[keep], emotion=self.emotion[keep], origin=self.origin[keep])


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What training reads: voices [n, v, tokens, F], faces [n, v, F], scenes [n, tokens, F] (unlabelled)."""

    voices: Labelled
    faces: Labelled
    scenes: Array


def compute(model: ReferenceModel, data: Path, cache: Path, report: Report) -> Features:
    """Features of all data, from the cache file where it is there."""
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        voices, faces = _voices(model, data / "voices", report), _faces(model, data / "faces", report)
        scenes = _scenes(model, data / "faces" / "train", report)
        arrays = {f"voice_{k}": getattr(voices, k) for k in voices.__slots__}
        arrays |= {f"face_{k}": getattr(faces, k) for k in faces.__slots__}
        partial = cache.with_suffix(".part.npz")
        np.savez(partial, scenes=scenes, **arrays)
        partial.replace(cache)
    stored = np.load(cache)
    voices, faces = (Labelled(**{k: stored[f"{kind}_{k}"] for k in Labelled.__slots__}) for kind in ("voice", "face"))
    return Features(voices=voices, faces=faces, scenes=stored["scenes"])


def _voice_variants(sound: Array, rng: np.random.Generator) -> list[Array]:
    short = trim(sound)
    start = rng.integers(0, len(short) // 6 + 1)
    noise = rng.standard_normal(len(short)).astype(np.float32) * np.sqrt(np.mean(short**2)) * 0.03
    return [
        short,
        sound,
        short[start : start + len(short) * 5 // 6],
        (short + noise) * np.float32(rng.uniform(0.3, 1.0)),
    ]


def _voices(model: ReferenceModel, folder: Path, report: Report) -> Labelled:
    rows, rng = list(csv.DictReader((folder / "labels.csv").open())), np.random.default_rng(0)
    values = []
    for i, row in enumerate(rows):
        variants = []
        for sound in _voice_variants(read_sound(folder / row["file"]), rng):
            mel, frames = log_mel(sound, model.config.voice)
            inputs = {"mel": torch.from_numpy(mel)[None], "voice_frames": torch.tensor([frames], dtype=torch.int32)}
            variants.append(model.run("voice", inputs)["voice_features"][0].numpy())
        values.append(np.stack(variants))
        if i % 100 == 0:
            report(f"voices: {i} of {len(rows)}")
    return _labelled(values, rows, [row["speaker"] for row in rows])


def _faces(model: ReferenceModel, folder: Path, report: Report) -> Labelled:
    values, rows, origin = [], [], []
    for split in ("train", "dev"):
        found = list(csv.DictReader((folder / split / "labels.csv").open()))
        for i, row in enumerate(found):
            picture = np.asarray(Image.open(folder / split / row["file"]).convert("RGB"))
            crop = square(picture, model.config.face.crop_size, center=True)
            crops = torch.from_numpy(np.stack([crop, crop[:, ::-1]]))
            values.append(model.run("face", {"crops": crops})["face_features"].numpy())
            if i % 500 == 0:
                report(f"faces: {split} {i} of {len(found)}")
        rows += found
        origin += [split] * len(found)
    return _labelled(values, rows, origin)


def _scenes(model: ReferenceModel, folder: Path, report: Report) -> Array:
    report(f"scenes: {SCENES}")
    values = []
    for row in list(csv.DictReader((folder / "labels.csv").open()))[:: 2100 // SCENES][:SCENES]:
        picture = np.asarray(Image.open(folder / row["file"]).convert("RGB"))
        image = torch.from_numpy(scene_image(picture, model.config.scene.image_size))[None]
        values.append(model.run("scene", {"images": image})["scene_features"][0].numpy())
    return np.stack(values)


def _labelled(values: list[Array], rows: list[dict[str, str]], origin: list[str]) -> Labelled:
    return Labelled(
        values=np.stack(values), emotion=np.array([row["emotion"] for row in rows]), origin=np.array(origin)
    )
