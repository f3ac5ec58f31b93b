"""Modality experts as kernels: DESIGN 3.1 against float64, its identities, and what a call reads and writes."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from experts64 import Heads, decided, experts64, make, runs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sweep import sweep
from tolerance import assert_close
from torch import Tensor
from traffic import Traffic

from mosear.config import Route, Select
from mosear.kernels.modality_experts import launcher
from mosear.kernels.modality_experts.launcher import modality_experts, modality_experts_of
from mosear.kernels.modality_experts.launches import MODELS, choose_launch, shape_of
from mosear.kernels.modality_experts.reference import modality_experts as whiteboard

KINDS = {torch.float32: "kernel_fp32", torch.float16: "kernel_fp16", torch.bfloat16: "kernel_bf16"}
every_choice = pytest.mark.parametrize(
    ("select", "route", "share_a"),
    sweep(
        itertools.product(Select, Route, (True, False)),
        (Select.SOFT, Route.TOKEN, True), (Select.TOP1, Route.MODALITY, False),
    ),
)  # fmt: skip
PROMPT = runs((0, 41), (1, 258), (2, 1), (1, 1), (0, 99))  # text | 258 video | audio | video | text


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody writes is NaN: outputs and workspace."""

    def nan(made: Tensor) -> Tensor:
        return made.fill_(torch.nan) if made.is_floating_point() else made

    for owner, name in ((torch, "empty_like"), (Tensor, "new_empty")):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _plain=plain, **k: nan(_plain(*a, **k)))


def adapt(heads: Heads, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return modality_experts_of(**tensors, **heads.choices)  # type: ignore[arg-type]


def check(heads: Heads, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The kernels' answer, which is float64's: gates, then y with the gates as they are."""
    y, gates = adapt(heads, tensors)
    assert y.dtype == tensors["x"].dtype and gates.dtype == torch.float32
    clear = decided(heads, tensors)
    assert (~clear).sum() <= 1 + 0.01 * clear.size
    if clear.any():
        assert_close(gates.numpy()[clear], experts64(heads, tensors)[1][clear], "kernel_fp32")
    given = dataclasses.replace(heads, route=Route.MODALITY)
    expected, _, size = experts64(given, tensors | {"gates_in": gates})
    # Mixed numbers and y are each rounded once, to at most half a step; the rest is fp32.
    step = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[y.dtype]
    error = np.abs(y.double().numpy() - expected)
    assert (error <= (2 * step + 1e-5) * size + 1e-6).all(), f"{(error / size).max()} of the terms' size"
    if y.numel() > 500:  # a single number may well be half a step off
        assert_close(y.float(), expected, KINDS[y.dtype])
    return y, gates


@every_choice
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize(
    ("heads", "rows"),
    [
        (Heads(width=1, columns=(1,), experts=1, rank=1), 1),
        (Heads(width=37, columns=(13, 5, 21), groups=5, experts=3, rank=5), 41),
        (Heads(width=300, columns=(48, 64), groups=3, experts=2, rank=8), 70),
    ],
    ids=["smallest", "odd", "realistic"],
)
def test_it_is_the_formula(
    heads: Heads, rows: int, dtype: torch.dtype, select: Select, route: Route, share_a: bool
) -> None:
    heads = dataclasses.replace(heads, select=select, route=route, share_a=share_a)
    check(heads, make(heads, rows=rows, dtype=dtype))


@pytest.mark.full
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_the_demo_models_prompt(dtype: torch.dtype) -> None:
    width, columns = MODELS["demo"]
    heads = Heads(width=width, columns=columns, rank=8)
    check(heads, make(heads, rows=len(PROMPT), dtype=dtype) | {"group": PROMPT})


@pytest.mark.parametrize("rows", sweep([1, 8, 64], 8))
def test_a_step_of_decoding(rows: int) -> None:
    """Of LLaMA's width; all rows text, in parts of d whose sums are put together."""
    heads = Heads(width=4096, columns=(256, 256), rank=8)
    shape = shape_of(4096, heads.columns, rows=rows)
    assert choose_launch(shape, scale=2.0, select=Select.SOFT, route=Route.TOKEN, arch=90).splits > 1
    check(heads, make(heads, rows=rows, dtype=torch.bfloat16) | {"group": torch.zeros(rows, dtype=torch.int32)})


def test_one_layer_is_the_whiteboards_call() -> None:
    heads = Heads(columns=(10,))
    tensors = {
        n: t if n in ("a", "gate", "b", "weight") else t.unflatten(0, (2, 9)) for n, t in make(heads, rows=18).items()
    }
    tensors["gates_in"] = tensors["gates_in"][:, :, 0]
    choices = {"scale": 2.0, "select": Select.SOFT, "route": Route.TOKEN}
    for ours, theirs in zip(modality_experts(**tensors, **choices), whiteboard(**tensors, **choices), strict=True):
        assert ours.shape == theirs.shape
        assert_close(ours, theirs, "kernel_fp32")


def test_layers_together_are_each_alone() -> None:
    heads = Heads(columns=(16, 7, 30))
    tensors = make(heads, rows=21)
    y, gates = adapt(heads, tensors)
    start = 0
    for i, columns in enumerate(heads.columns):
        own, rows = slice(start, start + columns), slice(i * heads.rank, (i + 1) * heads.rank)
        gate = tensors["gate"].unflatten(0, (3, -1))[i]
        alone = tensors | {"a": tensors["a"][rows].clone(), "gate": gate.clone()}
        alone |= {"base": tensors["base"][:, own].contiguous(), "b": tensors["b"][:, own].contiguous()}
        alone["gates_in"] = tensors["gates_in"][:, i : i + 1].contiguous()
        one_y, one_gates = adapt(dataclasses.replace(heads, columns=(columns,)), alone)
        assert_close(one_y, y[:, own], "regrouped")
        assert_close(one_gates[:, 0], gates[:, i], "regrouped")
        start += columns


@every_choice
def test_alpha_0_is_the_backbone(select: Select, route: Route, share_a: bool) -> None:
    heads = Heads(select=select, route=route, share_a=share_a, scale=0.0)
    tensors = make(heads, rows=40)
    assert adapt(heads, tensors)[0].equal(tensors["base"])


@every_choice
def test_equal_experts_are_plain_lora(select: Select, route: Route, share_a: bool) -> None:
    """All B equal, all A equal, w = 1: the gate has no say (its weights sum to 1)."""
    heads = Heads(columns=(16,), experts=3, select=select, route=route, share_a=share_a)
    tensors = make(heads, rows=40) | {"weight": torch.ones(3)}
    tensors["gates_in"] /= tensors["gates_in"].sum(-1, keepdim=True)
    a, b = tensors["a"][:4], tensors["b"][:4]
    tensors |= {"a": a.repeat(1 if share_a else 3, 1), "b": b.repeat(9, 1)}
    expected = tensors["base"].double() + 2.0 * (tensors["x"].double() @ a.double().T) @ b.double()
    assert_close(adapt(heads, tensors)[0], expected, "kernel_fp32")


@every_choice
def test_one_expert_is_one_lora_for_each_group(select: Select, route: Route, share_a: bool) -> None:
    heads = Heads(columns=(16,), experts=1, select=select, route=route, share_a=share_a)
    tensors = make(heads, rows=40) | {"gates_in": torch.ones(40, 1, 1)}
    y, gates = check(heads, tensors)
    assert gates.equal(torch.ones_like(gates))
    for g in range(3):
        own = tensors["group"] == g
        a = tensors["a"] if share_a else tensors["a"][4 * g : 4 * g + 4]
        delta = tensors["x"][own].double() @ a.double().T @ tensors["b"][4 * g : 4 * g + 4].double()
        expected = tensors["base"][own] + 2.0 * tensors["weight"][g] * delta
        assert_close(y[own], expected, "kernel_fp32")


@every_choice
def test_permuting_experts_with_their_gate_rows_changes_nothing(select: Select, route: Route, share_a: bool) -> None:
    heads = Heads(experts=4, select=select, route=route, share_a=share_a)
    tensors, order = make(heads, rows=40), torch.tensor([2, 0, 3, 1])
    other = tensors | {
        "gate": tensors["gate"].unflatten(0, (6, 4))[:, order].flatten(0, 1),
        "b": tensors["b"].unflatten(0, (3, 4, -1))[:, order].flatten(0, 2),
        "gates_in": tensors["gates_in"][..., order].contiguous(),
    }
    (y, gates), (other_y, other_gates) = adapt(heads, tensors), adapt(heads, other)
    assert_close(other_y, y, "regrouped")
    assert_close(other_gates, gates[..., order], "regrouped")
    assert not other_gates.equal(gates)


@every_choice
def test_a_group_of_weight_0_has_no_delta(select: Select, route: Route, share_a: bool) -> None:
    """To the bit, in tiles of its own and in mixed ones; its gates are still told."""
    heads = Heads(select=select, route=route, share_a=share_a)
    for group in (make(heads, rows=40)["group"], torch.zeros(40, dtype=torch.int32)):
        tensors = make(heads, rows=40) | {"group": group, "weight": torch.tensor([0.0, 1.0, 0.7])}
        y, text = check(heads, tensors)[0], group == 0
        assert y[text].equal(tensors["base"][text])


@pytest.mark.parametrize("route", Route)
def test_a_row_feels_its_own_groups_heads_alone(route: Route) -> None:
    """Not even NaN in the heads of a group that a tile holds beside others, or not at all, reaches a row of another."""
    heads = Heads(route=route, share_a=False)
    tensors = make(heads, rows=70) | {"group": runs((0, 20), (1, 20), (0, 30))}
    before = adapt(heads, tensors)
    rows = {"a": heads.rank, "gate": heads.experts, "b": heads.experts * heads.rank, "weight": 1}
    absent, other = ({name: tensors[name].clone() for name in rows} for _ in range(2))
    for name, each in rows.items():
        sets = (2, 3) if name in ("a", "gate") else (1, 3)
        absent[name].unflatten(0, (*sets, each))[:, 2] = torch.nan
        other[name].unflatten(0, (*sets, each))[:, 1] += 1.0
    for ours, theirs in zip(adapt(heads, tensors | absent), before, strict=True):
        assert ours.equal(theirs)
    after, video = adapt(heads, tensors | other), tensors["group"] == 1
    for ours, theirs in zip(after, before, strict=True):
        assert ours[~video].equal(theirs[~video])
    assert (after[0][video] != before[0][video]).any(-1).all()


def test_ties_take_the_first_expert() -> None:
    heads = Heads(width=1, columns=(3,), experts=3, rank=1, select=Select.TOP1)
    tensors = make(heads, rows=3) | {"group": torch.arange(3, dtype=torch.int32), "x": torch.ones(3, 1)}
    tensors["gate"] = torch.tensor([-1.0, 2, 2, 3, 3, 3, 0, 0, 1])[:, None]
    assert check(heads, tensors)[1][:, 0].tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]


def test_large_logits_stay_weights() -> None:
    heads = Heads(experts=4)
    tensors = make(heads, rows=20)
    tensors["gate"] *= 300
    gates = check(heads, tensors)[1]
    assert (gates.max(-1).values > 0.999).any() and (gates < 1e-30).any()


@pytest.mark.parametrize("splits", sweep([1, 2, 3, 16], 16))
def test_parts_of_d_are_free(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where some are empty: 300 columns are three blocks."""
    heads = Heads(width=300)
    tensors = make(heads, rows=9)

    def forced(*args: object, **kwargs: object) -> object:
        plan = choose_launch(*args, **kwargs)  # type: ignore[arg-type]
        shrink, expand = (
            dataclasses.replace(launch, constants={**launch.constants, "SPLITS": splits})
            for launch in (plan.shrink, plan.expand)
        )
        shrink = dataclasses.replace(shrink, grid=(shrink.grid[0], splits, 1))
        return dataclasses.replace(plan, splits=splits, shrink=shrink, expand=expand)

    monkeypatch.setattr(launcher, "choose_launch", forced)
    check(heads, tensors)


ANY_CALL = given(
    dtype=st.sampled_from(list(KINDS)),
    select=st.sampled_from(Select),
    route=st.sampled_from(Route),
    share_a=st.booleans(),
    groups=st.integers(1, 8),
    experts=st.integers(1, 5),
    rank=st.integers(1, 9),
    width=st.integers(1, 150),
    columns=st.lists(st.integers(1, 140), min_size=1, max_size=3),
    lengths=st.lists(st.tuples(st.integers(0, 7), st.integers(1, 40)), min_size=1, max_size=5),
    weight=st.lists(st.sampled_from([0.0, 1.0, -0.5]), min_size=8, max_size=8),
    seed=st.integers(0, 2**31),
)


def is_the_formula(
    dtype: torch.dtype, select: Select, route: Route, share_a: bool, groups: int, experts: int, rank: int, width: int,
    columns: list[int], lengths: list[tuple[int, int]], weight: list[float], seed: int,
) -> None:  # fmt: skip
    heads = Heads(
        width=width, columns=tuple(columns), groups=groups, experts=experts, rank=rank, share_a=share_a,
        select=select, route=route,
    )  # fmt: skip
    group = runs(*((g % groups, length) for g, length in lengths))
    tensors = make(heads, rows=len(group), dtype=dtype, seed=seed) | {"group": group}
    tensors["weight"] = torch.tensor(weight[:groups])
    check(heads, tensors)


ENDLESS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(ENDLESS, max_examples=10)
@ANY_CALL
def test_any_call_is_the_formula(**drawn: Any) -> None:  # Any: what ANY_CALL says
    is_the_formula(**drawn)


@pytest.mark.full
@settings(ENDLESS, max_examples=80)
@ANY_CALL
def test_many_calls_are_the_formula(**drawn: Any) -> None:  # Any: what ANY_CALL says
    is_the_formula(**drawn)


@pytest.mark.parametrize(("model", "rows"), sweep(itertools.product(MODELS, (1, 8, 64)), ("demo", 8)))
def test_decoding_moves_hardly_more_than_it_must(model: str, rows: int) -> None:
    """Bytes that the kernels really touch, each once a kernel: the workspace is all that comes on top."""
    width, columns = MODELS[model]
    heads, shape = Heads(width=width, columns=columns, rank=8), shape_of(width, columns, rows=rows)
    tensors = make(heads, rows=rows, dtype=torch.float16) | {"group": torch.zeros(rows, dtype=torch.int32)}
    with Traffic() as traffic:
        adapt(heads, tensors)
    plan = choose_launch(shape, scale=2.0, select=Select.SOFT, route=Route.TOKEN, arch=90)
    floor, workspace = shape.needed_bytes(2, 1), shape.workspace_bytes(plan.splits)
    # The ids are read by both kernels, and of weight and columns' starts a few bytes count on either side.
    assert abs(traffic.distinct - (floor + 2 * workspace)) <= 4 * rows + 64
    print(f"{model} x{rows}: {traffic.distinct} bytes, {traffic.distinct / floor:.4f} of the floor")
    assert traffic.distinct <= 1.1 * floor


def test_nothing_of_a_silent_group_is_read() -> None:
    """All rows text with w_text = 0: no B; and of A, gate and B never what no row needs."""
    heads = Heads(width=64, columns=(32, 32), rank=8, share_a=False)
    tensors = make(heads, rows=8) | {"group": torch.full((8,), 1, dtype=torch.int32)}
    with Traffic() as traffic:
        adapt(heads, tensors)
    touched = {name: traffic.rows_of(tensor) for name, tensor in tensors.items()}
    assert touched["b"] == list(range(16, 32)) and touched["gate"] == [2, 3, 8, 9]
    assert touched["a"] == [*range(8, 16), *range(32, 40)]
    tensors["weight"][1] = 0.0
    with Traffic() as silent:
        adapt(heads, tensors)
    assert silent.rows_of(tensors["b"]) == [] and silent.distinct < traffic.distinct
