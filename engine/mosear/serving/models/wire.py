"""Between a Triton Server request and our types, by the contract's names. Runs inside the Python backend's stub."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from mosear.config import ModelConfig
from mosear.contract import Tensors, feature_tensors
from mosear.errors import MosearError, RequestError
from mosear.runtime.pipeline import Event, StageDone, Words
from mosear.runtime.request import Answer, Request
from mosear.runtime.sampling import Sampling
from mosear.serving.faults import encode_fault

Triton = Any  # objects of the Python backend, which has no types


def read(request: Triton, config: ModelConfig) -> Request:
    """A clip's request; what is not there takes `Request`'s default. Raises RequestError for what cannot be."""
    given = Inputs(request)
    ready = {spec.name.removesuffix("_features"): given.array(spec.name) for spec in feature_tensors(config)}
    video, audio = (given.array(name) for name in ("video_bytes", "audio_bytes"))
    return Request(
        task=given.text("task", "classify"),
        video=None if video is None else video.tobytes(),
        audio=None if audio is None else audio.tobytes(),
        frames=given.array("frames"),
        waveform=given.array("waveform"),
        words=given.blob("text_input", b""),
        features={field: values for field, values in ready.items() if values is not None},
        feature_schema=given.text("feature_schema", ""),
        max_tokens=given.number("max_tokens", None),
        min_tokens=given.number("min_tokens", 0),
        strength=given.number("ar_strength", None),
        sampling=given.sampling(),
        deadline_ms=given.number("deadline_ms", None),
    )


class Inputs:
    """The input tensors of a request that are there."""

    def __init__(self, request: Triton) -> None:
        self.tensors: dict[str, Triton] = {tensor.name(): tensor for tensor in request.inputs()}

    def array(self, name: str) -> Any:  # Any: of the contract's type
        return self.tensors[name].as_numpy() if name in self.tensors else None

    def number(self, name: str, default: Any) -> Any:  # Any: int or float
        return default if name not in self.tensors else self._one(name).item()

    def blob(self, name: str, default: bytes) -> bytes:
        return default if name not in self.tensors else bytes(self._one(name).item())

    def text(self, name: str, default: str) -> str:
        try:
            return self.blob(name, default.encode()).decode()
        except UnicodeDecodeError as error:
            raise RequestError(f"{name} is not UTF-8 at byte {error.start}: encode it as UTF-8") from error

    def sampling(self) -> Sampling:
        default = Sampling()
        return Sampling(
            temperature=self.number("temperature", default.temperature),
            top_p=self.number("top_p", default.top_p),
            seed=self.number("seed", default.seed),
        )

    def _one(self, name: str) -> Any:  # Any: an array of the contract's type
        array = self.array(name)
        if array.size != 1:
            raise RequestError(f"{name} holds {array.size} values: send one")
        return array.reshape(())


def event_tensors(event: Event) -> Tensors:
    """What a response says of an event."""
    if isinstance(event, StageDone):
        return {"stage": texts(event.name), "stage_ms": np.array([event.ms], np.float32)}
    if isinstance(event, Words):
        return {"text_output": texts(event.text)}
    return answer_tensors(event)


def answer_tensors(answer: Answer) -> Tensors:
    """All that is known at the end, but for the text."""
    found: Tensors = {
        "modality_mass": answer.modality_mass,
        "expert_weights": answer.expert_weights,
        "timings_ms": texts(json.dumps(dict(answer.timings_ms))),
        "report_json": texts(json.dumps(answer.record())),
        "final": np.array([True]),
    }
    if answer.conflict is not None:
        found["conflict"] = np.array([answer.conflict])
    for who, judgement in (("", answer.joint), ("face_", answer.face), ("voice_", answer.voice)):
        if judgement is not None:
            found[f"{who}label"] = texts(judgement.label)
            found[f"{who}label_scores"] = np.array(list(judgement.scores.values()), np.float32)
    return found


def texts(*values: str) -> np.ndarray[Any, np.dtype[np.object_]]:
    return np.array([value.encode() for value in values], np.object_)


class Sender:
    """Sends the responses of one request; of their outputs those that it asks for.

    The rest is left out here: the Python backend would drop it in `send`, without the interpreter's lock.
    """

    def __init__(self, request: Triton) -> None:
        self.sender = request.get_response_sender()
        self.wanted = frozenset(request.requested_output_names())

    def send(self, tensors: Mapping[str, Any]) -> None:  # Any: arrays of several types
        self.sender.send(self._response(tensors))

    def finish(self, tensors: Mapping[str, Any] | None = None) -> None:  # Any: as above
        """End the stream, with a last response or without."""
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        if tensors is None:
            self.sender.send(flags=final)
        else:
            self.sender.send(self._response(tensors), flags=final)

    def fail(self, error: Exception) -> None:
        """End the stream with an error: our own by kind, anything else as an engine failure that the log explains."""
        if not isinstance(error, MosearError):
            pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
        response = pb_utils.InferenceResponse(error=pb_utils.TritonError(encode_fault(error)))
        self.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    @property
    def gone(self) -> bool:
        """Has the client cancelled? Asks the server's process, 0.5 ms."""
        return bool(self.sender.is_cancelled())

    def _response(self, tensors: Mapping[str, Any]) -> Triton:  # Any: as above
        wanted = [(name, np.asarray(value)) for name, value in tensors.items() if name in self.wanted]
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in wanted])
