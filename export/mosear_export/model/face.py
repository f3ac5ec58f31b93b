"""Face detector and expression net: `TinyFaceDetector` and `FaceExpressionNet` of face-api (MIT), in torch.

https://github.com/vladmandic/face-api. Its convolutions and pools are TensorFlow's: "same" puts the odd row and column
of padding behind, never before.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosear.config import FaceConfig

LABELS = ("neutral", "happy", "sad", "angry", "fearful", "disgusted", "surprised")  # order of the 7 logits

ANCHORS = (
    (1.603231, 2.094468),
    (6.041143, 7.080126),
    (2.882459, 3.518061),
    (4.266906, 5.178857),
    (9.041765, 10.66308),
)  # width and height in cells
DETECTOR_MEAN = (117.001, 114.697, 97.404)
EXPRESSION_MEAN = (122.782, 117.001, 104.298)
DETECTOR_CHANNELS = (16, 32, 64, 128, 256, 512)
EXPRESSION_CHANNELS = (32, 64, 128)


class SeparableConv(nn.Module):
    """Depthwise 3 x 3, then pointwise with bias; "same" padding for stride 1, or stride 2 on an even size."""

    def __init__(self, channels_in: int, channels_out: int, *, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.depthwise = nn.Conv2d(
            channels_in, channels_in, 3, stride, padding=2 - stride, groups=channels_in, bias=False
        )
        self.pointwise = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels_in, h, w] -> [N, channels_out, h / stride, w / stride]"""
        if self.stride == 2:
            x = F.pad(x, (0, 1, 0, 1))
        mixed: Tensor = self.pointwise(self.depthwise(x))
        return mixed


class FaceDetector(nn.Module):
    """Picture -> a box and a score for each cell and anchor (no suppression of overlapping boxes)."""

    mean: Tensor
    corner: Tensor
    anchor: Tensor

    def __init__(self, config: FaceConfig) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, DETECTOR_CHANNELS[0], 3)  # unpadded, unlike the rest
        self.convs = nn.ModuleList(SeparableConv(*pair) for pair in pairwise(DETECTOR_CHANNELS))
        self.conv8 = nn.Conv2d(DETECTOR_CHANNELS[-1], 5 * len(ANCHORS), 1)
        self.cells = config.detector_size - 2
        for _ in range(5):
            self.cells = -(-self.cells // 2)
        row, column = torch.meshgrid(torch.arange(self.cells), torch.arange(self.cells), indexing="ij")
        corner = torch.stack([column, row], dim=-1).reshape(-1, 1, 2).expand(-1, len(ANCHORS), 2).reshape(1, -1, 2)
        self.register_buffer("mean", torch.tensor(DETECTOR_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("corner", corner / self.cells, persistent=False)  # [1, A, 2]
        anchor = torch.tensor(ANCHORS).repeat(self.cells**2, 1)[None]
        self.register_buffer("anchor", anchor / self.cells, persistent=False)  # [1, A, 2]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images u8 [N, size, size, 3] RGB -> boxes f32 [N, A, 4], scores f32 [N, A].

        A = cells * cells * anchors (845 for size 416), rows first. A box is x1, y1, x2, y2 as fractions of the square;
        it may reach beyond it.
        """
        x = (images.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / 255
        x = F.max_pool2d(F.leaky_relu(self.conv0(x), 0.1), 2, ceil_mode=True)
        for conv in self.convs[:-1]:
            x = F.max_pool2d(F.leaky_relu(conv(x), 0.1), 2, ceil_mode=True)
        x = F.leaky_relu(self.convs[-1](x), 0.1)
        x = F.max_pool2d(x, 2, stride=1, padding=1)[:, :, 1:, 1:]  # the row and column of padding behind alone
        raw = self.conv8(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 5)  # [N, A, x y w h score]
        centre = raw[..., 0:2].sigmoid() / self.cells + self.corner
        half = raw[..., 2:4].exp() * self.anchor / 2
        return torch.cat([centre - half, centre + half], dim=-1), raw[..., 4].sigmoid()


class DenseBlock(nn.Module):
    """Four convolutions, each fed the sum of all before it; the first halves the picture."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        if channels_in == 3:
            self.conv0: nn.Module = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, channels_out, 3, stride=2))
        else:
            self.conv0 = SeparableConv(channels_in, channels_out, stride=2)
        self.convs = nn.ModuleList(SeparableConv(channels_out, channels_out) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels_in, h, w] -> [N, channels_out, h / 2, w / 2]"""
        total = F.relu(self.conv0(x))
        for conv in self.convs:
            total = total + conv(F.relu(total))
        return F.relu(total)


class FaceEncoder(nn.Module):
    """Face crop -> pooled features and emotion logits."""

    mean: Tensor

    def __init__(self, config: FaceConfig) -> None:
        super().__init__()
        pooled = config.feature_size - len(LABELS)
        self.blocks = nn.ModuleList(DenseBlock(*pair) for pair in pairwise((3, *EXPRESSION_CHANNELS, pooled)))
        self.fc = nn.Linear(pooled, len(LABELS))
        self.register_buffer("mean", torch.tensor(EXPRESSION_MEAN).view(3, 1, 1), persistent=False)

    def forward(self, crops: Tensor) -> Tensor:
        """crops u8 [N, 112, 112, 3] RGB -> f32 [N, 263]: 256 pooled features || 7 logits in the order of LABELS."""
        x = (crops.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / 255
        for block in self.blocks:
            x = block(x)
        features = x.mean(dim=(2, 3))  # [N, 256]
        return torch.cat([features, self.fc(features)], dim=1)
