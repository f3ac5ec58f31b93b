"""Train the demo heads: `python export/train_heads.py --data DIR` (minutes on two cores; layout: training/features.py)."""

import argparse
from pathlib import Path

from mosear_export.demo.assemble import HEADS
from mosear_export.training.run import train_heads
from mosear_export.training.train import TrainConfig

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with voices/ and faces/")
    parser.add_argument("--work", type=Path, default=Path("build/training"), help="where encoder outputs are kept")
    parser.add_argument("--output", type=Path, default=HEADS)
    parser.add_argument("--steps", type=int, default=TrainConfig().steps)
    options = parser.parse_args()
    train_heads(
        options.data,
        options.work,
        options.output,
        TrainConfig(steps=options.steps),
        lambda line: print(line, flush=True),
    )
