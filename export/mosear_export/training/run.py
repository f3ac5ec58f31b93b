"""From labelled data to a heads file: features, training, evaluation on speakers and faces that training never saw."""

import dataclasses
import json
import tomllib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from mosear.artifacts import key_of
from mosear.config import parse
from mosear.errors import ConfigError
from mosear.runtime.prompt import PromptBuilder
from mosear_export.demo.assemble import demo_config, frozen_files
from mosear_export.demo.fetch import default_cache, fetch
from mosear_export.demo.smollm import GGUFModel
from mosear_export.model.whole import ReferenceModel
from mosear_export.training.evaluate import evaluate
from mosear_export.training.examples import Sampler
from mosear_export.training.features import Features, Labelled, Report, compute
from mosear_export.training.ops import TrainOps
from mosear_export.training.train import TrainConfig, Trainer


def settings(file: Path | None, given: list[str]) -> TrainConfig:
    """The file's settings, then those given as NAME=VALUE in TOML; raises ConfigError."""
    try:
        data = {} if file is None else tomllib.loads(file.read_text())
        data |= tomllib.loads("\n".join(given))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"{file or 'the settings'}: not TOML: {error}; write such as steps=100 or start='random'"
        ) from error
    return parse(TrainConfig, data, where=str(file or "--set"))


def train_heads(data: Path, work: Path, output: Path, config: TrainConfig, report: Report) -> dict[str, object]:
    """Train on `data`, write heads (fp16 safetensors) to `output` and the measured results beside it as JSON.

    `work` keeps encoder outputs, and the state of a training that was stopped: the same call goes on with it.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    files = fetch(default_cache(), report)
    backbone = GGUFModel(files.gguf)
    model = ReferenceModel(demo_config(backbone, plain=config.plain), TrainOps())
    wanted = model.files()
    for name, tensors in frozen_files(files, backbone, model.config).items():
        for key, tensor in tensors.items():
            wanted[name][key].copy_(tensor)
    features = compute(model, data, work / "features.npz", report)
    left_out = np.isin(features.voices.origin, config.left_out)
    measured = held_back(features.faces, config.held_faces)
    known = ~measured & (features.faces.origin != "dev")
    seen = Features(voices=features.voices.where(~left_out), faces=features.faces.where(known), scenes=features.scenes)
    trainer = Trainer(model, PromptBuilder(model.config, backbone.tokenizer()), seen, config)
    kept = work / f"training-{key_of(dataclasses.asdict(config))[:12]}.pt"
    trainer.run(Sampler(seen, seed=config.seed, frames=model.config.face.frames), report, kept)
    with torch.no_grad():
        for name, one in trainer.shared.items():
            model.heads[name].copy_(one.repeat(len(model.config.groups), 1))
    heads = {name: tensor.detach().half() for name, tensor in model.files()["heads"].items()}
    save_file(heads, output)
    for name, tensor in model.files()["heads"].items():  # what is measured is what is shipped
        tensor.detach().copy_(heads[name])
    results: dict[str, object] = {
        "config": dataclasses.asdict(config) | {"base": Path(config.base).name},
        **evaluate(trainer, features.voices.where(left_out), features.faces.where(measured), report),
    }
    output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def held_back(faces: Labelled, count: int) -> npt.NDArray[np.bool_]:
    """The photos that are measured: the dev photos, or `count` training photos of each label."""
    if not count:
        return np.asarray(faces.origin == "dev")
    kept = np.zeros(len(faces.origin), bool)
    for emotion in np.unique(faces.emotion):
        kept[np.flatnonzero((faces.origin == "train") & (faces.emotion == emotion))[:count]] = True
    return kept
