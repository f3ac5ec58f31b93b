"""What this machine is and how fast it can be: memory read bandwidth, multiply-add rate, memory of a process tree."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

BLOCK_BYTES = 1 << 30
SIDE = 2048
REPEATS = 7
PACKAGES = ("numpy", "onnxruntime", "torch", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The best of several runs: bytes read per second, fp32 multiply-adds per second (2 flops each)."""

    read_bytes_s: float
    multiply_adds_s: float

    def best(self, other: "Limits") -> "Limits":
        return Limits(
            read_bytes_s=max(self.read_bytes_s, other.read_bytes_s),
            multiply_adds_s=max(self.multiply_adds_s, other.multiply_adds_s),
        )


def measure_limits() -> Limits:
    """Read 1 GiB of float32 (np.dot of halves in 2 threads, np.sum); multiply two 2048 x 2048 float32 matrices."""
    values = np.ones(BLOCK_BYTES // 4, np.float32)
    quarters = values.reshape(4, -1)
    with ThreadPoolExecutor(2) as pool:

        def dots() -> None:
            # Each thread reads the two quarters of its half once.
            list(pool.map(lambda i: np.dot(quarters[i], quarters[i + 1]), (0, 2)))

        read_s = min(_fastest(dots), _fastest(lambda: np.sum(values)))
    left, right = np.random.default_rng(0).standard_normal((2, SIDE, SIDE), np.float32)
    multiply_s = _fastest(lambda: left @ right)
    return Limits(read_bytes_s=values.nbytes / read_s, multiply_adds_s=SIDE**3 / multiply_s)


def _fastest(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def stamp() -> dict[str, object]:
    """The machine, the versions that were timed, date and load (at the time of the call)."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_average": list(os.getloadavg()),
    }


def cpu_name() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1].strip() if found else platform.machine()


def slug() -> str:
    """A folder name for this machine, such as `intel-xeon-processor-2-cores`."""
    plain = re.sub(r"\((r|tm)\)", "", cpu_name().lower())
    return re.sub(r"[^a-z0-9]+", "-", f"{plain} {len(os.sched_getaffinity(0))} cores").strip("-")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    """Short hash of the source that was measured; `+` where files differ from it."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent, check=True, capture_output=True, text=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def tree_pss_bytes() -> dict[str, int]:
    """Proportional set size of this process and of each of its descendants."""
    here = psutil.Process()
    found = {"self": pss_bytes(here.pid)}
    for child in here.children(recursive=True):
        found[f"child {child.pid}"] = pss_bytes(child.pid)
    return found


def pss_bytes(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kb) * 1024 for kb in re.findall(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE))
