"""What a kernel's launch states of itself, for its launcher, the ahead-of-time compiler and a plugin alike."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

TENSOR_ROWS = 16  # of the smallest tensor-core tile: fewer rows or columns cost the same


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is not below `number` and `least`."""
    return max(least, 1 << (number - 1).bit_length())


class Kind(enum.StrEnum):
    """Element type of a pointer parameter; DATA is the activations' own (fp32, fp16 or bf16)."""

    DATA = "data"
    F32 = "f32"
    I32 = "i32"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelOp:
    """One kernel as one op. Its parameters stand in the order inputs, int32 scalars, outputs, constants.

    Tensors are contiguous: strides follow from the scalars. No scratch memory; floats that do not change are constants.
    """

    name: str
    function: Any  # triton's JITFunction (untyped)
    inputs: Mapping[str, Kind]
    scalars: tuple[str, ...]
    outputs: Mapping[str, Kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How one kernel is launched: `constants` are its constexpr parameters."""

    grid: tuple[int, int, int]
    constants: Mapping[str, int | float | bool]
    warps: int
    stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A kernel in the configuration that `choose_launch` picks for a shape: what is compiled, tabled and costed."""

    label: str  # such as "llama2-7b prefill 4096"
    op: KernelOp
    launch: Launch
    scalars: Mapping[str, int]


def run(
    op: KernelOp, launch: Launch, tensors: Sequence[Tensor], scalars: Sequence[int], outputs: Sequence[Tensor]
) -> None:
    """Launch `op` once."""
    op.function[launch.grid](
        *tensors, *scalars, *outputs, **launch.constants, num_warps=launch.warps, num_stages=launch.stages
    )
