"""Inputs of the face net tests, and how the stored answers of the original JavaScript in data/face_api were made.

npm pack @vladmandic/face-api@1.7.15 && tar xzf vladmandic-face-api-1.7.15.tgz
PYTHONPATH=engine:export python tests/face_api_factory.py package
"""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

DATA = Path(__file__).parent / "data" / "face_api"
NETS = ("tiny_face_detector_model", "face_expression_model")

Picture = npt.NDArray[np.uint8]


def pictures() -> dict[str, Picture]:
    """Astronaut Eileen Collins (NASA, public domain; from scikit-image), reduced to few colours; u8 [h, w, 3]."""
    square = np.array(Image.open(DATA / "astronaut_416.png").convert("RGB"))
    face = np.array(Image.open(DATA / "face_112.png").convert("RGB"))
    return {"square": square, "face": face, "hand": square[304:416, 0:112].copy()}


def _separable(name: str, channels_in: int, channels_out: int) -> dict[str, list[int]]:
    return {
        f"{name}/depthwise_filter": [3, 3, channels_in, 1],
        f"{name}/pointwise_filter": [1, 1, channels_in, channels_out],
        f"{name}/bias": [channels_out],
    }


def _shapes(net: str) -> dict[str, list[int]]:
    if net == "tiny_face_detector_model":
        shapes = {"conv0/filters": [3, 3, 3, 16], "conv0/bias": [16]}
        for i in range(1, 6):
            shapes |= _separable(f"conv{i}", 8 << i, 16 << i)
        return shapes | {"conv8/filters": [1, 1, 512, 25], "conv8/bias": [25]}
    shapes = {"dense0/conv0/filters": [3, 3, 3, 32], "dense0/conv0/bias": [32]}
    for block in range(4):
        width = 32 << block
        if block:
            shapes |= _separable(f"dense{block}/conv0", width // 2, width)
        for i in range(1, 4):
            shapes |= _separable(f"dense{block}/conv{i}", width, width)
    return shapes | {"fc/weights": [256, 7], "fc/bias": [7]}


def write_weights(folder: Path) -> None:
    """Both nets with made-up weights, the same to the bit on any machine, as face-api stores them.

    Byte i of a net is the top byte of i * 2654435761 mod 2^32. Biases are f32, as some of the real ones.
    """
    for net in NETS:
        entries, data, start = [], b"", 0
        for name, shape in _shapes(net).items():
            count = math.prod(shape)
            top = ((np.arange(start, start + count, dtype=np.uint64) * 2654435761 % 2**32) >> 24).astype(np.uint8)
            start += count
            if name.endswith("bias"):
                entries.append({"name": name, "shape": shape, "dtype": "float32"})
                data += ((top.astype(np.float32) - 128) / 512).tobytes()
            else:
                fan_in = 9 if "depthwise" in name else math.prod(shape[:-1])
                bound = math.sqrt(6 / fan_in)
                scale = {"dtype": "uint8", "scale": 2 * bound / 255, "min": -bound}
                entries.append({"name": name, "shape": shape, "dtype": "float32", "quantization": scale})
                data += top.tobytes()
        (folder / f"{net}.bin").write_bytes(data)
        manifest = [{"weights": entries, "paths": [f"{net}.bin"]}]
        (folder / f"{net}-weights_manifest.json").write_text(json.dumps(manifest))


def _run_original(package: Path, weights: Path, inputs: Path) -> str:
    command = ["node", str(DATA / "original.mjs"), str(package.resolve()), str(weights), str(inputs)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(package: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, picture in pictures().items():
            (folder / f"{title}.rgb").write_bytes(picture.tobytes())
        write_weights(folder)
        (DATA / "made_up_weights.json").write_text(_run_original(package, folder, folder))
        (DATA / "real_weights.json").write_text(_run_original(package, package.resolve() / "model", folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
