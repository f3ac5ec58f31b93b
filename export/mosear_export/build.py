"""Stage ONNX folder to engine folder, for the target of a recipe."""

import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from mosear.artifacts import Draft, Manifest, existing, file_hash, publish
from mosear.backends import onnxruntime_cpu
from mosear.backends.onnxruntime_cpu import OnnxRuntimeBackend, optimise
from mosear.config import ModelConfig
from mosear.contract import DECODER, Tensors, parts
from mosear.engine import CONFIG, HEADS, KIND, TOKENIZER, load_heads
from mosear.errors import EngineError
from mosear.recipe import Heads, Precision, Recipe
from mosear_export import export, fuse, golden, pack, plain, quantise
from mosear_export.precision import graph, short
from mosear_export.precision.graph import linear_weights

Report = Callable[[str], None]
# Largest root mean square error of a part's golden outputs, relative to theirs. Golden inputs are words in random order,
# which 30 layers amplify more than real prompts do: measured on the demo 3e-5 in fp32, 0.33 in int8.
GOLDEN_TOLERANCE = {Precision.FP32: 2e-4, Precision.INT8: 0.5}


def inputs_of(recipe: Recipe, source: Manifest) -> dict[str, object]:
    """All that decides what an engine is."""
    return {
        "onnx": source.files,
        "recipe": recipe.record(),
        "code": {
            module.__name__: file_hash(Path(str(module.__file__)))
            for module in (fuse, graph, pack, plain, quantise, onnxruntime_cpu)
        },
        "onnxruntime": onnxruntime.__version__,
        "machine": platform.machine(),
        "processor": processor(),
    }


def build_engine(recipe: Recipe, onnx_folder: Path, root: Path, report: Report) -> Path:
    """Build an engine below `root`, or find it there; returns its folder.

    Raises EngineError where the ONNX folder was altered, or an engine's golden outputs are not the reference's.
    """
    remedy = "export it again with `python export/export_onnx.py`"
    source = Manifest.load(onnx_folder, kind=export.KIND, remedy=remedy)
    inputs = inputs_of(recipe, source)
    if found := existing(root, kind=KIND, name=recipe.name, inputs=inputs):
        report(f"engine: {found} is fresh")
        return found
    source.verify(onnx_folder, remedy=remedy)
    with publish(root, kind=KIND, name=recipe.name, inputs=inputs) as draft:
        _compile(recipe, onnx_folder, draft, report)
        draft.notes["golden"] = check_golden(recipe, onnx_folder, draft.folder, report)
        draft.notes["parity"] = short_parity(recipe, onnx_folder, draft.folder)
    report(f"engine: wrote {(root / recipe.name).resolve()}")
    return (root / recipe.name).resolve()


def _compile(recipe: Recipe, onnx_folder: Path, draft: Draft, report: Report) -> None:
    shutil.copy(onnx_folder / CONFIG, draft.folder)
    shutil.copy(onnx_folder / TOKENIZER, draft.folder)
    config = ModelConfig.load(onnx_folder / CONFIG)
    table = parts(config)
    for index, name in enumerate(table, 1):
        report(f"engine: {name} ({index} of {len(table)})")
        source = onnx_folder / f"{name}.onnx"
        if name != DECODER:
            optimise(source, draft.folder / source.name)
            continue
        model, heads = prepare_decoder(onnx.load(source), config, recipe, load_heads(onnx_folder / HEADS))
        if heads:
            save_file(heads, draft.folder / HEADS)
        draft.notes["int8_matrices"] = sum(node.op_type == "MatMulNBits" for node in model.graph.node)
        with tempfile.TemporaryDirectory(dir=draft.folder.parent, prefix=".build-") as aside:
            path = Path(aside, source.name)
            onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
            optimise(path, draft.folder / source.name)


def prepare_decoder(
    model: onnx.ModelProto, config: ModelConfig, recipe: Recipe, heads: Tensors
) -> tuple[onnx.ModelProto, Tensors]:
    """The decoder's graph as a recipe wants it, calls fused and weights in its precision, and what its head inputs take."""
    fuse.merge_linears(model)
    weights = linear_weights(model)
    fuse.skip_norms(model)
    heads = pack.pack(model, config, heads)
    fuse.split_heads(model, config.backbone.head_size)
    if recipe.heads is Heads.BAKED:
        kept = [value for value in model.graph.input if value.name not in heads]
        del model.graph.input[:]
        model.graph.input.extend(kept)
        model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in heads.items())
        heads = {}
    if recipe.precision is Precision.INT8:
        model = quantise.quantise_linears(model, weights, recipe)
    return model, heads


def check_golden(recipe: Recipe, onnx_folder: Path, folder: Path, report: Report) -> dict[str, float]:
    """RMS error of each part's outputs, relative to the reference's; raises EngineError above the tolerance."""
    report("engine: golden outputs")
    config = ModelConfig.load(folder / CONFIG)
    backend = OnnxRuntimeBackend(folder, config, heads=load_heads(folder / HEADS), threads=recipe.used_threads)
    errors: dict[str, float] = {}
    for name in parts(config):
        stored = load_file(onnx_folder / export.GOLDEN / f"{name}.safetensors")
        found = _run(backend, name, {key[3:]: value for key, value in stored.items() if key.startswith("in.")})
        for key, value in stored.items():
            if key.startswith("out.") and key[4:] in found:
                errors[f"{name}.{key[4:]}"] = golden.relative_errors(np.asarray(found[key[4:]]), value)[1]
    worst = max(errors, key=lambda key: errors[key])
    limit = GOLDEN_TOLERANCE[recipe.precision]
    if not errors[worst] <= limit:
        raise EngineError(
            f"{worst} of the engine differs from the reference by {errors[worst]:.2e} RMS (limit {limit})"
        )
    return errors


def short_parity(recipe: Recipe, onnx_folder: Path, folder: Path) -> dict[str, float]:
    """The short form of parity; raises EngineError where half of the prompts are further off than golden outputs may be."""
    config, limit = ModelConfig.load(folder / CONFIG), GOLDEN_TOLERANCE[recipe.precision]
    backend = OnnxRuntimeBackend(folder, config, heads=load_heads(folder / HEADS), threads=recipe.used_threads)
    found = short.measure(backend, onnx_folder)
    if not found["rms of logits, median"] <= limit:
        raise EngineError(
            f"the engine's answers to the golden prompts are not the reference's (limit {limit}): {found}"
        )
    return found


def _run(backend: OnnxRuntimeBackend, part: str, inputs: Tensors) -> Tensors:
    if part != DECODER:
        return backend.run(part, inputs)
    batch, capacity = inputs["key_group"].shape
    state = backend.start(batch=batch, capacity=capacity)
    for name, cache in state.cache.items():
        np.copyto(cache, inputs.pop(name))
    return state.step(inputs)


def processor() -> str:
    """The processor's model name: optimised graphs hold layouts that are right for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
