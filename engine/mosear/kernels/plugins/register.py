"""All plugins of the decoder made known to TensorRT, for a builder's process: it names this module, and imports no other."""

from mosear.kernels.modality_experts.plugin import OPS as EXPERTS_OPS
from mosear.kernels.plugins.binding import Device, define
from mosear.kernels.reallocated_attention.plugin import OPS as ATTENTION_OPS


def register(*, arch: int, multiprocessors: int) -> None:
    """Register every plugin for a GPU; raises KernelError where TensorRT does not take one."""
    define((*ATTENTION_OPS, *EXPERTS_OPS), Device(arch=arch, multiprocessors=multiprocessors))
