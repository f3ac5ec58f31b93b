"""An engine folder on disk, and how it is loaded: checked against its manifest first, sessions second."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from mosear.artifacts import Manifest
from mosear.backends.onnxruntime_cpu import OnnxRuntimeBackend
from mosear.config import ModelConfig, parse
from mosear.contract import Tensors
from mosear.errors import EngineError
from mosear.recipe import Recipe
from mosear.runtime.media import MediaLimits, MediaReader
from mosear.runtime.pipeline import Pipeline
from mosear.runtime.prompt import PromptBuilder

KIND = "engine"
CONFIG, TOKENIZER, HEADS = "config.json", "tokenizer.json", "heads.safetensors"
REMEDY = "build it with `python export/build_engine.py`"


class Engine:
    """A loaded engine: `pipeline` answers requests. A context manager; closing it ends the media process too."""

    def __init__(self, folder: Path) -> None:
        """Raises EngineError where the folder is missing, altered, or made by another version."""
        self.folder = folder
        self.manifest = Manifest.load(folder, kind=KIND, remedy=REMEDY)
        self.manifest.verify(folder, remedy=REMEDY)
        self.config = ModelConfig.load(folder / CONFIG)
        self.recipe = parse(Recipe, self.manifest.inputs["recipe"], where=f"{folder}: recipe")
        self.backend = OnnxRuntimeBackend(
            folder, self.config, heads=load_heads(folder / HEADS), threads=self.recipe.used_threads
        )
        self.reader = media_reader(self.config, self.recipe)
        builder = PromptBuilder(self.config, Tokenizer.from_file(str(folder / TOKENIZER)))
        self.pipeline = Pipeline(self.backend, self.config, builder, self.reader, self.recipe.limits)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.reader.close()
        self.backend.close()


def media_reader(config: ModelConfig, recipe: Recipe) -> MediaReader:
    """The media process of an engine, within the limits of recipe and model."""
    seconds = min(recipe.limits.clip_seconds, config.voice.max_seconds)
    limits = MediaLimits(max_seconds=seconds, max_bytes=recipe.limits.clip_bytes)
    return MediaReader(limits, frames=config.face.frames, sample_rate=config.voice.sample_rate)


def load_heads(path: Path) -> Tensors:
    """Experts, gates and policy parameters as f32, none where they are baked into the graph."""
    if not path.exists():
        return {}
    try:
        return {name: value.astype(np.float32) for name, value in load_file(path).items()}
    except Exception as error:  # safetensors raises a class of its own, derived from Exception
        raise EngineError(f"{path} cannot be read: {error}: {REMEDY}") from error
