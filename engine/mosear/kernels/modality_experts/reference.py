"""Gated mixture of modality-specific LoRA experts on the whiteboard.

    u = A x        s = softmax(Gate_m z)  (top1: its one-hot)        y = W x + scale * w_m * sum over e of s_e * B_{m,e} u

m is the token's modality. Source of the mechanism: the MoSEAR project page (shared A, several B per modality, a gate);
the nearest published formula is HydraLoRA's. What the page leaves open is configuration.
"""

import torch
from torch import Tensor

from mosear.config import Route, Select


def gate_weights(logits: Tensor, select: Select) -> Tensor:
    """Expert weights [..., E] of gate logits [..., E]; ties of top1 take the lowest index."""
    soft = logits.softmax(-1)
    if select is Select.SOFT:
        return soft
    return torch.nn.functional.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)


def modality_experts(
    base: Tensor,
    x: Tensor,
    group: Tensor,
    gates_in: Tensor,
    a: Tensor,
    gate: Tensor,
    b: Tensor,
    weight: Tensor,
    *,
    scale: float,
    select: Select,
    route: Route,
) -> tuple[Tensor, Tensor]:
    """Add the experts' delta to a linear layer's output.

    base [N, d_out]; x [N, d]; group i32 [N]; gates_in [N, E] (read when route = modality); a [1|G, R, d]; gate [G, E, d];
    b [G, E, R, d_out] (rows of the fused matrix Bcat); weight [G]. Returns y [N, d_out] and gates [N, E].
    """
    member = torch.nn.functional.one_hot(group.long(), gate.shape[0]).to(x.dtype)  # [N, G]
    u = torch.einsum("nd,grd->ngr", x, a)  # [N, 1|G, R]
    if route is Route.MODALITY:
        s = gates_in[:, None, :]  # [N, 1, E]: the token's own group's, given
    else:
        s = gate_weights(torch.einsum("nd,ged->nge", x, gate), select)  # [N, G, E]
    mixed = (member * weight)[:, :, None, None] * s[..., None] * u[:, :, None, :]  # [N, G, E, R]
    gates = (member[..., None] * s).sum(1)  # [N, E]
    return base + scale * torch.einsum("nger,gero->no", mixed, b), gates
