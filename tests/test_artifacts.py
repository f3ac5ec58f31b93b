"""Folders of stages: whole or not there, found again by content, and checked file by file."""

import json
from pathlib import Path

import pytest

from mosear.artifacts import FORMAT, MANIFEST, Manifest, existing, file_hash, key_of, link, location, publish
from mosear.errors import EngineError

INPUTS: dict[str, object] = {"checkpoint": "abc", "threads": 2}
REMEDY = "make it again"


def made(root: Path, *, text: str = "one", inputs: dict[str, object] = INPUTS) -> Path:
    """A published folder of two files."""
    with publish(root, kind="engine", name="toy", inputs=inputs) as draft:
        (draft.folder / "deep").mkdir()
        (draft.folder / "deep" / "a.txt").write_text(text)
        (draft.folder / "b.txt").write_text("two")
        draft.notes["seconds"] = 3
    return location(root, name="toy", inputs=inputs)


def find(root: Path, **changes: object) -> Path | None:
    return existing(root, kind="engine", name="toy", inputs=INPUTS | changes)


def load(folder: Path) -> Manifest:
    return Manifest.load(folder, kind="engine", remedy=REMEDY)


def test_a_published_folder_is_whole_and_linked(tmp_path: Path) -> None:
    folder = made(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy", folder.name]
    assert (tmp_path / "toy").is_symlink() and (tmp_path / "toy").resolve() == folder.resolve()
    manifest = load(folder)
    assert (manifest.kind, manifest.format, manifest.key) == ("engine", FORMAT, key_of(INPUTS))
    assert manifest.inputs == INPUTS and manifest.notes == {"seconds": 3}
    assert manifest.files == {name: file_hash(folder / name) for name in ("deep/a.txt", "b.txt")}
    assert folder.stat().st_mode & 0o777 == 0o755
    manifest.verify(folder, remedy=REMEDY)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_stage_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), publish(tmp_path, kind="engine", name="toy", inputs=INPUTS) as draft:
        (draft.folder / "half.txt").write_text("half")
        raise error
    assert not list(tmp_path.iterdir()) and find(tmp_path) is None


def test_a_failed_stage_leaves_the_last_good_one(tmp_path: Path) -> None:
    folder = made(tmp_path)
    with pytest.raises(ValueError), publish(tmp_path, kind="engine", name="toy", inputs=INPUTS):
        raise ValueError
    assert find(tmp_path) == folder and (folder / "deep" / "a.txt").read_text() == "one"
    load(folder).verify(folder, remedy=REMEDY)


def test_a_second_result_takes_the_firsts_place(tmp_path: Path) -> None:
    made(tmp_path)
    folder = made(tmp_path, text="other")
    assert (folder / "deep" / "a.txt").read_text() == "other" and len(list(tmp_path.iterdir())) == 2


def test_folders_are_found_by_what_went_in(tmp_path: Path) -> None:
    first = made(tmp_path)
    second = made(tmp_path, inputs=INPUTS | {"threads": 4})
    assert first != second and (tmp_path / "toy").resolve() == second.resolve()
    assert find(tmp_path) == first and (tmp_path / "toy").resolve() == first.resolve()
    assert find(tmp_path, threads=4) == second
    assert find(tmp_path, threads=8) is None
    assert existing(tmp_path, kind="onnx", name="toy", inputs=INPUTS) is None


def test_the_key_feels_every_input_but_no_order() -> None:
    assert key_of({"a": 1, "b": Path("x")}) == key_of({"b": Path("x"), "a": 1})
    assert len({key_of(INPUTS), key_of(INPUTS | {"threads": 3}), key_of({}), key_of({"a": {"b": 1}})}) == 4


@pytest.mark.parametrize("name", ["deep/a.txt", "b.txt", MANIFEST])
def test_a_folder_that_lacks_a_file_is_made_anew(tmp_path: Path, name: str) -> None:
    folder = made(tmp_path)
    (folder / name).unlink()
    assert find(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read"),
        ({"format": FORMAT + 1}, f"of format {FORMAT + 1}; this version reads engine of format {FORMAT}: {REMEDY}"),
        ({"kind": "onnx"}, "holds onnx"),
        ({"more": 1}, "cannot be read"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(tmp_path: Path, text: str | dict[str, object], message: str) -> None:
    folder = made(tmp_path)
    path = folder / MANIFEST
    path.write_text(text if isinstance(text, str) else json.dumps(json.loads(path.read_text()) | text))
    with pytest.raises(EngineError, match=message):
        load(folder)
    assert find(tmp_path) is None


def test_verify_names_the_altered_and_the_missing_file(tmp_path: Path) -> None:
    folder = made(tmp_path)
    manifest = load(folder)
    (folder / "deep" / "a.txt").write_text("won")
    with pytest.raises(
        EngineError, match=rf"deep/a\.txt was altered: expected sha256 \w{{12}}, found \w{{12}}: {REMEDY}"
    ):
        manifest.verify(folder, remedy=REMEDY)
    (folder / "deep" / "a.txt").unlink()
    with pytest.raises(EngineError, match=rf"deep/a\.txt is missing: {REMEDY}"):
        manifest.verify(folder, remedy=REMEDY)


def test_no_folder_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=f"nowhere is no engine folder .*: {REMEDY}"):
        load(tmp_path / "nowhere")


def test_a_link_is_moved_in_one_step(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        link(tmp_path / "newest", tmp_path / name)
        assert (tmp_path / "newest").readlink() == Path(name)
    assert len(list(tmp_path.iterdir())) == 3
