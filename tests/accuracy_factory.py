"""A small data folder of the conflict benchmark's layout, and an engine that hears and sees what stands in its clips."""

import csv
import sys
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import toy
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from mosear.config import ModelConfig
from mosear.contract import Tensors
from mosear.runtime.prompt import Task
from mosear.runtime.request import Answer, Judgement, Request

LABELS = ("neutral", "happy", "sad", "angry")
SURE = 8.0  # how far the label lies above the others, in log-probability


def data_folder(root: Path, *, each: int = 3) -> Path:
    """`each` sounds of two speakers and `each` photos in two splits, of every label. A label is a level of grey, or loudness."""
    for folder, column, origins in (("voices", "speaker", ("14", "03")), ("faces", "", ("dev", "train"))):
        for origin in origins:
            place = root / folder if column else root / folder / origin
            place.mkdir(parents=True, exist_ok=True)
            rows = []
            for i, label in enumerate(label for label in LABELS for _ in range(each)):
                name = f"{origin}-{i}.{'wav' if column else 'png'}"
                _write(place / name, LABELS.index(label))
                rows.append({"file": name, "emotion": label} | ({column: origin} if column else {}))
            path = place / "labels.csv"
            fresh = not path.exists()
            with path.open("a", newline="") as file:
                table = csv.DictWriter(file, list(rows[0]))
                if fresh:
                    table.writeheader()
                table.writerows(rows)
    return root


def _write(path: Path, level: int) -> None:
    if path.suffix == ".png":
        Image.fromarray(np.full((48, 48), 20 + 50 * level, np.uint8)).save(path)
        return
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(np.full(1600, 1000 + 2000 * level, np.int16).tobytes())


def config() -> ModelConfig:
    return toy.toy_config(labels=LABELS)


class Backend:
    """Encoders whose features are a label's number, read off the loudness or the grey."""

    def __init__(self) -> None:
        self.calls = 0

    def run(self, part: str, tensors: Tensors) -> Tensors:
        self.calls += 1
        made = config()
        if part == "face":
            grey = float(tensors["crops"].mean())
            return {"face_features": np.full((1, made.face.feature_size), (grey - 20) / 50, np.float32)}
        self.levels = getattr(self, "levels", {})
        peak = float(tensors["mel"].mean())
        number = self.levels.setdefault(round(peak, 3), len(self.levels))
        return {"voice_features": np.full((1, made.voice.tokens, made.voice.feature_size), number, np.float32)}


def judged(label: str) -> Judgement:
    return Judgement(label=label, scores={x: 0.0 if x == label else -SURE for x in LABELS})


def answer_to(request: Request) -> Answer:
    """What is neutral yields; of two others the voice is followed below a strength of 0.5, the face from there on."""
    heard, seen = (request.features.get(name) for name in ("voice", "face"))
    voice = None if heard is None else LABELS[round(float(heard.flat[0]))]
    face = None if seen is None else LABELS[round(float(seen.flat[0]))]
    both = voice is not None and face is not None
    strength = 0.0 if request.strength is None else request.strength
    joint = voice or face
    if both and voice != face:
        joint = face if voice == "neutral" else voice if face == "neutral" else face if strength >= 0.5 else voice
    assert joint
    text = f"The face looks {face} and the voice sounds {voice}. They {'agree' if voice == face else 'disagree'}."
    conflict = request.task == Task.CONFLICT and both
    return Answer(
        task=Task(request.task), text=text if request.task == Task.REASON else joint, joint=judged(joint),
        face=judged(face) if conflict and face else None, voice=judged(voice) if conflict and voice else None,
        conflict=voice != face if conflict else None, modality_mass=np.full((2, 2, 3), 1 / 3, np.float32),
        expert_weights=np.full((3, 2), 0.5, np.float32), groups=("text", "video", "audio"), tokens=1, prompt_tokens=9,
        timings_ms={}, notes=(),
    )  # fmt: skip


def engine(answer: Any = answer_to) -> SimpleNamespace:  # Any: a function of a request
    """As much of an Engine as the benchmark uses."""
    return SimpleNamespace(
        backend=Backend(), config=config(), pipeline=SimpleNamespace(answer=answer),
        files=SimpleNamespace(schema="toy", manifest=SimpleNamespace(key="key")),
        recipe=SimpleNamespace(name="toy", precision="fp32"),
    )  # fmt: skip
