"""What every launcher checks of a tensor, and what it asks of the device."""

import torch
from torch import Tensor

from mosear.errors import KernelError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALIGNMENT = 16  # bytes: the compiled kernels copy as many at once
CPU_ARCH = 90  # tensors of the CPU are for an executor: it gets the launches of this architecture


def check_kind(name: str, tensor: Tensor, dtype: torch.dtype, *, like: tuple[str, Tensor]) -> None:
    """Raises KernelError for another dtype, another device than that of `like` (a name and its tensor), strides or address."""
    other, on = like[0], like[1].device
    if tensor.dtype != dtype:
        raise KernelError(f"{name} is {tensor.dtype}: it must be {dtype}")
    if tensor.device != on:
        raise KernelError(f"{name} is on {tensor.device}: it must be on {on}, where {other} is")
    if not tensor.is_contiguous():
        raise KernelError(f"{name} has strides {list(tensor.stride())}: it must be contiguous")
    if tensor.data_ptr() % ALIGNMENT:
        raise KernelError(f"{name} begins at an address that is no multiple of {ALIGNMENT} bytes: copy it first")


def arch_of(device: torch.device) -> int:
    """Compute capability of a device, 90 for 9.0."""
    if device.type == "cpu":
        return CPU_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
