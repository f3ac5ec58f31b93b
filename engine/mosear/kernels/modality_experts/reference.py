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

    base [..., d_out]; x [..., d]; group i32 [...]; gates_in [..., E] (read when route = modality);
    a [R, d] or [G*R, d]; gate [G*E, d]; b [G*E*R, d_out] (row (g*E + e)*R + r: Bcat of the fused form); weight [G].
    Returns y [..., d_out] and gates [..., E].
    """
    experts, groups = gates_in.shape[-1], weight.shape[0]
    rank = b.shape[0] // (groups * experts)
    member = torch.nn.functional.one_hot(group.long(), groups).to(x.dtype)  # [..., G]
    u = (x @ a.mT).unflatten(-1, (-1, 1, rank))  # [..., 1|G, 1, R]
    if route is Route.MODALITY:
        s = gates_in.unsqueeze(-2)  # [..., 1, E]: those of the token's own group, given
    else:
        s = gate_weights((x @ gate.mT).unflatten(-1, (groups, experts)), select)  # [..., G, E]
    mixed = (scale * weight * member)[..., None, None] * s[..., None] * u  # [..., G, E, R]
    gates = (member[..., None] * s).sum(-2)  # [..., E]
    return base + mixed.flatten(-3) @ b, gates
