"""Both prefill kernels against float64: any policy, element type, heads, lengths, groups and tiles."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from decode_inputs import ACTIVE, POLICIES
from hypothesis import given, settings
from hypothesis import strategies as st
from prefill_inputs import BOTH, assert_parity, call, expected_of, make, plan_of, runs_of
from sweep import sweep
from tolerance import assert_close
from torch import Tensor

from mosear.config import Policy, Statistic
from mosear.kernels.launch import run
from mosear.kernels.reallocated_attention.launches import Kernel
from mosear.kernels.reallocated_attention.policy import AUDIO, VIDEO
from mosear.kernels.reallocated_attention.runs import tile_group_tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PROMPT = ((20, 0), (33, 1), (1, 2), (1, 1), (30, 0))  # Emotion-LLaMA's order, with fewer pictures
both = pytest.mark.parametrize("kernel", BOTH)
one_kernel = pytest.mark.parametrize("kernel", sweep(BOTH, Kernel.RUNS))  # by default
OFF, BY_SUM, BY_MEAN, TARGET = POLICIES
# Each kernel once by default, each way to move mass in the full run.
ACTIVE_KERNELS = sweep([(*p, k) for p in ACTIVE for k in BOTH], (*BY_MEAN, Kernel.RUNS), (*TARGET, Kernel.GENERAL))

# Smallest; odd lengths with an empty request; the demo's three heads to one; LLaMA-2's head size; eight groups.
SHAPES: dict[str, dict[str, Any]] = {
    "smallest": {"lengths": [1], "heads": 1, "kv_heads": 1},
    "odd": {"lengths": [67, 0, 45], "heads": 4, "kv_heads": 2, "rows": 37},
    "demo": {"lengths": [85], "heads": 3, "kv_heads": 1, "runs": PROMPT},
    "wide": {"lengths": [70, 51], "heads": 2, "kv_heads": 2, "size": 128, "runs": PROMPT},
    "many groups": {"lengths": [50], "heads": 4, "kv_heads": 1, "groups": 8, "runs": ((9, 7), (20, 1), (5, 2), (3, 4))},
}


@pytest.mark.parametrize(
    ("shape", "policy", "statistic", "kernel"),
    sweep(
        ((shape, *policy, kernel) for shape, policy, kernel in itertools.product(SHAPES, POLICIES, BOTH)),
        ("smallest", *OFF, Kernel.RUNS), ("odd", *BY_MEAN, Kernel.GENERAL),
        ("demo", *TARGET, Kernel.RUNS), ("many groups", *BY_SUM, Kernel.RUNS),
    ),
)  # fmt: skip
def test_it_is_the_formula(shape: str, policy: Policy, statistic: Statistic, kernel: Kernel) -> None:
    tensors = make(**SHAPES[shape])
    _, before, after = assert_parity(tensors, kernel, policy=policy, statistic=statistic, block_m=32, block_n=16)
    assert (not after.equal(before)) == (policy is not Policy.OFF and shape != "smallest")


@pytest.mark.parametrize(
    ("shape", "dtype", "kernel"),
    sweep(
        itertools.product(SHAPES, DTYPES[1:], BOTH),
        ("odd", torch.float16, Kernel.RUNS), ("many groups", torch.bfloat16, Kernel.GENERAL),
    ),
)  # fmt: skip
def test_it_is_the_formula_in_16_bits(shape: str, dtype: torch.dtype, kernel: Kernel) -> None:
    tensors = make(**SHAPES[shape], dtype=dtype)
    assert_parity(tensors, kernel, statistic=Statistic.MEAN, block_m=32, block_n=16)


@pytest.mark.parametrize(("dtype", "kernel"), sweep(itertools.product(DTYPES, BOTH), (torch.bfloat16, Kernel.RUNS)))
def test_the_prompt_of_400_tokens_in_the_tables_tiles(dtype: torch.dtype, kernel: Kernel) -> None:
    layout = ((20, 0), (258, 1), (1, 2), (1, 1), (120, 0))
    tensors = make([400], rows=130, heads=1, kv_heads=1, size=128, dtype=dtype, runs=layout)
    tensors["first_row"][:] = 399
    block = 64 if dtype != torch.float32 else 0
    _, before, after = assert_parity(tensors, kernel, block_m=block, block_n=block, policy=Policy.TARGET)
    moved = (after != before).any(-1)[0, 0]
    assert moved[-1] and not moved[:-1].any()


@pytest.mark.full
@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("policy", "statistic"), POLICIES)
@pytest.mark.parametrize("size", [64, 128])
def test_long_mixed_batches(
    policy: Policy, statistic: Statistic, dtype: torch.dtype, size: int, kernel: Kernel
) -> None:
    for causal in (True, False):
        tensors = make([700, 1, 533], rows=300, heads=2, kv_heads=1, groups=4, size=size, dtype=dtype, runs=PROMPT)
        assert_parity(tensors, kernel, block_m=64, block_n=64, policy=policy, statistic=statistic, causal=causal)


@pytest.mark.parametrize(
    ("block_m", "block_n", "kernel"),
    sweep(
        ((*block, kernel) for block in ((16, 16), (64, 16), (16, 64), (32, 32)) for kernel in BOTH),
        (16, 64, Kernel.RUNS), (64, 16, Kernel.GENERAL),
    ),
)  # fmt: skip
def test_tiles_of_any_size_give_the_same(block_m: int, block_n: int, kernel: Kernel) -> None:
    tensors = make([70, 33], heads=1, kv_heads=1, runs=PROMPT)
    expected = call(tensors, block_m=128, block_n=128)
    for ours, theirs in zip(call(tensors, kernel, block_m=block_m, block_n=block_n), expected, strict=True):
        assert_close(ours, theirs, "op")


@pytest.mark.parametrize(("policy", "statistic", "kernel"), ACTIVE_KERNELS)
def test_any_chunking_is_one_pass(policy: Policy, statistic: Statistic, kernel: Kernel) -> None:
    tensors = make([50, 50], heads=1, kv_heads=1, runs=PROMPT[1:])
    tensors["first_row"] = torch.tensor([30, 12], dtype=torch.int32)
    given_ = {"policy": policy, "statistic": statistic, "block_m": 32, "block_n": 16}
    full = call(tensors, kernel, **given_)
    for cuts in ((17, 50), (1, 30, 31, 50)):
        start = 0
        for end in cuts:
            chunk = {n: tensors[n][:, :, start:end].contiguous() for n in ("query",)}
            chunk |= {"query_position": tensors["query_position"][:, start:end].contiguous()}
            chunk |= {"key_length": torch.full((2,), end, dtype=torch.int32)}
            for ours, theirs in zip(call(tensors | chunk, kernel, **given_), full, strict=True):
                assert_close(ours, theirs[:, :, start:end], "op")
            start = end


@one_kernel
def test_without_causality_a_row_sees_every_filled_key(kernel: Kernel) -> None:
    for policy, statistic in (BY_MEAN, TARGET):
        assert_parity(
            make([50, 33], rows=20, heads=2, runs=PROMPT[1:]), kernel, policy=policy, statistic=statistic, causal=False,
            block_m=16, block_n=16,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "statistic", "kernel"),
    sweep([(*p, k) for p in POLICIES for k in BOTH], (*OFF, Kernel.GENERAL), (*BY_MEAN, Kernel.RUNS)),
)
def test_a_row_that_sees_no_key_is_zeros(policy: Policy, statistic: Statistic, kernel: Kernel) -> None:
    tensors = make([30, 0, 20, 25], heads=2, runs=((8, 1), (8, 2), (16, 0)))
    tensors["query_position"][2, :5] = -1
    tensors["group_bias"][3] = -torch.inf
    tensors["first_row"][:] = 0
    for part in call(tensors, kernel, policy=policy, statistic=statistic, block_m=16, block_n=16):
        assert part.isfinite().all() and part[0].any(-1).all() and part[2, :, 5:20].any(-1).all()
        assert not part[1].any() and not part[2, :, :5].any() and not part[2, :, 20:].any() and not part[3].any()


@pytest.mark.parametrize(("policy", "statistic", "kernel"), ACTIVE_KERNELS)
def test_rows_that_see_one_of_the_two_keep_their_masses(policy: Policy, statistic: Statistic, kernel: Kernel) -> None:
    """Video from key 8 on, audio from key 24 on: rows before 24 see no audio, in tiles that hold both kinds of row."""
    tensors = make([48], heads=2, runs=((8, 0), (16, 1), (24, 2)))
    tensors |= {"first_row": torch.zeros(1, dtype=torch.int32)}
    tensors["policy_params"][:, 6] = 0.001
    _, before, after = assert_parity(tensors, kernel, policy=policy, statistic=statistic, block_m=32, block_n=16)
    assert after[:, :, :24].equal(before[:, :, :24]) and not before[:, :, :24, AUDIO].any()
    assert (after != before).any(-1)[:, :, 24:].any()


@pytest.mark.parametrize(
    ("policy", "statistic", "kernel"), sweep([(*p, k) for p in ACTIVE for k in BOTH], (*BY_MEAN, Kernel.RUNS))
)
def test_muting_a_group_is_leaving_its_keys_out(policy: Policy, statistic: Statistic, kernel: Kernel) -> None:
    tensors = make([40], rows=6, heads=2, groups=4, runs=((9, 0), (11, 1), (6, 3), (14, 2)))
    tensors |= {"first_row": torch.zeros(1, dtype=torch.int32), "query_position": torch.full((1, 6), 39).int()}
    given_ = {"policy": policy, "statistic": statistic, "block_m": 16, "block_n": 32}
    for muted in range(4):
        rest = tensors["key_group"][0] != muted
        left = torch.tensor([rest.sum()], dtype=torch.int32)
        few = {n: tensors[n][:, :, rest].contiguous() for n in ("key", "value")}
        few |= {"key_group": tensors["key_group"][:, rest].contiguous(), "key_length": left}
        bias = tensors["group_bias"].index_fill(1, torch.tensor([muted]), -torch.inf)
        actual = call(tensors | {"group_bias": bias}, kernel, **given_)
        for ours, theirs in zip(actual, call(tensors | few, kernel, **given_), strict=True):
            assert_close(ours, theirs, "op")
        assert not actual[1][..., muted].any() and not actual[2][..., muted].any()
        louder = {n: torch.where(rest[:, None], tensors[n], 3 - 5 * tensors[n]) for n in ("key", "value")}
        for ours, same in zip(actual, call(tensors | louder | {"group_bias": bias}, kernel, **given_), strict=True):
            assert ours.equal(same)  # what a muted key holds changes no bit


@one_kernel
def test_strength_0_without_bias_is_softmax_attention(kernel: Kernel) -> None:
    tensors = make([70, 70], heads=2, kv_heads=1, runs=PROMPT) | {
        "strength": torch.zeros(2),
        "group_bias": torch.zeros(2, 3),
    }
    tensors["first_row"][:] = 0
    output, before, after = call(tensors, kernel, block_m=32, block_n=32)
    expected = torch.nn.functional.scaled_dot_product_attention(
        tensors["query"], tensors["key"], tensors["value"], is_causal=True, enable_gqa=True
    )
    assert_close(output, expected, "op")
    assert_close(before.sum(-1), torch.ones(2, 2, 70), "op")
    assert after.equal(before) and not call(tensors | {"strength": torch.ones(2)}, kernel, block_m=64)[2].equal(before)


@one_kernel
def test_settings_are_each_requests_own(kernel: Kernel) -> None:
    """A batch is its requests alone: lengths, strengths, biases, first_row and ids mix."""
    tensors = make([60, 0, 33, 7], rows=40, heads=2, runs=PROMPT)
    tensors["key_group"][2, :33] = tensors["key_group"][2, :33].flip(0)
    together = call(tensors, kernel, block_m=32, block_n=16)
    for b in range(4):
        alone = {n: t if n == "policy_params" else t[b : b + 1].clone() for n, t in tensors.items()}
        for ours, theirs in zip(call(alone, kernel, block_m=32, block_n=16), together, strict=True):
            assert ours.equal(theirs[b : b + 1])


GAPS = (0.0, 10.0, 60.0, 88.0, 100.0)


@pytest.mark.parametrize(
    ("low", "dtype", "kernel"),
    sweep(itertools.product((VIDEO, AUDIO), DTYPES, BOTH), (AUDIO, torch.float16, Kernel.RUNS)),
)
def test_a_group_far_below_is_raised_whole(low: int, dtype: torch.dtype, kernel: Kernel) -> None:
    """Where one group's logits lie up to 100 below the others', its raised mass and its share of the output are right."""
    for policy, statistic in ACTIVE:
        tensors = far_below(low, dtype)
        for gap in GAPS:
            tensors["key"][..., 0] = torch.where(tensors["key_group"] == low, -gap, 0.0)[:, None].to(dtype)
            kind = "far" if dtype == torch.float32 else ""
            given_: dict[str, Any] = {"policy": policy, "statistic": statistic}
            _, _, after = assert_parity(tensors, kernel, kind=kind, block_m=16, block_n=32, **given_)
            expected = expected_of(tensors, **given_)[2]
            assert expected[..., low].min() > 0.02
            assert_close(after.numpy() / expected, np.ones_like(expected), "far")


def far_below(low: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows whose logits are small but for what the first column of the keys adds.

    Of the other columns eight count: fp32 adds each to a sum of up to 800 and keeps 3e-5 of it, which no kernel mends.
    """
    tensors = make([64], rows=4, heads=1, kv_heads=1, dtype=dtype, runs=((8, 0), (30, low), (26, VIDEO + AUDIO - low)))
    tensors |= {"strength": torch.ones(1), "group_bias": torch.zeros(1, 3)}
    tensors |= {"first_row": torch.zeros(1, dtype=torch.int32)}
    tensors["policy_params"][:, 6] = 0.001  # sigma
    rest = 0.3 * tensors["query"][..., 1:]
    rest[..., 8:] = 0
    tensors["query"] = torch.cat([torch.full((1, 1, 4, 1), 8.0, dtype=dtype), rest], -1).to(dtype)
    return tensors


@one_kernel
def test_a_group_past_the_sums_range_is_left_where_it_is(kernel: Kernel) -> None:
    """Below 2^-226 of the row's largest a group counts as not visible: nothing moves, nothing is NaN."""
    tensors = far_below(AUDIO, torch.float32)
    for gap, seen in ((150.0, True), (165.0, False), (1e4, False)):
        tensors["key"][..., 0] = torch.where(tensors["key_group"] == AUDIO, -gap, 0.0)[:, None]
        output, before, after = call(tensors, kernel, block_m=16, block_n=32)
        assert output.isfinite().all() and (after != before).any(-1).all() == seen
        assert after.equal(before) == (not seen)


@one_kernel
def test_every_result_is_written(kernel: Kernel) -> None:
    """Poisoned outputs: each element is written, also where rows are padding or see nothing."""
    tensors = make([45, 0, 20], rows=45, heads=2, runs=PROMPT)
    expected = call(tensors, kernel, values_checked=True, block_m=16, block_n=16)
    plan = plan_of(tensors, kernel, block_m=16, block_n=16)
    outputs = [torch.full_like(t, torch.nan) for t in expected]
    names = ["query", "key", "value", "key_group", *list(tensors)[4:]]
    inputs = [tensors[n] for n in names]
    if kernel is Kernel.RUNS:
        inputs.insert(4, tile_group_tensor(runs_of(tensors), 45, 16, torch.device("cpu")))
    run(plan.kernel.op, plan.launch, inputs, (2, 2, 45, 45), outputs)
    for ours, theirs in zip(outputs, expected, strict=True):
        assert ours.equal(theirs)


ANY_CALL = given(
    policy=st.sampled_from(POLICIES), lengths=st.lists(st.integers(0, 60), min_size=1, max_size=2),
    rows=st.integers(1, 40), heads=st.sampled_from([(1, 1), (3, 1), (4, 2)]), groups=st.integers(3, 5),
    runs=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 2)), max_size=4), muted=st.sets(st.integers(0, 4)),
    kernel=st.sampled_from(BOTH), blocks=st.sampled_from([(32, 16), (64, 16), (32, 32)]), causal=st.booleans(),
    factor=st.sampled_from([0.0, 1.0, 5.0]), seed=st.integers(0, 2**31),
)  # fmt: skip


def keeps_the_laws(
    policy: tuple[Policy, Statistic], lengths: list[int], rows: int, heads: tuple[int, int], groups: int,
    runs: list[tuple[int, int]], muted: set[int], kernel: Kernel, blocks: tuple[int, int], causal: bool, factor: float,
    seed: int,
) -> None:  # fmt: skip
    tensors = make(
        lengths, rows=rows, heads=heads[0], kv_heads=heads[1], groups=groups, capacity=60, runs=runs, seed=seed
    )
    tensors["query"] *= factor
    tensors["group_bias"][0, [g for g in muted if g < groups]] = -torch.inf
    output, before, after = assert_parity(
        tensors, kernel, kind="far", policy=policy[0], statistic=policy[1], causal=causal,
        block_m=blocks[0], block_n=blocks[1],
    )  # fmt: skip
    seen = before.sum(-1) > 0
    for masses in (before, after):
        assert (masses > -1e-6).all()
        assert_close(masses.sum(-1) + 1, seen + 1.0, "op")
    kept = [g for g in range(groups) if g not in (VIDEO, AUDIO)]
    assert after[..., kept].equal(before[..., kept]) and not output[~seen].any()


@settings(max_examples=4, deadline=None)
@ANY_CALL
def test_any_call_keeps_the_laws(**drawn: Any) -> None:  # Any: what ANY_CALL says
    keeps_the_laws(**drawn)


@pytest.mark.full
@settings(max_examples=60, deadline=None)
@ANY_CALL
def test_many_calls_keep_the_laws(**drawn: Any) -> None:  # Any: what ANY_CALL says
    keeps_the_laws(**drawn)
