"""`mosear doctor` and `mosear inspect`: what this environment has, and what a folder is."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import onnxruntime

from mosear.artifacts import MANIFEST
from mosear.backends.onnxruntime_cuda import check_provider
from mosear.backends.tensorrt_builder import MODULES
from mosear.backends.tensorrt_load import INSTALL, Device, first_device, installed_version, unusable
from mosear.engine import Engine
from mosear.errors import EngineError, MosearError
from mosear.recipe import CAPABILITIES, PLUGIN_CAPABILITIES, Provider, Target

SERVING = ("numpy", "onnxruntime", "av", "tokenizers", "safetensors", "pillow")
BUILDING = ("torch", "onnx", "onnxscript", "gguf")


def examine(engine: Path) -> Iterator[str]:
    """Lines about machine, packages and an engine; nothing is changed."""
    yield f"machine    {platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
    for title, names in (("answering", SERVING), ("building", BUILDING)):
        found = [f"{name} {_version(name)}" for name in names]
        yield f"{title:<11}{', '.join(found)}"
    yield f"providers  {', '.join(onnxruntime.get_available_providers())}; used: CPUExecutionProvider"
    yield from _targets()
    try:
        with Engine(engine) as loaded:
            recipe = loaded.recipe
            yield f"engine     {engine.resolve()}: {recipe.target}, {recipe.precision}, {recipe.used_threads} threads: whole"
    except MosearError as error:
        yield f"engine     {error}"


def _targets() -> Iterator[str]:
    """What each target can do here, and what to type next."""
    yield f"target     {Target.ONNXRUNTIME_CPU}: builds and runs here; python export/build_engine.py"
    yield f"target     {Target.ONNXRUNTIME_CUDA}: {_cuda()}"
    device = first_device()
    for target, recipe in ((Target.TENSORRT_RTX, "rtx-fp16"), (Target.TENSORRT, "trt-fp16")):
        module = MODULES[target]
        build = f"python export/build_engine.py --recipe export/recipes/{recipe}.toml"
        if why := unusable(module):
            yield f"target     {target}: cannot build here: {why}; {INSTALL[module]}"
        elif target is Target.TENSORRT and device.compute_capability is None:
            yield f"target     {target}: cannot build here: {device.reason}, and TensorRT builds on the GPU that runs the plan"
        else:
            yield f"target     {target}: {module} {installed_version(module)} {_builds(target, device)}; {build}"


def _builds(target: Target, device: Device) -> str:
    """For which chips, and whether this machine's GPU is one."""
    served = CAPABILITIES if target is Target.TENSORRT_RTX else PLUGIN_CAPABILITIES
    builds = f"builds here for {', '.join(served)}"
    if device.compute_capability is None:
        return f"{builds}, cannot run here: {device.reason}"
    if device.compute_capability not in served:
        return f"{builds}, cannot run here: this GPU is {device.compute_capability}"
    return f"{builds}, and runs on this GPU ({device.compute_capability})"


def _cuda() -> str:
    """Of ONNX Runtime on a GPU."""
    try:
        check_provider(Provider.CUDA)
    except EngineError as error:
        return f"cannot run here: {error}"
    return "runs here; python export/build_engine.py --recipe export/recipes/cuda-fp32.toml"


def examine_server(url: str) -> Iterator[str]:
    """Lines about the server at `url` (host:port of gRPC); raises ServingError where nobody answers."""
    from mosear.serving.client import Client

    with Client(url) as client:
        health = client.health()
    yield f"server     {url}: {'live' if health.live else 'not live'}, {'ready' if health.ready else 'not ready'}"
    for model in health.models:
        yield f"model      {model.name:<15}{model.version:<4}{model.state}{f': {model.reason}' if model.reason else ''}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def describe(folder: Path, *, as_json: bool) -> str:
    """The manifest of a checkpoint, ONNX or engine folder, for people or as JSON; raises EngineError where there is none."""
    try:
        text = (folder / MANIFEST).read_text()
        record = json.loads(text)
    except (OSError, ValueError) as error:
        raise EngineError(
            f"{folder} has no readable {MANIFEST} ({error}): name a checkpoint, ONNX or engine folder"
        ) from error
    if as_json:
        return text.rstrip()
    lines = [f"{record['kind']} {record['key'][:12]} (format {record['format']})"]
    lines += _plans(record["notes"])
    for title in ("inputs", "notes"):
        for name, value in sorted(record[title].items()):
            if name == "plans":
                continue
            shown = f"{len(value)} entries" if isinstance(value, dict) and len(value) > 12 else json.dumps(value)
            lines.append(f"  {title[:-1]:<6} {name}: {shown}")
    for name, digest in sorted(record["files"].items()):
        path = folder / name
        size = f"{path.stat().st_size:>12}" if path.exists() else "     missing"
        lines.append(f"  file   {size}  {digest[:12]}  {name}")
    return "\n".join(lines)


def _plans(notes: dict[str, object]) -> Iterator[str]:
    """Of a TensorRT engine, a line for each part and one for each of its profiles."""
    parts = notes.get("plans")
    for name, part in sorted(parts.items()) if isinstance(parts, dict) else ():
        report, worst = part["report"], max(part["parity"].values())
        yield (
            f"  plan   {name.removesuffix('.plan')}: {', '.join(part['compute_capabilities'])}; {report['bytes']:,} bytes, "
            f"built in {part['seconds']} s with {part['memory_mb']} MB, largest RMS error {worst:.1e}"
        )
        for index, profile in enumerate(report["profiles"]):
            layers = f", {profile['kernels_per_layer']} a layer" if profile["kernels_per_layer"] else ""
            weights = ", ".join(f"{kind} {size:,}" for kind, size in sorted(profile["weight_bytes"].items()))
            yield (
                f"           profile {index}: {profile['kernels']} kernels{layers}, {profile['fused_attentions']} fused "
                f"attentions, bytes of weights: {weights}"
            )
