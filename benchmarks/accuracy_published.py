"""Published benchmarks: each one's clips asked as they are, and its own metric."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import accuracy_metrics as metrics
import machine
import numpy as np
from accuracy_asking import Ask, Journal, Question, Record, served
from accuracy_conflict import named
from readers import ca_mer, dfew, emer, mer2023
from readers.clips import BenchmarkClip
from workload import say

from mosear.engine import EngineFolder
from mosear.runtime.prompt import Task
from mosear.runtime.request import Request

Figures = dict[str, float]
Measure = Callable[[Sequence[BenchmarkClip], Sequence[set[str]]], Figures]
# Words of the published label spaces that our models spell otherwise.
SAME = {
    "surprise": "surprised", "disgust": "disgusted", "fear": "fearful", "anger": "angry", "sadness": "sad", "worried": "fearful",
    "worry": "fearful", "happiness": "happy", "joy": "happy", "boredom": "bored",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """How its folder is read, what is asked, what the answers are worth."""

    read: Callable[[Path], list[BenchmarkClip]]
    task: Task
    measure: Measure


def open_vocabulary(clips: Sequence[BenchmarkClip], said: Sequence[set[str]]) -> Figures:
    """Set accuracy, recall and average, mean over clips; of all and of each subset."""
    scores = np.array([metrics.set_scores(words, set(map(spelt, clip.labels))) for clip, words in zip(clips, said)])
    found: Figures = {}
    for subset in ["", *dict.fromkeys(clip.subset for clip in clips)]:
        rows = [not subset or clip.subset == subset for clip in clips]
        for name, value in zip(("accuracy", "recall", "average"), scores[rows].mean(0), strict=True):
            found[f"{subset} {name}".strip()] = float(value)
    return found


def one_label(clips: Sequence[BenchmarkClip], said: Sequence[set[str]]) -> Figures:
    """Weighted F1, WAR (accuracy) and UAR (unweighted recall)."""
    wanted = [spelt(clip.labels[0]) for clip in clips]
    words = [next(iter(sorted(found)), "") for found in said]
    right = float(np.mean([a == b for a, b in zip(wanted, words, strict=True)]))
    return {
        "weighted F1": metrics.weighted_f1(wanted, words),
        "WAR": right,
        "UAR": metrics.unweighted_recall(wanted, words),
    }


def overlap(clips: Sequence[BenchmarkClip], said: Sequence[set[str]]) -> Figures:
    """The share of a clip's words that were said, mean over clips."""
    scores = [metrics.set_scores(words, set(map(spelt, clip.labels)))[1] for clip, words in zip(clips, said)]
    return {"label overlap": float(np.mean(scores))}


BENCHMARKS = {
    "ca-mer": Benchmark(read=ca_mer.read, task=Task.REASON, measure=open_vocabulary),
    "mer2023": Benchmark(read=mer2023.read, task=Task.CLASSIFY, measure=one_label),
    "dfew": Benchmark(read=dfew.read, task=Task.CLASSIFY, measure=one_label),
    "emer": Benchmark(read=emer.read, task=Task.REASON, measure=overlap),
}


def spelt(word: str) -> str:
    """A label's word as the demo's labels spell it."""
    return SAME.get(word, word)


def questions(clips: Sequence[BenchmarkClip], task: Task) -> list[Question]:
    """One for each clip."""

    def question(index: int, clip: BenchmarkClip) -> Question:
        def make() -> Request:
            return Request(task=task, video=clip.video.read_bytes(), words=clip.words)

        return Question(key=f"{index}:{clip.subset}/{clip.name}", make=make)

    return [question(i, clip) for i, clip in enumerate(clips)]


def words_of(record: Record, task: Task, labels: Sequence[str]) -> set[str]:
    """What an answer says: its label, or all the labels that its reason names."""
    if task is Task.CLASSIFY:
        return {record["joint"]["label"]}
    return named(record["text"], labels)


def evaluate(
    benchmark: Benchmark, clips: Sequence[BenchmarkClip], answers: Mapping[str, Record], labels: Sequence[str]
) -> dict[str, object]:
    """Figures twice: over the clips that were answered, and with those that failed counted as wrong."""
    keys = [question.key for question in questions(clips, benchmark.task)]
    said = {key: words_of(answers[key], benchmark.task, labels) for key in keys if key in answers}
    answered = [(clip, said[key]) for clip, key in zip(clips, keys, strict=True) if key in said]
    everything = [(clip, said.get(key, set())) for clip, key in zip(clips, keys, strict=True)]
    return {
        "clips": len(clips),
        "answered": len(answered),
        "of those answered": benchmark.measure(*zip(*answered, strict=True)) if answered else {},
        "failed as wrong": benchmark.measure(*zip(*everything, strict=True)),
        "labels that the model has no word for": sorted({x for c in clips for x in map(spelt, c.labels)} - {*labels}),
    }


def run_published(options: argparse.Namespace, stack: ExitStack) -> int:
    """Read, ask, measure, write; the status is 1 if no clip was answered."""
    benchmark, folder = BENCHMARKS[options.benchmark], EngineFolder(options.engine)
    clips = benchmark.read(options.root)
    ask: Ask
    if options.url:
        ask = stack.enter_context(served(options.url))
    else:
        from mosear.engine import Engine

        ask = stack.enter_context(Engine(options.engine)).pipeline.answer
    settings = {"benchmark": options.benchmark, "engine": folder.manifest.key, "url": options.url, "clips": len(clips)}
    journal = Journal(options.work / f"{options.benchmark}.jsonl", settings)
    asked = questions(clips, benchmark.task)
    journal.ask_all(asked, ask, say, retry=options.retry_failed)
    found = evaluate(benchmark, clips, journal.answered(asked), folder.config.labels)
    result = {"machine": machine.stamp(), "settings": settings, **found, "failed": journal.failed()}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.benchmark}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(text(options.benchmark, result)))
    say(f"wrote {path}")
    return 0 if found["answered"] else 1


def text(name: str, result: Mapping[str, object]) -> list[str]:
    """Markdown lines."""
    answered, wrong, failed = result["of those answered"], result["failed as wrong"], result["failed"]
    assert isinstance(answered, dict) and isinstance(wrong, dict) and isinstance(failed, dict)
    lines = [f"# {name}", "", f"{result['answered']} of {result['clips']} clips answered", ""]
    lines += ["| figure | of those answered | failed clips as wrong |", "|---|---|---|"]
    lines += [f"| {key} | {100 * answered[key]:.1f} % | {100 * wrong[key]:.1f} % |" for key in answered]
    return [*lines, "", *(f"failed: {key}: {why}" for key, why in failed.items())]
