"""What prefill and decode check alike of their arguments, and the limits that both serve."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mosear.contract import AR_PARAMS
from mosear.errors import KernelError
from mosear.kernels.arguments import DTYPES, check_kind

HEAD_SIZES = (64, 128)
MIN_GROUPS, MAX_GROUPS = 3, 8
MAX_BATCH = 65535  # the third axis of a grid


def check_query(query: Tensor, group_bias: Tensor, *, what: str) -> None:
    """Dtype, device, head size and batch of the query, and the number of groups; `what` is served."""
    if query.dtype not in DTYPES:
        raise KernelError(f"query is {query.dtype}: it must be one of {', '.join(map(str, DTYPES))}")
    if query.device.type not in ("cuda", "cpu"):
        raise KernelError(f"query is on {query.device}: it must be on a CUDA device (or the CPU, for an executor)")
    batch, size = query.shape[0], query.shape[-1]
    if size not in HEAD_SIZES:
        raise KernelError(
            f"query has head size {size}: {what} attention serves {' and '.join(map(str, HEAD_SIZES))}"
        )  # fmt: skip
    if batch > MAX_BATCH:
        raise KernelError(f"query holds {batch} requests: at most {MAX_BATCH} in one launch")
    if group_bias.dim() != 2 or not MIN_GROUPS <= group_bias.shape[1] <= MAX_GROUPS:
        raise KernelError(
            f"group_bias is {list(group_bias.shape)}: it must be [B, G], G from {MIN_GROUPS} to {MAX_GROUPS}"
        )


def check_tensors(
    tensors: Mapping[str, Tensor], *, cache: tuple[int, ...], capacity: int, rows: tuple[int, ...]
) -> None:
    """Shapes and kinds, by the launchers' names. `cache`: shape of key and value; `rows`: of a request's positions."""
    query = tensors["query"]
    batch, heads, groups = query.shape[0], query.shape[1], tensors["group_bias"].shape[1]
    f32, i32 = torch.float32, torch.int32
    wanted = {
        "query": (tuple(query.shape), query.dtype), "key": (cache, query.dtype), "value": (cache, query.dtype),
        "key_group": ((batch, capacity), i32), "query_position": ((batch, *rows), i32), "key_length": ((batch,), i32),
        "first_row": ((batch,), i32), "policy_params": ((heads, len(AR_PARAMS)), f32), "strength": ((batch,), f32),
        "group_bias": ((batch, groups), f32),
    }  # fmt: skip
    for name, (shape, dtype) in wanted.items():
        check_tensor(name, tensors[name], shape, dtype, query)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, query: Tensor) -> None:
    """Shape, and what `check_kind` checks beside the query."""
    if tuple(tensor.shape) != shape:
        raise KernelError(f"{name} is {list(tensor.shape)}: it must be {list(shape)}")
    check_kind(name, tensor, dtype, like=("query", query))


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
