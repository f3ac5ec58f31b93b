"""Policies of attention reallocation: maps of the modality masses m, all parameters per head.

balance  A modality whose share s_g / (s_a + s_v) of the two lies above its tau gives the part
         `move * clip((share - tau) / ramp, 0, 1)` of its mass to the other; s is the mass, or the mass per visible key.
         Only where both are visible and m_a + m_v >= sigma.
target   audio gets the share `audio_share` of m_a + m_v, `move_audio` of the way. Only where both are visible.
off      pi = m.

The thresholds, the ramp and the moved share are ours, not the paper's.
"""

import torch
from torch import Tensor

from mosear.config import ARConfig, Policy, Statistic

VIDEO, AUDIO = 1, 2


def params(config: ARConfig, *, layer: int, heads: int) -> Tensor:
    """Rows of `contract.AR_PARAMS` for a layer's heads: f32 [H, P]. A layer that `config.layers` leaves out moves nothing."""
    move = config.move if not config.layers or layer in config.layers else 0.0
    row = [1 - config.tau_lo, config.tau_hi, config.ramp, config.ramp, move, move, config.sigma, config.audio_share]
    return torch.tensor(row).repeat(heads, 1)


def reallocate(
    before: Tensor, count: Tensor, policy_params: Tensor, strength: Tensor, *, policy: Policy, statistic: Statistic
) -> Tensor:
    """m' = m + strength * (pi(m, n) - m).

    before f32 [B, H, S, G]; count [B, 1 or H, S, G] visible keys; policy_params [H, P]; strength [B]. Returns m' like m.
    """
    if policy is Policy.OFF:
        return before
    tau, ramp, move, rest = policy_params[None, :, None, :].split(2, dim=-1)  # each [1, H, 1, 2]: video, audio
    sigma, audio_share = rest.unbind(-1)  # [1, H, 1]
    pair, keys = (x[..., VIDEO : AUDIO + 1] for x in (before, count))  # [B, H, S, 2]
    total = pair.sum(-1)
    if policy is Policy.BALANCE:
        value = pair / keys.clamp(min=1) if statistic is Statistic.MEAN else pair
        share = value / value.sum(-1, keepdim=True).clamp(min=torch.finfo(before.dtype).tiny)
        video, audio = (pair * move * ((share - tau) / ramp).clamp(0, 1)).unbind(-1)
        flow = (audio - video) * (total >= sigma)
    else:
        flow = move[..., 1] * (pair[..., 1] - audio_share * total)
    flow = strength[:, None, None] * flow * (keys > 0).all(-1)  # audio -> video
    after = before.clone()
    after[..., VIDEO] += flow
    after[..., AUDIO] -= flow
    return after
