"""The door to the Model Optimizer: encode calibration clips, quantise the decoder under each scheme."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mosear.engine import Engine
from mosear.errors import MosearError
from mosear_export.precision import clips
from mosear_export.precision.optimise import SCHEMES, optimise
from mosear_export.precision.run import prompt_inputs

EACH = 16  # calibration clips with a voice, a face, both, words


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; errors that the user can mend are printed in one line, and the status is 1."""
    parser = argparse.ArgumentParser(description="Quantise the decoder with NVIDIA's Model Optimizer")
    parser.add_argument("--data", type=Path, required=True, help="folder with voices/ and faces/ (docs/conflict.md)")
    parser.add_argument(
        "--engine", type=Path, default=Path("build/engines/cpu-fp32"), help="encodes (default: %(default)s)"
    )
    parser.add_argument("--onnx", type=Path, default=Path("build/onnx/onnx"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("build/quantised"), help="default: %(default)s")
    parser.add_argument("--scheme", nargs="+", choices=SCHEMES, default=list(SCHEMES), help="default: all")
    parser.add_argument("--each", type=int, default=EACH, help="clips of a kind (default: %(default)s)")
    parser.add_argument(
        "--python",
        type=Path,
        default=Path(".venv-quantise/bin/python"),
        help="with the Optimizer (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        with Engine(options.engine) as engine:
            backend, config = engine.backend, engine.config
            cases = clips.read_cases(options.data, clips.CALIBRATION, backend, config, each=options.each)
            calls = prompt_inputs(cases, backend, config, engine.files.prompt_builder())
        for name in options.scheme:
            optimise(SCHEMES[name], options.onnx, calls, options.out, options.python, print)
    except MosearError as error:
        print(f"quantise: {error}", file=sys.stderr)
        return 1
    return 0
