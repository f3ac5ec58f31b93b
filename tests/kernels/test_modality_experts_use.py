"""Modality experts used wrongly: each argument that a caller can get wrong is named with its limit; and choose_launch."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from experts64 import Heads, make
from torch import Tensor

from mosear.config import MoSEConfig, Route, Select
from mosear.errors import ConfigError, KernelError
from mosear.kernels.modality_experts.launcher import check_values, modality_experts, modality_experts_of
from mosear.kernels.modality_experts.launches import (
    TABLE,
    Shape,
    cases,
    choose_launch,
    shape_of,
)

HEADS = Heads(width=24, columns=(16, 7), rank=4, share_a=False)
SHAPE = Shape(rows=8, width=4096, columns=(4096, 4096), groups=3, experts=2, rank=8, share_a=True)


def unaligned(tensor: Tensor) -> Tensor:
    """The same numbers from an address that is no multiple of 16 bytes on."""
    room = torch.zeros(tensor.numel() + 8, dtype=tensor.dtype)
    start = 1 if room.data_ptr() % 16 == 0 else 0
    view = room[start : start + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


WRONG = {
    "x of int32": ({"x": lambda t: t.int()}, "x is torch.int32: the kernel takes torch.float32"),
    "a of another dtype": ({"a": lambda t: t.half()}, "a is torch.float16: it must be torch.float32"),
    "gates_in in fp16": ({"gates_in": lambda t: t.half()}, "gates_in is torch.float16: it must be torch.float32"),
    "ids in int64": ({"group": lambda t: t.long()}, "group is torch.int64: it must be torch.int32"),
    "weight in bf16": ({"weight": lambda t: t.bfloat16()}, "weight is torch.bfloat16"),
    "another device": ({"b": lambda t: t.to("meta")}, "b is on meta: it must be on cpu"),
    "a transposed": ({"b": lambda t: t.T.contiguous().T}, "b has strides [1, 24]: it must be contiguous"),
    "unaligned": ({"base": unaligned}, "base begins at an address that is no multiple of 16"),
    "a scalar": ({"a": lambda t: t[0, 0]}, "a has 0 dimensions: it must have at least 2"),
    "columns do not add up": ({"base": lambda t: t[:, 1:].contiguous()}, "columns is [16, 7]: base has 22 columns"),
    "a row too few": ({"group": lambda t: t[1:].clone()}, "group has shape [8]: it must be [9]"),
    "gates of fewer layers": ({"gates_in": lambda t: t[:, :1].clone()}, "gates_in has shape [9, 1, 2]: it must be [9, 2, 2]"),
    "gate of fewer rows": ({"gate": lambda t: t[1:].clone()}, "gate has 11 rows: 2 layers, 3 groups (weight) and 2 experts"),
    "b of odd rows": ({"b": lambda t: t[1:].clone()}, "b has 23 rows: it must be a multiple of 3 groups * 2 experts"),
    "b without rows": ({"b": lambda t: t[:0].clone()}, "b has 0 rows"),
    "a of another rank": ({"a": lambda t: t[:20].clone()}, "a has 20 rows: 2 layers of rank 4 (from b) have 8, or 24"),
    "a of another width": ({"a": lambda t: t[:, :23].contiguous()}, "a has shape [24, 23]: it must be [24, 24]"),
    "no width": ({"x": lambda t: t[:, :0]}, "x has width 0"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named(changes: dict[str, Any], message: str) -> None:
    tensors = make(HEADS, rows=9)
    tensors |= {name: change(tensors[name]) for name, change in changes.items()}
    with pytest.raises(KernelError, match=re.escape(message)):
        modality_experts_of(**tensors, **HEADS.choices)  # type: ignore[arg-type]


def test_layers_without_columns() -> None:
    for columns in ((), (16, 0, 7)):
        with pytest.raises(KernelError, match="columns is"):
            modality_experts_of(**make(HEADS, rows=9), **(HEADS.choices | {"columns": columns}))  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number(scale: float) -> None:
    with pytest.raises(KernelError, match="scale is"):
        modality_experts_of(**make(HEADS, rows=9), **(HEADS.choices | {"scale": scale}))  # type: ignore[arg-type]


def test_values_are_checked_where_asked() -> None:
    group, weight = torch.tensor([0, 2, 1]).int(), torch.ones(3)
    check_values(group, weight)
    check_values(group[:0], weight)
    with pytest.raises(KernelError, match=re.escape("group holds ids from -1 to 2: they must lie in 0..2")):
        check_values(torch.tensor([0, -1, 2]).int(), weight)
    with pytest.raises(KernelError, match=re.escape("group holds ids from 0 to 3")):
        check_values(torch.tensor([0, 3]).int(), weight)
    with pytest.raises(KernelError, match=r"weight is \[1.0, nan, 1.0\]: every group's weight must be a finite number"):
        check_values(group, torch.tensor([1.0, torch.nan, 1.0]))


def test_a_row_of_no_group_keeps_its_base() -> None:
    """What unchecked ids do: no access out of bounds (test_memory.py), and nothing to their neighbours."""
    tensors = make(HEADS, rows=9)
    wrong = tensors | {"group": tensors["group"].clone()}
    wrong["group"][[2, 5]] = torch.tensor([-1, 3], dtype=torch.int32)
    y, right = (modality_experts_of(**t, **HEADS.choices)[0] for t in (wrong, tensors))  # type: ignore[arg-type]
    assert y[[2, 5]].equal(tensors["base"][[2, 5]])
    others = [0, 1, 3, 4, 6, 7, 8]
    assert y[others].equal(right[others])


def test_no_rows() -> None:
    tensors = {
        name: t[:0] if name in ("base", "x", "group", "gates_in") else t for name, t in make(HEADS, rows=9).items()
    }
    y, gates = modality_experts_of(**tensors, **HEADS.choices)  # type: ignore[arg-type]
    assert y.shape == (0, 23) and gates.shape == (0, 2, 2)


def test_one_layer_names_its_arguments_too() -> None:
    tensors = make(Heads(columns=(7,)), rows=9)
    tensors["gates_in"] = tensors["gates_in"][:, 0].contiguous()
    with pytest.raises(KernelError, match=re.escape("x is torch.float64")):
        modality_experts(
            **tensors | {"x": tensors["x"].double()}, scale=1.0, select=Select.SOFT, route=Route.TOKEN
        )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 9}, "groups (rows of weight) are 9: the kernel of modality experts serves 1 to 8"),
        ({"rank": 257}, "rows of a, all targets together, are 514"),
        ({"groups": 8, "experts": 33, "rank": 1}, "rows of gate, all targets together, are 528"),
        ({"experts": 5, "rank": 64}, "experts times rank are 320: the kernel of modality experts serves 1 to 256"),
    ],
)
def test_sizes_that_no_tile_holds(change: dict[str, int], message: str) -> None:
    shape = dataclasses.replace(SHAPE, **change)
    with pytest.raises(KernelError, match=re.escape(message)):
        choose_launch(shape, scale=1.0, select=Select.SOFT, route=Route.TOKEN, arch=90)


def test_an_architecture_that_is_not_compiled_for() -> None:
    with pytest.raises(ConfigError, match="arch is 75"):
        choose_launch(SHAPE, scale=1.0, select=Select.SOFT, route=Route.TOKEN, arch=75)


def test_the_table_has_reasons_and_serves_any_number_of_rows() -> None:
    assert [row.most_rows for row in TABLE] == sorted(row.most_rows for row in TABLE)
    assert all(len(row.reason) > 40 for row in TABLE) and TABLE[-1].most_rows >= 2**31


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 400, 4096, 100_000])
@pytest.mark.parametrize("width", [1, 300, 576, 4096])
def test_a_plan_covers_all_rows_and_columns(rows: int, width: int) -> None:
    shape = Shape(rows=rows, width=width, columns=(576, 192), groups=3, experts=2, rank=8, share_a=True)
    plan = choose_launch(shape, scale=1.0, select=Select.SOFT, route=Route.TOKEN, arch=90)
    shrink, expand = plan.shrink.constants, plan.expand.constants
    assert plan.reason in [row.reason for row in TABLE]
    assert plan.shrink.grid[0] * shrink["BLOCK_M"] >= rows and plan.expand.grid[0] * expand["BLOCK_M"] >= rows
    assert plan.expand.grid[1] * expand["BLOCK_N"] >= 576 and plan.expand.grid[2] == 2
    assert plan.shrink.grid[1] == plan.splits == shrink["SPLITS"] == expand["SPLITS"]
    blocks = -(-width // shrink["BLOCK_K"])
    assert -(-blocks // -(-blocks // plan.splits)) == plan.splits  # no part of d is empty
    assert plan.splits == 1 or 2 * shape.workspace_bytes(plan.splits) <= shape.needed_bytes(2, 1) / 16


def test_a_plan_is_pure_and_follows_the_device() -> None:
    plans = {
        arch: [choose_launch(SHAPE, scale=1.0, select=Select.SOFT, route=Route.TOKEN, arch=arch)] * 2
        for arch in (89, 90)
    }
    assert all(one == two for one, two in plans.values())
    few = dataclasses.replace(SHAPE, rows=2048)
    splits = {
        arch: choose_launch(few, scale=1.0, select=Select.SOFT, route=Route.TOKEN, arch=arch).splits
        for arch in (89, 90)
    }
    assert splits[89] < splits[90]  # 58 multiprocessors for 32 tiles of rows, and 132


def test_wide_heads_take_smaller_tiles() -> None:
    mose = MoSEConfig(rank=64, experts=4, share_a=False)
    plan = choose_launch(
        shape_of(4096, (4096, 4096), rows=400, mose=mose), scale=1.0, select=Select.SOFT, route=Route.TOKEN, arch=90
    )  # fmt: skip
    assert plan.shrink.constants["A_COLUMNS"] == 512 and plan.shrink.constants["BLOCK_M"] == 16
    assert plan.expand.constants["MIXED"] == 256 and plan.expand.constants["BLOCK_M"] == 16


def test_cases_name_every_shape_of_the_cost_model() -> None:
    found = cases(90)
    assert len(found) == 2 * 2 * (3 + 2) and len({(case.label, case.op.name) for case in found}) == len(found)
    for case in found:
        arguments = [*case.op.inputs, *case.op.scalars, *case.op.outputs]
        assert arguments == case.op.function.arg_names[: len(arguments)]
        assert set(case.op.function.arg_names[len(arguments) :]) == set(case.launch.constants)
        assert list(case.scalars) == list(case.op.scalars)
