"""What decides a stage's result: files, recipe, code, versions of tools. Asked without torch, onnx or a runtime.

A key is made of these, so "is it fresh" is answered before anything heavy is imported.
"""

import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path

import mosear
from mosear.artifacts import CONFIG, HEADS, Manifest
from mosear.backends.tensorrt_builder import MODULES
from mosear.backends.tensorrt_load import installed_version
from mosear.contract import DECODER, EMBEDDING
from mosear.hashes import HashOf, file_hash
from mosear.recipe import Heads, Mechanisms, Recipe, Target

ENGINE, EXPORT = Path(str(mosear.__file__)).parent, Path(__file__).parent
DEMO, DEMO_HEADS = "demo", EXPORT / "demo" / "heads.safetensors"
READERS = ("efficientnet", "face_api", "smollm", "whisper")
CHECKPOINT_CODE = ("checkpoint.py", *(f"demo/{name}.py" for name in ("assemble", "packages", *READERS)))
GRAPH_CODE = ("plain.py", "ops.py", "to_onnx.py", "golden.py", "precision/short.py")
SHARED_CODE = ("fuse.py", "pack.py", "plain.py")
CPU_CODE = (*SHARED_CODE, "precision/graph.py", "quantise.py")
BUILDER_CODE = ("backends/tensorrt_builder.py", "backends/tensorrt_child.py")
ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu")  # packages with the same module: one of them is there
MISSING = "missing"
GRAPH, GRAPHS = "graph", "graphs"  # kind of an optimised graph's folder; below the engines
TENSORRT_CODE = (*SHARED_CODE, "masked.py", "masked_body.py", "narrow.py", "tensorrt_graph.py")


def checkpoint_inputs(gguf: Path, heads: Path, hash_of: HashOf) -> dict[str, object]:
    """Of the demo's checkpoint; its other parts are packages whose hashes stand in the code."""
    code = _hashes(EXPORT, CHECKPOINT_CODE) | _hashes(ENGINE, ("config.py",))
    settings = heads.with_suffix(".json")
    how = hash_of(settings) if settings.is_file() else MISSING
    return {"gguf": hash_of(gguf), "heads": hash_of(heads), "settings": how, "code": code}


def onnx_inputs(checkpoint: dict[str, str]) -> dict[str, object]:
    """Of an exported model; `checkpoint`: hashes of the checkpoint's files."""
    model = sorted(str(path.relative_to(EXPORT)) for path in (EXPORT / "model").glob("*.py"))
    versions = {name: _version(name) for name in ("torch", "onnx", "onnxscript")}
    return {"checkpoint": checkpoint, "code": _hashes(EXPORT, (*GRAPH_CODE, *model)), **versions}


def exported_inputs(part: str, checkpoint: dict[str, str], tensors: str) -> dict[str, object]:
    """Of one part's graph. `tensors`: hash of its constants, where they share a file with what is no constant of it."""
    file = {DECODER: "backbone", EMBEDDING: "backbone"}.get(part, part)
    kept = {name: digest for name, digest in checkpoint.items() if name in (f"{file}.safetensors", CONFIG)}
    return onnx_inputs(checkpoint) | {"checkpoint": kept, "part": part, "tensors": tensors}


def engine_inputs(recipe: Recipe, source: Manifest) -> dict[str, object]:
    """Of an engine; `source`: the manifest of its ONNX folder."""
    tools: dict[str, object]
    if recipe.target in MODULES:
        module = MODULES[recipe.target]
        code, tools = (
            _hashes(EXPORT, TENSORRT_CODE) | _hashes(ENGINE, BUILDER_CODE),
            {module: installed_version(module)},
        )
        if recipe.plans.mechanisms is Mechanisms.PLUGINS:
            kernels = sorted(str(path.relative_to(ENGINE)) for path in (ENGINE / "kernels").rglob("*.py"))
            code |= _hashes(EXPORT, ("plugin_flavour.py",)) | _hashes(ENGINE, kernels)
            tools["triton"] = _version("triton")
    else:
        code = _hashes(EXPORT, CPU_CODE) | _hashes(ENGINE, ("backends/onnxruntime_cpu.py",))
        runtime = next((found for name in ONNXRUNTIMES if (found := _version(name)) != MISSING), MISSING)
        tools = {"onnxruntime": runtime}
        if recipe.target is Target.ONNXRUNTIME_CPU:
            tools |= {"machine": platform.machine(), "processor": processor()}
    return {"onnx": source.files, "recipe": recipe.record(), "code": code, **tools}


def part_inputs(recipe: Recipe, source: Manifest, part: str) -> dict[str, object]:
    """Of a part's plan, or of its optimised graph: heads only where they are baked into it."""
    record = recipe.record()
    files = {name: digest for name, digest in source.files.items() if name in (f"{part}.onnx", f"{part}.onnx.data")}
    if part == DECODER and recipe.heads is Heads.BAKED:
        files[HEADS] = source.files[HEADS]
    files[CONFIG] = source.files[CONFIG]
    kept = {key: record[key] for key in _settings(recipe, part)}
    return engine_inputs(recipe, source) | {"onnx": files, "recipe": kept, "part": part}


def _settings(recipe: Recipe, part: str) -> tuple[str, ...]:
    """Fields of a recipe that decide a part's plan or graph."""
    if recipe.target in MODULES:
        return ("target", "precision", "block", "heads", "tensorrt")
    return ("target", "precision", "block", "fine", "fine_block", "wide", "heads") if part == DECODER else ("target",)


def processor() -> str:
    """The processor's model name: optimised graphs hold layouts that are right for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    return {name: file_hash(folder / name) for name in names}


def _version(package: str) -> str:
    """Of an installed package; it may be missing where nothing is to be built with it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return MISSING
