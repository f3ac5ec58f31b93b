"""Decoder inputs of a few examples with their answers, padded behind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mosear.config import ModelConfig
from mosear.runtime.prompt import PromptBuilder
from mosear_export.training.examples import Example

Tokens = Mapping[str, Tensor]  # projected tokens [n, d] of each field


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """inputs: the decoder's; targets [B, Q] (-100: not scored); direct bool [B]: see ops.TrainOps."""

    inputs: Mapping[str, Tensor]
    cache: list[Tensor]
    targets: Tensor
    direct: Tensor

    @classmethod
    def make(
        cls, config: ModelConfig, builder: PromptBuilder, embed: nn.Embedding, examples: Sequence[Example],
        tokens: Sequence[Tokens],
    ) -> "Batch":  # fmt: skip
        rows, groups, targets, starts = [], [], [], []
        for example, brought in zip(examples, tokens, strict=True):
            counts = {field: len(values) for field, values in brought.items()}
            prompt = builder.build(example.task, counts=counts, words=example.words)
            answer = [*builder.encode(example.answer), builder.stop]
            hidden = embed(torch.from_numpy(np.concatenate([prompt.ids.clip(min=0), answer[:-1]])).long())
            for field, place in prompt.fields.items():
                hidden[place] = brought[field]
            rows.append(hidden)
            groups.append(torch.from_numpy(np.concatenate([prompt.group, np.zeros(len(answer) - 1, np.int32)])))
            targets.append(torch.tensor(answer))
            starts.append(len(prompt) - 1)
        pad = nn.utils.rnn.pad_sequence
        length = torch.tensor([len(row) for row in rows], dtype=torch.int32)
        slot = torch.arange(int(length.max()), dtype=torch.int32)
        scored = pad(targets, batch_first=True, padding_value=-100)
        first_row = torch.tensor(starts, dtype=torch.int32)
        logit_row = first_row[:, None] + torch.arange(scored.shape[1], dtype=torch.int32)
        group = pad(groups, batch_first=True)
        bias = torch.zeros(len(rows), len(config.groups))
        for i, example in enumerate(examples):
            bias[i, list(example.muted)] = -torch.inf
        inputs = {
            "hidden": pad(rows, batch_first=True), "group": group, "key_group": group, "key_length": length,
            "position": torch.where(slot < length[:, None], slot, -1), "first_row": first_row, "group_bias": bias,
            "strength": torch.tensor([example.strength for example in examples]),
            "logit_row": logit_row.clamp(max=int(length.max()) - 1),
        }  # fmt: skip
        cache = [torch.empty(0)] * (2 * config.backbone.layers)
        return cls(
            inputs=inputs, cache=cache, targets=scored, direct=torch.tensor([example.direct for example in examples])
        )
