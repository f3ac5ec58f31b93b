"""Reallocated attention, on the whiteboard and as a plain ONNX function, against probabilities materialised in float64."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tolerance import assert_close, clear_rows
from torch import Tensor
from toy import AR, GROUPED, plain_op, toy_config

from mosear.config import ModelConfig, Policy, Statistic
from mosear.contract import AR_PARAMS
from mosear.kernels.reallocated_attention.policy import AUDIO, VIDEO, params
from mosear.kernels.reallocated_attention.reference import reallocated_attention, visibility
from mosear_export.ops import ATTENTION, ATTENTION_INPUTS

TEXT = 0
GROUP_NAMES = ("text", "video", "audio", "sink")
POLICIES = (
    (Policy.OFF, Statistic.SUM),
    (Policy.BALANCE, Statistic.SUM),
    (Policy.BALANCE, Statistic.MEAN),
    (Policy.TARGET, Statistic.SUM),
)
ACTIVE = POLICIES[1:]
Array = NDArray[np.float64]
Masses = tuple[Tensor, Tensor, Tensor]
Attend = Callable[..., Masses]


def config_of(policy: Policy, statistic: Statistic, *, groups: int = 3, **shape: Any) -> ModelConfig:
    """A toy whose attention has this policy and shape; `shape` changes the backbone's."""
    ar = dataclasses.replace(AR, policy=policy, statistic=statistic)
    return toy_config(ar=ar, groups=GROUP_NAMES[:groups], backbone=dataclasses.replace(GROUPED, **shape))


def whiteboard(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Masses:
    return reallocated_attention(
        **tensors, policy=config.ar.policy, statistic=config.ar.statistic, scale=config.backbone.head_size**-0.5
    )


def plain(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Masses:
    output, before, after = plain_op(config, ATTENTION)(*(tensors[name] for name in ATTENTION_INPUTS))
    return output, before, after


both = pytest.mark.parametrize("attend", [whiteboard, plain])


def make(config: ModelConfig, *, batch: int, rows: int, capacity: int, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs: the last `rows` of sequences of different lengths, a padding row at the end of every second one."""
    generator, shape = torch.Generator().manual_seed(seed), config.backbone
    length = capacity - torch.arange(batch).clamp(max=capacity - rows)
    position = length[:, None] - rows + torch.arange(rows)
    if rows > 1:
        position[1::2, -1] = -1
    cached = (batch, shape.kv_heads, capacity, shape.head_size)
    spread = torch.rand(shape.heads, len(AR_PARAMS), generator=generator)
    least = torch.tensor([0.4, 0.4, 0.1, 0.1, 0.3, 0.3, 0.0, 0.2])
    most = torch.tensor([0.6, 0.6, 0.3, 0.3, 1.0, 1.0, 0.3, 0.8])
    return {
        "query": 2 * torch.randn(batch, shape.heads, rows, shape.head_size, generator=generator),
        "key": torch.randn(cached, generator=generator),
        "value": torch.randn(cached, generator=generator),
        "key_group": torch.randint(0, len(config.groups), (batch, capacity), generator=generator, dtype=torch.int32),
        "query_position": position.int(),
        "key_length": length.int(),
        "first_row": (length - rows // 2 - 1).int(),
        "policy_params": least + spread * (most - least),
        "strength": torch.rand(batch, generator=generator),
        "group_bias": 0.5 * torch.randn(batch, len(config.groups), generator=generator),
    }


def decode(config: ModelConfig, *, batch: int = 2, capacity: int = 23, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of one row that sees every key."""
    tensors = make(config, batch=batch, rows=1, capacity=capacity, seed=seed)
    whole = torch.full((batch,), capacity, dtype=torch.int32)
    return tensors | {"query_position": whole[:, None] - 1, "key_length": whole, "first_row": torch.zeros_like(whole)}


def attention64(
    tensors: Mapping[str, Tensor], *, policy: Policy, statistic: Statistic, scale: float, hidden: int | None = None
) -> tuple[Array, Array, Array]:
    """DESIGN 3.2 row by row: output, masses before, masses after. Nobody sees the keys of the group `hidden`."""
    query, key, value, key_group, position, length, first_row, table, strength, bias = (
        tensors[name].double().numpy() for name in ATTENTION_INPUTS
    )
    batch, heads, rows, _ = query.shape
    output, before = np.zeros(query.shape), np.zeros((batch, heads, rows, bias.shape[1]))
    after = before.copy()
    for b, h, s in np.ndindex(batch, heads, rows):
        k, v = (x[b, h * x.shape[1] // heads] for x in (key, value))
        kinds = key_group[b].astype(int)
        shown = (kinds != hidden) & (bias[b, kinds] > -np.inf)
        seen = [j for j in range(len(k)) if j < length[b] and j <= position[b, s] and shown[j]]
        if not seen:
            continue
        group = kinds[seen]
        logits = k[seen] @ query[b, h, s] * scale + bias[b, group]
        p = np.exp(logits - logits.max())
        p /= p.sum()
        m = np.bincount(group, weights=p, minlength=bias.shape[1])
        n = np.bincount(group, minlength=bias.shape[1])
        moved = m.copy()
        if position[b, s] >= first_row[b]:
            pi = at_full_strength(m, n, dict(zip(AR_PARAMS, table[h], strict=True)), policy, statistic)
            moved = m + strength[b] * (pi - m)
        output[b, h, s] = (p * moved[group] / m[group]) @ v[seen]
        before[b, h, s], after[b, h, s] = m, moved
    return output, before, after


def at_full_strength(m: Array, n: Array, row: Mapping[str, float], policy: Policy, statistic: Statistic) -> Array:
    """The policies in words of kernels/reallocated_attention/policy.py, one row of masses m [G] and key counts n [G]."""
    moved, total = m.copy(), m[VIDEO] + m[AUDIO]
    if policy is Policy.OFF or n[VIDEO] == 0 or n[AUDIO] == 0:
        return moved
    if policy is Policy.TARGET:
        moved[AUDIO] += row["move_audio"] * (row["audio_share"] * total - m[AUDIO])
        moved[VIDEO] = total - moved[AUDIO]
        return moved
    if total < row["sigma"]:
        return moved
    s = m / np.maximum(n, 1) if statistic is Statistic.MEAN else m
    for name, giver, taker in (("video", VIDEO, AUDIO), ("audio", AUDIO, VIDEO)):
        share = s[giver] / (s[VIDEO] + s[AUDIO])
        ramp = min(max((share - row[f"tau_{name}"]) / row[f"ramp_{name}"], 0.0), 1.0)
        given = row[f"move_{name}"] * ramp * m[giver]
        moved[giver] -= given
        moved[taker] += given
    return moved


def assert_parity(config: ModelConfig, tensors: Mapping[str, Tensor], actual: Masses, kind: str = "op") -> None:
    """Output and masses against attention64, but for rows that lie at a head's jump."""
    expected = attention64(
        tensors, policy=config.ar.policy, statistic=config.ar.statistic, scale=config.backbone.head_size**-0.5
    )
    sigma = tensors["policy_params"][:, AR_PARAMS.index("sigma")].double().numpy()[None, :, None]
    clear = clear_rows(expected[1][..., [VIDEO, AUDIO]].sum(-1) - sigma, 0.0)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours.numpy()[clear], theirs[clear], kind)


# Smallest, odd, the demo's heads over a cache that is not full.
SHAPES = {
    "smallest": ({"heads": 1, "kv_heads": 1, "head_size": 2}, {"batch": 1, "rows": 1, "capacity": 1}),
    "odd": ({"heads": 3, "kv_heads": 1, "head_size": 6}, {"batch": 3, "rows": 7, "capacity": 13}),
    "realistic": ({"heads": 9, "kv_heads": 3, "head_size": 64}, {"batch": 2, "rows": 33, "capacity": 90}),
}


@both
@pytest.mark.parametrize("groups", [3, 4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("policy", "statistic"), POLICIES)
def test_it_is_the_formula(attend: Attend, policy: Policy, statistic: Statistic, shape: str, groups: int) -> None:
    backbone, sizes = SHAPES[shape]
    config = config_of(policy, statistic, groups=groups, **backbone)
    tensors = make(config, **sizes)
    assert_parity(config, tensors, attend(config, tensors))


@both
@pytest.mark.parametrize(("policy", "statistic"), POLICIES)
def test_strength_0_without_bias_is_softmax_attention(attend: Attend, policy: Policy, statistic: Statistic) -> None:
    config = config_of(policy, statistic)
    tensors = make(config, batch=3, rows=6, capacity=11)
    tensors |= {"strength": torch.zeros(3), "group_bias": torch.zeros(3, 3)}
    where = (tensors[name] for name in ("key_group", "query_position", "key_length", "group_bias"))
    mask = visibility(*where, causal=True)[:, None]  # [B, 1, S, L]
    keys, values = (tensors[name].repeat_interleave(3, 1) for name in ("key", "value"))
    expected = F.scaled_dot_product_attention(tensors["query"], keys, values, attn_mask=mask)
    output, before, after = attend(config, tensors)
    live = tensors["query_position"] >= 0  # [B, S]
    assert_close(output.mT.transpose(1, 3)[live], expected.mT.transpose(1, 3)[live], "op")
    assert after.equal(before)


@both
@pytest.mark.parametrize(("policy", "statistic"), ACTIVE)
def test_muting_a_group_is_leaving_its_keys_out(attend: Attend, policy: Policy, statistic: Statistic) -> None:
    config = config_of(policy, statistic, groups=4)
    tensors = decode(config, batch=1)
    for muted in range(4):
        rest = tensors["key_group"][0] != muted
        left = torch.tensor([rest.sum()], dtype=torch.int32)
        few = tensors | {"key": tensors["key"][:, :, rest], "value": tensors["value"][:, :, rest]}
        few |= {"key_group": tensors["key_group"][:, rest], "key_length": left, "query_position": left[:, None] - 1}
        bias = tensors["group_bias"].index_fill(1, torch.tensor([muted]), -torch.inf)
        actual = attend(config, tensors | {"group_bias": bias})
        for ours, theirs in zip(actual, attend(config, few), strict=True):
            assert_close(ours, theirs, "op")
        assert not actual[1][..., muted].any() and not actual[2][..., muted].any()


@both
@pytest.mark.parametrize(("policy", "statistic"), POLICIES)
def test_what_a_muted_key_holds_changes_no_bit(attend: Attend, policy: Policy, statistic: Statistic) -> None:
    config = config_of(policy, statistic)
    tensors = make(config, batch=2, rows=8, capacity=12)
    tensors["group_bias"][:, AUDIO] = -torch.inf
    audio = (tensors["key_group"] == AUDIO)[:, None, :, None]
    other = tensors | {name: torch.where(audio, -3 * tensors[name] + 5, tensors[name]) for name in ("key", "value")}
    for ours, theirs in zip(attend(config, tensors), attend(config, other), strict=True):
        assert ours.equal(theirs)


@both
@pytest.mark.parametrize(("policy", "statistic"), ACTIVE)
def test_a_decoded_row_does_not_feel_the_order_of_keys(attend: Attend, policy: Policy, statistic: Statistic) -> None:
    config = config_of(policy, statistic)
    tensors = decode(config)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    shuffled = tensors | {"key": tensors["key"][:, :, order], "value": tensors["value"][:, :, order]}
    shuffled["key_group"] = tensors["key_group"][:, order]
    for ours, theirs in zip(attend(config, shuffled), attend(config, tensors), strict=True):
        assert_close(ours, theirs, "regrouped")


@both
@pytest.mark.parametrize(("policy", "statistic"), ACTIVE)
def test_row_by_row_is_one_full_pass(attend: Attend, policy: Policy, statistic: Statistic) -> None:
    config = config_of(policy, statistic)
    tensors = make(config, batch=2, rows=9, capacity=9)
    tensors |= {"query_position": torch.arange(9, dtype=torch.int32).expand(2, -1).contiguous()}
    tensors |= {"key_length": torch.full((2,), 9, dtype=torch.int32), "first_row": torch.tensor([3, 7]).int()}
    full = attend(config, tensors)
    for row in range(9):
        step = {"query": tensors["query"][:, :, row : row + 1], "query_position": torch.full((2, 1), row).int()}
        single = attend(config, tensors | step | {"key_length": torch.full((2,), row + 1).int()})
        for ours, theirs in zip(single, full, strict=True):
            assert_close(ours, theirs[:, :, row : row + 1], "regrouped")


@both
@pytest.mark.parametrize(("policy", "statistic"), POLICIES)
def test_a_row_that_sees_no_key_is_zeros(attend: Attend, policy: Policy, statistic: Statistic) -> None:
    config = config_of(policy, statistic)
    tensors = make(config, batch=3, rows=4, capacity=6) | {"first_row": torch.zeros(3).int()}
    tensors["query_position"][0] = torch.tensor([2, 3, -1, -1])  # two padding rows
    tensors["key_length"][1] = 0  # nothing in the cache
    tensors["group_bias"][2] = -torch.inf  # everything muted
    for part in attend(config, tensors):
        assert part[0, :, :2].any(-1).all() and not part[0, :, 2:].any() and not part[1:].any()
        assert part.isfinite().all()


@pytest.mark.parametrize(("policy", "statistic"), POLICIES)
def test_without_causality_a_row_sees_every_filled_key(policy: Policy, statistic: Statistic) -> None:
    """The whiteboard alone: a decoder is causal, its plain flavour too."""
    config = config_of(policy, statistic)
    tensors = make(config, batch=2, rows=6, capacity=12) | {"first_row": torch.zeros(2).int()}
    live = tensors["query_position"] >= 0  # [B, S]
    last = torch.where(live, tensors["key_length"][:, None] - 1, -1)
    expected = whiteboard(config, tensors | {"query_position": last})
    actual = reallocated_attention(**tensors, policy=policy, statistic=statistic, scale=8**-0.5, causal=False)
    assert not live.all()
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.equal(theirs) and not ours.transpose(1, 2)[~live].any()


@both
@pytest.mark.parametrize(("policy", "statistic"), ACTIVE)
def test_rows_before_first_row_keep_their_masses(attend: Attend, policy: Policy, statistic: Statistic) -> None:
    config = config_of(policy, statistic)
    tensors = make(config, batch=2, rows=12, capacity=12) | {"first_row": torch.tensor([5, 12]).int()}
    tensors |= {"query_position": torch.arange(12).expand(2, -1).int().contiguous(), "strength": torch.ones(2)}
    tensors["policy_params"][:] = params(config.ar, layer=0, heads=6)
    output, before, after = attend(config, tensors)
    moved = (after != before).any(-1).any(1)  # [B, S]: in at least one head
    assert not moved[0, :5].any() and moved[0, 5:].any() and not moved[1].any()
    off = attend(config, tensors | {"strength": torch.zeros(2)})[0]
    assert output[0, :, :5].equal(off[0, :, :5]) and output[1].equal(off[1]) and not output.equal(off)


@both
@pytest.mark.parametrize(("policy", "statistic"), ACTIVE)
def test_strength_and_bias_are_each_requests_own(attend: Attend, policy: Policy, statistic: Statistic) -> None:
    config = config_of(policy, statistic)
    one = make(config, batch=1, rows=5, capacity=10)
    settings_of = {
        "strength": torch.tensor([0.0, 0.4, 1.0, 1.0]),
        "group_bias": torch.tensor([[0.0, 0, 0], [0, 0, 0], [0, 0, 0], [0, -torch.inf, 1]]),
    }
    shared = {n: t if n == "policy_params" else t.expand(4, *t.shape[1:]).contiguous() for n, t in one.items()}
    output, before, after = attend(config, shared | settings_of)
    for b in range(4):
        alone = attend(config, one | {name: tensor[b : b + 1] for name, tensor in settings_of.items()})
        for ours, theirs in zip((output, before, after), alone, strict=True):
            assert_close(ours[b : b + 1], theirs, "regrouped")
    assert_close(after[1] - before[1], 0.4 * (after[2] - before[2]), "op")  # m' is linear in strength


@both
def test_balance_moves_mass_from_the_stronger_to_the_weaker(attend: Attend) -> None:
    config = config_of(Policy.BALANCE, Statistic.SUM)
    tensors = decode(config, batch=1, capacity=9) | {"strength": torch.ones(1), "group_bias": torch.zeros(1, 3)}
    tensors["query"][:] = 0.0  # every key has the same mass, 1/9
    tensors["policy_params"][:] = params(config.ar, layer=0, heads=6)  # tau 0.55, ramp 0.3, move 0.8
    cases = {  # keys of (text, video, audio): mass that goes from audio to video
        (2, 1, 6): (6 / 9) * 0.8 * 1.0,  # audio's share 0.857 is past the ramp
        (0, 3, 6): (6 / 9) * 0.8 * (6 / 9 - 0.55) / 0.3,  # on the ramp
        (1, 5, 3): -(5 / 9) * 0.8 * (5 / 8 - 0.55) / 0.3,  # video gives
        (1, 4, 4): 0.0,
        (3, 0, 6): 0.0,  # one of them is not there
        (3, 6, 0): 0.0,
    }
    for counts, flow in cases.items():
        groups = torch.repeat_interleave(torch.arange(3), torch.tensor(counts)).int()[None]
        _, before, after = attend(config, tensors | {"key_group": groups})
        assert_close(before[0, 0, 0], torch.tensor(counts) / 9, "op")
        moved = torch.tensor([0, flow, -flow])
        assert_close(after[0, 0, 0], torch.tensor(counts) / 9 + moved, "op")


@both
def test_the_mean_statistic_compares_mass_per_key(attend: Attend) -> None:
    """Six keys of audio against one of video, each with the same mass: nothing is unbalanced."""
    config = config_of(Policy.BALANCE, Statistic.MEAN)
    tensors = decode(config, batch=1, capacity=7) | {"strength": torch.ones(1), "group_bias": torch.zeros(1, 3)}
    tensors |= {"key_group": torch.tensor([[1, 2, 2, 2, 2, 2, 2]]).int(), "query": torch.zeros(1, 6, 1, 8)}
    tensors["policy_params"][:] = params(config.ar, layer=0, heads=6)
    _, before, after = attend(config, tensors)
    assert after.equal(before)
    tensors["group_bias"][0, AUDIO] = 2.0  # e^2 per key against 1: a share of 0.88
    _, before, after = attend(config, tensors)
    assert_close(after[..., AUDIO], 0.2 * before[..., AUDIO], "op")


@both
def test_balance_leaves_rows_that_hardly_look_at_either(attend: Attend) -> None:
    config = config_of(Policy.BALANCE, Statistic.SUM)
    tensors = decode(config, batch=2, capacity=10) | {"strength": torch.ones(2)}
    tensors |= {"query": torch.zeros(2, 6, 1, 8), "key_group": torch.tensor([[0] * 7 + [1, 2, 2]] * 2).int()}
    tensors["policy_params"][:] = params(config.ar, layer=0, heads=6)  # sigma 0.02
    tensors["group_bias"] = torch.log(
        torch.tensor([[1.0, 0.049, 0.049], [1.0, 0.046, 0.046]])
    )  # m_a + m_v 0.0206, 0.0193
    _, before, after = attend(config, tensors)
    assert (after[0] != before[0]).any() and after[1].equal(before[1])


@both
def test_target_gives_audio_its_share(attend: Attend) -> None:
    config = config_of(Policy.TARGET, Statistic.SUM, groups=4)
    tensors = make(config, batch=2, rows=6, capacity=20) | {
        "strength": torch.ones(2),
        "first_row": torch.zeros(2).int(),
    }
    tensors["policy_params"][:, AR_PARAMS.index("move_audio")] = 1.0
    share = tensors["policy_params"][:, AR_PARAMS.index("audio_share")][None, :, None]
    _, before, after = attend(config, tensors)
    live = (before[..., VIDEO] > 0) & (before[..., AUDIO] > 0)
    assert live.any()
    pair = before[..., VIDEO] + before[..., AUDIO]
    assert_close(after[..., AUDIO][live], (share * pair)[live], "op")


GAPS = (0.0, 1.0, 10.0, 30.0, 60.0, 80.0, 87.0, 88.0, 89.0, 95.0, 100.0)


@both
@pytest.mark.parametrize("low", [VIDEO, AUDIO])
@pytest.mark.parametrize(("policy", "statistic"), ACTIVE)
def test_a_group_far_below_is_raised_whole(attend: Attend, low: int, policy: Policy, statistic: Statistic) -> None:
    """Where one group's logits lie up to 100 below the others', its raised mass and its share of the output are right."""
    config = config_of(policy, statistic)
    tensors = decode(config, batch=1, capacity=30) | {"strength": torch.ones(1), "group_bias": torch.zeros(1, 3)}
    tensors["policy_params"][:, AR_PARAMS.index("sigma")] = 0.001
    tensors["query"] = torch.cat([torch.full((1, 6, 1, 1), 8**0.5), 0.3 * tensors["query"][..., 1:]], -1)
    for gap in GAPS:
        tensors["key"][..., 0] = torch.where(tensors["key_group"] == low, -gap, 0.0)[:, None]
        actual = attend(config, tensors)
        assert_parity(config, tensors, actual, "far")
        _, _, expected = attention64(tensors, policy=policy, statistic=statistic, scale=8**-0.5)
        assert expected[..., low].min() > 0.02
        assert_close(actual[2].numpy() / expected, np.ones_like(expected), "far")


@both
@pytest.mark.parametrize(("policy", "statistic"), ACTIVE)
def test_both_far_below_stay_finite_and_in_ratio(attend: Attend, policy: Policy, statistic: Statistic) -> None:
    config = config_of(policy, statistic)
    tensors = decode(config, batch=1, capacity=30) | {"strength": torch.ones(1), "group_bias": torch.zeros(1, 3)}
    tensors["policy_params"][:] = params(config.ar, layer=0, heads=6)
    tensors["policy_params"][:, AR_PARAMS.index("sigma")] = 1e-45
    tensors["query"] = torch.cat([torch.full((1, 6, 1, 1), 8**0.5), 0.3 * tensors["query"][..., 1:]], -1)
    for gap in GAPS:
        tensors["key"][..., 0] = torch.where(tensors["key_group"] != TEXT, -gap, 0.0)[:, None]
        actual = attend(config, tensors)
        expected = attention64(tensors, policy=policy, statistic=statistic, scale=8**-0.5)
        assert all(part.isfinite().all() for part in actual)
        assert_close(actual[0], expected[0], "far")
        if gap <= 80:  # below that fp32 holds such masses with ever fewer digits
            assert_close(actual[2].numpy() / expected[2], np.ones_like(expected[2]), "far")


def test_layers_without_reallocation_move_nothing() -> None:
    ar = dataclasses.replace(AR, layers=(1, 3))
    table = torch.stack([params(ar, layer=layer, heads=2) for layer in range(4)])
    move = table[..., [AR_PARAMS.index("move_video"), AR_PARAMS.index("move_audio")]]
    assert not move[[0, 2]].any() and move[[1, 3]].eq(torch.tensor(0.8)).all()
    assert params(AR, layer=2, heads=2).equal(table[1])  # an empty list means every layer
    row = dict(zip(AR_PARAMS, table[1, 0].tolist(), strict=True))
    assert row["tau_video"] == pytest.approx(1 - ar.tau_lo) and row["tau_audio"] == pytest.approx(ar.tau_hi)


@settings(max_examples=40, deadline=None)
@given(
    policy=st.sampled_from(POLICIES),
    groups=st.sampled_from([3, 4]),
    heads=st.sampled_from([(1, 1), (4, 2)]),
    batch=st.integers(1, 3),
    rows=st.integers(1, 6),
    earlier=st.integers(0, 9),
    muted=st.sets(st.integers(0, 3)),
    scale=st.sampled_from([0.0, 1.0, 5.0]),
    seed=st.integers(0, 2**31),
)
def test_any_call_keeps_the_laws(
    policy: tuple[Policy, Statistic], groups: int, heads: tuple[int, int], batch: int, rows: int, earlier: int,
    muted: set[int], scale: float, seed: int,
) -> None:  # fmt: skip
    config = config_of(*policy, groups=groups, heads=heads[0], kv_heads=heads[1])
    tensors = make(config, batch=batch, rows=rows, capacity=rows + earlier, seed=seed)
    tensors["query"] *= scale
    tensors["group_bias"][0, [g for g in muted if g < groups]] = -torch.inf
    where = (tensors[name] for name in ("key_group", "query_position", "key_length", "group_bias"))
    seen = visibility(*where, causal=True).any(-1)[:, None].expand(-1, heads[0], -1)  # [B, H, S]
    for attend in (whiteboard, plain):
        output, before, after = attend(config, tensors)
        for masses in (before, after):
            assert (masses > -1e-6).all()
            assert_close(masses.sum(-1) + 1, seen + 1.0, "op")
        kept = [g for g in range(groups) if g not in (VIDEO, AUDIO)]
        assert after[..., kept].equal(before[..., kept])
        assert not output[~seen].any()
        assert_parity(config, tensors, (output, before, after), "far")
