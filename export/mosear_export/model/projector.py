"""Projectors: encoder features to tokens of the backbone's width."""

import torch
from torch import Tensor, nn


class Projector(nn.Module):
    """Standardise, project, normalise, and scale to the size of the backbone's embeddings.

    features [..., F] to tokens [..., d]. `mean` and `deviation` are statistics of the training features.
    """

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))
        self.linear, self.norm = nn.Linear(features, hidden), nn.LayerNorm(hidden)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, features: Tensor) -> Tensor:
        tokens: Tensor = self.norm(self.linear((features - self.mean) / self.deviation)) * self.gain
        return tokens


class VoiceProjector(nn.Module):
    """One projector for the token of the whole clip, one for those of its segments: [B, 1 + segments, F] to [.., d]."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.clip, self.segment = Projector(features, hidden), Projector(features, hidden)

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([self.clip(features[:, :1]), self.segment(features[:, 1:])], dim=1)
