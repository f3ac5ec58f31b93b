"""The contract: names are unique, axes are known, and every part of a model answers with exactly what it promises."""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import FULL, GROUPED, decoder_inputs, random_tensor, sizes_of, toy_config, toy_model

from mosear.config import ModelConfig, MoSEConfig, Route, Target
from mosear.contract import AR_PARAMS, DECODER, EMBEDDING, MODALITY_WEIGHT, DType, Part, heads, parts
from mosear_export.model.decoder import zero_heads
from mosear_export.to_onnx import EXAMPLE_SIZES

CONFIGS: dict[str, dict[str, Any]] = {  # Any: a field of ModelConfig each
    "grouped": {},
    "full": {"backbone": FULL, "mose": MoSEConfig(targets=tuple(Target), rank=2, experts=3, share_a=False)},
    "modality": {"mose": MoSEConfig(route=Route.MODALITY), "groups": ("text", "video", "audio", "sink")},
    "no experts": {"mose": MoSEConfig(targets=())},
}
CLIP_ORDER = ["voice", "face_detector", "face", "scene", "voice_projector", "face_projector", "scene_projector"]
LETTERS = set("BSLNTQA")


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return toy_config(**CONFIGS[request.param])


def test_parts_come_in_the_order_a_clip_meets_them(config: ModelConfig) -> None:
    table = parts(config)
    assert list(table) == [*CLIP_ORDER, EMBEDDING, DECODER]
    assert all(name == part.name for name, part in table.items())


def test_names_are_unique_and_usable_anywhere(config: ModelConfig) -> None:
    for part in parts(config).values():
        names = [spec.name for spec in part.inputs + part.heads + part.outputs]
        assert len(set(names)) == len(names)
        assert all(re.fullmatch(r"[a-z][a-z0-9_.]*", name) for name in names)


def test_axes_are_sizes_or_letters_with_an_example(config: ModelConfig) -> None:
    for part in parts(config).values():
        letters = {axis for spec in part.inputs for axis in spec.axes if isinstance(axis, str)}
        assert letters <= EXAMPLE_SIZES.keys()
        for spec in part.inputs + part.heads + part.outputs:
            assert all(axis in LETTERS if isinstance(axis, str) else axis >= 0 for axis in spec.axes), spec
        # A batch leads wherever there is one: a server can join requests along it.
        leads = {spec.axes[0] for spec in part.inputs + part.outputs}
        assert leads in ({"B"}, {"N"}), part.name


def test_a_tensor_means_the_same_in_every_part(config: ModelConfig) -> None:
    """What one part gives and another takes has one name, type and shape: a clip's stages fit without glue."""
    table = parts(config)
    known = {spec.name: spec for name in CLIP_ORDER for spec in table[name].outputs}
    for name in ("voice_projector", "face_projector", "scene_projector"):
        assert all(known[spec.name] == spec for spec in table[name].inputs)
    assert table[EMBEDDING].outputs[0] == table[DECODER].inputs[0]
    d = config.backbone.hidden_size
    assert all(table[f"{n}_projector"].outputs[0].axes[-1] == d for n in ("voice", "face", "scene"))


def test_state_pairs_are_the_same_buffer(config: ModelConfig) -> None:
    part = parts(config)[DECODER]
    inputs, outputs = ({spec.name: spec for spec in specs} for specs in (part.inputs, part.outputs))
    assert len(part.state) == 2 * config.backbone.layers
    for read, written in part.state:
        assert dataclasses.replace(inputs[read], name=written) == outputs[written]
        assert inputs[read].axes == ("B", config.backbone.kv_heads, "L", config.backbone.head_size)
    assert ("gate_state" in inputs) == ("gate_state_out" in outputs) == (config.mose.route is Route.MODALITY)


def test_heads_are_what_a_model_carries(config: ModelConfig) -> None:
    specs, model_heads = heads(config), zero_heads(config)
    assert [spec.name for spec in specs] == list(model_heads)
    for spec in specs:
        assert tuple(model_heads[spec.name].shape) == spec.axes and spec.dtype is DType.F32
    layers, targets, mose = config.backbone.layers, config.mose.targets, config.mose
    assert len(specs) == 1 + layers * (3 * len(targets) + 1)
    axes = {spec.name: spec.axes for spec in specs}
    groups = len(config.groups)
    assert axes[MODALITY_WEIGHT] == (groups,)
    assert axes[f"layers.{layers - 1}.ar_params"] == (config.backbone.heads, len(AR_PARAMS))
    for target in targets:
        wide, out = config.backbone.linear_size(target)
        assert axes[f"layers.0.{target}.a"] == (mose.rank * (1 if mose.share_a else groups), wide)
        assert axes[f"layers.0.{target}.gate"] == (groups * mose.experts, wide)
        assert axes[f"layers.0.{target}.b"] == (groups * mose.experts * mose.rank, out)


def test_every_part_answers_as_promised(config: ModelConfig) -> None:
    model = toy_model(config)
    for part in parts(config).values():
        tensors = inputs_of(config, part)
        sizes, outputs = sizes_of(part, tensors), model.run(part.name, tensors)
        assert {spec.name for spec in part.outputs} <= outputs.keys(), part.name
        for spec in part.outputs:
            found = outputs[spec.name]
            if not config.mose.targets and spec.name == "expert_weights":
                continue  # no rows to speak of: [B, 0, S, 0]
            assert found.dtype is getattr(torch, spec.dtype.value), spec
            assert found.ndim == len(spec.axes), spec
            for size, axis in zip(found.shape, spec.axes, strict=True):
                assert size == (sizes.setdefault(axis, size) if isinstance(axis, str) else axis), spec
            assert found.isfinite().all(), spec


def inputs_of(config: ModelConfig, part: Part) -> dict[str, torch.Tensor]:
    if part.name == DECODER:
        return decoder_inputs(config, batch=2, rows=5, capacity=11)
    generator, sizes = torch.Generator().manual_seed(0), {"B": 2, "N": 3, "T": 40, "S": 5}
    tensors = {spec.name: random_tensor(spec, sizes, generator) for spec in part.inputs}
    if part.name == "voice":
        tensors["voice_frames"] = torch.tensor([20, 7]).int()
    return tensors


def test_element_types_have_one_name_everywhere() -> None:
    for dtype in DType:
        assert dtype.numpy == np.dtype(dtype.value) and (dtype is DType.STRING or hasattr(torch, dtype.value))


def test_no_tensor_name_is_spelled_out_beside_the_contract() -> None:
    """ONNX input and output names come from the contract: no exporter or backend repeats the cache's or the heads'."""
    root = Path(__file__).parents[1]
    forbidden = re.compile(r"""f?["'](?:key|value)_(?:\d|\{[^}]*\}_out)""")
    files = [*(root / "engine" / "mosear" / "backends").glob("*.py"), *(root / "export" / "mosear_export").glob("*.py")]
    assert files
    for path in files:
        assert not forbidden.search(path.read_text()), path


def test_shapes_of_the_decoder_follow_the_backbone() -> None:
    for shape, count in itertools.product((GROUPED, FULL), (1, 5)):
        backbone = dataclasses.replace(shape, layers=count)
        part = parts(toy_config(backbone=backbone))[DECODER]
        axes = {spec.name: spec.axes for spec in part.outputs}
        assert axes["logits"] == ("B", "Q", backbone.vocab_size)
        assert axes["mass_before"] == axes["mass_after"] == ("B", count, backbone.heads, "S", 3)
        assert axes["expert_weights"] == ("B", 3 * count, "S", 2)
