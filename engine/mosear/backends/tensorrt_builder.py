"""Plans built in child processes: watched, bounded in memory, their logs turned into plain words.

One code for the modules `tensorrt` (10, 11) and `tensorrt_rtx`; what the child does: `tensorrt_child`.
"""

import collections
import dataclasses
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mosear.backends.tensorrt_load import INSTALL, unusable
from mosear.backends.tensorrt_plan import Plan, inspected_plan, read_plan
from mosear.contract import Part
from mosear.errors import EngineError
from mosear.recipe import Target

Say = Callable[[str], None]
Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # smallest, usual, largest shape
RTX, TENSORRT = "tensorrt_rtx", "tensorrt"
MODULES = {Target.TENSORRT_RTX: RTX, Target.TENSORRT: TENSORRT}  # of the targets whose parts are plans
PLAN, PLANS = "plan", "plans"  # kind of a plan's folder; below the engines
KEPT_LINES = 6  # of a log, in an error

# What the builder says, and what that means.
PLAIN_WORDS = (
    (
        r"Cannot compile for target\(s\) ([\w ,]+?),? because the model contains HW-specific datatypes: ([\w, ]+)",
        r"the chip \1 has no \2: choose another precision, or leave the chip out of tensorrt.compute_capabilities",
    ),
    (
        r"Attention operation was not supported by a dedicated kernel",
        "an attention cannot be fused: it is in fp32, or of a shape that no kernel takes",
    ),
    (r"FP32 GEMM is not supported", "the chip has no fp32 products: leave it out of tensorrt.compute_capabilities"),
    (
        r"(?s)While parsing node number \d+ \[(\w+) -> (?:.*?Plugin not found|.*?No importer registered)",
        r"TensorRT has no operator \1: write it in operators that it has",
    ),
    (r"static sequence length dimension", "the cache has a dynamic axis L: fix it to the recipe's tensorrt.capacity"),
    (r"bad_alloc|[Oo]ut of memory|Cannot allocate memory", "the builder had not enough memory"),
    (
        r"(?:kMIN|kOPT|kMAX|profile has min).*",
        "a profile does not fit the graph: check [tensorrt] capacity, prefill_rows and the batches",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugins:
    """Our kernels, which a graph's nodes name: a module with a function `register(arch, multiprocessors)`."""

    module: str
    arch: int
    multiprocessors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One plan to build: from a graph, with the ranges of its dynamic inputs for each profile."""

    part: str
    onnx: Path
    plan: Path
    profiles: tuple[Mapping[str, Range], ...]
    compute_capabilities: tuple[str, ...]
    memory_mb: int  # of this machine (RTX), or of the GPU
    module: str = RTX
    plugins: Plugins | None = None
    compatibility: str = "none"
    timing_cache: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A plan that was built, and what it took."""

    seconds: float
    memory_mb: float  # largest resident memory of the child
    version: str
    inputs: dict[str, list[object]]  # name: type and shape
    outputs: dict[str, list[object]]
    profiles: tuple[Mapping[str, Range], ...]
    plan: Plan
    read_back: dict[str, object]  # what the plan says of itself, where there is a GPU to ask it


@dataclass(slots=True)
class _Told:
    """What a child has told so far."""

    last: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=KEPT_LINES))
    unused: list[str] = field(default_factory=list)
    refused: dict[str, object] | None = None
    built: dict[str, object] | None = None


def build_plan(job: Job, say: Say) -> Built:
    """Build one plan; raises EngineError naming part, chips and the builder's last words. A failed build leaves no file."""
    if why := unusable(job.module):
        raise EngineError(f"{why}, which builds this target: {INSTALL[job.module]}")
    started = time.monotonic()
    try:
        told, status, crash = _run(job, say)
        _judge(job, told, status, crash)
        assert told.built is not None, "a build without a result was judged"
        read_back = _judged(job, told.built.pop("read_back"))
        layers = read_back.pop("layers", None)
        plan = read_plan(job.plan) if job.module == RTX else inspected_plan(job.plan, layers, job.compute_capabilities)
    except BaseException:
        job.plan.unlink(missing_ok=True)
        raise
    told.built.pop("built")
    facts: dict[str, Any] = told.built  # from JSON
    seconds = time.monotonic() - started
    return Built(seconds=seconds, profiles=job.profiles, plan=plan, read_back=read_back, **facts)


def _run(job: Job, say: Say) -> tuple[_Told, int, str]:
    """What the child told, its exit status, and what it wrote to standard error."""
    told, phase = _Told(), ""
    with tempfile.TemporaryDirectory(dir=job.plan.parent, prefix=".job-") as aside:
        description, errors = Path(aside, "job.json"), Path(aside, "errors")
        description.write_text(json.dumps({
            "module": job.module, "onnx": str(job.onnx), "plan": str(job.plan), "memory_mb": job.memory_mb,
            "compute_capabilities": job.compute_capabilities if job.module == RTX else (), "profiles": job.profiles,
            "plugins": dataclasses.asdict(job.plugins) if job.plugins else None, "compatibility": job.compatibility,
            "timing_cache": str(job.timing_cache) if job.timing_cache else None,
        }))  # fmt: skip
        command = [sys.executable, "-m", "mosear.backends.tensorrt_child", str(description)]
        with errors.open("wb") as stderr, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr) as child:
            assert child.stdout is not None
            try:
                for line in child.stdout:
                    phase = _take(line, told, phase, lambda now: say(f"engine: {job.part}: {now}"))
            except BaseException:
                child.kill()
                raise
        return told, child.returncode, errors.read_text(errors="replace")


def _take(line: bytes, told: _Told, phase: str, say: Say) -> str:
    """Note one line of a child; returns the phase that it is in."""
    try:
        said = json.loads(line)
    except ValueError:
        told.last.append(line.decode(errors="replace").rstrip())
        return phase
    if "progress" in said:
        now = str(said["progress"][0])
        if now.startswith("Building engine from subgraph") and now != phase:
            say("compiling kernels")
        return now
    if "log" in said:
        severity, text = said["log"]
        if match := re.search(r"Unused Input: (\S+)", text):
            told.unused.append(match[1])
        told.last.append(f"{severity}: {text.strip()}")
    elif "refused" in said:
        told.refused = said
    elif "built" in said:
        told.built = said
    return phase


def _judge(job: Job, told: _Told, status: int, crash: str) -> None:
    """Raises EngineError unless a whole plan was built of a graph whose inputs all count."""
    where = f"{job.part} for {', '.join(job.compute_capabilities)}"
    said = [*told.last, *crash.strip().splitlines()[-KEPT_LINES:]]
    if told.refused is not None:
        errors = [str(error) for error in _listed(told.refused.get("errors"))]
        if told.refused["refused"] == "disk":
            raise EngineError(f"{where}: the plan cannot be written to {job.plan.parent}: {errors[0]}: free some space")
        if told.refused["refused"] == "library":
            raise EngineError(f"{where}: {job.module} cannot be loaded ({errors[0]}): {INSTALL.get(job.module, '')}")
        raise EngineError(f"{where} cannot be built: {_plain([*errors, *said], job)}")
    if status < 0:
        name = signal.Signals(-status).name
        hint = "; the machine may have run out of memory" if name == "SIGKILL" else ""
        raise EngineError(f"{where}: the builder died ({name}){hint}: {_plain(said, job)}")
    if status or told.built is None:
        raise EngineError(f"{where}: the builder ended with status {status}: {_plain(said, job)}")
    if told.unused:
        raise EngineError(
            f"{where}: TensorRT ignores the input{'s' * (len(told.unused) > 1)} {', '.join(told.unused)}: the plan would"
            " answer as if nothing were given there. Leave it out of the graph, or use it"
        )


def _judged(job: Job, read_back: object) -> dict[str, object]:
    """What a plan said of itself when it was read back; raises EngineError where that is not what was asked for."""
    found = dict(read_back) if isinstance(read_back, Mapping) else {}
    wanted = {"compatibility": job.compatibility, "profiles": max(1, len(job.profiles))}
    for name, value in wanted.items() if found else ():
        if found[name] != value:
            raise EngineError(f"{job.part}: {name} of the plan is {found[name]}, {value} was asked for: report this")
    return found


def _listed(value: object) -> Iterable[object]:
    return value if isinstance(value, list) else ()


def _plain(lines: list[str], job: Job) -> str:
    """The meaning of a log where it is known, and its last lines."""
    text = "\n".join(lines)
    meant = []
    for pattern, words in PLAIN_WORDS:
        if match := re.search(pattern, text):
            meant.append(match.expand(words) if "\\" in words else words)
    meaning = "; ".join(meant)
    if "enough memory" in meaning:
        meaning += f" (tensorrt.builder_memory_mb is {job.memory_mb})"
    last = " | ".join(line[:300] for line in lines[-KEPT_LINES:]) or "it said nothing"
    return f"{meaning}. The builder's last words: {last}" if meaning else f"the builder's last words: {last}"


def profile(
    part: Part, shapes: Mapping[str, tuple[int | str, ...]], sizes: Mapping[str, tuple[int, int, int]]
) -> dict[str, Range]:
    """Ranges of the dynamic inputs among `shapes`; raises EngineError for an axis without sizes."""
    ranges: dict[str, Range] = {}
    for name, axes in shapes.items():
        dynamic = [axis for axis in axes if isinstance(axis, str)]
        missing = [axis for axis in dynamic if axis not in sizes]
        if missing:
            raise EngineError(f"{part.name}: input {name} has the axis {missing[0]}, for which the recipe has no sizes")
        if dynamic:
            low, usual, high = (
                tuple(sizes[axis][at] if isinstance(axis, str) else axis for axis in axes) for at in range(3)
            )
            ranges[name] = (low, usual, high)
    return ranges
