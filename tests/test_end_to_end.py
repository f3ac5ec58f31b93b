"""A checkpoint's whole way on a toy: export, build, load, answer real clips; and what a user can do wrong."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import media_factory
import numpy as np
import pytest
import toy
from toy_engine import BAD, RECIPE, Folders

from mosear.artifacts import MANIFEST
from mosear.backends.onnxruntime_cpu import check
from mosear.cli import main
from mosear.contract import parts
from mosear.engine import Engine
from mosear.errors import ConfigError, EngineError, MediaError, RequestError
from mosear.recipe import Heads, Precision, Recipe
from mosear.runtime.pipeline import StageDone, Words
from mosear.runtime.request import Answer, Request
from mosear.runtime.sampling import Sampling
from mosear_export.build import build_engine
from mosear_export.export import export_checkpoint
from mosear_export.model.whole import ReferenceModel
from mosear_export.reference_backend import ReferenceBackend


@pytest.fixture(scope="module")
def engine(folders: Folders) -> Iterator[Engine]:
    with Engine(folders.engine) as loaded:
        yield loaded


def test_every_task_answers_with_masses_scores_and_timings(engine: Engine, clip: bytes) -> None:
    for task in ("classify", "reason", "conflict"):
        events = list(engine.pipeline.stream(Request(task=task, video=clip, words="so it is", max_tokens=5)))
        answer = events[-1]
        assert isinstance(answer, Answer)
        assert "".join(event.text for event in events if isinstance(event, Words)) == answer.text
        stages = [event.name for event in events if isinstance(event, StageDone)]
        assert stages == ["media", "face_detector", "face", "scene", "voice", "prefill"]
        np.testing.assert_allclose(answer.modality_mass.sum(-1), 1.0, atol=1e-5)
        assert (answer.modality_mass[:, 0] != answer.modality_mass[:, 1]).any()
        assert json.loads(json.dumps(answer.record()))["task"] == task
        if task != "reason":
            assert answer.joint and answer.joint.label == max(answer.joint.scores, key=answer.joint.scores.__getitem__)
            assert sum(answer.joint.probabilities.values()) == pytest.approx(1.0)
        assert (answer.conflict is None) == (task != "conflict")


@pytest.mark.parametrize("task", ["classify", "reason", "conflict"])
def test_the_engine_answers_as_the_reference_does(engine: Engine, folders: Folders, clip: bytes, task: str) -> None:
    reference = ReferenceBackend(ReferenceModel.load(folders.checkpoint))
    pipeline, other = engine.pipeline, engine.on(reference)
    request = Request(task=task, video=clip, words="well", strength=0.9, max_tokens=12)
    found, wanted = pipeline.answer(request), other.answer(request)
    assert found.text == wanted.text and found.tokens == wanted.tokens
    np.testing.assert_allclose(found.modality_mass, wanted.modality_mass, atol=1e-5)
    for one, two in ((found.joint, wanted.joint), (found.face, wanted.face), (found.voice, wanted.voice)):
        if two is not None:
            assert one is not None
            np.testing.assert_allclose(list(one.scores.values()), list(two.scores.values()), rtol=1e-4)


def test_one_modality_is_enough(engine: Engine, clip: bytes) -> None:
    silent = media_factory.make_clip("mp4", seconds=1.0, sound=False)
    sound = media_factory.make_clip("wav", seconds=1.0, video=False)
    for request in (Request(video=silent), Request(audio=sound), Request(words="just words")):
        assert engine.pipeline.answer(request).joint
    report = engine.pipeline.answer(Request(video=silent, task="conflict"))
    assert report.conflict is None and any("needs a face and a voice" in note for note in report.notes)
    heard = engine.pipeline.answer(Request(audio=sound))
    assert heard.modality_mass[:, :, 1].max() == 0 and heard.modality_mass[:, :, 2].min() > 0


def test_muting_is_deaf_to_what_is_muted(engine: Engine) -> None:
    """The face-alone row of a conflict report does not depend on the sound, to the bit."""
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3)).astype(np.uint8)
    waves = [np.random.default_rng(seed).standard_normal(8000).astype(np.float32) * 0.1 for seed in (1, 2)]
    one, two = (engine.pipeline.answer(Request(task="conflict", frames=frames, waveform=wave)) for wave in waves)
    assert one.face and two.face and one.voice and two.voice and one.joint and two.joint
    assert one.face.scores == two.face.scores
    assert one.voice.scores != two.voice.scores and one.joint.scores != two.joint.scores


def test_equal_seeds_give_equal_words(engine: Engine) -> None:
    def words(seed: int) -> str:
        sampling = Sampling(temperature=1.5, top_p=0.9, seed=seed)
        return engine.pipeline.answer(Request(task="reason", words="hm", max_tokens=12, sampling=sampling)).text

    assert words(1) == words(1) and len({words(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_says_what_is_wrong_and_harms_no_other(engine: Engine, case: str) -> None:
    request, said = BAD[case]
    with pytest.raises(RequestError) as caught:
        engine.pipeline.answer(request)
    assert said in str(caught.value)
    assert engine.pipeline.answer(Request(words="still there")).joint


@pytest.mark.parametrize(
    "sampling", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"seed": -1}]
)
def test_bad_sampling_is_refused(sampling: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=next(iter(sampling))):
        Sampling(**sampling)  # type: ignore[arg-type]


def test_a_clip_longer_than_the_recipe_allows_is_refused(engine: Engine) -> None:
    with pytest.raises(MediaError, match=r"longer than 2 s: .*clip_seconds"):
        engine.pipeline.answer(Request(video=media_factory.make_clip("mp4", seconds=3.0)))


def test_tensors_of_another_type_or_shape_are_named(engine: Engine) -> None:
    spec = parts(engine.config)["voice"]
    mel, frames = np.zeros((1, 8, 40), np.float32), np.array([20], np.int32)
    for bad, said in (
        ({"mel": mel}, "voice_frames is missing"),
        ({"mel": mel.astype(np.float64), "voice_frames": frames}, "input mel is float64"),
        ({"mel": mel[:, :5], "voice_frames": frames}, r"\[1, 5, 40\]"),
        ({"mel": mel, "voice_frames": np.array([20, 20], np.int32)}, "voice_frames is int32"),
    ):
        with pytest.raises(RequestError, match=said):
            check(spec, bad)


def test_an_altered_or_foreign_engine_is_refused_before_it_is_loaded(folders: Folders, tmp_path: Path) -> None:
    copy = tmp_path / "engine"
    subprocess.run(["cp", "-r", str(folders.engine), str(copy)], check=True)
    with (copy / "voice.onnx").open("r+b") as file:
        file.seek(40)
        file.write(b"x")
    with pytest.raises(EngineError, match=r"voice\.onnx was altered.*build_engine"):
        Engine(copy)
    record = json.loads((folders.engine / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(EngineError, match="format 99"):
        Engine(copy)
    with pytest.raises(EngineError, match="holds onnx"):
        Engine(folders.onnx)
    with pytest.raises(EngineError, match="no engine folder"):
        Engine(tmp_path)


def test_an_altered_onnx_folder_is_not_built(folders: Folders, tmp_path: Path) -> None:
    copy = tmp_path / "onnx"
    subprocess.run(["cp", "-r", str(folders.onnx), str(copy)], check=True)
    (copy / "face.onnx").write_bytes(b"")
    with pytest.raises(EngineError, match=r"face\.onnx was altered.*export"):
        build_engine(RECIPE, copy, tmp_path / "engines", lambda line: None)
    assert not list((tmp_path / "engines").glob("toy*"))


def test_a_second_build_does_nothing_and_another_recipe_builds_anew(folders: Folders, tmp_path: Path) -> None:
    lines: list[str] = []
    toy = folders.copied(tmp_path / "toy")
    onnx, engines = toy.root / "onnx", toy.root / "engines"
    assert export_checkpoint(toy.checkpoint, onnx, lines.append) == toy.onnx
    assert build_engine(RECIPE, toy.onnx, engines, lines.append) == toy.engine
    assert len(lines) == 2 and all("is fresh" in line for line in lines)
    other = dataclasses.replace(RECIPE, threads=2)
    assert build_engine(other, toy.onnx, engines, lines.append) != toy.engine


def test_baked_heads_and_int8_answer_too(folders: Folders, engine: Engine, clip: bytes, tmp_path: Path) -> None:
    request = Request(task="reason", video=clip, max_tokens=8)
    wanted = engine.pipeline.answer(request)
    baked = dataclasses.replace(RECIPE, heads=Heads.BAKED)
    with Engine(build_engine(baked, folders.onnx, tmp_path, lambda line: None)) as other:
        assert not other.backend.heads
        assert other.pipeline.answer(request).text == wanted.text
    int8 = dataclasses.replace(RECIPE, precision=Precision.INT8, block=16)
    with Engine(build_engine(int8, folders.onnx, tmp_path, lambda line: None)) as other:
        answer = other.pipeline.answer(Request(video=clip))
        assert answer.joint
        np.testing.assert_allclose(answer.modality_mass, wanted.modality_mass, atol=0.2)


def test_a_misspelt_recipe_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('name = "x"\nprecison = "int8"\n')
    with pytest.raises(ConfigError, match="'precison': did you mean 'precision'"):
        Recipe.load(path)
    path.write_text('name = "x"\n[limits]\nclip_second = 3\n')
    with pytest.raises(ConfigError, match="did you mean 'clip_seconds'"):
        Recipe.load(path)
    path.write_text('name = "x"\nprecision = "int3"\n')
    with pytest.raises(ConfigError, match="choose one of fp32"):
        Recipe.load(path)


def test_answering_needs_neither_torch_nor_onnx(folders: Folders, clip: bytes, tmp_path: Path) -> None:
    """The command line answers a clip in a process in which torch, onnx and the export package cannot be imported."""
    video = tmp_path / "clip.mp4"
    video.write_bytes(clip)
    banned = ("torch", "onnx", "onnxscript", "transformers", "triton", "mosear_export", "mosear.kernels")
    script = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({banned!r}))\n"
        "from mosear.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = ["ask", str(video), "--local", "--engine", str(folders.engine), "--task", "conflict", "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script, *command], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["joint"]["label"] in toy.toy_config().labels


def test_the_command_line_prints_answers_and_errors(
    folders: Folders, clip: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = tmp_path / "clip.mp4"
    video.write_bytes(clip)
    ask = ["ask", str(video), "--local", "--engine", str(folders.engine)]
    assert main([*ask, "--task", "conflict"]) == 0
    shown = capsys.readouterr().out
    for part in ("face_detector", "face alone", "voice alone", "attention mass", "expert weights", "tokens read"):
        assert part in shown
    assert main([*ask, "--ar-strength", "nan"]) == 1
    assert capsys.readouterr().err.startswith("mosear: ar_strength is nan")
    assert main(["ask", str(tmp_path / "none.mp4"), "--local"]) == 1
    assert "cannot be read" in capsys.readouterr().err
    assert main(["inspect", str(folders.engine)]) == 0
    assert "decoder.onnx.data" in capsys.readouterr().out
    assert main(["doctor", "--engine", str(folders.engine)]) == 0
    assert "whole" in capsys.readouterr().out
