"""Attention for training: explicit, as sequences are short; reallocation on answer rows, and rows that may not look."""

import torch
from torch import Tensor

from mosear.config import Policy, Statistic
from mosear.kernels.reallocated_attention.policy import reallocate
from mosear.kernels.reallocated_attention.reference import visibility
from mosear.runtime.prompt import TEXT
from mosear_export.model.decoder import ReferenceOps


class TrainOps(ReferenceOps):
    """`Ops` without a cache. The trainer sets, for each batch:

    policy, params: what moves the masses of rows from first_row on (params [H, P], contract.AR_PARAMS).
    direct: bool [B], examples whose text rows before first_row see no face and no voice, so that an answer must look at
    these itself: reallocation acts on answer rows alone, and what text rows carry over to them it cannot move.
    """

    def __init__(self) -> None:
        self.policy, self.params = Policy.OFF, torch.zeros(0)
        self.direct: Tensor | None = None

    def attend(self, *tensors: Tensor, policy: str, statistic: str, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """As the contract's op, without chunks: keys are the rows of this call."""
        query, key, value, key_group, position, length, first_row, given, strength, bias = tensors
        seen = visibility(key_group, position, length, bias, causal=True)  # [B, S, L]
        answering = position >= first_row[:, None]  # [B, S]
        if self.direct is not None:
            modal = (key_group != TEXT)[:, None, :]
            asking = (key_group == TEXT) & ~answering
            seen = seen & ~(self.direct[:, None, None] & modal & asking[:, :, None])
        heads = query.shape[1] // key.shape[1]
        keys, values = (x.repeat_interleave(heads, dim=1) for x in (key, value))
        scores = (query @ keys.mT).float() * scale
        scores = scores + bias.gather(1, key_group.long()).nan_to_num(neginf=0.0)[:, None, None, :]
        weights = scores.masked_fill(~seen[:, None], -1e9).softmax(-1)  # [B, H, S, L]
        groups = torch.nn.functional.one_hot(key_group.long(), bias.shape[1]).to(weights.dtype)  # [B, L, G]
        before = weights @ groups[:, None]  # [B, H, S, G]
        after = before
        if self.policy is not Policy.OFF:
            count = (seen.to(weights.dtype) @ groups)[:, None]  # [B, 1, S, G]
            after = reallocate(
                before, count, self.params if self.params.numel() else given, strength,
                policy=self.policy, statistic=Statistic(statistic),
            )  # fmt: skip
            after = torch.where(answering[:, None, :, None], after, before)
            weights = weights * ((after / before.clamp(min=1e-12)) @ groups[:, None].mT)
        return weights.to(values.dtype) @ values, before.detach(), after.detach()

    def write(self, cache: Tensor, rows: Tensor, start: Tensor) -> Tensor:
        return rows
