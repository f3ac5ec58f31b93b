"""Remembered hashes: a file that looks as it did is not read; one that does not, or is too new, is."""

import json
import os
from pathlib import Path

import pytest

from mosear import hashes
from mosear.hashes import HashMemory, file_hash

LONG_AGO_NS = 1_600_000_000_000_000_000


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read."""
    found: list[Path] = []
    monkeypatch.setattr(hashes, "file_hash", lambda path: found.append(path) or file_hash(path))
    return found


def old(path: Path, data: bytes, *, time_ns: int = LONG_AGO_NS) -> Path:
    path.write_bytes(data)
    os.utime(path, ns=(time_ns, time_ns))
    return path


def ask(folder: Path, path: Path) -> str:
    with HashMemory(folder / "deep" / "hashes.json") as memory:
        return memory(path)


def test_a_file_is_read_once(tmp_path: Path, reads: list[Path]) -> None:
    path = old(tmp_path / "a", b"one")
    assert ask(tmp_path, path) == ask(tmp_path, path) == file_hash(path)
    os.link(path, tmp_path / "b")  # the same inode under another name
    path.rename(tmp_path / "c")
    assert ask(tmp_path, tmp_path / "b") == ask(tmp_path, tmp_path / "c") == file_hash(tmp_path / "c")
    assert reads == [path]


@pytest.mark.parametrize("change", ["time", "size", "inode"])
def test_a_changed_file_is_read_again(change: str, tmp_path: Path, reads: list[Path]) -> None:
    path = old(tmp_path / "a", b"one")
    ask(tmp_path, path)
    if change == "inode":
        old(tmp_path / "b", b"two").replace(path)
    else:
        old(path, b"two" if change == "time" else b"three", time_ns=LONG_AGO_NS + (change == "time"))
    assert ask(tmp_path, path) == file_hash(path) and len(reads) == 2


def test_what_was_just_written_is_not_remembered(tmp_path: Path, reads: list[Path]) -> None:
    """It may be written once more within a tick of its time."""
    path = tmp_path / "a"
    path.write_bytes(b"one")
    ask(tmp_path, path)
    ask(tmp_path, path)
    assert len(reads) == 2


@pytest.mark.parametrize("text", ["", "[]", "{", '{"1:2": 3}', '{"1:2": [1]}', '{"1:2": ["a", "b", "c"]}'])
def test_a_damaged_memory_costs_time_alone(text: str, tmp_path: Path, reads: list[Path]) -> None:
    path, memory = old(tmp_path / "a", b"one"), tmp_path / "deep" / "hashes.json"
    memory.parent.mkdir()
    memory.write_text(text)
    assert ask(tmp_path, path) == ask(tmp_path, path) == file_hash(path) and reads == [path]
    assert list(json.loads(memory.read_text()).values()) == [[3, LONG_AGO_NS, file_hash(path)]]


def test_a_memory_that_cannot_be_written_is_none(tmp_path: Path, reads: list[Path]) -> None:
    path = old(tmp_path / "a", b"one")
    (tmp_path / "deep").write_text("a file where the folder should be")
    assert ask(tmp_path, path) == ask(tmp_path, path) == file_hash(path) and len(reads) == 2
