"""Plans on the GPU that built them, against golden outputs, before their engine is published: each part, and of the decoder
both profiles. Which kernel a plugin runs is decided for each profile, and a wrong one gives numbers, not an error.
"""

from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from safetensors.numpy import load_file

from mosear.artifacts import HEADS
from mosear.backends.tensorrt_backend import TensorRTBackend
from mosear.config import ModelConfig
from mosear.contract import DECODER, Part, Tensors, parts
from mosear.engine import load_heads
from mosear.errors import EngineError
from mosear_export import export, golden

MASSES = ("mass_before", "mass_after")
BY_ROW = ("hidden", "position", "group")


def check_on_gpu(backend: TensorRTBackend, onnx_folder: Path, config: ModelConfig, *, limit: float) -> dict[str, float]:
    """RMS error of each output relative to the reference's, by `<part>[.<profile>].<output>`.

    Raises EngineError above `limit`.
    """
    errors: dict[str, float] = {}
    for name, part in parts(config).items():
        stored = load_file(onnx_folder / export.GOLDEN / f"{name}.safetensors")
        feeds = {key[3:]: value for key, value in stored.items() if key.startswith("in.")}
        if name == DECODER:
            errors |= _decoder(backend, onnx_folder, part, feeds)
            continue
        found = backend.run(name, feeds)
        errors |= {f"{name}.{key}": golden.relative_errors(found[key], stored[f"out.{key}"])[1] for key in found}
    worst = max(errors, key=lambda key: errors[key])
    if not errors[worst] <= limit:
        raise EngineError(f"{worst} on this GPU differs from the reference by {errors[worst]:.2e} RMS (limit {limit})")
    return errors


def _decoder(backend: TensorRTBackend, onnx_folder: Path, part: Part, feeds: Tensors) -> dict[str, float]:
    """A prompt, and one row; in both the last row alone is reallocated, as every plan can."""
    cached = {name for name, _ in part.state}
    cache = {name: value for name, value in feeds.items() if name in cached}
    call = {name: value for name, value in feeds.items() if name not in cached}
    call["first_row"] = call["key_length"].astype(np.int32) - 1
    row = call | {name: call[name][:, :1] for name in BY_ROW}
    row["key_length"] = row["position"][:, 0].astype(np.int32) + 1
    row |= {"first_row": row["position"][:, 0].copy(), "logit_row": np.zeros_like(row["position"])}
    reference, heads = export_session(onnx_folder), load_heads(onnx_folder / HEADS)
    errors: dict[str, float] = {}
    for profile, given in (("prefill", call), ("decode", row)):
        state = backend.start(batch=len(row["position"]), capacity=call["key_group"].shape[1])
        state.write(cache)
        found, names = state.step(given), ["logits", *MASSES]
        wanted = dict(zip(names, reference.run(names, given | cache | heads), strict=True))
        for name in MASSES:
            found[name], wanted[name] = last_row(found[name], given), last_row(wanted[name], given)
        errors |= {f"{DECODER}.{profile}.{n}": golden.relative_errors(found[n], wanted[n])[1] for n in names}
    return errors


def last_row(masses: NDArray[np.generic], call: Tensors) -> NDArray[np.generic]:
    """[B, layers, H, S, G] to those of each sequence's last row, [B, layers, H, 1, G]."""
    rows = call["key_length"].astype(int) - 1 - call["position"][:, 0].astype(int)
    return np.stack([masses[i, :, :, row : row + 1] for i, row in enumerate(rows)])


def export_session(onnx_folder: Path) -> ort.InferenceSession:
    """The exported decoder on the CPU: the reference of what is built from it."""
    return cpu_session(onnx_folder / f"{DECODER}.onnx")


def cpu_session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
