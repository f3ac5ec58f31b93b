"""Decode attention as a function of tensors: arguments checked, two launches."""

import math

import torch
from torch import Tensor

from mosear.config import Policy, Statistic
from mosear.errors import KernelError
from mosear.kernels.arguments import arch_of
from mosear.kernels.launch import run
from mosear.kernels.reallocated_attention.arguments import check_query, check_tensor, check_tensors, check_values
from mosear.kernels.reallocated_attention.decode import MERGE, SPLIT, SPLIT_PAGED
from mosear.kernels.reallocated_attention.decode_launches import MAX_SHARED, Plan, choose_launch


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_group: Tensor,
    query_position: Tensor,
    key_length: Tensor,
    first_row: Tensor,
    policy_params: Tensor,
    strength: Tensor,
    group_bias: Tensor,
    *,
    policy: Policy,
    statistic: Statistic,
    scale: float,
    causal: bool = True,
    block_table: Tensor | None = None,
    longest: int | None = None,
    values_checked: bool = False,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reallocated attention of one query row per request: a split launch and a merge launch.

    query [B, H, 1, D] or [B, H, D]; key, value [B, K, L, D], or pages [N, K, PAGE, D] with block_table i32 [B, PAGES]
    (L = PAGES * PAGE); key_group i32 [B, L]; query_position i32 [B] or [B, 1] (-1: padding row); key_length, first_row
    i32 [B]; policy_params f32 [H, P] (contract.AR_PARAMS); strength f32 [B]; group_bias f32 [B, G]. D is 64 or 128, G 3 to
    8, H / K at most 8; query, key and value fp32, fp16 or bf16. All contiguous, on one device, 16-byte aligned.
    `longest`: no key_length exceeds it (default L); it decides the number of splits, no more. A `plan` overrides
    `choose_launch`. Returns output like query, masses before and after f32 [B, H, 1, G] or [B, H, G].

    Raises KernelError naming the argument and the limit. What tensors hold is checked only with `values_checked`, for
    that waits for the device; without it a length is cut to L, and an id outside 0..G-1 counts as group 0. A
    block_table that names no page reads out of bounds.
    """
    pages = block_table is not None
    tensors = {
        "query": query, "key": key, "value": value, "key_group": key_group, "query_position": query_position,
        "key_length": key_length, "first_row": first_row, "policy_params": policy_params, "strength": strength,
        "group_bias": group_bias,
    }  # fmt: skip
    _check_shapes(tensors, block_table)
    if not math.isfinite(scale):
        raise KernelError(f"scale is {scale}: it must be finite")
    batch, heads, size = query.shape[0], query.shape[1], query.shape[-1]
    kv_heads, capacity, groups = key.shape[1], key_group.shape[1], group_bias.shape[1]
    if longest is not None and not 0 <= longest <= capacity:
        raise KernelError(f"longest is {longest}: it lies in 0..{capacity}, the slots of the cache")
    if values_checked:
        check_values(
            key_group, query_position, key_length, policy_params, strength, group_bias, block_table, key.shape[0]
        )
    output = torch.empty_like(query)
    before, after = query.new_empty(2, *query.shape[:-1], groups, dtype=torch.float32).unbind()
    if batch == 0:
        return output, before, after
    plan = plan or choose_launch(
        batch=batch, heads=heads, kv_heads=kv_heads, head_size=size, groups=groups,
        longest=capacity if longest is None else longest,
        policy=policy, statistic=statistic, scale=scale, causal=causal, page=key.shape[2] if pages else 0,
        arch=arch_of(query.device), multiprocessors=multiprocessors_of(query.device),
    )  # fmt: skip
    partials = empty_partials(query, splits=plan.splits, groups=groups)
    cache = (query, key, value) if block_table is None else (query, key, value, block_table)
    run(
        SPLIT_PAGED if pages else SPLIT, plan.split, (*cache, key_group, query_position, key_length),
        (heads, kv_heads, capacity, plan.splits), partials,
    )  # fmt: skip
    run(
        MERGE, plan.merge, (*partials, query_position, first_row, policy_params, strength, group_bias),
        (heads, plan.splits), (output, before, after),
    )  # fmt: skip
    return output, before, after


def empty_partials(query: Tensor, *, splits: int, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised workspace: o [B, H, splits, G, D], m and l f32 [B, H, splits, G], keys i32 [B, splits, G]."""
    batch, heads, size = query.shape[0], query.shape[1], query.shape[-1]
    output = query.new_empty(batch, heads, splits, groups, size)
    top, total = query.new_empty(2, batch, heads, splits, groups, dtype=torch.float32).unbind()
    return output, top, total, query.new_empty(batch, splits, groups, dtype=torch.int32)


def multiprocessors_of(device: torch.device) -> int | None:
    """Multiprocessors of a device; None where the architecture's own card stands for it."""
    return None if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _check_shapes(tensors: dict[str, Tensor], block_table: Tensor | None) -> None:
    query, key, group_bias, position = (tensors[name] for name in ("query", "key", "group_bias", "query_position"))
    if query.dim() not in (3, 4) or (query.dim() == 4 and query.shape[2] != 1):
        raise KernelError(f"query is {list(query.shape)}: decode takes one row per request, [B, H, 1, D] or [B, H, D]")
    check_query(query, group_bias, what="decode")
    batch, heads, size = query.shape[0], query.shape[1], query.shape[-1]
    if key.dim() != 4 or key.shape[1] == 0 or heads % key.shape[1] or not 1 <= heads // key.shape[1] <= MAX_SHARED:
        raise KernelError(
            f"key is {list(key.shape)}: it must be [B, K, L, D] where query's {heads} heads are 1 to {MAX_SHARED} times K"
        )
    blocks, capacity = batch, key.shape[2]
    if block_table is not None:
        if block_table.dim() != 2 or key.shape[2] == 0:
            raise KernelError(
                f"block_table is {list(block_table.shape)}, key {list(key.shape)}: [B, PAGES] of [N, K, PAGE, D]"
            )
        blocks, capacity = key.shape[0], block_table.shape[1] * key.shape[2]
        check_tensor("block_table", block_table, (batch, block_table.shape[1]), torch.int32, query)
    cache = (blocks, key.shape[1], key.shape[2], size)
    check_tensors(tensors, cache=cache, capacity=capacity, rows=(1,) * (position.dim() == 2))
