"""What every benchmark asks about: the demo clip, words that fill a prompt of realistic length, and a strength."""

import sys
from dataclasses import replace
from pathlib import Path

from mosear.runtime.prompt import Task
from mosear.runtime.request import Request

STRENGTH = 0.5
SENTENCE = "I did not expect to see you here today, and I really do not know what I should say to you now. "
WORDS = (SENTENCE * 7).strip()


def make_demo_clip(folder: Path) -> Path:
    from mosear_export.demo.clip import make_clip
    from mosear_export.demo.fetch import default_cache, fetch

    return make_clip(fetch(default_cache(), say), folder / "clip.mp4").path


def request(task: Task, clip: bytes, *, tokens: int) -> Request:
    """About the clip; a reason is exactly `tokens` long."""
    asked = Request(task=task, video=clip, words=WORDS, strength=STRENGTH)
    return replace(asked, min_tokens=tokens, max_tokens=tokens) if task is Task.REASON else asked


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
