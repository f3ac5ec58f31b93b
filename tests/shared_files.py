"""Files that one test run makes once, for all its workers."""

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def made_once(place: Path, make: Callable[[Path], object]) -> Path:
    """The folder `place`, filled by the first worker that asks while others wait."""
    done = place.with_name(f"{place.name}.done")
    with FileLock(place.with_name(f"{place.name}.lock")):
        if not done.exists():
            shutil.rmtree(place, ignore_errors=True)  # of a try that failed
            place.mkdir()
            make(place)
            done.touch()
    return place
