"""Labelled voices and faces, and pairs of them: consistent, led by the voice, led by the face, in open conflict.

Layout of a data folder: `voices/labels.csv` (file, emotion, speaker) beside the sounds, `faces/<split>/labels.csv` (file,
emotion) beside the photos. Face and voice of a pair are different people.
"""

import enum
import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mosear.backends.session import Runner
from mosear.config import ModelConfig
from mosear.errors import ConfigError
from mosear_export.labelled import FRAMES, face_features, rows, voice_features

FloatArray = npt.NDArray[np.float32]
NEUTRAL = "neutral"


class Kind(enum.StrEnum):
    """What a pair is. Of the two in the middle one side is neutral, and the truth is the other's label."""

    CONSISTENT = "consistent"
    VOICE_LED = "voice-led"
    FACE_LED = "face-led"
    OPEN = "open"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A sound or a photo with its label. origin: speaker or split."""

    path: Path
    emotion: str
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Indices of a voice and a face."""

    kind: Kind
    voice: int
    face: int


def read_voices(data: Path, speakers: Collection[str]) -> list[Sample]:
    """The sounds of these speakers; raises ConfigError naming what is missing."""
    table = rows(data / "voices" / "labels.csv", ("file", "emotion", "speaker"))
    if unknown := set(speakers) - {row["speaker"] for row in table}:
        raise ConfigError(f"{data}/voices has no speaker {', '.join(sorted(unknown))}: name some of its labels.csv")
    return [
        Sample(path=data / "voices" / row["file"], emotion=row["emotion"], origin=row["speaker"])
        for row in table
        if row["speaker"] in speakers
    ]


def read_faces(data: Path, split: str) -> list[Sample]:
    """The photos of a split; raises ConfigError naming what is missing."""
    folder = data / "faces" / split
    table = rows(folder / "labels.csv", ("file", "emotion"))
    return [Sample(path=folder / row["file"], emotion=row["emotion"], origin=split) for row in table]


def make_pairs(
    voices: Sequence[Sample], faces: Sequence[Sample], labels: Collection[str], *, count: int, seed: int
) -> list[Pair]:
    """`count` pairs of each kind over the labels that both modalities have, every label as often as another.

    Raises ConfigError where fewer than two labels but `neutral` are shared.
    """
    shared = [x for x in labels if any(v.emotion == x for v in voices) and any(f.emotion == x for f in faces)]
    loud = [label for label in shared if label != NEUTRAL]
    if NEUTRAL not in shared or len(loud) < 2:
        raise ConfigError(f"voices and faces share {shared}: pairs need neutral and two other labels of the model's")
    both = {
        Kind.CONSISTENT: [(x, x) for x in shared],
        Kind.VOICE_LED: [(x, NEUTRAL) for x in loud],
        Kind.FACE_LED: [(NEUTRAL, x) for x in loud],
        Kind.OPEN: [(x, y) for x in loud for y in loud if x != y],
    }
    rng, pairs = np.random.default_rng(seed), []
    for kind, emotions in both.items():
        order = rng.permutation(len(emotions))
        for i in range(count):
            heard, seen = emotions[order[i % len(emotions)]]
            pairs.append(Pair(kind=kind, voice=_draw(rng, voices, heard), face=_draw(rng, faces, seen)))
    return pairs


def _draw(rng: np.random.Generator, samples: Sequence[Sample], emotion: str) -> int:
    return int(rng.choice([i for i, sample in enumerate(samples) if sample.emotion == emotion]))


def truth(pair: Pair, voices: Sequence[Sample], faces: Sequence[Sample]) -> str | None:
    """The label that is right; None for an open conflict."""
    heard, seen = voices[pair.voice].emotion, faces[pair.face].emotion
    return {Kind.CONSISTENT: heard, Kind.VOICE_LED: heard, Kind.FACE_LED: seen, Kind.OPEN: None}[pair.kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Features: voices [n, tokens, F], faces [n, F]."""

    voices: FloatArray
    faces: FloatArray

    def of(self, voice: int | None, face: int | None) -> dict[str, FloatArray]:
        """A request's features."""
        found = {} if voice is None else {"voice": self.voices[voice]}
        return found if face is None else found | {"face": np.repeat(self.faces[face, None], FRAMES, axis=0)}


def encode_all(
    backend: Runner, config: ModelConfig, voices: Sequence[Sample], faces: Sequence[Sample], *, work: Path, schema: str,
    say: Callable[[str], None],
) -> Encoded:  # fmt: skip
    """What the encoders say of every sample, kept in `work` under the encoders' and the data's names."""
    names = "\n".join([schema, *(str(x.path.resolve()) for x in (*voices, *faces))])
    path = work / f"features-{hashlib.sha256(names.encode()).hexdigest()[:12]}.npz"
    if not path.exists():
        heard, seen = [], []
        for i, sample in enumerate(voices):
            heard.append(voice_features(backend, config, sample.path))
            if i % 50 == 0:
                say(f"encoding voices: {i} of {len(voices)}")
        for i, sample in enumerate(faces):
            seen.append(face_features(backend, config, sample.path))
            if i % 200 == 0:
                say(f"encoding faces: {i} of {len(faces)}")
        work.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part.npz")
        np.savez(partial, voices=np.stack(heard), faces=np.stack(seen))
        partial.replace(path)
    stored = np.load(path)
    return Encoded(voices=stored["voices"], faces=stored["faces"])
