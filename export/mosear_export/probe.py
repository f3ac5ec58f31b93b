"""Does every dynamic axis of a finished ONNX file really move? Runs it at several sizes against the reference."""

from pathlib import Path

import numpy as np
import onnxruntime as ort

from mosear.contract import Part
from mosear.errors import EngineError
from mosear_export import golden
from mosear_export.model.whole import ReferenceModel

# Sizes unlike those of the export's example, and for each axis one more that differs in it alone.
BASE = {"B": 1, "S": 3, "L": 16, "T": 64, "N": 1, "Q": 1}
MOVED = {"B": 3, "S": 6, "L": 33, "T": 102, "N": 5, "Q": 3}
# Root mean square of the error, relative to the output's. Random inputs through 30 layers were measured at 1.5e-4; an axis
# that does not move gives errors near 1. Parity on real prompts has bars of its own (parity.py).
TOLERANCE = 1e-3


def probe_axes(model: ReferenceModel, part: Part, path: Path) -> None:
    """Raises EngineError naming the axis at which the file fails, or differs from the reference in shape or value."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    axes = {axis for spec in part.inputs for axis in spec.axes if isinstance(axis, str)}
    for axis in ["", *sorted(axes)]:
        sizes = {**BASE, axis: MOVED[axis]} if axis else BASE
        inputs = golden.inputs_of(part, model, sizes, seed=1)
        wanted = model.run(part.name, inputs)
        feeds = {name: value.numpy() for name, value in inputs.items()}
        feeds |= {spec.name: model.heads[spec.name].numpy() for spec in part.heads}
        where = f"{path.name} at {axis or 'its base'} size {sizes.get(axis, '')}"
        try:
            found = session.run([spec.name for spec in part.outputs], feeds)
        except Exception as error:  # onnxruntime raises classes of its own without a common base
            raise EngineError(f"{where} does not run: {error}. The exported graph holds a fixed size.") from error
        for spec, value in zip(part.outputs, found, strict=True):
            _compare(where, spec.name, value, wanted[spec.name].numpy())


def _compare(where: str, name: str, found: np.ndarray, wanted: np.ndarray) -> None:  # type: ignore[type-arg]
    if found.shape != wanted.shape:
        raise EngineError(f"{where}: {name} has shape {list(found.shape)}, the reference {list(wanted.shape)}")
    _, rms = golden.relative_errors(found, wanted)
    if not rms <= TOLERANCE:
        raise EngineError(f"{where}: {name} differs from the reference by {rms:.2e} RMS, more than {TOLERANCE:.0e}")
