"""What each `mosear` command does with its options (mosear.cli). What needs torch or onnx is imported inside the command."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mosear.errors import ConfigError, MosearError
from mosear.runtime.prompt import Task
from mosear.runtime.request import Request
from mosear.runtime.sampling import Sampling

if TYPE_CHECKING:
    from mosear.recipe import Recipe
    from mosear.serving.server import ServerOptions

BUILD = Path("build")
DEMO_CLIP = BUILD / "demo.mp4"
BENCHMARKS = ("latency", "throughput", "accuracy")  # the first where none is named
SERVED_AT_ONCE = {
    "slots": "sequences in the decoder at once", "queue": "requests that may wait for a slot",
    "prefill_rows": "prompt rows read between two decode steps", "workers": "clips under way at once",
}  # fmt: skip


def _say(line: str) -> None:
    print(line, flush=True)


def fetch_demo(options: argparse.Namespace) -> None:
    from mosear_export.demo.clip import make_clip
    from mosear_export.demo.fetch import default_cache, fetch

    files = fetch(options.cache or default_cache(), _say)
    DEMO_CLIP.parent.mkdir(parents=True, exist_ok=True)
    clip = make_clip(files, DEMO_CLIP)
    _say(f"clip: {DEMO_CLIP}: {clip.caption}")


def export(options: argparse.Namespace) -> None:
    if options.what == "kernels":
        from mosear_export.kernels import export_kernels, parse_archs

        if options.checkpoint:
            raise ConfigError("--checkpoint goes with `export onnx`: kernels do not depend on a checkpoint")
        export_kernels(parse_archs(options.arch), options.out / "kernels", _say)
        return
    from mosear_export import chain

    if options.arch is not None:
        raise ConfigError("--arch goes with `export kernels`: an ONNX file is the same for every GPU")
    with chain.hashes(options.out, verify=options.verify) as hash_of:
        chain.export(options.out, options.checkpoint, _say, hash_of=hash_of)


def build(options: argparse.Namespace) -> int:
    from mosear.recipe import Recipe

    recipe = Recipe.load(options.recipe)
    if options.dry_run:
        return _preflight(recipe, options.out / "onnx" / "onnx")
    from mosear_export import chain
    from mosear_export.inputs import DEMO_HEADS

    with chain.hashes(options.out, verify=options.verify) as hash_of:
        heads = options.heads or DEMO_HEADS
        chain.build(recipe, options.out, options.checkpoint, _say, hash_of=hash_of, heads=heads)
    return 0


def _preflight(recipe: "Recipe", onnx_folder: Path) -> int:
    from mosear_export.preflight import preflight

    if not onnx_folder.exists():
        raise ConfigError(f"{onnx_folder} is not there: export a checkpoint first, python export/export_onnx.py")
    findings = preflight(recipe, onnx_folder)
    for finding in findings:
        _say(str(finding))
    stops = sum(finding.stops for finding in findings)
    _say(f"{recipe.name}: {f'{stops} findings stop this build' if stops else 'nothing stops this build'}")
    return int(stops > 0)


def explain(options: argparse.Namespace) -> None:
    from mosear_export.explain import explain

    for line in explain(options.folder, options.onnx, options.recipe):
        _say(line)


def train_heads(options: argparse.Namespace) -> None:
    from mosear_export.inputs import DEMO_HEADS
    from mosear_export.training.run import settings, train_heads

    config = settings(options.config, options.set)
    train_heads(options.data, options.work, options.output or DEMO_HEADS, config, _say)


def parity(options: argparse.Namespace) -> None:
    import json

    from mosear_export.demo.fetch import default_cache, fetch
    from mosear_export.parity import measure

    files = fetch(default_cache(), _say)
    result = json.dumps(measure(options.engine, options.checkpoint, files, _say, count=options.prompts), indent=2)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(result + "\n")
    _say(result)


def repo(options: argparse.Namespace) -> None:
    from mosear.serving.configs import Device, Settings
    from mosear.serving.repository import assemble

    asked = {name: value for name in SERVED_AT_ONCE if (value := getattr(options, name)) is not None}
    onnx_folder = options.onnx if options.onnx.exists() else None
    made = assemble(
        options.engine, options.out, target=Device(options.target), onnx_folder=onnx_folder, say=_say,
        settings=Settings(**asked),
    )  # fmt: skip
    if options.check:
        from mosear.serving.check import check_plans

        check_plans(made, _say)


def _server_options(options: argparse.Namespace) -> "ServerOptions":
    from mosear.serving.server import ServerOptions

    names = [field.name for field in dataclasses.fields(ServerOptions)]
    return ServerOptions(**{name: getattr(options, name) for name in names if hasattr(options, name)})


def serve(options: argparse.Namespace) -> None:
    from mosear.serving.server import serve

    serve(_server_options(options), _say)


def demo(options: argparse.Namespace) -> None:
    from mosear.ask import ask_server, read_file
    from mosear.serving.server import Server

    clip, settings = read_file(options.clip), _server_options(options)
    _say(f"server: starting on {settings.repository}")
    with Server(settings) as server:
        url = f"{settings.address}:{settings.grpc_port}"
        _say(f"server: ready at {url}: {', '.join(server.models)}")
        for task in (Task.REASON, Task.CONFLICT):
            _say(f"\n{task}: {options.clip} over gRPC")
            ask_server(url, Request(task=task, video=clip), as_json=False)
        _say("\nserver: stopping")
    _say("server: stopped")


def ask(options: argparse.Namespace) -> None:
    from mosear.ask import ask_local, ask_server, read_file

    request = Request(
        task=options.task,
        video=read_file(options.clip),
        audio=read_file(options.audio),
        words=options.words,
        max_tokens=options.max_tokens,
        strength=options.ar_strength,
        sampling=Sampling(temperature=options.temperature, top_p=options.top_p, seed=options.seed),
        deadline_ms=None if options.deadline is None else round(options.deadline * 1e3),
    )
    if options.local:
        ask_local(options.engine, request, as_json=options.json)
    else:
        ask_server(options.url, request, as_json=options.json)


def bench(options: argparse.Namespace) -> int:
    import subprocess

    named = options.rest[:1] if options.rest[:1] and options.rest[0] in BENCHMARKS else []
    script = Path("benchmarks", f"{(named or BENCHMARKS)[0]}.py")
    if not script.exists():
        raise MosearError(f"{script} is not here: run `mosear bench` in a source checkout")
    return subprocess.call([sys.executable, str(script), *options.rest[len(named) :]])


def doctor(options: argparse.Namespace) -> None:
    from mosear.doctor import examine, examine_server

    for line in examine_server(options.url) if options.url else examine(options.engine):
        _say(line)


def inspect(options: argparse.Namespace) -> None:
    from mosear.doctor import describe

    _say(describe(options.folder, as_json=options.json))
