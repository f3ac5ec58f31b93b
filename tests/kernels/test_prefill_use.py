"""What the prefill launcher refuses and chooses: each error names its argument and its limit."""

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from decode_inputs import scale_of, shifted
from hypothesis import given, settings
from hypothesis import strategies as st
from prefill_inputs import make, plan_of, runs_of
from torch import Tensor

from mosear.config import Policy, Statistic
from mosear.errors import ConfigError, KernelError
from mosear.kernels.chips import ARCHS
from mosear.kernels.reallocated_attention.arguments import HEAD_SIZES
from mosear.kernels.reallocated_attention.launches import (
    MOST_MIXED,
    TABLE,
    Kernel,
    cases,
    choose_kernel,
    choose_launch,
    row_for,
)
from mosear.kernels.reallocated_attention.models import usual_layout
from mosear.kernels.reallocated_attention.prefill_run import reallocated_attention_prefill
from mosear.kernels.reallocated_attention.runs import MIXED, find_runs, mixed_share, tile_groups

EMOTION_LLAMA = ((20, 0), (258, 1), (1, 2), (1, 1), (120, 0))


def call(tensors: Mapping[str, Tensor], **settings: Any) -> tuple[Tensor, Tensor, Tensor]:  # Any: the launcher's
    given_: dict[str, Any] = {"policy": Policy.BALANCE, "statistic": Statistic.SUM, "scale": 0.125}
    return reallocated_attention_prefill(**tensors, **given_ | settings)


def small(**shape: Any) -> dict[str, Tensor]:
    return make([12, 9], rows=3, heads=2, kv_heads=1, **shape)


SHAPES: dict[str, tuple[str, Any, str]] = {
    "no row axis": ("query", lambda t: t[:, :, 0], r"query is .*: it must be \[B, H, S, D\]"),
    "fp64": ("query", lambda t: t.double(), "query is torch.float64"),
    "head size": ("query", lambda t: t[..., :32].contiguous(), "head size 32: prefill attention serves 64 and 128"),
    "meta device": ("query", lambda t: t.to("meta"), "query is on meta"),
    "query strides": ("query", lambda t: t.repeat(1, 1, 1, 2)[..., ::2], "query has strides"),
    "key dtype": ("key", lambda t: t.half(), "key is torch.float16: it must be torch.float32"),
    "key axes": ("key", lambda t: t[0], "key is"),
    "three heads to two": ("key", lambda t: t.repeat(1, 3, 1, 1), "2 heads are a multiple of K"),
    "key size": ("key", lambda t: t[..., :32].contiguous(), "key is"),
    "key strides": ("key", lambda t: t.mT.contiguous().mT, "key has strides"),
    "key device": ("key", lambda t: t.to("meta"), "key is on meta"),
    "key address": ("key", shifted, "key begins at an address that is no multiple of 16"),
    "value length": ("value", lambda t: t[:, :, :8].contiguous(), "value is"),
    "ids in int8": ("key_group", lambda t: t.to(torch.int8), "key_group is torch.int8: it must be torch.int32"),
    "ids short": ("key_group", lambda t: t[:, :8].contiguous(), "key_group is"),
    "position axes": ("query_position", lambda t: t[0], "query_position is"),
    "length in int64": ("key_length", lambda t: t.long(), "key_length is torch.int64"),
    "first_row batch": ("first_row", lambda t: t[:1].clone(), "first_row is"),
    "params of another head count": ("policy_params", lambda t: t[:1].clone(), "policy_params is"),
    "params in fp16": ("policy_params", lambda t: t.half(), "policy_params is torch.float16"),
    "strength axes": ("strength", lambda t: t[:, None], "strength is"),
    "two groups": ("group_bias", lambda t: t[:, :2].contiguous(), "G from 3 to 8"),
    "nine groups": ("group_bias", lambda t: t.repeat(1, 3), "G from 3 to 8"),
    "bias batch": ("group_bias", lambda t: t[:1].clone(), "group_bias is"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_wrong_tensor_is_named(name: str) -> None:
    argument, change, message = SHAPES[name]
    tensors = small()
    with pytest.raises(KernelError, match=message):
        call(tensors | {argument: change(tensors[argument])})


VALUES: dict[str, tuple[str, Any, str]] = {
    "negative length": ("key_length", -1, r"key_length holds -1: it must lie in 0..12"),
    "length past the cache": ("key_length", 13, r"key_length holds 13"),
    "position": ("query_position", -2, r"query_position holds -2"),
    "position past the cache": ("query_position", 12, r"query_position holds 12"),
    "negative id": ("key_group", -1, r"key_group holds -1: it must lie in 0..2"),
    "id of no group": ("key_group", 3, r"key_group holds 3: it must lie in 0..2"),
    "NaN parameter": ("policy_params", torch.nan, "policy_params holds nan: it must be finite"),
    "NaN strength": ("strength", torch.nan, "strength holds nan"),
    "strength": ("strength", 1.5, r"strength holds 1.5: it must lie in 0..1"),
    "NaN bias": ("group_bias", torch.nan, "group_bias holds nan"),
    "endless bias": ("group_bias", torch.inf, "group_bias holds inf: it must be finite, or -inf to mute"),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_wrong_value_is_named_where_values_are_checked(name: str) -> None:
    argument, value, message = VALUES[name]
    tensors = small()
    tensors[argument].view(-1)[0] = value
    with pytest.raises(KernelError, match=message):
        call(tensors, values_checked=True)


def test_settings_and_runs() -> None:
    tensors = small()
    for scale in (float("nan"), 0.0, -1.0):
        with pytest.raises(KernelError, match=r"scale is .*: it must be finite and above 0"):
            call(tensors, scale=scale)
    with pytest.raises(KernelError, match="runs are those of 1 requests: query holds 2"):
        call(tensors, runs=(((12, 0),),))
    with pytest.raises(KernelError, match="runs hold 13 keys: the cache has 12 slots"):
        call(tensors, runs=(((13, 0),), ((9, 0),)))
    with pytest.raises(KernelError, match=r"runs hold keys of group 3: it must lie in 0..2"):
        call(tensors, runs=(((12, 0),), ((4, 1), (5, 3))))
    with pytest.raises(KernelError, match="runs are not those of key_group"):
        call(tensors, runs=(((12, 0),), ((9, 0),)), values_checked=True)


def test_a_length_past_the_cache_is_cut_and_an_unknown_id_counts_as_group_0() -> None:
    """What the launcher promises where values are not checked."""
    tensors = make([12], rows=3, heads=1, kv_heads=1) | {"first_row": torch.zeros(1, dtype=torch.int32)}
    expected = call(tensors)
    for ours, theirs in zip(call(tensors | {"key_length": torch.tensor([99]).int()}), expected, strict=True):
        assert ours.equal(theirs)
    text = tensors | {"key_group": tensors["key_group"].clone()}
    unknown = tensors | {"key_group": tensors["key_group"].clone()}
    text["key_group"][0, [3, 5]] = 0
    unknown["key_group"][0, 3], unknown["key_group"][0, 5] = 3, -1
    for ours, theirs, other in zip(call(unknown), call(text), expected, strict=True):
        assert ours.equal(theirs) and not ours.equal(other)


def test_nothing_to_do_is_an_empty_answer_and_an_empty_cache_zeros() -> None:
    tensors = small()
    none = {n: t if n == "policy_params" else t[:0].clone() for n, t in tensors.items()}
    output, before, after = call(none)
    assert output.shape == (0, 2, 3, 64) and before.shape == after.shape == (0, 2, 3, 3)
    bare = tensors | {n: tensors[n][:, :, :0].contiguous() for n in ("key", "value")}
    bare |= {"key_group": tensors["key_group"][:, :0].contiguous(), "key_length": torch.zeros(2, dtype=torch.int32)}
    assert not any(part.any() for part in call(bare))


def test_the_launcher_chooses_by_runs_and_says_so() -> None:
    layout = (EMOTION_LLAMA,)
    assert choose_kernel(layout, block_n=64) is Kernel.RUNS
    assert choose_kernel(None, block_n=64) is Kernel.GENERAL
    assert choose_kernel((((1, 0), (1, 1)) * 64,), block_n=64) is Kernel.GENERAL
    half = (((96, 0), (32, 1)),)  # one tile of two is mixed
    assert mixed_share(half, block=64) == 0.5 <= MOST_MIXED and choose_kernel(half, block_n=64) is Kernel.RUNS
    tensors = make([96], rows=2, heads=1, kv_heads=1, runs=((96, 1),))
    plan = choose_launch(
        batch=1, heads=1, head_size=64, rows=2, groups=3, policy=Policy.BALANCE, statistic=Statistic.SUM,
        scale=scale_of(tensors), causal=True, arch=90, runs=runs_of(tensors), element=4,
    )  # fmt: skip
    assert plan.kernel is Kernel.RUNS and plan.reason
    by_runs, by_ids = (
        call(tensors, plan=plan, runs=runs_of(tensors)),
        call(tensors, plan=plan_of(tensors, Kernel.GENERAL)),
    )
    asked = call(tensors, runs=runs_of(tensors))
    for ours, theirs, others in zip(asked, by_runs, by_ids, strict=True):
        assert ours.equal(theirs) and torch.allclose(ours, others, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    requests=st.lists(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), max_size=6), min_size=1, max_size=3),
    block=st.sampled_from([16, 32, 64]),
)
def test_tiles_of_runs_are_those_of_the_ids(requests: list[list[tuple[int, int]]], block: int) -> None:
    ids = [[g for keys, g in request for _ in range(keys)] for request in requests]
    capacity = max(map(len, ids)) + 5
    table = tile_groups(requests, capacity=capacity, block=block)
    for row, found in zip(ids, table, strict=True):
        assert len(found) == -(-capacity // block)
        for tile, group in enumerate(found):
            inside = set(row[tile * block : (tile + 1) * block])
            assert group == (inside.pop() if len(inside) == 1 else MIXED)
    key_group = torch.tensor([row + [77] * (capacity - len(row)) for row in ids], dtype=torch.int32)
    length = torch.tensor([len(row) for row in ids], dtype=torch.int32)
    runs = find_runs(key_group, length)
    assert [[g for keys, g in request for _ in range(keys)] for request in runs] == ids
    assert all(a[1] != b[1] for request in runs for a, b in itertools.pairwise(request))


def test_cases_and_table() -> None:
    assert all(row.reason for row in TABLE)
    for arch, size, kernel, rows in itertools.product(ARCHS, HEAD_SIZES, Kernel, (1, 1024, 1025, 1 << 20)):
        row = row_for(kernel=kernel, arch=arch, head_size=size, rows=rows)
        assert (row.kernel, row.head_size) == (kernel, size) and arch in row.archs and rows <= row.most_rows
    for arch in ARCHS:
        found = {case.label: case for case in cases(arch)}
        assert len(found) == len(cases(arch)) == 16
        prompt = found["llama2-7b prefill 400 x8"]
        assert prompt.op is Kernel.RUNS.op and found["llama2-7b prefill 400 x1 any order"].op is Kernel.GENERAL.op
        assert prompt.launch.grid == (-(-400 // int(prompt.launch.constants["BLOCK_M"])), 32, 8)
    ids = [g for keys, g in EMOTION_LLAMA for _ in range(keys)]
    assert ids == usual_layout(400)


@pytest.mark.parametrize(
    ("arch", "groups", "kernel"), [(100, 3, Kernel.RUNS), (100, 4, Kernel.GENERAL), (90, 8, Kernel.RUNS)]
)
def test_many_groups_go_to_the_kernel_that_spills_least(arch: int, groups: int, kernel: Kernel) -> None:
    plan = choose_launch(
        batch=1, heads=4, head_size=128, rows=400, groups=groups, policy=Policy.BALANCE, statistic=Statistic.MEAN,
        scale=1.0, causal=True, arch=arch, runs=(EMOTION_LLAMA,),
    )  # fmt: skip
    assert plan.kernel is kernel and plan.launch.constants["GROUPS"] == groups


def test_what_no_row_serves() -> None:
    given_: dict[str, Any] = {"batch": 1, "heads": 4, "rows": 9, "groups": 3, "scale": 1.0, "causal": True}
    given_ |= {"policy": Policy.OFF, "statistic": Statistic.SUM}
    with pytest.raises(KernelError, match="head_size is 96: prefill attention serves 64 and 128"):
        choose_launch(**given_, head_size=96, arch=90)
    with pytest.raises(ConfigError, match="arch is 75"):
        choose_launch(**given_, head_size=64, arch=75)
