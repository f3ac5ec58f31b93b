"""A TensorRT plugin as data: what a node takes and gives, and which kernel serves it in a profile. No TensorRT is needed here.

A node may be served by several kernels, in the profile for decode by one and in that for prefill by another. A kernel's
parameters are then some of the node's tensors: the others are passed to it as well, and it never looks at them (`ptx.py`).

Sizes are numbers or TensorRT's symbols: `Arithmetic` computes with both, so that one formula says the launch at build and,
in a test, the launch that the project's own launcher makes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mosear.errors import KernelError
from mosear.kernels.chips import chip_of
from mosear.kernels.launch import Case, KernelOp, Kind, Launch

Size = Any  # an int, or a symbolic dimension of TensorRT's (untyped)
Sizes = Mapping[str, tuple[Size, ...]]
Attribute = str | int | float
ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


class Arithmetic:
    """Operations on sizes; here both operands are numbers."""

    def times(self, a: Size, b: Size) -> Size:
        return a * b

    def cdiv(self, a: Size, b: Size) -> Size:
        return -(-a // b)

    def most(self, a: Size, b: Size) -> Size:
        return max(a, b)

    def least(self, a: Size, b: Size) -> Size:
        return min(a, b)


class Knowledge(Arithmetic):
    """The same where some sizes are not known, None: a result that depends on one is not known either."""

    def times(self, a: Size, b: Size) -> Size:
        return None if None in (a, b) else super().times(a, b)

    def cdiv(self, a: Size, b: Size) -> Size:
        return None if None in (a, b) else super().cdiv(a, b)

    def most(self, a: Size, b: Size) -> Size:
        return None if None in (a, b) else super().most(a, b)

    def least(self, a: Size, b: Size) -> Size:
        return None if None in (a, b) else super().least(a, b)


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """A dimension within a profile, both ends included."""

    least: int
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """All dimensions of a node's inputs within a profile."""

    inputs: Mapping[str, tuple[Range, ...]]

    def of(self, name: str, axis: int) -> Range:
        return self.inputs[name][axis]

    def known(self) -> Sizes:
        """Sizes that are one number in the profile, None for the others."""
        return {
            name: tuple(r.most if r.least == r.most else None for r in found) for name, found in self.inputs.items()
        }  # fmt: skip

    def fixed(self, name: str, axis: int, meaning: str) -> int:
        """A size that a kernel has as a constant; raises KernelError where it varies."""
        found = self.of(name, axis)
        if found.least != found.most:
            raise KernelError(
                f"{name} has {found.least} to {found.most} at axis {axis}: {meaning} must be one number in a profile, "
                "as it is a constant of the kernel"
            )
        return found.most


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a node stands: the device's architecture and multiprocessors, element type of the activations, attributes."""

    arch: int
    data: str
    attributes: Mapping[str, Attribute]
    multiprocessors: int = 0  # 0: those of the card that stands for the architecture

    @property
    def element(self) -> int:
        """Bytes of an activation's element."""
        return ELEMENT_BYTES[self.data]

    @property
    def all_multiprocessors(self) -> int:
        return self.multiprocessors or chip_of(self.arch).multiprocessors

    def number(self, name: str) -> int:
        return int(self.attributes[name])

    def real(self, name: str) -> float:
        return float(self.attributes[name])

    def word(self, name: str, default: str = "") -> str:
        return str(self.attributes.get(name, default))


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """A launch's grid, and the kernel's scalars in its order."""

    grid: tuple[Size, Size, Size]
    scalars: tuple[Size, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tactic:
    """One way to serve a node in a profile: a kernel in one configuration, or no work at all (`kernel` is None).

    `spare`: taken only where no other fits.
    """

    kernel: KernelOp | None
    launch: Launch
    geometry: Callable[[Launch, Sizes, Arithmetic], Geometry] = field(repr=False)
    spare: bool = False

    def at(self, sizes: Sizes, arithmetic: Arithmetic) -> Geometry:
        """The launch for these sizes."""
        return self.geometry(self.launch, sizes, arithmetic)

    def case(self, ranges: Ranges) -> Case:
        """What is compiled. A scalar that varies in the profile counts as 1: the compiler may assume nothing of it."""
        assert self.kernel is not None, "a tactic without a kernel compiles nothing"
        found = self.at(ranges.known(), Knowledge()).scalars
        scalars = {n: 1 if v is None else v for n, v in zip(self.kernel.scalars, found, strict=True)}
        return Case(label=self.kernel.name, op=self.kernel, launch=self.launch, scalars=scalars)


def tactics_of(
    kernel: KernelOp,
    own: Sequence[Launch],
    spare: Sequence[Launch],
    geometry: Callable[[Launch, Sizes, Arithmetic], Geometry],
) -> list[Tactic]:
    """A tactic for each launch."""
    marked = [*((launch, False) for launch in own), *((launch, True) for launch in spare)]
    return [Tactic(kernel=kernel, launch=launch, geometry=geometry, spare=last) for launch, last in marked]


def varied(launch: Launch, *, stages: int, warps: int = 0, **constants: int) -> Launch:
    """A launch with other stages, warps (0: the same) and constants."""
    changed = dict(launch.constants) | constants
    return dataclasses.replace(launch, constants=changed, warps=warps or launch.warps, stages=stages)


def nothing() -> Tactic:
    """A launch of one thread that does nothing: the node has no work in this profile, and nobody reads what it gives."""
    launch = Launch(grid=(1, 1, 1), constants={}, warps=1, stages=1)
    return Tactic(kernel=None, launch=launch, geometry=lambda *_: Geometry(grid=(1, 1, 1)))


def tensors(pointers: Mapping[str, Kind]) -> dict[str, Kind]:
    """A kernel's pointer parameters as a node's tensors."""
    return {name.removesuffix("_ptr"): kind for name, kind in pointers.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginOp:
    """One plugin: its node's inputs, outputs and attributes, the outputs' shapes, and its tactics in a profile."""

    name: str
    inputs: Mapping[str, Kind]
    outputs: Mapping[str, Kind]
    attributes: Mapping[str, type]
    shapes: Callable[[Sizes, Site, Arithmetic], tuple[tuple[Size, ...], ...]] = field(repr=False)
    tactics: Callable[[Ranges, Site], list[Tactic]] = field(repr=False)
