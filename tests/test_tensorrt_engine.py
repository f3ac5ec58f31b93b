"""A toy's whole engine for TensorRT-RTX: what is fused, what is rebuilt when, and what a dry run says."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import json_format, text_format
from onnx import helper
from safetensors.numpy import load_file, save_file
from toy_engine import LIMITS, Folders
from tritonclient.grpc import model_config_pb2 as pb

from mosear.artifacts import Manifest, folder_hashes
from mosear.cli import main
from mosear.config import ModelConfig, Policy
from mosear.contract import DECODER, ENCODERS, parts
from mosear.doctor import describe
from mosear.engine import HEADS, KIND, Engine, EngineFolder
from mosear.errors import EngineError, ServingError
from mosear.recipe import Precision, Recipe, Target, TensorRT
from mosear.serving.check import check_plans
from mosear.serving.configs import Device, Settings, model_configs
from mosear.serving.onnx_backend import Ask
from mosear.serving.plan_backend import PlanModel
from mosear_export import build_tensorrt, export
from mosear_export import preflight as preflight_module
from mosear_export.build_tensorrt import build_engine
from mosear_export.explain import explain
from mosear_export.preflight import memory_mb, preflight

PLANS = TensorRT(compute_capabilities=("8.9",), capacity=3456, prefill_batch=2, prefill_rows=64, decode_batch=3)
RECIPE = Recipe(name="toy-rtx", target=Target.TENSORRT_RTX, precision=Precision.FP16, limits=LIMITS, tensorrt=PLANS)


@pytest.fixture(scope="module")
def onnx_folder(folders: Folders) -> Path:
    return folders.onnx


@pytest.fixture(scope="module")
def engine(onnx_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(RECIPE, onnx_folder, tmp_path_factory.mktemp("engines"), print)


def profiles(engine: Path, part: str) -> list[dict[str, object]]:
    parts = Manifest.load(engine, kind=KIND, remedy="").notes["plans"]
    assert isinstance(parts, dict)
    found = parts[f"{part}.plan"]["report"]["profiles"]
    assert isinstance(found, list)
    return found


def test_every_attention_is_fused(engine: Path) -> None:
    config = EngineFolder(engine).config
    prefill, decode = profiles(engine, "decoder")
    assert prefill["fused_attentions"] == decode["fused_attentions"] == config.backbone.layers
    assert profiles(engine, "voice")[0]["fused_attentions"] == config.voice.blocks


def test_reallocation_costs_few_kernels(engine: Path, onnx_folder: Path, tmp_path: Path) -> None:
    """Beside the same decoder without masses and reallocation: the scores, and one or two from them to the mask."""
    config = ModelConfig.load(onnx_folder / "config.json")
    off = dataclasses.replace(config, ar=dataclasses.replace(config.ar, policy=Policy.OFF))
    bare = build_tensorrt.compile_part(
        RECIPE, onnx_folder, parts(off)[DECODER], off, tmp_path / "in" / "bare.plan", print,
        dropped=("mass_before", "mass_after"),
    )  # fmt: skip
    for index, program in enumerate(bare.plan.programs):
        with_it = len(profiles_kernels(engine, index))
        without = len(program.of_layer(1))
        print(index, with_it, without)
        assert with_it - without <= 3


def profiles_kernels(engine: Path, index: int) -> list[str]:
    found = profiles(engine, "decoder")[index]["kernels_of_a_layer"]
    assert isinstance(found, list)
    return found


def test_nothing_changed_nothing_built(engine: Path, onnx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_tensorrt, "build_plan", lambda *_: pytest.fail("built a plan"))
    lines: list[str] = []
    assert build_engine(RECIPE, onnx_folder, engine.parent, lines.append) == engine
    assert lines == [f"engine: {engine} is fresh"]
    assert list(explain(engine, onnx_folder, None)) == [f"{engine} is fresh: `mosear build` would do nothing"]


def test_a_changed_expert_builds_no_plan(
    engine: Path, onnx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = shutil.copytree(onnx_folder, tmp_path / "onnx")
    values = load_file(changed / HEADS)
    name = next(name for name in values if name.endswith("q_proj.b"))
    save_file(values | {name: values[name] * np.float32(2)}, changed / HEADS)
    source = Manifest.load(changed, kind=export.KIND, remedy="")
    dataclasses.replace(source, files=folder_hashes(changed)).save(changed)
    lines = list(explain(engine, changed, None))
    assert lines[0].startswith("onnx.heads.safetensors: expected ") and "plans to build: none" in lines[1]
    monkeypatch.setattr(build_tensorrt, "build_plan", lambda *_: pytest.fail("built a plan"))
    other = build_engine(RECIPE, changed, engine.parent, print)
    assert other != engine and (other / "decoder.plan").read_bytes() == (engine / "decoder.plan").read_bytes()
    packed = load_file(engine / HEADS), load_file(other / HEADS)
    assert [name for name in packed[0] if (packed[0][name] != packed[1][name]).any()]


def test_explain_names_what_differs(engine: Path, onnx_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "toy-rtx.toml"
    recipe.write_text(
        'name = "toy-rtx"\ntarget = "tensorrt-rtx"\nprecision = "bf16"\n[tensorrt]\ncompute_capabilities = ["8.9"]\n'
        "capacity = 3456\nprefill_batch = 2\nprefill_rows = 64\ndecode_batch = 4\n[limits]\nclip_seconds = 2.0\n"
        "clip_bytes = 1048576\nwords = 200\nnew_tokens = 3000\nprompt_tokens = 400\n"
    )
    lines = list(explain(engine, onnx_folder, recipe))
    assert lines[:2] == [
        "recipe.precision: expected fp16, found bf16", "recipe.tensorrt.decode_batch: expected 3, found 4",
    ]  # fmt: skip
    assert "plans to build: decoder, embedding" in lines[2] and "would be rebuilt; build it with" in lines[-1]


def test_an_engine_is_not_run_where_it_cannot(engine: Path) -> None:
    with pytest.raises(EngineError, match=r"needs a GPU of compute capability 8\.9: no NVIDIA driver|found "):
        Engine(engine)


def test_inspect_shows_chips_and_kernels(engine: Path) -> None:
    text = describe(engine, as_json=False)
    assert "plan   decoder: 8.9; " in text and "profile 1: " in text and "fused attentions" in text


def test_a_dry_run_finds_what_stops_a_build(onnx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [finding for finding in preflight(RECIPE, onnx_folder) if finding.stops]
    wrong = dataclasses.replace(
        RECIPE, tensorrt=dataclasses.replace(PLANS, capacity=9024, decode_batch=2, builder_memory_mb=100)
    )
    found = {finding.where: str(finding) for finding in preflight(wrong, onnx_folder) if finding.stops}
    assert "the model knows 4096 positions: lower it to 4096" in found["tensorrt.capacity"]
    assert "a conflict report decodes 3 at once: raise it to 3" in found["tensorrt.decode_batch"]
    needed = memory_mb(ModelConfig.load(onnx_folder / "config.json"))
    assert f"set tensorrt.builder_memory_mb to {needed} or more" in found["decoder"]
    monkeypatch.setattr(preflight_module, "machine_mb", lambda: needed - 1)
    assert f"needs about {needed} MB (computed), there are {needed - 1}: build on a" in str(
        preflight(RECIPE, onnx_folder)[0]
    )


def test_a_dry_run_names_an_operator_that_tensorrt_lacks(onnx_folder: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(onnx_folder, tmp_path / "onnx")
    model = onnx.load(changed / "face.onnx", load_external_data=False)
    model.graph.node.append(helper.make_node("MelWeightMatrix", ["a"] * 5, ["b"], name="odd"))
    onnx.save(model, changed / "face.onnx")
    (finding,) = [finding for finding in preflight(RECIPE, changed) if finding.stops]
    assert str(finding).startswith(
        "stops face, node odd: TensorRT-RTX has no operator MelWeightMatrix: write that part"
    )


def test_a_dry_run_without_the_library(onnx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_module, "unusable", lambda module: f"{module} is not installed")
    (finding,) = [finding for finding in preflight(RECIPE, onnx_folder) if finding.stops]
    assert "tensorrt_rtx is not installed: pip install" in str(finding)


def test_the_command_lines_dry_run(onnx_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "build" / "onnx"
    out.mkdir(parents=True)
    (out / "onnx").symlink_to(onnx_folder)
    recipes = Path(__file__).parents[1] / "export" / "recipes"
    assert (
        main(["build", "--dry-run", "--recipe", str(recipes / "rtx-fp16.toml"), "--out", str(tmp_path / "build")]) == 0
    )
    assert "rtx-fp16: nothing stops this build" in capsys.readouterr().out
    assert main(["build", "--dry-run", "--out", str(tmp_path / "nowhere")]) == 1
    assert "export a checkpoint first" in capsys.readouterr().err


def test_the_server_takes_the_configuration_of_every_plan(
    engine: Path, onnx_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real server loads them, in a copy whose instances are of kind CPU; then one that does not fit its plan."""
    arguments = ["repo", "--engine", str(engine), "--onnx", str(onnx_folder), "--out", str(tmp_path)]
    assert main(arguments) == 1 and "engine of tensorrt-rtx, which a GPU runs: --target gpu" in capsys.readouterr().err
    assert main([*arguments, "--target", "gpu", "--check"]) == 0
    said = capsys.readouterr().out
    for name in ENCODERS:
        assert f"{name}: the server takes its configuration, which fits its plan" in said
    repository = (tmp_path / "toy-rtx-on-gpu").resolve()
    config = text_format.Parse((repository / "voice" / "config.pbtxt").read_text(), pb.ModelConfig())
    assert (config.backend, config.platform, config.default_model_filename) == (
        "tensorrt", "tensorrt_plan", "model.plan",
    )  # fmt: skip
    (group,) = config.instance_group
    assert group.kind == pb.ModelInstanceGroup.KIND_GPU and list(group.profile) == ["0"]
    assert config.max_batch_size == PLANS.decode_batch and config.model_warmup
    assert (repository / "voice" / "1" / "model.plan").samefile(engine / "voice.plan")
    wrong = shutil.copytree(repository, tmp_path / "wrong")
    config.max_batch_size = 64
    (wrong / "voice" / "config.pbtxt").write_text(text_format.MessageToString(config))
    with pytest.raises(ServingError, match="max_batch_size is 64, the plan's profile goes to 3"):
        check_plans(wrong, print)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": []}, r"voice: the plan has the inputs \['mel', 'voice_frames'\], the configuration \[\]"),
        ({"dims": [9, -1]}, r"voice: mel is \[-1, 8, -1\] in the plan, the configuration says \[9, -1\] without"),
        ({"data_type": "TYPE_FP16"}, "voice: mel is FLOAT in the plan, the configuration says TYPE_FP16"),
        ({"profile": ["1"]}, "voice: there is no profile 1: the plan has 1"),
    ],
)
def test_a_configuration_that_is_not_the_plans_is_refused(
    change: dict[str, Any], message: str, engine: Path, tmp_path: Path
) -> None:
    folder, config = plan_folder(engine, tmp_path)
    assert isinstance(PlanModel(config, folder), PlanModel)
    tensor = next(tensor for tensor in config["input"] if tensor["name"] == "mel")
    tensor |= {key: value for key, value in change.items() if key in tensor}
    config |= {key: value for key, value in change.items() if key in config}
    config["instance_group"][0] |= {key: value for key, value in change.items() if key == "profile"}
    with pytest.raises(EngineError, match=message):
        PlanModel(config, folder)


def plan_folder(engine: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A model's version folder with the voice's plan, and its configuration as Triton hands it on."""
    folder, notes = tmp_path / "1", Manifest.load(engine, kind=KIND, remedy="").notes["plans"]
    assert isinstance(notes, dict)
    folder.mkdir()
    shutil.copy(engine / "voice.plan", folder / "model.plan")
    (folder / "plan.json").write_text(json.dumps(notes["voice.plan"]))
    files = EngineFolder(engine)
    made = model_configs(files.config, files.recipe, device=Device.GPU, settings=Settings(), warm={})["voice"]
    config = json_format.MessageToDict(made, preserving_proto_field_name=True)
    config["input"] = [{"data_type": "TYPE_INVALID", **tensor} for tensor in config["input"]]
    return folder, config


def test_a_plan_that_is_not_what_was_built_is_refused_where_it_is_served(engine: Path, tmp_path: Path) -> None:
    folder, config = plan_folder(engine, tmp_path)
    model = PlanModel(config, folder)
    mel, frames = np.zeros((1, 8, 20), np.float32), np.full(1, 20, np.int32)
    samples = ({"mel": mel}, {"mel": mel[:, :, :2], "voice_frames": frames}, {"mel": mel, "voice_frames": frames})
    told = [model.alone(Ask(inputs=sample, outputs=("voice_features",))) for sample in samples]
    assert str(told[0]) == "voice: input voice_frames is missing"
    assert str(told[1]).startswith("voice: mel is [1, 8, 2], the plan's profile goes from [1, 8, 4] to [")
    assert isinstance(told[2], dict) and told[2]["voice_features"].shape[0] == 1
    with pytest.raises(
        EngineError, match=r"voice: the plan is for compute capability 8\.9, found no NVIDIA driver|8\."
    ):
        model.open()
    data = (folder / "model.plan").read_bytes()
    (folder / "model.plan").write_bytes(data[:-1])
    with pytest.raises(EngineError, match=r"model\.plan has \d+ bytes, \d+ were built: run `mosear repo`"):
        PlanModel(config, folder)
    (folder / "plan.json").unlink()
    with pytest.raises(EngineError, match="holds no plan and its notes"):
        PlanModel(config, folder)


def test_a_killed_build_leaves_no_engine_and_no_builder(onnx_folder: Path, tmp_path: Path) -> None:
    """Killed while the builder's process compiles: that one ends too, and nothing stands where an engine would."""
    root = Path(__file__).parents[1]
    script = (
        f"import sys\nsys.path[:0] = {[str(root / name) for name in ('engine', 'export', 'tests')]!r}\n"
        "from pathlib import Path\nfrom test_tensorrt_engine import RECIPE\n"
        "from mosear_export.build_tensorrt import build_engine\n"
        f"build_engine(RECIPE, Path({str(onnx_folder)!r}), Path({str(tmp_path)!r}), lambda line: print(line, flush=True))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(root / "engine")}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as build:
        assert build.stdout is not None
        for line in build.stdout:
            if "compiling kernels" in line:
                break
        build.kill()
    end = time.monotonic() + 20
    while builders(tmp_path):
        assert time.monotonic() < end, "the builder goes on"
        time.sleep(0.1)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".") and path.name != "plans"]
    assert not list(tmp_path.glob("plans/[!.]*"))


def builders(folder: Path) -> list[str]:
    """Command lines of running builders that work below a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if "tensorrt_child" in line and str(folder) in line]
