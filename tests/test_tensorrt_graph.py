"""What TensorRT is given, run by ONNX Runtime against the reference: in fp32, in 16 bits, with narrower weights."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from test_plain_flavour import CHOICES, COMBINATIONS, USUAL, Exported
from tolerance import assert_close
from toy import AR, decoder_inputs, toy_config

from mosear.config import ModelConfig, Policy, Select
from mosear.contract import DECODER, Tensors, parts
from mosear.recipe import Heads, Precision, Recipe, TensorRT
from mosear.recipe import Target as Runtime
from mosear_export import fuse, pack
from mosear_export.golden import SIZES, inputs_of, relative_errors
from mosear_export.masked import attend_masked
from mosear_export.tensorrt_graph import fp8, integers, prepare_decoder, prepare_part, stored_head

# RMS error of an output relative to its own RMS, a toy of two or three layers against the fp32 reference. What is exact is
# held to in fp32 below; these bound what 16 bits and narrower weights add, which the toy's steep gates magnify. Worst measured
# (logits, experts on all seven linears): fp16 0.038, bf16 0.26, int8 0.19, fp8 0.29; of the other combinations 0.011, 0.073,
# 0.057, 0.23. No width of the toy is a multiple of 128, so int4 is int8 here.
TOLERANCE = {Precision.FP16: 0.05, Precision.BF16: 0.35, Precision.INT8: 0.25, Precision.INT4: 0.25, Precision.FP8: 0.4}
# Of parts without gates.
NARROW = {Precision.FP16: 2e-2, Precision.BF16: 0.15}
BATCH, ROWS, CAPACITY = 2, 9, 19


def recipe(precision: Precision = Precision.FP16, **changes: Any) -> Recipe:  # Any: a field of Recipe each
    chips = TensorRT(compute_capabilities=("8.9",))
    block = 128 if precision is Precision.INT4 else 32
    made = Recipe(name="toy", target=Runtime.TENSORRT_RTX, precision=precision, block=block, tensorrt=chips)
    return dataclasses.replace(made, **changes)


def inputs(decoder: Exported, *, rows: int = ROWS, start: int = 0, **changes: Any) -> dict[str, torch.Tensor]:
    """A call whose last rows alone are reallocated; the second sequence is shorter by three rows where there are so many."""
    short = 3 if rows > 3 else 0
    made = decoder_inputs(
        decoder.model.config, batch=BATCH, rows=rows, capacity=CAPACITY, start=start,
        lengths=[start + rows, start + rows - short],
    )  # fmt: skip
    return {**made, "first_row": made["key_length"] - 1, **changes}


def run(model: onnx.ModelProto, feeds: Tensors) -> Tensors:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = {"tensor(float16)": np.float16}
    given = {i.name: feeds[i.name].astype(kinds.get(i.type, feeds[i.name].dtype)) for i in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, given), strict=True))


def prepared(decoder: Exported, made: Recipe, *, emulate: bool = False) -> tuple[onnx.ModelProto, Tensors]:
    part = parts(decoder.model.config)[DECODER]
    return prepare_decoder(
        onnx.load(decoder.path), decoder.model.config, made, decoder.heads, part, emulate=emulate
    )  # fmt: skip


def errors(
    decoder: Exported, made: Recipe, tensors: dict[str, torch.Tensor], *, emulate: bool = False
) -> dict[str, float]:
    """RMS error of each output on real rows."""
    wanted = {name: value.numpy() for name, value in decoder.run(tensors).items()}
    model, heads = prepared(decoder, made, emulate=emulate)
    feeds = {name: value.numpy() for name, value in tensors.items()} | heads
    if emulate:
        feeds |= {n: stored_head(v, n, made).astype(np.float32) for n, v in heads.items()}
    found = run(model, feeds)
    last = (tensors["key_length"] - 1 - tensors["position"][:, 0]).numpy()
    live = (tensors["position"] >= 0).numpy()
    slots = np.arange(CAPACITY) < tensors["key_length"].numpy()[:, None]
    result = {}
    for name, value in found.items():
        ours, reference = value.astype(np.float64), wanted[name].astype(np.float64)
        if name.startswith("mass"):
            reference = np.stack([reference[i, :, :, row : row + 1] for i, row in enumerate(last)])
        elif name == "logits":
            ours, reference = ours[live], reference[live]
        elif name == "expert_weights":
            ours, reference = (x.transpose(0, 2, 1, 3)[live] for x in (ours, reference))
        elif name.startswith(("key", "value")):
            ours, reference = (x.transpose(0, 2, 1, 3)[slots] for x in (ours, reference))
        assert ours.shape == reference.shape, name
        result[name] = relative_errors(ours, reference)[1]
    print({name: f"{error:.1e}" for name, error in result.items()})
    return result


Export = Callable[..., Exported]


@pytest.fixture(scope="module")
def exported(shared: Path) -> Export:
    """Parts of toys (of a configuration, and the part's name), each made once."""

    @functools.cache
    def made(config: ModelConfig, name: str = DECODER) -> Exported:
        return Exported(config, name, shared)

    return made


WIDEST = "balance-mean top1 token own-a"  # experts on all seven linears: the largest errors


@pytest.fixture(scope="module", params=CHOICES)
def decoder(request: pytest.FixtureRequest, exported: Export) -> Exported:
    return exported(softened(COMBINATIONS[request.param]))


def softened(changes: dict[str, Any]) -> ModelConfig:
    """A configuration with soft gates: in 16 bits the best of two near experts may be the other one, and all jumps."""
    config = toy_config(**changes)
    return dataclasses.replace(config, mose=dataclasses.replace(config.mose, select=Select.SOFT))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("rows", [ROWS, pytest.param(1, marks=pytest.mark.full)])
def test_in_fp32_it_is_the_reference(choice: str, rows: int, exported: Export) -> None:
    """The mask's form itself, on rows that are real."""
    decoder = exported(toy_config(**COMBINATIONS[choice]))
    tensors = inputs(decoder, rows=rows, start=3)
    wanted = {name: value.numpy() for name, value in decoder.run(tensors).items()}
    model = onnx.load(decoder.path)
    fuse.merge_linears(model)
    heads = pack.pack(model, decoder.model.config, decoder.heads)
    heads = attend_masked(model, decoder.model.config, heads)
    found = run(model, {name: value.numpy() for name, value in tensors.items()} | heads)
    live, last = (tensors["position"] >= 0).numpy(), (tensors["key_length"] - 1 - tensors["position"][:, 0]).numpy()
    assert_close(found["logits"][live], wanted["logits"][live], "toy")
    for name in ("mass_before", "mass_after"):
        reference = np.stack([wanted[name][i, :, :, row : row + 1] for i, row in enumerate(last)])
        assert_close(found[name], reference, "toy")


@pytest.fixture(scope="module")
def simple(exported: Export) -> Exported:
    return exported(toy_config())


def usual(name: str, precision: Precision) -> bool:
    """fp16 of the usual combinations, narrower types of the widest (int4 is int8 in a toy)."""
    if precision is Precision.FP16:
        return name in USUAL
    return name == WIDEST and precision is not Precision.INT4


@pytest.mark.parametrize(
    ("decoder", "precision"),
    [
        pytest.param(name, precision, marks=[] if usual(name, precision) else pytest.mark.full)
        for name in COMBINATIONS
        for precision in TOLERANCE
    ],
    indirect=["decoder"],
)
def test_a_prefill_is_the_references(decoder: Exported, precision: Precision) -> None:
    found = errors(decoder, recipe(precision), inputs(decoder), emulate=True)
    assert max(found.values()) <= TOLERANCE[precision], found


@pytest.mark.parametrize("strength", [pytest.param(0.0, marks=pytest.mark.full), 1.0])
def test_16_bits_themselves_run_and_are_as_near(decoder: Exported, strength: float) -> None:
    tensors = inputs(decoder, strength=torch.full((BATCH,), strength))
    assert max(errors(decoder, recipe(), tensors).values()) <= TOLERANCE[Precision.FP16]


def test_a_decoded_token_is_the_references(decoder: Exported) -> None:
    assert max(errors(decoder, recipe(), inputs(decoder, rows=1, start=11)).values()) <= TOLERANCE[Precision.FP16]


def test_strength_0_is_attention_without_masses_to_move(simple: Exported) -> None:
    model, heads = prepared(simple, recipe())
    tensors = {name: value.numpy() for name, value in inputs(simple, strength=torch.zeros(BATCH)).items()}
    found = run(model, tensors | heads)
    np.testing.assert_allclose(found["mass_after"], found["mass_before"], atol=1e-6)
    moved = run(model, tensors | heads | {"strength": np.ones(BATCH, np.float32)})
    assert np.abs(moved["mass_after"] - moved["mass_before"]).max() > 0.05  # the policy of the toy acts


@pytest.mark.parametrize("gap", [10.0, 40.0, 75.0])
def test_a_group_far_below_the_others_is_raised_in_full(gap: float, exported: Export) -> None:
    """One maximum for all groups would lose it in 16 bits from a gap of 17 on."""
    decoder = exported(toy_config(**COMBINATIONS["target soft modality shared"]))
    bias = torch.tensor([[0.0, 0.0, -gap, 0.0]] * BATCH)  # audio
    tensors = inputs(decoder, rows=1, start=11, strength=torch.ones(BATCH), group_bias=bias)
    found = errors(decoder, recipe(), tensors)
    assert found["mass_after"] <= 6e-3 and found["logits"] <= 2e-2, found


def test_a_muted_group_changes_nothing(simple: Exported) -> None:
    """To the bit: the muted keys' own numbers are never read."""
    model, heads = prepared(simple, recipe())
    bias = torch.tensor([[0.0, 0.0, -torch.inf]] * BATCH)
    tensors = inputs(simple, rows=1, start=11, group_bias=bias, strength=torch.ones(BATCH))
    feeds = {name: value.numpy() for name, value in tensors.items()} | heads
    audio = (feeds["key_group"] == 2)[:, None, :, None] & (np.arange(CAPACITY) < 11)[None, None, :, None]
    other = {
        n: np.where(audio, v + 3, v) if n.startswith(("key_0", "key_1", "value_")) else v for n, v in feeds.items()
    }
    assert any((other[name] != feeds[name]).any() for name in feeds)
    first, second = run(model, feeds), run(model, other)
    np.testing.assert_array_equal(first["logits"], second["logits"])
    assert not first["mass_before"][..., 2].any()


def test_weights_and_cache_are_16_bits_and_nothing_else_is(simple: Exported) -> None:
    model, heads = prepared(simple, recipe())
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    narrow = {name for name, kind in kinds.items() if kind == onnx.TensorProto.FLOAT16}
    matrices = {name for name in heads if name.endswith((".down", ".up"))}
    assert matrices and narrow == matrices | {name for pair in simple.part.state for name in pair[:1]}
    weights = {t.name: t.data_type for t in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    constant = [node.input[1] for node in products if node.input[1] in weights]
    assert len(constant) == 4 * simple.model.config.backbone.layers + 2  # and the head, and the fold of the gates
    assert {weights[name] for name in constant} == {onnx.TensorProto.FLOAT16}
    assert not [
        t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) > 24 * 64
    ]


def test_inputs_that_nothing_reads_are_left_out(simple: Exported) -> None:
    model, heads = prepared(simple, recipe())
    assert not [name for name in heads if name.endswith("audio_share")]  # of the policy `target` alone
    off = dataclasses.replace(simple.model.config, ar=dataclasses.replace(AR, policy=Policy.OFF))
    without, _ = prepare_decoder(
        onnx.load(simple.path), off, recipe(), simple.heads, parts(off)[DECODER]
    )  # fmt: skip
    missing = {v.name for v in model.graph.input} - {v.name for v in without.graph.input}
    assert {"strength", "first_row"} <= missing


def test_baked_heads_compute_the_same(simple: Exported) -> None:
    model, heads = prepared(simple, recipe(heads=Heads.BAKED))
    assert not heads and not [v.name for v in model.graph.input if v.name.startswith("layers.")]
    tensors = {name: value.numpy() for name, value in inputs(simple).items()}
    bound, values = prepared(simple, recipe())
    first, second = run(model, tensors), run(bound, tensors | values)
    assert relative_errors(first["logits"], second["logits"])[1] < 2e-3


def test_a_matrix_in_integers_is_near() -> None:
    value = np.random.default_rng(0).standard_normal((256, 40)).astype(np.float32)
    for weight, limit in (
        (integers("w", value, "w16", bits=8, block=0), 0.01),
        (integers("w", value, "w16", bits=4, block=128), 0.12),
        (fp8("w", value, "w16"), 0.03),
    ):
        assert relative_errors(weight.value, value)[1] < limit
        graph = onnx.helper.make_graph(
            [weight.node], "w", [], [onnx.helper.make_tensor_value_info("w16", 10, value.shape)], list(weight.tensors)
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=10)
        np.testing.assert_allclose(run(model, {})["w16"], weight.value.astype(np.float16), atol=1e-3)


OTHERS = ["voice", "face", *(pytest.param(n, marks=pytest.mark.full) for n in ("face_detector", "scene", "embedding"))]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("precision", [Precision.FP16, pytest.param(Precision.BF16, marks=pytest.mark.full)])
def test_other_parts_in_16_bits(name: str, precision: Precision, exported: Export) -> None:
    part = exported(toy_config(), name)
    tensors = inputs_of(part.part, part.model, SIZES, seed=0)
    wanted = part.run(tensors)
    model = prepare_part(onnx.load(part.path), recipe(precision), emulate=True)
    for output, value in run(model, {n: t.numpy() for n, t in tensors.items()}).items():
        error = relative_errors(value, wanted[output].numpy())[1]
        print(output, error)
        assert error <= NARROW[precision]
