"""Stage ONNX folder to quantised decoder: NVIDIA's Model Optimizer, in an environment of its own, calibrated on real clips.

It inserts quantise and dequantise nodes around the linear layers (`graph.linears`: experts, gates, norms and attention
keep their type) with scales from the clips' prompts. int8 and fp8 quantise weights and activations, int4 weights alone.
"""

import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from safetensors.numpy import save_file

from mosear.artifacts import CONFIG, HEADS, Manifest, existing, publish
from mosear.config import ModelConfig
from mosear.contract import DECODER, Tensors, parts
from mosear.errors import EngineError
from mosear.hashes import file_hash
from mosear_export import export, fuse, pack, plain, tensorrt_graph
from mosear_export.precision import clips, graph, modelopt_child, run

KIND = "quantised"
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """What the Model Optimizer is asked for."""

    name: str
    mode: str
    method: str
    block: int = 0  # rows of a column that share a scale (int4)
    kept: tuple[str, ...] = ()  # kinds of linear layers that stay wide
    calls: int = 0  # so many of the calls, evenly taken (0: all)


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(name="int8-activations", mode="int8", method="max"),
        Scheme(name="fp8", mode="fp8", method="max"),
        # One clip of each kind: the search takes 64 rows of all calls together.
        Scheme(name="int4", mode="int4", method="awq_clip", block=128, calls=4),
        Scheme(name="int4-nearest", mode="int4", method="rtn_dq", block=128, calls=4),
    )
}


def optimise(
    scheme: Scheme, onnx_folder: Path, calls: Sequence[Tensors], root: Path, python: Path, report: Report
) -> Path:
    """Quantise a decoder, or find it below `root`; returns its folder. calls: inputs of prompts (`run.prompt_inputs`).

    Raises EngineError where the Optimizer's environment is not there, where it fails, or where it quantised anything but
    the linear layers.
    """
    if not python.exists():
        raise EngineError(f"{python} is not there: make the Model Optimizer's environment, scripts/setup_quantise.sh")
    source = Manifest.load(onnx_folder, kind=export.KIND, remedy="export it with `python export/export_onnx.py`")
    calls = even(calls, scheme.calls, ModelConfig.load(onnx_folder / CONFIG)) if scheme.calls else calls
    modules = (clips, graph, run, modelopt_child, fuse, pack, plain, tensorrt_graph)
    inputs: dict[str, object] = {
        "onnx": source.files, "scheme": asdict(scheme), "calls": _digest(calls),
        "code": {module.__name__: file_hash(Path(str(module.__file__))) for module in modules},
    }  # fmt: skip
    if found := existing(root, kind=KIND, name=scheme.name, inputs=inputs):
        report(f"quantise: {found} is fresh")
        return found
    with publish(root, kind=KIND, name=scheme.name, inputs=inputs) as draft:
        model, linears, heads = graph.whole_graph(onnx_folder)
        linears = [linear for linear in linears if linear.kind not in scheme.kept]
        save_file(heads, draft.folder / HEADS)
        with tempfile.TemporaryDirectory(dir=root, prefix=".work-") as aside:
            work = Path(aside)
            onnx.save_model(
                model, work / "plain.onnx", save_as_external_data=True, location="plain.data", size_threshold=1024
            )
            del model
            for i, call in enumerate(calls):
                np.savez(work / f"call-{i:04}.npz", **call)
            np.savez(work / "heads.npz", **heads)
            report(f"quantise: {scheme.name}: {len(linears)} linear layers, {len(calls)} calls")
            draft.notes |= _run(scheme, work, draft.folder / f"{DECODER}.onnx", [x.node for x in linears], python)
        widen_others(draft.folder / f"{DECODER}.onnx", [x.node for x in linears])
        draft.notes["linear layers"] = check(draft.folder / f"{DECODER}.onnx", [x.node for x in linears])
    report(f"quantise: wrote {(root / scheme.name).resolve()}")
    return (root / scheme.name).resolve()


def even(calls: Sequence[Tensors], count: int, config: ModelConfig) -> list[Tensors]:
    """So many calls, evenly taken, all of as many rows and cache slots as the longest: the Optimizer joins their activations
    along the batch. A padding row's activations are 0."""
    taken = [calls[i * len(calls) // count] for i in range(min(count, len(calls)))]
    axes = {spec.name: spec.axes for spec in parts(config)[DECODER].inputs}
    most = {
        axis: max(call[name].shape[axes[name].index(axis)] for call in taken)
        for axis, name in (("S", "position"), ("L", "key_group"))
    }

    def padded(name: str, value: NDArray[np.generic]) -> NDArray[np.generic]:
        sides = [(0, most.get(str(axis), size) - size) for axis, size in zip(axes[name], value.shape, strict=True)]
        return np.pad(value, sides, constant_values=-1 if name == "position" else 0)

    return [{name: padded(name, value) for name, value in call.items()} for call in taken]


def _digest(calls: Sequence[Tensors]) -> str:
    import hashlib

    found = hashlib.sha256()
    for call in calls:
        for name in ("hidden", "group", "strength"):
            found.update(np.ascontiguousarray(call[name]).tobytes())
    return found.hexdigest()


def _run(scheme: Scheme, work: Path, result: Path, nodes: Sequence[str], python: Path) -> dict[str, object]:
    """The child's record of itself."""
    job = {
        "graph": str(work / "plain.onnx"), "calls": str(work), "mode": scheme.mode, "method": scheme.method,
        "block": scheme.block, "nodes": list(nodes), "result": str(result.resolve()), "record": str(work / "record.json"),
    }  # fmt: skip
    (work / "job.json").write_text(json.dumps(job))
    script, log = Path(modelopt_child.__file__), work / "log"
    with log.open("w") as stream:
        code = subprocess.call([str(python), str(script), str(work / "job.json")], stdout=stream, stderr=stream)
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise EngineError(f"the Model Optimizer failed on {scheme.name} (exit {code}); its last lines:\n{tail}")
    record: dict[str, object] = json.loads((work / "record.json").read_text())
    return record


def widen_others(path: Path, nodes: Sequence[str]) -> None:
    """Let all but these nodes read what was there before it was quantised: experts share their input with a linear layer, and
    the Optimizer gives every reader of a tensor its quantised form."""
    model = onnx.load(path, load_external_data=False)
    makers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.name in nodes or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for at, name in enumerate(node.input):
            widened = makers.get(name)
            if widened is not None and widened.op_type == "DequantizeLinear":
                narrowed = makers.get(widened.input[0])
                if narrowed is not None and narrowed.op_type == "QuantizeLinear":
                    node.input[at] = narrowed.input[0]
    onnx.save_model(model, path)


def check(path: Path, nodes: Sequence[str]) -> int:
    """How many linear layers of a quantised graph have narrow weights; raises EngineError where others have, or one has not."""
    model = onnx.load(path, load_external_data=False)
    makers = {output: node for node in model.graph.node for output in node.output}

    def narrow(name: str) -> bool:
        return name in makers and makers[name].op_type == "DequantizeLinear"

    found = {node.name for node in model.graph.node if any(narrow(name) for name in node.input)}
    found -= {node.name for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    if wrong := sorted(found ^ set(nodes)):
        raise EngineError(f"the Model Optimizer was to quantise {len(nodes)} products, and differs in {wrong[:5]}")
    return len(found)
