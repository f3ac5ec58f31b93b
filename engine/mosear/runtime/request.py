"""A request and what comes back: checked once here, trusted inside."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mosear.errors import RequestError
from mosear.recipe import Limits
from mosear.runtime.prompt import Task
from mosear.runtime.sampling import Sampling

FloatArray = npt.NDArray[np.float32]
DEFAULT_TOKENS = 64
MAX_DEADLINE_MS = 3_600_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a person asks. At least one of video, audio, frames, waveform and words must be there.

    video, audio: encoded media; the sound of `video` is heard unless `audio` is given. frames: u8 [F, H, W, 3] RGB and
    waveform: f32 [n] at the model's sample rate, in place of encoded media. strength: of attention reallocation, 0 to 1
    (None: the checkpoint's). max_tokens: of `reason` (None: 64, or the engine's limit if that is lower); min_tokens: a
    reason does not end before. features: f32 [n, size] by field (face, scene, voice), what this engine's encoders say of a
    clip, with their `feature_schema`, in place of the clip. deadline_ms: from the request's arrival on (None: none).
    """

    task: Task | str = Task.CLASSIFY
    video: bytes | None = None
    audio: bytes | None = None
    frames: npt.NDArray[np.uint8] | None = None
    waveform: FloatArray | None = None
    words: str | bytes = ""
    features: Mapping[str, FloatArray] = field(default_factory=dict)
    feature_schema: str = ""
    max_tokens: int | None = None
    min_tokens: int = 0
    strength: float | None = None
    sampling: Sampling = field(default_factory=Sampling)
    deadline_ms: int | None = None

    def checked(self, limits: Limits) -> "Request":
        """This request with its task and words in their own types; raises RequestError naming the field and the limit."""
        words = self.words
        if isinstance(words, bytes):
            try:
                words = words.decode()
            except UnicodeDecodeError as error:
                raise RequestError(f"text_input is not UTF-8 at byte {error.start}: encode it as UTF-8") from error
        try:
            words.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"text_input is not valid Unicode at character {error.start}: send valid text"
            ) from error
        if len(words) > limits.words:
            raise RequestError(f"text_input has {len(words)} characters; this engine takes {limits.words}: shorten it")
        if self.task not in set(Task):
            raise RequestError(f"task is {self.task!r}: choose one of {', '.join(Task)}")
        max_tokens = min(DEFAULT_TOKENS, limits.new_tokens) if self.max_tokens is None else self.max_tokens
        if type(max_tokens) is not int or not 1 <= max_tokens <= limits.new_tokens:
            raise RequestError(f"max_tokens is {max_tokens}: it must lie from 1 to {limits.new_tokens}")
        if type(self.min_tokens) is not int or not 0 <= self.min_tokens <= max_tokens:
            raise RequestError(f"min_tokens is {self.min_tokens}: it must lie from 0 to max_tokens, {max_tokens}")
        if self.deadline_ms is not None and not 0 < self.deadline_ms <= MAX_DEADLINE_MS:
            raise RequestError(f"deadline_ms is {self.deadline_ms}: it must lie from 1 to {MAX_DEADLINE_MS}")
        strength = self.strength
        if strength is not None and not (math.isfinite(strength) and 0 <= strength <= 1):
            raise RequestError(f"ar_strength is {strength}: it must lie from 0 (off) to 1")
        media = (self.video, self.audio, self.frames, self.waveform)
        if all(part is None for part in media) and not self.features and not words.strip():
            raise RequestError("the request is empty: send a video, a sound or words")
        _check_arrays(self.frames, self.waveform)
        return dataclasses.replace(self, task=Task(self.task), words=words.strip(), max_tokens=max_tokens)


def _check_arrays(frames: npt.NDArray[np.generic] | None, waveform: npt.NDArray[np.generic] | None) -> None:
    if frames is not None and (
        frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape
    ):
        raise RequestError(f"frames is {frames.dtype} {list(frames.shape)}: it must be uint8 [F, H, W, 3], not empty")
    if waveform is not None:
        if waveform.dtype != np.float32 or waveform.ndim != 1 or not len(waveform):
            raise RequestError(
                f"waveform is {waveform.dtype} {list(waveform.shape)}: it must be float32 [n], not empty"
            )
        if not np.isfinite(waveform).all():
            raise RequestError("waveform holds values that are not finite: send samples from -1 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A label and its scores: the sum of the log-probabilities of each label's tokens."""

    label: str
    scores: Mapping[str, float]

    @property
    def probabilities(self) -> dict[str, float]:
        """Scores as shares among the labels."""
        top = max(self.scores.values())
        weight = {label: math.exp(score - top) for label, score in self.scores.items()}
        return {label: value / sum(weight.values()) for label, value in weight.items()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """The whole answer. Masses and gates are those of the last prompt position, where reallocation begins."""

    task: Task
    text: str
    joint: Judgement | None
    face: Judgement | None = None  # conflict: what the model says with the voice muted
    voice: Judgement | None = None  # conflict: with the face muted
    conflict: bool | None = None  # None: not asked, or a modality is missing
    conflict_score: float | None = None  # 0 to 1: how surely they disagree (runtime/disagreement.py)
    modality_mass: FloatArray  # [layers, 2, G]: before and after, mean over heads
    expert_weights: FloatArray  # [G, E]: mean over the layers' gates and the group's prompt positions
    groups: tuple[str, ...]
    tokens: int  # written
    prompt_tokens: int
    timings_ms: Mapping[str, float]
    notes: tuple[str, ...]

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Answer":  # Any: JSON
        """The answer that `record` tells of; raises KeyError, TypeError or ValueError where it does not."""

        def judgement(told: Mapping[str, Any] | None) -> Judgement | None:  # Any: JSON
            return None if told is None else Judgement(label=told["label"], scores=told["scores"])

        groups = tuple(record["mass_before"])
        return cls(
            task=Task(record["task"]),
            text=record["text"],
            joint=judgement(record["joint"]),
            face=judgement(record["face"]),
            voice=judgement(record["voice"]),
            conflict=record["conflict"],
            conflict_score=record["conflict_score"],
            modality_mass=np.array(record["modality_mass"], np.float32),
            expert_weights=np.array([record["expert_weights"][group] for group in groups], np.float32),
            groups=groups,
            tokens=record["tokens"],
            prompt_tokens=record["prompt_tokens"],
            timings_ms=record["timings_ms"],
            notes=tuple(record["notes"]),
        )

    def record(self) -> dict[str, object]:
        """Plain data for JSON."""

        def judged(judgement: Judgement | None) -> dict[str, object] | None:
            if judgement is None:
                return None
            return {
                "label": judgement.label,
                "scores": dict(judgement.scores),
                "probabilities": judgement.probabilities,
            }

        mass = self.modality_mass.mean(0)
        return {
            "task": str(self.task),
            "text": self.text,
            "joint": judged(self.joint),
            "face": judged(self.face),
            "voice": judged(self.voice),
            "conflict": self.conflict,
            "conflict_score": self.conflict_score,
            "mass_before": dict(zip(self.groups, map(float, mass[0]))),
            "mass_after": dict(zip(self.groups, map(float, mass[1]))),
            "modality_mass": self.modality_mass.tolist(),
            "expert_weights": dict(zip(self.groups, self.expert_weights.tolist())),
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "timings_ms": dict(self.timings_ms),
            "notes": list(self.notes),
        }
