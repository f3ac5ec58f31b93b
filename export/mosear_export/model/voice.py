"""Voice encoder: the first blocks of a Whisper encoder, then mean and deviation of the clip and of its segments.

Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (2022), https://arxiv.org/abs/2212.04356.
Parameter names are those of transformers' `WhisperEncoder`, so that its state dict fits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosear.config import VoiceConfig


class SelfAttention(nn.Module):
    """Multi-head attention of every frame to every frame; the key projection has no bias."""

    def __init__(self, config: VoiceConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, F, hidden] -> [B, F, hidden]"""
        query, key, value = (
            projection(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, F, head]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        output: Tensor = self.out_proj(mixed)
        return output


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VoiceConfig) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.self_attn = SelfAttention(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, F, hidden] -> [B, F, hidden]"""
        hidden = hidden + self.self_attn(self.self_attn_layer_norm(hidden))
        hidden = hidden + self.fc2(F.gelu(self.fc1(self.final_layer_norm(hidden))))
        return hidden


class VoiceEncoder(nn.Module):
    """Log-mel of a clip -> one token for the whole clip and one for each of its segments."""

    first_edge: Tensor
    last_edge: Tensor

    def __init__(self, config: VoiceConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(config.mels, config.hidden_size, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.hidden_size, config.hidden_size, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_frames, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.segments = config.segments
        # Row r of the answer goes from edge first[r] to edge last[r], in units of n / segments frames.
        first, last = [0, *range(config.segments)], [config.segments, *range(1, config.segments + 1)]
        self.register_buffer("first_edge", torch.tensor(first, dtype=torch.int32), persistent=False)
        self.register_buffer("last_edge", torch.tensor(last, dtype=torch.int32), persistent=False)

    def forward(self, mel: Tensor, voice_frames: Tensor) -> Tensor:
        """mel f32 [B, mels, T], T even; voice_frames i32 [B]: encoder frames (T / 2 at most) that hold sound.

        Returns f32 [B, 1 + segments, 2 * hidden]: mean || population deviation over the clip, then over each of
        `segments` consecutive parts of it. With n sounding frames, part i goes from floor(i n / segments) up to, not
        including, ceil((i + 1) n / segments), which is one frame at least; neighbours share a frame where the cut
        falls inside it. Frames past voice_frames are not pooled, but the attention sees them, as in Whisper. No
        sounding frame at all gives zeros.
        """
        return self._pool(self.hidden(mel), voice_frames)

    def hidden(self, mel: Tensor) -> Tensor:
        """mel f32 [B, mels, T] -> f32 [B, T / 2, hidden], transformers' `hidden_states[blocks]`.

        (If `blocks` is all that a Whisper has, transformers' last state is normalised besides and ours is not.)
        """
        frames = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2)  # [B, T / 2, hidden]
        frames = frames + self.embed_positions.weight[: frames.shape[1]]
        for layer in self.layers:
            frames = layer(frames)
        return frames

    def _pool(self, hidden: Tensor, voice_frames: Tensor) -> Tensor:
        # Frame f, the span from f to f + 1, belongs to a part if the two overlap; all times `segments`: no division.
        start, end = (edge * voice_frames.unsqueeze(1) for edge in (self.first_edge, self.last_edge))  # [B, rows]
        frame = self.segments * torch.arange(hidden.shape[1], dtype=torch.int32, device=hidden.device)
        inside = (frame + self.segments > start.unsqueeze(2)) & (frame < end.unsqueeze(2))  # [B, rows, F]
        share = inside / inside.sum(2, keepdim=True).clamp(min=1)
        # E[x^2] - E[x]^2 cancels badly far from zero, so both are taken about the mean of the clip.
        centre = share[:, :1] @ hidden  # [B, 1, hidden]
        offset = hidden - centre
        mean = share @ offset  # [B, rows, hidden]
        variance = (share @ offset.square() - mean.square()).clamp(min=0.0)
        return torch.cat([mean + centre, variance.sqrt()], dim=2)
