"""Decode attention as a function of tensors: arguments checked, two launches."""

import math

import torch
from torch import Tensor

from mosear.config import Policy, Statistic
from mosear.contract import AR_PARAMS
from mosear.errors import KernelError
from mosear.kernels.launch import run
from mosear.kernels.reallocated_attention.decode import MERGE, SPLIT, SPLIT_PAGED
from mosear.kernels.reallocated_attention.decode_launches import (
    HEAD_SIZES,
    MAX_GROUPS,
    MAX_SHARED,
    MIN_GROUPS,
    Plan,
    choose_launch,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALIGNMENT = 16  # bytes: the kernels copy 16 at a time
MAX_BATCH = 65535  # the third axis of a grid
CPU_ARCH = 90  # tensors of the CPU are for an executor: it gets the launches of this architecture


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
    that waits for the device; without it a length is cut to L, and an id outside 0..G-1 belongs to no group. A
    block_table that names no page reads out of bounds.
    """
    pages = block_table is not None
    _check_shapes(
        query, key, value, key_group, query_position, key_length, first_row, policy_params, strength, group_bias, block_table
    )  # fmt: skip
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
    """Uninitialised workspace: acc f32 [B, H, splits, G, D], m and l f32 [B, H, splits, G], keys i32 [B, splits, G]."""
    batch, heads, size = query.shape[0], query.shape[1], query.shape[-1]
    acc = query.new_empty(batch, heads, splits, groups, size, dtype=torch.float32)
    top, total = query.new_empty(2, batch, heads, splits, groups, dtype=torch.float32).unbind()
    return acc, top, total, query.new_empty(batch, splits, groups, dtype=torch.int32)


def arch_of(device: torch.device) -> int:
    """Compute capability of a device, 90 for 9.0."""
    if device.type == "cpu":
        return CPU_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiprocessors_of(device: torch.device) -> int | None:
    """Multiprocessors of a device; None where the architecture's own card stands for it."""
    return None if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _check_shapes(
    query: Tensor, key: Tensor, value: Tensor, key_group: Tensor, query_position: Tensor, key_length: Tensor,
    first_row: Tensor, policy_params: Tensor, strength: Tensor, group_bias: Tensor, block_table: Tensor | None,
) -> None:  # fmt: skip
    if query.dim() not in (3, 4) or (query.dim() == 4 and query.shape[2] != 1):
        raise KernelError(f"query is {list(query.shape)}: decode takes one row per request, [B, H, 1, D] or [B, H, D]")
    if query.dtype not in DTYPES:
        raise KernelError(f"query is {query.dtype}: it must be one of {', '.join(map(str, DTYPES))}")
    if query.device.type not in ("cuda", "cpu"):
        raise KernelError(f"query is on {query.device}: it must be on a CUDA device (or the CPU, for an executor)")
    batch, heads, size = query.shape[0], query.shape[1], query.shape[-1]
    if size not in HEAD_SIZES:
        raise KernelError(f"query has head size {size}: decode attention serves {' and '.join(map(str, HEAD_SIZES))}")
    if batch > MAX_BATCH:
        raise KernelError(f"query holds {batch} requests: at most {MAX_BATCH} in one launch")
    if group_bias.dim() != 2 or not MIN_GROUPS <= group_bias.shape[1] <= MAX_GROUPS:
        raise KernelError(
            f"group_bias is {list(group_bias.shape)}: it must be [B, G], G from {MIN_GROUPS} to {MAX_GROUPS}"
        )
    if key.dim() != 4 or key.shape[1] == 0 or heads % key.shape[1] or not 1 <= heads // key.shape[1] <= MAX_SHARED:
        raise KernelError(
            f"key is {list(key.shape)}: it must be [B, K, L, D] where query's {heads} heads are 1 to {MAX_SHARED} times K"
        )
    kv_heads = key.shape[1]
    if block_table is None:
        capacity, cached = key.shape[2], (batch, kv_heads, key.shape[2], size)
    else:
        if block_table.dim() != 2 or key.shape[2] == 0:
            raise KernelError(
                f"block_table is {list(block_table.shape)}, key {list(key.shape)}: [B, PAGES] of [N, K, PAGE, D]"
            )
        capacity, cached = block_table.shape[1] * key.shape[2], (key.shape[0], kv_heads, key.shape[2], size)
        _check("block_table", block_table, (batch, block_table.shape[1]), torch.int32, query.device)
    _check("query", query, tuple(query.shape), query.dtype, query.device)
    _check("key", key, cached, query.dtype, query.device)
    _check("value", value, cached, query.dtype, query.device)
    _check("key_group", key_group, (batch, capacity), torch.int32, query.device)
    _check("query_position", query_position, (batch, *([1] * (query_position.dim() == 2))), torch.int32, query.device)
    _check("key_length", key_length, (batch,), torch.int32, query.device)
    _check("first_row", first_row, (batch,), torch.int32, query.device)
    _check("policy_params", policy_params, (heads, len(AR_PARAMS)), torch.float32, query.device)
    _check("strength", strength, (batch,), torch.float32, query.device)
    _check("group_bias", group_bias, (batch, group_bias.shape[1]), torch.float32, query.device)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tuple(tensor.shape) != shape:
        raise KernelError(f"{name} is {list(tensor.shape)}: it must be {list(shape)}")
    if tensor.dtype != dtype:
        raise KernelError(f"{name} is {tensor.dtype}: it must be {dtype}")
    if tensor.device != device:
        raise KernelError(f"{name} is on {tensor.device}, query on {device}: all must be on one device")
    if not tensor.is_contiguous():
        raise KernelError(f"{name} has strides {list(tensor.stride())} for {list(tensor.shape)}: it must be contiguous")
    if tensor.data_ptr() % ALIGNMENT:
        raise KernelError(f"{name} begins at an address that is no multiple of {ALIGNMENT} bytes")


def check_values(
    key_group: Tensor, query_position: Tensor, key_length: Tensor, policy_params: Tensor, strength: Tensor,
    group_bias: Tensor, block_table: Tensor | None, pages: int,
) -> None:  # fmt: skip
    """Raise KernelError where a tensor holds what no kernel serves; waits for the device.

    Ids and pages are looked at as far as the lengths reach. `pages`: how many there are.
    """
    capacity, groups = key_group.shape[1], group_bias.shape[1]
    _in_range("key_length", key_length, 0, capacity, "the slots of the cache")
    _in_range("query_position", query_position, -1, capacity - 1, "a slot, or -1 for a padding row")
    filled = torch.arange(capacity, device=key_group.device) < key_length[:, None]
    _in_range("key_group", key_group[filled], 0, groups - 1, "a group of group_bias")
    if block_table is not None and block_table.shape[1]:
        used = filled.unflatten(1, (block_table.shape[1], -1)).any(-1)
        _in_range("block_table", block_table[used], 0, pages - 1, "a page")
    for name, tensor in (("policy_params", policy_params), ("strength", strength)):
        if not tensor.isfinite().all():
            raise KernelError(f"{name} holds {float(tensor[~tensor.isfinite()][0])}: it must be finite")
    _in_range("strength", strength, 0, 1, "a share")
    if (wrong := group_bias.isnan() | group_bias.isposinf()).any():
        raise KernelError(f"group_bias holds {float(group_bias[wrong][0])}: it must be finite, or -inf to mute")


def _in_range(name: str, tensor: Tensor, low: int, high: int, what: str) -> None:
    if (wrong := (tensor < low) | (tensor > high)).any():
        raise KernelError(f"{name} holds {tensor[wrong][0].item()}: it must lie in {low}..{high} ({what})")
