"""The models `mosear` (a stream of responses) and `mosear_unary` (one): a clip's way through encoders and decoder.

Media, preprocessing, prompt and words are made here; encoders and decoder are models of the same server, called by BLS.
"""

import json
import threading
import time
import uuid
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from mosear.backends.onnxruntime_cpu import check
from mosear.contract import DECODER, HOLES, Tensors, parts
from mosear.engine import EngineFolder
from mosear.errors import BusyError, CancelledError
from mosear.runtime.decode import Prefilled, Said, Scored, Token, Work
from mosear.runtime.pipeline import Pipeline, Words
from mosear.runtime.request import Answer
from mosear.serving.faults import decode_fault, inner_fault
from mosear.serving.models import wire
from mosear.serving.models.metrics import AnswerMetrics
from mosear.serving.models.wire import Triton


class Encoders:
    """The encoders of the server."""

    def __init__(self, folder: EngineFolder) -> None:
        self.parts = parts(folder.config)

    def run(self, part: str, tensors: Tensors) -> Tensors:
        spec = self.parts[part]
        check(spec, tensors)
        names = [output.name for output in spec.outputs]
        answer = pb_utils.InferenceRequest(
            model_name=part,
            requested_output_names=names,
            inputs=[pb_utils.Tensor(name, _sample_axis(value)) for name, value in tensors.items()],
        ).exec()
        if answer.has_error():
            raise inner_fault(part, answer.error().message())
        return {name: pb_utils.get_output_tensor_by_name(answer, name).as_numpy() for name in names}


def _sample_axis(value: Any) -> Any:  # Any: an array of the contract's type
    """A served encoder's tensors have an axis behind the batch at least."""
    return np.ascontiguousarray(value if value.ndim > 1 else value[:, None])


class ServedDecoder:
    """The decoder of the server, behind `Decoding`."""

    def __init__(self) -> None:
        # Streams that threads ask for at the same moment end in a crash of this process within a thousand of them.
        self.lock = threading.Lock()

    def decode(self, work: Work) -> Generator[Said]:
        session, done, failed = uuid.uuid4().hex, False, None
        answers = self._call(_work_tensors(work, session))
        try:
            for answer in answers:
                if answer.has_error():  # the server's own: there is nobody to tell
                    done = True
                    raise inner_fault(DECODER, answer.error().message())
                tensors = {tensor.name(): tensor.as_numpy() for tensor in answer.output_tensors()}
                if "error" in tensors:
                    failed = decode_fault(bytes(tensors["error"].item()).decode())
                elif tensors:
                    yield _said(tensors)
            done = True
            if failed is not None:
                raise failed
        finally:
            if not done:  # whoever listened has gone
                for _ in self._call({"session": wire.texts(session), "cancel": np.array([True])}):
                    pass
                for _ in answers:  # left while the decoder runs, it would keep the server from stopping
                    pass

    def _call(self, tensors: Tensors) -> Any:  # Any: an iterator of responses
        inputs = [pb_utils.Tensor(name, value) for name, value in tensors.items()]
        names = ["modality_mass", "expert_weights", "token", "label_scores", "error"]
        request = pb_utils.InferenceRequest(model_name=DECODER, requested_output_names=names, inputs=inputs)
        with self.lock:
            return request.exec(decoupled=True)


def _work_tensors(work: Work, session: str) -> Tensors:
    found: Tensors = {
        "token_ids": work.ids,
        "group": work.group,
        "session": wire.texts(session),
        "task": wire.texts(work.task),
        "max_tokens": np.array([work.max_tokens], np.int32),
        "min_tokens": np.array([work.min_tokens], np.int32),
        "temperature": np.array([work.sampling.temperature], np.float32),
        "top_p": np.array([work.sampling.top_p], np.float32),
        "seed": np.array([work.sampling.seed], np.uint64),
        "ar_strength": np.array([work.strength], np.float32),
    }
    if work.deadline_s is not None:
        left_ms = max(1, round((work.deadline_s - time.monotonic()) * 1e3))
        found["deadline_ms"] = np.array([left_ms], np.int32)
    return found | {f"{field}_features": work.features[field] for field in HOLES if field in work.features}


def _said(tensors: dict[str, Any]) -> Said:  # Any: arrays of several types
    scores = tensors.get("label_scores")
    if "modality_mass" in tensors:
        return Prefilled(mass=tensors["modality_mass"], experts=tensors["expert_weights"])
    if "token" in tensors:
        return Token(id=int(tensors["token"][0]), scores=None if scores is None else scores[0])
    return Scored(scores=np.asarray(scores, np.float32))


class TritonPythonModel:
    """Hands each request to a thread of its own; `workers` of them are answered at once, as many again wait."""

    def initialize(self, args: dict[str, str]) -> None:
        model = json.loads(args["model_config"])
        settings = {name: value["string_value"] for name, value in model["parameters"].items()}
        self.decoupled = bool(model.get("model_transaction_policy", {}).get("decoupled"))
        version = Path(args["model_repository"]) / args["model_version"]
        self.folder = EngineFolder((version / settings["engine"]).resolve())
        self.reader = self.folder.media_reader()
        self.pipeline = Pipeline(
            Encoders(self.folder), ServedDecoder(), self.folder.config, self.folder.prompt_builder(), self.reader,
            limits=self.folder.recipe.limits, schema=self.folder.schema,
        )  # fmt: skip
        self.metrics = AnswerMetrics(model["name"])
        workers = int(settings["workers"])
        self.pool, self.most = ThreadPoolExecutor(workers), 2 * workers
        self.lock, self.open = threading.Lock(), 0

    def execute(self, requests: list[Triton]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            with self.lock:
                full = self.open >= self.most
                self.open += not full
                self.metrics.running(self.open)
            if full:
                wire.finish(sender, wire.failure(BusyError(f"{self.most} requests are under way: try again later")))
            else:
                self.pool.submit(self._answer, request, sender, time.perf_counter())

    def _answer(self, request: Triton, sender: Triton, arrived: float) -> None:
        try:
            wire.finish(sender, self._respond(request, sender, arrived))
        except Exception as error:
            wire.finish(sender, wire.failure(error))
        finally:
            with self.lock:
                self.open -= 1
                self.metrics.running(self.open)

    def _respond(self, request: Triton, sender: Triton, arrived: float) -> Triton:
        """Send what comes, return the last response."""
        stream = self.pipeline.stream(wire.read(request, self.folder.config))
        text = ""
        for event in stream:
            if sender.is_cancelled():
                stream.close()
                raise CancelledError("the request was cancelled by its sender")
            if isinstance(event, Answer):
                return self._last(event, text)
            if isinstance(event, Words):
                if not text:
                    self.metrics.first_token((time.perf_counter() - arrived) * 1e3)
                text += event.text
            if self.decoupled:
                sender.send(wire.response(wire.event_tensors(event)))
        raise AssertionError("a stream ends with its answer")

    def _last(self, answer: Answer, text: str) -> Triton:
        tensors = wire.event_tensors(answer)
        if not self.decoupled:
            tensors["text_output"] = wire.texts(text)
        return wire.response(tensors)

    def finalize(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.reader.close()
