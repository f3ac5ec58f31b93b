"""The decode kernels against float64: any policy, element type, heads, lengths, groups, splits, and cache layout."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from decode_inputs import ACTIVE, POLICIES, assert_parity, make, paged, scale_of
from float64 import attention64
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep import sweep
from tolerance import assert_close
from torch import Tensor

from mosear.config import Policy, Statistic
from mosear.kernels.launch import run
from mosear.kernels.reallocated_attention.decode import MERGE, SPLIT
from mosear.kernels.reallocated_attention.decode_launches import Plan, choose_launch
from mosear.kernels.reallocated_attention.decode_run import decode_attention, empty_partials
from mosear.kernels.reallocated_attention.policy import AUDIO, VIDEO
from mosear.kernels.reallocated_attention.reference import reallocated_attention

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BALANCE = {"policy": Policy.BALANCE, "statistic": Statistic.SUM}


def call(tensors: Mapping[str, Tensor], **settings: Any) -> tuple[Tensor, Tensor, Tensor]:  # Any: the launcher's
    return decode_attention(**tensors, **({"scale": scale_of(tensors)} | BALANCE | settings))


def plan_of(tensors: Mapping[str, Tensor], *, splits: int, min_keys: int = 1, block_n: int = 16) -> Plan:
    """Small tiles, so that short caches have many splits."""
    query, key = tensors["query"], tensors["key"]
    plan = choose_launch(
        batch=len(query), heads=query.shape[1], kv_heads=key.shape[1], head_size=query.shape[-1],
        groups=tensors["group_bias"].shape[1], longest=key.shape[2], scale=scale_of(tensors), causal=True, arch=90, **BALANCE,
    )  # fmt: skip
    constants = dict(plan.split.constants) | {"MIN_KEYS": min_keys, "BLOCK_N": block_n}
    split = dataclasses.replace(plan.split, constants=constants, grid=(splits, key.shape[1], len(query)))
    return dataclasses.replace(plan, splits=splits, split=split)


# Smallest; odd lengths with empty splits; the demo's heads; LLaMA-2's head size; eight groups and eight heads to one.
SHAPES: dict[str, dict[str, Any]] = {
    "smallest": {"lengths": [1], "heads": 1, "kv_heads": 1},
    "odd": {"lengths": [67, 0, 129, 1], "heads": 6, "kv_heads": 2},
    "demo": {"lengths": [300], "heads": 9, "kv_heads": 3},
    "wide": {"lengths": [260, 131], "heads": 3, "kv_heads": 3, "size": 128},
    "many groups": {"lengths": [150, 77], "heads": 8, "kv_heads": 1, "groups": 8, "size": 128},
}


@pytest.mark.parametrize(
    ("shape", "dtype"),
    sweep(
        itertools.product(SHAPES, DTYPES),
        ("smallest", torch.float32), ("odd", torch.float32), ("wide", torch.float16), ("many groups", torch.bfloat16),
    ),
)  # fmt: skip
def test_it_is_the_formula(shape: str, dtype: torch.dtype) -> None:
    for at, (policy, statistic) in enumerate(POLICIES):
        assert_parity(make(**SHAPES[shape], dtype=dtype, seed=at), policy, statistic)


@pytest.mark.parametrize("dtype", sweep(DTYPES, torch.bfloat16), ids=str)
def test_16k_keys(dtype: torch.dtype) -> None:
    tensors = make([16384], heads=3, kv_heads=1, dtype=dtype)
    tensors["key_group"][0] = torch.repeat_interleave(
        torch.tensor([0, 1, 2, 1, 0]), torch.tensor([20, 258, 1, 1, 16104])
    )
    _, before, after = assert_parity(tensors, Policy.TARGET, Statistic.MEAN)
    assert (after[..., AUDIO] > 10 * before[..., AUDIO]).all()


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("policy", "statistic"), POLICIES)
@pytest.mark.parametrize("size", [64, 128])
def test_long_mixed_batches(policy: Policy, statistic: Statistic, dtype: torch.dtype, size: int) -> None:
    for heads, kv_heads, groups in ((7, 1, 4), (6, 3, 5), (2, 2, 3)):
        tensors = make([16384, 1, 4097, 9000], heads=heads, kv_heads=kv_heads, groups=groups, dtype=dtype, size=size)
        assert_parity(tensors, policy, statistic)


@pytest.mark.parametrize("page", sweep([16, 64, 48], 48))
def test_a_paged_cache_is_a_contiguous_one(page: int) -> None:
    """Pages smaller than a tile, equal to it, and of a size that is no power of two; the same tiles, so the same bits."""
    tensors = make([70, 0, 192], capacity=192)
    for ours, theirs in zip(call(paged(tensors, page)), call(tensors), strict=True):
        assert ours.equal(theirs)


def test_pages_in_bf16() -> None:
    tensors = make([130, 64], capacity=192, size=128, dtype=torch.bfloat16)
    assert_parity(tensors, Policy.TARGET, Statistic.SUM)
    for ours, theirs in zip(call(paged(tensors, 64)), call(tensors), strict=True):
        assert ours.equal(theirs)


def test_three_axes_are_four() -> None:
    tensors = make([40, 30])
    flat = tensors | {"query": tensors["query"][:, :, 0], "query_position": tensors["query_position"][:, 0]}
    for ours, theirs in zip(call(flat), call(tensors), strict=True):
        assert ours.shape == (2, 4, theirs.shape[-1]) and ours.equal(theirs[:, :, 0])


@pytest.mark.parametrize("splits", sweep([1, 7, 50], 7))
def test_any_number_of_splits_gives_the_same(splits: int) -> None:
    """Also more splits than keys, and more partials than a merge reads at once."""
    tensors = make([100, 3, 0], heads=2)
    expected = call(tensors)
    for min_keys in (1, 40) if splits < 50 else (1,):
        actual = call(tensors, plan=plan_of(tensors, splits=splits, min_keys=min_keys))
        for ours, theirs in zip(actual, expected, strict=True):
            assert_close(ours, theirs, "regrouped")


@pytest.mark.full
def test_longest_decides_the_splits_alone() -> None:
    tensors = make([300, 280], capacity=4096)
    for ours, theirs in zip(call(tensors, longest=300), call(tensors), strict=True):
        assert_close(ours, theirs, "regrouped")


@pytest.mark.parametrize(("policy", "statistic"), ACTIVE)
def test_the_order_of_keys_is_free(policy: Policy, statistic: Statistic) -> None:
    tensors = make([211])
    order = torch.randperm(211, generator=torch.Generator().manual_seed(1))
    shuffled = tensors | {n: tensors[n][:, :, order].contiguous() for n in ("key", "value")}
    shuffled["key_group"] = tensors["key_group"][:, order].contiguous()
    settings = {"policy": policy, "statistic": statistic}
    for ours, theirs in zip(call(shuffled, **settings), call(tensors, **settings), strict=True):
        assert_close(ours, theirs, "regrouped")


@pytest.mark.parametrize(("policy", "statistic"), sweep(ACTIVE, ACTIVE[-1]))
def test_a_decoded_row_is_that_row_of_prefill(policy: Policy, statistic: Statistic) -> None:
    """Row by row over a growing cache, against the whiteboard over all rows at once; first_row stays where it is."""
    rows, tensors = 4, make([40, 40])
    tensors |= {"first_row": torch.tensor([38, 0], dtype=torch.int32)}
    query = torch.randn(2, 4, rows, 64, generator=torch.Generator().manual_seed(5))
    position = torch.arange(36, 40, dtype=torch.int32).expand(2, -1)
    settings = {"policy": policy, "statistic": statistic, "scale": scale_of(tensors)}
    prefill = reallocated_attention(**tensors | {"query": query, "query_position": position}, **settings)  # type: ignore[arg-type]
    for row in range(rows):
        step = tensors | {
            "query": query[:, :, row : row + 1].contiguous(),
            "query_position": position[:, row].contiguous(),
        }
        for length in (37 + row, 40):  # keys behind the row are not seen, be they filled or not
            actual = call(step | {"key_length": torch.full((2,), length, dtype=torch.int32)}, **settings)
            for ours, theirs in zip(actual, prefill, strict=True):
                assert_close(ours, theirs[:, :, row : row + 1], "op")


def test_without_causality_a_row_sees_every_filled_key() -> None:
    tensors = make([90, 60])
    tensors["query_position"] = torch.tensor([3, -1], dtype=torch.int32)
    tensors["first_row"] = torch.zeros(2, dtype=torch.int32)
    whole = tensors | {"query_position": torch.tensor([89, -1], dtype=torch.int32)}
    for ours, theirs in zip(call(tensors, causal=False), call(whole), strict=True):
        assert ours.equal(theirs) and ours[0].any() and not ours[1].any()


@pytest.mark.parametrize(("policy", "statistic"), POLICIES)
def test_a_row_that_sees_no_key_is_zeros(policy: Policy, statistic: Statistic) -> None:
    tensors = make([30, 0, 20, 25])
    tensors["query_position"][2] = -1
    tensors["group_bias"][3] = -torch.inf
    for part in call(tensors, policy=policy, statistic=statistic):
        assert part.isfinite().all() and part[0].any() and not part[1:].any()


@pytest.mark.parametrize(("policy", "statistic"), sweep(ACTIVE, ACTIVE[0]))
def test_muting_a_group_is_leaving_its_keys_out(policy: Policy, statistic: Statistic) -> None:
    tensors = make([60], groups=4)
    settings = {"policy": policy, "statistic": statistic}
    for muted in range(4):
        rest = tensors["key_group"][0] != muted
        left = torch.tensor([rest.sum()], dtype=torch.int32)
        few = {n: tensors[n][:, :, rest].contiguous() for n in ("key", "value")}
        few |= {"key_group": tensors["key_group"][:, rest].contiguous(), "key_length": left, "query_position": left - 1}
        few["first_row"] = torch.zeros(1, dtype=torch.int32)
        bias = tensors["group_bias"].index_fill(1, torch.tensor([muted]), -torch.inf)
        actual = call(tensors | {"group_bias": bias, "first_row": few["first_row"]}, **settings)
        for ours, theirs in zip(actual, call(tensors | few, **settings), strict=True):
            assert_close(ours, theirs, "op")
        louder = {n: torch.where(rest[:, None], tensors[n], 3 - 5 * tensors[n]) for n in ("key", "value")}
        for ours, same in zip(
            actual, call(tensors | louder | {"group_bias": bias, "first_row": few["first_row"]}, **settings)
        ):
            assert ours.equal(same)  # what a muted key holds changes no bit


def test_strength_0_without_bias_is_softmax_attention() -> None:
    tensors = make([70, 70]) | {"strength": torch.zeros(2), "group_bias": torch.zeros(2, 3)}
    output, before, after = call(tensors)
    expected = torch.nn.functional.scaled_dot_product_attention(
        tensors["query"], tensors["key"], tensors["value"], enable_gqa=True
    )
    assert_close(output, expected, "op")
    assert after.equal(before) and not call(tensors | {"strength": torch.ones(2)})[2].equal(before)


def test_only_rows_from_first_row_on_change() -> None:
    tensors = make([50, 50]) | {"strength": torch.ones(2), "first_row": torch.tensor([50, 49], dtype=torch.int32)}
    _, before, after = call(tensors)
    assert after[0].equal(before[0]) and not after[1].equal(before[1])


def test_settings_are_each_requests_own() -> None:
    """A batch is its requests alone: lengths, strengths, biases, first_row and ids mix."""
    tensors = make([120, 0, 33, 7, 90])
    together = call(tensors)
    for b in range(5):
        alone = {n: t if n == "policy_params" else t[b : b + 1].clone() for n, t in tensors.items()}
        for ours, theirs in zip(call(alone), together, strict=True):
            assert_close(ours, theirs[b : b + 1], "regrouped")


GAPS = (0.0, 10.0, 30.0, 60.0, 88.0, 100.0)


@pytest.mark.parametrize(("low", "dtype"), sweep(itertools.product((VIDEO, AUDIO), DTYPES), (AUDIO, torch.float16)))
def test_a_group_far_below_is_raised_whole(low: int, dtype: torch.dtype) -> None:
    """Where one group's logits lie up to 100 below the others', its raised mass and its share of the output are right."""
    for policy, statistic in ACTIVE:
        tensors = make([90], dtype=dtype) | {"strength": torch.ones(1), "group_bias": torch.zeros(1, 3)}
        tensors |= {"first_row": torch.zeros(1, dtype=torch.int32)}
        tensors["policy_params"][:, 6] = 0.001  # sigma
        tensors["query"] = torch.cat([torch.full((1, 4, 1, 1), 8.0), 0.3 * tensors["query"][..., 1:]], -1).to(dtype)
        for gap in GAPS:
            tensors["key"][..., 0] = torch.where(tensors["key_group"] == low, -gap, 0.0)[:, None].to(dtype)
            kind = "far" if dtype == torch.float32 else ""
            _, _, after = assert_parity(tensors, policy, statistic, kind=kind)
            expected = attention64(**tensors, policy=policy, statistic=statistic, scale=scale_of(tensors))[2]
            assert expected[..., low].min() > 0.02
            assert_close(after.numpy() / expected, np.ones_like(expected), "far")


def test_every_result_is_written_and_what_no_split_saw_is_not() -> None:
    """Poisoned workspace and outputs: a partial is written where its group was seen, and read nowhere else."""
    tensors = make([100, 0, 20]) | {"query_position": torch.tensor([99, -1, 19], dtype=torch.int32)}
    tensors["key_group"][0] = torch.tensor([0] * 50 + [2] * 50)
    expected, plan = call(tensors, values_checked=True), plan_of(tensors, splits=4)
    heads = (4, 2, 100, plan.splits)
    acc, top, total, count = empty_partials(tensors["query"], splits=plan.splits, groups=3)
    acc.fill_(torch.nan), top.fill_(torch.nan), total.fill_(torch.nan), count.fill_(-9)
    cache = [tensors[n] for n in ("query", "key", "value", "key_group", "query_position", "key_length")]
    run(SPLIT, plan.split, cache, heads, (acc, top, total, count))
    assert not top.isnan().any() and total.isfinite().all() and (count >= 0).all()
    assert count.sum((1, 2)).tolist() == [100, 0, 20]
    written = ~acc.isnan().any(-1)  # [B, H, splits, G]
    assert written.equal((count > 0)[:, None].expand_as(written)) and acc.isnan().all(-1).equal(~written)
    outputs = [torch.full_like(t, torch.nan) for t in expected]
    given_ = [tensors[n] for n in ("query_position", "first_row", "policy_params", "strength", "group_bias")]
    run(MERGE, plan.merge, (acc, top, total, count, *given_), (4, plan.splits), outputs)
    for ours, theirs in zip(outputs, expected, strict=True):
        assert_close(ours, theirs, "regrouped")


ANY_CALL = given(
    policy=st.sampled_from(POLICIES), lengths=st.lists(st.integers(0, 90), min_size=1, max_size=2),
    heads=st.sampled_from([(1, 1), (6, 2), (5, 1)]), groups=st.integers(3, 5), muted=st.sets(st.integers(0, 4)),
    runs=st.booleans(), splits=st.integers(1, 6), factor=st.sampled_from([0.0, 1.0, 6.0]), page=st.sampled_from([0, 8, 32]),
    seed=st.integers(0, 2**31),
)  # fmt: skip


def keeps_the_laws(
    policy: tuple[Policy, Statistic], lengths: list[int], heads: tuple[int, int], groups: int, muted: set[int], runs: bool,
    splits: int, factor: float, page: int, seed: int,
) -> None:  # fmt: skip
    tensors = make(lengths, heads=heads[0], kv_heads=heads[1], groups=groups, capacity=96, seed=seed)
    tensors["query"] *= factor
    if runs:
        tensors["key_group"] = torch.where(tensors["key_group"] == 77, 77, tensors["key_group"].sort(1).values).int()
        tensors["key_group"].masked_fill_(torch.arange(96) >= tensors["key_length"][:, None], 77)
    tensors["group_bias"][0, [g for g in muted if g < groups]] = -torch.inf
    output, before, after = assert_parity(tensors, *policy, kind="far")
    seen = before.sum(-1) > 0
    for masses in (before, after):
        assert (masses > -1e-6).all()
        assert_close(masses.sum(-1) + 1, seen + 1.0, "op")
    kept = [g for g in range(groups) if g not in (VIDEO, AUDIO)]
    assert after[..., kept].equal(before[..., kept]) and not output[~seen].any()
    plan = plan_of(tensors, splits=splits)
    merge = dict(plan.merge.constants) | {"POLICY": 1, "STATISTIC": 1}
    plan = dataclasses.replace(plan, merge=dataclasses.replace(plan.merge, constants=merge))
    expected = call(tensors, policy=Policy.BALANCE, statistic=Statistic.MEAN)
    for ours, theirs in zip(call(tensors, plan=plan), expected, strict=True):
        assert_close(ours, theirs, "far")
    if page:
        for ours, theirs in zip(call(paged(tensors, page), longest=90), call(tensors, longest=90), strict=True):
            assert ours.equal(theirs)


@settings(max_examples=4, deadline=None)
@ANY_CALL
def test_any_call_keeps_the_laws(**drawn: Any) -> None:  # Any: what ANY_CALL says
    keeps_the_laws(**drawn)


@pytest.mark.full
@settings(max_examples=60, deadline=None)
@ANY_CALL
def test_many_calls_keep_the_laws(**drawn: Any) -> None:  # Any: what ANY_CALL says
    keeps_the_laws(**drawn)
