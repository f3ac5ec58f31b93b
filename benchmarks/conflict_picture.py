"""A conflict report as a picture: `mosear ask CLIP --task conflict --json > a.json`, then this script with a.json and a.png."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Record = Mapping[str, Any]  # JSON: Answer.record()
COLORS = {"face": "C0", "voice": "C1", "both": "0.35"}


def draw(record: Record, path: Path) -> None:
    """Left: probabilities of each label from the face, the voice, both. Right: attention of each layer before and after."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained", width_ratios=(3, 2))
    said = {"face": record["face"], "voice": record["voice"], "both": record["joint"]}
    labels = list(record["joint"]["probabilities"])
    for i, (who, judged) in enumerate(said.items()):
        places = np.arange(len(labels)) + 0.27 * (i - 1)
        name = {"face": "face alone", "voice": "voice alone", "both": "both"}[who]
        shares = [judged["probabilities"][label] for label in labels]
        left.bar(places, shares, 0.27, color=COLORS[who], label=f"{name}: {judged['label']}")
    left.set_xticks(range(len(labels)), labels, rotation=20)
    left.set(ylim=(0, 1), ylabel="probability")
    left.legend()
    masses = np.array(record["modality_mass"])  # [layers, 2, G]
    for group, who in ((1, "face"), (2, "voice")):
        right.plot(masses[:, 0, group], ":", color=COLORS[who], label=f"{who}, before reallocation")
        right.plot(masses[:, 1, group], "-", color=COLORS[who], label=f"{who}, after")
    right.set(xlabel="layer", ylabel="share of the last prompt row's attention", title="where the model looks")
    right.legend(fontsize="small")
    verdict = "face and voice disagree" if record["conflict"] else "face and voice agree"
    figure.suptitle(f"{verdict}: the face says {said['face']['label']}, the voice {said['voice']['label']}; "
                    f"together {said['both']['label']}")  # fmt: skip
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("answer", type=Path, help="JSON of a conflict answer")
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    try:
        record = json.loads(options.answer.read_text())
    except (OSError, ValueError) as error:
        print(f"error: {options.answer} cannot be read as JSON: {error}", file=sys.stderr)
        return 1
    if record.get("conflict") is None:
        print(
            f"error: {options.answer} is no conflict report: ask with --task conflict, face and voice", file=sys.stderr
        )
        return 1
    draw(record, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
