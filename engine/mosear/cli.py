"""The one command line, `mosear`. What needs torch or onnx is imported inside the subcommand that needs it."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
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
RECIPE = Path("export/recipes/cpu-fp32.toml")
ENGINE = BUILD / "engines" / "cpu-fp32"
DEMO_CLIP = BUILD / "demo.mp4"
REPOSITORY = BUILD / "repositories" / "cpu-fp32-on-cpu"
URL = "127.0.0.1:8001"
BENCHMARKS = ("latency", "throughput", "accuracy")  # the first where none is named
SERVED_AT_ONCE = {
    "slots": "sequences in the decoder at once", "queue": "requests that may wait for a slot",
    "prefill_rows": "prompt rows read between two decode steps", "workers": "clips under way at once",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; errors that the user can mend are printed in one line, and the status is 1."""
    options = parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except MosearError as error:
        print(f"mosear: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mosear", description="Deployment engine for MoSEAR models")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    fetch = _command(commands, "fetch-demo", _fetch, "bring the demo's parts into the cache and make its clip")
    fetch.add_argument("--cache", type=Path, help="cache folder (default: ~/.cache/mosear)")
    export = _command(commands, "export", _export, "export a checkpoint to ONNX, or the kernels to binaries")
    export.add_argument("what", choices=["onnx", "kernels"])
    export.add_argument("--checkpoint", type=Path, help="onnx: checkpoint folder (default: the demo's, assembled)")
    export.add_argument("--arch", help="kernels: architectures, such as 80,90 (default: all that are served)")
    export.add_argument("--out", type=Path, default=BUILD, help="where onnx/ or kernels/ lies (default: %(default)s)")
    build = _command(commands, "build", _build, "build an engine from a recipe")
    build.add_argument("--recipe", type=Path, default=RECIPE, help="default: %(default)s")
    build.add_argument("--checkpoint", type=Path, help="checkpoint folder (default: the demo's, assembled)")
    build.add_argument("--heads", type=Path, help="heads file in place of the demo's (what train-heads wrote)")
    build.add_argument("--out", type=Path, default=BUILD, help="where onnx/ and engines/ lie (default: %(default)s)")
    for command in (export, build):
        command.add_argument(
            "--verify", action="store_true", help="read every file, also those whose size, time and inode are known"
        )
    build.add_argument("--dry-run", action="store_true", help="say what would stop the build, and build nothing")
    explain = _command(commands, "explain", _explain, "would an engine be rebuilt, and why")
    explain.add_argument("folder", type=Path, nargs="?", default=ENGINE, help="engine folder (default: %(default)s)")
    explain.add_argument("--onnx", type=Path, default=BUILD / "onnx" / "onnx", help="default: %(default)s")
    explain.add_argument("--recipe", type=Path, help="to compare with (default: the engine's own)")
    _train_options(_command(commands, "train-heads", _train, "train a demo model's heads on labelled voices and faces"))
    parity = _command(commands, "parity", _parity, "compare an engine with the PyTorch reference on 20 real prompts")
    parity.add_argument("--engine", type=Path, default=ENGINE, help="default: %(default)s")
    parity.add_argument("--checkpoint", type=Path, default=BUILD / "checkpoints" / "demo", help="default: %(default)s")
    parity.add_argument("--prompts", type=int, default=20)
    parity.add_argument("--output", type=Path, help="JSON file for the result")
    _repo_options(_command(commands, "repo", _repo, "make a Triton model repository from an engine"))
    _serve_options(_command(commands, "serve", _serve, "serve a model repository with Triton Server"))
    _ask_options(_command(commands, "ask", _ask, "ask about a clip"))
    demo = _command(commands, "demo", _demo, "serve a repository, ask about a clip over gRPC, stop the server")
    _serve_options(demo)
    demo.add_argument("--clip", type=Path, default=DEMO_CLIP, help="default: %(default)s")
    bench = _command(
        commands, "bench", _bench, "measure: [latency|throughput|accuracy] OPTIONS, scripts of a source checkout"
    )
    bench.add_argument("rest", nargs=argparse.REMAINDER)
    doctor = _command(commands, "doctor", _doctor, "what this machine and environment have")
    doctor.add_argument("--engine", type=Path, default=ENGINE)
    doctor.add_argument("--url", help="gRPC address of a server to look at")
    inspect = _command(commands, "inspect", _inspect, "show what a checkpoint, ONNX or engine folder is")
    inspect.add_argument("folder", type=Path)
    inspect.add_argument("--json", action="store_true")
    return top


def _command(commands, name: str, run, about: str) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
    command: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about)
    command.set_defaults(run=run)
    return command


def _train_options(train: argparse.ArgumentParser) -> None:
    train.add_argument("--data", type=Path, required=True, help="folder with voices/ and faces/")
    train.add_argument(
        "--work", type=Path, default=BUILD / "training", help="kept between calls (default: %(default)s)"
    )
    train.add_argument("--output", type=Path, help="heads file; results go beside it (default: the demo's)")
    train.add_argument("--config", type=Path, help="TOML file of settings (TrainConfig)")
    train.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="one setting, such as steps=100"
    )


def _repo_options(repo: argparse.ArgumentParser) -> None:
    repo.add_argument("--engine", type=Path, default=ENGINE, help="default: %(default)s")
    repo.add_argument("--onnx", type=Path, default=BUILD / "onnx" / "onnx", help="what it was built from (%(default)s)")
    repo.add_argument("--out", type=Path, default=BUILD / "repositories", help="default: %(default)s")
    repo.add_argument(
        "--target", choices=["cpu", "gpu"], default="cpu", help="where encoders run (default: %(default)s)"
    )
    repo.add_argument(
        "--check", action="store_true", help="let the server load each plan's configuration, without a GPU"
    )
    for name, about in SERVED_AT_ONCE.items():
        repo.add_argument(f"--{name.replace('_', '-')}", type=int, help=about)


def _serve_options(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("repository", type=Path, nargs="?", default=REPOSITORY, help="default: %(default)s")
    serve.add_argument("--triton", type=Path, help="an installed server's folder or binary (default: the bundled one)")
    serve.add_argument("--address", default="127.0.0.1", help="to listen at (default: %(default)s)")
    for kind, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        serve.add_argument(f"--{kind}-port", type=int, default=port, help="default: %(default)s")
    serve.add_argument("--log", type=Path, default=BUILD / "triton.log", help="Triton's log (default: %(default)s)")
    serve.add_argument("--verbose", type=int, default=0, help="Triton's --log-verbose (default: %(default)s)")
    serve.add_argument(
        "--watch", action=argparse.BooleanOptionalAction, default=True, help="stop when a model's process dies"
    )


def _ask_options(ask: argparse.ArgumentParser) -> None:
    defaults = Request()
    ask.add_argument("clip", type=Path, nargs="?", help="video or sound file (none: --words alone)")
    ask.add_argument("--audio", type=Path, help="sound to hear in place of the clip's")
    ask.add_argument("--local", action="store_true", help="answer in this process, without a server")
    ask.add_argument("--url", default=URL, help="gRPC address of a server (default: %(default)s)")
    ask.add_argument("--deadline", type=float, metavar="SECONDS", help="for the whole answer")
    ask.add_argument("--engine", type=Path, default=ENGINE, help="default: %(default)s")
    ask.add_argument("--task", default="reason", help=f"{', '.join(Task)} (default: %(default)s)")
    ask.add_argument("--words", default="", help="what the person says")
    ask.add_argument("--max-tokens", type=int, help="of a reason (default: 64)")
    ask.add_argument("--ar-strength", type=float, help="attention reallocation, 0 to 1 (default: the checkpoint's)")
    ask.add_argument("--temperature", type=float, default=defaults.sampling.temperature)
    ask.add_argument("--top-p", type=float, default=defaults.sampling.top_p)
    ask.add_argument("--seed", type=int, default=defaults.sampling.seed)
    ask.add_argument("--json", action="store_true", help="print the whole answer as JSON, nothing else")


def _say(line: str) -> None:
    print(line, flush=True)


def _fetch(options: argparse.Namespace) -> None:
    from mosear_export.demo.clip import make_clip
    from mosear_export.demo.fetch import default_cache, fetch

    files = fetch(options.cache or default_cache(), _say)
    DEMO_CLIP.parent.mkdir(parents=True, exist_ok=True)
    clip = make_clip(files, DEMO_CLIP)
    _say(f"clip: {DEMO_CLIP}: {clip.caption}")


def _export(options: argparse.Namespace) -> None:
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


def _build(options: argparse.Namespace) -> int:
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


def _explain(options: argparse.Namespace) -> None:
    from mosear_export.explain import explain

    for line in explain(options.folder, options.onnx, options.recipe):
        _say(line)


def _train(options: argparse.Namespace) -> None:
    from mosear_export.inputs import DEMO_HEADS
    from mosear_export.training.run import settings, train_heads

    config = settings(options.config, options.set)
    train_heads(options.data, options.work, options.output or DEMO_HEADS, config, _say)


def _parity(options: argparse.Namespace) -> None:
    import json

    from mosear_export.demo.fetch import default_cache, fetch
    from mosear_export.parity import measure

    files = fetch(default_cache(), _say)
    result = json.dumps(measure(options.engine, options.checkpoint, files, _say, count=options.prompts), indent=2)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(result + "\n")
    _say(result)


def _repo(options: argparse.Namespace) -> None:
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


def _serve(options: argparse.Namespace) -> None:
    from mosear.serving.server import serve

    serve(_server_options(options), _say)


def _demo(options: argparse.Namespace) -> None:
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


def _ask(options: argparse.Namespace) -> None:
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


def _bench(options: argparse.Namespace) -> int:
    import subprocess

    named = options.rest[:1] if options.rest[:1] and options.rest[0] in BENCHMARKS else []
    script = Path("benchmarks", f"{(named or BENCHMARKS)[0]}.py")
    if not script.exists():
        raise MosearError(f"{script} is not here: run `mosear bench` in a source checkout")
    return subprocess.call([sys.executable, str(script), *options.rest[len(named) :]])


def _doctor(options: argparse.Namespace) -> None:
    from mosear.doctor import examine, examine_server

    for line in examine_server(options.url) if options.url else examine(options.engine):
        _say(line)


def _inspect(options: argparse.Namespace) -> None:
    from mosear.doctor import describe

    _say(describe(options.folder, as_json=options.json))
