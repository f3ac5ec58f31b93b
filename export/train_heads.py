"""Train the demo heads: `python export/train_heads.py --data DIR` (layout: mosear_export/training/features.py)."""

import sys

from mosear.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-heads", *sys.argv[1:]]))
