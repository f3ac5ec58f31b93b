"""Stage engine folder to Triton model repository: whole, self-contained, published in one step.

Weights are hard links to the engine's files where the filesystem allows it, copies elsewhere.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from mosear.artifacts import CONFIG, MANIFEST, ONNX, TOKENIZER, Manifest, existing, publish, share
from mosear.contract import DECODER, ENCODERS, Tensors, served
from mosear.engine import REMEDY, EngineFolder
from mosear.errors import ServingError
from mosear.recipe import ON_TENSORRT
from mosear.serving.configs import (
    ENGINE,
    PLAN_FILE,
    PLAN_NOTES,
    Device,
    Settings,
    config_text,
    model_configs,
    sample_file,
)

Report = Callable[[str], None]
KIND = "repository"
GOLDEN = "golden"  # folder of what `mosear export onnx` writes
ONNX_REMEDY = "export it again with `python export/export_onnx.py`"
VERSION = "1"
MODEL_PY = '''"""The model is `mosear.serving.models.{module}`."""

from mosear.serving.models.{module} import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def assemble(
    engine_folder: Path,
    root: Path,
    *,
    target: Device,
    onnx_folder: Path | None,
    say: Report,
    settings: Settings | None = None,
) -> Path:
    """Make a model repository below `root`, or find it there; returns its folder.

    `onnx_folder`: what the engine was built from. Its golden inputs warm the encoders up; for `gpu` its graphs are served,
    as the engine's are optimised for this machine's processor.
    Raises EngineError where engine or ONNX folder was altered, ServingError where the repository cannot be written.
    """
    engine = EngineFolder(engine_folder)
    if engine.recipe.target in ON_TENSORRT and target is not Device.GPU:
        raise ServingError(f"{engine_folder} is an engine of {engine.recipe.target}, which a GPU runs: --target gpu")
    source = _source(engine, onnx_folder, target)
    if source is None:
        say("repository: no ONNX folder was named, so the encoders are not warmed up")
    content = _content(engine, source, target, settings or Settings())
    name = f"{engine.recipe.name}-on-{target}"
    inputs: dict[str, object] = {
        "engine": engine.manifest.key,
        "links": {path: file.digest for path, file in content.links.items()},
        "files": {path: hashlib.sha256(data).hexdigest() for path, data in content.files.items()},
    }
    try:
        if found := existing(root, kind=KIND, name=name, inputs=inputs):
            say(f"repository: {found} is fresh")
            return found
        engine.manifest.verify(engine_folder, remedy=REMEDY)
        with publish(root, kind=KIND, name=name, inputs=inputs) as draft:
            _write(content, draft.folder)
    except OSError as error:
        raise ServingError(
            f"the model repository cannot be written to {root} ({error.strerror or error}): "
            "free some space there, or name another folder"
        ) from error
    say(f"repository: wrote {(root / name).resolve()}")
    return (root / name).resolve()


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An ONNX folder's files that a repository needs, checked, and a golden sample of each encoder."""

    folder: Path
    files: Mapping[str, str]
    samples: Mapping[str, Tensors]


@dataclass(frozen=True, slots=True, kw_only=True)
class Linked:
    """A file that is there already."""

    path: Path
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """All of a repository by relative path: files that are there already, and files to write."""

    links: Mapping[str, Linked]
    files: Mapping[str, bytes]


def _source(engine: EngineFolder, folder: Path | None, target: Device) -> Source | None:
    if folder is None:
        if target is Device.GPU and engine.recipe.target not in ON_TENSORRT:
            raise ServingError(
                "target gpu serves the exported graphs: name the ONNX folder that the engine was built from"
            )
        return None
    manifest = Manifest.load(folder, kind=ONNX, remedy=ONNX_REMEDY)
    if manifest.files != engine.manifest.inputs["onnx"]:
        raise ServingError(
            f"{engine.folder} was not built from {folder}: name the right one, or build the engine again"
        )
    wanted = {f"{GOLDEN}/{name}.safetensors" for name in ENCODERS}
    files = {path: digest for path, digest in manifest.files.items() if path in wanted or _owner(path) in ENCODERS}
    dataclasses.replace(manifest, files=files).verify(folder, remedy=ONNX_REMEDY)
    samples = {name: _sample(folder / GOLDEN / f"{name}.safetensors") for name in ENCODERS}
    return Source(folder=folder, files=files, samples=samples)


def _owner(path: str) -> str:
    """The part that a graph or its weights belong to: `voice` of `voice.onnx.data`."""
    return path.partition(".")[0]


def _sample(path: Path) -> Tensors:
    """The first sample of a part's golden inputs."""
    return {key[3:]: np.asarray(value[0]) for key, value in load_file(path).items() if key.startswith("in.")}


def _content(engine: EngineFolder, source: Source | None, target: Device, settings: Settings) -> Content:
    folder, known = engine.folder, engine.manifest.files
    samples = source.samples if source else {}
    warm = {part: {name: value.shape for name, value in sample.items()} for part, sample in samples.items()}
    models = model_configs(engine.config, engine.recipe, device=target, settings=settings, warm=warm)
    files = {f"{name}/config.pbtxt": config_text(model, target).encode() for name, model in models.items()}
    manifest = (folder / MANIFEST).read_bytes()
    links = {}
    for name in served(engine.config):
        files |= {
            f"{name}/{VERSION}/model.py": MODEL_PY.format(module=name.removesuffix("_unary")).encode(),
            f"{name}/{VERSION}/{ENGINE}/{MANIFEST}": manifest,
        }
        for path in known if name == DECODER else (CONFIG, TOKENIZER):
            links[f"{name}/{VERSION}/{ENGINE}/{path}"] = Linked(path=folder / path, digest=known[path])
    planned = engine.recipe.target in ON_TENSORRT
    graphs = (source.folder, source.files) if source and target is Device.GPU and not planned else (folder, known)
    for path, digest in graphs[1].items():
        if (name := _owner(path)) in ENCODERS:
            # A graph names the file of its weights, so that one keeps its name.
            kept = {f"{name}.onnx": "model.onnx", f"{name}.plan": PLAN_FILE}.get(path, path)
            links[f"{name}/{VERSION}/{kept}"] = Linked(path=graphs[0] / path, digest=digest)
    if planned:
        files |= {f"{name}/{VERSION}/{PLAN_NOTES}": _notes(engine, f"{name}.plan") for name in ENCODERS}
    for part, sample in samples.items():
        files |= {f"{part}/warmup/{sample_file(name)}": value.tobytes() for name, value in sample.items()}
    return Content(links=links, files=files)


def _notes(engine: EngineFolder, file: str) -> bytes:
    """What the manifest says of a plan, for the backend that serves it apart from its engine's folder."""
    plans = engine.manifest.notes["plans"]
    assert isinstance(plans, dict), "an engine of plans describes them"
    return json.dumps(plans[file], indent=2, sort_keys=True).encode()


def _write(content: Content, folder: Path) -> None:
    for path, data in content.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    for path, file in content.links.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        share(file.path, folder / path)
