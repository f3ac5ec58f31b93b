"""A request as the tensors that a server takes: those that are set, of the contract's types."""

from collections.abc import Mapping

import numpy as np

from mosear.contract import HOLES, DType, Tensors, TensorSpec, asked_tensors
from mosear.errors import MediaError, RequestError
from mosear.runtime.request import Request
from mosear.runtime.sampling import Sampling

# A client knows no model: the sizes of features are for the server to check.
SPECS = {spec.name: spec for spec in asked_tensors()} | {
    f"{field}_features": TensorSpec(f"{field}_features", DType.F32, ("ROWS", "SIZE")) for field in HOLES
}


def request_tensors(request: Request) -> Tensors:
    """Tensors by the contract's names; raises RequestError (MediaError) for what cannot be sent at all.

    What is left at its default is left out: the server has the same ones.
    """
    return {name: _tensor(SPECS[name], value) for name, value in _values(request).items() if value is not None}


def _values(request: Request) -> Mapping[str, object]:
    """What is set, by tensor."""
    if unknown := request.features.keys() - HOLES.keys():
        raise RequestError(f"features names {', '.join(map(repr, sorted(unknown)))}: known are {', '.join(HOLES)}")
    default, sampling, same = Request(), request.sampling, Sampling()
    return {
        "task": request.task,
        "text_input": request.words or None,
        "video_bytes": request.video,
        "audio_bytes": request.audio,
        "frames": request.frames,
        "waveform": request.waveform,
        **{f"{field}_features": values for field, values in request.features.items()},
        "feature_schema": request.feature_schema or None,
        "max_tokens": request.max_tokens,
        "min_tokens": None if request.min_tokens == default.min_tokens else request.min_tokens,
        "ar_strength": request.strength,
        "temperature": None if sampling.temperature == same.temperature else sampling.temperature,
        "top_p": None if sampling.top_p == same.top_p else sampling.top_p,
        "seed": None if sampling.seed == same.seed else sampling.seed,
        "deadline_ms": request.deadline_ms,
    }


def _tensor(spec: TensorSpec, value: object) -> np.ndarray:  # type: ignore[type-arg]
    if spec.dtype is DType.STRING:
        return np.array([_utf8(spec, value)], object)
    if isinstance(value, bytes):
        if not value:
            raise MediaError(f"{spec.name} is empty: leave it out, or send the bytes of a media file")
        return np.frombuffer(value, np.uint8)
    if isinstance(value, np.ndarray):
        return _array(spec, value)
    return np.array([_number(spec, value)], spec.dtype.numpy)


def _utf8(spec: TensorSpec, value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    try:
        return str(value).encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{spec.name} is not valid Unicode at character {error.start}: send valid text") from error


def _array(spec: TensorSpec, value: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    fits = value.dtype == spec.dtype.numpy and value.ndim == len(spec.axes)
    if not fits or any(isinstance(axis, int) and axis != size for axis, size in zip(spec.axes, value.shape)):
        raise RequestError(
            f"{spec.name} is {value.dtype} {list(value.shape)}: it must be {spec.dtype} [{', '.join(map(str, spec.axes))}]"
        )
    return np.ascontiguousarray(value)


def _number(spec: TensorSpec, value: object) -> int | float:
    dtype = spec.dtype.numpy
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        whole = int(value)
        if dtype.kind == "f" and abs(whole) < 2**64:
            return float(whole)
        if dtype.kind in "iu" and np.iinfo(spec.dtype.value).min <= whole <= np.iinfo(spec.dtype.value).max:
            return whole
    if dtype.kind == "f" and isinstance(value, float | np.floating):
        return float(value)
    raise RequestError(f"{spec.name} is {value!r}: it must be one {spec.dtype}")


def check_size(tensors: Tensors, *, limit: int) -> None:
    """Raises MediaError for a clip above the limit, in bytes, before it is sent."""
    for name in ("video_bytes", "audio_bytes"):
        if name in tensors and (size := tensors[name].nbytes) > limit:
            raise MediaError(
                f"{name} has {size} bytes, the limit is {limit}: send a smaller file, or raise clip_bytes in the recipe"
            )
