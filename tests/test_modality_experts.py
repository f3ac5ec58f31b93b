"""Modality experts: the identities of DESIGN 3.1, on the whiteboard and as a plain ONNX function, and against peft's LoRA."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from peft import LoraConfig, inject_adapter_in_model
from tolerance import assert_close
from torch import Tensor, nn
from toy import plain_op, toy_config

from mosear.config import ModelConfig, Route, Select
from mosear.kernels.modality_experts.reference import gate_weights, modality_experts
from mosear_export.ops import EXPERTS, EXPERTS_INPUTS

GROUP_NAMES = ("text", "video", "audio", "sink")
Adapt = Callable[[ModelConfig, dict[str, Tensor]], tuple[Tensor, Tensor]]
Array = NDArray[np.float64]


def config_of(*, groups: int = 3, **mose: Any) -> ModelConfig:  # Any: a field of MoSEConfig each
    toy = toy_config(groups=GROUP_NAMES[:groups])
    return dataclasses.replace(toy, mose=dataclasses.replace(toy.mose, **mose))


def whiteboard(config: ModelConfig, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    mose = config.mose
    return modality_experts(**tensors, scale=mose.scale, select=mose.select, route=mose.route)


def plain(config: ModelConfig, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    y, gates = plain_op(config, EXPERTS)(*(tensors[name] for name in EXPERTS_INPUTS))
    return y, gates


both = pytest.mark.parametrize("adapt", [whiteboard, plain])
every_choice = pytest.mark.parametrize(
    ("select", "route", "share_a"), [(s, r, a) for s in Select for r in Route for a in (True, False)]
)


def make(
    config: ModelConfig, *, batch: int = 2, rows: int = 9, wide: int = 10, out: int = 7, seed: int = 0
) -> dict[str, Tensor]:
    """Random tokens of all groups, and heads; gates_in are weights that sum to 1, as route = modality makes them."""
    generator, mose, groups = torch.Generator().manual_seed(seed), config.mose, len(config.groups)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    group = torch.randint(0, groups, (batch, rows), generator=generator, dtype=torch.int32)
    group[0, : min(rows, groups)] = torch.arange(min(rows, groups)).int()
    return {
        "base": noise(batch, rows, out),
        "x": noise(batch, rows, wide),
        "group": group,
        "gates_in": gate_weights(2 * noise(batch, rows, mose.experts), mose.select),
        "a": noise(mose.rank * (1 if mose.share_a else groups), wide),
        "gate": noise(groups * mose.experts, wide),
        "b": noise(groups * mose.experts * mose.rank, out),
        "weight": torch.rand(groups, generator=generator) + 0.5,
    }


def experts64(config: ModelConfig, tensors: dict[str, Tensor]) -> tuple[Array, Array]:
    """DESIGN 3.1 token by token in float64: y and the gates of each token's own group."""
    mose, groups = config.mose, len(config.groups)
    t = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    y, gates = t["base"].copy(), np.zeros(t["gates_in"].shape)
    a = t["a"].reshape(-1, mose.rank, t["x"].shape[-1])  # [1|G, R, d]
    gate = t["gate"].reshape(groups, mose.experts, -1)  # [G, E, d]
    b = t["b"].reshape(groups, mose.experts, mose.rank, -1)  # [G, E, R, d_out]
    for i in np.ndindex(t["group"].shape):
        m, x = int(t["group"][i]), t["x"][i]
        u = a[0 if mose.share_a else m] @ x
        s = t["gates_in"][i]
        if mose.route is Route.TOKEN:
            logits = gate[m] @ x
            s = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            if mose.select is Select.TOP1:
                s = np.eye(mose.experts)[logits.argmax()]
        gates[i] = s
        y[i] += mose.alpha / mose.rank * t["weight"][m] * sum(s[e] * (u @ b[m, e]) for e in range(mose.experts))
    return y, gates


@both
@every_choice
@pytest.mark.parametrize(
    ("groups", "experts", "rank", "sizes"),
    [
        (3, 1, 1, {"batch": 1, "rows": 1, "wide": 1, "out": 1}),
        (4, 3, 5, {"batch": 3, "rows": 7, "wide": 13, "out": 11}),
        (3, 2, 8, {"batch": 1, "rows": 40, "wide": 576, "out": 192}),
    ],
    ids=["smallest", "odd", "realistic"],
)
def test_it_is_the_formula(
    adapt: Adapt,
    select: Select,
    route: Route,
    share_a: bool,
    groups: int,
    experts: int,
    rank: int,
    sizes: dict[str, int],
) -> None:
    config = config_of(groups=groups, experts=experts, rank=rank, select=select, route=route, share_a=share_a)
    tensors = make(config, **sizes)
    for ours, theirs in zip(adapt(config, tensors), experts64(config, tensors), strict=True):
        assert_close(ours, theirs, "op")


@both
@every_choice
def test_alpha_0_is_the_backbone(adapt: Adapt, select: Select, route: Route, share_a: bool) -> None:
    config = config_of(alpha=0.0, select=select, route=route, share_a=share_a)
    tensors = make(config)
    assert adapt(config, tensors)[0].equal(tensors["base"])


@both
@every_choice
def test_permuting_experts_changes_nothing(adapt: Adapt, select: Select, route: Route, share_a: bool) -> None:
    config = config_of(experts=4, select=select, route=route, share_a=share_a)
    tensors, order = make(config), torch.tensor([2, 0, 3, 1])
    other = tensors | {
        "gate": tensors["gate"].unflatten(0, (3, 4))[:, order].flatten(0, 1),
        "b": tensors["b"].unflatten(0, (3, 4, -1))[:, order].flatten(0, 2),
        "gates_in": tensors["gates_in"][..., order].contiguous(),
    }
    (y, gates), (other_y, other_gates) = adapt(config, tensors), adapt(config, other)
    assert_close(other_y, y, "regrouped")
    assert_close(other_gates, gates[..., order], "regrouped")


@both
@every_choice
def test_a_group_of_weight_0_has_no_delta(adapt: Adapt, select: Select, route: Route, share_a: bool) -> None:
    config = config_of(select=select, route=route, share_a=share_a)
    tensors = make(config)
    tensors["weight"][0] = 0.0
    y, text = adapt(config, tensors)[0], tensors["group"] == 0
    assert y[text].equal(tensors["base"][text])
    assert (y[~text] != tensors["base"][~text]).any(-1).all()


@both
@pytest.mark.parametrize("route", Route)
def test_each_token_feels_its_own_groups_heads_alone(adapt: Adapt, route: Route) -> None:
    config = config_of(route=route, share_a=False)
    tensors = make(config)
    before = adapt(config, tensors)
    rows = {
        "a": config.mose.rank,
        "gate": config.mose.experts,
        "b": config.mose.experts * config.mose.rank,
        "weight": 1,
    }
    changed = {name: tensors[name].clone() for name in rows}
    for name, each in rows.items():
        changed[name][each : 2 * each] += 1.0  # those of video
    after = adapt(config, tensors | changed)
    video = tensors["group"] == 1
    assert after[0][~video].equal(before[0][~video]) and after[1][~video].equal(before[1][~video])
    assert (after[0][video] != before[0][video]).any(-1).all()


@both
def test_ties_take_the_first_expert(adapt: Adapt) -> None:
    config = config_of(experts=3, select=Select.TOP1)
    tensors = make(config, batch=1, rows=3, wide=1) | {"group": torch.tensor([[0, 1, 2]]).int()}
    tensors |= {"x": torch.ones(1, 3, 1), "gate": torch.tensor([-1.0, 2, 2, 3, 3, 3, 0, 0, 1])[:, None]}
    assert adapt(config, tensors)[1].argmax(-1).tolist() == [[1, 0, 2]]


def test_gates_of_the_whiteboard_are_weights() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, -1e4], [-torch.inf, 0.0, 1.0, 1.0]])
    assert gate_weights(logits, Select.SOFT).sum(-1).allclose(torch.ones(2))
    assert gate_weights(logits, Select.TOP1).tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]


class OneLinear(nn.Module):
    """What peft can inject its adapters into."""

    def __init__(self, wide: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(wide, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


def peft_lora(linear: Tensor, a: Tensor, b: Tensor, alpha: float, x: Tensor) -> Tensor:
    """peft's answer for W [d_out, d], A [R, d], B [d_out, R]."""
    module = OneLinear(linear.shape[1], linear.shape[0])
    config = LoraConfig(r=len(a), lora_alpha=alpha, target_modules=["linear"], lora_dropout=0.0)
    inject_adapter_in_model(config, module)
    state = {"base_layer.weight": linear, "lora_A.default.weight": a, "lora_B.default.weight": b}
    module.linear.load_state_dict(state)
    with torch.no_grad():
        y: Tensor = module.eval()(x)
    return y


@both
@every_choice
def test_equal_experts_are_plain_lora(adapt: Adapt, select: Select, route: Route, share_a: bool) -> None:
    """All B equal, all A equal, w = 1: the gate has no say."""
    config = config_of(experts=3, rank=4, alpha=6.0, select=select, route=route, share_a=share_a)
    tensors, linear = make(config), torch.randn(7, 10, generator=torch.Generator().manual_seed(1))
    a, b = tensors["a"][:4], tensors["b"][:4]
    tensors |= {"base": tensors["x"] @ linear.T, "weight": torch.ones(3), "b": b.repeat(9, 1)}
    tensors |= {"a": a if share_a else a.repeat(3, 1)}
    assert_close(adapt(config, tensors)[0], peft_lora(linear, a, b.T, 6.0, tensors["x"]), "op")


@both
@every_choice
def test_one_expert_is_one_lora_for_each_group(adapt: Adapt, select: Select, route: Route, share_a: bool) -> None:
    config = config_of(experts=1, rank=4, alpha=6.0, select=select, route=route, share_a=share_a)
    tensors, linear = make(config), torch.randn(7, 10, generator=torch.Generator().manual_seed(1))
    tensors |= {"base": tensors["x"] @ linear.T, "weight": torch.ones(3)}
    y, gates = adapt(config, tensors)
    for g in range(3):
        a = tensors["a"] if share_a else tensors["a"][4 * g : 4 * g + 4]
        own = tensors["group"] == g
        expected = peft_lora(linear, a, tensors["b"][4 * g : 4 * g + 4].T, 6.0, tensors["x"])
        assert_close(y[own], expected[own], "op")
    assert gates.equal(torch.ones_like(gates))


@settings(max_examples=40, deadline=None)
@given(
    select=st.sampled_from(Select),
    route=st.sampled_from(Route),
    share_a=st.booleans(),
    groups=st.sampled_from([3, 4]),
    experts=st.integers(1, 4),
    rank=st.integers(1, 5),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 2**31),
)
def test_any_call_is_the_formula(
    select: Select, route: Route, share_a: bool, groups: int, experts: int, rank: int,
    sizes: tuple[int, int, int, int], seed: int,
) -> None:  # fmt: skip
    config = config_of(groups=groups, experts=experts, rank=rank, select=select, route=route, share_a=share_a)
    batch, rows, wide, out = sizes
    tensors = make(config, batch=batch, rows=rows, wide=wide, out=out, seed=seed)
    tensors["base"] += 100.0  # that a delta which cancels it does not make the error look large
    expected = experts64(config, tensors)
    for adapt in (whiteboard, plain):
        y, gates = adapt(config, tensors)
        assert_close(gates.sum(-1), np.ones(gates.shape[:-1]), "op")
        assert_close(gates, expected[1], "op")
        assert_close(y, expected[0], "op")
