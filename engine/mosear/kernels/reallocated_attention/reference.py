"""Reallocated attention on the whiteboard: fp32, everything materialised.

    p_j = softmax over visible keys of q . k_j * scale + b_g(j)     m_g = sum of p_j over the keys of g
    m'  = m + strength * (pi(m, n) - m)                             o   = sum over g of m'_g * o_g

o_g is softmax attention over g's visible keys alone. b = -inf mutes a group. A row without a visible key gives zeros.
Source of the mechanism: the MoSEAR project page (attention reallocation); the formula is our reconstruction.
"""

import torch
from torch import Tensor

from mosear.config import Policy, Statistic
from mosear.kernels.reallocated_attention.policy import reallocate


def visibility(key_group: Tensor, position: Tensor, key_length: Tensor, group_bias: Tensor, *, causal: bool) -> Tensor:
    """Which keys a row sees: bool [B, S, L] from groups [B, L], positions [B, S], lengths [B] and bias [B, G]."""
    slot = torch.arange(key_group.shape[1], device=key_group.device)
    seen = (slot < key_length[:, None])[:, None, :] & (position >= 0)[:, :, None]
    if causal:
        seen = seen & (slot <= position[:, :, None])
    muted = torch.isneginf(group_bias).gather(1, key_group.long())  # [B, L]
    return seen & ~muted[:, None, :]


def reallocated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_group: Tensor,
    query_position: Tensor,
    key_length: Tensor,
    first_row: Tensor,
    policy_params: Tensor,
    strength: Tensor,
    group_bias: Tensor,
    *,
    policy: Policy,
    statistic: Statistic,
    scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention whose mass moves between modalities.

    query [B, H, S, D]; key, value [B, K, L, D]; key_group i32 [B, L]; query_position i32 [B, S] (-1: padding row);
    key_length, first_row i32 [B]; policy_params [H, P] (contract.AR_PARAMS); strength [B] in 0..1; group_bias [B, G].
    Returns output [B, H, S, D] and the masses before and after, each [B, H, S, G].
    """
    groups, heads = group_bias.shape[1], query.shape[1]
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))  # [B, H, L, D]
    seen = visibility(key_group, query_position, key_length, group_bias, causal=causal)  # [B, S, L]
    member = key_group[:, None, :] == torch.arange(groups, device=key.device)[:, None]  # [B, G, L]
    mask = seen[:, None, :, None, :] & member[:, None, None]  # [B, 1, S, G, L]
    scores = (query @ key.mT * scale)[:, :, :, None, :].masked_fill(~mask, -torch.inf)  # [B, H, S, G, L]
    per_group = torch.nan_to_num(scores.softmax(-1))  # [B, H, S, G, L]: o_g's weights
    bias = torch.where(torch.isneginf(group_bias), 0.0, group_bias)[:, None, None, :]
    before = torch.nan_to_num((scores.logsumexp(-1) + bias).softmax(-1))  # [B, H, S, G]
    after = reallocate(before, mask.sum(-1), policy_params, strength, policy=policy, statistic=statistic)
    after = torch.where((query_position >= first_row[:, None])[:, None, :, None], after, before)
    weights = (after[..., None] * per_group).sum(-2)  # [B, H, S, L]
    return weights @ value, before, after
