"""Three references that share no line of attention: the float64 one, FlexAttention in two passes, the whiteboard."""

import itertools

import pytest
import torch
from decode_inputs import POLICIES, make, scale_of
from float64 import attention64
from second_reference import two_passes
from sweep import sweep
from tolerance import assert_close
from torch import Tensor

from mosear.config import Policy, Statistic
from mosear.kernels.reallocated_attention.reference import reallocated_attention


def prefill(groups: int, seed: int) -> dict[str, Tensor]:
    """Five rows of each of three requests: one with a padding row, one with a muted group, one whose rows reach far back."""
    tensors = make([9, 12, 5], heads=4, kv_heads=2, size=8, groups=groups, seed=seed)
    rows = torch.arange(5, dtype=torch.int32)
    tensors["query"] = torch.randn(3, 4, 5, 8, generator=torch.Generator().manual_seed(seed + 1))
    tensors["query_position"] = torch.stack([rows + 4, rows.flip(0) + 3, rows])
    tensors["query_position"][0, 4] = -1
    tensors["first_row"] = torch.tensor([6, 0, 3], dtype=torch.int32)
    tensors["group_bias"][1, seed % groups] = -torch.inf
    filled = torch.arange(12) < tensors["key_length"][:, None]
    tensors["key_group"] = tensors["key_group"].masked_fill(~filled, 0)  # the others look at no length first
    return tensors | {name: tensors[name].nan_to_num() for name in ("key", "value")}


@pytest.mark.parametrize(("groups", "causal"), sweep(itertools.product((3, 5), (True, False)), (5, True)))
@pytest.mark.parametrize(("policy", "statistic"), POLICIES)
def test_all_three_agree(policy: Policy, statistic: Statistic, groups: int, causal: bool) -> None:
    for seed in range(3):
        tensors = prefill(groups, seed)
        settings = {"policy": policy, "statistic": statistic, "scale": scale_of(tensors), "causal": causal}
        ours = attention64(**tensors, **settings)  # type: ignore[arg-type]
        second = two_passes(**tensors, **settings)  # type: ignore[arg-type]
        whiteboard = reallocated_attention(**tensors, **settings)  # type: ignore[arg-type]
        assert ((ours[1] != ours[2]).any()) == (policy is not Policy.OFF)
        assert not ours[0][0, :, 4].any() and ours[0][0, :, :4].any()
        for first, other, third in zip(ours, second, whiteboard, strict=True):
            assert_close(other.numpy(), first, "fp64")
            assert_close(third.numpy(), first, "op")
