"""Fixtures that several test files share."""

import pytest

from mosear_export.demo.fetch import DemoFiles, default_cache, fetch


@pytest.fixture(scope="session")
def demo_files() -> DemoFiles:
    """The frozen parts of the demo model, fetched into the user's cache where they are not there yet."""
    return fetch(default_cache(), print)
