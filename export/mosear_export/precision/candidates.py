"""Decoders that parity is asked of: engines, TensorRT's graphs with their narrow types emulated, graphs of the Optimizer."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from safetensors.numpy import load_file

from mosear.artifacts import CONFIG, HEADS
from mosear.backends.session import Backend, Runner
from mosear.config import ModelConfig
from mosear.contract import DECODER, Tensors, parts
from mosear.engine import EngineFolder, load_heads
from mosear.recipe import Recipe
from mosear_export import tensorrt_graph
from mosear_export.precision.run import GraphBackend, session


@contextmanager
def of_engine(folder: Path, *, threads: int) -> Iterator[Backend]:
    """An engine for ONNX Runtime."""
    backend = EngineFolder(folder).backend(threads=threads)
    try:
        yield backend
    finally:
        backend.close()


@contextmanager
def emulated(recipe: Recipe, onnx_folder: Path, others: Runner, *, threads: int) -> Iterator[Backend]:
    """The graph that TensorRT is given under a recipe, its 16 bits and narrower weights as numbers in fp32."""
    config = ModelConfig.load(onnx_folder / CONFIG)
    model = onnx.load(onnx_folder / f"{DECODER}.onnx")
    part, heads = parts(config)[DECODER], load_heads(onnx_folder / HEADS)
    model, heads = tensorrt_graph.prepare_decoder(model, config, recipe, heads, part, emulate=True)
    heads = {n: tensorrt_graph.stored_head(v, n, recipe).astype(np.float32) for n, v in heads.items()}
    with _graph(model, heads, config, others, threads=threads) as backend:
        yield backend


@contextmanager
def of_optimiser(folder: Path, config: ModelConfig, others: Runner, *, threads: int) -> Iterator[Backend]:
    """A graph that the Model Optimizer made (`optimise.py`)."""
    yield GraphBackend(
        session(str(folder / f"{DECODER}.onnx"), threads=threads, integers=False),
        load_file(folder / HEADS),
        config,
        others,
    )


@contextmanager
def _graph(
    model: onnx.ModelProto, heads: Tensors, config: ModelConfig, others: Runner, *, threads: int
) -> Iterator[Backend]:
    with tempfile.TemporaryDirectory() as aside:
        path = Path(aside, f"{DECODER}.onnx")
        onnx.save_model(model, path, save_as_external_data=True, location="data", size_threshold=1024)
        del model
        yield GraphBackend(session(str(path), threads=threads), heads, config, others)
