"""What trained heads say of voices and faces that training never saw: the word that greedy decoding would write."""

import numpy as np
import torch

from mosear.config import ARConfig, Policy
from mosear.runtime.prompt import Task
from mosear_export.training.examples import NEUTRAL, Example, answer_of
from mosear_export.training.features import Labelled, Report
from mosear_export.training.train import Trainer

BATCH = 16
FRAMES = 4  # how many times a photo stands for a frame
PAIRS = 60  # of each kind
STRENGTHS = {
    "off": None,
    "balance 0.5": (ARConfig(), 0.5),
    "balance 1.0": (ARConfig(), 1.0),
    "audio share 0.1": (ARConfig(policy=Policy.TARGET, audio_share=0.1, move=1.0), 1.0),
    "audio share 0.5": (ARConfig(policy=Policy.TARGET, audio_share=0.5, move=1.0), 1.0),
    "audio share 0.9": (ARConfig(policy=Policy.TARGET, audio_share=0.9, move=1.0), 1.0),
}


def evaluate(trainer: Trainer, voices: Labelled, faces: Labelled, report: Report) -> dict[str, dict[str, float]]:
    """Accuracy and unweighted average recall of the voice word and the face word, alone and beside the other; of labels of
    pairs how often they follow voice and face, by attention reallocation.

    A word is right if its first token is the most likely of the whole vocabulary after "The voice sounds" (or "The face
    looks ... and the voice sounds", the face word given), or as the label of a prompt.
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
    for name, setting in STRENGTHS.items():
        results[f"pairs, {name}"] = _pairs(trainer, voices, faces, setting)
        report(f"pairs, {name}: {results[f'pairs, {name}']}")
    return results


def _example(
    voices: Labelled, faces: Labelled, voice: int | None, face: int | None, *, task: Task = Task.REASON,
    strength: float = 0.0,
) -> Example:  # fmt: skip
    heard, seen = (str(x.emotion[i]) if i is not None else None for x, i in ((voices, voice), (faces, face)))
    label = heard or seen or ""
    return Example(
        face=None if face is None else np.repeat(faces.values[face, :1], FRAMES, axis=0),
        voice=None if voice is None else voices.values[voice, 0],
        scene=None, muted=(), words="", task=task, answer=answer_of(seen, heard, label, task), strength=strength,
    )  # fmt: skip


def _words(trainer: Trainer, examples: list[Example], leads: list[str], ar: ARConfig | None) -> np.ndarray:  # type: ignore[type-arg]
    """The likeliest token of the whole vocabulary behind the words that lead to it, within each example's answer."""
    found = []
    for start in range(0, len(examples), BATCH):
        part = slice(start, start + BATCH)
        with torch.no_grad():
            logits = trainer.run_decoder(trainer.batch(examples[part], noise=False), ar=ar)["logits"]
        for row, lead in zip(logits, leads[part], strict=True):
            found.append(int(row[len(trainer.builder.encode(lead))].argmax()))
    return np.array(found)


def _score(trainer: Trainer, examples: list[Example], truth: np.ndarray, word: str) -> dict[str, float]:  # type: ignore[type-arg]
    marker = {"voice": "voice sounds", "face": "The face looks"}[word]
    leads = [e.answer[: e.answer.lower().index(marker.lower()) + len(marker)] for e in examples]
    right = _words(trainer, examples, leads, None) == _tokens(trainer, truth)
    recalls = [right[truth == emotion].mean() for emotion in np.unique(truth)]
    return {"accuracy": float(right.mean()), "recall": float(np.mean(recalls)), "n": len(right)}


def _tokens(trainer: Trainer, words: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    first = {x: ids[0] for x, ids in zip(trainer.model.config.labels, trainer.builder.labels, strict=True)}
    return np.array([first[str(word)] for word in words])


def _pairs(
    trainer: Trainer, voices: Labelled, faces: Labelled, setting: tuple[ARConfig, float] | None
) -> dict[str, float]:
    """Labels of consistent, voice-led, face-led and open pairs: shares that follow voice and face."""
    ar, strength = setting or (None, 0.0)
    rng, results = np.random.default_rng(2), {}
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
            pairs.append([int(rng.choice(np.flatnonzero(x.emotion == e))) for x, e in ((voices, heard), (faces, seen))])
        examples = [_example(voices, faces, *pair, task=Task.CLASSIFY, strength=strength) for pair in pairs]
        said = _words(trainer, examples, [""] * len(examples), ar)
        for name, truth, which in (("voice", voices, 0), ("face", faces, 1)):
            followed = said == _tokens(trainer, truth.emotion[[pair[which] for pair in pairs]])
            results[f"{kind} {name}"] = float(followed.mean())
    return results
