"""Kernels of one bf16 operation each, for test_executor.py."""

import triton
import triton.language as tl


@triton.jit
def elementwise(a_ptr, b_ptr, y_ptr, OP: tl.constexpr, N: tl.constexpr):
    """y = a OP b on N elements of bf16."""
    at = tl.arange(0, N)
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    if OP == "add":
        y = a + b
    elif OP == "sub":
        y = a - b
    elif OP == "mul":
        y = a * b
    elif OP == "maximum":
        y = tl.maximum(a, b)
    elif OP == "minimum":
        y = tl.minimum(a, b)
    elif OP == "abs":
        y = tl.abs(a)
    elif OP == "neg":
        y = -a
    elif OP == "where":
        y = tl.where(a > b, a, b)
    elif OP == "less":
        y = (a < b).to(tl.bfloat16)
    elif OP == "equal":
        y = (a == b).to(tl.bfloat16)
    elif OP == "scaled":
        y = a * 0.3
    else:
        y = tl.full([N], 0.3, tl.bfloat16)
    tl.store(y_ptr + at, y)


@triton.jit
def reduction(a_ptr, b_ptr, y_ptr, OP: tl.constexpr, N: tl.constexpr):
    """y[0] = the reduction of N elements of bf16."""
    a = tl.load(a_ptr + tl.arange(0, N))
    if OP == "sum":
        y = tl.sum(a, 0)
    elif OP == "max":
        y = tl.max(a, 0)
    else:
        y = tl.min(a, 0)
    tl.store(y_ptr, y)


@triton.jit
def scan(a_ptr, b_ptr, y_ptr, OP: tl.constexpr, N: tl.constexpr):
    """y = running sum of N elements, in bf16."""
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tl.cumsum(tl.load(a_ptr + at), 0))


@triton.jit
def to_bf16(x_ptr, y_ptr, N: tl.constexpr):
    """fp32 or fp16 to bf16, by a cast before the store and by the store."""
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x.to(tl.bfloat16))
    tl.store(y_ptr + N + at, x)


@triton.jit
def from_bf16(x_ptr, y_ptr, N: tl.constexpr):
    """bf16 to the type behind y."""
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


@triton.jit
def product(a_ptr, b_ptr, y_ptr, N: tl.constexpr):
    """y [N, N] f32 = a [N, N] b [N, N], both bf16."""
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    at = row * N + column
    tl.store(y_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))
