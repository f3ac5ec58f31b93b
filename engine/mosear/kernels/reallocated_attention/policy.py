"""Policies of attention reallocation: maps of the modality masses m, all parameters per head.

balance  rho = s_a / (s_a + s_v), s the mass or the mass per visible key. Above tau_hi the share
         `move * clip((rho - tau_hi) / ramp, 0, 1)` of m_a goes to video; below tau_lo likewise from video to audio.
         Only where both are visible and m_a + m_v >= sigma.
target   audio gets the share `audio_share` of m_a + m_v, `move` of the way. Only where both are visible.
off      pi = m.

The thresholds, the ramp and the moved share are ours; the paper's are not public.
"""

import torch
from torch import Tensor

from mosear.config import ARConfig, Policy, Statistic
from mosear.contract import AR_PARAMS

VIDEO, AUDIO = 1, 2


def params(config: ARConfig, *, layer: int, heads: int) -> Tensor:
    """Rows of AR_PARAMS for a layer's heads: f32 [H, P]. A layer that `config.layers` leaves out moves nothing."""
    on = not config.layers or layer in config.layers
    row = torch.tensor([getattr(config, name) for name in AR_PARAMS], dtype=torch.float32)
    row[0] *= on
    return row.expand(heads, len(AR_PARAMS)).clone()


def reallocate(
    before: Tensor, count: Tensor, policy_params: Tensor, strength: Tensor, *, policy: Policy, statistic: Statistic
) -> Tensor:
    """m' = m + strength * (pi(m, n) - m).

    before f32 [B, H, S, G]; count [B, 1 or H, S, G] visible keys; policy_params [H, P]; strength [B]. Returns m' like m.
    """
    if policy is Policy.OFF:
        return before
    move, tau_lo, tau_hi, ramp, sigma, audio_share = policy_params[None, :, None, :].unbind(-1)  # each [1, H, 1]
    video, audio = before[..., VIDEO], before[..., AUDIO]  # [B, H, S]
    both = (count[..., VIDEO] > 0) & (count[..., AUDIO] > 0)
    if policy is Policy.BALANCE:
        n_v, n_a = (count[..., g].clamp(min=1) if statistic is Statistic.MEAN else 1 for g in (VIDEO, AUDIO))
        rho = (audio / n_a) / (audio / n_a + video / n_v).clamp(min=torch.finfo(before.dtype).tiny)
        to_video = audio * ((rho - tau_hi) / ramp).clamp(0, 1)
        to_audio = video * ((tau_lo - rho) / ramp).clamp(0, 1)
        flow = move * (to_video - to_audio) * (audio + video >= sigma)
    else:
        flow = move * (audio - audio_share * (audio + video))
    flow = strength[:, None, None] * flow * both  # audio -> video
    after = before.clone()
    after[..., VIDEO] += flow
    after[..., AUDIO] -= flow
    return after
