"""Export a checkpoint to ONNX: `python export/export_onnx.py --checkpoint DIR` (default: the demo's)."""

import sys

from mosear.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", "onnx", *sys.argv[1:]]))
