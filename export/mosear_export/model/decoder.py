"""LLaMA-type decoder with explicit cache tensors, modality experts on its linears and reallocated attention.

Tensor by tensor the decoder of `mosear.contract`. Its two mechanisms and the cache write come in through `Ops`, so that
one module is the reference (plain functions), the trainable model (fused attention) and the exported program (custom ops).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosear.config import BackboneConfig, ModelConfig, Policy, Route, Select, Statistic, Target
from mosear.contract import MODALITY_WEIGHT, heads
from mosear.kernels.modality_experts.reference import gate_weights, modality_experts
from mosear.kernels.reallocated_attention.policy import params
from mosear.kernels.reallocated_attention.reference import reallocated_attention

Cache = list[Tensor]  # key and value of each layer in turn, each [B, K, L, D]


class Ops(Protocol):
    """The operations that an exported program calls by name."""

    def attend(self, *tensors: Tensor, policy: str, statistic: str, scale: float) -> tuple[Tensor, Tensor, Tensor]: ...
    def adapt(self, *tensors: Tensor, scale: float, select: str, route: str) -> tuple[Tensor, Tensor]: ...
    def write(self, cache: Tensor, rows: Tensor, start: Tensor) -> Tensor: ...
    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> Tensor: ...


class ReferenceOps:
    """The whiteboard functions, called as they are."""

    def attend(self, *tensors: Tensor, policy: str, statistic: str, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        return reallocated_attention(*tensors, policy=Policy(policy), statistic=Statistic(statistic), scale=scale)

    def adapt(self, *tensors: Tensor, scale: float, select: str, route: str) -> tuple[Tensor, Tensor]:
        return modality_experts(*tensors, scale=scale, select=Select(select), route=Route(route))

    def write(self, cache: Tensor, rows: Tensor, start: Tensor) -> Tensor:
        return write_cache(cache, rows, start)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> Tensor:
        return rotate(x, cos, sin, position)


def write_cache(cache: Tensor, rows: Tensor, start: Tensor) -> Tensor:
    """Put rows [B, K, S, D] into a copy of cache [B, K, L, D] from slot start [B] on."""
    slot = start.long()[:, None] + torch.arange(rows.shape[2])  # [B, S]
    return cache.scatter(2, slot[:, None, :, None].expand_as(rows), rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What all layers of one call share."""

    position: Tensor  # i32 [B, S]
    group: Tensor  # i32 [B, S]
    key_group: Tensor  # i32 [B, L]
    key_length: Tensor  # i32 [B]
    first_row: Tensor  # i32 [B]
    strength: Tensor  # [B]
    group_bias: Tensor  # [B, G]
    gate_state: Tensor | None  # [B, layers * targets, G, E]
    cos: Tensor  # [max_positions, D / 2]
    sin: Tensor


class Linears:
    """The linear layers of one decoder layer, each with its experts where it has some. Collects the gates it used."""

    def __init__(self, config: ModelConfig, ops: Ops, step: Step, heads: Mapping[str, Tensor], layer: int) -> None:
        self.mose, self.ops, self.step, self.heads, self.layer = config.mose, ops, step, heads, layer
        self.gates: list[Tensor] = []  # [B, S, E] for each adapted linear
        self.gate_state: list[Tensor] = []  # [B, G, E]

    def __call__(self, target: Target, linear: nn.Linear, x: Tensor) -> Tensor:
        """y [B, S, d_out] of x [B, S, d_in]."""
        base: Tensor = linear(x)
        if target not in self.mose.targets:
            return base
        prefix = f"layers.{self.layer}.{target}"
        a, gate, b = (self.heads[f"{prefix}.{name}"] for name in ("a", "gate", "b"))
        group = self.step.group
        given = torch.zeros(*group.shape, self.mose.experts) if self.step.gate_state is None else self._state(x, gate)
        y, gates = self.ops.adapt(
            base, x, group, given, a, gate, b, self.heads[MODALITY_WEIGHT],
            scale=self.mose.scale, select=str(self.mose.select), route=str(self.mose.route),
        )  # fmt: skip
        self.gates.append(gates)
        return y

    def _state(self, x: Tensor, gate: Tensor) -> Tensor:
        """Gates of route = modality: from this call's rows where the state is still -1. Returns them per row [B, S, E]."""
        assert self.step.gate_state is not None
        known = self.step.gate_state[:, self.layer * len(self.mose.targets) + len(self.gate_state)]  # [B, G, E]
        member = self.step.group[:, :, None] == torch.arange(known.shape[1])  # [B, S, G]
        member = (member & (self.step.position >= 0)[:, :, None]).to(x.dtype)
        mean = member.mT @ x / member.sum(1)[..., None].clamp(min=1)  # [B, G, d]
        logits = (mean[:, :, None] * gate.view(*known.shape[1:], -1)).sum(-1)  # [B, G, E]
        made = gate_weights(logits, self.mose.select)
        state = torch.where(known < 0, made, known)
        self.gate_state.append(state)
        return state.gather(1, self.step.group.long()[:, :, None].expand(-1, -1, state.shape[2]))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, backbone = config, config.backbone
        self.q_proj = nn.Linear(*backbone.linear_size(Target.Q_PROJ), bias=False)
        self.k_proj = nn.Linear(*backbone.linear_size(Target.K_PROJ), bias=False)
        self.v_proj = nn.Linear(*backbone.linear_size(Target.V_PROJ), bias=False)
        self.o_proj = nn.Linear(*backbone.linear_size(Target.O_PROJ), bias=False)

    def forward(
        self, x: Tensor, cache: tuple[Tensor, Tensor], step: Step, linears: Linears
    ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """x [B, S, d] to the block's output, the written cache, and the masses before and after."""
        config, slot = self.config, step.position.clamp(min=0)
        split = config.backbone.head_size
        query = linears(Target.Q_PROJ, self.q_proj, x).reshape(*x.shape[:2], -1, split).transpose(1, 2)  # [B, H, S, D]
        key = linears(Target.K_PROJ, self.k_proj, x).reshape(*x.shape[:2], -1, split).transpose(1, 2)  # [B, K, S, D]
        value = linears(Target.V_PROJ, self.v_proj, x).reshape(*x.shape[:2], -1, split).transpose(1, 2)
        query, key = (linears.ops.rotate(part, step.cos, step.sin, slot) for part in (query, key))
        keys, values = (linears.ops.write(*pair, slot[:, 0]) for pair in zip(cache, (key, value), strict=True))
        out, before, after = linears.ops.attend(
            query, keys, values, step.key_group, step.position, step.key_length, step.first_row,
            linears.heads[f"layers.{linears.layer}.ar_params"], step.strength, step.group_bias,
            policy=str(config.ar.policy), statistic=str(config.ar.statistic), scale=config.backbone.head_size**-0.5,
        )  # fmt: skip
        out = linears(Target.O_PROJ, self.o_proj, out.transpose(1, 2).flatten(2))
        return out, (keys, values), (before, after)


class MLP(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(*config.linear_size(Target.GATE_PROJ), bias=False)
        self.up_proj = nn.Linear(*config.linear_size(Target.UP_PROJ), bias=False)
        self.down_proj = nn.Linear(*config.linear_size(Target.DOWN_PROJ), bias=False)

    def forward(self, x: Tensor, linears: Linears) -> Tensor:
        gate, up = linears(Target.GATE_PROJ, self.gate_proj, x), linears(Target.UP_PROJ, self.up_proj, x)
        return linears(Target.DOWN_PROJ, self.down_proj, F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config.backbone)
        size, eps = config.backbone.hidden_size, config.backbone.norm_eps
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(size, eps=eps), nn.RMSNorm(size, eps=eps)


class Decoder(nn.Module):
    """Parameters are named as in a LLaMA checkpoint without its `model.` prefix."""

    def __init__(self, config: ModelConfig, ops: Ops | None = None) -> None:
        super().__init__()
        backbone = config.backbone
        self.config, self.ops = config, ops or ReferenceOps()
        self.embed_tokens = nn.Embedding(backbone.vocab_size, backbone.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(backbone.layers))
        self.norm = nn.RMSNorm(backbone.hidden_size, eps=backbone.norm_eps)
        self.lm_head = nn.Linear(backbone.hidden_size, backbone.vocab_size, bias=False)
        if backbone.tied_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        cos, sin = rope_tables(backbone)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self, hidden: Tensor, position: Tensor, group: Tensor, key_group: Tensor, key_length: Tensor, first_row: Tensor,
        strength: Tensor, group_bias: Tensor, logit_row: Tensor, cache: Cache, heads: Mapping[str, Tensor],
        gate_state: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """One call: prefill or decode. Shapes and names: `contract.parts(config)["decoder"]`."""
        step = Step(
            position=position, group=group, key_group=key_group, key_length=key_length, first_row=first_row,
            strength=strength, group_bias=group_bias, gate_state=gate_state, cos=self.cos, sin=self.sin,
        )  # fmt: skip
        before, after, gates, state = [], [], [], []
        written: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            linears = Linears(self.config, self.ops, step, heads, i)
            attended, (keys, values), (m, moved) = layer.self_attn(
                layer.input_layernorm(hidden), (cache[2 * i], cache[2 * i + 1]), step, linears
            )
            hidden = hidden + attended
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden), linears)
            before.append(m)
            after.append(moved)
            gates += linears.gates
            state += linears.gate_state
            written |= {f"key_{i}_out": keys, f"value_{i}_out": values}
        wanted = logit_row.long()[:, :, None].expand(-1, -1, hidden.shape[2])
        out = {
            "logits": self.lm_head(self.norm(hidden.gather(1, wanted))),
            "mass_before": torch.cat(before, 1).unflatten(1, (len(before), -1)),
            "mass_after": torch.cat(after, 1).unflatten(1, (len(after), -1)),
            "expert_weights": torch.cat(gates, 2).unflatten(2, (len(gates), -1)).transpose(1, 2)
            if gates
            else hidden.new_zeros(hidden.shape[0], 0, hidden.shape[1], self.config.mose.experts),
        }
        if gate_state is not None:
            out["gate_state_out"] = torch.stack(state, 1) if state else gate_state
        return out | written


def rotate(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, S, D] at positions [B, S], halves convention (Su et al., arXiv 2104.09864)."""
    cos, sin = (table[position.long()][:, None] for table in (cos, sin))  # [B, 1, S, D / 2]
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def rope_tables(config: BackboneConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [max_positions, D / 2]."""
    exponent = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
    angle = torch.outer(torch.arange(config.max_positions, dtype=torch.float32), config.rope_theta**-exponent)
    return angle.cos(), angle.sin()


def empty_cache(config: BackboneConfig, *, batch: int, capacity: int) -> Cache:
    """A cache of zeros."""
    shape = (batch, config.kv_heads, capacity, config.head_size)
    return [torch.zeros(shape) for _ in range(2 * config.layers)]


def zero_heads(config: ModelConfig) -> dict[str, Tensor]:
    """Heads that add nothing: what a backbone without training has, policy parameters from the configuration."""
    found = {spec.name: torch.zeros(*map(int, spec.axes)) for spec in heads(config)}
    found[MODALITY_WEIGHT].fill_(1.0)
    for layer in range(config.backbone.layers):
        found[f"layers.{layer}.ar_params"] = params(config.ar, layer=layer, heads=config.backbone.heads)
    return found
