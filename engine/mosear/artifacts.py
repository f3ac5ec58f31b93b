"""Folders that a stage makes: written aside, published whole, described by a manifest, found again by content.

A stage is a function from folder to folder. Its result is `<root>/<name>-<key>`, where the key is a hash of everything
that the stage read: inputs, settings, tool versions. `<root>/<name>` is a link to the newest one.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mosear.errors import EngineError
from mosear.hashes import HashOf, file_hash

FORMAT = 1  # layout of the folders; a folder of another format is refused
MANIFEST = "manifest.json"
CHECKPOINT, ONNX, ENGINE = "checkpoint", "onnx", "engine"  # kinds of folders, in the order that they are made
CONFIG, TOKENIZER, HEADS = "config.json", "tokenizer.json", "heads.safetensors"  # files that several of them hold


def folder_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder, by relative path; the manifest itself is left out."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    return {str(path.relative_to(folder)): file_hash(path) for path in files}


def key_of(inputs: Mapping[str, object]) -> str:
    """Content key of a stage's inputs."""
    text = json.dumps({"format": FORMAT, **inputs}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a folder is: its kind, the key of its inputs, the inputs themselves, and the hash of each file in it."""

    kind: str
    key: str
    inputs: dict[str, object]
    files: dict[str, str]
    notes: dict[str, object]
    format: int = FORMAT

    def save(self, folder: Path) -> None:
        record = {name: getattr(self, name) for name in self.__slots__}
        (folder / MANIFEST).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")

    @classmethod
    def load(cls, folder: Path, *, kind: str, remedy: str) -> "Manifest":
        """Read a folder's manifest; raises EngineError where it is missing, unreadable, of another kind or format."""
        path = folder / MANIFEST
        try:
            record = json.loads(path.read_text())
            manifest = cls(**record)
        except FileNotFoundError:
            raise EngineError(f"{folder} is no {kind} folder (it has no {MANIFEST}): {remedy}") from None
        except (OSError, ValueError, TypeError) as error:
            raise EngineError(f"{path} cannot be read ({error}): {remedy}") from error
        if (manifest.kind, manifest.format) != (kind, FORMAT):
            raise EngineError(
                f"{folder} holds {manifest.kind} of format {manifest.format}; "
                f"this version reads {kind} of format {FORMAT}: {remedy}"
            )
        return manifest

    def verify(self, folder: Path, *, remedy: str, hash_of: HashOf = file_hash) -> None:
        """Compare every file with its hash; raises EngineError naming the first that differs."""
        for name, expected in self.files.items():
            path = folder / name
            if not path.is_file():
                raise EngineError(f"{path} is missing: {remedy}")
            if (found := hash_of(path)) != expected:
                raise EngineError(f"{path} was altered: expected sha256 {expected[:12]}, found {found[:12]}: {remedy}")


@contextlib.contextmanager
def publish(root: Path, *, kind: str, name: str, inputs: dict[str, object]) -> Iterator["Draft"]:
    """Write a folder aside; when the block ends well, hash it, move it in place in one step and point the link at it."""
    root.mkdir(parents=True, exist_ok=True)
    key = key_of(inputs)
    draft = Draft(folder=Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root)), notes={})
    try:
        yield draft
        files = folder_hashes(draft.folder)
        Manifest(kind=kind, key=key, inputs=inputs, files=files, notes=draft.notes).save(draft.folder)
        draft.folder.chmod(0o755)
        for file in files:  # safetensors writes for its owner alone
            (draft.folder / file).chmod(0o644)
        final = location(root, name=name, inputs=inputs)
        if final.exists():
            shutil.rmtree(final)
        draft.folder.rename(final)
        link(root / name, final)
    finally:
        shutil.rmtree(draft.folder, ignore_errors=True)


@dataclass(slots=True, kw_only=True)
class Draft:
    """A folder that is being written, and the notes that its manifest will carry."""

    folder: Path
    notes: dict[str, object]


def location(root: Path, *, name: str, inputs: Mapping[str, object]) -> Path:
    """Where the result for these inputs lies, once it is made."""
    return root / f"{name}-{key_of(inputs)[:12]}"


def link(path: Path, target: Path) -> None:
    """Point a symbolic link at a sibling folder, in one step."""
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target.name)
    aside.replace(path)


def share(source: Path, target: Path) -> None:
    """One file at two places: a hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:  # another filesystem, or one without hard links
        shutil.copyfile(source, target)


def existing(
    root: Path, *, kind: str, name: str, inputs: Mapping[str, object], hash_of: HashOf | None = None
) -> Path | None:
    """The folder for these inputs if it is whole (manifest of this format, every file there), with the link set to it.

    hash_of: compare each file with its hash too; an altered folder is not taken.
    """
    folder = location(root, name=name, inputs=inputs)
    try:
        manifest = Manifest.load(folder, kind=kind, remedy="rebuild")
        if hash_of is not None:
            manifest.verify(folder, remedy="rebuild", hash_of=hash_of)
    except EngineError:
        return None
    if manifest.key != key_of(inputs) or any(not (folder / file).is_file() for file in manifest.files):
        return None
    link(root / name, folder)
    return folder
