"""Modality experts in float64, token by token, for layers that share an input: what the kernels are held to; and inputs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mosear.config import Route, Select

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """What a test chooses of a call; `columns` are d_out of each layer."""

    width: int = 24
    columns: tuple[int, ...] = (16, 7)
    groups: int = 3
    experts: int = 2
    rank: int = 4
    share_a: bool = True
    select: Select = Select.SOFT
    route: Route = Route.TOKEN
    scale: float = 2.0

    @property
    def choices(self) -> dict[str, object]:
        """Keyword arguments of the launcher."""
        return {"columns": self.columns, "scale": self.scale, "select": self.select, "route": self.route}


def make(heads: Heads, *, rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens of all groups in any order, and heads whose delta is about as large as the base."""
    generator = torch.Generator().manual_seed(seed)
    targets, sets, total = len(heads.columns), 1 if heads.share_a else heads.groups, sum(heads.columns)

    def noise(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    group = torch.randint(0, heads.groups, (rows,), generator=generator, dtype=torch.int32)
    group[: min(rows, heads.groups)] = torch.arange(heads.groups)[:rows]
    return {
        "base": noise(rows, total),
        "x": noise(rows, heads.width),
        "group": group,
        "gates_in": torch.rand(rows, targets, heads.experts, generator=generator),
        "a": noise(targets * sets * heads.rank, heads.width, scale=heads.width**-0.5),
        "gate": noise(targets * heads.groups * heads.experts, heads.width, scale=heads.width**-0.5),
        "b": noise(heads.groups * heads.experts * heads.rank, total, scale=heads.rank**-0.5),
        "weight": torch.rand(heads.groups, generator=generator) + 0.5,
    }


def experts64(heads: Heads, tensors: dict[str, Tensor]) -> tuple[Array, Array, Array]:
    """DESIGN's formula for each token and layer: y [N, O], gates [N, T, E], and y's terms summed by size [N, O]."""
    t = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    targets, starts = len(heads.columns), np.cumsum([0, *heads.columns])
    a = t["a"].reshape(targets, -1, heads.rank, heads.width)  # [T, 1|G, R, d]
    b = t["b"].reshape(heads.groups, heads.experts, heads.rank, -1)
    y, size, gates = t["base"].copy(), np.abs(t["base"]), t["gates_in"].copy()
    logits = logits64(heads, tensors)
    for n, m in enumerate(tensors["group"].tolist()):
        for i in range(targets):
            own, row = slice(starts[i], starts[i + 1]), a[i, 0 if heads.share_a else m]
            s = gates[n, i]
            if heads.route is Route.TOKEN:
                s[:] = weights(logits[n, i], heads.select)
            factor = heads.scale * t["weight"][m]
            y[n, own] += factor * sum(s[e] * (row @ t["x"][n] @ b[m, e][:, own]) for e in range(heads.experts))
            terms = np.abs(row) @ np.abs(t["x"][n])
            size[n, own] += abs(factor) * sum(s[e] * (terms @ np.abs(b[m, e][:, own])) for e in range(heads.experts))
    return y, gates, size


def logits64(heads: Heads, tensors: dict[str, Tensor]) -> Array:
    """Each token's logits of its own group's experts, [N, T, E]."""
    gate = tensors["gate"].double().numpy().reshape(len(heads.columns), heads.groups, heads.experts, heads.width)
    own = gate[:, tensors["group"].numpy()]  # [T, N, E, d]
    return np.einsum("tned,nd->nte", own, tensors["x"].double().numpy())


def decided(heads: Heads, tensors: dict[str, Tensor]) -> NDArray[np.bool_]:
    """Where [N, T] the best expert is so by more than fp32's rounding, or by a tie of equal rows, or does not count."""
    if heads.select is Select.SOFT or heads.route is Route.MODALITY or heads.experts == 1:
        return np.ones((len(tensors["x"]), len(heads.columns)), bool)
    ordered = np.sort(logits64(heads, tensors), -1)
    gap = ordered[..., -1] - ordered[..., -2]
    terms = logits64(heads, tensors | {name: tensors[name].abs() for name in ("x", "gate")}).max(-1)
    return (gap == 0) | (gap > 1e-6 * terms)


def weights(logits: Array, select: Select) -> Array:
    """softmax, or the one-hot of the first largest."""
    if select is Select.TOP1:
        return np.eye(len(logits))[logits.argmax()]
    raised = np.exp(logits - logits.max())
    return raised / raised.sum()


def runs(*lengths: tuple[int, int]) -> Tensor:
    """Group ids i32 [N] of runs (group, length)."""
    ids: Sequence[int] = [group for group, length in lengths for _ in range(length)]
    return torch.tensor(ids, dtype=torch.int32)
