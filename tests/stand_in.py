"""The answer that a stand-in model gives, known to the model and to the test that asks it."""

import numpy as np

from mosear.runtime.prompt import Task
from mosear.runtime.request import Answer, Judgement

SCORES = {"happy": -0.1, "sad": -2.5, "very angry": -1e9}
ANSWER = Answer(
    task=Task.CONFLICT,
    text="She smiles: h\u00e9llo",
    joint=Judgement(label="happy", scores=SCORES),
    face=Judgement(label="sad", scores=SCORES),
    voice=Judgement(label="happy", scores=SCORES),
    conflict=True,
    modality_mass=np.random.default_rng(1).random((2, 2, 3)).astype(np.float32),
    expert_weights=np.random.default_rng(2).random((3, 2)).astype(np.float32),
    groups=("text", "video", "audio"),
    tokens=3,
    prompt_tokens=40,
    timings_ms={"media": 1.5, "total": 12.25},
    notes=("a note",),
)
