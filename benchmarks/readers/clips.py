"""A benchmark's clip, and what all readers do: find files, read tables, say what is wrong with them."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mosear.errors import ConfigError

SUFFIXES = (".avi", ".mp4", ".mkv", ".mov", ".webm")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkClip:
    """A video, its true labels (one, or a set of words) and what subset it belongs to. words: what is said, where known."""

    name: str
    video: Path
    labels: tuple[str, ...]
    subset: str = "all"
    words: str = ""


def rows_of(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV file with a header; raises ConfigError where it or a column is missing."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): the layout is in docs/conflict.md") from error
    if not rows:
        raise ConfigError(f"{path} has no rows below its header")
    if missing := [name for name in needed if name not in rows[0]]:
        raise ConfigError(f"{path} lacks the column {missing[0]!r}; it has {', '.join(rows[0])}")
    return rows


def json_of(path: Path) -> object:
    """A JSON file; raises ConfigError where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}): the layout is in docs/conflict.md") from error


def field(row: Mapping[str, object], name: str, where: object) -> str:
    """A text of a JSON object; raises ConfigError where it is not there."""
    value = row.get(name) if isinstance(row, Mapping) else None
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: an entry has no text {name!r}: {str(row)[:80]}")
    return value


def video_of(folder: Path, name: str) -> Path:
    """The clip of this name, whatever its suffix. A clip that is not there is the benchmark's to count as failed."""
    if Path(name).suffix:
        return folder / name
    found = [folder / f"{name}{suffix}" for suffix in SUFFIXES if (folder / f"{name}{suffix}").exists()]
    return found[0] if found else folder / f"{name}{SUFFIXES[0]}"
