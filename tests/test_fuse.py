"""What a build makes of a decoder (fusions, packed heads, 8 bits): fewer nodes, the same outputs."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from test_plain_flavour import CHOICES, COMBINATIONS, Exported
from tolerance import assert_close
from toy import decoder_inputs, toy_config

from mosear.contract import DECODER
from mosear.recipe import Heads, Precision, Recipe
from mosear_export.build import prepare_decoder

RECIPE = Recipe(name="toy")
LINEARS = 7
LINEARS_LEFT = 4  # of a layer: q, k and v; o; gate and up; down


@pytest.mark.parametrize("choice", CHOICES)
def test_a_fused_decoder_computes_the_same(choice: str, shared: Path) -> None:
    decoder = Exported(toy_config(**COMBINATIONS[choice]), DECODER, shared)
    tensors = decoder_inputs(decoder.model.config, batch=2, rows=9, capacity=19, lengths=[9, 6])
    wanted = decoder.run(tensors)
    model, layers = onnx.load(decoder.path), decoder.model.config.backbone.layers
    before = Counter(node.op_type for node in model.graph.node)
    model, heads = prepare_decoder(model, decoder.model.config, RECIPE, decoder.heads)
    after = Counter(node.op_type for node in model.graph.node)
    folds = "own_group" in {tensor.name for tensor in model.graph.initializer}  # one product of all gates
    assert before["MatMul"] - after["MatMul"] + folds == (LINEARS - LINEARS_LEFT) * layers
    assert after["SkipSimplifiedLayerNormalization"] == 2 * layers - 1 and after["RMSNormalization"] == 2
    decoder.session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    decoder.heads = {
        name: value for name, value in heads.items() if name in {i.name for i in decoder.session.get_inputs()}
    }
    live = tensors["position"] >= 0
    for name, value in decoder.run(tensors).items():
        rows = live if name == "logits" else ...
        assert_close(value[rows], wanted[name][rows], "toy")


def test_experts_of_linears_with_one_input_are_joined(shared: Path) -> None:
    decoder = Exported(toy_config(), DECODER, shared)
    model, heads = prepare_decoder(onnx.load(decoder.path), decoder.model.config, RECIPE, decoder.heads)
    experts = [node for node in model.graph.node if node.op_type.startswith("JointModalityExperts")]
    assert [node.op_type[-1] for node in experts] == ["2", "1"] * decoder.model.config.backbone.layers
    rank, groups, width = 3, 3 * 2, 24
    assert heads["layers.0.q_proj_v_proj.down"].shape == (width, 2 * (rank + groups))
    assert {value.name for value in model.graph.input} - {spec.name for spec in decoder.part.inputs} == heads.keys()
    assert heads["layers.0.q_proj_v_proj.up"].shape == (2 * groups * rank, (6 + 2 + 2) * 8)
    assert not heads["layers.0.q_proj_v_proj.up"][:, 6 * 8 : 8 * 8].any()  # k has no experts
    twice = dict(decoder.heads, modality_weight=2 * decoder.heads["modality_weight"])
    other = prepare_decoder(onnx.load(decoder.path), decoder.model.config, RECIPE, twice)[1]
    np.testing.assert_array_equal(other["layers.1.down_proj.up"], 2 * heads["layers.1.down_proj.up"])


def test_int8_takes_every_linear_layer_and_no_head(shared: Path) -> None:
    decoder = Exported(toy_config(), DECODER, shared)
    recipe = Recipe(name="toy", precision=Precision.INT8, block=16)
    model, heads = prepare_decoder(onnx.load(decoder.path), decoder.model.config, recipe, decoder.heads)
    count = Counter(node.op_type for node in model.graph.node)
    assert count["MatMulNBits"] == LINEARS_LEFT * decoder.model.config.backbone.layers + 1
    assert count["MatMul"] == 1  # of the gates, with a constant that is no weight
    assert heads.keys() <= {value.name for value in model.graph.input}


def test_baked_heads_are_constants_and_no_inputs(shared: Path) -> None:
    decoder = Exported(toy_config(), DECODER, shared)
    recipe = Recipe(name="toy", heads=Heads.BAKED)
    model, heads = prepare_decoder(onnx.load(decoder.path), decoder.model.config, recipe, decoder.heads)
    assert not heads and "layers.0.q_proj_v_proj.up" in {tensor.name for tensor in model.graph.initializer}
    assert {value.name for value in model.graph.input} == {spec.name for spec in decoder.part.inputs}
