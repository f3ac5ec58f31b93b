"""Parity of an engine with the PyTorch reference over real prompts: errors per output, greedy tokens, first divergence.

Every step feeds both the reference's own greedy token, so that errors do not add up after a divergence; greedy decoding
of the engine is the same text if and only if each of its choices is.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mosear.backends.session import Backend
from mosear.config import ModelConfig
from mosear.contract import Tensors
from mosear.engine import Engine
from mosear.errors import EngineError
from mosear.recipe import Precision
from mosear.runtime.encode import Stages, encode, project
from mosear.runtime.generate import Generation, Rows
from mosear.runtime.media import Clip
from mosear.runtime.pipeline import Pipeline
from mosear.runtime.prompt import Prompt, Task
from mosear_export.demo.clip import read_wav
from mosear_export.demo.fetch import DemoFiles
from mosear_export.golden import relative_errors
from mosear_export.model.whole import ReferenceModel
from mosear_export.reference_backend import ReferenceBackend

STEPS, STRENGTH, RMS_BAR = 64, 0.5, 1e-4
OUTPUTS = ("logits", "mass_before", "mass_after", "expert_weights")
Report = Callable[[str], None]


@dataclass(slots=True)
class Divergence:
    """Where an engine first chooses another token, and by how much the reference preferred its own."""

    prompt: int
    step: int
    margin: float


def real_prompts(pipeline: Pipeline, files: DemoFiles) -> Iterator[tuple[Clip, str]]:
    """20 clips with words: five read sentences, each beside the talking face, with its words, alone, and the face alone."""
    video = files.talking_face.read_bytes()
    for speech in files.speech:
        samples, _ = read_wav(speech)
        sound = samples.astype(np.float32) / np.iinfo(np.int16).max
        face = pipeline.reader.read(video, None)
        nothing = np.zeros(0, np.float32)
        yield _clip(face.frames, sound), ""
        yield _clip(face.frames, sound), speech.text
        yield _clip(face.frames[:0], sound), speech.text
        yield _clip(face.frames[:: 1 + len(speech.text) % 3], nothing), speech.text[: len(speech.text) // 2]


def _clip(frames: np.ndarray, waveform: np.ndarray) -> Clip:  # type: ignore[type-arg]
    return Clip(frames=frames, frame_times_s=np.zeros(len(frames), np.float32), waveform=waveform, notes=())


def measure(
    engine_folder: Path, checkpoint: Path, files: DemoFiles, report: Report, *, count: int = 20
) -> dict[str, object]:
    """Compare an engine with the reference on `count` prompts; raises EngineError where an fp32 engine misses its bars."""
    reference = ReferenceBackend(ReferenceModel.load(checkpoint))
    errors: dict[str, list[tuple[float, float]]] = {name: [] for name in (*OUTPUTS, "tokens_in")}
    divergences: list[Divergence] = []
    with Engine(engine_folder) as engine:
        prompts = itertools.islice(real_prompts(engine.pipeline, files), count)
        for index, (clip, words) in enumerate(prompts):
            found = _compare(engine, reference, clip, words, errors)
            if found:
                divergences.append(Divergence(index, *found))
            report(
                f"parity: prompt {index + 1} of {count}: {f'diverges at step {found[0]}' if found else 'tokens equal'}"
            )
        recipe = engine.recipe
    result: dict[str, object] = {
        "engine": recipe.name,
        "prompts": count,
        "steps": STEPS,
        "ar_strength": STRENGTH,
        "errors": {
            name: {
                "max": max(e[0] for e in pairs),
                "rms": max(e[1] for e in pairs),
                "rms_median": float(np.median([e[1] for e in pairs])),
            }
            for name, pairs in errors.items()
        },
        "equal_prompts": count - len(divergences),
        "divergences": [{"prompt": d.prompt, "step": d.step, "margin": d.margin} for d in divergences],
    }
    worst = max(pair[1] for pairs in errors.values() for pair in pairs)
    if recipe.precision is Precision.FP32 and (worst > RMS_BAR or divergences):
        raise EngineError(f"the fp32 engine misses parity (RMS {worst:.1e}, bar {RMS_BAR:.0e}): {json.dumps(result)}")
    return result


def _compare(
    engine: Engine, reference: ReferenceBackend, clip: Clip, words: str, errors: dict[str, list[tuple[float, float]]]
) -> tuple[int, float] | None:
    backends: tuple[Backend, Backend] = (engine.backend, reference)
    config, builder = engine.config, engine.pipeline.builder
    tokens = [project(backend, encode(backend, config, clip, Stages())[0]) for backend in backends]
    for field in tokens[1]:
        errors["tokens_in"].append(relative_errors(tokens[0][field], tokens[1][field]))
    counts = {field: len(values) for field, values in tokens[1].items()}
    prompt = builder.build(Task.REASON, counts=counts, words=words)
    ours, theirs = (_generation(backend, config, prompt) for backend in backends)
    outputs = [generation.prefill(brought) for generation, brought in zip((ours, theirs), tokens, strict=True)]
    divergence = None
    for step in range(STEPS):
        _collect(outputs, errors)
        mine, wanted = (np.asarray(out["logits"][0, -1], np.float32) for out in outputs)
        token = int(wanted.argmax())
        if divergence is None and int(mine.argmax()) != token:
            second, first = np.sort(wanted)[-2:]
            divergence = step, float(first - second)
        outputs = [generation.extend([token], len(prompt) + step) for generation in (ours, theirs)]
    return divergence


def _generation(backend: Backend, config: ModelConfig, prompt: Prompt) -> Generation:
    return Generation(backend, config, prompt, Rows(muted=((),), strength=STRENGTH), room=STEPS)


def _collect(outputs: list[Tensors], errors: dict[str, list[tuple[float, float]]]) -> None:
    for name in OUTPUTS:
        errors[name].append(relative_errors(np.asarray(outputs[0][name]), np.asarray(outputs[1][name])))
