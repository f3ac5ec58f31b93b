"""Reallocated attention by another route: PyTorch's FlexAttention, twice, and never a softmax of one group alone.

Pass 1 attends over one-hot "values" of the groups, which gives their masses. Pass 2 adds log(m'_g / m_g) to each score:
mass is kept, so that the second softmax needs no other sum. A group whose mass underflows is out of its reach.
"""

import warnings

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from mosear.config import Policy, Statistic
from mosear.kernels.reallocated_attention.policy import reallocate


def two_passes(
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
    """Output and masses in float64; arguments as the whiteboard's."""
    query, key, value, table, part, bias = (
        x.double() for x in (query, key, value, policy_params, strength, group_bias)
    )
    ids, groups = key_group.long(), group_bias.shape[1]

    def seen(b: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        position = query_position[b, row]
        shown = (position >= 0) & (slot < key_length[b]) & (bias[b, ids[b, slot]] > -torch.inf)
        return shown & (slot <= position) if causal else shown

    def attend(what: Tensor, extra: Tensor) -> Tensor:
        """Attention over `what` [B, K, L, any] with extra [B, H, S, G] added to the scores of each group."""

        def score(s: Tensor, b: Tensor, h: Tensor, row: Tensor, slot: Tensor) -> Tensor:
            return torch.where(seen(b, row, slot), s + extra[b, h, row, ids[b, slot]], -torch.inf)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it runs uncompiled
            found = flex_attention(query, key, what, score_mod=score, scale=scale, enable_gqa=True)
        assert isinstance(found, Tensor)
        return found.nan_to_num()  # a row that sees nothing

    one_hot = torch.nn.functional.one_hot(ids, groups).double()[:, None].expand(-1, key.shape[1], -1, -1)
    shift = bias[:, None, None, :].expand(*query.shape[:3], groups)
    before = attend(one_hot, shift)  # [B, H, S, G]
    batch, row, slot = (
        torch.arange(n).view(shape)
        for n, shape in zip((*query_position.shape, ids.shape[1]), ((-1, 1, 1), (1, -1, 1), (1, 1, -1)), strict=True)
    )
    count = seen(batch, row, slot).double() @ torch.nn.functional.one_hot(ids, groups).double()  # [B, S, G]
    after = reallocate(before, count[:, None], table, part, policy=policy, statistic=statistic)
    after = torch.where((query_position >= first_row[:, None])[:, None, :, None], after, before)
    return attend(value, shift + (after / before).log().nan_to_num(nan=0.0, neginf=-torch.inf)), before, after
