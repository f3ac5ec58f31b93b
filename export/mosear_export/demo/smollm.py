"""Backbone, its shape and its tokenizer out of a GGUF file of a LLaMA-type model (SmolLM2-135M-Instruct, Q4_1)."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from torch import Tensor

from mosear.config import BackboneConfig
from mosear.errors import CheckpointError

OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # token type of <|im_start|> and its like


class GGUFModel:
    """An opened GGUF file (memory-mapped)."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError if the file is no GGUF of a LLaMA-type model."""
        self._path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as GGUF: {error}") from error
        if (architecture := self._field("general.architecture")) != "llama":
            raise CheckpointError(f"{path} holds a model of type {architecture}: a llama is needed")

    def config(self) -> BackboneConfig:
        """Shape of the decoder."""
        width, heads = self._field("llama.embedding_length"), self._field("llama.attention.head_count")
        return BackboneConfig(
            vocab_size=len(self._field("tokenizer.ggml.tokens")),
            hidden_size=width,
            intermediate_size=self._field("llama.feed_forward_length"),
            layers=self._field("llama.block_count"),
            heads=heads,
            kv_heads=self._field("llama.attention.head_count_kv"),
            head_size=width // heads,
            rope_theta=self._field("llama.rope.freq_base"),
            # stored as f32: the shortest decimal that rounds to it is meant (1e-05, not 9.99999974e-06)
            norm_eps=float(str(np.float32(self._field("llama.attention.layer_norm_rms_epsilon")))),
            max_positions=self._field("llama.context_length"),
            tied_embeddings=all(tensor.name != "output.weight" for tensor in self._reader.tensors),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every weight dequantised to f32 [out, in], under its name in transformers' `LlamaForCausalLM`.

        No `lm_head.weight` where it is tied to the embeddings.
        """
        heads = {"attn_q": self.config().heads, "attn_k": self.config().kv_heads}
        state = {}
        for tensor in self._reader.tensors:
            stem = tensor.name.removesuffix(".weight")
            if stem.startswith("blk."):
                _, layer, kind = stem.split(".")
                name = f"model.layers.{layer}.{BLOCK_NAMES[kind]}.weight"
            else:
                kind, name = stem, f"{OUTER_NAMES[stem]}.weight"
            values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
            state[name] = _halves(values, heads[kind]) if kind in heads else values
        return state

    def tokenizer(self) -> Tokenizer:
        """Byte-level BPE tokenizer for the `tokenizers` library; its `save(path)` writes a tokenizer.json.

        `pre = smollm` means that each digit stands alone, then GPT-2's pattern (llama.cpp, src/llama-vocab.cpp).
        """
        kind = (self._field("tokenizer.ggml.model"), self._field("tokenizer.ggml.pre"))
        if kind != ("gpt2", "smollm"):
            raise CheckpointError(f"{self._path} has a tokenizer of type {kind}: only ('gpt2', 'smollm') is known here")
        tokens = self._field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self._field("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
        tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
        tokenizer.decoder = ByteLevelDecoder()
        types = self._field("tokenizer.ggml.token_type")
        special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        return tokenizer

    def _field(self, key: str) -> Any:  # Any: the file says of which type each field is
        field = self._reader.get_field(key)
        if field is None:
            raise CheckpointError(f"{self._path} lacks the field {key}: it is no whole LLaMA-type model")
        return field.contents()


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Undo GGUF's order of q and k rows: pairs (x0, y0, x1, y1, ...) in each head -> halves (x0, x1, ..., y0, y1, ...).

    llama.cpp turns neighbouring rows by rope, transformers a row of the first half with one of the second.
    """
    return weight.reshape(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
