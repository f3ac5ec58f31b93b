"""An engine folder on disk, and how it is loaded: checked against its manifest first, sessions second."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from mosear.artifacts import CONFIG, ENGINE, HEADS, TOKENIZER, Manifest
from mosear.backends.onnxruntime_cpu import OnnxRuntimeBackend
from mosear.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend, check_provider
from mosear.backends.session import Backend
from mosear.backends.tensorrt_backend import TensorRTBackend
from mosear.backends.tensorrt_builder import MODULES
from mosear.backends.tensorrt_load import check_engine, first_device, installed_version
from mosear.config import ModelConfig, parse
from mosear.contract import Tensors
from mosear.errors import EngineError
from mosear.recipe import Recipe, Target
from mosear.runtime.features import feature_schema
from mosear.runtime.media import MediaLimits, MediaReader
from mosear.runtime.pipeline import Pipeline
from mosear.runtime.prompt import PromptBuilder
from mosear.runtime.schedule import PREFILL_ROWS, Scheduler

KIND = ENGINE
ROWS_OF_A_REPORT = 3  # a conflict report: all, without the voice, without the face
REMEDY = "build it with `python export/build_engine.py`"


class EngineFolder:
    """An engine folder whose manifest was read: what it is, and what can be made from it."""

    def __init__(self, folder: Path) -> None:
        """Raises EngineError where the folder is no engine, or made by another version."""
        self.folder = folder
        self.manifest = Manifest.load(folder, kind=KIND, remedy=REMEDY)
        self.config = ModelConfig.load(folder / CONFIG)
        self.recipe = parse(Recipe, self.manifest.inputs["recipe"], where=f"{folder}: recipe")

    @property
    def schema(self) -> str:
        """Names the encoders, for ready features."""
        files = self.manifest.inputs["onnx"]
        assert isinstance(files, dict), "an engine's manifest names the ONNX files it was built from"
        return feature_schema(files)

    def backend(self, names: Collection[str] = (), *, threads: int = 0) -> Backend:
        """Sessions for these parts (none named: for all) with so many threads (0: the recipe's).

        Raises EngineError where a file is missing or altered, or an engine is for another machine.
        """
        if self.recipe.target in MODULES:
            return self._plans(MODULES[self.recipe.target], names)
        on_gpu = self.recipe.target is Target.ONNXRUNTIME_CUDA
        if on_gpu:
            check_provider(self.recipe.provider)
        self.manifest.verify(self.folder, remedy=REMEDY)
        heads, threads = load_heads(self.folder / HEADS), threads or self.recipe.used_threads
        if on_gpu:
            provider = self.recipe.provider
            return OnnxRuntimeCudaBackend(self.folder, self.config, heads=heads, provider=provider, names=names)
        return OnnxRuntimeBackend(self.folder, self.config, heads=heads, threads=threads, names=names)

    def _plans(self, module: str, names: Collection[str]) -> Backend:
        """Before a plan is read: is it right for this machine, and is it the one that was built?"""
        device = first_device()
        check_engine(self.folder, self.manifest, module=module, version=installed_version(module), device=device)
        heads = load_heads(self.folder / HEADS)
        return TensorRTBackend(self.folder, self.config, module=module, heads=heads, names=names)

    def media_reader(self) -> MediaReader:
        """The media process, within the limits of recipe and model."""
        seconds = min(self.recipe.limits.clip_seconds, self.config.voice.max_seconds)
        limits = MediaLimits(max_seconds=seconds, max_bytes=self.recipe.limits.clip_bytes)
        return MediaReader(limits, frames=self.config.face.frames, sample_rate=self.config.voice.sample_rate)

    def prompt_builder(self) -> PromptBuilder:
        return PromptBuilder(self.config, Tokenizer.from_file(str(self.folder / TOKENIZER)))

    def scheduler(self, backend: Backend, *, slots: int, queue: int = 1, prefill_rows: int = PREFILL_ROWS) -> Scheduler:
        """A decoder with room for `slots` rows."""
        builder, limits = self.prompt_builder(), self.recipe.limits
        return Scheduler(
            backend, self.config, labels=builder.labels, stop=builder.stop, slots=slots, queue=queue,
            capacity=limits.prompt_tokens + limits.new_tokens, prefill_rows=prefill_rows,
        )  # fmt: skip


class Engine:
    """A loaded engine: `pipeline` answers requests. A context manager; closing it ends the media process too."""

    def __init__(self, path: Path) -> None:
        """Raises EngineError where the folder is missing, altered, or made by another version."""
        self.files = EngineFolder(path)
        self.folder, self.config, self.recipe = path, self.files.config, self.files.recipe
        self.backend = self.files.backend()
        self.reader = self.files.media_reader()
        self.pipeline = self.on(self.backend)

    def on(self, backend: Backend) -> Pipeline:
        """The engine's pipeline, its parts run by another backend."""
        return Pipeline(
            backend, self.files.scheduler(backend, slots=ROWS_OF_A_REPORT), self.config, self.files.prompt_builder(),
            self.reader, limits=self.recipe.limits, schema=self.files.schema,
        )  # fmt: skip

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.reader.close()
        self.backend.close()


def load_heads(path: Path) -> Tensors:
    """Experts, gates and policy parameters as f32, none where they are baked into the graph."""
    if not path.exists():
        return {}
    try:
        return {name: value.astype(np.float32) for name, value in load_file(path).items()}
    except Exception as error:  # safetensors raises a class of its own, derived from Exception
        raise EngineError(f"{path} cannot be read: {error}: {REMEDY}") from error
