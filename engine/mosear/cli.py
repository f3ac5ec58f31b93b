"""The one command line, `mosear`: its options. What a command does stands in mosear.commands."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mosear import commands
from mosear.commands import BUILD, DEMO_CLIP, SERVED_AT_ONCE
from mosear.errors import MosearError
from mosear.runtime.prompt import Task
from mosear.runtime.request import Request

RECIPE = Path("export/recipes/cpu-fp32.toml")
ENGINE = BUILD / "engines" / "cpu-fp32"
REPOSITORY = BUILD / "repositories" / "cpu-fp32-on-cpu"
URL = "127.0.0.1:8001"


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
    added = top.add_subparsers(required=True, metavar="COMMAND")
    fetch = _command(
        added, "fetch-demo", commands.fetch_demo, "bring the demo's parts into the cache and make its clip"
    )
    fetch.add_argument("--cache", type=Path, help="cache folder (default: ~/.cache/mosear)")
    export = _command(added, "export", commands.export, "export a checkpoint to ONNX, or the kernels to binaries")
    export.add_argument("what", choices=["onnx", "kernels"])
    export.add_argument("--checkpoint", type=Path, help="onnx: checkpoint folder (default: the demo's, assembled)")
    export.add_argument("--arch", help="kernels: architectures, such as 80,90 (default: all that are served)")
    export.add_argument("--out", type=Path, default=BUILD, help="where onnx/ or kernels/ lies (default: %(default)s)")
    build = _command(added, "build", commands.build, "build an engine from a recipe")
    build.add_argument("--recipe", type=Path, default=RECIPE, help="default: %(default)s")
    build.add_argument("--checkpoint", type=Path, help="checkpoint folder (default: the demo's, assembled)")
    build.add_argument("--heads", type=Path, help="heads file in place of the demo's (what train-heads wrote)")
    build.add_argument("--out", type=Path, default=BUILD, help="where onnx/ and engines/ lie (default: %(default)s)")
    for command in (export, build):
        command.add_argument(
            "--verify", action="store_true", help="read every file, also those whose size, time and inode are known"
        )
    build.add_argument("--dry-run", action="store_true", help="say what would stop the build, and build nothing")
    explain = _command(added, "explain", commands.explain, "would an engine be rebuilt, and why")
    explain.add_argument("folder", type=Path, nargs="?", default=ENGINE, help="engine folder (default: %(default)s)")
    explain.add_argument("--onnx", type=Path, default=BUILD / "onnx" / "onnx", help="default: %(default)s")
    explain.add_argument("--recipe", type=Path, help="to compare with (default: the engine's own)")
    _train_options(
        _command(added, "train-heads", commands.train_heads, "train a demo model's heads on labelled voices and faces")
    )
    parity = _command(
        added, "parity", commands.parity, "compare an engine with the PyTorch reference on 20 real prompts"
    )
    parity.add_argument("--engine", type=Path, default=ENGINE, help="default: %(default)s")
    parity.add_argument("--checkpoint", type=Path, default=BUILD / "checkpoints" / "demo", help="default: %(default)s")
    parity.add_argument("--prompts", type=int, default=20)
    parity.add_argument("--output", type=Path, help="JSON file for the result")
    _repo_options(_command(added, "repo", commands.repo, "make a Triton model repository from an engine"))
    _serve_options(_command(added, "serve", commands.serve, "serve a model repository with Triton Server"))
    _ask_options(_command(added, "ask", commands.ask, "ask about a clip"))
    demo = _command(added, "demo", commands.demo, "serve a repository, ask about a clip over gRPC, stop the server")
    _serve_options(demo)
    demo.add_argument("--clip", type=Path, default=DEMO_CLIP, help="default: %(default)s")
    bench = _command(
        added, "bench", commands.bench, "measure: [latency|throughput|accuracy] OPTIONS, scripts of a source checkout"
    )
    bench.add_argument("rest", nargs=argparse.REMAINDER)
    doctor = _command(added, "doctor", commands.doctor, "what this machine and environment have")
    doctor.add_argument("--engine", type=Path, default=ENGINE)
    doctor.add_argument("--url", help="gRPC address of a server to look at")
    inspect = _command(added, "inspect", commands.inspect, "show what a checkpoint, ONNX or engine folder is")
    inspect.add_argument("folder", type=Path)
    inspect.add_argument("--json", action="store_true")
    return top


def _command(added, name: str, run, about: str) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
    command: argparse.ArgumentParser = added.add_parser(name, help=about, description=about)
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
