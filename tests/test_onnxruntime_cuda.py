"""ONNX Runtime on a GPU, up to the GPU: what is missing is said, the CPU never answers instead; calls and cache on a stand-in."""

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import stand_in_tensorrt as stand_in
from test_tensorrt_backend import call
from toy_engine import RECIPE, Folders

from mosear.backends import onnxruntime_cuda
from mosear.backends.cuda_driver import Driver
from mosear.backends.onnxruntime_cuda import CUDA, PROVIDERS, TENSORRT, OnnxRuntimeCudaBackend, check_provider
from mosear.config import ModelConfig
from mosear.contract import ENCODERS, Tensors
from mosear.engine import Engine, EngineFolder, load_heads
from mosear.errors import ConfigError, EngineError
from mosear.recipe import Provider, Recipe, Target
from mosear_export.build import build_engine

COMPILER = shutil.which("cc") or shutil.which("gcc")
ON_GPU = dataclasses.replace(RECIPE, name="toy-cuda", target=Target.ONNXRUNTIME_CUDA)


@pytest.fixture(scope="module")
def engine(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built here, golden outputs checked on the CPU; to be loaded on a GPU alone."""
    return build_engine(ON_GPU, folders.onnx, tmp_path_factory.mktemp("engines"), print)


@pytest.mark.parametrize("provider", list(Provider))
def test_a_missing_provider_is_named_with_what_to_install(provider: Provider, engine: Path) -> None:
    wanted = CUDA if provider is Provider.CUDA else TENSORRT
    with pytest.raises(
        EngineError, match=rf"has no {wanted} \(it has .*CPUExecutionProvider\): pip uninstall onnxruntime"
    ):
        check_provider(provider)
    with pytest.raises(EngineError, match=f"has no {CUDA}"):
        EngineFolder(engine).backend()


@pytest.mark.parametrize("provider", list(Provider))
def test_a_fallback_to_the_cpu_is_refused(provider: Provider, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime is asked for a provider that does not start: it makes a session of the CPU, and this is no engine's."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: [TENSORRT, CUDA])
    wanted = PROVIDERS[provider][0][0]
    with pytest.raises(
        EngineError, match=rf"{wanted} did not start, ONNX Runtime would answer with CPUExecutionProvider"
    ):
        onnxruntime_cuda.open_session(engine / "voice.onnx", provider)


def test_a_graph_that_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA])
    (tmp_path / "a.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"ONNX Runtime cannot load .*a\.onnx on the GPU"):
        onnxruntime_cuda.open_session(tmp_path / "a.onnx", Provider.CUDA)


def test_nodes_that_are_left_to_the_cpu_are_told(
    engine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All of them here, in a session that calls itself the GPU's: their operators and how many."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA])
    monkeypatch.setattr(ort.InferenceSession, "get_providers", lambda session: [CUDA])
    with caplog.at_level(logging.WARNING):
        onnxruntime_cuda.open_session(engine / "voice_projector.onnx", Provider.CUDA)
    assert "voice_projector.onnx: nodes that no provider on the GPU took: " in caplog.text
    assert "MatMul" in caplog.text or "Gemm" in caplog.text


def test_the_engine_holds_graphs_as_they_were_exported(engine: Path, folders: Folders) -> None:
    """They are optimised where they are loaded: an optimised one holds what is right for a CPU."""
    for name in ENCODERS:
        assert (engine / f"{name}.onnx").read_bytes() == (folders.onnx / f"{name}.onnx").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target": Target.ONNXRUNTIME_CPU, "provider": Provider.TENSORRT},
            "provider is for the target onnxruntime-cuda",
        ),
        ({"precision": "int8"}, "precision is int8; target onnxruntime-cuda takes fp32"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(name="x", **{"target": Target.ONNXRUNTIME_CUDA, **changes})


class Session:
    """A session of the CPU that takes addresses of the stand-in's GPU, which are this process's."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.real = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(self, names: list[str], feeds: Tensors) -> Any:
        return self.real.run(names, feeds)

    def io_binding(self) -> Any:
        real = self.real.io_binding()

        def placed(bind: Any) -> Any:
            def call(name: str, device: str, *rest: Any) -> None:
                assert device == "cuda" or not rest
                bind(name, "cpu", *rest)

            return call

        return SimpleNamespace(
            real=real, bind_input=placed(real.bind_input), bind_output=placed(real.bind_output),
            bind_cpu_input=real.bind_cpu_input, bind_ortvalue_input=real.bind_ortvalue_input, get_outputs=real.get_outputs,
        )  # fmt: skip

    def run_with_iobinding(self, binding: Any) -> None:
        self.real.run_with_iobinding(binding.real)


@pytest.fixture
def backend(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[OnnxRuntimeCudaBackend]:  # fmt: skip
    if COMPILER is None:
        pytest.skip("needs a C compiler, for a stand-in of CUDA's driver")
    library = stand_in.driver_library(tmp_path, COMPILER)
    monkeypatch.setattr(onnxruntime_cuda, "open_session", lambda path, provider: Session(path))
    monkeypatch.setattr(onnxruntime_cuda, "Driver", lambda: Driver(str(library)))
    monkeypatch.setattr(onnxruntime_cuda, "on_gpu", lambda value: ort.OrtValue.ortvalue_from_numpy(value, "cpu", 0))
    config = ModelConfig.load(engine / "config.json")
    made = OnnxRuntimeCudaBackend(
        engine, config, heads=load_heads(engine / "heads.safetensors"), provider=Provider.CUDA
    )
    yield made
    made.close()


def test_calls_and_cache_are_the_cpus(backend: OnnxRuntimeCudaBackend, folders: Folders) -> None:
    """A prompt, rows moved, cleared and kept behind a larger capacity, and a token on what is left."""
    with Engine(folders.engine) as engine:
        states = [each.start(batch=3, capacity=64) for each in (backend, engine.backend)]
        whole = call(backend.config, batch=3, rows=7, capacity=64, lengths=[7, 7, 7])
        step = call(backend.config, batch=3, rows=1, capacity=64, start=[7, 7, 7])
        wide = {**step, "key_group": np.pad(step["key_group"], ((0, 0), (0, 64)))}
        order = {name: value[[2, 1]] for name, value in wide.items()}
        found: list[list[Tensors]] = []
        for state in states:
            outputs = [
                state.step({n: v[:1] for n, v in whole.items()}),
                state.step({n: v[1:] for n, v in whole.items()}, first=1),
            ]
            outputs = [{name: np.array(value) for name, value in each.items()} for each in outputs]
            state.move(2, 0, 7)
            state.clear(2)
            state.resize(128, rows=2, length=7)
            found.append([*outputs, copied(state.step(order))])
        for ours, theirs in zip(*found, strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                np.testing.assert_allclose(ours[name], value, rtol=2e-4, atol=2e-4, err_msg=name)


def copied(buffers: Tensors) -> Tensors:
    return {name: np.array(value) for name, value in buffers.items()}


def test_an_answer_is_the_cpus(backend: OnnxRuntimeCudaBackend, folders: Folders, clip: bytes) -> None:
    from mosear.runtime.request import Request

    with Engine(folders.engine) as engine:
        request = Request(task="conflict", video=clip, words="well", strength=0.6)
        ours, theirs = engine.on(backend).answer(request), engine.pipeline.answer(request)
    assert ours.joint and theirs.joint
    for name, score in theirs.joint.scores.items():
        assert ours.joint.scores[name] == pytest.approx(score, abs=2e-3)
