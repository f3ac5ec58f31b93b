"""Nothing changed: nothing built, nothing heavy imported, no weight read. Altered: noticed, and made again."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from safetensors.numpy import load_file, save_file
from toy_engine import RECIPE, Folders

from mosear.config import ModelConfig
from mosear.contract import Part, parts
from mosear.errors import EngineError
from mosear.hashes import HashMemory, file_hash
from mosear_export import build as build_module
from mosear_export import chain, export, to_onnx
from mosear_export.checkpoint import seal
from mosear_export.explain import explain
from mosear_export.model.whole import ReferenceModel

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "onnx", "onnxruntime", "onnxscript", "gguf", "triton")


@pytest.fixture(scope="module")
def toy(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A copy, as it is damaged here."""
    return folders.copied(tmp_path_factory.mktemp("chain") / "toy")


def fresh(folders: Folders) -> Path | None:
    return chain.fresh_engine(RECIPE, folders.root, checkpoint=folders.checkpoint, demo=None, hash_of=file_hash)


def test_a_fresh_engine_is_found_without_anything_heavy(toy: Folders) -> None:
    """In a process of its own, whose imports are told."""
    told = ask(toy, "")
    assert told == f"engine: {toy.engine} is fresh []"
    memory = HashMemory(toy.root / "hashes.json")
    assert memory.known, "what was read is remembered"


def ask(toy: Folders, option: str) -> str:
    recipe = toy.root / "toy.toml"
    limits = "\n".join(f"{name} = {getattr(RECIPE.limits, name)}" for name in RECIPE.limits.__slots__)
    recipe.write_text(f'name = "toy"\nthreads = 1\n[limits]\n{limits}\n')
    arguments = ["build", "--recipe", str(recipe), "--checkpoint", str(toy.checkpoint), "--out", str(toy.root)]
    script = (
        "import sys\nfrom mosear.cli import main\n"
        f"assert main({[*arguments, *filter(None, [option])]!r}) == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    path = os.pathsep.join(str(ROOT / name) for name in ("engine", "export"))
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.splitlines())


def test_an_altered_folder_is_not_fresh(toy: Folders) -> None:
    assert fresh(toy) == toy.engine
    for folder, file in ((toy.checkpoint, "heads.safetensors"), (toy.onnx, "voice.onnx"), (toy.engine, "voice.onnx")):
        path = folder / file
        data = path.read_bytes()
        try:
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            assert fresh(toy) is None, path
        finally:
            path.write_bytes(data)
    assert fresh(toy) == toy.engine


def test_verify_reads_what_memory_would_not(toy: Folders) -> None:
    """A file altered behind the back of its size and time: `--verify` alone sees it, and the engine is made again."""
    path = toy.engine / "voice.onnx"
    data, time = path.read_bytes(), path.stat()
    long_ago = time.st_mtime_ns - 10**10
    os.utime(path, ns=(long_ago, long_ago))
    assert "is fresh" in ask(toy, "")
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(bytes([data[-1] ^ 1]))
    os.utime(path, ns=(long_ago, long_ago))
    assert "is fresh" in ask(toy, "")
    assert "engine: wrote" in ask(toy, "--verify") and (toy.engine / "voice.onnx").read_bytes() == data


@pytest.mark.parametrize("missing", ["checkpoint", "onnx", "engine"])
def test_a_missing_folder_is_not_fresh(missing: str, toy: Folders) -> None:
    folder: Path = getattr(toy, missing)
    aside = folder.rename(folder.with_name("aside"))
    try:
        assert fresh(toy) is None
    finally:
        aside.rename(folder)


@pytest.mark.parametrize("full_at", ["copy", "save_model"])
def test_a_full_disk_is_named_and_leaves_nothing(
    full_at: str, toy: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil if full_at == "copy" else onnx, full_at, full)
    monkeypatch.setattr(chain, "_export", lambda *_: toy.onnx)
    with pytest.raises(EngineError, match=r"cannot be written below .*No space left.*MB are free.*--out"):
        chain.build(RECIPE, tmp_path, toy.checkpoint, print, hash_of=file_hash)
    left = [path for path in (tmp_path / "engines").rglob("*") if path.name.startswith(".")]
    assert not left and not list((tmp_path / "engines").glob("toy*"))


def test_a_changed_expert_exports_no_graph(toy: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs stay, as the same files, an engine's too; golden outputs and heads are new. A changed projector is a graph
    of its own."""
    changed = shutil.copytree(toy.checkpoint, tmp_path / "checkpoint")
    values = load_file(changed / "heads.safetensors")
    expert = next(name for name in values if name.endswith("q_proj.b"))
    save_file(values | {expert: values[expert] * 2}, changed / "heads.safetensors")
    seal(changed)
    exported: list[str] = []

    def export_part(model: ReferenceModel, part: Part, path: Path) -> None:
        exported.append(part.name)
        to_onnx.export_part(model, part, path)

    monkeypatch.setattr(export, "export_part", export_part)
    other = export.export_checkpoint(changed, toy.onnx.parent, print)
    assert exported == [] and other != toy.onnx
    for name in (f"{part}.onnx" for part in parts(ModelConfig.load(other / "config.json"))):
        assert same(other, toy.onnx, name) and same(other, toy.onnx, f"{name}.data")
    assert not same(other, toy.onnx, "golden/decoder.safetensors") and not same(other, toy.onnx, "heads.safetensors")
    lines = list(explain(toy.engine, other, None))
    assert lines[0].startswith("onnx.golden/") and "graphs to build: none; graphs that stay: decoder, " in lines[-2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "optimise", lambda *_: pytest.fail("optimised a graph"))
        engine = build_module.build_engine(RECIPE, other, toy.engine.parent, print)
    assert engine != toy.engine and same(engine, toy.engine, "decoder.onnx.data")
    assert not same(engine, toy.engine, "heads.safetensors")
    projector = next(name for name in values if name.startswith("face_projector.") and values[name].any())
    save_file(values | {projector: values[projector] * 2}, changed / "heads.safetensors")
    seal(changed)
    export.export_checkpoint(changed, toy.onnx.parent, print)
    assert exported == ["face_projector"]


def same(a: Path, b: Path, name: str) -> bool:
    return (a / name).read_bytes() == (b / name).read_bytes()
