"""CUDA's driver library through ctypes: memory of the first GPU and one stream. It needs no package beside the driver."""

import ctypes
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from mosear.contract import Tensors
from mosear.errors import EngineError

LIBRARY = "libcuda.so.1"
ALIGNMENT = 256  # bytes: what TensorRT asks of an address
NON_BLOCKING = 1
Shapes = Mapping[str, tuple[np.dtype[np.generic], tuple[int, ...]]]


class Driver:
    """The first GPU. A context manager; what was allocated and not freed goes with it."""

    def __init__(self, library: str = LIBRARY) -> None:
        """Raises EngineError where there is no driver or no GPU."""
        try:
            self._library = ctypes.CDLL(library)
        except OSError:
            raise EngineError(
                f"no NVIDIA driver here ({library} is not found): run this on a machine with a GPU"
            ) from None
        self._thread = threading.local()
        self._device, self._context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._ask("cuInit", 0)
        self._ask("cuDeviceGet", ctypes.byref(self._device), 0)
        self._ask("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self._call("cuStreamCreate", ctypes.byref(stream), NON_BLOCKING)
        self.stream = int(stream.value or 0)

    def close(self) -> None:
        if self.stream:
            self._call("cuStreamDestroy_v2", ctypes.c_void_p(self.stream))
            self._ask("cuDevicePrimaryCtxRelease_v2", self._device)
            self.stream = 0

    def allocate(self, size: int) -> int:
        """Address of so many bytes on the GPU."""
        found = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(found), ctypes.c_size_t(max(size, 1)))
        return int(found.value)

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address: int, array: np.ndarray[Any, Any]) -> None:  # Any: of any shape and type
        """From a contiguous array; it may be written again once the stream was waited for."""
        self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), ctypes.c_void_p(array.ctypes.data),
                   ctypes.c_size_t(array.nbytes), ctypes.c_void_p(self.stream))  # fmt: skip

    def download(self, array: np.ndarray[Any, Any], address: int) -> None:
        """Into a contiguous array, whose values are there once the stream was waited for."""
        self._call("cuMemcpyDtoHAsync_v2", ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(address),
                   ctypes.c_size_t(array.nbytes), ctypes.c_void_p(self.stream))  # fmt: skip

    def copy(self, target: int, source: int, size: int) -> None:
        """On the GPU."""
        self._call("cuMemcpyDtoDAsync_v2", ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(size),
                   ctypes.c_void_p(self.stream))  # fmt: skip

    def zero(self, address: int, *, width: int, height: int = 1, pitch: int = 0) -> None:
        """Zeros in `height` strips of `width` bytes, `pitch` bytes from one to the next."""
        if width and height:
            self._call("cuMemsetD2D8Async", ctypes.c_uint64(address), ctypes.c_size_t(pitch or width), ctypes.c_ubyte(0),
                       ctypes.c_size_t(width), ctypes.c_size_t(height), ctypes.c_void_p(self.stream))  # fmt: skip

    def wait(self) -> None:
        """Until all that was asked of the stream is done."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def _call(self, name: str, *arguments: object) -> None:
        """As `_ask`, with the context current in whatever thread this is."""
        if not getattr(self._thread, "ready", False):
            self._ask("cuCtxSetCurrent", self._context)
            self._thread.ready = True
        self._ask(name, *arguments)

    def _ask(self, name: str, *arguments: object) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise EngineError(
                f"the NVIDIA driver refused {name} (error {status}): {_MEANING.get(status, 'see its log')}"
            )


_MEANING = {
    2: "the GPU's memory is full",
    100: "it knows no GPU",
    803: "driver and library do not fit",
    999: "restart it",
}


class Slab:
    """Tensors side by side, on the GPU and in this process: one copy moves them all."""

    def __init__(self, driver: Driver, shapes: Shapes) -> None:
        """shapes: element type and shape of each."""
        self.driver, offsets, end = driver, {}, 0
        for name, (dtype, shape) in shapes.items():
            offsets[name] = end
            size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            end += -(-size // ALIGNMENT) * ALIGNMENT
        self._host = np.zeros(end, np.uint8)
        self._address = driver.allocate(end)
        self.addresses = {name: self._address + offset for name, offset in offsets.items()}
        self.host: Tensors = {}
        for name, (dtype, shape) in shapes.items():
            size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            self.host[name] = self._host[offsets[name] : offsets[name] + size].view(dtype).reshape(shape)

    def upload(self) -> None:
        self.driver.upload(self._address, self._host)

    def download(self) -> None:
        self.driver.download(self._host, self._address)

    def close(self) -> None:
        self.driver.free(self._address)
