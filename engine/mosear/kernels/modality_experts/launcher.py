"""Modality experts on a device: check the arguments, launch shrink and expand."""

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mosear.config import Route, Select
from mosear.errors import KernelError
from mosear.kernels.arguments import DTYPES, arch_of, check_kind
from mosear.kernels.launch import run
from mosear.kernels.modality_experts.kernel import EXPAND, SHRINK
from mosear.kernels.modality_experts.launches import Shape, choose_launch


def modality_experts(
    base: Tensor,
    x: Tensor,
    group: Tensor,
    gates_in: Tensor,
    a: Tensor,
    gate: Tensor,
    b: Tensor,
    weight: Tensor,
    *,
    scale: float,
    select: Select,
    route: Route,
) -> tuple[Tensor, Tensor]:
    """Add the experts' delta to one linear layer's output: the kernels' answer to `reference.modality_experts`.

    base [..., d_out]; x [..., d]; group i32 [...]; gates_in f32 [..., E] (read when route = modality); a [R, d] or
    [G*R, d]; gate [G*E, d]; b [G*E*R, d_out]; weight f32 [G]. fp32, fp16 or bf16, the same for all but where it says
    f32; all contiguous. Returns y [..., d_out] and gates f32 [..., E]. Raises KernelError as `modality_experts_of` does.
    """
    y, gates = modality_experts_of(
        base, x, group, gates_in.unsqueeze(-2), a, gate, b, weight,
        columns=base.shape[-1:], scale=scale, select=select, route=route,
    )  # fmt: skip
    return y, gates.squeeze(-2)


def modality_experts_of(
    base: Tensor,
    x: Tensor,
    group: Tensor,
    gates_in: Tensor,
    a: Tensor,
    gate: Tensor,
    b: Tensor,
    weight: Tensor,
    *,
    columns: Sequence[int],
    scale: float,
    select: Select,
    route: Route,
) -> tuple[Tensor, Tensor]:
    """The same for T linear layers that share x, in the same two launches; `columns` are their widths.

    base [..., O], b [G*E*R, O]: the layers' columns side by side, O = sum of columns; gates_in f32 [..., T, E];
    a [T*R, d] or [T*G*R, d]; gate [T*G*E, d]: the layers' rows one after the other; the rest as for one layer.
    Returns y [..., O] and gates f32 [..., T, E].

    Raises KernelError, naming argument and limit, for a wrong dtype, shape, stride or device and for sizes that no
    configuration serves. Values (ids outside 0..G-1, NaN weights) are not looked at, as that waits for the device:
    `check_values` does. A row whose id is no group's gets y = base and unspecified gates.
    """
    tensors = {
        "base": base, "x": x, "group": group, "gates_in": gates_in, "a": a, "gate": gate, "b": b, "weight": weight
    }  # fmt: skip
    shape = _checked(tensors, tuple(columns))
    if not math.isfinite(scale):
        raise KernelError(f"scale is {scale}: it must be a finite number")
    plan = choose_launch(
        shape, scale=scale, select=select, route=route, arch=arch_of(x.device), element=x.element_size()
    )  # fmt: skip
    y, gates = torch.empty_like(base), torch.empty_like(gates_in)
    if not shape.rows:
        return y, gates
    partial = x.new_empty(plan.splits * shape.rows * shape.sums, dtype=torch.float32)
    run(SHRINK, plan.shrink, (x, group, a, gate), (shape.rows, shape.width), (partial,))
    inputs = (base, group, partial, gates_in, b, weight, _column_start(shape.columns, x.device))
    run(EXPAND, plan.expand, inputs, (shape.rows, base.shape[-1]), (y, gates))
    return y, gates


def check_values(group: Tensor, weight: Tensor) -> None:
    """Raises KernelError for ids outside 0..G-1 and weights that are no numbers. Waits for the device: once, not per call."""
    low, high = (int(group.min()), int(group.max())) if group.numel() else (0, 0)
    if low < 0 or high >= len(weight):
        raise KernelError(f"group holds ids from {low} to {high}: they must lie in 0..{len(weight) - 1}")
    if not bool(weight.isfinite().all()):
        raise KernelError(f"weight is {weight.tolist()}: every group's weight must be a finite number")


def _checked(tensors: Mapping[str, Tensor], columns: tuple[int, ...]) -> Shape:
    base, x, gates_in, gate, weight = (tensors[name] for name in ("base", "x", "gates_in", "gate", "weight"))
    _check_kinds(tensors)
    if not columns or min(columns) < 1 or sum(columns) != base.shape[-1]:
        raise KernelError(f"columns is {list(columns)}: base has {base.shape[-1]} columns, and each layer at least one")
    targets, groups, experts = len(columns), weight.numel(), gates_in.shape[-1]
    per_group = targets * groups * experts
    if gates_in.ndim < 2 or experts < 1 or per_group < 1 or gate.shape[0] != per_group:
        raise KernelError(
            f"gate has {gate.shape[0]} rows: {targets} layers, {groups} groups (weight) and {experts} experts "
            f"(gates_in) make {per_group}"
        )
    width, sizes = x.shape[-1], list(x.shape[:-1])
    rank, rest = divmod(tensors["b"].shape[0], groups * experts)
    if rest or not rank:
        raise KernelError(
            f"b has {tensors['b'].shape[0]} rows: it must be a multiple of {groups} groups * {experts} experts"
        )
    rows_a = tensors["a"].shape[0]
    if rows_a not in (targets * rank, targets * groups * rank):
        raise KernelError(
            f"a has {rows_a} rows: {targets} layers of rank {rank} (from b) have {targets * rank}, "
            f"or {targets * groups * rank} with one A for each group"
        )
    wanted = {
        "base": [*sizes, sum(columns)], "group": sizes, "gates_in": [*sizes, targets, experts], "a": [rows_a, width],
        "gate": [per_group, width], "b": [groups * experts * rank, sum(columns)], "weight": [groups],
    }  # fmt: skip
    for name, expected in wanted.items():
        if list(tensors[name].shape) != expected:
            raise KernelError(
                f"{name} has shape {list(tensors[name].shape)}: it must be {expected}, as x and b have it"
            )
    return Shape(
        rows=x.numel() // width, width=width, columns=columns, groups=groups, experts=experts, rank=rank,
        share_a=rows_a == targets * rank,
    )  # fmt: skip


def _check_kinds(tensors: Mapping[str, Tensor]) -> None:
    """Dtypes, device, contiguity and dimensions."""
    x = tensors["x"]
    if x.dtype not in DTYPES:
        raise KernelError(f"x is {x.dtype}: the kernel takes {', '.join(map(str, DTYPES))}")
    wanted = {"group": torch.int32, "gates_in": torch.float32, "weight": torch.float32}
    least = {"a": 2, "gate": 2, "b": 2, "base": 1, "x": 1, "gates_in": 1, "weight": 1}
    for name, tensor in tensors.items():
        if tensor.ndim < least.get(name, 0):
            raise KernelError(f"{name} has {tensor.ndim} dimensions: it must have at least {least[name]}")
        check_kind(name, tensor, wanted.get(name, x.dtype), like=("x", x))
    if x.shape[-1] < 1:
        raise KernelError("x has width 0: it must have at least one column")


@functools.lru_cache(maxsize=64)
def _column_start(columns: tuple[int, ...], device: torch.device) -> Tensor:
    """First column of each layer and the end of the last: i32 [T + 1]. Kept, since each is a copy to the device."""
    return torch.tensor([0, *columns], dtype=torch.int32).cumsum(0).int().to(device)
