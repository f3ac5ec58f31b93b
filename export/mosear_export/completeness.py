"""Is every tensor of a checkpoint in the exported files? Matched by value, so that renaming or transposing hides nothing."""

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from mosear.artifacts import HEADS
from mosear.contract import parts
from mosear.errors import EngineError
from mosear_export.model.whole import ReferenceModel

# Tensors that no part needs, by the end of their name, and why.
UNUSED: dict[str, str] = {}
Print = tuple[int, float, float]


def check_complete(model: ReferenceModel, folder: Path) -> list[str]:
    """Names left out on purpose; raises EngineError listing every tensor that no exported file holds."""
    present = {fingerprint(value) for value in _exported(model, folder)}
    missing: list[str] = []
    unused: list[str] = []
    for file, tensors in model.files().items():
        for name, tensor in tensors.items():
            if fingerprint(tensor.numpy()) in present:
                continue
            known = next((reason for end, reason in UNUSED.items() if name.endswith(end)), None)
            (unused if known else missing).append(f"{file}: {name}")
    if missing:
        raise EngineError("the export lost these tensors of the checkpoint:\n  " + "\n  ".join(missing))
    return unused


def _exported(model: ReferenceModel, folder: Path) -> list[np.ndarray]:  # type: ignore[type-arg]
    from safetensors.numpy import load_file

    values = list(load_file(folder / HEADS).values())
    for part in parts(model.config):
        graph = onnx.load(folder / f"{part}.onnx").graph
        values += [numpy_helper.to_array(tensor) for tensor in graph.initializer]
        values += [
            numpy_helper.to_array(attribute.t)
            for node in graph.node
            if node.op_type == "Constant"
            for attribute in node.attribute
            if attribute.name == "value"
        ]
    return values


def fingerprint(value: np.ndarray) -> Print:  # type: ignore[type-arg]
    """Size, sum and sum of magnitudes, rounded: the same for any order of the elements."""
    flat = np.sort(value.astype(np.float64).ravel())
    return value.size, float(f"{flat.sum():.9e}"), float(f"{np.abs(flat).sum():.9e}")
