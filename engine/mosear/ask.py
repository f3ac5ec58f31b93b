"""`mosear ask --local`: one request on an engine in this process, printed as it comes."""

import json
from pathlib import Path

from mosear.engine import Engine
from mosear.errors import RequestError
from mosear.runtime.pipeline import StageDone, Words
from mosear.runtime.request import Answer, Judgement, Request


def read_file(path: Path | None) -> bytes | None:
    """The bytes of a clip; raises RequestError where it cannot be read."""
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}: name a video or sound file") from error


def ask_local(folder: Path, request: Request, *, as_json: bool) -> None:
    """Answer on the engine in `folder` and print: stages, words, then scores, masses and timings; or JSON alone."""
    with Engine(folder) as engine:
        if as_json:
            print(json.dumps(engine.pipeline.answer(request).record(), indent=2))
            return
        writing = False
        for event in engine.pipeline.stream(request):
            if isinstance(event, StageDone):
                print(f"  {event.name:<14}{event.ms:8.1f} ms")
            elif isinstance(event, Words):
                print(event.text if writing else f"\n{event.text.lstrip()}", end="", flush=True)
                writing = True
            else:
                print("\n\n" + summary(event))


def summary(answer: Answer) -> str:
    """Scores, conflict, masses, experts, timings and notes, for people."""
    lines = [
        line
        for title, judgement in (("all", answer.joint), ("face alone", answer.face), ("voice alone", answer.voice))
        if judgement
        for line in _judged(title, judgement)
    ]
    if answer.conflict is not None:
        lines.append("face and voice disagree" if answer.conflict else "face and voice agree")
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
