"""The models `mosear` (a stream of responses) and `mosear_unary` (one): a clip's way through encoders and decoder.

Media, preprocessing, prompt and words are made here. Encoders (called by BLS) and decoder (`serving.local`) are models of the
same server.
"""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from mosear.backends.onnxruntime_cpu import check
from mosear.contract import DECODER, Tensors, parts
from mosear.engine import EngineFolder
from mosear.errors import BusyError, CancelledError
from mosear.runtime.pipeline import Pipeline, Words
from mosear.runtime.request import Answer
from mosear.serving.faults import inner_fault
from mosear.serving.local import LocalDecoder, door_of
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


class TritonPythonModel:
    """Hands each request to a thread of its own; `workers` of them are answered at once, as many again wait."""

    def initialize(self, args: dict[str, str]) -> None:
        model = json.loads(args["model_config"])
        settings = {name: value["string_value"] for name, value in model["parameters"].items()}
        self.decoupled = bool(model.get("model_transaction_policy", {}).get("decoupled"))
        version = Path(args["model_repository"]) / args["model_version"]
        self.folder = EngineFolder((version / settings["engine"]).resolve())
        self.reader = self.folder.media_reader()
        decoder = LocalDecoder(door_of(os.getppid(), DECODER))
        self.pipeline = Pipeline(
            Encoders(self.folder), decoder, self.folder.config, self.folder.prompt_builder(), self.reader,
            limits=self.folder.recipe.limits, schema=self.folder.schema,
        )  # fmt: skip
        self.metrics = AnswerMetrics(model["name"])
        workers = int(settings["workers"])
        self.pool, self.most = ThreadPoolExecutor(workers), 2 * workers
        self.lock, self.open, self.running = threading.Lock(), 0, 0  # running: until the last response is sent

    def execute(self, requests: list[Triton]) -> None:
        for request in requests:
            sender = wire.Sender(request)
            with self.lock:
                full = self.open >= self.most
                self.open += not full
            if full:
                sender.fail(BusyError(f"{self.most} requests are under way: try again later"))
            else:
                self._run(1)
                self.pool.submit(self._answer, request, sender, time.perf_counter())

    def _answer(self, request: Triton, sender: wire.Sender, arrived: float) -> None:
        try:
            try:
                last = self._respond(request, sender, arrived)
            finally:  # whoever hears the end may ask again at once
                with self.lock:
                    self.open -= 1
            sender.finish(last)
        except Exception as error:
            sender.fail(error)
        finally:
            self._run(-1)

    def _run(self, change: int) -> None:
        with self.lock:
            self.running += change
            self.metrics.running(self.running)

    def _respond(self, request: Triton, sender: wire.Sender, arrived: float) -> Tensors:
        """Send what comes, return what the last response holds."""
        stream = self.pipeline.stream(wire.read(request, self.folder.config))
        text = ""
        for event in stream:
            if sender.gone:
                stream.close()
                raise CancelledError("the request was cancelled by its sender")
            if isinstance(event, Answer):
                return self._last(event, text)
            if isinstance(event, Words):
                if not text:
                    self.metrics.first_token((time.perf_counter() - arrived) * 1e3)
                text += event.text
            if self.decoupled:
                sender.send(wire.event_tensors(event))
        raise AssertionError("a stream ends with its answer")

    def _last(self, answer: Answer, text: str) -> Tensors:
        tensors = wire.event_tensors(answer)
        if not self.decoupled:
            tensors["text_output"] = wire.texts(text)
        return tensors

    def finalize(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.reader.close()
