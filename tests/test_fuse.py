"""Fusions before a build: fewer nodes, the same outputs."""

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
from test_plain_flavour import COMBINATIONS, Exported
from tolerance import assert_close
from toy import decoder_inputs, toy_config

from mosear.contract import DECODER
from mosear.recipe import Precision, Recipe
from mosear_export.build import prepare_decoder

LINEARS = 7
LINEARS_LEFT = 4  # of a layer: q, k and v; o; gate and up; down


@pytest.mark.parametrize("choice", COMBINATIONS)
def test_a_fused_decoder_computes_the_same(choice: str, tmp_path: Path) -> None:
    decoder = Exported(toy_config(**COMBINATIONS[choice]), DECODER, tmp_path)
    tensors = decoder_inputs(decoder.model.config, batch=2, rows=9, capacity=19, lengths=[9, 6])
    wanted = decoder.run(tensors)
    model, layers = onnx.load(decoder.path), decoder.model.config.backbone.layers
    before = Counter(node.op_type for node in model.graph.node)
    model = prepare_decoder(model, Recipe(name="toy"), {})
    after = Counter(node.op_type for node in model.graph.node)
    assert before["MatMul"] - after["MatMul"] == (LINEARS - LINEARS_LEFT) * layers
    assert after["SkipSimplifiedLayerNormalization"] == 2 * layers - 1 and after["RMSNormalization"] == 2
    decoder.session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    live = tensors["position"] >= 0
    for name, value in decoder.run(tensors).items():
        rows = live if name == "logits" else ...
        assert_close(value[rows], wanted[name][rows], "toy")


def test_int8_takes_every_linear_layer_and_no_head(tmp_path: Path) -> None:
    decoder = Exported(toy_config(), DECODER, tmp_path)
    recipe = Recipe(name="toy", precision=Precision.INT8, block=16)
    model = prepare_decoder(onnx.load(decoder.path), recipe, {})
    count = Counter(node.op_type for node in model.graph.node)
    assert count["MatMulNBits"] == LINEARS_LEFT * decoder.model.config.backbone.layers + 1 and not count["MatMul"]
    assert {value.name for value in model.graph.input} >= {"layers.0.q_proj.a", "layers.0.q_proj.b"}


def test_baked_heads_are_constants_and_no_inputs(tmp_path: Path) -> None:
    decoder = Exported(toy_config(), DECODER, tmp_path)
    heads = {spec.name: decoder.model.heads[spec.name].numpy() for spec in decoder.part.heads}
    model = prepare_decoder(onnx.load(decoder.path), Recipe(name="toy"), heads)
    assert heads.keys() <= {tensor.name for tensor in model.graph.initializer}
    assert not heads.keys() & {value.name for value in model.graph.input}
