"""The C++ plugin library and the runner: configured, built and tested without a device."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bindings
import numpy as np
import pytest

from mosear.artifacts import Draft
from mosear.backends.tensorrt_builder import Built
from mosear.backends.tensorrt_plan import Plan
from mosear.hashes import file_hash
from mosear.kernels.chips import chip_of
from mosear.kernels.modality_experts import launches as experts
from mosear.kernels.reallocated_attention.decode_launches import TABLE, splits_for
from mosear.recipe import Target
from mosear_export import build_tensorrt
from mosear_export.kernels import export_kernels

ROOT, VERSION = Path(__file__).parents[2], "10.14.1"  # of the headers, and of the stand-in for the library
CMAKE = shutil.which("cmake")
NOT_HERE = CMAKE is None or not (shutil.which("g++") or shutil.which("clang++"))
needs_compiler = pytest.mark.skipif(NOT_HERE, reason="needs cmake and a C++ compiler")
needs_headers = pytest.mark.skipif(
    NOT_HERE or importlib.util.find_spec("kernel_lens") is None,
    reason="needs cmake, a C++ compiler and TensorRT's headers (pip install --no-deps kernel-lens==2.0.1)",
)


def call(*command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **more}
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment, check=False)


def configure(build: Path, *options: str, path: str = "") -> str:
    """Status lines; the configure never fails."""
    python = os.pathsep.join(filter(None, [path, *sys.path]))
    found = call(
        str(CMAKE), "-S", ROOT, "-B", build, f"-DPython3_EXECUTABLE={sys.executable}", *options, PYTHONPATH=python
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder, with the plugin's kernels for one chip."""
    folder = tmp_path_factory.mktemp("native_plugin")
    labels = ("demo plugin", *(f"demo plugin rows {row.most_rows}" for row in experts.TABLE))
    kernels = export_kernels(
        (90,), folder, print, labels=labels, data=("bf16",), modules=("mosear.kernels.plugins.cases",)
    )
    assert "mosear_trt_plugin: headers of TensorRT in " in configure(folder / "build", f"-DMOSEAR_KERNELS={kernels}")
    targets = ("mosear_trt_plugin_test", "mosear_trt_plugin", "mosear_run", "mosear_run_files_test")
    done = call(str(CMAKE), "--build", folder / "build", "-j", "2", "--target", *targets)
    assert done.returncode == 0, done.stdout[-3000:]
    return folder / "build"


@needs_headers
def test_plugin_without_a_device(built: Path) -> None:
    """Creators, fields, types, formats, shapes; which kernels a call launches, on a stand-in for the driver."""
    done = call("ctest", "--test-dir", built, "-R", "^trt_plugin$", "--verbose")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "launches not tried" not in done.stdout and "failures 0" in done.stdout
    found = {(int(b), int(n)): int(s) for b, n, s in re.findall(r"splits (\d+) (\d+) (\d+)", done.stdout)}
    programs = TABLE[90, 128].ctas * chip_of(90).multiprocessors
    assert found == {
        (batch, keys): splits_for(batch=batch, kv_heads=32, longest=keys, programs=programs)
        for batch in (1, 8, 64)
        for keys in (64, 512, 4096, 32768)
    }
    grids = {
        int(n): tuple(map(int, grid))
        for n, *grid in re.findall(r"experts (\d+): expand (\d+) (\d+) (\d+)", done.stdout)
    }
    assert len(grids) == 3
    for rows, grid in grids.items():
        shape = experts.shape_of(576, (576,), rows=rows)
        assert experts.cases_of("", shape, arch=90)[1].launch.grid == grid


@needs_headers
def test_plugin_links_none_of_tensorrts_libraries(built: Path) -> None:
    """TensorRT loads it; it asks for nothing but our kernels."""
    library = next(built.rglob("libmosear_trt_plugin.so"))
    found = call("readelf", "-d", library)
    assert "libmosear_kernels.so" in found.stdout and "nvinfer" not in found.stdout


def described(version: str, *chips: str, target: Target = Target.TENSORRT) -> dict[str, object]:
    """What `mosear build` notes of a plan."""
    plan, draft = Plan(chips=chips, size=1280, programs=()), Draft(folder=Path(), notes={})
    built = Built(seconds=1, memory_mb=1, version=version, inputs={}, outputs={}, profiles=(), plan=plan, read_back={})
    asked: Any = SimpleNamespace(
        target=target, plans=SimpleNamespace(compute_capabilities=chips)
    )  # as far as it is read
    build_tensorrt._describe(draft, built, asked)
    return draft.notes


class EngineDir:
    """An engine folder as the runner sees it: a plan and its manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.plan = folder, folder / "decoder.plan"
        self.plan.write_bytes(bytes(range(256)) * 5)
        self.manifest = {
            "kind": "engine", "format": 1, "files": {"decoder.plan": file_hash(self.plan)},
            "notes": {"plans": {"decoder.plan": described(f"{VERSION}.1", "8.6", "9.0")}},
        }  # fmt: skip

    def run(self, built: Path, *, capability: int = 90, libraries: Path | None = None, manifest: str = "") -> str:
        """What the runner says; it never ends well here."""
        (self.folder / "manifest.json").write_text(manifest or json.dumps(self.manifest))
        runner = next(built.rglob("mosear_run"))
        found = call(
            runner, self.plan, "--inputs", self.folder, MOCK_CUDA_CAPABILITY=str(capability),
            LD_LIBRARY_PATH=str(libraries or self.folder),
        )  # fmt: skip
        assert found.returncode == 1, found.stdout + found.stderr
        return found.stderr


@pytest.fixture
def engine(tmp_path: Path) -> EngineDir:
    return EngineDir(tmp_path)


@needs_headers
def test_an_altered_or_cut_plan_is_refused(built: Path, engine: EngineDir) -> None:
    whole = engine.plan.read_bytes()
    for content in (whole[:-1], whole[:700] + b"x" + whole[701:], b""):
        engine.plan.write_bytes(content)
        said = engine.run(built)
        assert "decoder.plan was altered: expected sha256 " in said and "build it again with `python export" in said
    engine.plan.unlink()
    assert "decoder.plan cannot be opened" in engine.run(built)


@needs_headers
def test_a_foreign_plan_is_refused(built: Path, engine: EngineDir, tmp_path: Path) -> None:
    """Another chip, another TensorRT, a folder of another kind, a manifest that does not know it."""
    assert "decoder.plan is for compute capability 8.6, 9.0, this device is 8.9" in engine.run(built, capability=89)
    kept = engine.manifest["kind"]
    engine.manifest["kind"] = "onnx"
    assert "manifest.json holds 'onnx', not an engine of format 1" in engine.run(built)
    engine.manifest["kind"] = kept
    engine.manifest["notes"] = {"plans": {"decoder.plan": described("1.7.1.116", "9.0", target=Target.TENSORRT_RTX)}}
    assert "decoder.plan is a plan of tensorrt_rtx, not of tensorrt" in engine.run(built)
    engine.manifest["files"] = {}
    assert "manifest.json does not describe decoder.plan" in engine.run(built)
    assert "manifest.json cannot be read (no JSON at byte 1)" in engine.run(built, manifest="{]")


@needs_headers
def test_tensorrt_is_asked_last(built: Path, engine: EngineDir, tmp_path: Path) -> None:
    """Without its library, with one of another version, and with the right one: then nothing but a device is missing."""
    assert "libnvinfer.so.10 cannot be opened (" in engine.run(built)
    source = tmp_path / "library.c"
    source.write_text("int getInferLibVersion(void) { return 101401; }\n")
    done = call(str(bindings.COMPILER), "-shared", "-fPIC", "-o", tmp_path / "libnvinfer.so.10", source)
    assert done.returncode == 0, done.stderr
    assert "no context: the driver says status 100" in engine.run(built)
    engine.manifest["notes"] = {"plans": {"decoder.plan": described("11.4.0.106", "9.0")}}
    assert f"decoder.plan was built by TensorRT 11.4.0.106, here is {VERSION}" in engine.run(built)


@needs_headers
def test_runner_reads_hashes_tensors_and_json(built: Path, tmp_path: Path) -> None:
    tool = next(built.rglob("mosear_run_files_test"))
    file, out = tmp_path / "in", tmp_path / "out.npy"
    for size in (0, 1, 55, 56, 63, 64, 65, 119, 120, 1000):
        file.write_bytes(bytes(i % 251 for i in range(size)))
        assert call(tool, "sha", file).stdout.strip() == file_hash(file)
    for array in (
        np.arange(24, dtype=np.float32).reshape(2, 3, 4), np.float16([1.5]), np.int32(7), np.zeros((0, 3), np.int64),
        np.array([True, False]), np.arange(5, dtype=np.uint8),
    ):  # fmt: skip
        np.save(tmp_path / "in.npy", array)
        assert call(tool, "npy", tmp_path / "in.npy", out).returncode == 0
        found = np.load(out)
        assert found.dtype == array.dtype and found.shape == array.shape and (found == array).all()
    file.write_text('{"a": {"b": "x\\n\\u0041"}, "n": -1.5e2, "list": [1, [], {}, null, true], "z": ""}')
    assert call(tool, "json", file).stdout == "x\nA|-150|5|\n"


@needs_headers
def test_runner_refuses_a_tensor_that_is_none(built: Path, tmp_path: Path) -> None:
    tool, path = next(built.rglob("mosear_run_files_test")), tmp_path / "x.npy"
    np.save(path, np.asfortranarray(np.ones((3, 2), np.float32)))
    assert "must hold little-endian numbers in C order" in call(tool, "npy", path, path).stdout
    np.save(path, np.ones(9, np.float32))
    path.write_bytes(path.read_bytes()[:-1])
    assert "holds fewer or more bytes than its shape says" in call(tool, "npy", path, path).stdout
    path.write_bytes(b"no numpy")
    assert "is no .npy file" in call(tool, "npy", path, path).stdout


@needs_compiler
def test_missing_headers_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "kernel_lens").mkdir()  # a package without headers, first in the path
    (tmp_path / "kernel_lens" / "__init__.py").touch()
    said = configure(tmp_path / "build", path=str(tmp_path))
    assert "mosear_trt_plugin: skipped, there is no NvInfer.h (set MOSEAR_TENSORRT_INCLUDE" in said
