"""Scene encoder: EfficientNet-Lite0 up to its last feature map, pooled to a small grid.

Tan and Le, "EfficientNet" (2019), https://arxiv.org/abs/1905.11946; Lite: no squeeze-and-excitation, ReLU6, stem and
head unscaled. Every batch norm is folded into its convolution (`mosear_export.demo.efficientnet`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosear.config import SceneConfig

# ImageNet's mean and deviation, as the README of `efficientnet-lite-pytorch` uses them.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)

STEM_CHANNELS = 32
# kernel, stride of the first, expansion, channels, repeats
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class SameConv(nn.Module):
    """Convolution with TensorFlow's "same" padding on an even size: what is odd goes behind."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        before, odd = divmod(kernel - stride, 2)
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=0 if odd else before, groups=groups)
        self.pad = (before, before + 1) * 2 if odd else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels_in, h, w] -> [B, channels_out, h / stride, w / stride]"""
        filtered: Tensor = self.conv(x if self.pad is None else F.pad(x, self.pad))
        return filtered


class InvertedResidual(nn.Module):
    """Widen, filter each channel by itself, narrow; add the input where the shapes allow it."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels_in * expansion
        self.residual = stride == 1 and channels_in == channels_out
        self.expand = SameConv(channels_in, wide) if expansion > 1 else None
        self.depthwise = SameConv(wide, wide, kernel, stride, groups=wide)
        self.project = SameConv(wide, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels_in, h, w] -> [B, channels_out, h / stride, w / stride]"""
        wide = x if self.expand is None else F.relu6(self.expand(x))
        narrow: Tensor = self.project(F.relu6(self.depthwise(wide)))
        return x + narrow if self.residual else narrow


class SceneEncoder(nn.Module):
    """Picture -> pooled patch features."""

    mean: Tensor
    deviation: Tensor
    pooling: Tensor

    def __init__(self, config: SceneConfig) -> None:
        super().__init__()
        self.stem = SameConv(3, STEM_CHANNELS, kernel=3, stride=2)
        self.blocks = nn.ModuleList()
        channels = STEM_CHANNELS
        for kernel, stride, expansion, width, repeats in STAGES:
            for i in range(repeats):
                self.blocks.append(InvertedResidual(channels, width, kernel, 1 if i else stride, expansion))
                channels = width
        self.head = SameConv(channels, config.feature_size)
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", 255 * torch.tensor(DEVIATION).view(3, 1, 1), persistent=False)
        self.register_buffer("pooling", _adaptive_pooling(config.image_size // 32, config.grid), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """images u8 [B, size, size, 3] RGB -> f32 [B, grid * grid, features], rows first."""
        x = (images.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / self.deviation
        x = F.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        patches = F.relu6(self.head(x)).flatten(2).mT  # [B, size / 32 squared, features]
        return self.pooling @ patches


def _adaptive_pooling(size: int, grid: int) -> Tensor:
    """Adaptive average pooling of size x size to grid x grid as a matrix [grid * grid, size * size].

    A constant matrix product exports to any runtime; `adaptive_avg_pool2d` does so only where grid divides size.
    """
    cells = torch.eye(size * size).view(-1, size, size)
    return F.adaptive_avg_pool2d(cells, grid).flatten(1).mT.contiguous()
