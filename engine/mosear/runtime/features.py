"""Ready features in a request: what this engine's encoders said of a clip elsewhere, in place of the clip."""

from collections.abc import Mapping

import numpy as np

from mosear.artifacts import key_of
from mosear.config import ModelConfig
from mosear.contract import ENCODERS, TensorSpec, feature_tensors
from mosear.errors import RequestError
from mosear.runtime.request import Request
from mosear.runtime.sampling import FloatArray


def feature_schema(onnx_files: Mapping[str, str]) -> str:
    """The name of the encoders, from the hashes of an ONNX folder's files: the same on every machine and precision."""
    return key_of({name: onnx_files.get(f"{name}.onnx.data", "") for name in ENCODERS})[:16]


def check_features(request: Request, config: ModelConfig, schema: str) -> None:
    """Raises RequestError unless features are of these encoders, of the contract's shapes, finite, and stand alone."""
    if not request.features:
        return
    if any(part is not None for part in (request.video, request.audio, request.frames, request.waveform)):
        raise RequestError("the request has a clip and ready features: send one or the other")
    if request.feature_schema != schema:
        raise RequestError(
            f"feature_schema is {request.feature_schema!r}, this engine's encoders are {schema!r}: "
            "make the features with the encoders of this engine"
        )
    known = {spec.name.removesuffix("_features"): spec for spec in feature_tensors(config)}
    for field, values in request.features.items():
        if field not in known:
            raise RequestError(f"there are no features of {field!r}: known are {', '.join(known)}")
        _check_shape(known[field], values, most=config.face.frames)


def _check_shape(spec: TensorSpec, values: FloatArray, *, most: int) -> None:
    rows = range(1, most + 1) if isinstance(spec.axes[0], str) else [spec.axes[0]]
    if (
        values.dtype != np.float32
        or values.ndim != len(spec.axes)
        or len(values) not in rows
        or values.shape[1:] != spec.axes[1:]
        or not np.isfinite(values).all()
    ):
        raise RequestError(
            f"{spec.name} is {values.dtype} {list(values.shape)}: it must be finite float32 {list(spec.axes)}"
            + (f" with {spec.axes[0]} from 1 to {most}" if len(rows) > 1 else "")
        )
