"""A kernel of a few lines that has all that the compiler's side looks at: a loop, a product, masks, every kind of parameter.

`SPILLING` is the same with far too much to keep in registers, `WRONG` states its parameters in another order.
"""

import triton
import triton.language as tl

from mosear.kernels.launch import Case, KernelOp, Kind, Launch


@triton.jit
def product(x_ptr, w_ptr, row_group_ptr, rows, cols, y_ptr, N: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr):
    """y = exp2(SCALE * x @ w) where the row's group is not 0, else 0."""
    row = tl.program_id(0).to(tl.int64) * 64 + tl.arange(0, 64)
    column = tl.arange(0, N)
    total = tl.zeros((64, N), tl.float32)
    for start in range(0, cols, BLOCK):
        inner = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row[:, None] * cols + inner, mask=(row[:, None] < rows) & (inner < cols), other=0.0)
        w = tl.load(w_ptr + inner[:, None] * N + column, mask=inner[:, None] < cols, other=0.0)
        total = tl.dot(x, w, total)
    group = tl.load(row_group_ptr + row, mask=row < rows, other=0)
    result = tl.where(group[:, None] == 0, 0.0, tl.exp2(total * SCALE))
    tl.store(y_ptr + row[:, None] * N + column, result, mask=row[:, None] < rows)


INPUTS = {"x_ptr": Kind.DATA, "w_ptr": Kind.DATA, "row_group_ptr": Kind.I32}
TINY = KernelOp(
    name="tiny_product", function=product, inputs=INPUTS, scalars=("rows", "cols"), outputs={"y_ptr": Kind.F32}
)
WRONG = KernelOp(
    name="wrong_order", function=product, inputs=INPUTS, scalars=("cols", "rows"), outputs={"y_ptr": Kind.F32}
)


def tiny(
    label: str = "tiny", *, op: KernelOp = TINY, width: int = 64, warps: int = 4, stages: int = 3, rows: int = 50
) -> Case:
    """The kernel for `rows` rows of 512 columns."""
    constants = {"N": width, "BLOCK": 64, "SCALE": 0.5}
    launch = Launch(grid=(-(-rows // 64), 1, 1), constants=constants, warps=warps, stages=stages)
    return Case(label=label, op=op, launch=launch, scalars={"rows": rows, "cols": 512})


SPILLING = tiny("spilling", width=256, warps=1)


def cases(arch: int) -> list[Case]:
    """Four cases, three binaries: the second shares the first's, the third differs in the divisibility of `rows` alone,
    the last takes more than 48 KB of shared memory."""
    del arch  # the same for all
    return [tiny(), tiny("again", rows=151), tiny("aligned", rows=48), tiny("large", width=128, stages=4)]
