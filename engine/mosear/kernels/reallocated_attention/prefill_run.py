"""Prefill attention as a function of tensors: arguments checked, one launch."""

import math

import torch
from torch import Tensor

from mosear.config import Policy, Statistic
from mosear.errors import KernelError
from mosear.kernels.arguments import arch_of
from mosear.kernels.launch import run
from mosear.kernels.reallocated_attention.arguments import check_query, check_tensors, check_values
from mosear.kernels.reallocated_attention.launches import Kernel, Plan, choose_launch
from mosear.kernels.reallocated_attention.runs import Runs, find_runs, tile_group_tensor

MAX_HEADS = 65535  # the second axis of a grid


def reallocated_attention_prefill(
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
    runs: Runs | None = None,
    values_checked: bool = False,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reallocated attention of many rows per request in one launch; `choose_launch` says which kernel, and why.

    query [B, H, S, D]; key, value [B, K, L, D]; key_group i32 [B, L]; query_position i32 [B, S] (-1: padding row);
    key_length, first_row i32 [B]; policy_params f32 [H, P] (contract.AR_PARAMS); strength f32 [B]; group_bias f32 [B, G].
    D is 64 or 128, G 3 to 8; query, key and value fp32, fp16 or bf16. All contiguous, on one device, 16-byte aligned.
    `runs`: what `find_runs` says of key_group, as the prompt's builder knows it, from key 0 to key_length: then the kernel
    for runs may be chosen. They must be true. A `plan` overrides `choose_launch`. Returns output [B, H, S, D] and the
    masses before and after, f32 [B, H, S, G].

    Raises KernelError naming the argument and the limit. What tensors hold, and whether `runs` are true, is checked only
    with `values_checked`, for that waits for the device; without it a length is cut to L, and an id outside 0..G-1 counts
    as group 0.
    """
    tensors = {
        "query": query, "key": key, "value": value, "key_group": key_group, "query_position": query_position,
        "key_length": key_length, "first_row": first_row, "policy_params": policy_params, "strength": strength,
        "group_bias": group_bias,
    }  # fmt: skip
    _check_arguments(tensors, scale=scale, runs=runs)
    batch, heads, rows, size = query.shape
    kv_heads, capacity, groups = key.shape[1], key.shape[2], group_bias.shape[1]
    if values_checked:
        check_values(key_group, query_position, key_length, policy_params, strength, group_bias, None, 0)
        if runs is not None and merged(runs) != find_runs(key_group, key_length):
            raise KernelError("runs are not those of key_group up to key_length: find_runs says what they are")
    output = torch.empty_like(query)
    before, after = query.new_empty(2, batch, heads, rows, groups, dtype=torch.float32).unbind()
    if output.numel() == 0:
        return output, before, after
    plan = plan or choose_launch(
        batch=batch, heads=heads, head_size=size, rows=rows, groups=groups, policy=policy, statistic=statistic,
        scale=scale, causal=causal, arch=arch_of(query.device), runs=runs, element=query.element_size(),
    )  # fmt: skip
    cache: tuple[Tensor, ...] = (query, key, value, key_group)
    if plan.kernel is Kernel.RUNS:
        assert runs is not None
        cache += (tile_group_tensor(runs, capacity, int(plan.launch.constants["BLOCK_N"]), query.device),)
    run(
        plan.kernel.op, plan.launch,
        (*cache, query_position, key_length, first_row, policy_params, strength, group_bias),
        (heads, kv_heads, rows, capacity), (output, before, after),
    )  # fmt: skip
    return output, before, after


def merged(runs: Runs) -> Runs:
    """The same runs with neighbours of one group joined and empty ones left out."""
    found = []
    for request in runs:
        joined: list[tuple[int, int]] = []
        for keys, group in request:
            if joined and joined[-1][1] == group:
                joined[-1] = (joined[-1][0] + keys, group)
            elif keys:
                joined.append((keys, group))
        found.append(tuple(joined))
    return tuple(found)


def _check_arguments(tensors: dict[str, Tensor], *, scale: float, runs: Runs | None) -> None:
    query, key, group_bias = (tensors[name] for name in ("query", "key", "group_bias"))
    if query.dim() != 4:
        raise KernelError(f"query is {list(query.shape)}: it must be [B, H, S, D]")
    check_query(query, group_bias, what="prefill")
    batch, heads, rows, size = query.shape
    if heads > MAX_HEADS:
        raise KernelError(f"query holds {heads} heads: at most {MAX_HEADS} in one launch")
    if key.dim() != 4 or key.shape[1] == 0 or heads % key.shape[1]:
        raise KernelError(
            f"key is {list(key.shape)}: it must be [B, K, L, D] where query's {heads} heads are a multiple of K"
        )
    if not (math.isfinite(scale) and scale > 0):
        raise KernelError(f"scale is {scale}: it must be finite and above 0")
    kv_heads, capacity = key.shape[1], key.shape[2]
    if runs is not None:
        if len(runs) != batch:
            raise KernelError(f"runs are those of {len(runs)} requests: query holds {batch}")
        longest = max((sum(keys for keys, _ in request) for request in runs), default=0)
        if longest > capacity:
            raise KernelError(f"runs hold {longest} keys: the cache has {capacity} slots")
        groups = group_bias.shape[1]
        if stray := [group for request in runs for _, group in request if not 0 <= group < groups]:
            raise KernelError(
                f"runs hold keys of group {stray[0]}: it must lie in 0..{groups - 1} (a group of group_bias)"
            )
    check_tensors(tensors, cache=(batch, kv_heads, capacity, size), capacity=capacity, rows=(rows,))
