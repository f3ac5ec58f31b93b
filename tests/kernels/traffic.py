"""What interpreted kernels read and write: bytes and addresses, counted where the interpreter touches memory."""

from types import TracebackType
from typing import Any, Self

import numpy as np
from torch import Tensor
from triton.runtime import interpreter


class Traffic:
    """Counts while it is entered, as far as elements are not masked; `distinct`: each byte once per launch.

    A launch is a kernel's whole grid: what two programs of it read counts once, as from a cache without limits.
    """

    def __init__(self) -> None:
        self._launches: list[list[Any]] = []

    def __enter__(self) -> Self:
        builder = interpreter.InterpreterBuilder
        self._plain = builder.create_masked_load, builder.create_masked_store, builder.set_grid_dim
        load, store, begin = self._plain

        def counted_load(build: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self._note(pointers, mask)
            return load(build, pointers, mask, *rest)

        def counted_store(build: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._note(pointers, mask)
            return store(build, pointers, value, mask, *rest)

        def counted_begin(build: Any, *sizes: int) -> Any:
            self._launches.append([])
            return begin(build, *sizes)

        builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
        builder.set_grid_dim = counted_begin
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        builder = interpreter.InterpreterBuilder
        builder.create_masked_load, builder.create_masked_store, builder.set_grid_dim = self._plain

    def _note(self, pointers: Any, mask: Any) -> None:
        taken = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)  # a reduced mask may come as int32
        touched = pointers.data[taken]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        self._launches[-1].append((np.unique(touched), size))

    @property
    def distinct(self) -> int:
        """Bytes touched, each once in a launch."""
        total = 0
        for launch in self._launches:
            sizes = {size for _, size in launch}
            total += sum(size * np.unique(np.concatenate([a for a, s in launch if s == size])).size for size in sizes)
        return int(total)

    def rows_of(self, tensor: Tensor) -> list[int]:
        """Rows (of the first dimension) of a contiguous tensor that were touched."""
        start, step = tensor.data_ptr(), tensor.stride(0) * tensor.element_size()
        every = np.unique(np.concatenate([a for launch in self._launches for a, _ in launch])).astype(np.int64)
        inside = every[(every >= start) & (every < start + tensor.numel() * tensor.element_size())]
        return [int(row) for row in np.unique((inside - start) // step)]
