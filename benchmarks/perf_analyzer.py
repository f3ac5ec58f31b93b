"""NVIDIA's perf_analyzer as an outside witness: `python benchmarks/perf_analyzer.py --serve`, or --url (see --help).

It runs in an environment of its own: the last release that runs on glibc 2.36 comes with tritonclient 2.51.0, which cannot
be installed beside this project's protobuf. Two libraries that it wants lie in the pytriton package, under other names.
"""

import argparse
import base64
import csv
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import machine
from google.protobuf import text_format
from observed import Observed
from tritonclient.grpc import model_config_pb2 as pb
from workload import make_demo_clip, request, say

from mosear.cli import REPOSITORY
from mosear.commands import BUILD
from mosear.contract import ENCODERS, Tensors
from mosear.errors import MosearError, ServingError
from mosear.runtime.prompt import Task
from mosear.serving.client import UNARY_MODEL
from mosear.serving.installation import PACKAGE
from mosear.serving.tensors import request_tensors

VERSION = "2.51.0"
REQUIREMENTS = (f"tritonclient[grpc]=={VERSION}", "numpy==1.26.4")
LIBRARIES = {"libcudart.so.12": "libcudart-*.so.12.*", "libb64.so.0d": "libb64-*.so.0d*"}
LIMIT_S = 180  # of one run
# Windows of so many requests, three that agree within 80 % at least. (--request-count alone divides by whole seconds.)
WINDOWS = ("--measurement-mode", "count_windows", "--stability-percentage", "80", "--max-trials", "8")
NAME = "perf_analyzer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model and the inputs of every request."""

    name: str
    model: str
    inputs: Mapping[str, Mapping[str, object]]  # as perf_analyzer's JSON wants them
    batched: bool


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="host:port of a running server's gRPC")
    where.add_argument("--serve", action="store_true", help="start a server for this run, on free ports")
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help="what is served (default: %(default)s)")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4], metavar="N")
    parser.add_argument(
        "--requests", type=int, default=20, help="of a window, of which there are three or more (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=16, help="of each reason (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", help="these alone, such as `voice classify`")
    parser.add_argument("--venv", type=Path, default=BUILD / "perf-venv")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results") / machine.slug() / NAME)
    options = parser.parse_args()
    if min(options.requests, *options.concurrency) < 1 or options.tokens < 1:
        parser.error("numbers must be 1 or more")
    return options


def install(venv: Path) -> tuple[Path, Path]:
    """The binary, and a folder with the libraries that it lacks; made if they are not there."""
    binary, libraries = venv / "bin" / NAME, venv / "perf-libraries"
    if not binary.exists():
        say(f"perf_analyzer: installing {', '.join(REQUIREMENTS)} into {venv}")
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(venv / "bin" / "pip"), "install", "--quiet", *REQUIREMENTS], check=True)
    folder = Path(str(importlib.metadata.distribution(PACKAGE).locate_file("nvidia_pytriton.libs")))
    libraries.mkdir(exist_ok=True)
    for name, pattern in LIBRARIES.items():
        found = sorted(folder.glob(pattern))
        if not found:
            raise ServingError(f"{folder} has no {pattern}, which perf_analyzer needs: is {PACKAGE} 0.7.0 installed?")
        (libraries / name).unlink(missing_ok=True)
        (libraries / name).symlink_to(found[0])
    return binary, libraries


def encoder_case(repository: Path, model: str) -> Case:
    """The sample that warms the model up, as one request; raises ServingError where the repository has none."""
    folder = repository / model
    config = text_format.Parse((folder / "config.pbtxt").read_text(), pb.ModelConfig())
    if not config.model_warmup:
        raise ServingError(f"{folder} has no warm-up sample to send: make the repository with --onnx")
    sample = config.model_warmup[0].inputs
    inputs = {
        name: _encoded((folder / "warmup" / given.input_data_file).read_bytes(), given.dims)
        for name, given in sample.items()
    }
    return Case(name=model, model=model, inputs=inputs, batched=True)


def unary_case(task: Task, clip: bytes, *, tokens: int) -> Case:
    """The clip and words of every benchmark, to the model without streams."""
    tensors = request_tensors(request(task, clip, tokens=tokens))
    return Case(name=str(task), model=UNARY_MODEL, inputs=unary_inputs(tensors), batched=False)


def unary_inputs(tensors: Tensors) -> dict[str, dict[str, object]]:
    """Strings as they are, all else in base64."""
    return {
        name: {"content": [bytes(value.item()).decode()], "shape": [1]}
        if value.dtype == object
        else _encoded(value.tobytes(), value.shape)
        for name, value in tensors.items()
    }


def _encoded(data: bytes, shape: Sequence[int]) -> dict[str, object]:
    return {"content": {"b64": base64.b64encode(data).decode()}, "shape": list(shape)}


def measure(
    case: Case, concurrency: int, url: str, options: argparse.Namespace, tool: tuple[Path, Path]
) -> dict[str, object]:
    """One run: its row of the CSV, or what perf_analyzer said instead."""
    binary, libraries = tool
    with tempfile.TemporaryDirectory() as folder:
        data, table = Path(folder) / "data.json", Path(folder) / "table.csv"
        data.write_text(json.dumps({"data": [case.inputs]}))
        command = [
            str(binary), "-m", case.model, "-u", url, "-i", "grpc", "--input-data", str(data),
            "--concurrency-range", str(concurrency), *WINDOWS, "--measurement-request-count", str(options.requests),
            "-f", str(table), "--verbose-csv",
        ]  # fmt: skip
        environment = os.environ | {"LD_LIBRARY_PATH": str(libraries.resolve())}
        try:
            done = subprocess.run(
                command, check=False, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                timeout=LIMIT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {LIMIT_S} s"}
        if done.returncode or not table.exists():
            return {"failed": f"status {done.returncode}: {done.stdout.strip()[-600:]}"}
        with table.open(newline="") as file:
            return dict(next(csv.DictReader(file)))


def write(found: Mapping[str, Sequence[Mapping[str, object]]], folder: Path, settings: Mapping[str, object]) -> None:
    """CASE.csv with perf_analyzer's own columns, and outcome.json with all that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in found.items():
        good = [row for row in rows if "failed" not in row]
        if good:
            with (folder / f"{name}.csv").open("w", newline="") as file:
                table = csv.DictWriter(file, list(good[0]), lineterminator="\n")
                table.writeheader()
                table.writerows(good)
    failed = {name: [row["failed"] for row in rows if "failed" in row] for name, rows in found.items()}
    outcome = {"machine": machine.stamp(), "settings": settings, "failed": {k: v for k, v in failed.items() if v}}
    (folder / "outcome.json").write_text(json.dumps(outcome, indent=1) + "\n")


def run(options: argparse.Namespace, clip: bytes) -> None:
    tool = install(options.venv)
    cases = [
        *(unary_case(task, clip, tokens=options.tokens) for task in (Task.CLASSIFY, Task.REASON)),
        *(encoder_case(options.repository, model) for model in ENCODERS),
    ]
    found: dict[str, list[dict[str, object]]] = {}
    with Observed(options.url, repository=options.repository) as target:
        for case in cases:
            if options.cases and case.name not in options.cases:
                continue
            found[case.name] = []
            for concurrency in options.concurrency:
                row = measure(case, concurrency, target.url, options, tool)
                found[case.name].append(row)
                shown = row.get("failed") or f"{row['Inferences/Second']} inferences/s, p50 {row['p50 latency']} us"
                say(f"{case.name} at concurrency {concurrency}: {shown}")
    settings = {"version": VERSION, "requests": options.requests, "tokens": options.tokens}
    write(found, options.out, settings)
    say(f"wrote {options.out}")


def main() -> int:
    options = parse_arguments()
    try:
        with tempfile.TemporaryDirectory() as folder:
            run(options, make_demo_clip(Path(folder)).read_bytes())
    except (MosearError, subprocess.CalledProcessError) as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
