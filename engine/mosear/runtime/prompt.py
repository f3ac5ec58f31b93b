"""Prompt assembly: words of the template, tokens of what a clip brings, and the modality of every position."""

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from mosear.config import ModelConfig
from mosear.contract import HOLES
from mosear.errors import RequestError

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]

TEXT, VIDEO, AUDIO = 0, 1, 2
# Template fields that stand for tokens of a projector, and the group of those tokens.
GROUP_OF = {"face": VIDEO, "scene": VIDEO, "voice": AUDIO}


class Task(enum.StrEnum):
    """What a request asks for."""

    CLASSIFY = "classify"
    REASON = "reason"
    CONFLICT = "conflict"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Token ids [S] (contract.HOLES where a projected token stands), group of each position [S], each field's places."""

    ids: IntArray
    group: IntArray
    fields: Mapping[str, slice]

    def __len__(self) -> int:
        return len(self.ids)

    def fill(self, hidden: FloatArray, tokens: Mapping[str, FloatArray]) -> None:
        """Put projected tokens, each [n, d], into the embedded prompt [S, d]."""
        for field, place in self.fields.items():
            hidden[place] = tokens[field]


class PromptBuilder:
    """Builds prompts from a checkpoint's template with its tokenizer."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.control = tuple(token.content for token in tokenizer.get_added_tokens_decoder().values())
        self.labels = tuple(self.encode(f" {label}") for label in config.labels)
        stop = self.encode(config.prompt.stop)
        if len(stop) != 1:
            raise RequestError(
                f"prompt.stop {config.prompt.stop!r} is {len(stop)} tokens; it must be one control token"
            )
        self.stop = stop[0]

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def check_words(self, words: str) -> None:
        """Raise RequestError where a person's words hold one of the model's control tokens."""
        for token in self.control:
            if (at := words.find(token)) >= 0:
                raise RequestError(
                    f"text_input holds the model's control token {token!r} at character {at}: remove it or spell it otherwise"
                )

    def build(self, task: Task, *, counts: Mapping[str, int], words: str) -> Prompt:
        """Assemble a prompt; `counts` are the tokens that each present field (face, scene, voice) brings."""
        template = self.config.prompt
        self.check_words(words)
        pieces = [template.prefix]
        pieces += [getattr(template, field) for field in GROUP_OF if counts.get(field)]
        if words:
            pieces.append(template.words)
        pieces.append(template.reason if task is Task.REASON else template.classify)
        pieces += [template.suffix, template.reason_prefix if task is Task.REASON else template.label_prefix]
        ids: list[int] = []
        group: list[int] = []
        fields: dict[str, slice] = {}
        for i, part in enumerate(re.split(r"\{(face|scene|voice|words)\}", "".join(pieces))):
            if i % 2 == 0 or part == "words":
                added = self.encode(words if i % 2 else part)
            else:
                added = [HOLES[part]] * counts[part]
                fields[part] = slice(len(ids), len(ids) + len(added))
            ids += added
            group += [GROUP_OF.get(part, TEXT) if i % 2 else TEXT] * len(added)
        return Prompt(ids=np.array(ids, np.int32), group=np.array(group, np.int32), fields=fields)
