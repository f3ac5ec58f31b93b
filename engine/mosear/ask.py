"""`mosear ask`: one request to a server, or on an engine in this process, printed as it comes."""

import json
from collections.abc import Iterable
from pathlib import Path

from mosear.engine import Engine
from mosear.errors import RequestError
from mosear.runtime.pipeline import Event, StageDone
from mosear.runtime.request import Answer, Judgement, Request


def read_file(path: Path | None) -> bytes | None:
    """The bytes of a clip; raises RequestError where it cannot be read."""
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}: name a video or sound file") from error


def ask_local(folder: Path, request: Request, *, as_json: bool) -> None:
    """Answer on the engine in `folder`, in this process, and print."""
    with Engine(folder) as engine:
        show(engine.pipeline.stream(request), as_json=as_json)


def ask_server(url: str, request: Request, *, as_json: bool) -> None:
    """Ask the server at `url` (host:port of gRPC) and print."""
    from mosear.serving.client import Client

    with Client(url) as client:
        show(client.stream(request), as_json=as_json)


def show(events: Iterable[Event], *, as_json: bool) -> None:
    """Print stages and words as they come, then scores, masses and timings; or the answer as JSON alone."""
    writing = False
    for event in events:
        if isinstance(event, Answer):
            print(json.dumps(event.record(), indent=2) if as_json else "\n\n" + summary(event))
        elif as_json:
            continue
        elif isinstance(event, StageDone):
            print(f"  {event.name:<14}{event.ms:8.1f} ms", flush=True)
        else:
            print(event.text if writing else f"\n{event.text.lstrip()}", end="", flush=True)
            writing = True


def summary(answer: Answer) -> str:
    """Scores, conflict, masses, experts, timings and notes, for people."""
    lines = [
        line
        for title, judgement in (("all", answer.joint), ("face alone", answer.face), ("voice alone", answer.voice))
        if judgement
        for line in _judged(title, judgement)
    ]
    if answer.conflict is not None:
        verdict = "face and voice disagree" if answer.conflict else "face and voice agree"
        lines.append(verdict if answer.conflict_score is None else f"{verdict} (score {answer.conflict_score:.2f})")
    before, after = answer.modality_mass.mean(0)
    lines += ["", "attention mass    " + "".join(f"{group:>9}" for group in answer.groups)]
    lines += [
        f"  {name:<16}" + "".join(f"{value:9.3f}" for value in row)
        for name, row in (("before", before), ("after", after))
    ]
    lines.append("expert weights")
    for group, weights in zip(answer.groups, answer.expert_weights, strict=True):
        if weights.any():
            lines.append(f"  {group:<16}" + "".join(f"{value:9.3f}" for value in weights))
    timings = ", ".join(f"{name} {ms:.0f}" for name, ms in answer.timings_ms.items())
    lines += ["", f"{answer.prompt_tokens} tokens read, {answer.tokens} written; ms: {timings}"]
    lines += [f"note: {note}" for note in answer.notes]
    return "\n".join(lines)


def _judged(title: str, judgement: Judgement) -> list[str]:
    shares = sorted(judgement.probabilities.items(), key=lambda item: -item[1])
    scores = "  ".join(f"{label} {share:.2f}" for label, share in shares[:4])
    return [f"{title:<12}{judgement.label:<11}{scores}"]
