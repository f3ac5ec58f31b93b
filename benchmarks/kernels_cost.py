"""Cost of every call on every chip: bytes, operations, roofline time, cycles of the whole kernels; all computed."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kernels_bytes
import kernels_counts
from kernels_cycles import PIPES

from mosear.errors import KernelError
from mosear.kernels.catalogue import MODULES, Order, cases, make
from mosear.kernels.chips import Chip, chip_of
from mosear.kernels.launch import Case

PLAIN_MODULES = ("kernels_peers",)
TASK = "kernels_cycles:task"
HERE = str(Path(__file__).parent)
DATA = "bf16"  # fp16 moves the same bytes and runs at the same rates
# Chips whose tensor instructions do not say their size: the work comes from the tiles.
SILENT = (100,)
PRODUCTS_APART = 0.01
FULL_ROWS = 64  # a tile of as many rows gives each warp its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Cycles:
    """Cycles of a grid on the whole chip, by pipe: no pipe can be quicker, were all others idle.

    `work`: the busiest pipe's with all programs shared out evenly, which a batch that fills the chip comes near to.
    """

    pipes: Mapping[str, float]
    work: float
    products: float  # multiply-adds on tensor cores that the code holds, padding among them

    @property
    def bottleneck(self) -> str:
        return max(self.pipes, key=lambda name: self.pipes[name])

    @property
    def cycles(self) -> float:
        return self.pipes[self.bottleneck]


def grid_cycles(case: Case, analysed: Mapping[str, Any], chip: Chip) -> Cycles:
    """Cycles of a case's grid: every program's, shared out evenly, but never less than the longest program's own.

    Raises KernelError for a loop of the code whose turns kernels_counts does not know.
    """
    known = kernels_counts.programs(case)
    total, longest, products = dict.fromkeys(PIPES, 0.0), dict.fromkeys(PIPES, 0.0), 0.0
    unused = {loop["key"] for loop in analysed["loops"]} - {key for group in known for key in group.turns}
    if unused:
        raise KernelError(
            f"{case.op.name}, {case.label!r}: the code has loops {sorted(unused)}, kernels_counts lacks them"
        )
    for group in known:
        cycles, inside = dict.fromkeys(PIPES, 0.0), 0.0
        for turns, work in _pieces(group.turns, analysed):
            for name in PIPES:
                cycles[name] += turns * analysed["warps"] * work["cycles"].get(name, 0.0)
            inside += turns * analysed["warps"] * work["products"]
        if chip.arch in SILENT and not inside:  # HMMA speaks there too
            inside = group.products
            cycles["tensor"] = inside / chip.tensor_rate
        elif not _agree(inside, group.products, case):
            raise KernelError(
                f"{case.op.name} for sm_{chip.arch}, {case.label!r}: the code's loops multiply {inside:.4g} times, its "
                f"tiles {group.products:.4g}: kernels_counts has their turns wrong"
            )
        products += group.count * inside
        for name in PIPES:
            total[name] += group.count * cycles[name] / chip.multiprocessors
            longest[name] = max(longest[name], cycles[name])
    pipes = {name: max(total[name], longest[name]) for name in PIPES}
    return Cycles(pipes=pipes, work=max(total.values()), products=products)


def _agree(code: float, tiles: float, case: Case) -> bool:
    """Whether the code multiplies what its tiles need. Warps repeat each other's work where a tile is too small for all."""
    if not tiles or not code:
        return code == tiles
    rows = int(case.launch.constants.get("ROWS", case.launch.constants.get("BLOCK_M", 0)))
    times = round(code / tiles)
    most = case.launch.warps if rows < FULL_ROWS else 1
    return 1 <= times <= most and abs(code / tiles - times) <= PRODUCTS_APART * times


def _pieces(turns: Mapping[str, float], analysed: Mapping[str, Any]) -> list[tuple[float, Mapping[str, Any]]]:
    """Each piece of the code and how often a program runs it.

    What lies outside loops: once, but never where all ways through it lead to or from loops that the program does not turn
    (it went another way); a side of an `if` that was moved out of a loop by the share of the loop's turns that take it.
    """
    found: list[tuple[float, Mapping[str, Any]]] = []
    everything = {loop["key"] for loop in analysed["loops"]}
    for passage in analysed["passages"]:
        keys = set(passage["loops"])
        times = float(keys in (set(), everything) or any(turns.get(key, 0.0) > 0 for key in keys))
        if times and passage["arm"]:
            times = _share(turns, [key for key in keys if key.startswith(passage["header"])], passage["arm"])
        found.append((times, passage["work"]))
    for loop in analysed["loops"]:
        key = loop["key"]
        found.append((turns.get(key, 0.0), loop["common"]))
        found += [(turns.get(f"{key}|{arm}", turns.get(key, 0.0)), work) for arm, work in loop["arms"].items()]
    return found


def _share(turns: Mapping[str, float], keys: Sequence[str], arm: str) -> float:
    """Part of the turns of loops that take an arm; 1 where nothing says so."""
    every = sum(turns.get(key, 0.0) for key in keys)
    return sum(turns.get(f"{key}|{arm}", turns.get(key, 0.0)) for key in keys) / every if every else 1.0


def compute(archs: Sequence[int], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each call (op and shape) and chip, in the catalogue's order."""
    order = Order(archs=tuple(archs), modules=(*MODULES, *PLAIN_MODULES), data=(DATA,), task=TASK, paths=(HERE,))
    analysed = {(row["arch"], row["kernel"], label): row for row in make(order, say=say) for label in row["labels"]}
    rows = []
    for arch in archs:
        chip = chip_of(arch)
        ours, plain = calls(cases(arch, MODULES)), calls(cases(arch, PLAIN_MODULES))
        for (family, label), launches in ours.items():
            peer = plain.get((f"plain_{family}", label), [])
            rows.append(_row(chip, family, label, launches, peer, analysed))
    return rows


def family_of(case: Case) -> str:
    """The op that a kernel belongs to: `decode_split` and `decode_merge` are one call."""
    name = case.op.name
    for ending in ("_split_paged", "_split", "_merge", "_shrink", "_expand", "_runs"):
        name = name.removesuffix(ending)
    return name


def calls(found: Sequence[Case]) -> dict[tuple[str, str], list[Case]]:
    """Launches of each call in order, by op and label."""
    grouped: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in found:
        grouped[family_of(case), case.label].append(case)
    return dict(grouped)


def _sum(chip: Chip, launches: Sequence[Case], analysed: Mapping[Any, Any]) -> dict[str, Any]:
    each = [grid_cycles(case, analysed[chip.arch, case.op.name, case.label], chip) for case in launches]
    pipes = {name: round(sum(one.pipes[name] for one in each)) for name in PIPES}
    return {
        "kernels": [case.op.name for case in launches],
        "grids": [list(case.launch.grid) for case in launches],
        "cycles": round(sum(one.cycles for one in each)),
        "work_cycles": round(sum(one.work for one in each)),
        "pipes": pipes,
        "bottleneck": [one.bottleneck for one in each],
        "spill_bytes": sum(analysed[chip.arch, case.op.name, case.label]["spills"] for case in launches),
    }


def _row(
    chip: Chip, family: str, label: str, launches: Sequence[Case], peer: Sequence[Case], analysed: Mapping[Any, Any]
) -> dict[str, Any]:
    traffic = kernels_bytes.call(launches)
    ours = _sum(chip, launches, analysed)
    row: dict[str, Any] = {
        "chip": chip.name,
        "arch": chip.arch,
        "op": family,
        "case": label,
        "source": "computed",
        "bytes": traffic.ours.bytes,
        "workspace_bytes": traffic.ours.workspace_bytes,
        "operations": traffic.ours.operations,
        **_roofline(chip, traffic.ours),
        **ours,
        "peer": {
            "name": traffic.peer_name,
            "bytes": traffic.peer.bytes,
            **_roofline(chip, traffic.peer),
            "byte_ratio": round(traffic.ours.bytes / traffic.peer.bytes, 4),
        },
    }
    if peer:
        plain = _sum(chip, peer, analysed)
        row["peer"] |= plain | {
            "cycle_ratio": round(ours["cycles"] / plain["cycles"], 4),
            "work_ratio": round(ours["work_cycles"] / plain["work_cycles"], 4),
        }
    return row


def _roofline(chip: Chip, traffic: kernels_bytes.Traffic) -> dict[str, Any]:
    memory, compute_time = traffic.bytes / chip.memory_bytes_s, traffic.operations / chip.tensor_flops_s
    return {
        "roofline_us": round(1e6 * max(memory, compute_time), 3),
        "bound": "memory" if memory > compute_time else "tensor cores",
    }
