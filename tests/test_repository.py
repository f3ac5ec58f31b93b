"""Model repositories: their configurations say what the contract says, and they are whole or not there."""

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from safetensors.numpy import save_file
from toy import toy_config
from tritonclient.grpc import model_config_pb2 as pb

from mosear.artifacts import MANIFEST, Manifest, publish
from mosear.contract import DECODER, ENCODERS, DType, parts, served
from mosear.engine import CONFIG, TOKENIZER, EngineFolder
from mosear.errors import ConfigError, EngineError, ServingError
from mosear.recipe import Recipe
from mosear.serving import repository
from mosear.serving.configs import Device, Settings, config_text, model_configs
from mosear.serving.installation import BACKEND_PY, BACKENDS
from mosear.serving.repository import MODEL_PY, assemble
from mosear_export import export
from mosear_export.demo.fetch import DemoFiles
from mosear_export.demo.triton_configs import FOLDER, demo_configs, golden_shapes

TYPES = {
    DType.F32: "TYPE_FP32",
    DType.I32: "TYPE_INT32",
    DType.I64: "TYPE_INT64",
    DType.U8: "TYPE_UINT8",
    DType.U64: "TYPE_UINT64",
    DType.BOOL: "TYPE_BOOL",
    DType.STRING: "TYPE_STRING",
}
RECIPE = Recipe(name="toy", threads=3)
MODELS = {*ENCODERS, DECODER, "mosear", "mosear_unary"}


@dataclasses.dataclass
class Made:
    """An ONNX and an engine folder with a toy's names and made-up contents."""

    onnx: Path
    engine: Path
    root: Path

    def assemble(self, *, target: Device = Device.CPU, onnx: bool = True, settings: Settings | None = None) -> Path:
        self.said: list[str] = []
        onnx_folder = self.onnx if onnx else None
        return assemble(
            self.engine, self.root, target=target, onnx_folder=onnx_folder, say=self.said.append, settings=settings
        )

    def repositories(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir())


@pytest.fixture
def made(tmp_path: Path) -> Made:
    config = toy_config()
    with publish(tmp_path / "onnx", kind=export.KIND, name="onnx", inputs={}) as draft:
        _fill(draft.folder, "portable")
        (draft.folder / export.GOLDEN).mkdir()
        for part, shapes in golden_shapes(config).items():
            dtypes = {spec.name: spec.dtype.numpy for spec in parts(config)[part].inputs}
            random = np.random.default_rng(len(part))
            golden = {f"in.{n}": random.integers(0, 99, (2, *s)).astype(dtypes[n]) for n, s in shapes.items()}
            save_file({**golden, "out.x": np.zeros(1)}, draft.folder / export.GOLDEN / f"{part}.safetensors")
    onnx = (tmp_path / "onnx" / "onnx").resolve()
    files = Manifest.load(onnx, kind=export.KIND, remedy="").files
    inputs: dict[str, object] = {"onnx": files, "recipe": dataclasses.asdict(RECIPE)}
    with publish(tmp_path / "engines", kind="engine", name="toy", inputs=inputs) as draft:
        _fill(draft.folder, "optimised")
        config.save(draft.folder / CONFIG)
        (draft.folder / TOKENIZER).write_text("{}")
    return Made(onnx, (tmp_path / "engines" / "toy").resolve(), tmp_path / "repository")


def _fill(folder: Path, flavour: str) -> None:
    for name in parts(toy_config()):
        (folder / f"{name}.onnx").write_text(f"{flavour} {name}")
        (folder / f"{name}.onnx.data").write_text(f"{flavour} weights of {name}")


def read(path: Path) -> pb.ModelConfig:
    return text_format.Parse((path / "config.pbtxt").read_text(), pb.ModelConfig())


def test_the_committed_backend_is_what_a_server_gets() -> None:
    for backend, module in BACKENDS.items():
        text = (FOLDER.parent / "backends" / backend / "model.py").read_text()
        assert text == BACKEND_PY.format(backend=backend, module=module)


@pytest.mark.demo
def test_committed_configurations_are_what_the_contract_makes(demo_files: DemoFiles) -> None:
    wanted = demo_configs(demo_files)
    assert {path.parent.name for path in FOLDER.glob("*/config.pbtxt")} == set(wanted) == MODELS
    for name, text in wanted.items():
        assert (FOLDER / name / "config.pbtxt").read_text() == text, (
            f"{name}/config.pbtxt is stale: run `python -m mosear_export.demo.triton_configs`"
        )
    for name in (DECODER, "mosear", "mosear_unary"):
        committed = (FOLDER / name / "1" / "model.py").read_text()
        assert committed == MODEL_PY.format(module=name.removesuffix("_unary"))


def test_every_tensor_of_a_served_model_is_configured(made: Made) -> None:
    folder = made.assemble()
    for name, model in served(toy_config()).items():
        found = read(folder / name)
        assert (found.name, found.backend, found.max_batch_size) == (name, "python", 0)
        assert found.model_transaction_policy.decoupled == model.decoupled
        for specs, tensors in ((model.inputs, found.input), (model.outputs, found.output)):
            assert [spec.name for spec in specs] == [tensor.name for tensor in tensors]
            for spec, tensor in zip(specs, tensors, strict=True):
                assert pb.DataType.Name(tensor.data_type) == TYPES[spec.dtype]
                assert [-1 if isinstance(axis, str) else axis for axis in spec.axes] == list(tensor.dims)
                assert getattr(tensor, "optional", False) == spec.optional


def test_every_tensor_of_an_encoder_is_configured_without_its_batch_axis(made: Made) -> None:
    folder = made.assemble()
    for name in ENCODERS:
        part, found = parts(toy_config())[name], read(folder / name)
        assert (found.name, found.backend) == (name, "onnxruntime") and found.max_batch_size == 8
        assert found.HasField("dynamic_batching") and found.optimization.graph.level == 2
        assert found.parameters["intra_op_thread_count"].string_value == "3"
        for specs, tensors in ((part.inputs, found.input), (part.outputs, found.output)):
            assert [spec.name for spec in specs] == [tensor.name for tensor in tensors]
            for spec, tensor in zip(specs, tensors, strict=True):
                dims = [-1 if isinstance(axis, str) else axis for axis in spec.axes[1:]]
                assert pb.DataType.Name(tensor.data_type) == TYPES[spec.dtype]
                assert list(tensor.dims) == (dims or [1])
                assert tensor.HasField("reshape") == (not dims) and list(tensor.reshape.shape) == []


def test_a_batch_holds_the_frames_of_a_clip() -> None:
    config = toy_config(face=dataclasses.replace(toy_config().face, frames=20))
    models = model_configs(config, RECIPE, device=Device.CPU, settings=Settings(), warm={})
    assert [models[name].max_batch_size for name in ENCODERS] == [8, 20, 20, 8]


def test_parameters_are_explained_where_they_stand(made: Made) -> None:
    folder = made.assemble(settings=Settings(slots=9, queue=8, prefill_rows=7, workers=6))
    values = {
        name: {key: value.string_value for key, value in read(folder / name).parameters.items()} for name in MODELS
    }
    assert values[DECODER] == {"engine": "engine", "slots": "9", "queue": "8", "prefill_rows": "7", "threads": "3"}
    assert values["mosear"] == {"engine": "engine", "workers": "6", "clip_bytes": str(RECIPE.limits.clip_bytes)}
    assert values["mosear"] == values["mosear_unary"]
    for name, parameters in values.items():
        text = (folder / name / "config.pbtxt").read_text()
        assert text.startswith("# Generated by mosear.serving.configs")
        for key in parameters:
            assert f"\n# {key}: " in text


def test_settings_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="slots is 0: it must be at least 1"):
        Settings(slots=0)


def test_a_repository_is_found_again(made: Made) -> None:
    first = made.assemble()
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert made.assemble() == first and made.said == [f"repository: {first} is fresh"]
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    assert made.repositories() == ["toy-on-cpu", first.name]
    assert (made.root / "toy-on-cpu").resolve() == first
    other = made.assemble(settings=Settings(slots=5))
    assert other != first and (made.root / "toy-on-cpu").resolve() == other and first.is_dir()


def test_a_lost_file_is_made_again(made: Made) -> None:
    folder = made.assemble()
    (folder / "voice" / "1" / "model.onnx").unlink()
    assert made.assemble() == folder and (folder / "voice" / "1" / "model.onnx").exists()


def test_a_repository_needs_nothing_beside_itself(made: Made, tmp_path: Path) -> None:
    folder = Path(shutil.move(made.assemble(), tmp_path / "elsewhere"))
    shutil.rmtree(made.engine)
    shutil.rmtree(made.onnx)
    Manifest.load(folder, kind=repository.KIND, remedy="").verify(folder, remedy="")
    settings = read(folder / DECODER).parameters
    engine = EngineFolder(folder / DECODER / "1" / settings["engine"].string_value)
    engine.manifest.verify(engine.folder, remedy="")
    for name in ("mosear", "mosear_unary"):
        asked = EngineFolder(folder / name / "1" / read(folder / name).parameters["engine"].string_value)
        assert asked.config == engine.config and asked.schema == engine.schema
        assert (asked.folder / TOKENIZER).exists() and not list(asked.folder.glob("*.onnx*"))


def test_weights_are_not_stored_twice(made: Made) -> None:
    folder = made.assemble()
    for name in ("decoder", "voice", "scene_projector"):
        for file in (f"{name}.onnx", f"{name}.onnx.data"):
            assert (folder / DECODER / "1" / "engine" / file).samefile(made.engine / file)
    assert (folder / "voice" / "1" / "model.onnx").samefile(made.engine / "voice.onnx")
    assert (folder / "voice" / "1" / "voice.onnx.data").samefile(made.engine / "voice.onnx.data")


def test_files_are_copied_where_links_cannot_be(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    folder = made.assemble()
    copy, source = folder / "voice" / "1" / "voice.onnx.data", made.engine / "voice.onnx.data"
    assert copy.read_bytes() == source.read_bytes() and not copy.samefile(source)


def test_encoders_are_warmed_up_with_golden_inputs(made: Made) -> None:
    folder = made.assemble()
    for name in ENCODERS:
        (warmup,) = read(folder / name).model_warmup
        assert warmup.batch_size == 1 and set(warmup.inputs) == {spec.name for spec in parts(toy_config())[name].inputs}
        for spec in parts(toy_config())[name].inputs:
            given = warmup.inputs[spec.name]
            data = np.frombuffer((folder / name / "warmup" / given.input_data_file).read_bytes(), spec.dtype.numpy)
            assert list(given.dims) == (list(golden_shapes(toy_config())[name][spec.name]) or [1])
            assert data.size == np.prod(given.dims) and pb.DataType.Name(given.data_type) == TYPES[spec.dtype]
            assert data.max() > 0


def test_without_an_onnx_folder_nothing_is_warmed_up_and_that_is_said(made: Made) -> None:
    folder = made.assemble(onnx=False)
    assert not any(read(folder / name).model_warmup for name in ENCODERS)
    assert "not warmed up" in made.said[0]


def test_for_a_gpu_the_portable_graphs_are_served(made: Made) -> None:
    folder = made.assemble(target=Device.GPU)
    assert (made.root / "toy-on-gpu").resolve() == folder
    for name in ENCODERS:
        found = read(folder / name)
        assert [group.kind for group in found.instance_group] == [pb.ModelInstanceGroup.KIND_GPU]
        assert not found.parameters and not found.HasField("optimization")
        assert (folder / name / "1" / "model.onnx").samefile(made.onnx / f"{name}.onnx")
        assert (folder / name / "1" / f"{name}.onnx.data").samefile(made.onnx / f"{name}.onnx.data")
    for name in served(toy_config()):
        assert [group.kind for group in read(folder / name).instance_group] == [pb.ModelInstanceGroup.KIND_CPU]
    assert (folder / DECODER / "1" / "engine" / "decoder.onnx").samefile(made.engine / "decoder.onnx")


def test_for_a_gpu_the_onnx_folder_must_be_named(made: Made) -> None:
    with pytest.raises(ServingError, match="name the ONNX folder"):
        made.assemble(target=Device.GPU, onnx=False)


def test_another_models_onnx_folder_is_refused(made: Made) -> None:
    with publish(made.onnx.parent, kind=export.KIND, name="other", inputs={"other": 1}) as draft:
        _fill(draft.folder, "another model's")
    made.onnx = (made.onnx.parent / "other").resolve()
    with pytest.raises(ServingError, match=r"was not built from .*other"):
        made.assemble()


@pytest.mark.parametrize("which", ["engine", "onnx"])
def test_what_was_altered_is_refused(made: Made, which: str) -> None:
    path = getattr(made, which) / "voice.onnx.data"
    path.write_text("altered")
    with pytest.raises(EngineError, match=r"voice\.onnx\.data was altered"):
        made.assemble(target=Device.GPU)
    assert not made.root.exists() or made.repositories() == []


def test_no_engine_folder_is_said_so(made: Made) -> None:
    (made.engine / MANIFEST).unlink()
    with pytest.raises(EngineError, match="is no engine folder"):
        made.assemble()


@pytest.mark.parametrize("full_at", ["link", "write"])
def test_a_full_disk_leaves_the_old_repository_alone(made: Made, monkeypatch: pytest.MonkeyPatch, full_at: str) -> None:
    old = made.assemble()
    before = made.repositories()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    if full_at == "link":
        monkeypatch.setattr(os, "link", full)
        monkeypatch.setattr(shutil, "copyfile", full)
    else:
        monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ServingError, match=r"cannot be written .*No space left.*free some space"):
        made.assemble(settings=Settings(slots=7))
    assert made.repositories() == before
    assert (made.root / "toy-on-cpu").resolve() == old


def test_configuration_text_is_stable() -> None:
    texts = [
        config_text(
            model_configs(toy_config(), RECIPE, device=Device.CPU, settings=Settings(), warm={})["mosear"], Device.CPU
        )
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
