"""Weights of a Whisper encoder out of a CTranslate2 `model.bin`, without CTranslate2.

The file: version u32, spec name, revision u32, then a table of variables (name, rank u8, u32 dimensions, dtype u8,
u32 bytes, data) and a table of aliases; a string is a u16 length and that many bytes, the last one 0.
https://github.com/OpenNMT/CTranslate2, python/ctranslate2/specs/model_spec.py.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mosear.config import VoiceConfig
from mosear.errors import CheckpointError

BINARY_VERSION = 6
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}

Variables = Mapping[str, npt.NDArray[np.generic]]


def read_variables(path: Path, prefix: str) -> dict[str, npt.NDArray[np.generic]]:
    """All variables whose name begins with `prefix`. Raises CheckpointError if the file is not of the known form."""
    found: dict[str, npt.NDArray[np.generic]] = {}
    with path.open("rb") as file:
        try:
            if (version := _number(file, "I")) != BINARY_VERSION:
                raise CheckpointError(f"{path} is CTranslate2 format {version}: only {BINARY_VERSION} is known here")
            _string(file), _number(file, "I")  # spec name and revision
            for _ in range(_number(file, "I")):
                name = _string(file)
                shape = [_number(file, "I") for _ in range(_number(file, "B"))]
                dtype, size = DTYPES[_number(file, "B")], _number(file, "I")
                if name.startswith(prefix):
                    found[name] = np.frombuffer(file.read(size), dtype).reshape(shape)
                else:
                    file.seek(size, 1)
        except (struct.error, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} is no whole CTranslate2 model ({error}): fetch it again") from error
    return found


def read_encoder(path: Path, config: VoiceConfig) -> dict[str, Tensor]:
    """State dict f32 of `VoiceEncoder(config)` from a Whisper model; blocks past `config.blocks` are left out.

    Raises CheckpointError if the file is of another form or lacks a tensor.
    """
    variables = read_variables(path, "encoder/")
    try:
        return _state(variables, config.blocks)
    except KeyError as error:
        raise CheckpointError(f"{path} holds no {error}: it is no Whisper of {config.blocks} blocks or more") from None


def _state(variables: Variables, blocks: int) -> dict[str, Tensor]:
    def tensor(name: str) -> Tensor:
        return torch.from_numpy(variables[name].astype(np.float32))

    state = {"embed_positions.weight": tensor("encoder/position_encodings/encodings")}
    for name in ("conv1", "conv2"):
        state |= {f"{name}.{kind}": tensor(f"encoder/{name}/{kind}") for kind in ("weight", "bias")}
    for i in range(blocks):
        source, target = f"encoder/layer_{i}", f"layers.{i}"
        for kind in ("weight", "bias"):  # query, key and value lie in one tensor; the key's bias is all zeros
            query, key, value = (part.clone() for part in tensor(f"{source}/self_attention/linear_0/{kind}").chunk(3))
            state |= {f"{target}.self_attn.q_proj.{kind}": query, f"{target}.self_attn.v_proj.{kind}": value}
            if kind == "weight":
                state[f"{target}.self_attn.k_proj.weight"] = key
            state[f"{target}.self_attn.out_proj.{kind}"] = tensor(f"{source}/self_attention/linear_1/{kind}")
            state[f"{target}.fc1.{kind}"] = tensor(f"{source}/ffn/linear_0/{kind}")
            state[f"{target}.fc2.{kind}"] = tensor(f"{source}/ffn/linear_1/{kind}")
        for ours, theirs in (("weight", "gamma"), ("bias", "beta")):
            state[f"{target}.self_attn_layer_norm.{ours}"] = tensor(f"{source}/self_attention/layer_norm/{theirs}")
            state[f"{target}.final_layer_norm.{ours}"] = tensor(f"{source}/ffn/layer_norm/{theirs}")
    return state


def _number(file: BinaryIO, code: str) -> int:
    value: int = struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0]
    return value


def _string(file: BinaryIO) -> str:
    return file.read(_number(file, "H"))[:-1].decode()
