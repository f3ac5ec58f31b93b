"""Exported parts, mechanisms in plain operators, on ONNX Runtime against the reference; and the probe that guards the axes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tolerance import assert_close, clear_rows
from torch import Tensor
from toy import AR, FULL, GROUPED, decoder_inputs, next_state, toy_config, toy_model
from toy_exports import export_toy

from mosear.config import ModelConfig, MoSEConfig, Policy, Route, Select, Statistic, Target
from mosear.contract import DECODER, EMBEDDING, MODALITY_WEIGHT, Part, parts
from mosear.errors import EngineError
from mosear_export.model.whole import ReferenceModel
from mosear_export.ops import ATTENTION, DOMAIN, EXPERTS, OPSET
from mosear_export.probe import BASE, probe_axes
from mosear_export.to_onnx import PartModule, example_tensor, quiet

VIDEO, AUDIO, CAPACITY = 1, 2, 19

# Every value of every choice at least once.
COMBINATIONS: dict[str, dict[str, Any]] = {  # Any: a field of ModelConfig each
    "balance-sum soft token shared": {"backbone": GROUPED, "ar": AR},
    "balance-mean top1 token own-a": {
        "backbone": FULL,
        "ar": dataclasses.replace(AR, statistic=Statistic.MEAN),
        "mose": MoSEConfig(targets=tuple(Target), rank=2, experts=3, select=Select.TOP1, share_a=False),
    },
    "target soft modality shared": {
        "backbone": GROUPED,
        "groups": ("text", "video", "audio", "sink"),
        "ar": dataclasses.replace(AR, policy=Policy.TARGET),
        "mose": MoSEConfig(targets=(Target.O_PROJ, Target.UP_PROJ), rank=3, route=Route.MODALITY),
    },
    "off top1 modality own-a": {
        "backbone": FULL,
        "ar": dataclasses.replace(AR, policy=Policy.OFF),
        "mose": MoSEConfig(
            targets=(Target.K_PROJ, Target.GATE_PROJ), rank=1, route=Route.MODALITY, select=Select.TOP1, share_a=False
        ),
    },
    "balance-sum one-expert one-layer": {
        "backbone": dataclasses.replace(GROUPED, layers=3),
        "ar": dataclasses.replace(AR, layers=(1,)),
        "mose": MoSEConfig(targets=(Target.Q_PROJ, Target.V_PROJ), rank=4, experts=1),
    },
}
# Those of the default run: together they have each form of experts, gates and masses.
USUAL = ("balance-sum soft token shared", "balance-mean top1 token own-a", "target soft modality shared")
CHOICES = [pytest.param(name, marks=() if name in USUAL else pytest.mark.full) for name in COMBINATIONS]


class Exported:
    """A toy, one of its parts as an ONNX file, and a session on it."""

    def __init__(self, config: ModelConfig, name: str, shared: Path) -> None:
        self.model, self.part = toy_model(config), parts(config)[name]
        self.heads = {spec.name: self.model.heads[spec.name].numpy() for spec in self.part.heads}
        self.path = export_toy(config, name, shared)
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.session = ort.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])

    def run(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        feeds = {name: tensor.numpy() for name, tensor in tensors.items()}
        feeds |= self.heads
        names = [spec.name for spec in self.part.outputs]
        return {n: torch.from_numpy(value) for n, value in zip(names, self.session.run(names, feeds), strict=True)}


@pytest.fixture(scope="module", params=CHOICES)
def decoder(request: pytest.FixtureRequest, shared: Path) -> Exported:
    return Exported(toy_config(**COMBINATIONS[request.param]), DECODER, shared)


@pytest.fixture(scope="module")
def embedding(shared: Path) -> Exported:
    return Exported(toy_config(), EMBEDDING, shared)


def test_names_and_axes_are_the_contracts(decoder: Exported) -> None:
    proto = onnx.load(decoder.path, load_external_data=False)
    onnx.checker.check_model(str(decoder.path), full_check=True)
    part = decoder.part
    for values, specs in (
        (proto.graph.input, part.inputs + part.heads),
        (proto.graph.output, part.outputs),
    ):
        found = {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}
        assert found == {spec.name: spec.axes for spec in specs}
    assert [v.name for v in proto.graph.input] == [spec.name for spec in part.inputs + part.heads]
    opsets = {o.domain: o.version for o in proto.opset_import}
    assert opsets[""] == OPSET and opsets[DOMAIN] == 1


def test_each_layer_calls_the_mechanisms_by_name(decoder: Exported) -> None:
    """A runtime with kernels of its own finds them in the same file; attributes say which variant is meant."""
    config = decoder.model.config
    proto = onnx.load(decoder.path, load_external_data=False)
    calls = [node for node in proto.graph.node if node.domain == DOMAIN]
    layers, targets = config.backbone.layers, len(config.mose.targets)
    assert sum(node.op_type == ATTENTION for node in calls) == layers
    assert sum(node.op_type == EXPERTS for node in calls) == layers * targets == len(calls) - layers
    for node in calls:
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        expected: dict[str, object] = {
            "policy": str(config.ar.policy).encode(),
            "statistic": str(config.ar.statistic).encode(),
            "scale": pytest.approx(config.backbone.head_size**-0.5),
        }
        if node.op_type == EXPERTS:
            mose = config.mose
            expected = {"select": str(mose.select).encode(), "route": str(mose.route).encode()}
            expected["scale"] = pytest.approx(mose.scale)
        assert given == expected
    assert {f.name for f in proto.functions if f.domain == DOMAIN} == {ATTENTION, EXPERTS}


def test_prefill_and_decoding_are_the_reference(decoder: Exported) -> None:
    """A ragged prompt and three tokens after it, each side on its own cache; one request mutes the voice."""
    config, part, lengths = decoder.model.config, decoder.part, [9, 6, 1]
    bias = torch.zeros(3, len(config.groups))
    bias[1, AUDIO] = -torch.inf
    fixed = {"group_bias": bias, "first_row": torch.tensor([0, 4, 2]).int()}
    call = decoder_inputs(config, batch=3, rows=9, capacity=CAPACITY, lengths=lengths, **fixed)
    ours, theirs = decoder.run(call), decoder.model.run(DECODER, call)
    moved = False
    for step in range(4):
        clear = clear_rows(theirs["mass_before"][..., [VIDEO, AUDIO]].sum(-1), config.ar.sigma)
        assert clear.all()  # a row at the jump would move all that comes after it
        live = call["position"] >= 0  # [B, S]
        for spec in part.outputs:
            a, e = ours[spec.name], theirs[spec.name]
            if spec.name == "logits":
                a, e = a[live], e[live]
            elif spec.name.endswith("_out") and "L" in spec.axes:  # slots that hold something
                filled = torch.arange(CAPACITY) < call["key_length"][:, None]
                a, e = (t.transpose(1, 2)[filled] for t in (a, e))
            assert_close(a, e, "toy")
        moved |= bool((theirs["mass_after"] != theirs["mass_before"]).any())
        start = [n + step for n in lengths]
        call = decoder_inputs(config, batch=3, rows=1, capacity=CAPACITY, start=start, **fixed)
        ours = decoder.run(call | next_state(part, ours))
        theirs = decoder.model.run(DECODER, call | next_state(part, theirs))
    assert moved == (config.ar.policy is not Policy.OFF)


def test_a_muted_voice_changes_no_bit(decoder: Exported) -> None:
    config = decoder.model.config
    bias = torch.zeros(2, len(config.groups))
    bias[:, AUDIO] = -torch.inf
    call = decoder_inputs(config, batch=2, rows=8, capacity=CAPACITY, group_bias=bias)
    audio = (call["group"] == AUDIO)[:, :, None]
    other = call | {"hidden": torch.where(audio, 5 - 3 * call["hidden"], call["hidden"])}
    assert audio.any() and not audio.all()
    ours, theirs = decoder.run(call)["logits"], decoder.run(other)["logits"]
    rest = ~audio.expand_as(ours)
    assert ours[rest].equal(theirs[rest])


def test_heads_are_inputs(decoder: Exported) -> None:
    """A changed expert changes the answer with no new file, as it does in the reference."""
    config, model = decoder.model.config, decoder.model
    call = decoder_inputs(config, batch=1, rows=6, capacity=CAPACITY)
    before, kept = decoder.run(call)["logits"], model.heads[MODALITY_WEIGHT]
    model.heads[MODALITY_WEIGHT] = 2 * kept
    decoder.heads[MODALITY_WEIGHT] = 2 * kept.numpy()
    try:
        after = decoder.run(call)["logits"]
        assert not after.equal(before)
        assert_close(after, model.run(DECODER, call)["logits"], "toy")
    finally:
        model.heads[MODALITY_WEIGHT] = kept
        decoder.heads[MODALITY_WEIGHT] = kept.numpy()


def test_every_axis_of_a_decoder_moves(decoder: Exported) -> None:
    probe_axes(decoder.model, decoder.part, decoder.path)


@pytest.mark.full  # a toy's export probes each part before it ends
@pytest.mark.parametrize("name", [name for name in parts(toy_config()) if name not in (DECODER, EMBEDDING)])
def test_every_axis_of_the_other_parts_moves(name: str, shared: Path) -> None:
    exported = Exported(toy_config(), name, shared)
    probe_axes(exported.model, exported.part, exported.path)


def test_every_axis_of_the_embedding_moves(embedding: Exported) -> None:
    probe_axes(embedding.model, embedding.part, embedding.path)


def export_fixed(model: ReferenceModel, part: Part, path: Path) -> None:
    """As export_part, but all axes are the probe's base sizes."""
    with quiet():
        program = torch.onnx.export(
            PartModule(model, part),
            tuple(example_tensor(spec, BASE) for spec in part.inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in part.inputs],
            output_names=[spec.name for spec in part.outputs],
            verbose=False,
        )
    assert program is not None
    onnx.save(program.model_proto, path)


def test_the_probe_finds_a_graph_of_fixed_size(embedding: Exported, tmp_path: Path) -> None:
    path = tmp_path / "fixed.onnx"
    export_fixed(embedding.model, embedding.part, path)
    with pytest.raises(EngineError, match=r"(?s)fixed\.onnx at B size 3 does not run: .*holds a fixed size"):
        probe_axes(embedding.model, embedding.part, path)


@pytest.mark.parametrize("axis", ["B", "S", "L", "Q"])
def test_the_probe_names_the_decoders_fixed_axis(axis: str, shared: Path, tmp_path: Path) -> None:
    toy = Exported(toy_config(), DECODER, shared)
    proto = onnx.load(toy.path)
    for value in proto.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == axis:
                dim.dim_value = BASE[axis]
    onnx.save(proto, tmp_path / f"fixed_{axis}.onnx")
    with pytest.raises(EngineError, match=rf"fixed_{axis}\.onnx at {axis} size \d+ does not run"):
        probe_axes(toy.model, toy.part, tmp_path / f"fixed_{axis}.onnx")


def _constant(name: str, *values: int, scalar: bool = False) -> TensorProto:
    array = torch.tensor(values[0] if scalar else values).numpy()
    return numpy_helper.from_array(array, name)


def reshaped(graph: onnx.GraphProto) -> None:
    """The base size of S in a shape: with more rows the batch grows in their place."""
    graph.initializer.append(_constant("fixed_shape", -1, BASE["S"], 24))
    graph.node.append(helper.make_node("Reshape", ["inner", "fixed_shape"], ["hidden"]))


def repeated(graph: onnx.GraphProto) -> None:
    """Rows past the base size repeat the first ones: the shape is right, the values are not."""
    graph.initializer.extend([_constant("at", 1, scalar=True), _constant("nil", 0, scalar=True)])
    graph.initializer.append(_constant("size", BASE["S"], scalar=True))
    graph.node.extend(
        [
            helper.make_node("Shape", ["inner"], ["shape"]),
            helper.make_node("Gather", ["shape", "at"], ["rows"]),
            helper.make_node("Range", ["nil", "rows", "at"], ["row"]),
            helper.make_node("Mod", ["row", "size"], ["wrapped"]),
            helper.make_node("Gather", ["inner", "wrapped"], ["hidden"], axis=1),
        ]
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (reshaped, r"at S size 6: hidden has shape \[2, 3, 24\], the reference \[1, 6, 24\]"),
        (repeated, r"at S size 6: hidden differs from the reference by .* RMS"),
    ],
)
def test_the_probe_compares_shapes_and_values(
    embedding: Exported, tmp_path: Path, damage: Callable[[onnx.GraphProto], None], message: str
) -> None:
    proto = onnx.load(embedding.path)
    for node in proto.graph.node:
        for i, name in enumerate(node.output):
            if name == "hidden":
                node.output[i] = "inner"
    damage(proto.graph)
    path = tmp_path / "damaged.onnx"
    onnx.save(proto, path)
    with pytest.raises(EngineError, match=message):
        probe_axes(embedding.model, embedding.part, path)
