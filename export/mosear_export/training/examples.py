"""Training examples: a face, a voice, both or neither, with the answers that the model should give."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mosear.runtime.prompt import AUDIO, VIDEO, Task
from mosear_export.training.features import Array, Features

NEUTRAL = "neutral"
# Sentences that carry no emotion, for the words of a clip.
PLAIN_WORDS = (
    "The meeting begins at nine.",
    "I put the letter on the table yesterday.",
    "She will be back on Wednesday, and then we can look at it together.",
    "It is seven o'clock now.",
    "The cloth lies on the fridge, and he has carried it upstairs and will go down again.",
)
# Words alone, where neither face nor voice is there.
TELLING_WORDS = {
    "neutral": ("The train leaves from platform two.", "There are twelve chairs in this room."),
    "happy": ("This is the best day of my life!", "I am so glad that you came, it is wonderful."),
    "sad": ("I miss her so much, I cannot stop crying.", "Everything that I loved is gone."),
    "angry": ("How dare you do that to me!", "Get out, I have had enough of your lies!"),
    "fearful": ("Please do not leave me here, someone is at the door.", "I am so scared that I cannot move."),
    "disgusted": ("That smells rotten, take it away.", "How revolting, there is mould all over it."),
    "surprised": ("What? I never expected that!", "Oh, you are here already? I had no idea!"),
    "bored": ("This talk goes on for ever and nothing happens.", "There is nothing to do here, as always."),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Features of what is there (None: absent), which groups are muted, the task, and the answer's words.

    strength: of attention reallocation on the answer's rows; direct: text rows before them see no face and no voice.
    """

    face: Array | None  # [frames, F]
    voice: Array | None  # [tokens, F]
    scene: Array | None  # [tokens, F]
    muted: tuple[int, ...]
    words: str
    task: Task
    answer: str
    strength: float = 0.0
    direct: bool = False


def answer_of(face: str | None, voice: str | None, label: str, task: Task) -> str:
    """The words that follow a prompt; a single label word is scored on the prompt's label prefix."""
    if task is not Task.REASON:
        return f" {label}"
    if face and voice:
        agree = "agree" if face == voice else "disagree"
        return f"The face looks {face} and the voice sounds {voice}. They {agree}. The emotion is {label}."
    if face:
        return f"The face looks {face}. There is no voice. The emotion is {label}."
    if voice:
        return f"The voice sounds {voice}. There is no face. The emotion is {label}."
    return f"There is no face and no voice. The emotion is {label}."


class Sampler:
    """Draws examples: classes evenly, faces and voices paired with equal labels, one neutral, or at random."""

    def __init__(self, features: Features, *, seed: int, frames: int) -> None:
        self.rng, self.frames, self.features = np.random.default_rng(seed), frames, features
        self.faces = {e: np.flatnonzero(features.faces.emotion == e) for e in np.unique(features.faces.emotion)}
        self.voices = {e: np.flatnonzero(features.voices.emotion == e) for e in np.unique(features.voices.emotion)}

    def draw(self, audio_share: float | None, *, direct: float, reasons: float = 0.5) -> Example:
        """An example. audio_share: what reallocation (at a strength drawn here) gives to the voice, None: off; direct: how
        often an example is so; reasons: how often its answer is a reason, not a label alone."""
        rng = self.rng
        task = Task.REASON if rng.random() < reasons else Task.CLASSIFY
        kind = rng.choice(["both", "face", "voice", "words"], p=[0.55, 0.24, 0.16, 0.05])
        if kind == "words":
            label = str(rng.choice(list(TELLING_WORDS)))
            words = str(rng.choice(TELLING_WORDS[label]))
            return Example(
                face=None, voice=None, scene=None, muted=(), words=words, task=task,
                answer=answer_of(None, None, label, task),
            )  # fmt: skip
        face, voice = self._pair()
        strength = 0.0 if audio_share is None or kind != "both" else float(rng.random())
        voiced = 0.5 if audio_share is None else 0.5 + strength * (audio_share - 0.5)
        label = {"face": face, "voice": voice, "both": self._joint(face, voice, voiced)}[kind]
        heard, seen = kind != "face", kind != "voice"
        lost = rng.random() < 0.5  # the other modality is absent; else it is there, and muted
        with_face, with_voice = seen or not lost, heard or not lost
        muted = tuple(g for g, on in ((VIDEO, seen), (AUDIO, heard)) if not on and not lost)
        return Example(
            face=self._face(face) if with_face else None,
            voice=self._voice(voice) if with_voice else None,
            scene=rng.choice(self.features.scenes) if with_face and rng.random() < 0.6 else None,
            muted=muted,
            words=str(rng.choice(PLAIN_WORDS)) if rng.random() < 0.25 else "",
            task=task,
            answer=answer_of(face if seen else None, voice if heard else None, label, task),
            strength=strength,
            direct=bool(rng.random() < direct),
        )

    def _pair(self) -> tuple[str, str]:
        rng = self.rng
        face, voice = str(rng.choice(list(self.faces))), str(rng.choice(list(self.voices)))
        draw = rng.random()
        if draw < 0.45:
            face = voice = str(rng.choice([e for e in self.faces if e in self.voices]))
        elif draw < 0.7:
            face, voice = (NEUTRAL, voice) if rng.random() < 0.5 else (face, NEUTRAL)
        return face, voice

    def _joint(self, face: str, voice: str, voiced: float) -> str:
        """The leading label; where both lead and differ, the voice's with probability `voiced`: 1/2 without reallocation,
        so that a model learns no preference, else what reallocation gives to the voice, so that it heeds attention."""
        if face == NEUTRAL or voice == NEUTRAL:
            return voice if face == NEUTRAL else face
        return voice if self.rng.random() < voiced else face

    def _face(self, emotion: str) -> Array:
        values = self.features.faces.values[self.rng.choice(self.faces[emotion])]  # [variants, F]
        frames = self.rng.integers(1, self.frames + 1)
        picked: Array = values[self.rng.integers(0, len(values), frames)]
        return picked

    def _voice(self, emotion: str) -> Array:
        values = self.features.voices.values[self.rng.choice(self.voices[emotion])]  # [variants, tokens, F]
        picked: npt.NDArray[np.float32] = values[self.rng.integers(0, len(values))]
        return picked
