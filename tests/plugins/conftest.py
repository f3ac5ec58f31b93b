"""Kernels of this process are interpreted, as in tests/kernels; what must be compiled is done in a child process."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "kernels"))

import executor

executor.interpret()
