"""What trained heads say of voices and faces that training never saw: the word that greedy decoding would write."""

import numpy as np
import torch

from mosear.runtime.prompt import Task
from mosear_export.training.examples import Example, answer_of
from mosear_export.training.features import Labelled, Report
from mosear_export.training.train import Batch, Trainer

BATCH = 16
FRAMES = 4  # how many times a photo stands for a frame


def evaluate(trainer: Trainer, voices: Labelled, faces: Labelled, report: Report) -> dict[str, dict[str, float]]:
    """Accuracy and unweighted average recall of the voice word and the face word, alone and beside the other.

    A word is right if its first token is the most likely of the whole vocabulary after "The voice sounds" (or "The face
    looks ... and the voice sounds", the face word given).
    """
    partner = np.random.default_rng(1).integers(0, len(faces.values), len(voices.values))
    each_voice, each_face = range(len(voices.values)), range(len(faces.values))
    cases = {
        "voice": [_example(voices, faces, i, None) for i in each_voice],
        "voice_beside_face": [_example(voices, faces, i, int(partner[i])) for i in each_voice],
        "face": [_example(voices, faces, None, i) for i in each_face],
    }
    results = {}
    for name, examples in cases.items():
        word = name.split("_")[0]
        results[name] = _score(trainer, examples, (voices if word == "voice" else faces).emotion, word)
        report(f"{name}: {results[name]}")
    return results


def _example(voices: Labelled, faces: Labelled, voice: int | None, face: int | None) -> Example:
    heard, seen = (str(x.emotion[i]) if i is not None else None for x, i in ((voices, voice), (faces, face)))
    label = heard or seen or ""
    return Example(
        face=None if face is None else np.repeat(faces.values[face, :1], FRAMES, axis=0),
        voice=None if voice is None else voices.values[voice, 0],
        scene=None,
        muted=(),
        words="",
        task=Task.REASON,
        answer=answer_of(seen, heard, label, Task.REASON),
    )


def _score(trainer: Trainer, examples: list[Example], truth: np.ndarray, word: str) -> dict[str, float]:  # type: ignore[type-arg]
    marker = {"voice": "voice sounds", "face": "The face looks"}[word]
    hits = []
    for start in range(0, len(examples), BATCH):
        part = examples[start : start + BATCH]
        batch = Batch.make(trainer, part, noise=False)
        with torch.no_grad():
            logits = trainer.model.decoder(**batch.inputs, cache=batch.cache, heads=trainer.model.heads)["logits"]
        for row, example in zip(logits, part, strict=True):
            lead = example.answer[: example.answer.lower().index(marker.lower()) + len(marker)]
            hits.append(int(row[len(trainer.builder.encode(lead))].argmax()))
    labels = dict(zip(trainer.model.config.labels, trainer.builder.labels, strict=True))
    right = np.array([hit == labels[str(t)][0] for hit, t in zip(hits, truth, strict=True)])
    recalls = [right[truth == emotion].mean() for emotion in np.unique(truth)]
    return {"accuracy": float(right.mean()), "recall": float(np.mean(recalls)), "n": len(right)}
