"""Weights of the face nets out of face-api's TensorFlow.js files: a JSON manifest beside a binary of uint8 weights.

A quantised weight w was stored as q with w = q * scale + min.
https://github.com/tensorflow/tfjs/blob/master/tfjs-core/src/io/io_utils.ts (decodeWeights).
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mosear.errors import CheckpointError


def read_weights(manifest: Path, binary: Path) -> dict[str, Tensor]:
    """Every weight f32 under its name in face-api, with TensorFlow's axes (kernels are [h, w, in, out]).

    Raises CheckpointError if the manifest does not cover the binary exactly.
    """
    data, offset, weights = binary.read_bytes(), 0, {}
    for entry in (entry for group in json.loads(manifest.read_text()) for entry in group["weights"]):
        quantization = entry.get("quantization", {"dtype": "float32", "scale": 1.0, "min": 0.0})
        dtype, count = np.dtype(quantization["dtype"]), math.prod(entry["shape"])
        if offset + count * dtype.itemsize > len(data):
            raise CheckpointError(f"{binary} ends before {entry['name']} of {manifest.name}: fetch both again")
        stored = np.frombuffer(data, dtype, count, offset).astype(np.float64)
        values = stored * quantization["scale"] + quantization["min"]
        weights[entry["name"]] = torch.from_numpy(values.astype(np.float32).reshape(entry["shape"]))
        offset += count * dtype.itemsize
    if offset != len(data):
        raise CheckpointError(f"{binary} has {len(data)} bytes, {manifest.name} names {offset}: fetch both again")
    return weights


def read_detector(manifest: Path, binary: Path) -> dict[str, Tensor]:
    """State dict f32 of `FaceDetector`."""
    weights = read_weights(manifest, binary)
    state = _conv(weights, "conv0", "conv0") | _conv(weights, "conv8", "conv8")
    for i in range(5):
        state |= _separable(weights, f"conv{i + 1}", f"convs.{i}")
    return state


def read_expression(manifest: Path, binary: Path) -> dict[str, Tensor]:
    """State dict f32 of `FaceEncoder`."""
    weights = read_weights(manifest, binary)
    state = {"fc.weight": weights["fc/weights"].T.contiguous(), "fc.bias": weights["fc/bias"]}
    for block in range(4):
        first = _separable if block else _conv
        state |= first(weights, f"dense{block}/conv0", f"blocks.{block}.conv0" + ("" if block else ".1"))
        for i in range(3):
            state |= _separable(weights, f"dense{block}/conv{i + 1}", f"blocks.{block}.convs.{i}")
    return state


def _conv(weights: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    kernel = weights[f"{source}/filters"].permute(3, 2, 0, 1).contiguous()  # [out, in, h, w]
    return {f"{target}.weight": kernel, f"{target}.bias": weights[f"{source}/bias"]}


def _separable(weights: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    depthwise = weights[f"{source}/depthwise_filter"].permute(2, 3, 0, 1).contiguous()  # [in, 1, h, w]
    pointwise = weights[f"{source}/pointwise_filter"].permute(3, 2, 0, 1).contiguous()  # [out, in, 1, 1]
    return {
        f"{target}.depthwise.weight": depthwise,
        f"{target}.pointwise.weight": pointwise,
        f"{target}.pointwise.bias": weights[f"{source}/bias"],
    }
