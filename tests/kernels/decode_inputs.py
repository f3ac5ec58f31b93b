"""Inputs of a decode step, a paged copy of a cache, and what the launcher gives beside the float64 reference."""

from collections.abc import Mapping

import numpy as np
import torch
from float64 import attention64
from tolerance import assert_close, clear_rows
from torch import Tensor

from mosear.config import Policy, Statistic
from mosear.contract import AR_PARAMS
from mosear.kernels.reallocated_attention.decode_run import decode_attention
from mosear.kernels.reallocated_attention.policy import AUDIO, VIDEO

POLICIES = (
    (Policy.OFF, Statistic.SUM),
    (Policy.BALANCE, Statistic.SUM),
    (Policy.BALANCE, Statistic.MEAN),
    (Policy.TARGET, Statistic.SUM),
)
ACTIVE = POLICIES[1:]
KINDS = {torch.float32: "kernel_fp32", torch.float16: "kernel_fp16", torch.bfloat16: "kernel_bf16"}
LEAST = (0.4, 0.4, 0.1, 0.1, 0.3, 0.3, 0.0, 0.2)  # of AR_PARAMS, so that policies act on most rows
MOST = (0.6, 0.6, 0.3, 0.3, 1.0, 1.0, 0.3, 0.8)


def make(
    lengths: list[int], *, heads: int = 4, kv_heads: int = 2, size: int = 64, groups: int = 3, capacity: int = 0,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """One row for each request, which sees its whole cache; lengths, strengths, biases and first_row differ.

    Slots behind a length hold NaN and ids that no group has.
    """
    generator, batch = torch.Generator().manual_seed(seed), len(lengths)
    capacity = capacity or max(lengths)
    length = torch.tensor(lengths, dtype=torch.int32)
    filled = torch.arange(capacity) < length[:, None]  # [B, L]
    key, value = (torch.randn(batch, kv_heads, capacity, size, generator=generator) for _ in range(2))
    ids = torch.randint(0, groups, (batch, capacity), generator=generator, dtype=torch.int32)
    least, most = torch.tensor(LEAST), torch.tensor(MOST)
    return {
        "query": (2 * torch.randn(batch, heads, 1, size, generator=generator)).to(dtype),
        "key": key.masked_fill(~filled[:, None, :, None], torch.nan).to(dtype),
        "value": value.masked_fill(~filled[:, None, :, None], torch.nan).to(dtype),
        "key_group": ids.masked_fill(~filled, 77),
        "query_position": length[:, None] - 1,
        "key_length": length,
        "first_row": torch.where(torch.arange(batch) % 3 == 2, length, (length - 2).clamp(min=0)).int(),
        "policy_params": least + torch.rand(heads, len(AR_PARAMS), generator=generator) * (most - least),
        "strength": torch.rand(batch, generator=generator),
        "group_bias": 0.5 * torch.randn(batch, groups, generator=generator),
    }


def shifted(tensor: Tensor) -> Tensor:
    """The same values, 4 bytes further on."""
    room = torch.empty(tensor.numel() + 4 // tensor.element_size(), dtype=tensor.dtype)
    moved = room[4 // tensor.element_size() :].view(tensor.shape)
    return moved.copy_(tensor)


def paged(tensors: Mapping[str, Tensor], page: int, seed: int = 0) -> dict[str, Tensor]:
    """The same step with its cache in pages that lie in any order; a page that nobody names holds NaN."""
    batch, kv_heads, capacity, size = tensors["key"].shape
    assert capacity % page == 0
    per_request = capacity // page
    order = 1 + torch.randperm(batch * per_request, generator=torch.Generator().manual_seed(seed))

    def pool(cache: Tensor) -> Tensor:
        pages = cache.unflatten(2, (per_request, page)).transpose(1, 2).flatten(0, 1)  # [B * PAGES, K, PAGE, D]
        found = cache.new_full((1 + len(order), kv_heads, page, size), torch.nan)
        found[order] = pages
        return found

    table = order.int().view(batch, per_request)
    return {**tensors, "key": pool(tensors["key"]), "value": pool(tensors["value"]), "block_table": table}


def scale_of(tensors: Mapping[str, Tensor]) -> float:
    return float(tensors["query"].shape[-1] ** -0.5)


def assert_parity(
    tensors: Mapping[str, Tensor], policy: Policy, statistic: Statistic, *, kind: str = "", causal: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Decode against attention64, but for rows that lie at a head's jump. Returns what decode gave."""
    settings = {"policy": policy, "statistic": statistic, "scale": scale_of(tensors), "causal": causal}
    actual = decode_attention(**tensors, **settings)  # type: ignore[arg-type]
    wide = {**tensors, "key": tensors["key"].nan_to_num(), "value": tensors["value"].nan_to_num()}
    expected = attention64(**wide, **settings)  # type: ignore[arg-type]
    sigma = tensors["policy_params"][:, AR_PARAMS.index("sigma")].double().numpy()[None, :, None]
    clear = clear_rows(expected[1][..., [VIDEO, AUDIO]].sum(-1) - sigma, 0.0)
    kinds = (kind or KINDS[tensors["query"].dtype], kind or "kernel_fp32", kind or "kernel_fp32")
    for ours, theirs, allowed in zip(actual, expected, kinds, strict=True):
        assert_close(ours.double().numpy()[clear], np.asarray(theirs)[clear], allowed)
    return actual
