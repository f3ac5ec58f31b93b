"""Quantise the decoder with NVIDIA's Model Optimizer: `python export/quantise_onnx.py --data DIR` (or `make quantise`)."""

import sys

from mosear_export.precision.quantise_main import main

if __name__ == "__main__":
    sys.exit(main())
