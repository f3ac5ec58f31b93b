"""The bars that the demo heads are held to, each with its figure. A bar that a run did not measure is left out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Results = Mapping[str, Any]  # JSON
FACE_NET = "face net alone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One demand: what, the figure as text, whether it is met."""

    what: str
    figure: str
    met: bool


def bars(results: Results, *, default: float) -> list[Bar]:
    """Every bar that these results can be held to."""
    return [*_words(results), *_pairs(results, default), *_strength(results), *_detection(results)]


def told(estimate: Mapping[str, float]) -> str:
    """A share with its interval, in per cent."""
    return "{:.1f} % ({:.1f} to {:.1f}, n {})".format(
        *(100 * estimate[k] for k in ("value", "low", "high")), estimate["n"]
    )


def _words(results: Results) -> list[Bar]:
    words, found = results["words"], []
    if "voice" in words:
        voice = words["voice"]["accuracy"]
        found.append(Bar(what="voice word right in 78 % or more", figure=told(voice), met=voice["value"] >= 0.78))
    if "face" in words and FACE_NET in results:
        face, net = words["face"]["accuracy"], results[FACE_NET]
        found.append(
            Bar(
                what=f"face word within 3 points of the face net alone ({100 * net:.1f} %)", figure=told(face),
                met=face["value"] >= net - 0.03,
            )
        )  # fmt: skip
    return found


def _pairs(results: Results, default: float) -> list[Bar]:
    label = results["labels"].get(f"{default:g}")
    if not label or len(label) < 4:
        return []
    off, open_ = results["labels"].get("0"), label["open"]
    consistent = label["consistent"]["accuracy"]
    single = max(results["best single modality on consistent pairs"].values(), key=lambda e: e["value"])
    either = 1 - open_["neither"]["value"]
    sides = [open_[who]["value"] / max(either, 1e-9) for who in ("voice", "face")]
    led = [label[kind]["accuracy"]["value"] for kind in ("voice-led", "face-led")]
    found = [
        Bar(
            what=f"consistent pairs at least as often right as the better modality alone ({told(single)})",
            figure=told(consistent), met=consistent["value"] >= single["value"],
        ),
        Bar(what="open conflicts: voice or face followed in 85 % or more", figure=f"{100 * either:.1f} %", met=either >= 0.85),
        Bar(
            what="each in 40 to 60 % of these", figure="voice {:.1f} %, face {:.1f} %".format(*(100 * s for s in sides)),
            met=all(0.4 <= s <= 0.6 for s in sides),
        ),
        Bar(
            what="voice-led and face-led accuracies within 10 points", met=abs(led[0] - led[1]) <= 0.1,
            figure="{:.1f} % and {:.1f} %".format(*(100 * x for x in led)),
        ),
    ]  # fmt: skip
    if off:
        moved = consistent["value"] - off["consistent"]["accuracy"]["value"]
        found.append(
            Bar(
                what="consistent accuracy within 1 point of no reallocation",
                figure=f"{100 * moved:+.1f} points",
                met=moved >= -0.01,
            )
        )
    return found


def _strength(results: Results) -> list[Bar]:
    moved = results["strength"]
    if "slope" not in moved or len(moved["strengths"]) < 6:
        return []
    end, slope = moved["end to end"], moved["slope"]
    return [
        Bar(
            what="strength moves reliance: Spearman 0.9 or more in size", figure=f"{moved['spearman']:.2f}",
            met=bool(np.abs(moved["spearman"]) >= 0.9),
        ),
        Bar(
            what="10 points or more end to end", met=abs(end["value"]) >= 0.1,
            figure="{:+.1f} points ({:+.1f} to {:+.1f})".format(*(100 * end[k] for k in ("value", "low", "high"))),
        ),
        Bar(
            what="the slope's interval leaves out 0", met=slope["low"] > 0 or slope["high"] < 0,
            figure="{:+.2f} ({:+.2f} to {:+.2f})".format(*(slope[k] for k in ("value", "low", "high"))),
        ),
    ]  # fmt: skip


def _detection(results: Results) -> list[Bar]:
    found = results["detection"]
    if not found:
        return []
    balanced, chance = found["calibrated on the other half"]["balanced accuracy"], found.get("independent words", 0.0)
    return [
        Bar(
            what=f"conflict detected: balanced accuracy 72 % or more, above independent words ({100 * chance:.1f} %)",
            figure=f"{told(balanced)}; AUROC {found['auroc']['value']:.3f}",
            met=balanced["value"] >= max(0.72, chance),
        )
    ]
