"""What trained heads say of voices and faces that training never saw: the label that `classify` would give."""

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from mosear.config import ARConfig
from mosear.runtime.prompt import Task
from mosear_export.labelled import FRAMES
from mosear_export.training.examples import NEUTRAL, Example, answer_of
from mosear_export.training.features import Labelled, Report
from mosear_export.training.train import Trainer

BATCH = 16
PAIRS = 60  # of each kind
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
Labels = npt.NDArray[np.str_]


def evaluate(trainer: Trainer, voices: Labelled, faces: Labelled, report: Report) -> dict[str, dict[str, float]]:
    """Accuracy and unweighted average recall of each voice and each face alone; of pairs how often their label follows voice
    and face, at each strength of the model's own reallocation policy."""
    results = {}
    for name, samples in (("voice", voices), ("face", faces)):
        indices: list[tuple[int | None, int | None]] = [
            (i, None) if name == "voice" else (None, i) for i in range(len(samples.values))
        ]
        right = _labels(trainer, [_example(voices, faces, *one) for one in indices], None) == samples.emotion
        recalls = [right[samples.emotion == emotion].mean() for emotion in np.unique(samples.emotion)]
        results[name] = {"accuracy": float(right.mean()), "recall": float(np.mean(recalls)), "n": len(right)}
        report(f"{name}: {results[name]}")
    pairs = _pairs(voices, faces)
    for strength in STRENGTHS:
        found = {}
        for kind, chosen in pairs.items():
            examples = [dataclasses.replace(_example(voices, faces, *pair), strength=strength) for pair in chosen]
            said = _labels(trainer, examples, trainer.model.config.ar)
            for name, truth, which in (("voice", voices, 0), ("face", faces, 1)):
                found[f"{kind} {name}"] = float((said == truth.emotion[[pair[which] for pair in chosen]]).mean())
        results[f"pairs, strength {strength:g}"] = found
        report(f"pairs, strength {strength:g}: {found}")
    return results


def _example(voices: Labelled, faces: Labelled, voice: int | None, face: int | None) -> Example:
    return Example(
        face=None if face is None else np.repeat(faces.values[face, :1], FRAMES, axis=0),
        voice=None if voice is None else voices.values[voice, 0],
        scene=None, muted=(), words="", task=Task.CLASSIFY, answer=answer_of(None, None, NEUTRAL, Task.CLASSIFY),
    )  # fmt: skip


def _labels(trainer: Trainer, examples: list[Example], ar: ARConfig | None) -> Labels:
    """The label whose first token is the likeliest, of each example."""
    first = torch.tensor([ids[0] for ids in trainer.builder.labels])
    found: list[int] = []
    for start in range(0, len(examples), BATCH):
        with torch.no_grad():
            batch = trainer.batch(examples[start : start + BATCH], noise=False)
            logits = trainer.run_decoder(batch, ar=ar)["logits"]
        found += logits[:, 0, first].argmax(-1).tolist()
    return np.array(trainer.model.config.labels)[found]


def _pairs(voices: Labelled, faces: Labelled) -> dict[str, list[tuple[int, int]]]:
    """Voices and faces of each kind: consistent, one of them neutral, an open conflict."""
    rng, found = np.random.default_rng(2), {}
    shared = [e for e in np.unique(voices.emotion) if e in faces.emotion]
    loud = [e for e in shared if e != NEUTRAL]
    for kind in ("consistent", "voice_led", "face_led", "open"):
        pairs = []
        for i in range(PAIRS):
            heard = {"consistent": shared[i % len(shared)], "face_led": NEUTRAL}.get(kind, loud[i % len(loud)])
            others = [e for e in loud if e != heard]
            seen = {"consistent": heard, "voice_led": NEUTRAL, "face_led": loud[i % len(loud)]}.get(kind) or rng.choice(
                others
            )
            pick = [int(rng.choice(np.flatnonzero(x.emotion == e))) for x, e in ((voices, heard), (faces, seen))]
            pairs.append((pick[0], pick[1]))
        found[kind] = pairs
    return found
