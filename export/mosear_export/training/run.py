"""From labelled data to a heads file: features, training, evaluation on speakers and faces that training never saw."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from mosear.runtime.prompt import PromptBuilder
from mosear_export.demo.assemble import demo_config, frozen_files
from mosear_export.demo.fetch import default_cache, fetch
from mosear_export.demo.smollm import GGUFModel
from mosear_export.model.whole import ReferenceModel
from mosear_export.training.evaluate import evaluate
from mosear_export.training.examples import Sampler
from mosear_export.training.features import Features, Report, compute
from mosear_export.training.train import TrainConfig, Trainer, TrainOps

LEFT_OUT = ("14", "15")  # a woman and a man whose voices training never hears


def train_heads(data: Path, work: Path, output: Path, config: TrainConfig, report: Report) -> dict[str, object]:
    """Train on `data`, write heads (fp16 safetensors) to `output` and the measured results beside it as JSON."""
    files = fetch(default_cache(), report)
    backbone = GGUFModel(files.gguf)
    model = ReferenceModel(demo_config(backbone), TrainOps())
    wanted = model.files()
    for name, tensors in frozen_files(files, backbone, model.config).items():
        for key, tensor in tensors.items():
            wanted[name][key].copy_(tensor)
    features = compute(model, data, work / "features.npz", report)
    left_out = np.isin(features.voices.origin, LEFT_OUT)
    dev = features.faces.origin == "dev"
    seen = Features(voices=features.voices.where(~left_out), faces=features.faces.where(~dev), scenes=features.scenes)
    trainer = Trainer(model, PromptBuilder(model.config, backbone.tokenizer()), seen, config)
    trainer.run(Sampler(seen, seed=config.seed, frames=model.config.face.frames), report)
    heads = {name: tensor.detach().half() for name, tensor in model.files()["heads"].items()}
    save_file(heads, output)
    for name, tensor in model.files()["heads"].items():  # what is measured is what is shipped
        tensor.detach().copy_(heads[name])
    results: dict[str, object] = {
        "config": dataclasses.asdict(config),
        "left_out_speakers": list(LEFT_OUT),
        **evaluate(trainer, features.voices.where(left_out), features.faces.where(dev), report),
    }
    output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    return results
