"""The model `decoder`: owns weights, cache slots and sessions. A prompt goes in; masses, tokens or label scores come out."""

import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mosear.contract import DECODER, EMBEDDING, HOLES, Tensors
from mosear.engine import EngineFolder
from mosear.errors import CancelledError, MosearError, RequestError
from mosear.runtime.decode import Prefilled, Said, Token, Work
from mosear.runtime.prompt import Task
from mosear.runtime.ticket import Ticket
from mosear.serving.models import wire
from mosear.serving.models.metrics import DecoderMetrics
from mosear.serving.models.wire import Triton

log = logging.getLogger(__name__)

PARTS = (EMBEDDING, *(f"{field}_projector" for field in HOLES), DECODER)


class TritonPythonModel:
    """Takes requests in between two decode steps.

    What the scheduler says is sent by a thread of its own, the outbox: a response waits for the server's process, 0.5 ms a
    token, in which the next step can run.
    """

    def initialize(self, args: dict[str, str]) -> None:
        model = json.loads(args["model_config"])
        settings = {name: value["string_value"] for name, value in model["parameters"].items()}
        version = Path(args["model_repository"]) / args["model_version"]
        self.folder = EngineFolder((version / settings["engine"]).resolve())
        self.backend = self.folder.backend(PARTS, threads=int(settings["threads"]))
        self.scheduler = self.folder.scheduler(self.backend, slots=int(settings["slots"]), queue=int(settings["queue"]))
        self.metrics = DecoderMetrics(self.folder.config, int(settings["slots"]))
        self.outbox = ThreadPoolExecutor(1)
        self.scheduler.start()
        self.sessions: dict[str, Ticket] = {}
        self.lock = threading.Lock()

    def execute(self, requests: list[Triton]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._take(wire.Inputs(request), sender)
            except Exception as error:
                fail(sender, error)

    def _take(self, given: wire.Inputs, sender: Triton) -> None:
        session = given.text("session", "")
        if given.number("cancel", False):
            with self.lock:
                ticket = self.sessions.get(session)
            if ticket is not None:
                ticket.cancel()
            wire.finish(sender)
            return
        listener = Listener(self, session, sender)
        with self.lock:
            listener.ticket = self.scheduler.submit(self._work(given), listener)
            if session:
                self.sessions[session] = listener.ticket
        self.show_load()

    def count(self, event: Said) -> None:
        if isinstance(event, Token):
            self.metrics.token()
        elif isinstance(event, Prefilled):
            self.metrics.prefilled(event)
            self.show_load()

    def show_load(self) -> None:
        with self.lock:  # what is read first is also told first
            now = self.scheduler.load
            self.metrics.load(slots_in_use=now.rows_used, queue_length=now.queued)

    def forget(self, session: str) -> None:
        with self.lock:
            self.sessions.pop(session, None)

    def _work(self, given: wire.Inputs) -> Work:
        config, limits = self.folder.config, self.folder.recipe.limits
        ids, group = given.array("token_ids"), given.array("group")
        if ids is None or group is None or ids.shape != group.shape or not ids.size:
            raise RequestError("a prompt needs token_ids and group, both int32 [S] and not empty")
        if ids.max() >= config.backbone.vocab_size or ids.min() < min(HOLES.values()):
            raise RequestError(
                f"token_ids lie from {ids.min()} to {ids.max()}: from {min(HOLES.values())} (a feature's place) to "
                f"{config.backbone.vocab_size - 1} is right"
            )
        if group.min() < 0 or group.max() >= len(config.groups):
            raise RequestError(
                f"group holds {group.min()} to {group.max()}: from 0 to {len(config.groups) - 1} is right"
            )
        task = given.text("task", Task.CLASSIFY)
        if task not in set(Task):
            raise RequestError(f"task is {task!r}: choose one of {', '.join(Task)}")
        max_tokens, strength = given.number("max_tokens", 1), given.number("ar_strength", config.ar.strength)
        if not 1 <= max_tokens <= limits.new_tokens:
            raise RequestError(f"max_tokens is {max_tokens}: it must lie from 1 to {limits.new_tokens}")
        if not 0 <= strength <= 1:
            raise RequestError(f"ar_strength is {strength}: it must lie from 0 (off) to 1")
        deadline_ms = given.number("deadline_ms", None)
        features = {field: given.array(f"{field}_features") for field in HOLES}
        return Work(
            ids=ids, group=group, task=Task(task), strength=strength, max_tokens=max_tokens,
            features={field: values for field, values in features.items() if values is not None},
            min_tokens=given.number("min_tokens", 0), sampling=given.sampling(),
            deadline_s=None if deadline_ms is None else time.monotonic() + deadline_ms / 1e3,
        )  # fmt: skip

    def finalize(self) -> None:
        self.scheduler.close()
        self.outbox.shutdown()
        self.backend.close()


class Listener:
    """Has the outbox send what the scheduler says of one job."""

    def __init__(self, model: TritonPythonModel, session: str, sender: Triton) -> None:
        self.model, self.session, self.sender = model, session, sender
        self.ticket: Ticket | None = None  # until submit() has returned

    def said(self, event: Said) -> None:
        self.model.outbox.submit(self._send, event)

    def ended(self, error: MosearError | None) -> None:
        """The job is over: complete, or with an error."""
        self.model.forget(self.session)
        self.model.outbox.submit(self._finish, error)

    def _send(self, event: Said) -> None:
        try:
            # Where a session is named, its caller withdraws by that name; asking the server's process takes time.
            gone = not self.session and self.sender.is_cancelled()
            if not gone:
                self.model.count(event)
                self.sender.send(wire.response(said_tensors(event)))
        except Exception:
            log.exception("a response could not be sent: its request is cancelled")
            gone = True
        if gone and self.ticket is not None:
            self.ticket.cancel()

    def _finish(self, error: MosearError | None) -> None:
        try:
            self.model.show_load()
            if error is None or isinstance(error, CancelledError):
                wire.finish(self.sender)
            else:
                fail(self.sender, error)
        except Exception:
            log.exception("the end of a request could not be sent")


def fail(sender: Triton, error: Exception) -> None:
    """End a stream with an error as a tensor: a calling model would not hear of an error response, nor of its end."""
    sender.send(wire.response({"error": wire.texts(wire.fault_of(error))}))
    wire.finish(sender)


def said_tensors(event: Said) -> Tensors:
    if isinstance(event, Prefilled):
        return {"modality_mass": event.mass, "expert_weights": event.experts}
    if isinstance(event, Token):
        found: Tensors = {"token": np.array([event.id], np.int32)}
        return found if event.scores is None else {**found, "label_scores": event.scores[None]}
    return {"label_scores": event.scores}
