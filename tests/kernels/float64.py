"""Reallocated attention in float64 with everything materialised: what every kernel is held to.

Written from the formula, one request and head at a time, in numpy: nothing of the whiteboard in torch is used.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mosear.config import Policy, Statistic
from mosear.contract import AR_PARAMS
from mosear.kernels.reallocated_attention.policy import AUDIO, VIDEO

Array = NDArray[np.float64]


def attention64(
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
) -> tuple[Array, Array, Array]:
    """Output [B, H, S, D] and the masses before and after [B, H, S, G]; arguments as the whiteboard's, of any dtype."""
    q, k, v, table, part, bias = (
        x.detach().double().numpy() for x in (query, key, value, policy_params, strength, group_bias)
    )
    ids, position, length, first = (x.numpy().astype(int) for x in (key_group, query_position, key_length, first_row))
    (batch, heads, rows, size), groups = q.shape, bias.shape[1]
    output, before, after = np.zeros((batch, heads, rows, size)), *np.zeros((2, batch, heads, rows, groups))
    for b in range(batch):
        filled = min(length[b], k.shape[2])  # a slot behind the length may hold anything, its id too
        member = np.arange(groups)[:, None] == ids[b, :filled]  # [G, L]
        seen = visible(position[b], filled, causal=causal) & (bias[b] > -np.inf)[ids[b, :filled]]  # [S, L]
        count = seen @ member.T.astype(float)  # [S, G]
        shift = np.where(bias[b] > -np.inf, bias[b], 0.0)[ids[b, :filled]]
        for h in range(heads):
            cached = h // (heads // k.shape[1])
            p = softmax(q[b, h] @ k[b, cached, :filled].T * scale + shift, seen)  # [S, L]
            m = p @ member.T.astype(float)  # [S, G]
            aim = at_full_strength(m, count, dict(zip(AR_PARAMS, table[h], strict=True)), policy, statistic)
            moved = m + np.where(position[b] >= first[b], part[b], 0.0)[:, None] * (aim - m)
            before[b, h], after[b, h] = m, moved
            output[b, h] = of_groups(
                q[b, h] @ k[b, cached, :filled].T * scale, seen, member, v[b, cached, :filled], moved
            )
    return output, before, after


def visible(position: NDArray[np.int_], filled: int, *, causal: bool) -> NDArray[np.bool_]:
    """Which of the filled slots rows at `position` [S] may see: [S, L]."""
    slot = np.arange(filled)
    reach = position if causal else np.where(position >= 0, filled, -1)
    return slot <= reach[:, None]


def softmax(logits: Array, seen: NDArray[np.bool_]) -> Array:
    """Over the last axis where seen; a row that sees nothing is zeros."""
    masked = np.where(seen, logits, -np.inf)
    top = masked.max(-1, keepdims=True, initial=-np.inf)
    weight = np.exp(masked - np.where(np.isfinite(top), top, 0.0))
    total = weight.sum(-1, keepdims=True)
    return weight / np.where(total > 0, total, 1.0)


def of_groups(logits: Array, seen: NDArray[np.bool_], member: NDArray[np.bool_], value: Array, moved: Array) -> Array:
    """Sum over the groups of m'_g * o_g: [S, D]."""
    parts = [moved[:, g, None] * (softmax(logits, seen & mine) @ value) for g, mine in enumerate(member)]
    return np.sum(parts, axis=0)


def at_full_strength(m: Array, n: Array, row: Mapping[str, float], policy: Policy, statistic: Statistic) -> Array:
    """pi(m, n): masses [S, G] and visible keys [S, G] of a head, and its row of AR_PARAMS."""
    moved, total = m.copy(), m[:, VIDEO] + m[:, AUDIO]
    both = (n[:, VIDEO] > 0) & (n[:, AUDIO] > 0)
    if policy is Policy.TARGET:
        audio = m[:, AUDIO] + row["move_audio"] * (row["audio_share"] * total - m[:, AUDIO])
        moved[:, AUDIO] = np.where(both, audio, m[:, AUDIO])
        moved[:, VIDEO] = np.where(both, total - audio, m[:, VIDEO])
    elif policy is Policy.BALANCE:
        live = both & (total >= row["sigma"])
        s = m / np.maximum(n, 1) if statistic is Statistic.MEAN else m
        pair = s[:, VIDEO] + s[:, AUDIO]
        for name, giver, taker in (("video", VIDEO, AUDIO), ("audio", AUDIO, VIDEO)):
            share = np.divide(s[:, giver], pair, out=np.zeros_like(pair), where=pair > 0)
            ramp = np.clip((share - row[f"tau_{name}"]) / row[f"ramp_{name}"], 0, 1)
            given = np.where(live, row[f"move_{name}"] * ramp * m[:, giver], 0.0)
            moved[:, giver] -= given
            moved[:, taker] += given
    return moved
