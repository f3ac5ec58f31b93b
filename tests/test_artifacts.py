"""Published folders: whole or not there, found again by content, and a changed file is named."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from mosear import artifacts
from mosear.artifacts import (
    MANIFEST,
    Manifest,
    existing,
    file_hash,
    folder_hashes,
    key_of,
    link,
    location,
    publish,
)
from mosear.errors import EngineError

KIND, NAME, REMEDY = "onnx", "demo", "run `mosear export onnx` again"
INPUTS: dict[str, object] = {"checkpoint": "abc", "settings": {"opset": 24}}
ENGINE = Path(__file__).parents[1] / "engine"


def make(root: Path, *, inputs: dict[str, object] = INPUTS, text: str = "first") -> Path:
    with publish(root, kind=KIND, name=NAME, inputs=inputs) as draft:
        (draft.folder / "sub").mkdir()
        (draft.folder / "sub" / "a.bin").write_bytes(b"\0\1\2")
        (draft.folder / "b.txt").write_text(text)
        draft.notes["seconds"] = 1.5
    return location(root, name=NAME, inputs=inputs)


def found(root: Path, inputs: dict[str, object] = INPUTS) -> Path | None:
    return existing(root, kind=KIND, name=NAME, inputs=inputs)


def test_a_folder_is_published_whole_and_described(tmp_path: Path) -> None:
    folder = make(tmp_path / "deep" / "root")
    root = tmp_path / "deep" / "root"
    assert (root / NAME).is_symlink() and (root / NAME).resolve() == folder
    assert not (root / NAME).readlink().is_absolute()  # the root may be moved
    manifest = Manifest.load(root / NAME, kind=KIND, remedy=REMEDY)
    assert manifest.inputs == INPUTS and manifest.key == key_of(INPUTS) and manifest.notes == {"seconds": 1.5}
    assert manifest.files == {
        str(Path("sub/a.bin")): file_hash(folder / "sub" / "a.bin"),
        "b.txt": file_hash(folder / "b.txt"),
    }
    manifest.verify(folder, remedy=REMEDY)
    assert {path.name for path in root.iterdir()} == {NAME, folder.name}
    assert folder.stat().st_mode & 0o777 == 0o755  # readable to a server's user, unlike a temporary folder


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), publish(tmp_path, kind=KIND, name=NAME, inputs=INPUTS) as draft:
        (draft.folder / "half.bin").write_bytes(b"half")
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == [] and found(tmp_path) is None


def test_what_fails_leaves_the_old_one(tmp_path: Path) -> None:
    folder = make(tmp_path)
    with pytest.raises(KeyboardInterrupt), publish(tmp_path, kind=KIND, name=NAME, inputs=INPUTS) as draft:
        (draft.folder / "b.txt").write_text("second")
        raise KeyboardInterrupt
    assert found(tmp_path) == folder and (folder / "b.txt").read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_killed_process_leaves_nothing_that_is_taken(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import os, sys
        from pathlib import Path
        sys.path.insert(0, {str(ENGINE)!r})
        from mosear.artifacts import publish
        with publish(Path({str(tmp_path)!r}), kind={KIND!r}, name={NAME!r}, inputs={INPUTS!r}) as draft:
            (draft.folder / "b.txt").write_text("half")
            os._exit(9)
    """)
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 9
    assert found(tmp_path) is None and not (tmp_path / NAME).exists()
    assert found(tmp_path) is None and make(tmp_path) == found(tmp_path)


def test_nothing_stands_in_its_place_before_the_end(tmp_path: Path) -> None:
    with publish(tmp_path, kind=KIND, name=NAME, inputs=INPUTS) as draft:
        (draft.folder / "b.txt").write_text("half")
        assert found(tmp_path) is None and not location(tmp_path, name=NAME, inputs=INPUTS).exists()


def test_a_second_publication_replaces_the_first(tmp_path: Path) -> None:
    first = make(tmp_path)
    (first / "stale.txt").write_text("left behind")
    second = make(tmp_path, text="second")
    assert first == second == found(tmp_path)
    assert (second / "b.txt").read_text() == "second" and not (second / "stale.txt").exists()


@pytest.mark.parametrize("name", ["b.txt", "sub/a.bin", MANIFEST])
def test_a_folder_that_lacks_a_file_is_not_taken(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path)
    assert found(tmp_path) == folder
    (folder / name).unlink()
    assert found(tmp_path) is None


def test_a_folder_copied_to_the_place_of_other_inputs_is_not_taken(tmp_path: Path) -> None:
    other = {**INPUTS, "checkpoint": "xyz"}
    shutil.copytree(make(tmp_path), location(tmp_path, name=NAME, inputs=other))
    assert found(tmp_path, other) is None


def test_the_link_follows_what_was_asked_for(tmp_path: Path) -> None:
    other = {**INPUTS, "checkpoint": "xyz"}
    first, second = make(tmp_path), make(tmp_path, inputs=other)
    assert (tmp_path / NAME).resolve() == second
    assert found(tmp_path) == first and (tmp_path / NAME).resolve() == first
    link(tmp_path / NAME, second)
    assert (tmp_path / NAME).resolve() == second and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "other",
    [
        {"checkpoint": "abd", "settings": {"opset": 24}},
        {"checkpoint": "abc", "settings": {"opset": 25}},
        {"checkpoint": "abc", "settings": {"opset": "24"}},
        {"checkpoint": "abc"},
        {"checkpoint": "abc", "settings": {"opset": 24}, "tool": "1.0"},
        {"checkpoint": {"abc": "settings"}},
    ],
    ids=str,
)
def test_a_key_changes_with_every_input(other: dict[str, object]) -> None:
    assert key_of(other) != key_of(INPUTS)


def test_a_key_is_the_same_in_any_order_and_changes_with_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(INPUTS)
    assert key_of(dict(reversed(INPUTS.items()))) == before
    monkeypatch.setattr(artifacts, "FORMAT", 999)
    assert key_of(INPUTS) != before


def test_hashes_are_of_every_file_but_the_manifest(tmp_path: Path) -> None:
    folder = make(tmp_path)
    (folder / "sub" / MANIFEST).write_text("a file of the stage's own that has this name")
    assert set(folder_hashes(folder)) == {"b.txt", str(Path("sub/a.bin")), str(Path("sub") / MANIFEST)}
    assert file_hash(folder / "sub" / "a.bin") == "ae4b3280e56e2faf83f414a6e3dabe9d5fbe18976544c05fed121accb85b53fc"


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"!")


@pytest.mark.parametrize(
    ("damage", "message"), [(append, "was altered: expected sha256 .* found"), (os.unlink, "is missing")]
)
def test_verify_names_the_file(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = make(tmp_path)
    manifest = Manifest.load(folder, kind=KIND, remedy=REMEDY)
    damage(folder / "sub" / "a.bin")
    with pytest.raises(EngineError, match=rf"sub/a\.bin {message}.*: run `mosear export onnx` again"):
        manifest.verify(folder, remedy=REMEDY)


def rewritten(**changes: object) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), **changes})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rewritten(kind="engine"), "holds engine of format 1; this version reads onnx of format 1"),
        (rewritten(format=2), "holds onnx of format 2; this version reads onnx of format 1"),
        (rewritten(surplus=1), "cannot be read"),
        (lambda text: text[:-20], "cannot be read"),
        (lambda text: '{"kind": "onnx"}', "cannot be read"),
        (lambda text: "[]", "cannot be read"),
        (lambda text: "7", "cannot be read"),
    ],
    ids=["kind", "format", "surplus key", "cut off", "lacking keys", "a list", "a number"],
)
def test_a_manifest_that_is_not_ours_is_refused(damage: Callable[[str], str], message: str, tmp_path: Path) -> None:
    folder = make(tmp_path)
    path = folder / MANIFEST
    path.write_text(damage(path.read_text()))
    with pytest.raises(EngineError) as caught:
        Manifest.load(folder, kind=KIND, remedy=REMEDY)
    assert message in str(caught.value) and str(folder) in str(caught.value) and REMEDY in str(caught.value)
    assert found(tmp_path) is None


def test_a_folder_without_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=rf"is no onnx folder \(it has no manifest\.json\): {REMEDY}"):
        Manifest.load(tmp_path / "nowhere", kind=KIND, remedy=REMEDY)
