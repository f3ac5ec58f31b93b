"""Regularisers of the gate. The paper says that the gate is regularised and that modality weights balance audio and video in
training; it gives no formula that we could read. These are published ones, each with its source.

load     E * sum over e of u_e^2, mean over linears and modalities; u_e: mean weight of expert e over the modality's tokens.
         1 where experts share evenly, E where one has all; equal to 1 + CV^2(u): the importance loss of Shazeer et al. 2017
         (arXiv 1701.06538, section 4).
entropy  mean over tokens of -sum over e of s_e ln s_e / ln E, from 0 (one expert) to 1 (all alike). A positive factor makes
         the gate choose, a negative one keeps it open. Grandvalet and Bengio 2004 (entropy minimisation).
balance  KL((w_a, w_v) / (w_a + w_v) || (1/2, 1/2)), w: modality weights; 0 where both weigh the same.
"""

import math

import torch
from torch import Tensor

from mosear.runtime.prompt import AUDIO, VIDEO

TINY = 1e-9


def load(gates: Tensor, group: Tensor, there: Tensor, *, groups: int) -> Tensor:
    """gates [B, linears, S, E]; group i32 [B, S]; there bool [B, S]: positions that are no padding. Returns a scalar."""
    member = torch.nn.functional.one_hot(group.long(), groups) * there[..., None]  # [B, S, G]
    member = member.to(gates.dtype)
    counts = member.sum((0, 1))  # [G]
    used = torch.einsum("blse,bsg->lge", gates, member)[:, counts > 0] / counts[counts > 0][:, None]
    return (gates.shape[-1] * used.square().sum(-1)).mean()


def entropy(gates: Tensor, there: Tensor) -> Tensor:
    """gates [B, linears, S, E], there bool [B, S]; a scalar from 0 to 1 (0 too where there is one expert)."""
    each = -(gates * gates.clamp(min=TINY).log()).sum(-1) / math.log(max(gates.shape[-1], 2))  # [B, linears, S]
    return (each * there[:, None]).sum() / (there.sum() * gates.shape[1])


def balance(weight: Tensor) -> Tensor:
    """weight [G]: modality weights; a scalar, 0 or more."""
    pair = weight[[VIDEO, AUDIO]].clamp(min=TINY)
    share = pair / pair.sum()
    return (share * (2 * share).log()).sum()
