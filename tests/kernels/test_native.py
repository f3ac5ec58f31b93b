"""The C++ launcher: configured, built and run against a stand-in for the driver, on every compute capability."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mosear.artifacts import MANIFEST
from mosear.hashes import file_hash
from mosear_export.kernels import export_kernels

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
CMAKE = shutil.which("cmake")
needs_cmake = pytest.mark.skipif(CMAKE is None, reason="needs cmake")
needs_compiler = pytest.mark.skipif(
    CMAKE is None or not (shutil.which("g++") or shutil.which("clang++")), reason="needs cmake and a C++ compiler"
)


def configure(build: Path, *options: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": path} if path else None
    command = [str(CMAKE), "-S", str(ROOT), "-B", str(build), f"-DPython3_EXECUTABLE={sys.executable}", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("native")
    return export_kernels((86, 90, 120), root, print, data=("bf16",), modules=("tiny_kernels",), paths=(str(HERE),))


@needs_compiler
def test_launcher(kernels: Path, tmp_path: Path) -> None:
    found = configure(tmp_path, f"-DMOSEAR_KERNELS={kernels}")
    assert found.returncode == 0 and "mosear_kernels: skipped" not in found.stdout, found.stdout + found.stderr
    built = subprocess.run([str(CMAKE), "--build", str(tmp_path)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-3000:]
    tested = subprocess.run(
        ["ctest", "--test-dir", str(tmp_path), "--verbose"], capture_output=True, text=True, check=False
    )
    assert tested.returncode == 0, tested.stdout[-3000:]
    served = {int(c): int(n) for c, n in re.findall(r"capability (\d+): \d+ kernels, (\d+) served", tested.stdout)}
    # sm_86 serves 8.6 and above, not 8.0; sm_120 serves 12.0, not 12.1. No binary is an error that the test expects.
    assert served == {75: 0, 80: 0, 86: 4, 87: 4, 89: 4, 90: 4, 100: 0, 110: 0, 120: 4, 121: 0}
    assert "above 48 KB tried 1" in tested.stdout


@needs_cmake
def test_a_missing_compiler_is_skipped(tmp_path: Path) -> None:
    tools = tmp_path / "bin"  # a path with a build tool, and nothing else
    tools.mkdir()
    (tools / "make").symlink_to(shutil.which("make") or shutil.which("ninja") or "/bin/false")
    found = configure(tmp_path / "build", "-DCMAKE_CXX_COMPILER=NOTFOUND", path=str(tools))
    assert found.returncode == 0, found.stdout + found.stderr
    assert "mosear_kernels: skipped, there is no C++ compiler" in found.stdout


@needs_compiler
def test_a_python_without_triton_is_skipped(tmp_path: Path) -> None:
    bare = tmp_path / "python3"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    found = configure(tmp_path / "build", f"-DPython3_EXECUTABLE={bare}")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "mosear_kernels: skipped, " in found.stdout, found.stdout


def generate(folder: Path, out: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(ROOT / "engine" / "native" / "generate.py"), str(folder), str(out)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_table_that_disagrees_with_its_binary_is_refused(kernels: Path, tmp_path: Path) -> None:
    folder = tmp_path / "altered"
    shutil.copytree(kernels, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["notes"]["kernels"][0]["parameters"][3]["size"] = 8  # what a double in an int's place would be
    (folder / MANIFEST).write_text(json.dumps(manifest))
    found = generate(folder, tmp_path / "out")
    assert found.returncode != 0 and "bytes, its manifest states (8, 8, 8, 8, 4" in found.stderr


def test_an_altered_image_is_refused(kernels: Path, tmp_path: Path) -> None:
    folder = tmp_path / "altered"
    shutil.copytree(kernels, folder)
    image = next(folder.glob("*.cubin"))
    before = file_hash(image)
    image.write_bytes(image.read_bytes()[:-1])
    assert file_hash(image) != before
    found = generate(folder, tmp_path / "out")
    assert found.returncode != 0 and f"{image.name} was altered" in found.stderr
