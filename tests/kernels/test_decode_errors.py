"""What the decode launcher refuses: each error names its argument and its limit."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from decode_inputs import make, paged, shifted
from torch import Tensor

from mosear.config import Policy, Statistic
from mosear.errors import ConfigError, KernelError
from mosear.kernels.reallocated_attention.decode_launches import choose_launch
from mosear.kernels.reallocated_attention.decode_run import decode_attention


def call(tensors: Mapping[str, Tensor], **settings: Any) -> tuple[Tensor, Tensor, Tensor]:  # Any: the launcher's
    given: dict[str, Any] = {"policy": Policy.BALANCE, "statistic": Statistic.SUM, "scale": 0.125}
    return decode_attention(**tensors, **given | settings)


SHAPES: dict[str, tuple[str, Any, str]] = {
    "two rows": ("query", lambda t: t.expand(-1, -1, 2, -1).contiguous(), "one row per request"),
    "no head axis": ("query", lambda t: t[:, 0, 0], "one row per request"),
    "fp64": ("query", lambda t: t.double(), "query is torch.float64"),
    "head size": ("query", lambda t: t[..., :32].contiguous(), "head size 32: decode attention serves 64 and 128"),
    "meta device": ("query", lambda t: t.to("meta"), "query is on meta"),
    "heads": ("query", lambda t: t[:, :3].contiguous(), "3 heads are 1 to 8 times K"),
    "query strides": ("query", lambda t: t.repeat(1, 1, 1, 2)[..., ::2], "query has strides"),
    "key dtype": ("key", lambda t: t.half(), "key is torch.float16: it must be torch.float32"),
    "key axes": ("key", lambda t: t[0], "key is"),
    "key size": ("key", lambda t: t[..., :32].contiguous(), "key is"),
    "key strides": ("key", lambda t: t.mT.contiguous().mT, "key has strides"),
    "key device": ("key", lambda t: t.to("meta"), "key is on meta"),
    "key address": ("key", shifted, "key begins at an address that is no multiple of 16"),
    "value length": ("value", lambda t: t[:, :, :9].contiguous(), "value is"),
    "ids in int8": ("key_group", lambda t: t.to(torch.int8), "key_group is torch.int8: it must be torch.int32"),
    "ids short": ("key_group", lambda t: t[:, :9].contiguous(), "it must be"),
    "position axes": ("query_position", lambda t: t.repeat(1, 2), r"query_position is \[2, 2\]: it must be \[2, 1\]"),
    "length in int64": ("key_length", lambda t: t.long(), "key_length is torch.int64"),
    "first_row batch": ("first_row", lambda t: t[:1].clone(), "first_row is"),
    "params of another head count": ("policy_params", lambda t: t[:2].clone(), "policy_params is"),
    "params in fp16": ("policy_params", lambda t: t.half(), "policy_params is torch.float16"),
    "strength axes": ("strength", lambda t: t[:, None], "strength is"),
    "two groups": ("group_bias", lambda t: t[:, :2].contiguous(), "G from 3 to 8"),
    "nine groups": ("group_bias", lambda t: t.repeat(1, 3), "G from 3 to 8"),
    "bias batch": ("group_bias", lambda t: t[:1].clone(), "group_bias is"),
}


def test_what_the_wrong_ones_are_changed_from_is_served() -> None:
    call(make([20, 12]), values_checked=True)
    call(paged(make([20, 12], capacity=24), 8), values_checked=True)


@pytest.mark.parametrize("name", SHAPES)
def test_a_wrong_tensor_is_named(name: str) -> None:
    argument, change, message = SHAPES[name]
    tensors = make([20, 12])
    with pytest.raises(KernelError, match=message):
        call(tensors | {argument: change(tensors[argument])})


def test_too_many_heads_for_one_cached_head() -> None:
    with pytest.raises(KernelError, match="9 heads are 1 to 8 times K"):
        call(make([20], heads=9, kv_heads=1))


VALUES: dict[str, tuple[str, Any, str]] = {
    "negative length": ("key_length", -1, r"key_length holds -1: it must lie in 0..20"),
    "length past the cache": ("key_length", 21, r"key_length holds 21: it must lie in 0..20"),
    "position": ("query_position", -2, r"query_position holds -2"),
    "position past the cache": ("query_position", 20, r"query_position holds 20: it must lie in -1..19"),
    "negative id": ("key_group", -1, r"key_group holds -1: it must lie in 0..2"),
    "id of no group": ("key_group", 3, r"key_group holds 3: it must lie in 0..2"),
    "NaN parameter": ("policy_params", torch.nan, "policy_params holds nan: it must be finite"),
    "endless parameter": ("policy_params", torch.inf, "policy_params holds inf"),
    "NaN strength": ("strength", torch.nan, "strength holds nan"),
    "strength": ("strength", 1.5, r"strength holds 1.5: it must lie in 0..1"),
    "NaN bias": ("group_bias", torch.nan, "group_bias holds nan"),
    "endless bias": ("group_bias", torch.inf, "group_bias holds inf: it must be finite, or -inf to mute"),
    "page": ("block_table", 99, r"block_table holds 99: it must lie in 0..6"),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_wrong_value_is_named_where_values_are_checked(name: str) -> None:
    argument, value, message = VALUES[name]
    tensors = make([20, 12])
    if argument == "block_table":
        tensors = paged(make([20, 12], capacity=24), 8)
    tensors[argument].view(-1)[0] = value
    with pytest.raises(KernelError, match=message):
        call(tensors, values_checked=True)


def test_a_length_past_the_cache_is_cut_and_an_unknown_id_counts_as_group_0() -> None:
    """What the launcher promises where values are not checked."""
    tensors = make([20, 20], heads=1, kv_heads=1)
    long = tensors | {"key_length": torch.tensor([20, 99], dtype=torch.int32)}
    for causal in (True, False):
        for ours, theirs in zip(call(long, causal=causal), call(tensors, causal=causal), strict=True):
            assert ours.equal(theirs)
    text = tensors | {"key_group": tensors["key_group"].clone()}
    text["key_group"][0, 3] = text["key_group"][1, 4] = 0
    expected = call(text)
    for unknown in (3, 77, -1):
        text["key_group"][0, 3] = text["key_group"][1, 4] = unknown
        for ours, theirs in zip(call(text), expected, strict=True):
            assert ours.equal(theirs)


def test_pages_and_settings() -> None:
    tensors = paged(make([20, 12], capacity=24), 8)
    with pytest.raises(KernelError, match=r"block_table is torch\.int64"):
        call(tensors | {"block_table": tensors["block_table"].long()})
    with pytest.raises(KernelError, match=r"block_table is \[6\]"):
        call(tensors | {"block_table": tensors["block_table"].flatten()})
    with pytest.raises(KernelError, match=r"block_table is \[1, 3\]: it must be \[2, 3\]"):
        call(tensors | {"block_table": tensors["block_table"][:1].clone()})
    with pytest.raises(KernelError, match="longest is 25"):
        call(tensors, longest=25)
    with pytest.raises(KernelError, match="scale is nan"):
        call(tensors, scale=float("nan"))


def test_an_empty_batch_is_an_empty_answer_and_an_empty_cache_zeros() -> None:
    one = make([4])
    none = {n: t if n == "policy_params" else t[:0].clone() for n, t in one.items()}
    output, before, after = call(none)
    assert output.shape == (0, 4, 1, 64) and before.shape == after.shape == (0, 4, 1, 3)
    bare = one | {n: one[n][:, :, :0].contiguous() for n in ("key", "value")}
    bare |= {"key_group": one["key_group"][:, :0].contiguous(), "key_length": torch.zeros(1, dtype=torch.int32)}
    assert not any(part.any() for part in call(bare | {"query_position": torch.full((1,), -1, dtype=torch.int32)}))


def test_what_no_row_serves() -> None:
    settings: dict[str, Any] = {
        "batch": 1,
        "heads": 4,
        "kv_heads": 2,
        "groups": 3,
        "longest": 9,
        "scale": 1.0,
        "causal": True,
    }
    settings |= {"policy": Policy.OFF, "statistic": Statistic.SUM}
    with pytest.raises(KernelError, match="head_size is 96: decode attention serves 64 and 128"):
        choose_launch(**settings, head_size=96, arch=90)
    with pytest.raises(ConfigError, match="arch is 75"):
        choose_launch(**settings, head_size=64, arch=75)
