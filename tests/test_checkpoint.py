"""Checkpoint folders: written, read back to the bit, and refused with every fault by its name."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import FULL, GROUPED, toy_config, toy_model

from mosear.artifacts import MANIFEST
from mosear.config import BackboneConfig
from mosear.errors import CheckpointError, ConfigError
from mosear_export.checkpoint import CONFIG, TOKENIZER, Checkpoint, save, seal
from mosear_export.model.whole import ReferenceModel

TOKENIZER_TEXT = '{"version": "1.0"}'


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "toy"
    model = toy_model(toy_config())
    save(folder, model.config, model.files(), TOKENIZER_TEXT)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(saved, tmp_path / "toy")


@pytest.mark.parametrize("shape", [GROUPED, FULL], ids=["tied", "untied"])
def test_what_is_saved_is_loaded(shape: BackboneConfig, tmp_path: Path) -> None:
    model = toy_model(toy_config(backbone=shape), seed=3)
    save(tmp_path / "toy", model.config, model.files(), TOKENIZER_TEXT)
    loaded = ReferenceModel.load(tmp_path / "toy")
    assert loaded.config == model.config
    for name, tensors in model.files().items():
        assert tensors.keys() == loaded.files()[name].keys()
        assert all(tensor.equal(loaded.files()[name][key]) for key, tensor in tensors.items())
    assert loaded.heads.keys() == model.heads.keys()
    assert all(tensor.equal(loaded.heads[key]) for key, tensor in model.heads.items())
    tied = loaded.decoder.lm_head.weight is loaded.decoder.embed_tokens.weight
    assert tied is shape.tied_embeddings
    assert ("lm_head.weight" in load_file(tmp_path / "toy" / "backbone.safetensors")) is not tied


def test_the_folder_holds_data_alone(saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    weights = {f"{name}.safetensors" for name in ("backbone", "voice", "face_detector", "face", "scene", "heads")}
    assert names == {CONFIG, TOKENIZER, MANIFEST} | weights
    assert set(Checkpoint.open(saved).hashes) == names - {MANIFEST}
    assert (saved / TOKENIZER).read_text() == TOKENIZER_TEXT


def test_every_fault_of_every_file_is_listed(folder: Path) -> None:
    """Missing, extra and wrongly shaped tensors of two files, and a file that is gone, in one message."""
    backbone = load_file(folder / "backbone.safetensors")
    del backbone["model.norm.weight"], backbone["model.layers.1.mlp.up_proj.weight"]
    backbone["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(48)
    backbone["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(24, 16)
    save_file(backbone, folder / "backbone.safetensors")
    heads = load_file(folder / "heads.safetensors")
    heads["modality_weight"] = torch.zeros(4)
    save_file(heads, folder / "heads.safetensors")
    (folder / "scene.safetensors").unlink()
    (folder / "face.safetensors").write_bytes(b"no tensors at all")
    seal(folder)
    with pytest.raises(CheckpointError) as caught:
        ReferenceModel.load(folder)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[0] == f"{folder} does not fit its config.json:"
    for expected in (
        "backbone.safetensors: missing model.norm.weight [24]",
        "backbone.safetensors: missing model.layers.1.mlp.up_proj.weight [40, 24]",
        "backbone.safetensors: extra model.layers.0.self_attn.q_proj.bias",
        "backbone.safetensors: model.layers.0.self_attn.k_proj.weight has shape [24, 16], not [16, 24]",
        "heads.safetensors: modality_weight has shape [4], not [3]",
    ):
        assert expected in lines
    assert sum(line.startswith(("scene.safetensors cannot", "face.safetensors cannot")) for line in lines) == 2
    assert len(lines) == 1 + 5 + 2 + 1


def test_weights_of_another_configuration_are_refused(folder: Path) -> None:
    config = toy_config()
    dataclasses.replace(config, mose=dataclasses.replace(config.mose, experts=3)).save(folder / CONFIG)
    seal(folder)
    with pytest.raises(CheckpointError, match=r"layers\.1\.down_proj\.gate has shape \[6, 40\], not \[9, 40\]"):
        ReferenceModel.load(folder)


def test_an_altered_or_missing_file_is_named(folder: Path) -> None:
    path = folder / "voice.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"voice\.safetensors was altered: expected sha256 .* copy the folder anew"
    ):
        Checkpoint.open(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"voice\.safetensors is missing"):
        Checkpoint.open(folder)


def test_a_folder_without_manifest_is_no_checkpoint(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"is no checkpoint folder \(it has no manifest\.json\)"):
        Checkpoint.open(folder)


def test_an_unknown_config_key_comes_with_the_nearest(folder: Path) -> None:
    data = json.loads((folder / CONFIG).read_text())
    data["mose"]["expert"] = data["mose"].pop("experts")
    (folder / CONFIG).write_text(json.dumps(data))
    seal(folder)
    with pytest.raises(ConfigError, match=r"config\.json: mose has an unknown key 'expert': did you mean 'experts'\?"):
        ReferenceModel.load(folder)
