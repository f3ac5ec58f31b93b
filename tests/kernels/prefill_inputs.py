"""Inputs of a prefill, and what the launcher gives beside the float64 reference."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from decode_inputs import KINDS, LEAST, MOST, scale_of
from float64 import attention64
from tolerance import assert_close, clear_rows
from torch import Tensor

from mosear.config import Policy, Statistic
from mosear.contract import AR_PARAMS
from mosear.kernels.reallocated_attention.launches import Kernel, Plan, choose_launch
from mosear.kernels.reallocated_attention.policy import AUDIO, VIDEO
from mosear.kernels.reallocated_attention.prefill_run import reallocated_attention_prefill
from mosear.kernels.reallocated_attention.runs import Runs, find_runs

Masses = tuple[Tensor, Tensor, Tensor]
BALANCE = {"policy": Policy.BALANCE, "statistic": Statistic.SUM}
BOTH = (Kernel.GENERAL, Kernel.RUNS)


def make(
    lengths: Sequence[int], *, rows: int = 0, heads: int = 4, kv_heads: int = 2, size: int = 64, groups: int = 3,
    capacity: int = 0, dtype: torch.dtype = torch.float32, runs: Sequence[tuple[int, int]] = (), seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """The last `rows` rows (default: the longest's) of prompts of these lengths; shorter ones end in padding rows.

    Groups at random, or in `runs` of (keys, group) over and over. Slots behind a length hold NaN and ids of no group.
    The first request moves mass from its middle row on, the second at its last row, the third nowhere, and so on.
    """
    generator, batch = torch.Generator().manual_seed(seed), len(lengths)
    rows, capacity = rows or max(lengths), capacity or max(lengths)
    length = torch.tensor(lengths, dtype=torch.int32)
    filled = torch.arange(capacity) < length[:, None]  # [B, L]
    start = (length - rows).clamp(min=0)[:, None]
    position = start + torch.arange(rows, dtype=torch.int32)
    key, value = (torch.randn(batch, kv_heads, capacity, size, generator=generator) for _ in range(2))
    ids = torch.randint(0, groups, (batch, capacity), generator=generator, dtype=torch.int32)
    if runs:
        once = torch.repeat_interleave(torch.tensor([g for _, g in runs]), torch.tensor([n for n, _ in runs])).int()
        ids = once.repeat(-(-capacity // len(once)))[:capacity].repeat(batch, 1)
    least, most = torch.tensor(LEAST), torch.tensor(MOST)
    first = torch.stack([(start[:, 0] + length) // 2, length - 1, length])[torch.arange(batch) % 3, torch.arange(batch)]
    return {
        "query": (2 * torch.randn(batch, heads, rows, size, generator=generator)).to(dtype),
        "key": key.masked_fill(~filled[:, None, :, None], torch.nan).to(dtype),
        "value": value.masked_fill(~filled[:, None, :, None], torch.nan).to(dtype),
        "key_group": ids.masked_fill(~filled, 77),
        "query_position": position.masked_fill(position >= length[:, None], -1).int(),
        "key_length": length,
        "first_row": first.clamp(min=0).int(),
        "policy_params": least + torch.rand(heads, len(AR_PARAMS), generator=generator) * (most - least),
        "strength": 0.2 + 0.8 * torch.rand(batch, generator=generator),
        "group_bias": 0.5 * torch.randn(batch, groups, generator=generator),
    }


def runs_of(tensors: Mapping[str, Tensor]) -> Runs:
    return find_runs(tensors["key_group"], tensors["key_length"])


def plan_of(
    tensors: Mapping[str, Tensor], kernel: Kernel, *, block_m: int = 0, block_n: int = 0, causal: bool = True,
    policy: Policy = Policy.BALANCE, statistic: Statistic = Statistic.SUM,
) -> Plan:  # fmt: skip
    """A launch of that kernel whatever `choose_kernel` would say, in tiles of the table's sizes or of these."""
    query = tensors["query"]
    plan = choose_launch(
        batch=len(query), heads=query.shape[1], head_size=query.shape[-1], rows=query.shape[2],
        groups=tensors["group_bias"].shape[1], policy=policy, statistic=statistic, scale=scale_of(tensors),
        causal=causal, arch=90, element=query.element_size(),
    )  # fmt: skip
    launch = plan.launch
    constants = dict(launch.constants)
    constants |= {k: v for k, v in (("BLOCK_M", block_m), ("BLOCK_N", block_n)) if v}
    grid = (-(-query.shape[2] // int(constants["BLOCK_M"])), *launch.grid[1:])
    changed = type(launch)(grid=grid, constants=constants, warps=launch.warps, stages=launch.stages)
    return Plan(kernel=kernel, launch=changed, reason="a test's")


def call(
    tensors: Mapping[str, Tensor], kernel: Kernel = Kernel.GENERAL, *, block_m: int = 0, block_n: int = 0, **settings: Any
) -> Masses:  # Any: the launcher's settings  # fmt: skip
    """The launcher with a given kernel and tiles; policy `balance` unless said."""
    given = {"causal": True} | BALANCE | settings
    chosen = {name: given[name] for name in ("policy", "statistic", "causal")}
    plan = plan_of(tensors, kernel, block_m=block_m, block_n=block_n, **chosen)
    runs = runs_of(tensors) if kernel is Kernel.RUNS else None
    return reallocated_attention_prefill(**tensors, scale=scale_of(tensors), plan=plan, runs=runs, **given)


def expected_of(tensors: Mapping[str, Tensor], **settings: Any) -> tuple[Any, Any, Any]:  # Any: numpy arrays
    wide = {**tensors, "key": tensors["key"].nan_to_num(), "value": tensors["value"].nan_to_num()}
    return attention64(**wide, scale=scale_of(tensors), **(BALANCE | settings))


def assert_parity(
    tensors: Mapping[str, Tensor], kernel: Kernel = Kernel.GENERAL, *, kind: str = "", block_m: int = 0, block_n: int = 0,
    **settings: Any,
) -> Masses:  # fmt: skip
    """A kernel against attention64, but for rows that lie at a head's jump. Returns what the kernel gave."""
    actual = call(tensors, kernel, block_m=block_m, block_n=block_n, **settings)
    expected = expected_of(tensors, **settings)
    sigma = tensors["policy_params"][:, AR_PARAMS.index("sigma")].double().numpy()[None, :, None]
    clear = clear_rows(expected[1][..., [VIDEO, AUDIO]].sum(-1) - sigma, 0.0)
    kinds = (kind or KINDS[tensors["query"].dtype], kind or "kernel_fp32", kind or "kernel_fp32")
    for ours, theirs, allowed in zip(actual, expected, kinds, strict=True):
        assert_close(ours.double().numpy()[clear], np.asarray(theirs)[clear], allowed)
    return actual
