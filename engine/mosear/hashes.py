"""Hashes of files, and a memory of those that were read before: a file of known size, time and inode is not read again.

Freshness asks for the hashes of gigabytes at each start. What is loaded to be run is always read whole (`file_hash`).
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

HashOf = Callable[[Path], str]
# A file that was written a moment ago may be written again within one tick of its time, and would look the same.
SETTLED_NS = 2_000_000_000
MOST = 10_000  # files that are remembered


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read whole."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class HashMemory:
    """Called with a path: its SHA-256, from memory where size, time and inode are those of then. A context manager.

    It is kept in one JSON file, written at the end; one that cannot be read or written costs time and nothing else.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.known, self.learned = path, _read(path), False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.learned:
            _write(self.path, dict(list(self.known.items())[-MOST:]))

    def __call__(self, path: Path) -> str:
        now_ns, found = time.time_ns(), path.stat()
        name, state = f"{found.st_dev}:{found.st_ino}", [found.st_size, found.st_mtime_ns]
        entry = self.known.get(name)
        if entry is not None and entry[:2] == state:
            return str(entry[2])
        digest = file_hash(path)
        if now_ns - found.st_mtime_ns > SETTLED_NS:
            self.known.pop(name, None)
            self.known[name] = [*state, digest]
            self.learned = True
        return digest


def _read(path: Path) -> dict[str, list[object]]:
    """What was remembered; nothing where the file is missing or no such table."""
    try:
        table = json.loads(path.read_text())
        return {str(name): [int(size), int(time_ns), str(digest)] for name, (size, time_ns, digest) in table.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(path: Path, known: dict[str, list[object]]) -> None:
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(known))
        aside.replace(path)
