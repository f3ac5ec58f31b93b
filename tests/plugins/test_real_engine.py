"""Whole engines of the target tensorrt, built and answering on this machine's GPU. Not run yet on any machine."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from test_real_builder import missing
from toy import GROUPED, toy_config, toy_model
from toy_engine import LIMITS, byte_tokenizer

from mosear.artifacts import Manifest
from mosear.backends import tensorrt_builder
from mosear.engine import KIND, Engine
from mosear.recipe import Mechanisms, Precision, Recipe, Target, TensorRT
from mosear.runtime.request import Request
from mosear_export import build, build_tensorrt, checkpoint
from mosear_export.export import export_checkpoint
from mosear_export.preflight import preflight

pytestmark = [pytest.mark.tensorrt, pytest.mark.skipif(bool(missing()), reason=missing())]


@pytest.fixture(scope="module")
def onnx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, config = tmp_path_factory.mktemp("real"), toy_config()
    backbone = dataclasses.replace(GROUPED, vocab_size=300, max_positions=4096, head_size=64, heads=4, kv_heads=2)
    config = dataclasses.replace(config, backbone=backbone, voice=dataclasses.replace(config.voice, hidden_size=64))
    checkpoint.save(root / "checkpoint", config, toy_model(config).files(), byte_tokenizer().to_str())
    return export_checkpoint(root / "checkpoint", root / "onnx", print)


def recipe(mechanisms: Mechanisms) -> Recipe:
    major, minor = torch.cuda.get_device_capability()
    plans = TensorRT(
        compute_capabilities=(f"{major}.{minor}",), capacity=3456, prefill_batch=4, prefill_rows=64, decode_batch=4,
        mechanisms=mechanisms,
    )  # fmt: skip
    return Recipe(
        name=f"toy-{mechanisms}", target=Target.TENSORRT, precision=Precision.FP16, limits=LIMITS, tensorrt=plans
    )


@pytest.mark.parametrize("mechanisms", list(Mechanisms))
def test_an_engine_answers_as_the_cpu_does(
    mechanisms: Mechanisms, onnx_folder: Path, clip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built (which meets golden outputs in both profiles on this GPU), found again, loaded, asked in all three ways."""
    made, root = recipe(mechanisms), onnx_folder.parent / "engines"
    assert not [finding for finding in preflight(made, onnx_folder) if finding.stops]
    folder = build_tensorrt.build_engine(made, onnx_folder, root, print)
    notes = Manifest.load(folder, kind=KIND, remedy="").notes
    assert isinstance(notes["golden"], dict) and "decoder.decode.logits" in notes["golden"]
    assert isinstance(notes["plans"], dict)
    read_back = notes["plans"]["decoder.plan"]["read_back"]
    assert (read_back["compatibility"], read_back["profiles"]) == ("none", 2)
    assert list((root / "plans").glob("timings-sm*.cache"))
    monkeypatch.setattr(tensorrt_builder, "build_plan", lambda *_: pytest.fail("built a plan"))
    assert build_tensorrt.build_engine(made, onnx_folder, root, print) == folder
    reference = build.build_engine(Recipe(name="cpu", limits=LIMITS), onnx_folder, root, print)
    with Engine(folder) as ours, Engine(reference) as theirs:
        for task in ("classify", "conflict", "reason"):
            request = Request(task=task, video=clip, words="well then", strength=0.6, max_tokens=6)
            found, wanted = (engine.pipeline.answer(request) for engine in (ours, theirs))
            np.testing.assert_allclose(found.modality_mass, wanted.modality_mass, atol=0.05)
            if found.joint and wanted.joint:
                for name, score in wanted.joint.scores.items():
                    assert found.joint.scores[name] == pytest.approx(score, abs=0.3)
