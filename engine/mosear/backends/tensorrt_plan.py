"""What is in a plan, read without a GPU: chips, kernels with their ONNX nodes, fused attentions, bytes of weights.

A plan holds a readable listing of the program of each profile. The listing is undocumented: this reads the one of
TensorRT-RTX 1.7.1, and its tests build real plans, so that another version is noticed.
"""

import collections
import mmap
import re
from dataclasses import dataclass
from pathlib import Path

from mosear.errors import EngineError

_CHIPS = re.compile(rb"accelerators=\{((?:sm\d+ )+)\}")
_MAIN, _END = b"\nmain {", b"\n}\n"
_STATEMENT = re.compile(rb'\n  (\w+)=\{ name="?([^"\s]+)')
_NODES = re.compile(rb'layers="([^"]*)"')
_NODE = re.compile(rb"\[ONNX Layer: ([^\]]+)\]")
_WEIGHT = re.compile(rb"const_payload_size=(\d+) [^\n]{0,2000}? type=(\w+) \}")
_LAYER = re.compile(r"^layers\.(\d+)/")
_NODE_TEXT = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_PROFILE = re.compile(r"\[profile (\d+)\]")
_NO_KERNEL = {"shape_call", "label"}
_MAGIC = b"vtrt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One launch: its kind and name, and the ONNX nodes that are in it."""

    kind: str
    name: str
    nodes: tuple[str, ...]

    @property
    def layer(self) -> int | None:
        """The decoder layer it belongs to (the later one where it joins two): nodes are named `layers.<n>/...`."""
        found = [int(match[1]) for node in self.nodes if (match := _LAYER.match(node))]
        return max(found) if found else None

    @property
    def is_attention(self) -> bool:
        return "mha" in self.name or "AttentionFinish" in self.kind + self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What one profile runs."""

    kernels: tuple[Kernel, ...]
    weight_bytes: dict[str, int]

    @property
    def fused_attentions(self) -> int:
        return sum(kernel.is_attention for kernel in self.kernels)

    def of_layer(self, layer: int) -> tuple[Kernel, ...]:
        return tuple(kernel for kernel in self.kernels if kernel.layer == layer)

    @property
    def kernels_per_layer(self) -> int:
        """Of most layers (0: a part without decoder layers)."""
        counts = collections.Counter(k.layer for k in self.kernels if k.layer is not None)
        return collections.Counter(counts.values()).most_common(1)[0][0] if counts else 0

    def record(self) -> dict[str, object]:
        """For a manifest: the kernels of one middle layer stand for those of all."""
        layers = sorted({kernel.layer for kernel in self.kernels if kernel.layer is not None})
        shown = self.of_layer(layers[len(layers) // 2]) if layers else self.kernels
        return {
            "kernels": len(self.kernels),
            "kernels_per_layer": self.kernels_per_layer,
            "fused_attentions": self.fused_attentions,
            "weight_bytes": self.weight_bytes,
            "kernels_of_a_layer": [f"{kernel.name}: {', '.join(kernel.nodes[:6])}" for kernel in shown],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A plan file."""

    chips: tuple[str, ...]  # compute capabilities, such as 8.6
    size: int
    programs: tuple[Program, ...]  # one for each profile

    def record(self) -> dict[str, object]:
        return {"chips": list(self.chips), "bytes": self.size, "profiles": [p.record() for p in self.programs]}


def read_plan(path: Path) -> Plan:
    """Raises EngineError where the file is no plan, or holds no listing that this version can read."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != _MAGIC:
                raise EngineError(f"{path} is no TensorRT-RTX plan: build the engine again")
            starts = [(match.start(), match[1].decode()) for match in _CHIPS.finditer(data)]
            if not starts:
                raise EngineError(f"{path} holds no listing of kernels, or one of another TensorRT-RTX version")
            ends = [start for start, _ in starts[1:]] + [len(data)]
            programs = tuple(_program(data, start, end) for (start, _), end in zip(starts, ends))
            return Plan(chips=_chips(starts[0][1]), size=len(data), programs=programs)
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} cannot be read as a plan: {error}: build the engine again") from error


def inspected_plan(path: Path, layers: object, chips: tuple[str, ...]) -> Plan:
    """A plan of TensorRT itself, by the layers that its inspector told, each with the names of its profile's kernels.

    The inspector marks those of a second profile and later ones by an ending, ` [profile 1]`.
    """
    programs: dict[int, list[Kernel]] = {0: []}
    for layer in layers if isinstance(layers, list) else ():
        told = layer if isinstance(layer, dict) else {"Name": str(layer)}
        name = str(told.get("Name", ""))
        at = int(match[1]) if (match := _PROFILE.search(name)) else 0
        nodes = tuple(sorted(set(_NODE_TEXT.findall(str(told.get("Metadata", ""))))))
        kernel = Kernel(kind=str(told.get("LayerType", "")), name=str(told.get("TacticName") or name), nodes=nodes)
        programs.setdefault(at, []).append(kernel)
    found = tuple(Program(kernels=tuple(programs[at]), weight_bytes={}) for at in sorted(programs))
    return Plan(chips=chips, size=path.stat().st_size, programs=found)


def _chips(listed: str) -> tuple[str, ...]:
    """8.6 of sm86."""
    return tuple(f"{name[2:-1]}.{name[-1]}" for name in listed.split())


def _program(data: mmap.mmap, start: int, end: int) -> Program:
    weights: collections.Counter[str] = collections.Counter()
    for match in _WEIGHT.finditer(data, start, end):
        weights[match[2].decode()] += int(match[1])
    begin = data.find(_MAIN, start, end)
    body = data[begin : data.find(_END, begin, end)]
    found = list(_STATEMENT.finditer(body))
    stops = [match.start() for match in found[1:]] + [len(body)]
    kernels = tuple(
        Kernel(kind=match[1].decode(), name=match[2].decode(), nodes=_nodes(body[match.start() : stop]))
        for match, stop in zip(found, stops)
        if match[1].decode() not in _NO_KERNEL
    )
    return Program(kernels=kernels, weight_bytes=dict(weights))


def _nodes(statement: bytes) -> tuple[str, ...]:
    listed = _NODES.search(statement)
    return tuple(sorted({node.decode() for node in _NODE.findall(listed[1])})) if listed else ()
