"""How a decode step is split, what it moves, and the plain split-K decode that it is costed beside."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from decode_inputs import make
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

from mosear.config import Policy, Statistic
from mosear.kernels.chips import ARCHS, chip_of
from mosear.kernels.launch import run
from mosear.kernels.reallocated_attention import decode_launches
from mosear.kernels.reallocated_attention.arguments import HEAD_SIZES
from mosear.kernels.reallocated_attention.decode import SPLIT, SPLIT_PAGED
from mosear.kernels.reallocated_attention.decode_launches import (
    MAX_KEYS,
    MIN_KEYS,
    TABLE,
    Plan,
    bytes_moved,
    choose_launch,
    split_keys,
)
from mosear.kernels.reallocated_attention.decode_run import empty_partials
from mosear.kernels.reallocated_attention.models import DEMO, LLAMA, Shape, usual_layout

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import kernels_plain_decode as plain

BAR = 1.05  # bytes of a step at 4k keys, of plain split-K's


def plan_for(shape: Shape = LLAMA, *, keys: int = 4096, batch: int = 1, arch: int = 90, **changes: Any) -> Plan:
    given_: dict[str, Any] = {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_size": shape.head_size}
    given_ |= {"batch": batch, "groups": 3, "longest": keys, "scale": 0.125, "causal": True, "arch": arch}
    given_ |= {"policy": Policy.BALANCE, "statistic": Statistic.SUM}
    return choose_launch(**given_ | changes)


def test_every_architecture_and_head_size_has_a_row_with_a_reason() -> None:
    assert set(TABLE) == {(arch, size) for arch in ARCHS for size in HEAD_SIZES}
    for (arch, size), row in TABLE.items():
        assert len(row.reason) > 20
        tiles = (
            2 * row.block_n * size * 2 * row.stages
        )  # keys and values of 16 bits, a lower bound but for what is not copied
        assert row.ctas * (tiles * (row.stages - 1) // row.stages) < chip_of(arch).shared_bytes


@pytest.mark.parametrize(
    ("shape", "keys", "batch", "splits"),
    [
        (LLAMA, 4096, 1, 9),  # 264 places for 32 heads
        (LLAMA, 4096, 8, 2),
        (LLAMA, 4096, 64, 1),
        (LLAMA, 32768, 64, 8),  # 4096 keys to a split at most
        (DEMO, 512, 1, 4),  # 128 keys to a split at least
        (DEMO, 4096, 1, 32),
        (DEMO, 0, 1, 1),
    ],
)
def test_splits_fill_the_chip_and_no_more(shape: Shape, keys: int, batch: int, splits: int) -> None:
    plan = plan_for(shape, keys=keys, batch=batch)
    assert plan.splits == splits and plan.split.grid == (splits, shape.kv_heads, batch)
    assert plan.merge.grid == (shape.heads, batch, 1)


def test_a_larger_chip_gets_more_splits_and_a_paged_cache_its_page() -> None:
    assert plan_for(multiprocessors=40).splits < plan_for().splits < plan_for(arch=120).splits
    assert plan_for(page=16).split.constants["PAGE"] == 16 and "PAGE" not in plan_for().split.constants


@pytest.mark.parametrize(
    ("heads", "kv_heads", "groups", "rows"), [(32, 32, 3, 16), (9, 3, 3, 16), (8, 1, 3, 32), (8, 1, 8, 64)]
)
def test_a_tile_holds_each_head_once_for_each_group(heads: int, kv_heads: int, groups: int, rows: int) -> None:
    constants = plan_for(heads=heads, kv_heads=kv_heads, groups=groups).split.constants
    assert constants["ROWS"] == rows and constants["PITCH"] >= heads // kv_heads
    assert constants["PITCH"] * groups <= rows


@settings(max_examples=100, deadline=None)
@given(n_keys=st.integers(0, 40000), splits=st.integers(1, 200), block_n=st.sampled_from([16, 32, 64]))
def test_splits_part_the_keys(n_keys: int, splits: int, block_n: int) -> None:
    bounds = split_keys(n_keys, splits, block_n=block_n)
    assert [k for low, high in bounds for k in (low, high)] == sorted(k for pair in bounds for k in pair)
    assert sum(high - low for low, high in bounds) == n_keys and len(bounds) == splits
    full = [high - low for low, high in bounds if high > low]
    assert all(keys >= MIN_KEYS and keys % block_n == 0 for keys in full[:-1])


@pytest.mark.parametrize("runs", [True, False])
def test_bytes_are_those_of_the_partials_that_the_kernel_writes(runs: bool) -> None:
    tensors = make([400, 130, 0], heads=2, kv_heads=1)
    if runs:
        tensors["key_group"] = torch.where(tensors["key_group"] == 77, 77, torch.arange(400) // 300).int()
    plan = plan_for(Shape(name="", heads=2, kv_heads=1, head_size=64), keys=400, batch=3)
    acc, *rest = empty_partials(tensors["query"], splits=plan.splits, groups=3)
    acc.fill_(torch.nan)
    cache = [tensors[n] for n in ("query", "key", "value", "key_group", "query_position", "key_length")]
    run(SPLIT, plan.split, cache, (2, 1, 400, plan.splits), (acc, *rest))
    written = int((~acc.isnan()).sum())
    ids = [tensors["key_group"][b, :n].tolist() for b, n in enumerate([400, 130, 0])]
    moved = bytes_moved(ids, plan=plan, heads=2, kv_heads=1, item_bytes=4)
    assert moved.partials == 2 * 4 * written > 0 and plan.splits == 4
    assert moved.statistics == sum(2 * t.nbytes for t in rest[:2]) + rest[2].nbytes * 3
    assert moved.cache == 2 * 530 * 64 * 4 and moved.ids == 4 * 530


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("shape", [DEMO, LLAMA], ids=lambda shape: shape.name)
def test_at_4k_keys_the_usual_layout_moves_hardly_more_than_plain_split_k(shape: Shape, batch: int, arch: int) -> None:
    plan = plan_for(shape, batch=batch, arch=arch)
    ours = bytes_moved([usual_layout(4096)] * batch, plan=plan, heads=shape.heads, kv_heads=shape.kv_heads)
    theirs = plain.bytes_moved([4096] * batch, plan=plan, heads=shape.heads, kv_heads=shape.kv_heads)
    assert 0.99 < ours.total / theirs < BAR


def test_interleaved_groups_cost_a_partial_each() -> None:
    """The worst ids there are, three groups in every split, are within the bar too."""
    ids = [[i % 3 for i in range(4096)]]
    for shape, low in ((LLAMA, 1.005), (DEMO, 1.03)):
        plan = plan_for(shape)
        ours = bytes_moved(ids, plan=plan, heads=shape.heads, kv_heads=shape.kv_heads).total
        theirs = plain.bytes_moved([4096], plan=plan, heads=shape.heads, kv_heads=shape.kv_heads)
        assert low < ours / theirs < BAR


def test_the_usual_layout_is_the_papers() -> None:
    ids = usual_layout(400)
    assert len(ids) == 400 and ids.count(1) == 259 and ids.count(2) == 1
    assert [ids[i] for i in range(400) if i == 0 or ids[i] != ids[i - 1]] == [0, 1, 2, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_plain_decode_is_softmax_attention(dtype: torch.dtype) -> None:
    lengths = [300, 0, 77]
    tensors = make(lengths, heads=6, kv_heads=2, dtype=dtype)
    plan = plan_for(Shape(name="", heads=6, kv_heads=2, head_size=64), keys=300, batch=3)
    split, merge = (
        plain.peer(case) for case in decode_launches.step_cases("", plan, heads=6, kv_heads=2, capacity=300)
    )
    acc, top, total = (t.fill_(torch.nan) for t in empty_partials(tensors["query"], splits=plan.splits, groups=1)[:3])
    cache = [tensors[n] for n in ("query", "key", "value", "query_position", "key_length")]
    run(split.op, split.launch, cache, (6, 2, 300, plan.splits), (acc, top, total))
    output = torch.full_like(tensors["query"], torch.nan)
    run(merge.op, merge.launch, (acc, top, total), (6, plan.splits), (output,))
    for b, n in enumerate(lengths):
        query, key, value = (tensors[name][b : b + 1].double() for name in ("query", "key", "value"))
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, key[:, :, :n], value[:, :, :n], scale=0.125, enable_gqa=True
        )
        kind = {torch.float32: "kernel_fp32", torch.float16: "kernel_fp16", torch.bfloat16: "kernel_bf16"}[dtype]
        assert_close(output[b : b + 1].double(), expected if n else torch.zeros_like(query), kind)


@pytest.mark.parametrize("arch", ARCHS)
def test_cases_name_every_shape(arch: int) -> None:
    cases = decode_launches.cases(arch)
    labels = {case.label for case in cases}
    for shape in ("demo", "llama2-7b"):
        for keys in (512, 4096, 32768):
            for batch in (1, 8, 64):
                assert f"{shape} decode {keys} x{batch}" in labels
    assert {case.op.name for case in cases} == {"decode_split", "decode_split_paged", "decode_merge"}
    assert len(plain.cases(arch)) == len([case for case in cases if case.op is not SPLIT_PAGED])
    for case in cases:
        if case.op in (SPLIT, SPLIT_PAGED):
            assert case.scalars["capacity"] / case.scalars["splits"] <= MAX_KEYS
