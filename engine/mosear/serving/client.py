"""A client over gRPC: the request, events and answer of this process's pipeline, answered by a server."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import grpc
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, serialize_byte_tensor

from mosear.contract import DType, Tensors
from mosear.errors import CancelledError, ConfigError, DeadlineError, MosearError, RequestError, ServingError
from mosear.runtime.pipeline import Event, StageDone, Words
from mosear.runtime.request import MAX_DEADLINE_MS, Answer, Request
from mosear.serving.faults import decode_fault, known_fault
from mosear.serving.tensors import check_size, request_tensors

MODEL, UNARY_MODEL = "mosear", "mosear_unary"
CONTROL_S = 5.0  # for questions about the server
MAX_MESSAGE_BYTES = 2**31 - 1
CHANNEL = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A server that comes back is found again within two seconds, not within two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
)
Message = Any  # protobuf messages of the server's protocol, which have no types


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """A version of a model as the server has it; `reason` says why it is not READY."""

    name: str
    version: str
    state: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Whether a server runs, whether all its models can be asked, and what these are."""

    live: bool
    ready: bool
    models: tuple[ModelState, ...]


class Client:
    """Asks a server. A context manager; safe to use from several threads, each with its own request under way."""

    def __init__(self, url: str, *, timeout_s: float = 120.0, clip_bytes: int | None = None) -> None:
        """`url`: host:port of gRPC. `timeout_s`: for a request without a deadline. `clip_bytes`: the largest clip to send
        (None: the server's limit). Nothing is sent yet; raises ConfigError for what is no address."""
        if "/" in url or not url.rpartition(":")[2].isdecimal():
            raise ConfigError(f"url is {url!r}: name host and gRPC port, such as 127.0.0.1:8001")
        self.url, self.timeout_s, self.clip_bytes = url, timeout_s, clip_bytes
        self._channel = grpc.insecure_channel(url, options=CHANNEL)
        self._server = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Withdraws what is under way."""
        self._channel.close()

    def ask(self, request: Request, *, deadline_s: float | None = None) -> Answer:
        """The whole answer; raises what `stream` raises."""
        return next(event for event in list(self.stream(request, deadline_s=deadline_s)) if isinstance(event, Answer))

    def stream(self, request: Request, *, deadline_s: float | None = None) -> Iterator[Event]:
        """Stages and words as they come, then the answer. Closing the iterator withdraws the request.

        `deadline_s`: from the first `next` on (None: the request's `deadline_ms`, else the client's `timeout_s`).
        Raises RequestError, MediaError, BusyError, DeadlineError and EngineError as the engine does, and ServingError where
        the server cannot be reached, goes away, or says nothing within the time.
        """
        request = _with_deadline(request, deadline_s)
        return self._stream(self._message(MODEL, request), request)

    def ask_unary(self, request: Request, *, deadline_s: float | None = None) -> Answer:
        """The whole answer in one response of the model for callers without streams; raises what `stream` raises."""
        request = _with_deadline(request, deadline_s)
        message = self._message(UNARY_MODEL, request)
        try:
            response = self._server.ModelInfer(message, timeout=self._timeout_s(request))
        except grpc.RpcError as error:
            raise self._fault(error, request.deadline_ms) from None
        event = event_of(response_tensors(response))
        if not isinstance(event, Answer):
            raise ServingError(f"{self.url}: {UNARY_MODEL} answered with an event of a stream")
        return event

    def health(self) -> Health:
        """What runs there; raises ServingError where nobody answers."""
        live = bool(self._control("ServerLive", service_pb2.ServerLiveRequest()).live)
        ready = bool(self._control("ServerReady", service_pb2.ServerReadyRequest()).ready)
        index = self._control("RepositoryIndex", service_pb2.RepositoryIndexRequest())
        models = [
            ModelState(name=found.name, version=found.version, state=found.state, reason=found.reason)
            for found in index.models
        ]
        return Health(
            live=live, ready=ready, models=tuple(sorted(models, key=lambda model: (model.name, model.version)))
        )

    def _control(self, method: str, message: Message) -> Message:
        try:
            return getattr(self._server, method)(message, timeout=CONTROL_S)
        except grpc.RpcError as error:
            raise self._fault(error, None) from None

    def _message(self, model: str, request: Request) -> Message:
        tensors = request_tensors(request)
        if not tensors.keys().isdisjoint(("video_bytes", "audio_bytes")):
            if self.clip_bytes is None:
                self.clip_bytes = self._served_limit(model)
            check_size(tensors, limit=self.clip_bytes)
        message = infer_message(model, tensors)
        if (size := message.ByteSize()) > MAX_MESSAGE_BYTES:
            raise RequestError(f"the request has {size} bytes, gRPC takes {MAX_MESSAGE_BYTES}: send fewer frames")
        return message

    def _served_limit(self, model: str) -> int:
        """The server's limit of a clip, in bytes (what gRPC takes where it names none)."""
        config = self._control("ModelConfig", service_pb2.ModelConfigRequest(name=model)).config
        stated = config.parameters["clip_bytes"].string_value if "clip_bytes" in config.parameters else ""
        return int(stated) if stated.isdecimal() else MAX_MESSAGE_BYTES

    def _stream(self, message: Message, request: Request) -> Iterator[Event]:
        call = self._server.ModelStreamInfer(iter([message]), timeout=self._timeout_s(request))
        answered, failed = False, None
        try:
            for response in call:
                # Not raised before the stream has ended: a request withdrawn as it ends can keep the server from stopping.
                if response.error_message:
                    failed = failed or decode_fault(response.error_message)
                elif tensors := response_tensors(response.infer_response):
                    event = event_of(tensors)
                    answered = isinstance(event, Answer)
                    yield event
        except grpc.RpcError as error:
            raise self._fault(error, request.deadline_ms) from None
        finally:
            call.cancel()
        if failed is not None:
            raise failed
        if not answered:
            raise ServingError(f"{self.url}: the server ended the stream without an answer: see the server's log")

    def _timeout_s(self, request: Request) -> float:
        return self.timeout_s if request.deadline_ms is None else request.deadline_ms / 1e3

    def _fault(self, error: grpc.RpcError, deadline_ms: int | None) -> MosearError:
        code, details = error.code(), error.details() or ""
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            if deadline_ms is not None:
                return DeadlineError(f"{self.url} did not answer within {deadline_ms} ms")
            return ServingError(f"{self.url} did not answer in time: see the server's log, or allow more time")
        if known := known_fault(details):
            return known
        if code is grpc.StatusCode.CANCELLED:
            return CancelledError("the request was withdrawn")
        if code is grpc.StatusCode.UNAVAILABLE:
            return ServingError(
                f"{self.url} cannot be reached, or went away ({details}): start a server with `mosear serve`, or name another"
            )
        return ServingError(f"{self.url}: {details}")


def _with_deadline(request: Request, deadline_s: float | None) -> Request:
    if deadline_s is None:
        return request
    if not 0 < deadline_s <= MAX_DEADLINE_MS / 1e3:
        raise RequestError(f"deadline_s is {deadline_s}: it must be above 0 and at most {MAX_DEADLINE_MS // 1000}")
    return dataclasses.replace(request, deadline_ms=max(1, round(deadline_s * 1e3)))


def infer_message(model: str, tensors: Tensors) -> Message:
    """A request of the server's protocol."""
    message = service_pb2.ModelInferRequest(model_name=model)
    for name, value in tensors.items():
        message.inputs.add(name=name, datatype=np_to_triton_dtype(value.dtype), shape=value.shape)
        raw = serialize_byte_tensor(value).item() if value.dtype == DType.STRING.numpy else value.tobytes()
        message.raw_input_contents.append(raw)
    return message


def response_tensors(response: Message) -> Tensors:
    """The tensors of a response, by name; raises ServingError where they cannot be read."""
    try:
        result = InferResult(response)
        return {output.name: result.as_numpy(output.name) for output in response.outputs}
    except (InferenceServerException, ValueError) as error:
        raise ServingError(f"a response cannot be read: {error}") from error


def event_of(tensors: Tensors) -> Event:
    """The event that a response tells; raises ServingError for one of another version's server."""
    try:
        if "final" in tensors:
            return Answer.from_record(json.loads(_text(tensors["report_json"])))
        if "stage" in tensors:
            return StageDone(name=_text(tensors["stage"]), ms=float(tensors["stage_ms"].item()))
        return Words(text=_text(tensors["text_output"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ServingError(
            f"a response with {', '.join(tensors)} is not what this version understands ({error!r}): "
            "use client and server of one version"
        ) from error


def _text(tensor: Any) -> str:  # Any: an array of the contract's type
    return bytes(tensor.item()).decode()
