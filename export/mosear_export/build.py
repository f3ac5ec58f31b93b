"""Stage ONNX folder to engine folder, for ONNX Runtime.

Optimised graphs are folders of their own, `<root>/graphs/<part>-<key>`, found again by content. An engine folder links to
their files, so a changed expert (heads are inputs of the decoder) makes a new engine folder and optimises no graph.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from mosear.artifacts import CONFIG, HEADS, TOKENIZER, Draft, Manifest, existing, location, publish, share
from mosear.backends.onnxruntime_cpu import OnnxRuntimeBackend, optimise
from mosear.config import ModelConfig
from mosear.contract import DECODER, Tensors, parts
from mosear.engine import KIND, load_heads
from mosear.errors import EngineError
from mosear.hashes import HashOf, file_hash
from mosear.recipe import Heads, Precision, Recipe, Target
from mosear_export import export, fuse, golden, pack, quantise
from mosear_export.inputs import GRAPH, GRAPHS, engine_inputs, part_inputs
from mosear_export.precision import short
from mosear_export.precision.graph import linear_weights

Report = Callable[[str], None]
# Largest root mean square error of a part's golden outputs, relative to theirs. Golden inputs are words in random order,
# which 30 layers amplify more than real prompts do: measured on the demo 3e-5 in fp32, 0.33 in int8.
GOLDEN_TOLERANCE = {Precision.FP32: 2e-4, Precision.INT8: 0.5}


def build_engine(
    recipe: Recipe, onnx_folder: Path, root: Path, report: Report, *, hash_of: HashOf | None = None
) -> Path:
    """Build an engine below `root`, or find it there; returns its folder.

    hash_of: as for `existing`.
    Raises EngineError where the ONNX folder was altered, or an engine's golden outputs are not the reference's.
    """
    remedy = "export it again with `python export/export_onnx.py`"
    source = Manifest.load(onnx_folder, kind=export.KIND, remedy=remedy)
    inputs = engine_inputs(recipe, source)
    if found := existing(root, kind=KIND, name=recipe.name, inputs=inputs, hash_of=hash_of):
        report(f"engine: {found} is fresh")
        return found
    source.verify(onnx_folder, remedy=remedy, hash_of=hash_of or file_hash)
    with publish(root, kind=KIND, name=recipe.name, inputs=inputs) as draft:
        _link_graphs(recipe, onnx_folder, draft, report, hash_of or file_hash)
        draft.notes["golden"] = check_golden(recipe, onnx_folder, draft.folder, report)
        draft.notes["parity"] = short_parity(recipe, onnx_folder, draft.folder)
    report(f"engine: wrote {(root / recipe.name).resolve()}")
    return (root / recipe.name).resolve()


def _link_graphs(recipe: Recipe, onnx_folder: Path, draft: Draft, report: Report, hash_of: HashOf) -> None:
    """Fill an engine folder: its graphs, made where they are not there yet, and what is no graph."""
    for file in (CONFIG, TOKENIZER):
        shutil.copy(onnx_folder / file, draft.folder)
    config = ModelConfig.load(onnx_folder / CONFIG)
    source, table, root = (
        Manifest.load(onnx_folder, kind=export.KIND, remedy=""),
        parts(config),
        draft.folder.parent / GRAPHS,
    )
    for index, name in enumerate(table, 1):
        inputs = part_inputs(recipe, source, name)
        folder = existing(root, kind=GRAPH, name=name, inputs=inputs, hash_of=hash_of)
        report(f"engine: {name} ({index} of {len(table)}){' is there' if folder else ''}")
        if folder is None:
            with publish(root, kind=GRAPH, name=name, inputs=inputs) as made:
                _compile(recipe, onnx_folder, name, config, made)
            folder = location(root, name=name, inputs=inputs)
        manifest = Manifest.load(folder, kind=GRAPH, remedy="build again")
        for file in manifest.files:
            share(folder / file, draft.folder / file)
        draft.notes |= manifest.notes
    if recipe.heads is Heads.INPUTS:
        _, heads, _ = packed_decoder(_exported(onnx_folder), config, recipe, load_heads(onnx_folder / HEADS))
        save_file(heads, draft.folder / HEADS)


def _compile(recipe: Recipe, onnx_folder: Path, part: str, config: ModelConfig, draft: Draft) -> None:
    source = onnx_folder / f"{part}.onnx"
    if part != DECODER:
        _finish(recipe, source, draft.folder / source.name)
        return
    model, _ = prepare_decoder(_exported(onnx_folder), config, recipe, load_heads(onnx_folder / HEADS))
    draft.notes["int8_matrices"] = sum(node.op_type == "MatMulNBits" for node in model.graph.node)
    with tempfile.TemporaryDirectory(dir=draft.folder.parent, prefix=".build-") as aside:
        path = Path(aside, source.name)
        onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
        _finish(recipe, path, draft.folder / source.name)


def _exported(onnx_folder: Path) -> onnx.ModelProto:
    return onnx.load(onnx_folder / f"{DECODER}.onnx")


def _finish(recipe: Recipe, source: Path, target: Path) -> None:
    """Optimised for this machine's processor; for a GPU as it is, to be optimised where it is loaded."""
    if recipe.target is Target.ONNXRUNTIME_CPU:
        optimise(source, target)
        return
    for file in (source, source.with_name(f"{source.name}.data")):
        if file.exists():
            shutil.copyfile(file, target.with_name(file.name))


def prepare_decoder(
    model: onnx.ModelProto, config: ModelConfig, recipe: Recipe, heads: Tensors
) -> tuple[onnx.ModelProto, Tensors]:
    """The decoder's graph as a recipe wants it, weights in its precision, and what its head inputs take."""
    model, heads, weights = packed_decoder(model, config, recipe, heads)
    if recipe.precision is Precision.INT8:
        model = quantise.quantise_linears(model, weights, recipe)
    return model, heads


def packed_decoder(
    model: onnx.ModelProto, config: ModelConfig, recipe: Recipe, heads: Tensors
) -> tuple[onnx.ModelProto, Tensors, list[str]]:
    """The decoder's graph with calls fused, in fp32; what its head inputs take; the weights of its linear layers."""
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
    return model, heads, weights


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
