"""Parity on the same clips: an engine beside the PyTorch reference, and how far labels, words and reliance differ."""

from collections.abc import Mapping, Sequence

import numpy as np
from accuracy_asking import Record
from accuracy_conflict import Plan

from mosear.config import ModelConfig
from mosear.runtime.prompt import PromptBuilder, Task

BARS = {"fp32": 0.99, "int8": 0.97}  # of labels that agree
CURVE_BAR = 0.05  # how far the share of labels at one strength may lie from the reference's


def compare(
    plan: Plan, config: ModelConfig, builder: PromptBuilder, found: Mapping[str, Record], wanted: Mapping[str, Record]
) -> dict[str, object]:
    """Label agreement over every question that both answered, the largest difference of scores and of moved masses, the
    first token at which reasons part, and the largest distance of the reliance curves."""
    both = [key for key in wanted if key in found]
    labels = [
        (wanted[key]["joint"], found[key]["joint"]) for key in both if wanted[key]["joint"] and found[key]["joint"]
    ]
    scores = [max(abs(a["scores"][label] - b["scores"][label]) for label in config.labels) for a, b in labels]
    masses = [float(np.abs(np.array(wanted[k]["mass"]) - np.array(found[k]["mass"])).max()) for k in both]
    reasons = [(wanted[k]["text"], found[k]["text"]) for k in both if k.startswith(f"{Task.REASON}:")]
    parted = {i: first_difference(builder, *texts) for i, texts in enumerate(reasons) if texts[0] != texts[1]}
    return {
        "questions": len(both),
        "labels that agree": float(np.mean([a["label"] == b["label"] for a, b in labels])) if labels else None,
        "labels": len(labels),
        "largest difference of a score": max(scores, default=None),
        "largest difference of a mass": max(masses, default=None),
        "reasons": len(reasons),
        "first tokens that differ": parted,
        "largest distance of the voice share": curve_distance(plan, found, wanted),
    }


def first_difference(builder: PromptBuilder, wanted: str, found: str) -> int:
    """The number of tokens that two texts share from their start on."""
    pairs = zip(builder.encode(wanted), builder.encode(found))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(builder.encode(x)) for x in (wanted, found)))


def curve_distance(plan: Plan, found: Mapping[str, Record], wanted: Mapping[str, Record]) -> float:
    """Over strengths, the largest difference between the shares of pairs whose label is the voice's."""
    distances = [0.0]
    for strength in plan.strengths:
        keys = [(i, plan.key(i, strength)) for i in range(len(plan.pairs))]
        keys = [(i, key) for i, key in keys if key in found and key in wanted]
        if keys:
            heard = [plan.voices[plan.pairs[i].voice].emotion for i, _ in keys]
            shares = [
                np.mean([answers[key]["joint"]["label"] == emotion for (_, key), emotion in zip(keys, heard)])
                for answers in (found, wanted)
            ]
            distances.append(float(abs(shares[0] - shares[1])))
    return max(distances)


def faults(result: Mapping[str, object], *, precision: str) -> Sequence[str]:
    """Which bars a comparison misses."""
    agreed, curve = result["labels that agree"], result["largest distance of the voice share"]
    assert isinstance(curve, float) and (agreed is None or isinstance(agreed, float))
    missed = []
    if agreed is not None and agreed < BARS[precision]:
        missed.append(
            f"{agreed:.1%} of labels agree with the reference; {precision} engines must reach {BARS[precision]:.0%}"
        )
    if curve > CURVE_BAR:
        missed.append(f"reliance lies {curve:.3f} from the reference's at one strength; {CURVE_BAR} is allowed")
    return missed
