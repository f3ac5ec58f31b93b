"""All kernels in all the configurations that `choose_launch` picks for the shapes that we state: compiled, tabled, costed.

Compiling is done in processes of their own: Triton decides at import whether it interprets, and two cores halve the time.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mosear.errors import KernelError
from mosear.kernels.launch import Case

MODULES = (
    "mosear.kernels.reallocated_attention.launches",
    "mosear.kernels.reallocated_attention.decode_launches",
    "mosear.kernels.modality_experts.launches",
)
DATA = ("bf16", "fp16")
DESCRIBE = "mosear.kernels.catalogue:describe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to compile: each variant of the cases of `modules` once for each arch and element type.

    `task`, as `module:function`, is called in the worker with (cases, arch, data, folder) for each variant, all of
    whose cases share one binary, and gives a JSON object. `paths` precede the worker's module path. `labels`: only cases
    with one of these labels.
    """

    archs: tuple[int, ...]
    modules: tuple[str, ...] = MODULES
    data: tuple[str, ...] = DATA
    task: str = DESCRIBE
    labels: tuple[str, ...] = ()
    folder: str = ""
    paths: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One binary to make: the cases that share it, in the order of the catalogue."""

    arch: int
    data: str
    name: str
    cases: tuple[Case, ...] = field(repr=False)


def cases(arch: int, modules: Sequence[str] = MODULES) -> list[Case]:
    """Every case for an architecture, module by module."""
    return [case for name in modules for case in importlib.import_module(name).cases(arch)]


def variants(order: Order) -> list[Variant]:
    """Every binary of an order, deterministic; raises KernelError where a label is unknown."""
    from mosear.kernels.compile import variant_name

    found: dict[tuple[int, str, str], list[Case]] = {}
    unknown = set(order.labels)
    for arch in order.archs:
        for case in cases(arch, order.modules):
            unknown.discard(case.label)
            if order.labels and case.label not in order.labels:
                continue
            for data in order.data:
                found.setdefault((arch, data, variant_name(case, data)), []).append(case)
    if unknown:
        raise KernelError(f"no case has the label {sorted(unknown)[0]!r}")
    return [Variant(arch=a, data=d, name=n, cases=tuple(group)) for (a, d, n), group in found.items()]


def make(
    order: Order, *, workers: int | None = None, say: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Run an order's task for each of its variants in worker processes; results in the variants' order.

    Raises KernelError with a worker's own message.
    """
    count = workers or max(1, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(count) as pool:
        lists = list(pool.map(lambda index: _worker(order, index, count, say), range(count)))
    found = sorted((row for rows in lists for row in rows), key=lambda row: int(row["order"]))
    return [row["result"] for row in found]


def _worker(order: Order, index: int, count: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*order.paths, *filter(None, sys.path)])
    request = json.dumps({"order": asdict(order), "index": index, "count": count})
    code = "import sys; from mosear.kernels.catalogue import work; sys.exit(work(sys.stdin.read()))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with process, ThreadPoolExecutor(1) as reader:
        assert process.stdin and process.stdout and process.stderr
        errors = reader.submit(process.stderr.read)  # read beside, or a full pipe would stop the worker
        process.stdin.write(request)
        process.stdin.close()
        rows: list[dict[str, Any]] = []
        for line in process.stdout:
            row = json.loads(line)
            rows.append(row)
            say(row["said"])
        said = errors.result()
        if process.wait():
            last = next((text for text in reversed(said.splitlines()) if text.strip()), "it said nothing")
            raise KernelError(last.removeprefix("mosear.errors.KernelError: "))
    return rows


def work(request: str) -> int:
    """A worker's part: every `count`-th variant from `index` on, a line of JSON for each."""
    from mosear.kernels.compile import fix_addresses

    fix_addresses()
    asked = json.loads(request)
    given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in asked["order"].items()}
    order = Order(**given)
    module, _, name = order.task.partition(":")
    task = getattr(importlib.import_module(module), name)
    everything = variants(order)
    results, sys.stdout = sys.stdout, sys.stderr  # what Triton prints is no result
    for place, variant in list(enumerate(everything))[asked["index"] :: asked["count"]]:
        result = task(variant.cases, variant.arch, variant.data, Path(order.folder) if order.folder else None)
        said = f"{place + 1}/{len(everything)} {variant.name} sm_{variant.arch}"
        print(json.dumps({"order": place, "said": said, "result": result}), file=results, flush=True)
    return 0


def describe(group: Sequence[Case], arch: int, data: str, folder: Path | None) -> dict[str, Any]:
    """Compile a variant and measure it; binaries go into `folder` where one is given."""
    from mosear.kernels.compile import compile_case
    from mosear.kernels.resources import measure

    compiled = compile_case(group[0], arch=arch, data=data)
    found = measure(compiled)
    if folder:
        stem = f"{compiled.name}-sm_{arch}"
        (folder / f"{stem}.cubin").write_bytes(compiled.cubin)
        (folder / f"{stem}.ptx").write_text(compiled.ptx)
    launch = group[0].launch
    return {
        "kernel": group[0].op.name,
        "name": compiled.name,
        "arch": arch,
        "data": data,
        "constants": dict(launch.constants),
        "warps": compiled.warps,
        "stages": launch.stages,
        "symbol": compiled.symbol,
        "cases": [_geometry(case) for case in group],
        "parameters": [asdict(parameter) for parameter in compiled.parameters],
        "shared_bytes": compiled.shared_bytes,
        "resources": asdict(found),
        "seconds": compiled.seconds,
    }


def _geometry(case: Case) -> Mapping[str, Any]:
    return {"label": case.label, "grid": list(case.launch.grid), "scalars": dict(case.scalars)}
