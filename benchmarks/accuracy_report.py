"""Results of the conflict benchmark as JSON, Markdown and a picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accuracy_bars import Bar, told

Results = Mapping[str, Any]  # JSON
KINDS = ("consistent", "voice-led", "face-led", "open")
GROUPS = ("text", "video", "audio")


def write(results: Mapping[str, Results], bars: Mapping[str, Sequence[Bar]], folder: Path, *, name: str) -> list[Path]:
    """`name`.json, .md and .png of the results of each subject; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("json", "md", "png")]
    paths[0].write_text(json.dumps(results, indent=1) + "\n")
    paths[1].write_text(
        "\n".join(line for subject in results for line in text(subject, results[subject], bars[subject]))
    )
    draw(results, paths[2])
    return paths


def text(subject: str, results: Results, bars: Sequence[Bar]) -> list[str]:
    """Markdown lines."""
    settings = results["settings"]
    lines = [f"# {subject}", "", *(f"- {key}: {value}" for key, value in settings.items()), ""]
    lines += ["| bar | figure | met |", "|---|---|---|"]
    lines += [f"| {bar.what} | {bar.figure} | {'yes' if bar.met else 'no'} |" for bar in bars]
    if compared := results.get("parity"):
        lines += [
            "",
            "| beside the reference | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in compared.items()),
        ]
    if words := results["words"]:
        lines += ["", "| one clip alone | accuracy | unweighted recall |", "|---|---|---|"]
        lines += [
            f"| {who} | {told(row['accuracy'])} | {100 * row['unweighted recall']:.1f} % |"
            for who, row in words.items()
        ]
    lines += [
        "",
        "| strength | subset | label right | follows voice | follows face | neither |",
        "|---|---|---|---|---|---|",
    ]
    for strength, row in results["labels"].items():
        for kind in KINDS:
            cells = [
                told(row[kind][c]) if c in row.get(kind, {}) else "-" for c in ("accuracy", "voice", "face", "neither")
            ]
            lines.append(f"| {strength} | {kind} | {' | '.join(cells)} |")
    if detection := results["detection"]:
        lines += [
            "",
            "| conflict detected by | balanced accuracy | recall of conflict | of consistent |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {told(row['balanced accuracy'])} | {100 * row['recall of conflict']:.1f} % | "
            f"{100 * row['recall of consistent']:.1f} % |"
            for name, row in detection.items()
            if isinstance(row, Mapping) and "balanced accuracy" in row
        ]
    if reasons := results["reasons"]:
        lines += ["", "| reasons | figure |", "|---|---|"]
        lines += [f"| {k} | {told(v) if isinstance(v, Mapping) else f'{v:.3g}'} |" for k, v in reasons.items()]
    if results["experts"]:
        count = len(results["experts"][0])
        lines += ["", f"| expert use | {' | '.join(map(str, range(count)))} |", "|---|" + "---|" * count]
        lines += [
            f"| {g} | " + " | ".join(f"{x:.3f}" for x in row) + " |" for g, row in zip(GROUPS, results["experts"])
        ]
    if failed := results.get("failed"):
        lines += ["", f"{len(failed)} questions failed:", *(f"- {key}: {why}" for key, why in failed.items())]
    return [*lines, ""]


def draw(results: Mapping[str, Results], path: Path) -> None:
    """Reliance of open conflicts and accuracy against strength for each subject; masses by layer, expert use of the first."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    for color, (subject, result) in enumerate(results.items()):
        _curves(axes[0], subject, result, f"C{color}")
    axes[0, 0].axhspan(0.4, 0.6, color="0.92", zorder=0)
    axes[0, 0].set(xlabel="strength", ylabel="share of labels", title="open conflicts: whose label it is", ylim=(0, 1))
    axes[0, 1].set(xlabel="strength", ylabel="label right", title="pairs with a truth", ylim=(0, 1))
    first = next(iter(results.values()))
    _masses(axes[1, 0], np.array(first["masses"]))
    used = np.array(first["experts"])
    for expert in range(used.shape[1] if used.size else 0):
        width = 0.8 / used.shape[1]
        axes[1, 1].bar(np.arange(len(used)) + expert * width, used[:, expert], width, label=f"expert {expert}")
    axes[1, 1].set_xticks(np.arange(len(used)) + 0.2, GROUPS[: len(used)])
    axes[1, 1].set(title="expert use by modality (mean gate)", ylim=(0, 1))
    for axis in axes.flat:
        axis.legend(fontsize="x-small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curves(axes: Any, subject: str, result: Results, color: str) -> None:  # Any: matplotlib has no types
    strengths = sorted(result["labels"], key=float)
    where = [float(s) for s in strengths]
    for who, style in (("voice", "-"), ("face", "--"), ("neither", ":")):
        shares = [result["labels"][s].get("open", {}).get(who) for s in strengths]
        if all(shares):
            axes[0].plot(where, [x["value"] for x in shares], style, marker="o", color=color, label=f"{subject}: {who}")
            if who == "voice":
                axes[0].fill_between(
                    where, [x["low"] for x in shares], [x["high"] for x in shares], color=color, alpha=0.12
                )
    for kind, style in (("consistent", "-"), ("voice-led", "--"), ("face-led", ":")):
        shares = [result["labels"][s].get(kind, {}).get("accuracy") for s in strengths]
        if all(shares):
            axes[1].plot(
                where, [x["value"] for x in shares], style, marker="o", color=color, label=f"{subject}: {kind}"
            )


def _masses(axis: Any, masses: Any) -> None:  # Any: matplotlib has no types
    """masses [layers, 2, G]"""
    for group, color in ((1, "C0"), (2, "C1")):
        for moment, style, name in ((0, "--", "before"), (1, "-", "after")):
            if masses.size:
                axis.plot(masses[:, moment, group], style, color=color, label=f"{GROUPS[group]} {name}")
    axis.set(xlabel="layer", ylabel="attention mass", title="masses at the last prompt row, largest strength")
