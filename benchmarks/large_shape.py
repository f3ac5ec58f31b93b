"""A decoder of LLaMA-2-7B's shape: exported and put before the preflight within a bound on memory. Weights are random.

    python benchmarks/large_shape.py FOLDER [--layers 32] [--memory-mb 16384]

Its parameters lie in one sparse file that is mapped, which becomes the graph's file of weights: nobody ever holds them whole.
After the export they are drawn there, part by part. FOLDER needs 27 GB for 32 layers; it is left empty. What the preflight says
of a build here is printed, and stands in the result.
"""

import argparse
import dataclasses
import json
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import machine
import numpy as np
import onnx_ir as ir
import torch
from safetensors.torch import save_file
from torch import nn

from mosear.artifacts import CONFIG, HEADS
from mosear.config import ARConfig, BackboneConfig, FaceConfig, ModelConfig, MoSEConfig, SceneConfig, VoiceConfig
from mosear.contract import DECODER, Part, parts
from mosear.recipe import Recipe
from mosear_export import build_tensorrt
from mosear_export.demo.assemble import LABELS, PROMPT
from mosear_export.model.decoder import Decoder, zero_heads
from mosear_export.model.whole import ReferenceModel
from mosear_export.ops import ExportOps
from mosear_export.preflight import memory_mb, preflight
from mosear_export.to_onnx import export_part, save_part, trace_part

RECIPE = Path(__file__).parents[1] / "export" / "recipes" / "rtx-fp16.toml"
BLOCK = 1 << 22  # random numbers that are drawn at once
LLAMA = BackboneConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, layers=32, heads=32, kv_heads=32, head_size=128,
    max_positions=4096, rope_theta=10000.0, norm_eps=1e-5, tied_embeddings=False,
)  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--layers", type=int, default=LLAMA.layers)
    options.add_argument("--memory-mb", type=int, default=16384, help="that this process may allocate")
    options.add_argument("--build", action="store_true", help="build the decoder's plan by TensorRT-RTX too")
    options.add_argument("--output", type=Path, help="JSON file for the result")
    given = options.parse_args()
    bound = given.memory_mb << 20
    resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
    given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as aside:
        found = json.dumps(
            {"machine": machine.stamp()} | measure(Path(aside), given.layers, build=given.build), indent=1
        )
    print(found)
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(found + "\n")


def measure(folder: Path, layers: int, *, build: bool) -> dict[str, object]:
    """Export every part into `folder`, draw the decoder's weights, ask the preflight; then `build` the decoder's plan."""
    config = shape(layers)
    started = time.monotonic()
    weights = folder / f"{DECODER}.onnx.data"
    model = mapped_model(config, weights)
    for part in reversed(parts(config).values()):  # the decoder first
        path = folder / f"{part.name}.onnx"
        if part.name == DECODER:
            export_in_place(model, part, path, weights)
        else:
            export_part(model, part, path)
        print(f"{part.name}: {time.monotonic() - started:.0f} s, {peak_mb()} MB at most", flush=True)
    exported = time.monotonic() - started
    config.save(folder / CONFIG)
    findings = [str(finding) for finding in preflight(Recipe.load(RECIPE), folder)]
    for finding in findings:
        print(finding)
    peak = peak_mb()
    print(f"exported and before the preflight after {exported:.0f} s, {peak} MB at most", flush=True)
    numbers = draw(weights)
    result: dict[str, object] = {
        "layers": layers, "parameters": sum(p.numel() for p in model.decoder.parameters()),
        "weights_bytes": numbers * 4, "export_seconds": round(exported), "seconds": round(time.monotonic() - started),
        "peak_resident_mb": peak_mb(), "of_it_not_files_mb": anonymous_mb(), "preflight": findings,
        "build_mb_computed": memory_mb(config), "free_disk_gb": shutil.disk_usage(folder).free >> 30,
    }  # fmt: skip
    if build:
        save_file(model.heads, folder / HEADS)
        result["build"] = built(folder, config)
    return result


def built(folder: Path, config: ModelConfig) -> dict[str, object]:
    """The decoder's plan for one chip: seconds, memory of the builder's process, bytes."""
    recipe = Recipe.load(RECIPE)
    plans = dataclasses.replace(recipe.plans, compute_capabilities=("8.9",), builder_memory_mb=memory_mb(config) * 2)
    recipe = dataclasses.replace(recipe, tensorrt=plans)
    plan = folder / "plan" / f"{DECODER}.plan"
    made = build_tensorrt.compile_part(recipe, folder, parts(config)[DECODER], config, plan, print)
    fused = [program.fused_attentions for program in made.plan.programs]
    return {
        "seconds": round(made.seconds), "memory_mb": round(made.memory_mb), "bytes": made.plan.size,
        "fused_attentions": fused, "peak_resident_mb_of_the_preparation": peak_mb(),
    }  # fmt: skip


def shape(layers: int) -> ModelConfig:
    """The demo's configuration around LLaMA-2-7B's backbone, of so many layers."""
    return ModelConfig(
        name="llama2-7b-shape", labels=LABELS, backbone=dataclasses.replace(LLAMA, layers=layers), mose=MoSEConfig(),
        ar=ARConfig(), voice=VoiceConfig(), face=FaceConfig(), scene=SceneConfig(), prompt=PROMPT,
    )  # fmt: skip


def mapped_model(config: ModelConfig, path: Path) -> ReferenceModel:
    """A model whose decoder lies in one sparse file: it takes no memory, and no disk until somebody writes."""
    small = dataclasses.replace(config.backbone, layers=1, vocab_size=8, intermediate_size=8)
    model = ReferenceModel(dataclasses.replace(config, backbone=small), ExportOps())
    with torch.device("meta"):
        decoder = Decoder(config, ExportOps())
    size = sum(parameter.numel() for parameter in decoder.parameters())
    with path.open("wb") as file:
        file.truncate(size * 4)
    whole, at = torch.from_file(str(path), shared=True, size=size, dtype=torch.float32), 0
    for module in decoder.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            made = whole[at : at + parameter.numel()].view(parameter.shape)
            setattr(module, name, nn.Parameter(made, requires_grad=False))
            at += parameter.numel()
    for name, buffer in model.decoder.named_buffers():  # of rotary embedding: the same in both
        setattr(decoder, name, buffer)
    model.config, model.decoder, model.heads = config, decoder.eval(), zero_heads(config)
    return model


def export_in_place(model: ReferenceModel, part: Part, path: Path, weights: Path) -> None:
    """Export a decoder whose parameters lie in the file that is to hold its weights: nothing is copied."""
    program = trace_part(model, part)
    start = min(parameter.data_ptr() for parameter in model.decoder.parameters())
    end = start + weights.stat().st_size
    for value in program.model.graph.initializers.values():
        assert value.const_value is not None, "an initialiser has numbers"
        array = value.const_value.numpy()
        at = array.__array_interface__["data"][0]
        if start <= at < end:  # a matrix that is turned reads its numbers in another order: they are random
            value.const_value = ir.ExternalTensor(
                weights.name, at - start, array.nbytes, ir.DataType.FLOAT, shape=ir.Shape(array.shape),
                name=str(value.name), base_dir=path.parent,
            )  # fmt: skip
    save_part(program, model.config, part, path)


def draw(path: Path) -> int:
    """Random weights in a file, block by block, each on the disk before the next; returns how many numbers it holds."""
    generator, size = np.random.default_rng(0), path.stat().st_size // 4
    with path.open("r+b") as file:
        for at in range(0, size, BLOCK):
            numbers = (generator.random(min(BLOCK, size - at), np.float32) - np.float32(0.5)) * np.float32(0.06)
            file.write(numbers.tobytes())
            file.flush()
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 4 * at, numbers.nbytes, os.POSIX_FADV_DONTNEED)
    return size


def peak_mb() -> int:
    return status_kb("VmHWM") // 1024


def anonymous_mb() -> int:
    return status_kb("RssAnon") // 1024


def status_kb(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
