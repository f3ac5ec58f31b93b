"""Checks that see the mutants: small calls of the public launchers, beside float64 or under the sanitizer.

Tensors have exactly the size that they must have, and the longest sequence comes last: what is read or written behind it
leaves the tensor.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from decode_inputs import assert_parity, paged, scale_of
from decode_inputs import make as decode_step
from experts64 import Heads, experts64, make, runs
from prefill_inputs import Kernel
from prefill_inputs import assert_parity as prefill_parity
from prefill_inputs import make as prefill_prompts
from tolerance import assert_close
from torch import Tensor

from mosear.config import Policy, Route, Select, Statistic
from mosear.kernels.modality_experts.launcher import modality_experts_of
from mosear.kernels.reallocated_attention.decode_run import decode_attention

HEADS = Heads(width=40, columns=(24, 9), experts=3, rank=4)
GROUPS = runs((0, 13), (1, 30), (2, 5), (0, 23))


def compare(heads: Heads, tensors: dict[str, Tensor], kind: str = "kernel_fp32") -> None:
    choices: dict[str, Any] = heads.choices  # Any: keyword arguments of several types
    y, gates = modality_experts_of(**tensors, **choices)
    expected_y, expected_gates, _ = experts64(heads, tensors)
    assert_close(gates, expected_gates, "kernel_fp32")
    assert_close(y.float(), expected_y, kind)


def experts() -> None:
    """71 rows in runs of all groups: tiles of one group, and mixed ones."""
    compare(HEADS, make(HEADS, rows=len(GROUPS)) | {"group": GROUPS})


def experts_own_a() -> None:
    heads = dataclasses.replace(HEADS, share_a=False)
    compare(heads, make(heads, rows=len(GROUPS)) | {"group": GROUPS})


def experts_large_logits() -> None:
    tensors = make(HEADS, rows=20)
    tensors["gate"] *= 300.0
    compare(HEADS, tensors)


def experts_ties() -> None:
    heads = Heads(width=1, columns=(3,), experts=3, rank=1, select=Select.TOP1)
    tensors = make(heads, rows=3) | {"group": torch.arange(3, dtype=torch.int32), "x": torch.ones(3, 1)}
    compare(heads, tensors | {"gate": torch.tensor([-1.0, 2, 2, 3, 3, 3, 0, 0, 1])[:, None]})


def experts_in_parts() -> None:
    """A step of decoding, wide enough for several parts of d."""
    heads = Heads(width=1100, columns=(40, 24), rank=8)
    compare(heads, make(heads, rows=3) | {"group": torch.zeros(3, dtype=torch.int32)})


def experts_memory() -> None:
    """bf16, all choices, several parts of d, sizes that are no multiple of a tile."""
    for heads in (
        Heads(width=1060, columns=(40, 23), rank=8, share_a=False),
        Heads(width=72, columns=(130,), experts=3, rank=3, select=Select.TOP1),
        Heads(width=72, columns=(9, 7, 5), route=Route.MODALITY),
    ):
        rows = 5 if heads.width > 1000 else 19
        compare(heads, make(heads, rows=rows, dtype=torch.bfloat16), "kernel_bf16")


def experts_prefill_memory() -> None:
    heads = Heads(width=72, columns=(40, 23), rank=8)
    compare(heads, make(heads, rows=67, dtype=torch.float16) | {"group": runs((0, 30), (1, 37))}, "kernel_fp16")


def experts_stray_ids() -> None:
    """Ids that are no group's, unchecked: y = base there, and no access out of bounds."""
    heads: Heads = HEADS
    tensors = make(heads, rows=9)
    tensors["group"][[2, 8]] = torch.tensor([-7, 3], dtype=torch.int32)
    choices: dict[str, Any] = heads.choices
    y = modality_experts_of(**tensors, **choices)[0]
    assert y[[2, 8]].equal(tensors["base"][[2, 8]])


def decode() -> None:
    """Ragged lengths, grouped heads, rows before and after first_row, each policy."""
    for policy, statistic in ((Policy.BALANCE, Statistic.MEAN), (Policy.TARGET, Statistic.SUM)):
        tensors = decode_step([5, 90, 170], heads=6, kv_heads=2)
        tensors["first_row"] = tensors["query_position"][:, 0].clone()
        tensors["first_row"][0] += 1
        assert_parity(tensors, policy, statistic)


def decode_stray_ids() -> None:
    """Ids that are no group's, unchecked: their keys count as group 0."""
    tensors = decode_step([9, 40])
    settings: dict[str, Any] = {"policy": Policy.TARGET, "statistic": Statistic.SUM, "scale": scale_of(tensors)}
    stray = tensors | {"key_group": tensors["key_group"].clone()}
    stray["key_group"][1, [3, 20]] = torch.tensor([-7, 3], dtype=torch.int32)
    tensors["key_group"][1, [3, 20]] = 0
    for ours, theirs in zip(
        decode_attention(**stray, **settings), decode_attention(**tensors, **settings), strict=True
    ):
        assert_close(ours, theirs, "op")


def decode_splits() -> None:
    """So many splits that the merge reads their statistics in several blocks."""
    from mosear.kernels.reallocated_attention import decode_launches

    tensors = decode_step([40, 6000], heads=2, kv_heads=1)
    tensors["key"][1, :, -1000:] *= 3.0  # the largest logits come late
    plan = decode_launches.choose_launch(
        batch=2, heads=2, kv_heads=1, head_size=64, groups=3, longest=6000, policy=Policy.BALANCE,
        statistic=Statistic.SUM, scale=scale_of(tensors), causal=True, arch=90,
    )  # fmt: skip
    assert 3 * plan.splits > plan.merge.constants["BLOCK"]
    assert_parity(tensors, Policy.BALANCE, Statistic.SUM)


def decode_paged() -> None:
    tensors = decode_step([5, 100, 192], kv_heads=2)
    settings: dict[str, Any] = {"policy": Policy.BALANCE, "statistic": Statistic.SUM, "scale": scale_of(tensors)}
    expected = decode_attention(**tensors, **settings)
    for page in (16, 64):
        for ours, theirs in zip(decode_attention(**paged(tensors, page), **settings), expected, strict=True):
            assert_close(ours, theirs, "kernel_fp32")


def decode_memory(page: int = 0) -> None:
    """bf16; the longest sequence last, exactly as long as its cache."""
    tensors = decode_step([3, 70, 147 if not page else 160], dtype=torch.bfloat16)
    tensors |= {name: tensors[name].nan_to_num() for name in ("key", "value")}
    if page:
        tensors = paged(tensors, page)
    output, before, after = decode_attention(
        **tensors, policy=Policy.BALANCE, statistic=Statistic.MEAN, scale=scale_of(tensors)
    )  # fmt: skip
    for part in (output, before, after):
        assert np.isfinite(part.float().numpy()).all()


def decode_paged_memory() -> None:
    for page in (16, 32):
        decode_memory(page)


def prefill() -> None:
    """Ragged prompts with padding rows, groups in any order, rows before and after first_row, each way to move mass."""
    tensors = prefill_prompts([20, 75], size=64)
    for policy, statistic in ((Policy.BALANCE, Statistic.MEAN), (Policy.TARGET, Statistic.SUM)):
        prefill_parity(tensors, policy=policy, statistic=statistic, block_m=32, block_n=16)


def prefill_unmoved() -> None:
    """No row moves mass: one sweep alone."""
    tensors = prefill_prompts([20, 75])
    prefill_parity(tensors | {"first_row": torch.full((2,), 99, dtype=torch.int32)}, block_m=32, block_n=16)


def prefill_runs() -> None:
    """Tiles of one group, another layout for each request, and mixed ones."""
    tensors = prefill_prompts([70, 90], runs=[(20, 0), (30, 1), (18, 2), (40, 0)])
    tensors["key_group"][1, :40] = 2
    prefill_parity(tensors, Kernel.RUNS, block_m=32, block_n=16)


def prefill_memory(kernel: str = Kernel.GENERAL) -> None:
    """bf16; the longest prompt last, exactly as long as its cache; rows and keys end within a tile."""
    tensors = prefill_prompts([9, 43], dtype=torch.bfloat16, runs=[(20, 0), (16, 1), (9, 2)])
    for statistic, first_row in ((Statistic.MEAN, 0), (Statistic.SUM, 99)):
        moved = tensors | {"first_row": torch.full((2,), first_row, dtype=torch.int32)}
        prefill_parity(moved, Kernel(kernel), statistic=statistic, block_m=16, block_n=16)


def prefill_runs_memory() -> None:
    prefill_memory(Kernel.RUNS)
