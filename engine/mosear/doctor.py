"""`mosear doctor` and `mosear inspect`: what this environment has, and what a folder is."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import onnxruntime

from mosear.artifacts import MANIFEST
from mosear.engine import Engine
from mosear.errors import EngineError, MosearError

SERVING = ("numpy", "onnxruntime", "av", "tokenizers", "safetensors", "pillow")
BUILDING = ("torch", "onnx", "onnxscript", "gguf")


def examine(engine: Path) -> Iterator[str]:
    """Lines about machine, packages and an engine; nothing is changed."""
    yield f"machine    {platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
    for title, names in (("answering", SERVING), ("building", BUILDING)):
        found = [f"{name} {_version(name)}" for name in names]
        yield f"{title:<11}{', '.join(found)}"
    yield f"providers  {', '.join(onnxruntime.get_available_providers())}; used: CPUExecutionProvider"
    try:
        with Engine(engine) as loaded:
            recipe = loaded.recipe
            yield f"engine     {engine.resolve()}: {recipe.target}, {recipe.precision}, {recipe.used_threads} threads: whole"
    except MosearError as error:
        yield f"engine     {error}"


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
    for title in ("inputs", "notes"):
        for name, value in sorted(record[title].items()):
            shown = f"{len(value)} entries" if isinstance(value, dict) and len(value) > 12 else json.dumps(value)
            lines.append(f"  {title[:-1]:<6} {name}: {shown}")
    for name, digest in sorted(record["files"].items()):
        path = folder / name
        size = f"{path.stat().st_size:>12}" if path.exists() else "     missing"
        lines.append(f"  file   {size}  {digest[:12]}  {name}")
    return "\n".join(lines)
