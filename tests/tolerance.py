"""How far numbers of two computations may lie apart: one table, one check."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest error and root mean square error, each as a share of the same of the expected tensor."""

    worst: float
    rms: float


# A measured error stands beside what it allows; widening one needs a new measurement.
TABLE = {
    # The same fp32 operations in another grouping of calls, or other BLAS kernels for other shapes.
    "regrouped": Tolerance(1e-5, 2e-6),
    # A formula in fp32 against the same in fp64, one op. What the plain flavour's shift by 60 costs is in it: logits
    # near 60 are held to 2e-6 (measured: RMS 2.3e-6; the whiteboard 5e-7).
    "op": Tolerance(1e-5, 4e-6),
    # The same where an error is magnified: logits of -100, which fp32 holds to 4e-6 (measured: 4.6e-6, RMS 3.7e-6), or
    # a share on a ramp of 0.1, whose error counts tenfold (measured in 3000 calls: 3.7e-6).
    "far": Tolerance(2e-5, 1e-5),
    # The same in fp32 by another library, through a toy of two layers.
    "toy": Tolerance(2e-5, 5e-6),
    # The same by another library, through the 30 layers of the demo's backbone.
    "demo": Tolerance(1e-4, 2e-5),
    # Two formulas in fp64 (measured: 4.4e-16).
    "fp64": Tolerance(1e-13, 1e-13),
    # A kernel against fp64: sums in fp32; probabilities and outputs rounded to the activations' type, half a step of
    # which is 2^-11 (fp16) or 2^-8 (bf16) of a value. Measured at decode, interpreted, up to 16k keys: fp32 2.0e-6 (RMS
    # 1.0e-6), fp16 4.4e-4 (2.8e-4), bf16 3.3e-3 (2.0e-3).
    "kernel_fp32": Tolerance(1e-5, 4e-6),
    "kernel_fp16": Tolerance(1e-3, 5e-4),
    "kernel_bf16": Tolerance(8e-3, 4e-3),
}
# Reallocation jumps where m_a + m_v crosses sigma: parity means nothing for a row this close to it.
JUMP_DISTANCE, MOST_LEFT_OUT = 1e-5, 0.005


def assert_close(actual: ArrayLike, expected: ArrayLike, kind: str) -> None:
    """Compare with the tolerances of a row of TABLE. Infinities must match in place and sign; NaN is never close."""
    a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert a.shape == e.shape, f"shape {list(a.shape)}, expected {list(e.shape)}"
    assert a.size, "nothing to compare"
    with np.errstate(invalid="ignore"):
        error: NDArray[Any] = np.where(a == e, 0.0, np.abs(a - e))
    error = np.where(np.isfinite(error), error, np.inf)
    values = e[np.isfinite(e)]
    scale = np.abs(values).max(initial=np.finfo(np.float64).tiny)
    scale_rms = max(np.sqrt(np.mean(values**2)) if values.size else 0.0, np.finfo(np.float64).tiny)
    worst, rms = error.max() / scale, np.sqrt(np.mean(error**2)) / scale_rms
    at = tuple(int(i) for i in np.unravel_index(error.argmax(), error.shape))
    limit = TABLE[kind]
    line = (
        f"{kind}: max relative error {worst:.3g} (limit {limit.worst:g}), RMS {rms:.3g} (limit {limit.rms:g}), "
        f"worst at {at}: {a[at]!r}, expected {e[at]!r}"
    )
    print(line)
    assert worst <= limit.worst and rms <= limit.rms, line


def clear_rows(pair_mass: ArrayLike, sigma: float) -> NDArray[np.bool_]:
    """Which rows of reallocated attention lie clear of the jump; fails where more than MOST_LEFT_OUT (and one) do not.

    pair_mass: m_a + m_v of each row, before reallocation.
    """
    clear: NDArray[np.bool_] = np.abs(np.asarray(pair_mass, np.float64) - sigma) > JUMP_DISTANCE
    left_out = int(np.sum(~clear))
    line = f"{left_out} of {clear.size} rows left out: they lie within {JUMP_DISTANCE} of the jump at {sigma}"
    print(line)
    assert left_out <= max(1, MOST_LEFT_OUT * clear.size), line
    return clear
