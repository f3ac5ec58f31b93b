"""Stage ONNX folder to engine folder for TensorRT: a plan for each part, built once for all engines that it is right for.

Plans are folders of their own, `<root>/plans/<part>-<key>`, found again by content. An engine folder links to its plans'
files, so a changed expert (heads are inputs of the decoder) makes a new engine folder and builds no plan.
"""

import shutil
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors.numpy import load_file, save_file

from mosear.artifacts import CONFIG, HEADS, TOKENIZER, Draft, Manifest, existing, location, publish, share
from mosear.backends.tensorrt_backend import TensorRTBackend
from mosear.backends.tensorrt_builder import MODULES, PLAN, PLANS, TENSORRT, Built, Job, Plugins, build_plan, profile
from mosear.backends.tensorrt_load import first_device, installed_version
from mosear.config import ModelConfig
from mosear.contract import DECODER, Part, Tensors, parts
from mosear.engine import KIND, load_heads
from mosear.errors import EngineError
from mosear.hashes import HashOf, file_hash
from mosear.recipe import Mechanisms, Precision, Recipe, Target
from mosear_export import export, golden, tensorrt_graph
from mosear_export.golden_plans import check_on_gpu, cpu_session, export_session, last_row
from mosear_export.inputs import engine_inputs, part_inputs

Report = Callable[[str], None]
PLUGINS = "mosear.kernels.plugins.register"
LABEL_ROWS = 8  # rows of a prefill whose logits are wanted, at most
# Largest root mean square error of a part's golden outputs relative to theirs; inputs are words in random order, which 30
# layers amplify. Measured on the demo's decoder, its worst output (logits): fp16 0.013, bf16 0.06, int8 0.30, int4 0.52.
TOLERANCE = {
    Precision.FP16: 0.05, Precision.BF16: 0.3, Precision.INT8: 0.5, Precision.INT4: 0.8, Precision.FP8: 0.8,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One build: what is built, from what, to where. `root`: of the engines."""

    recipe: Recipe
    onnx_folder: Path
    source: Manifest
    config: ModelConfig
    root: Path
    report: Report
    hash_of: HashOf | None = None


def build_engine(
    recipe: Recipe, onnx_folder: Path, root: Path, report: Report, *, hash_of: HashOf | None = None
) -> Path:
    """Build an engine below `root`, or find it there (`hash_of`: as for `existing`).

    Raises EngineError as `build_plan` and `check_golden` do.
    """
    remedy = "export it again with `python export/export_onnx.py`"
    source = Manifest.load(onnx_folder, kind=export.KIND, remedy=remedy)
    inputs = engine_inputs(recipe, source)
    if found := existing(root, kind=KIND, name=recipe.name, inputs=inputs, hash_of=hash_of):
        report(f"engine: {found} is fresh")
        return found
    source.verify(onnx_folder, remedy=remedy, hash_of=hash_of or file_hash)
    config = ModelConfig.load(onnx_folder / CONFIG)
    stage = Stage(
        recipe=recipe, onnx_folder=onnx_folder, source=source, config=config, root=root, report=report, hash_of=hash_of
    )  # fmt: skip
    table, notes = parts(config), {}
    with publish(root, kind=KIND, name=recipe.name, inputs=inputs) as draft:
        for index, (name, part) in enumerate(table.items(), 1):
            report(f"engine: {name} ({index} of {len(table)})")
            folder, file = _plan_folder(stage, part), f"{name}.plan"
            share(folder / file, draft.folder / file)
            notes[file] = Manifest.load(folder, kind=PLAN, remedy="build again").notes
        for file in (CONFIG, TOKENIZER):
            shutil.copy(onnx_folder / file, draft.folder)
        _, heads = _prepared(recipe, onnx_folder, table[DECODER], config)
        if heads:
            save_file(heads, draft.folder / HEADS)
        chips = list(recipe.plans.compute_capabilities)
        if recipe.target is Target.TENSORRT:  # this is the GPU that will run it
            report("engine: golden outputs on this GPU")
            draft.notes["golden"] = _try(recipe, onnx_folder, draft.folder, config)
        draft.notes |= {"target": recipe.target, "compute_capabilities": chips, "plans": notes}
    report(f"engine: wrote {(root / recipe.name).resolve()}")
    return (root / recipe.name).resolve()


def _try(recipe: Recipe, onnx_folder: Path, folder: Path, config: ModelConfig) -> dict[str, float]:
    backend = TensorRTBackend(folder, config, module=MODULES[recipe.target], heads=load_heads(folder / HEADS))
    try:
        return check_on_gpu(backend, onnx_folder, config, limit=TOLERANCE[recipe.precision])
    finally:
        backend.close()


def _plan_folder(stage: Stage, part: Part) -> Path:
    recipe, onnx_folder, config = stage.recipe, stage.onnx_folder, stage.config
    inputs, folder = part_inputs(recipe, stage.source, part.name), stage.root / PLANS
    if found := existing(folder, kind=PLAN, name=part.name, inputs=inputs, hash_of=stage.hash_of):
        return found
    with publish(folder, kind=PLAN, name=part.name, inputs=inputs) as draft:
        draft.notes["parity"] = check_golden(recipe, onnx_folder, part, config)
        built = compile_part(recipe, onnx_folder, part, config, draft.folder / f"{part.name}.plan", stage.report)
        _describe(draft, built, recipe)
        stage.report(
            f"engine: {part.name}: {built.seconds:.1f} s, {built.memory_mb:.0f} MB, plan {built.plan.size:,} bytes"
        )
    return location(folder, name=part.name, inputs=inputs)


def _describe(draft: Draft, built: Built, recipe: Recipe) -> None:
    draft.notes |= {
        "module": MODULES[recipe.target], "version": built.version, "compute_capabilities": list(built.plan.chips),
        "seconds": round(built.seconds, 1), "memory_mb": round(built.memory_mb), "inputs": built.inputs,
        "outputs": built.outputs, "profiles": list(built.profiles), "report": built.plan.record(), "read_back": built.read_back,
    }  # fmt: skip
    wanted, found = set(recipe.plans.compute_capabilities), set(built.plan.chips)
    if wanted != found:
        raise EngineError(f"the plan is for {sorted(found)}, the recipe asked for {sorted(wanted)}: report this")


def compile_part(
    recipe: Recipe,
    onnx_folder: Path,
    part: Part,
    config: ModelConfig,
    plan: Path,
    report: Report,
    *,
    dropped: Collection[str] = (),
) -> Built:
    """Prepare a part's graph and build its plan; `dropped` outputs are left out, with all that serves them alone."""
    model, _ = _prepared(recipe, onnx_folder, part, config)
    tensorrt_graph.drop_outputs(model, dropped)
    settings = recipe.plans
    tensorrt_graph.fix_axis(model, "L", settings.capacity)
    shapes = tensorrt_graph.shapes(model)
    ranges = tuple(profile(part, shapes, sizes) for sizes in profiles(part, config, recipe))
    plan.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=plan.parent.parent, prefix=".graph-") as aside:
        path = Path(aside, f"{part.name}.onnx")
        onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
        del model
        job = Job(
            part=part.name, onnx=path, plan=plan, profiles=ranges if ranges[0] else (),
            compute_capabilities=settings.compute_capabilities, memory_mb=settings.builder_memory_mb,
            module=MODULES[recipe.target], **on_gpu(recipe, part, plan.parent.parent),
        )  # fmt: skip
        return build_plan(job, report)


def on_gpu(recipe: Recipe, part: Part, folder: Path) -> dict[str, Any]:  # Any: fields of a Job
    """What a build by TensorRT itself takes beside: the GPU that it runs on decides. Timings are kept in `folder`.

    Raises EngineError where this machine's GPU is not the recipe's.
    """
    if recipe.target is not Target.TENSORRT:
        return {}
    (wanted,), device = recipe.plans.compute_capabilities, first_device()
    if device.compute_capability != wanted:
        found = device.reason or f"this one is {device.compute_capability}"
        raise EngineError(
            f"{part.name}: recipe {recipe.name} is for a GPU of compute capability {wanted}, and TensorRT builds on the GPU "
            f"that runs the plan: {found}: build there, or name this machine's in tensorrt.compute_capabilities"
        )
    arch = int(wanted.replace(".", ""))
    with_plugins = part.name == DECODER and recipe.plans.mechanisms is Mechanisms.PLUGINS
    plugins = Plugins(module=PLUGINS, arch=arch, multiprocessors=device.multiprocessors) if with_plugins else None
    timings = folder / f"timings-sm{arch}-{installed_version(TENSORRT)}.cache"
    return {"plugins": plugins, "compatibility": recipe.plans.compatibility, "timing_cache": timings}


def profiles(part: Part, config: ModelConfig, recipe: Recipe) -> list[dict[str, tuple[int, int, int]]]:
    """Smallest, usual and largest size of each dynamic axis: of the decoder for a prefill, then for a decoded token."""
    plans, frames = recipe.plans, config.face.frames
    rows = (1, max(1, plans.prefill_rows // 2), plans.prefill_rows)
    if part.name == DECODER:
        batch = (1, plans.prefill_batch, plans.prefill_batch)
        prefill = {"B": batch, "S": rows, "Q": (1, 1, min(LABEL_ROWS, plans.prefill_rows))}
        return [prefill, {"B": (1, plans.decode_batch, plans.decode_batch), "S": (1, 1, 1), "Q": (1, 1, 1)}]
    longest = 2 * config.voice.max_frames
    return [{
        "B": (1, 1, plans.decode_batch), "S": rows, "T": (4, longest // 2, longest), "N": (1, frames, frames),
    }]  # fmt: skip


def _prepared(
    recipe: Recipe, onnx_folder: Path, part: Part, config: ModelConfig, *, emulate: bool = False
) -> tuple[onnx.ModelProto, Tensors]:
    model = onnx.load(onnx_folder / f"{part.name}.onnx")
    if part.name != DECODER:
        return tensorrt_graph.prepare_part(model, recipe, emulate=emulate), {}
    heads = load_heads(onnx_folder / HEADS)
    with_plugins = recipe.plans.mechanisms is Mechanisms.PLUGINS
    prepare = tensorrt_graph.prepare_plugin_decoder if with_plugins else tensorrt_graph.prepare_decoder
    return prepare(model, config, recipe, heads, part, emulate=emulate)


def check_golden(recipe: Recipe, onnx_folder: Path, part: Part, config: ModelConfig) -> dict[str, float]:
    """RMS error of each output of the prepared graph, its 16 bits emulated, relative to the reference's.

    Raises EngineError above the tolerance. The decoder's reference is the exported graph on the golden inputs with the
    last row alone reallocated, as a plan does.
    """
    stored = load_file(onnx_folder / export.GOLDEN / f"{part.name}.safetensors")
    feeds = {key[3:]: value for key, value in stored.items() if key.startswith("in.")}
    wanted = {key[4:]: value for key, value in stored.items() if key.startswith("out.")}
    model, heads = _prepared(recipe, onnx_folder, part, config, emulate=True)
    with tempfile.TemporaryDirectory() as aside:
        if part.name == DECODER:
            feeds["first_row"] = (feeds["key_length"].astype(int) - 1).astype(np.int32)
            names = ["logits", "mass_before", "mass_after"]
            reference = export_session(onnx_folder)
            values = reference.run(names, feeds | load_heads(onnx_folder / HEADS))
            del reference
            cache = part.state[0][1]  # one for all layers' caches
            wanted = dict(zip(names, values, strict=True)) | {cache: wanted[cache]}
            wanted |= {name: last_row(wanted[name], feeds) for name in names[1:]}
            heads = {n: tensorrt_graph.stored_head(v, n, recipe).astype(np.float32) for n, v in heads.items()}
        path = Path(aside, "part.onnx")
        onnx.save_model(model, path, save_as_external_data=True, location="data", size_threshold=1024)
        session = cpu_session(path)
        given = {value.name: (feeds | heads)[value.name] for value in session.get_inputs()}
        found = dict(zip(wanted, session.run(list(wanted), given), strict=True))
    errors = {name: golden.relative_errors(found[name], value)[1] for name, value in wanted.items()}
    worst, limit = max(errors, key=lambda name: errors[name]), TOLERANCE[recipe.precision]
    if not errors[worst] <= limit:
        raise EngineError(
            f"{part.name}.{worst} in {recipe.precision} differs by {errors[worst]:.2e} RMS (limit {limit})"
        )
    return errors
