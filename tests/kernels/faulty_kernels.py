"""A kernel with the faults that the sanitizer must see, for test_executor.py."""

import triton
import triton.language as tl


@triton.jit
def whole_block(x_ptr, at):
    """x at `at`, whatever the size of x."""
    return tl.load(x_ptr + at)


@triton.jit
def copy(x_ptr, y_ptr, n, MASK: tl.constexpr, RACE: tl.constexpr, N: tl.constexpr):
    """y = x; without MASK past the end, with RACE all programs into the first block."""
    at = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0) if MASK else whole_block(x_ptr, at)
    if RACE:
        tl.store(y_ptr + tl.arange(0, N), x + tl.program_id(0))
    else:
        tl.store(y_ptr + at, x, mask=at < n)
