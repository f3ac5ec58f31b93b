"""Parity of a decoder with a reference on the same cases: labels, logits, masses, written tokens, and reallocation's effect."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mosear.errors import EngineError
from mosear_export.golden import relative_errors
from mosear_export.precision.clips import Case, Kind
from mosear_export.precision.run import Asker, Said

STRENGTHS = (
    0.0,
    0.5,
    1.0,
)  # clips with one modality have nothing to reallocate: they are asked at the middle one alone
DEFAULT_STRENGTH = 0.5
LABEL_BARS = {"fp32": 0.99, "fp16": 0.99, "bf16": 0.97, "int8": 0.97}  # of labels that agree; others: reported
CURVE_BAR = 0.05  # how far the share of labels that are the voice's may lie from the reference's at one strength
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a decoder said: of each case (its number) at each strength, and the tokens that it chose in the reasons."""

    said: Mapping[tuple[int, float], Said]
    tokens: Mapping[int, Sequence[int]]


def ask(
    asker: Asker, cases: Sequence[Case], report: Report, *, reasons: int, steps: int, follow: Asked | None = None
) -> Asked:
    """Ask about every case; reasons of the first `reasons` cases that bring a voice and a face, fed with the tokens of
    `follow` (None: with its own)."""
    said, tokens = dict[tuple[int, float], Said](), dict[int, Sequence[int]]()
    for i, case in enumerate(cases):
        for strength in STRENGTHS if case.kind is Kind.BOTH else (DEFAULT_STRENGTH,):
            said[i, strength] = asker.classify(case, strength)
        if i % 40 == 0:
            report(f"{i} of {len(cases)} clips asked")
    for i in [i for i, case in enumerate(cases) if case.kind is Kind.BOTH][:reasons]:
        wanted = follow.tokens[i] if follow else None
        tokens[i] = asker.choices(cases[i], DEFAULT_STRENGTH, wanted, steps=steps)
    return Asked(said=said, tokens=tokens)


def compare(cases: Sequence[Case], labels: Sequence[str], found: Asked, wanted: Asked) -> dict[str, object]:
    """Figures of `found` beside `wanted`. RMS errors of logits are relative to the reference's RMS; a mass is a share."""
    keys = list(wanted.said)
    pairs = [(found.said[key], wanted.said[key]) for key in keys]
    rms = [relative_errors(ours.logits, theirs.logits)[1] for ours, theirs in pairs]
    masses = [np.abs(ours.masses - theirs.masses) for ours, theirs in pairs]
    agree = [ours.scores.argmax() == theirs.scores.argmax() for ours, theirs in pairs]
    margins = [_margin(theirs.scores) for (_, theirs), same in zip(pairs, agree) if not same]
    parted = {i: _parted(found.tokens[i], wanted.tokens[i]) for i in wanted.tokens}
    curves = [_curve(cases, labels, asked) for asked in (found, wanted)]
    return {
        "clips": len(cases),
        "questions": len(pairs),
        "labels that agree": float(np.mean(agree)),
        "by kind": {
            str(kind): float(np.mean([same for key, same in zip(keys, agree) if cases[key[0]].kind is kind]))
            for kind in Kind
            if any(case.kind is kind for case in cases)
        },
        "margins of the reference where they differ": sorted(margins),
        "rms of logits": {"median": float(np.median(rms)), "p90": float(np.quantile(rms, 0.9)), "max": max(rms)},
        "error of masses": {
            "rms": float(np.sqrt(np.mean([np.mean(m**2) for m in masses]))),
            "max": float(max(m.max() for m in masses)),
        },
        "largest error of a label's score": float(max(np.abs(a.scores - b.scores).max() for a, b in pairs)),
        "texts": len(parted),
        "texts whose tokens are equal": sum(step is None for step in parted.values()),
        "first tokens that differ": {str(i): step for i, step in parted.items() if step is not None},
        "voice share by strength": {
            str(s): {"found": ours, "reference": theirs} for s, ours, theirs in zip(STRENGTHS, *curves)
        },
        "largest distance of the voice share": float(max(abs(a - b) for a, b in zip(*curves))),
    }


def faults(result: Mapping[str, object], *, precision: str) -> list[str]:
    """Which bars a comparison misses, in words."""
    agreed, curve = result["labels that agree"], result["largest distance of the voice share"]
    assert isinstance(agreed, float) and isinstance(curve, float), "a comparison's figures"
    missed = []
    if agreed < (bar := LABEL_BARS.get(precision, 0.0)):
        missed.append(f"{agreed:.1%} of labels agree with the reference; {precision} must reach {bar:.0%}")
    if curve > CURVE_BAR:
        missed.append(
            f"the voice's share lies {curve:.3f} from the reference's at one strength; {CURVE_BAR} is allowed"
        )
    return missed


def check(result: Mapping[str, object], *, precision: str) -> None:
    """Raises EngineError where a comparison misses a bar."""
    if missed := faults(result, precision=precision):
        raise EngineError("; ".join(missed))


def _margin(scores: np.ndarray) -> float:  # type: ignore[type-arg]
    second, first = np.sort(scores)[-2:]
    return round(float(first - second), 4)


def _parted(found: Sequence[int], wanted: Sequence[int]) -> int | None:
    return next((step for step, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b), None)


def _curve(cases: Sequence[Case], labels: Sequence[str], asked: Asked) -> list[float]:
    """At each strength, the share of clips with differing voice and face whose label is the voice's."""
    open_pairs = [i for i, case in enumerate(cases) if case.kind is Kind.BOTH and case.heard != case.seen]
    if not open_pairs:
        return [0.0 for _ in STRENGTHS]
    return [
        float(np.mean([labels[int(asked.said[i, s].scores.argmax())] == cases[i].heard for i in open_pairs]))
        for s in STRENGTHS
    ]
