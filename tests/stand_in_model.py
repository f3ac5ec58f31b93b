"""A model `mosear` without an engine, for tests of the client: it does what `text_input` says."""

import json
import threading
import time
from pathlib import Path
from typing import Any

from stand_in import ANSWER

from mosear.config import ModelConfig
from mosear.runtime.pipeline import StageDone, Words
from mosear.runtime.request import Request
from mosear.serving.faults import KINDS
from mosear.serving.models import wire


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.decoupled = bool(json.loads(args["model_config"]).get("model_transaction_policy", {}).get("decoupled"))
        version = Path(args["model_repository"]) / args["model_version"]
        self.config, self.seen = ModelConfig.load(version / "config.json"), version / "seen"

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = wire.Sender(request)
            threading.Thread(target=self.answer, args=(request, sender)).start()

    def answer(self, triton: Any, sender: wire.Sender) -> None:
        try:
            request = wire.read(triton, self.config)
            self.note(json.dumps(self.told(triton, request)))
            sender.finish(self.act(request, sender))
        except Exception as error:
            sender.fail(error)

    def act(self, request: Request, sender: wire.Sender) -> Any:
        """What the last response holds."""
        words = request.words.decode() if isinstance(request.words, bytes) else request.words
        verb, _, rest = words.partition(" ")
        if verb == "raise":
            self.send(sender, StageDone(name="media", ms=1.0))
            raise KINDS[rest]("as it was said: \u00e9, two\nlines")
        if verb == "break":
            return 1 // 0
        if verb == "sleep":
            time.sleep(1.5)
        if verb == "nothing":
            return None
        if verb == "odd":
            return {"label": wire.texts("happy")}
        if verb == "slow":
            for _ in range(request.max_tokens or 1):
                if sender.gone:
                    self.note("cancelled")
                    return None
                self.send(sender, Words(text=f"{words} "))
                time.sleep(0.05)
        else:
            self.send(sender, StageDone(name="media", ms=1.5))
            self.send(sender, StageDone(name="prefill", ms=2.5))
            for text in ("She ", "smiles: ", "h\u00e9llo"):
                self.send(sender, Words(text=text))
        return wire.event_tensors(ANSWER)

    def send(self, sender: wire.Sender, event: StageDone | Words) -> None:
        if self.decoupled:
            sender.send(wire.event_tensors(event))

    def told(self, triton: Any, request: Request) -> dict[str, object]:
        return {
            "inputs": sorted(tensor.name() for tensor in triton.inputs()),
            "task": request.task,
            "words": bytes(request.words).decode(),
            "video": request.video and request.video.hex(),
            "audio": request.audio and request.audio.hex(),
            "frames": None if request.frames is None else request.frames.tolist(),
            "waveform": None if request.waveform is None else request.waveform.tolist(),
            "features": {field: values.tolist() for field, values in request.features.items()},
            "feature_schema": request.feature_schema,
            "max_tokens": request.max_tokens,
            "min_tokens": request.min_tokens,
            "strength": request.strength,
            "sampling": {name: getattr(request.sampling, name) for name in ("temperature", "top_p", "seed")},
            "deadline_ms": request.deadline_ms,
        }

    def note(self, line: str) -> None:
        with self.seen.open("a") as file:
            file.write(line + "\n")
