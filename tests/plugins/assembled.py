"""Every node's kernels for one architecture, assembled from the PTX that a plan would hold; prints what came of it as JSON."""

import json
import re
import sys
from collections.abc import Mapping
from typing import Any

from plugin_cases import CASES, NodeCase

from mosear.kernels.compile import assemble, fix_addresses
from mosear.kernels.plugins.op import Site
from mosear.kernels.plugins.ptx import fitting
from mosear.kernels.resources import parameter_sizes


def first_of_each(cases: Mapping[str, NodeCase], arch: int) -> dict[str, NodeCase]:
    """For each kernel of a node the first case that it serves: others differ in constants."""
    found: dict[tuple[str, str], str] = {}
    for name, case in cases.items():
        kernel = case.op.tactics(case.ranges(), site_of(case, arch))[0].kernel
        found.setdefault((case.op.name, kernel.name if kernel else ""), name)
    return {name: cases[name] for name in found.values()}


def site_of(case: NodeCase, arch: int) -> Site:
    return Site(arch=arch, data="bf16", attributes=case.attributes)


def assembled(case: NodeCase, arch: int) -> list[dict[str, Any]]:
    found = []
    for made in fitting(case.op, site_of(case, arch), case.ranges())[:1]:
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
    print(json.dumps({name: assembled(case, arch) for name, case in first_of_each(CASES, arch).items()}))
