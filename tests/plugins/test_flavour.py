"""The decoder with plugin nodes gives what the plain flavour gives: prefill, decode, strengths, muting, a mixed batch."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from graph_executor import executor
from onnx import TensorProto, helper
from tolerance import assert_close, clear_rows
from torch import Tensor
from toy import AR, GROUPED, decoder_inputs, next_state, toy_config, toy_model
from toy_exports import export_toy

from mosear.config import ModelConfig, MoSEConfig, Policy, Route, Select, Statistic, Target
from mosear.contract import DECODER, parts
from mosear.errors import EngineError
from mosear_export.ops import DOMAIN
from mosear_export.plugin_flavour import Plugins, plugin_flavour

AUDIO, CAPACITY, LENGTHS = 2, 48, [9, 6, 1]
BACKBONE = dataclasses.replace(GROUPED, head_size=64, heads=4, kv_heads=2)
COMBINATIONS: dict[str, dict[str, Any]] = {  # Any: a field of ModelConfig each
    "balance-mean soft token shared": {
        "backbone": BACKBONE, "ar": dataclasses.replace(AR, statistic=Statistic.MEAN),
        "mose": MoSEConfig(targets=(Target.Q_PROJ, Target.V_PROJ), rank=3, experts=2),
    },
    "target top1 modality own-a": {
        "backbone": dataclasses.replace(BACKBONE, layers=1), "ar": dataclasses.replace(AR, policy=Policy.TARGET),
        "groups": ("text", "video", "audio", "sink"),
        "mose": MoSEConfig(
            targets=(Target.K_PROJ, Target.DOWN_PROJ), rank=2, experts=3, route=Route.MODALITY, select=Select.TOP1,
            share_a=False,
        ),
    },
}  # fmt: skip


USUAL = "balance-mean soft token shared"


class Both:
    """A toy's decoder in both flavours."""

    def __init__(self, config: ModelConfig, shared: Path) -> None:
        self.config, self.part = config, parts(config)[DECODER]
        model = toy_model(config)
        self.heads = {spec.name: model.heads[spec.name].numpy() for spec in self.part.heads}
        path = export_toy(config, DECODER, shared)
        self.proto = onnx.load(path)
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.plain = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.model = plugin_flavour(self.proto, config)
        self.plugins, self.launched = executor(self.model)

    def run(self, session: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:  # Any: either kind of session
        feeds = {name: tensor.numpy() for name, tensor in tensors.items()} | self.heads
        names = [spec.name for spec in self.part.outputs]
        return {n: torch.from_numpy(np.array(v)) for n, v in zip(names, session.run(names, feeds), strict=True)}


@pytest.fixture(
    scope="module", params=[USUAL, *(pytest.param(n, marks=pytest.mark.full) for n in COMBINATIONS if n != USUAL)]
)
def both(request: pytest.FixtureRequest, shared: Path) -> Both:
    return Both(toy_config(**COMBINATIONS[request.param]), shared)


def test_prefill_and_decoding_are_the_plain_flavours(both: Both) -> None:
    """A ragged batch with strengths 0, 0.4 and 1, one request muted, then two tokens of each: every step on its own cache."""
    config, part = both.config, both.part
    bias = torch.zeros(3, len(config.groups))
    bias[1, AUDIO] = -torch.inf
    fixed = {
        "group_bias": bias, "first_row": torch.tensor([0, 4, 0]).int(), "strength": torch.tensor([0.4, 1.0, 0.0]),
    }  # fmt: skip
    call = decoder_inputs(config, batch=3, rows=9, capacity=CAPACITY, lengths=LENGTHS, **fixed)
    ours, theirs = both.run(both.plugins, call), both.run(both.plain, call)
    served = [set(both.launched)]
    for step in range(3):
        compare(part, config, call, ours, theirs)
        if step == 2:
            break
        both.launched.clear()
        call = decoder_inputs(config, batch=3, rows=1, capacity=CAPACITY, start=[n + step for n in LENGTHS], **fixed)
        ours = both.run(both.plugins, call | next_state(part, ours))
        theirs = both.run(both.plain, call | next_state(part, theirs))
        served.append(set(both.launched))
    experts = {"modality_experts_shrink", "modality_experts_expand"}
    assert served == [{"nothing", "prefill"} | experts, *[{"decode_split", "decode_merge"} | experts] * 2]


def compare(
    part: Any, config: ModelConfig, call: dict[str, Tensor], ours: dict[str, Tensor], theirs: dict[str, Tensor]
) -> None:
    """All outputs of live rows and filled slots."""
    assert clear_rows(theirs["mass_before"][..., 1:3].sum(-1), config.ar.sigma).all()
    assert (theirs["mass_after"] != theirs["mass_before"]).any()
    live = call["position"] >= 0  # [B, S]
    for spec in part.outputs:
        a, e = ours[spec.name], theirs[spec.name]
        if spec.name == "logits":
            a, e = a[live], e[live]
        elif spec.name.startswith("mass"):
            a, e = (t.permute(0, 3, 1, 2, 4)[live] for t in (a, e))
        elif spec.name == "expert_weights":
            a, e = (t.transpose(1, 2)[live] for t in (a, e))
        elif spec.name.endswith("_out") and "L" in spec.axes:
            filled = torch.arange(CAPACITY) < call["key_length"][:, None]
            a, e = (t.transpose(1, 2)[filled] for t in (a, e))
        assert_close(a, e, "toy")


def test_nodes_are_bound_to_the_plugins(both: Both) -> None:
    """Two nodes to each mechanism's call, their attributes all that a kernel has as constants; names and axes stay."""
    ours = [node for node in both.model.graph.node if node.domain == DOMAIN]
    theirs = [node for node in both.proto.graph.node if node.domain == DOMAIN]
    assert len(ours) == 2 * len(theirs) and not [f for f in both.model.functions if f.domain == DOMAIN]
    for node in ours:
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert (given["plugin_namespace"], given["plugin_version"], given["aot"]) == (b"mosear", b"1", 1)
    config, mose = both.config, both.config.mose
    finish = next(node for node in ours if node.op_type == "AttentionFinish")
    given = {a.name: helper.get_attribute_value(a) for a in finish.attribute}
    assert given["policy"] == str(config.ar.policy).encode() and given["scale"] == pytest.approx(64**-0.5)
    expand = next(node for node in ours if node.op_type == "ExpertsExpand")
    given = {a.name: helper.get_attribute_value(a) for a in expand.attribute}
    assert (given["experts"], given["rank"], given["share_a"]) == (mose.experts, mose.rank, int(mose.share_a))
    assert given["width"] == BACKBONE.hidden_size
    for own, other in (
        (both.model.graph.input, both.proto.graph.input),
        (both.model.graph.output, both.proto.graph.output),
    ):
        assert [v.SerializeToString() for v in own] == [v.SerializeToString() for v in other]
    onnx.checker.check_model(both.model)


def test_activations_in_16_bits_are_cast_at_the_nodes(both: Both) -> None:
    """Floats that are no activations stay fp32: masses, policy parameters, gates."""
    model = plugin_flavour(both.proto, both.config, data="fp16")
    casts = {node.input[0]: node.attribute[0].i for node in model.graph.node if node.name.endswith(".cast")}
    finish = next(node for node in model.graph.node if node.op_type == "AttentionFinish")
    assert finish.input[0].endswith(".query.fp16") and not finish.input[7].endswith("fp16")  # query, policy_params
    assert casts[finish.output[0]] == TensorProto.FLOAT and finish.output[1] not in casts
    a = next(name for name in casts if name.endswith(".a"))
    assert casts[a] == TensorProto.FLOAT16


def test_for_the_library_a_mechanism_stays_one_node(both: Both) -> None:
    """Its attributes are the fields that the library's creator takes; its activations are cast, masses and gates not."""
    model = plugin_flavour(both.proto, both.config, data="bf16", plugins=Plugins.LIBRARY)
    kinds = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    assert kinds == {"ReallocatedAttention", "ModalityExpertsColumns"} and not model.functions
    node = next(node for node in model.graph.node if node.op_type == "ReallocatedAttention")
    assert {a.name for a in node.attribute} == {"policy", "statistic", "scale"}
    assert [name.endswith(".bf16") for name in node.input] == [True] * 3 + [False] * 7
    assert [name.endswith(".bf16") for name in node.output] == [True, False, False]
    node = next(node for node in model.graph.node if node.op_type == "ModalityExpertsColumns")
    assert {a.name for a in node.attribute} == {"columns", "select", "route", "scale"}
    assert [name.endswith(".bf16") for name in node.input] == [True, True, False, False, True, True, True, False, False]
    assert [name.endswith(".bf16") for name in node.output] == [True, False]
    with pytest.raises(EngineError, match="data is 'fp32': plugins serve fp16, bf16"):
        plugin_flavour(both.proto, both.config, plugins=Plugins.LIBRARY)


@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        ({}, "int8", "data is 'int8': plugins serve fp32, fp16, bf16"),
        ({"head_size": 32}, "fp32", "head_size is 32: attention plugins serve 64 and 128"),
        ({"heads": 18, "kv_heads": 2}, "fp32", "9 heads share a key/value head: attention plugins serve up to 8"),
    ],
)
def test_what_no_kernel_serves_is_refused(change: dict[str, int], data: str, message: str) -> None:
    config = toy_config(backbone=dataclasses.replace(BACKBONE, **change))
    with pytest.raises(EngineError, match=message):
        plugin_flavour(onnx.ModelProto(), config, data=data)


def test_a_graph_without_the_mechanisms_is_refused() -> None:
    with pytest.raises(EngineError, match="calls neither ReallocatedAttention nor ModalityExperts"):
        plugin_flavour(onnx.ModelProto(), toy_config(backbone=BACKBONE))


def test_a_head_of_unknown_width_is_refused(both: Both) -> None:
    model = onnx.ModelProto.FromString(both.proto.SerializeToString())
    for value in model.graph.input:
        if value.name.endswith(".b"):
            value.type.tensor_type.shape.dim[1].dim_param = "wide"
    with pytest.raises(EngineError, match=r"\.b is neither an input nor a constant of known width"):
        plugin_flavour(model, both.config)
