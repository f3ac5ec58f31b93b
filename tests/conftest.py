"""Fixtures that several test files share."""

from typing import TYPE_CHECKING

import media_factory
import pytest

from mosear_export.demo.fetch import DemoFiles, default_cache, fetch

if TYPE_CHECKING:
    from toy_engine import Folders


@pytest.fixture(scope="session")
def demo_files() -> DemoFiles:
    """The frozen parts of the demo model, fetched into the user's cache where they are not there yet."""
    return fetch(default_cache(), print)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> "Folders":
    """Checkpoint, ONNX and engine folder of one toy."""
    from toy_engine import build  # only here: it needs torch

    return build(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def clip() -> bytes:
    """A second of numbered pictures and a tone."""
    return media_factory.make_clip("mp4", seconds=1.0)
