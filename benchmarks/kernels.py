"""What the GPU kernels take of a chip and cost on it: `python benchmarks/kernels.py` (see --help).

Without a GPU every figure is computed from shapes and machine code, and says so. With one, each kernel is timed too.
"""

import argparse
import sys
from pathlib import Path

import kernels_cost
import kernels_report
from workload import say

from mosear.errors import MosearError
from mosear.kernels import table
from mosear.kernels.catalogue import Order, make
from mosear.kernels.chips import ARCHS, chip_of
from mosear.kernels.compile import versions

RESULTS = Path(__file__).parent / "results"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--resources", action="store_true", help="only compile everything and write kernel_resources.json"
    )
    parser.add_argument("--arch", default=",".join(map(str, ARCHS)), help="architectures (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: benchmarks/results)")
    parser.add_argument(
        "--time", action=argparse.BooleanOptionalAction, default=None, help="time on this machine's GPU"
    )
    options = parser.parse_args()
    try:
        options.arch = tuple(int(arch) for arch in options.arch.split(","))
        for arch in options.arch:
            chip_of(arch)
    except (ValueError, MosearError) as error:
        parser.error(f"--arch: {error}")
    return options


def resources(archs: tuple[int, ...], out: Path) -> None:
    """Compile the catalogue and write its table."""
    described = make(Order(archs=archs), say=say)
    rows = [table.row_of(row) for row in described]
    path = out / "kernel_resources.json"
    table.write(path, rows, versions())
    say(kernels_report.resources(rows))
    seconds = sorted(row["seconds"] for row in described)
    say(
        f"{path}: {len(rows)} binaries; to compile one: median {seconds[len(seconds) // 2]:.2f} s, longest {seconds[-1]:.2f} s"
    )


def cost(archs: tuple[int, ...], out: Path, *, timed: bool | None) -> None:
    """Print and write the cost of every case on every chip, beside its plain peer."""
    rows = kernels_cost.compute(archs, say)
    if timed is not False:
        import kernels_timing

        rows = kernels_timing.add_times(rows, demanded=timed is True, say=say)
    path = out / "kernel_cost.json"
    kernels_report.write_cost(path, rows, versions())
    say(kernels_report.cost(rows))
    say(f"{path}: {len(rows)} rows")


def main() -> int:
    options = parse_arguments()
    try:
        if options.resources:
            resources(options.arch, options.out)
        else:
            cost(options.arch, options.out, timed=options.time)
    except MosearError as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
