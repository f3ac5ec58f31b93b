"""A clip's way to an answer: media, encoders, prompt, decoder; a stream of events that ends with the whole answer."""

import contextlib
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass

import numpy as np

from mosear.backends.session import Runner
from mosear.config import ModelConfig
from mosear.errors import RequestError
from mosear.recipe import Limits
from mosear.runtime.decode import Decoding, Prefilled, Scored, Token, Work
from mosear.runtime.encode import Stages, encode
from mosear.runtime.features import check_features
from mosear.runtime.media import Clip, MediaReader
from mosear.runtime.prompt import PromptBuilder, Task
from mosear.runtime.request import Answer, Request
from mosear.runtime.sampling import FloatArray
from mosear.runtime.story import Story


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """Text that was just written."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageDone:
    """A stage that has ended."""

    name: str
    ms: float


Event = Words | StageDone | Answer


class Pipeline:
    """Answers requests: encoders on `backend`, the decoder behind `decoding`, wherever these run."""

    def __init__(
        self, backend: Runner, decoding: Decoding, config: ModelConfig, builder: PromptBuilder, reader: MediaReader, *,
        limits: Limits, schema: str,
    ) -> None:  # fmt: skip
        """`schema`: names the encoders; ready features must carry the same."""
        self.backend, self.decoding, self.config, self.builder = backend, decoding, config, builder
        self.reader, self.limits, self.schema = reader, limits, schema

    def answer(self, request: Request) -> Answer:
        """The whole answer; raises RequestError (MediaError for media), and what `Decoding.decode` raises."""
        for event in self.stream(request):
            if isinstance(event, Answer):
                return event
        raise AssertionError("a stream ends with its answer")

    def stream(self, request: Request) -> Generator[Event]:
        """Stages and words as they come, then the answer; raises what `answer` raises. Closing it cancels."""
        request = request.checked(self.limits)
        return self._stream(request)

    def _stream(self, request: Request) -> Generator[Event]:
        start, stages = time.perf_counter(), Stages()
        deadline_s = None if request.deadline_ms is None else time.monotonic() + request.deadline_ms / 1e3
        self.builder.check_words(str(request.words))
        with stages("media"):
            clip = self._clip(request)
        features, notes = encode(self.backend, self.config, clip, stages)
        features |= request.features
        work = self._work(request, features, deadline_s)
        yield from (StageDone(name=name, ms=ms) for name, ms in stages.times_ms.items())
        if work.task is Task.CONFLICT and len(work.muted) == 1:
            notes.append("a conflict report needs a face and a voice: only what is there was judged")
        story = Story(self.config, self.builder)
        with contextlib.closing(self.decoding.decode(work)) as said:
            last = time.perf_counter()
            for event in said:
                now = time.perf_counter()
                stage = {Prefilled: "prefill", Scored: "labels", Token: "decode"}[type(event)]
                stages.add(stage, (now - last) * 1e3)
                last = now
                if isinstance(event, Prefilled):
                    stages.times_ms["first_token"] = (now - start) * 1e3
                    yield StageDone(name=stage, ms=stages.times_ms[stage])
                if words := story.take(event):
                    yield Words(text=words)
        stages.times_ms["total"] = (time.perf_counter() - start) * 1e3
        yield story.answer(work, timings_ms=stages.times_ms, notes=(*clip.notes, *notes))

    def _work(self, request: Request, features: Mapping[str, FloatArray], deadline_s: float | None) -> Work:
        task = Task(request.task)
        counts = {field: len(values) for field, values in features.items()}
        prompt = self.builder.build(task, counts=counts, words=str(request.words))
        if len(prompt) > self.limits.prompt_tokens:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; this engine takes {self.limits.prompt_tokens}: shorten text_input"
            )
        assert request.max_tokens is not None  # checked() has set it
        return Work(
            ids=prompt.ids, group=prompt.group, features=features, task=task,
            strength=self.config.ar.strength if request.strength is None else request.strength,
            max_tokens=request.max_tokens, min_tokens=request.min_tokens, sampling=request.sampling,
            deadline_s=deadline_s,
        )  # fmt: skip

    def _clip(self, request: Request) -> Clip:
        encoded = request.video is not None or request.audio is not None
        if encoded and (request.frames is not None or request.waveform is not None):
            raise RequestError("the request has encoded media and ready tensors: send one or the other")
        check_features(request, self.config, self.schema)
        if encoded:
            return self.reader.read(request.video, request.audio)
        frames = np.zeros((0, 1, 1, 3), np.uint8) if request.frames is None else request.frames
        waveform = np.zeros(0, np.float32) if request.waveform is None else request.waveform
        if len(frames) > self.config.face.frames:
            raise RequestError(
                f"frames has {len(frames)} pictures; the model takes {self.config.face.frames}: send fewer"
            )
        most = int(self.limits.clip_seconds * self.config.voice.sample_rate)
        if len(waveform) > most:
            raise RequestError(f"waveform has {len(waveform)} samples; this engine takes {most}: shorten it")
        return Clip(frames=frames, frame_times_s=np.zeros(len(frames), np.float32), waveform=waveform, notes=())
