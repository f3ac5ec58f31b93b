"""Real clips, balanced over what they bring: a voice, a face, both, or words alone, and over labels within each.

The data folder's layout is that of training (`training/features.py`). Calibration takes speakers that parity never hears,
and other photos. Face and voice of a clip are different people.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mosear.backends.session import Runner
from mosear.config import ModelConfig
from mosear.errors import ConfigError
from mosear.runtime.sampling import FloatArray
from mosear_export.labelled import FRAMES, face_features, rows, voice_features
from mosear_export.training.examples import PLAIN_WORDS, TELLING_WORDS


class Kind(enum.StrEnum):
    """What a clip brings."""

    VOICE = "voice"
    FACE = "face"
    BOTH = "both"
    TEXT = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Which files of a data folder are taken: photos of a split, and the voices of these speakers, or of all others."""

    split: str
    speakers: tuple[str, ...]
    others: bool = False

    def takes(self, speaker: str) -> bool:
        return (speaker in self.speakers) != self.others


HELD_OUT = ("14", "15")  # speakers that the demo's heads have not heard
CALIBRATION = Source(split="train", speakers=HELD_OUT, others=True)
PARITY = Source(split="dev", speakers=HELD_OUT)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """A clip's features [n, size] by field, its words, and the emotions of its voice and its face ('' where there is none)."""

    kind: Kind
    features: dict[str, FloatArray]
    words: str
    heard: str = ""
    seen: str = ""


def read_cases(
    data: Path, source: Source, runner: Runner, config: ModelConfig, *, each: int, seed: int = 0
) -> list[Case]:
    """`each` cases of every kind, labels as often as one another, encoded by `runner`; raises ConfigError."""
    voices = [
        (data / "voices" / row["file"], row["emotion"])
        for row in rows(data / "voices" / "labels.csv", ("file", "emotion", "speaker"))
        if source.takes(row["speaker"])
    ]
    folder = data / "faces" / source.split
    faces = [(folder / row["file"], row["emotion"]) for row in rows(folder / "labels.csv", ("file", "emotion"))]
    if not voices:
        raise ConfigError(f"{data}/voices/labels.csv has no speaker of {source}: give a folder with more speakers")
    cases = list[Case]()
    for place, kind in enumerate(Kind):
        for i in range(each):  # fewer of each are the first of more
            rng = np.random.default_rng([seed, place, i])
            voice = _draw(rng, voices, i) if kind in (Kind.VOICE, Kind.BOTH) else None
            face = _draw(rng, faces, i * 3 + 1) if kind in (Kind.FACE, Kind.BOTH) else None
            features: dict[str, FloatArray] = {}
            if face:
                features["face"] = np.repeat(face_features(runner, config, face[0])[None], FRAMES, axis=0)
            if voice:
                features["voice"] = voice_features(runner, config, voice[0])
            said, plain = (
                [words for several in TELLING_WORDS.values() for words in several],
                kind is Kind.BOTH and i % 2,
            )
            words = said[i % len(said)] if kind is Kind.TEXT else PLAIN_WORDS[i % len(PLAIN_WORDS)] if plain else ""
            cases.append(
                Case(
                    kind=kind, features=features, words=words, heard=voice[1] if voice else "",
                    seen=face[1] if face else "",
                )
            )  # fmt: skip
    return cases


def _draw(rng: np.random.Generator, samples: Sequence[tuple[Path, str]], turn: int) -> tuple[Path, str]:
    """One sample; labels take turns."""
    labels = sorted({label for _, label in samples})
    fitting = [sample for sample in samples if sample[1] == labels[turn % len(labels)]]
    return fitting[int(rng.integers(len(fitting)))]
