"""Questions put to an engine, a server or the reference, and what they said, kept line by line so that a run can go on."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosear.config import ARConfig
from mosear.engine import Engine
from mosear.errors import BusyError, ConfigError, MosearError, ServingError
from mosear.runtime.request import Answer, Request

Ask = Callable[[Request], Answer]
Say = Callable[[str], None]
Record = Mapping[str, Any]  # JSON
BUSY_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A request and its name. `make` is called when it is asked; a clip that cannot be read fails there."""

    key: str
    make: Callable[[], Request]


@contextmanager
def served(url: str) -> Iterator[Ask]:
    """Ask the server at `url`; a request refused as busy is asked again."""
    from mosear.serving.client import Client

    with Client(url) as client:

        def ask(request: Request) -> Answer:
            while True:
                try:
                    return client.ask(request)
                except BusyError:
                    time.sleep(BUSY_S)

        yield ask


def reference(engine: Engine, checkpoint: Path, ar: ARConfig | None = None) -> Ask:
    """Ask the PyTorch reference of a checkpoint, with the engine's prompts; `ar` in place of the checkpoint's."""
    from mosear_export.checkpoint import Checkpoint
    from mosear_export.model.whole import ReferenceModel
    from mosear_export.reference_backend import ReferenceBackend

    opened = Checkpoint.open(checkpoint)
    model = ReferenceModel(dataclasses.replace(opened.config, ar=ar or opened.config.ar))
    opened.load_into(model.files())
    return engine.on(ReferenceBackend(model)).answer


class Journal:
    """A file of what was asked and answered. Its first line says of what; another run's is refused, never written over."""

    def __init__(self, path: Path, settings: Mapping[str, object]) -> None:
        """Raises ConfigError where the file is of other settings, or no journal."""
        self.path, self.records = path, dict[str, Record]()
        head = json.loads(json.dumps({"settings": settings}, default=str))
        if path.exists() and path.stat().st_size:
            lines = path.read_text().splitlines()
            try:
                found = [json.loads(line) for line in lines[:-1]]
                with_last = [json.loads(lines[-1])] if _whole(lines[-1]) else []
            except ValueError as error:
                raise ConfigError(
                    f"{path} is no journal of answers ({error}): remove it, or name another --work"
                ) from None
            if (found + with_last)[:1] != [head]:
                raise ConfigError(f"{path} is of a run with other settings: remove it, or name another --work folder")
            self.records = {record["key"]: record for record in (found + with_last)[1:]}
            if not with_last:  # a run was stopped amid a line
                path.write_text("".join(line + "\n" for line in lines[:-1]))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(head) + "\n")

    def ask_all(self, questions: Sequence[Question], ask: Ask, say: Say, *, retry: bool = False) -> None:
        """Ask what was not asked yet (`retry`: and what failed), writing each answer down. A request's own failure is
        written down too; a server that cannot be reached ends the run, which can be started again."""
        left = [q for q in questions if q.key not in self.records or (retry and "error" in self.records[q.key])]
        start, every = time.monotonic(), max(1, len(left) // 50)
        if len(left) < len(questions):
            say(f"{len(questions) - len(left)} of {len(questions)} answers are in {self.path}")
        with self.path.open("a") as file:
            for i, question in enumerate(left, 1):
                record = _record(question, ask)
                self.records[question.key] = record
                file.write(json.dumps(record) + "\n")
                file.flush()
                if i % every == 0 or i == len(left):
                    rate = (time.monotonic() - start) / i
                    failed = sum("error" in self.records[q.key] for q in questions if q.key in self.records)
                    say(f"{i} of {len(left)} asked, {failed} failed, {rate * (len(left) - i):.0f} s to go")

    def answered(self, questions: Sequence[Question]) -> dict[str, Record]:
        """The answers to these, by key; what failed is not among them."""
        found = {q.key: self.records[q.key] for q in questions if q.key in self.records}
        return {key: record for key, record in found.items() if "error" not in record}

    def failed(self) -> dict[str, str]:
        """What failed, and why, by key."""
        return {key: str(record["error"]) for key, record in self.records.items() if "error" in record}


def _whole(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _record(question: Question, ask: Ask) -> Record:
    try:
        answer = ask(question.make())
    except ServingError:
        raise
    except (MosearError, OSError) as error:
        return {"key": question.key, "error": f"{type(error).__name__}: {error}"}
    told = answer.record()
    kept = {name: told[name] for name in ("text", "joint", "face", "voice", "conflict")}
    mass = answer.modality_mass.round(5).tolist()
    return {"key": question.key, **kept, "mass": mass, "experts": answer.expert_weights.round(5).tolist()}
