"""Golden inputs and outputs of every part: made by the reference, kept beside each ONNX file, checked without torch."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mosear.config import ModelConfig
from mosear.contract import DECODER, DType, Part, TensorSpec
from mosear_export.model.whole import ReferenceModel

SIZES = {"B": 2, "S": 7, "L": 24, "T": 80, "N": 2, "Q": 2}


def inputs_of(part: Part, model: ReferenceModel, sizes: Mapping[str, int], *, seed: int) -> dict[str, Tensor]:
    """Seeded inputs of a part (heads left out) with the given sizes; those of the decoder make a meaningful prefill."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    found = {spec.name: _random(spec, sizes, generator) for spec in part.inputs}
    if part.name == DECODER:
        words = _integers(config.backbone.vocab_size, (sizes["B"], sizes["S"]), generator)
        found |= _prefill(config, sizes, generator) | {"hidden": model.decoder.embed_tokens(words)}
    elif "voice_frames" in found:
        found["voice_frames"] = torch.full((sizes["B"],), sizes["T"] // 2 - 3, dtype=torch.int32)
    elif "token_ids" in found:
        found["token_ids"] = _integers(config.backbone.vocab_size, (sizes["B"], sizes["S"]), generator)
    return found


def _random(spec: TensorSpec, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
    shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes]
    if spec.dtype is DType.F32:
        return torch.randn(shape, generator=generator)
    return torch.randint(0, 256 if spec.dtype is DType.U8 else 1, shape, generator=generator).to(
        getattr(torch, spec.dtype.value)
    )


def _integers(high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, high, shape, generator=generator, dtype=torch.int32)


def _prefill(config: ModelConfig, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Rows that follow a filled cache; the last row of the last sequence is padding, every other one mutes a group."""
    batch, rows, capacity, groups = sizes["B"], sizes["S"], sizes["L"], len(config.groups)
    start = max(0, min(3, capacity - rows))
    position = (start + torch.arange(rows, dtype=torch.int32)).repeat(batch, 1)
    length = torch.full((batch,), start + rows, dtype=torch.int32)
    if rows > 1:
        position[-1, -1] = -1
        length[-1] -= 1
    key_group = _integers(groups, (batch, capacity), generator)
    bias = 0.2 * torch.randn(batch, groups, generator=generator)
    bias[1::2, 2] = -torch.inf
    found = {
        "position": position,
        "group": key_group.gather(1, position.clamp(min=0).long()),
        "key_group": key_group,
        "key_length": length,
        "first_row": torch.full((batch,), start + rows // 2, dtype=torch.int32),
        "strength": torch.rand(batch, generator=generator),
        "group_bias": bias,
        "logit_row": _integers(max(1, rows - 1), (batch, sizes["Q"]), generator),
    }
    if config.mose.route == "modality":
        adapted = config.backbone.layers * len(config.mose.targets)
        found["gate_state"] = torch.full((batch, adapted, groups, config.mose.experts), -1.0)
    return found


def write(model: ReferenceModel, part: Part, path: Path) -> None:
    """Store inputs and the reference's outputs as `in.<name>` and `out.<name>` (of the decoder's cache, one layer's)."""
    inputs = inputs_of(part, model, SIZES, seed=0)
    outputs = model.run(part.name, inputs)
    kept = {name for _, name in part.state[2:]}
    tensors = {f"in.{name}": value for name, value in inputs.items()}
    tensors |= {f"out.{name}": value.contiguous() for name, value in outputs.items() if name not in kept}
    save_file(tensors, path)


def relative_errors(found: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:  # type: ignore[type-arg]
    """Maximum and root mean square of the error, each relative to the wanted tensor's root mean square (empty: 0)."""
    if not wanted.size:
        return 0.0, 0.0
    error = found.astype(np.float64) - wanted.astype(np.float64)
    size = float(np.sqrt(np.mean(wanted.astype(np.float64) ** 2))) or 1.0
    return float(np.abs(error).max(initial=0.0)) / size, float(np.sqrt(np.mean(error**2))) / size
