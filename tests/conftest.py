"""Fixtures that several test files share."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import media_factory
import pytest
from shared_files import made_once

from mosear_export.demo.fetch import DemoFiles, default_cache, fetch

if TYPE_CHECKING:
    from toy_engine import Folders


@pytest.fixture(scope="session")
def demo_files() -> DemoFiles:
    """The frozen parts of the demo model, fetched into the user's cache where they are not there yet."""
    return fetch(default_cache(), print)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test run, the same for all its workers."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def folders(shared: Path) -> "Folders":
    """Checkpoint, ONNX and engine folder of one toy, which no test may alter."""
    from toy_engine import Folders, build  # only here: it needs torch

    return Folders.below(made_once(shared / "toy", build))


@pytest.fixture(scope="session")
def clip() -> bytes:
    """A second of numbered pictures and a tone."""
    return media_factory.make_clip("mp4", seconds=1.0)
