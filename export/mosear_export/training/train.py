"""Training of the heads on the frozen backbone: projectors, experts and gate. Minutes on two cores, fixed seeds."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosear.kernels.reallocated_attention.reference import visibility
from mosear.runtime.prompt import PromptBuilder
from mosear_export.model.decoder import ReferenceOps
from mosear_export.model.projector import Projector, VoiceProjector
from mosear_export.model.whole import ReferenceModel
from mosear_export.training.examples import Example, Sampler
from mosear_export.training.features import Features, Report

PROJECTORS = {"face": "face_projector", "scene": "scene_projector", "voice": "voice_projector"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How heads are trained."""

    steps: int = 300
    batch: int = 10
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warm_up: int = 20
    noise: float = 0.3  # standard deviation added to standardised features
    balance: float = 0.01  # weight of E * sum of squared mean gate weights, 1 where experts share evenly
    seed: int = 0


class TrainOps(ReferenceOps):
    """`Ops` for training: fused attention without reallocation, no cache."""

    def attend(self, *tensors: Tensor, policy: str, statistic: str, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, key_group, position, length, _, _, _, bias = tensors
        seen = visibility(key_group, position, length, bias, causal=True)
        seen = seen | (position < 0)[:, :, None]  # padding rows see all, so that nothing is NaN
        out = F.scaled_dot_product_attention(query, key, value, seen[:, None], scale=scale, enable_gqa=True)
        none = query.new_zeros(*query.shape[:3], bias.shape[1])
        return out, none, none

    def write(self, cache: Tensor, rows: Tensor, start: Tensor) -> Tensor:
        return rows


class Trainer:
    """Owns the trainable tensors of a model (built with TrainOps) and turns examples into batches."""

    def __init__(self, model: ReferenceModel, builder: PromptBuilder, features: Features, config: TrainConfig) -> None:
        self.model, self.builder, self.config = model, builder, config
        torch.manual_seed(config.seed)
        self.random = torch.Generator().manual_seed(config.seed)
        self._initialise(features)
        self.parameters = [p for name, p in model.heads.items() if p.requires_grad]
        for name in PROJECTORS.values():
            self.parameters += [p.requires_grad_() for p in model.get_submodule(name).parameters()]

    def _initialise(self, features: Features) -> None:
        model = self.model
        for name, tensor in model.heads.items():
            if name.endswith(".a"):
                nn.init.kaiming_uniform_(tensor, a=5**0.5)
            elif name.endswith(".gate"):
                nn.init.normal_(tensor, std=0.02)
            if name.endswith((".a", ".gate", ".b")):
                tensor.requires_grad_()
        voices = features.voices.values
        for projector, values in (
            (model.face_projector, features.faces.values),
            (model.scene_projector, features.scenes),
            (model.voice_projector.clip, voices[:, :, :1]),
            (model.voice_projector.segment, voices[:, :, 1:]),
        ):
            flat = torch.from_numpy(values).flatten(0, -2)
            projector.mean.copy_(flat.mean(0))
            projector.deviation.copy_(flat.std(0) + 1e-3)
            projector.gain.fill_(float(model.decoder.embed_tokens.weight.std()))

    def tokens(self, example: Example, *, noise: bool) -> dict[str, Tensor]:
        """Projected tokens [n, d] of what is there, with noise on the features while training."""
        found = {}
        for field, name in PROJECTORS.items():
            features = getattr(example, field)
            if features is None:
                continue
            projector = self.model.get_submodule(name)
            values = torch.from_numpy(features)[None]
            if noise:
                inner = projector.segment if isinstance(projector, VoiceProjector) else projector
                assert isinstance(inner, Projector)
                deviation = inner.deviation
                values = values + torch.randn(values.shape, generator=self.random) * deviation * self.config.noise
            found[field] = projector(values)[0]
        return found

    def loss(self, examples: list[Example]) -> Tensor:
        batch = Batch.make(self, examples, noise=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = self.model.decoder(**batch.inputs, cache=batch.cache, heads=self.model.heads)
        answers: Tensor = F.cross_entropy(
            out["logits"].float().flatten(0, 1), batch.targets.flatten(), ignore_index=-100
        )
        used = out["expert_weights"].float().mean((0, 2))  # [adapted, E]
        balance: Tensor = (used.shape[1] * used.square().sum(1)).mean()  # 1 where experts share evenly
        return answers + self.config.balance * balance

    def run(self, sampler: Sampler, report: Report) -> None:
        config, start = self.config, time.monotonic()
        optimiser = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        for step in range(config.steps):
            for group in optimiser.param_groups:
                left = 1 - step / config.steps
                group["lr"] = config.learning_rate * min(1, (step + 1) / config.warm_up) * max(left, 0.02)
            loss = self.loss([sampler.draw() for _ in range(config.batch)])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            optimiser.step()
            if step % 20 == 0 or step == config.steps - 1:
                report(f"step {step} of {config.steps}: loss {loss.item():.3f}, {time.monotonic() - start:.0f} s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Decoder inputs of a few examples with their answers, padded behind; targets [B, Q] (-100: not scored)."""

    inputs: Mapping[str, Tensor]
    cache: list[Tensor]
    targets: Tensor

    @classmethod
    def make(cls, trainer: Trainer, examples: list[Example], *, noise: bool) -> "Batch":
        builder, embed = trainer.builder, trainer.model.decoder.embed_tokens
        rows, groups, targets, starts = [], [], [], []
        for example in examples:
            tokens = trainer.tokens(example, noise=noise)
            counts = {field: len(values) for field, values in tokens.items()}
            prompt = builder.build(example.task, counts=counts, words=example.words)
            answer = [*builder.encode(example.answer), builder.stop]
            hidden = embed(torch.from_numpy(np.concatenate([prompt.ids.clip(min=0), answer[:-1]])).long())
            for field, place in prompt.fields.items():
                hidden[place] = tokens[field]
            rows.append(hidden)
            groups.append(torch.from_numpy(np.concatenate([prompt.group, np.zeros(len(answer) - 1, np.int32)])))
            targets.append(torch.tensor(answer))
            starts.append(len(prompt) - 1)
        pad = nn.utils.rnn.pad_sequence
        length = torch.tensor([len(row) for row in rows], dtype=torch.int32)
        slot = torch.arange(int(length.max()), dtype=torch.int32)
        scored = pad(targets, batch_first=True, padding_value=-100)
        logit_row = torch.tensor(starts, dtype=torch.int32)[:, None] + torch.arange(scored.shape[1], dtype=torch.int32)
        group = pad(groups, batch_first=True)
        bias = torch.zeros(len(rows), len(trainer.model.config.groups))
        for i, example in enumerate(examples):
            bias[i, list(example.muted)] = -torch.inf
        inputs = {
            "hidden": pad(rows, batch_first=True), "group": group, "key_group": group, "key_length": length,
            "position": torch.where(slot < length[:, None], slot, -1), "first_row": length, "group_bias": bias,
            "strength": torch.zeros(len(rows)), "logit_row": logit_row.clamp(max=int(length.max()) - 1),
        }  # fmt: skip
        cache = [torch.empty(0)] * (2 * trainer.model.config.backbone.layers)
        return cls(inputs=inputs, cache=cache, targets=scored)
