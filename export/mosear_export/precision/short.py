"""The short form of parity, for every build: a few prompts that the reference answered when it was exported.

Prompts are sentences of the training's examples, some beside what the encoders say of the golden inputs (noise), so no
data set is needed. A release asks real clips besides: `benchmarks/precision.py`.
"""

import itertools
from pathlib import Path

import numpy as np
import onnxruntime as ort
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from mosear.artifacts import CONFIG, TOKENIZER
from mosear.backends.session import Backend
from mosear.config import ModelConfig
from mosear.contract import Tensors, parts
from mosear.runtime.prompt import PromptBuilder
from mosear.runtime.sampling import FloatArray
from mosear_export.golden import relative_errors
from mosear_export.labelled import FRAMES
from mosear_export.precision.clips import Case, Kind
from mosear_export.precision.run import Asker, Said
from mosear_export.training.examples import TELLING_WORDS

GOLDEN, FILE = "golden", "prompts.safetensors"
STRENGTH = 1.0


class ExportedParts:
    """Runs the parts of an ONNX folder, fp32, as they were exported."""

    def __init__(self, onnx_folder: Path) -> None:
        self.folder, self.sessions = onnx_folder, dict[str, ort.InferenceSession]()
        self.parts = parts(ModelConfig.load(onnx_folder / CONFIG))

    def run(self, part: str, tensors: Tensors) -> Tensors:
        if part not in self.sessions:
            options = ort.SessionOptions()
            options.log_severity_level = 3
            path = str(self.folder / f"{part}.onnx")
            self.sessions[part] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [spec.name for spec in self.parts[part].outputs]
        return dict(zip(names, self.sessions[part].run(names, dict(tensors)), strict=True))


def write(reference: Backend, onnx_folder: Path) -> None:
    """Store what the reference says of every prompt; the folder's other golden files are there."""
    said = _ask(reference, onnx_folder)
    stacked = {name: np.stack([getattr(one, name) for one in said]) for name in Said.__slots__}
    save_file(stacked, onnx_folder / GOLDEN / FILE)


def measure(backend: Backend, onnx_folder: Path) -> dict[str, float]:
    """Share of labels that agree with the reference's, RMS errors of logits relative to the reference's RMS, largest error of a
    mass."""
    wanted, found = load_file(onnx_folder / GOLDEN / FILE), _ask(backend, onnx_folder)
    rms = [relative_errors(one.logits, logits)[1] for one, logits in zip(found, wanted["logits"], strict=True)]
    agree = [one.scores.argmax() == scores.argmax() for one, scores in zip(found, wanted["scores"], strict=True)]
    masses = [np.abs(one.masses - masses).max() for one, masses in zip(found, wanted["masses"], strict=True)]
    return {
        "prompts": len(found), "labels that agree": float(np.mean(agree)), "rms of logits, median": float(np.median(rms)),
        "rms of logits, largest": max(rms), "largest error of a mass": float(max(masses)),
    }  # fmt: skip


def _ask(backend: Backend, onnx_folder: Path) -> list[Said]:
    config = ModelConfig.load(onnx_folder / CONFIG)
    asker = Asker(backend, config, PromptBuilder(config, Tokenizer.from_file(str(onnx_folder / TOKENIZER))))
    return [asker.classify(case, STRENGTH) for case in _cases(onnx_folder / GOLDEN)]


def _cases(golden: Path) -> list[Case]:
    """A sentence of each emotion; of each four one has the sentence alone, one a voice, one a face, one both."""
    voice: FloatArray = load_file(golden / "voice.safetensors")["out.voice_features"][0]
    face: FloatArray = np.repeat(load_file(golden / "face.safetensors")["out.face_features"][:1], FRAMES, axis=0)
    brought: dict[Kind, dict[str, FloatArray]] = {
        Kind.TEXT: {}, Kind.VOICE: {"voice": voice}, Kind.FACE: {"face": face}, Kind.BOTH: {"face": face, "voice": voice},
    }  # fmt: skip
    kinds = itertools.cycle(brought)
    return [
        Case(kind=kind, features={**brought[kind]}, words=words[0])
        for kind, words in zip(kinds, TELLING_WORDS.values(), strict=False)
    ]
