"""Every node's kernels for one architecture, assembled from the PTX that a plan would hold; prints what came of it as JSON."""

import json
import re
import sys
from typing import Any

from plugin_cases import CASES, SMALL, NodeCase

from mosear.kernels.compile import assemble, fix_addresses
from mosear.kernels.plugins.op import Site
from mosear.kernels.plugins.ptx import fitting
from mosear.kernels.resources import parameter_sizes


def small(case: NodeCase) -> bool:
    """One head size is enough here: the other is a constant."""
    return "query" not in case.axes or case.axes["query"][-1] == SMALL["size"] or "tile_group" in case.axes


def assembled(case: NodeCase, arch: int) -> list[dict[str, Any]]:
    found = []
    for made in fitting(case.op, Site(arch=arch, data="bf16", attributes=case.attributes), case.ranges())[:1]:
        cubin, _ = assemble(made.ptx, arch)
        entry = made.ptx.split(".visible .entry")[1].split(")")[0]
        found.append({
            "kernel": made.tactic.kernel.name if made.tactic.kernel else "nothing", "parameters": made.parameters,
            "sizes": parameter_sizes(cubin), "shared": made.shared_bytes, "threads": made.threads,
            "declared": re.findall(r"(\w+)(?:,|\n)", entry), "target": re.findall(r"\.target (\S+)", made.ptx),
        })  # fmt: skip
    return found


if __name__ == "__main__":
    fix_addresses()
    arch = int(sys.argv[1])
    print(json.dumps({name: assembled(case, arch) for name, case in CASES.items() if small(case)}))
