"""What this machine is and how fast it can be: memory read bandwidth, multiply-add rate, memory of a process tree.

On a shared machine the bandwidth changes from second to second (33 and 51 GB/s were seen in turn), so that what is timed
is held against readings taken beside it.
"""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

BLOCK_BYTES = 1 << 29  # well above any cache
SIDE = 2048
REPEATS = 7
QUIET_S = 0.02  # the threads of an engine go on spinning for some ms after a call
PACKAGES = ("numpy", "onnxruntime", "torch", "transformers")


class Memory:
    """Reads its own block of memory with one thread for each core."""

    def __init__(self) -> None:
        self.threads = len(os.sched_getaffinity(0))
        self.parts = np.array_split(np.ones(BLOCK_BYTES // 4, np.float32), self.threads)

    def bytes_s(self, repeats: int = 3) -> float:
        """The best of some readings: dot products of each part with itself (the fastest of numpy's reductions)."""
        time.sleep(QUIET_S)
        with ThreadPoolExecutor(self.threads) as pool:
            return BLOCK_BYTES / _fastest(lambda: list(pool.map(lambda part: np.dot(part, part), self.parts)), repeats)


def multiply_adds_s() -> float:
    """The best rate at which two 2048 x 2048 float32 matrices are multiplied (a multiply-add is 2 flops)."""
    left, right = np.random.default_rng(0).standard_normal((2, SIDE, SIDE), np.float32)
    seconds: float = _fastest(lambda: left @ right, REPEATS)
    return SIDE**3 / seconds


def _fastest(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
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
