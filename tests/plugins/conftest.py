"""Kernels of this process are interpreted, as in tests/kernels; what must be compiled is done in a child process."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "kernels"))

import executor

executor.interpret()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "tensorrt: needs TensorRT's library and a GPU, run by `make test-gpu`")
