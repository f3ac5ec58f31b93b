"""The model `decoder`: owns weights and cache slots. A prompt goes in; masses, tokens or label scores come out."""

import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mosear.contract import DECODER, EMBEDDING, HOLES, Tensors
from mosear.engine import EngineFolder
from mosear.errors import CancelledError, MosearError, RequestError, ServingError
from mosear.runtime.decode import Prefilled, Said, Token, Work
from mosear.runtime.prompt import Task
from mosear.runtime.ticket import Listener, Ticket
from mosear.serving.faults import STOPPED
from mosear.serving.local import Door, door_of
from mosear.serving.models import wire
from mosear.serving.models.metrics import DecoderMetrics
from mosear.serving.models.wire import Triton

log = logging.getLogger(__name__)

PARTS = (EMBEDDING, *(f"{field}_projector" for field in HOLES), DECODER)


class TritonPythonModel:
    """Takes requests in between two decode steps: from clients as Triton's, from its neighbours at a door of its own.

    All that waits for the server's process (a response, a metric: 0.5 ms) is done by a thread of its own, the outbox,
    while the next step runs.
    """

    def initialize(self, args: dict[str, str]) -> None:
        model = json.loads(args["model_config"])
        settings = {name: value["string_value"] for name, value in model["parameters"].items()}
        version = Path(args["model_repository"]) / args["model_version"]
        self.folder = EngineFolder((version / settings["engine"]).resolve())
        self.backend = self.folder.backend(PARTS, threads=int(settings["threads"]))
        most = {name: int(settings[name]) for name in ("slots", "queue", "prefill_rows")}
        self.scheduler = self.folder.scheduler(self.backend, **most)
        self.metrics = DecoderMetrics(self.folder.config, most["slots"])
        self.outbox = ThreadPoolExecutor(1)
        self.scheduler.start()
        self.door = Door(door_of(os.getppid(), model["name"]), self.submit)

    def execute(self, requests: list[Triton]) -> None:
        for request in requests:
            sender = wire.Sender(request)
            try:
                client = Client(self.outbox, sender)
                client.ticket = self.submit(self._work(wire.Inputs(request)), client)
            except Exception as error:
                sender.fail(error)

    def submit(self, work: Work, listener: Listener) -> Ticket:
        ticket = self.scheduler.submit(work, Counted(self, listener))
        self.outbox.submit(self.show_load)
        return ticket

    def count(self, event: Said) -> None:
        if isinstance(event, Token):
            self.metrics.token()
        elif isinstance(event, Prefilled):
            self.metrics.prefilled(event)
            self.show_load()

    def show_load(self) -> None:
        now = self.scheduler.load
        self.metrics.load(slots_in_use=now.rows_used, queue_length=now.queued)

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
        self.door.close()
        self.scheduler.close()
        self.outbox.shutdown()
        self.backend.close()


class Counted:
    """A request's listener, with the metrics told of what it hears."""

    def __init__(self, model: TritonPythonModel, listener: Listener) -> None:
        self.model, self.listener = model, listener

    def said(self, event: Said) -> None:
        self.listener.said(event)
        self.model.outbox.submit(self.model.count, event)

    def ended(self, error: MosearError | None) -> None:
        # Who has cancelled hears nothing more: to all others it is the server that stops.
        self.listener.ended(ServingError(STOPPED) if isinstance(error, CancelledError) else error)
        self.model.outbox.submit(self.model.show_load)


class Client:
    """Has the outbox send to a client of Triton Server what the scheduler says of its request."""

    def __init__(self, outbox: ThreadPoolExecutor, sender: wire.Sender) -> None:
        self.outbox, self.sender = outbox, sender
        self.ticket: Ticket | None = None  # until submit() has returned
        self.gone = False

    def said(self, event: Said) -> None:
        self.outbox.submit(self._send, event)

    def ended(self, error: MosearError | None) -> None:
        """The job is over: complete, or with an error."""
        self.outbox.submit(self._finish, error)

    def _send(self, event: Said) -> None:
        try:
            self.gone = self.gone or self.sender.gone
            if not self.gone:
                self.sender.send(said_tensors(event))
        except Exception:
            log.exception("a response could not be sent: its request is cancelled")
            self.gone = True
        if self.gone and self.ticket is not None:
            self.ticket.cancel()

    def _finish(self, error: MosearError | None) -> None:
        try:
            if error is None or self.gone:
                self.sender.finish()
            else:
                self.sender.fail(error)
        except Exception:
            log.exception("the end of a request could not be sent")


def said_tensors(event: Said) -> Tensors:
    if isinstance(event, Prefilled):
        return {"modality_mass": event.mass, "expert_weights": event.experts}
    if isinstance(event, Token):
        found: Tensors = {"token": np.array([event.id], np.int32)}
        return found if event.scores is None else {**found, "label_scores": event.scores[None]}
    return {"label_scores": event.scores}
