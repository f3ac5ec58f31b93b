"""A clip's way to an answer: media, encoders, prompt, decoder; a stream of events that ends with the whole answer."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mosear.backends.session import Backend
from mosear.config import ModelConfig
from mosear.contract import Tensors
from mosear.errors import RequestError
from mosear.recipe import Limits
from mosear.runtime.encode import Stages, encode
from mosear.runtime.generate import Generation, Rows, score_labels, stream
from mosear.runtime.media import Clip, MediaReader
from mosear.runtime.prompt import AUDIO, VIDEO, PromptBuilder, Task
from mosear.runtime.request import Answer, Judgement, Request
from mosear.runtime.sampling import FloatArray, Sampler, log_softmax

INCOMPLETE = "\ufffd"  # what the tokenizer writes for a character whose bytes are not all there yet


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
    """Answers requests on a loaded backend, one at a time."""

    def __init__(
        self, backend: Backend, config: ModelConfig, builder: PromptBuilder, reader: MediaReader, limits: Limits
    ) -> None:
        self.backend, self.config, self.builder = backend, config, builder
        self.reader, self.limits = reader, limits

    def answer(self, request: Request) -> Answer:
        """The whole answer; raises RequestError (MediaError for media)."""
        for event in self.stream(request):
            if isinstance(event, Answer):
                return event
        raise AssertionError("a stream ends with its answer")

    def stream(self, request: Request) -> Iterator[Event]:
        """Stages and words as they come, then the answer; raises RequestError (MediaError for media)."""
        request = request.checked(self.limits)
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[Event]:
        start, stages = time.perf_counter(), Stages()
        builder, task = self.builder, Task(request.task)
        builder.check_words(str(request.words))
        with stages("media"):
            clip = self._clip(request)
        tokens, notes = encode(self.backend, self.config, clip, stages)
        prompt = builder.build(
            task, counts={field: len(values) for field, values in tokens.items()}, words=str(request.words)
        )
        if len(prompt) > self.limits.prompt_tokens:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; this engine takes {self.limits.prompt_tokens}: shorten text_input"
            )
        yield from (StageDone(name=name, ms=ms) for name, ms in stages.times_ms.items())
        both = "voice" in tokens and "face" in tokens
        if task is Task.CONFLICT and not both:
            notes.append("a conflict report needs a face and a voice: only what is there was judged")
        muted = ((), (AUDIO,), (VIDEO,)) if task is Task.CONFLICT and both else ((),)
        strength = self.config.ar.strength if request.strength is None else request.strength
        assert request.max_tokens is not None  # checked() has set it
        room = request.max_tokens if task is Task.REASON else max(map(len, builder.labels))
        generation = Generation(self.backend, self.config, prompt, Rows(muted=muted, strength=strength), room=room)
        with stages("prefill"):
            out = generation.prefill(tokens)
        yield StageDone(name="prefill", ms=stages.times_ms["prefill"])
        stages.times_ms["first_token"] = (time.perf_counter() - start) * 1e3
        mass = np.stack([_last_row(out["mass_before"]), _last_row(out["mass_after"])], axis=1)  # [layers, 2, G]
        experts = self._expert_use(out, prompt.group)
        logits = np.array(out["logits"][:, 0], np.float32)  # [rows, V]
        judgements: list[Judgement] = []
        text, written = "", 0
        if task is Task.REASON:
            for event in self._write(generation, logits[0], request, stages):
                if isinstance(event, Words):
                    text += event.text
                    yield event
                else:
                    written, judgements = event
        else:
            with stages("labels"):
                scores = score_labels(generation, logits, builder.labels)
            judgements = [self._judge(row) for row in scores]
            text, written = judgements[0].label, 1
            yield Words(text=text)
        stages.times_ms["total"] = (time.perf_counter() - start) * 1e3
        face, voice = judgements[1:] if len(judgements) > 1 else (None, None)
        yield Answer(
            task=task,
            text=text,
            joint=judgements[0] if judgements else None,
            face=face,
            voice=voice,
            conflict=face.label != voice.label if face and voice else None,
            modality_mass=mass,
            expert_weights=experts,
            groups=self.config.groups,
            tokens=written,
            prompt_tokens=len(prompt),
            timings_ms=stages.times_ms,
            notes=(*clip.notes, *notes),
        )

    def _clip(self, request: Request) -> Clip:
        encoded = request.video is not None or request.audio is not None
        if encoded and (request.frames is not None or request.waveform is not None):
            raise RequestError("the request has encoded media and ready tensors: send one or the other")
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

    def _write(
        self, generation: Generation, logits: FloatArray, request: Request, stages: Stages
    ) -> Iterator[Words | tuple[int, list[Judgement]]]:
        """Words as whole characters come, then how many tokens there were and the last label among them.

        The label's scores are those of the step at which its first token was chosen.
        """
        builder, ids, shown, found = self.builder, [], 0, []
        first = {tokens[0]: index for index, tokens in enumerate(builder.labels)}
        start = time.perf_counter()
        sampler = Sampler(request.sampling)
        for token, seen in stream(generation, logits, sampler, stop=builder.stop, limit=request.max_tokens or 0):
            ids.append(token)
            if token in first:
                scores = log_softmax(seen)[[tokens[0] for tokens in builder.labels]]
                found = [self._judge(scores, chosen=first[token])]
            text = builder.decode(ids)
            if len(text) > shown and not text.endswith(INCOMPLETE):
                yield Words(text=text[shown:])
                shown = len(text)
        stages.times_ms["decode"] = (time.perf_counter() - start) * 1e3
        yield len(ids), found

    def _judge(self, scores: FloatArray, chosen: int | None = None) -> Judgement:
        labels = self.config.labels
        index = int(scores.argmax()) if chosen is None else chosen
        return Judgement(label=labels[index], scores=dict(zip(labels, map(float, scores), strict=True)))

    def _expert_use(self, out: Tensors, group: np.ndarray) -> FloatArray:  # type: ignore[type-arg]
        weights: FloatArray = np.asarray(out["expert_weights"][0], np.float32).mean(0)  # [S, E]
        groups = range(len(self.config.groups))
        rows = [weights[group == g].mean(0) if (group == g).any() else np.zeros(weights.shape[1]) for g in groups]
        use: FloatArray = np.stack(rows).astype(np.float32)
        return use


def _last_row(mass: np.ndarray) -> FloatArray:  # type: ignore[type-arg]
    """Mean over heads of the first sequence's last row: [B, layers, H, S, G] to [layers, G]."""
    mean: FloatArray = np.asarray(mass[0, :, :, -1], np.float32).mean(1)
    return mean
