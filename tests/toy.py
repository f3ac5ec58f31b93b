"""Toy models: every part of the contract at the smallest size that its architecture allows, with seeded random weights."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper
from torch import Tensor

from mosear.config import (
    ARConfig,
    BackboneConfig,
    FaceConfig,
    ModelConfig,
    MoSEConfig,
    PromptConfig,
    SceneConfig,
    Target,
    VoiceConfig,
)
from mosear.contract import DECODER, MODALITY_WEIGHT, DType, Part, TensorSpec, parts
from mosear_export.model.decoder import Ops
from mosear_export.model.whole import ReferenceModel
from mosear_export.ops import ATTENTION, DOMAIN, INTEGERS, OPSET, VERSION
from mosear_export.plain import functions

# Three query heads to a key/value head, head_size no quotient of hidden_size, tied: the demo's kind of shape.
GROUPED = BackboneConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    layers=2,
    heads=6,
    kv_heads=2,
    head_size=8,
    rope_theta=1e5,
    norm_eps=1e-5,
    max_positions=64,
    tied_embeddings=True,
)
# Full multi-head, untied: LLaMA-2-7B's kind of shape.
FULL = dataclasses.replace(
    GROUPED, hidden_size=32, heads=4, kv_heads=4, rope_theta=1e4, norm_eps=1e-6, tied_embeddings=False
)
SHAPES = {"grouped": GROUPED, "full": FULL}

PROMPT = PromptConfig(
    prefix="<|user|>",
    face="face: {face}\n",
    scene="scene: {scene}\n",
    voice="voice: {voice}\n",
    words='words: "{words}"\n',
    classify="which emotion?",
    reason="which emotion, and why?",
    suffix="<|end|><|assistant|>",
    label_prefix="emotion:",
    reason_prefix="because",
    stop="<|end|>",
)

# A policy that acts often: with the demo's thresholds most random rows would keep their masses.
AR = ARConfig(tau_lo=0.45, tau_hi=0.55, ramp=0.3, move=0.8, audio_share=0.3)


def toy_config(**changes: Any) -> ModelConfig:  # Any: a field of ModelConfig each
    """A configuration whose whole ReferenceModel is tiny (3 M parameters, nearly all in the scene net's fixed stages)."""
    config = ModelConfig(
        name="toy",
        labels=("happy", "sad", "very angry"),
        backbone=GROUPED,
        mose=MoSEConfig(targets=(Target.Q_PROJ, Target.V_PROJ, Target.DOWN_PROJ), rank=3, alpha=4.0, experts=2),
        ar=AR,
        voice=VoiceConfig(mels=8, hidden_size=16, blocks=1, heads=2, intermediate_size=32, max_frames=100, segments=3),
        face=FaceConfig(detector_size=64, crop_size=32, feature_size=7 + 9, frames=3),
        scene=SceneConfig(image_size=64, feature_size=12, grid=2),
        prompt=PROMPT,
    )
    return dataclasses.replace(config, **changes)


def toy_model(config: ModelConfig, *, seed: int = 0, ops: Ops | None = None) -> ReferenceModel:
    """A model with random weights and heads, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ReferenceModel(config, ops)
        for name, weight in model.decoder.named_parameters():
            spread = 0.3 if name.endswith("norm.weight") else weight.shape[-1] ** -0.5
            weight.normal_(1.0 if name.endswith("norm.weight") else 0.0, spread)
        for name, head in model.heads.items():
            if not name.endswith("ar_params"):
                # Gates far enough apart that top1 has no near ties.
                # Deltas small enough that attention logits stay within the range that the plain flavour states.
                head.normal_(0.0, {"a": 1.0, "gate": 2.0, "b": 0.05}.get(name.split(".")[-1], 1.0))
        model.heads[MODALITY_WEIGHT].uniform_(0.5, 1.5)
    return model


def sizes_of(part: Part, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The size of every dynamic axis of a part in these inputs."""
    return {
        axis: size
        for spec in part.inputs
        for axis, size in zip(spec.axes, tensors[spec.name].shape, strict=True)
        if isinstance(axis, str)
    }


def random_tensor(spec: TensorSpec, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
    """Noise for floats and bytes; for integers zeros, as what they may hold depends on what they mean."""
    shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes]
    if spec.dtype is DType.F32:
        return torch.randn(shape, generator=generator)
    if spec.dtype is DType.U8:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype.value))


def decoder_inputs(
    config: ModelConfig,
    *,
    batch: int,
    rows: int,
    capacity: int,
    start: int | Sequence[int] = 0,
    lengths: Sequence[int] | None = None,
    seed: int = 0,
    **changes: Tensor,
) -> dict[str, Tensor]:
    """Inputs of a decoder call that runs `rows` rows of each request's random sequence, from `start` on.

    Calls with the same seed, batch and capacity are pieces of the same sequences. `lengths`: where the sequence of each
    request ends; rows past it are padding. The cache is noise, the logits of all rows are wanted, attention is
    reallocated on all rows; `changes` replace tensors by name.
    """
    part, generator = parts(config)[DECODER], torch.Generator().manual_seed(seed)
    sizes, groups = {"B": batch, "S": capacity, "L": capacity, "Q": rows}, len(config.groups)
    whole = {spec.name: random_tensor(spec, sizes, generator) for spec in part.inputs}
    slot = torch.arange(capacity, dtype=torch.int32).expand(batch, -1)
    end = torch.tensor(lengths or [capacity] * batch, dtype=torch.int32)
    key_group = torch.randint(0, groups, (batch, capacity), generator=generator, dtype=torch.int32)
    position = torch.where(slot < end[:, None], slot, -1)
    first = torch.as_tensor(start).expand(batch)
    wanted = first[:, None] + torch.arange(rows)  # [B, S]
    made = {
        "hidden": whole["hidden"].take_along_dim(wanted[:, :, None], 1),
        "position": position.take_along_dim(wanted, 1),
        "group": key_group.take_along_dim(wanted, 1),
        "key_group": key_group,
        "key_length": torch.minimum(end, first + rows).int(),
        "strength": torch.rand(batch, generator=generator),
        "group_bias": 0.3 * whole["group_bias"],
        "logit_row": torch.arange(rows, dtype=torch.int32).expand(batch, -1),
    }
    if "gate_state" in whole:
        made["gate_state"] = torch.full_like(whole["gate_state"], -1.0)
    return whole | {name: tensor.contiguous() for name, tensor in made.items()} | changes


def next_state(part: Part, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a decoder call hands to the next one: the written cache, and the gates of route = modality."""
    state = {name: outputs[written] for name, written in part.state}
    return state | ({"gate_state": outputs["gate_state_out"]} if "gate_state_out" in outputs else {})


@functools.cache
def plain_op(config: ModelConfig, name: str) -> Callable[..., tuple[Tensor, ...]]:
    """A mechanism's plain ONNX function by itself on ONNX Runtime: tensors in and out in the op's order."""
    function = next(f for f in functions(config) if f.name == name)
    words = {"policy": str(config.ar.policy), "statistic": str(config.ar.statistic)}
    attributes: dict[str, Any] = {"scale": config.backbone.head_size**-0.5, **words}
    if name != ATTENTION:
        attributes = {"scale": config.mose.scale, "select": str(config.mose.select), "route": str(config.mose.route)}
    node = helper.make_node(name, list(function.input), list(function.output), domain=DOMAIN, **attributes)
    types = {i: TensorProto.INT32 if i in INTEGERS else TensorProto.FLOAT for i in [*function.input, *function.output]}
    graph = helper.make_graph(
        [node],
        name,
        [helper.make_tensor_value_info(i, types[i], None) for i in function.input],
        [helper.make_tensor_value_info(o, types[o], None) for o in function.output],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=onnx.IR_VERSION_2024_3_25)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        feeds = {i: tensor.numpy() for i, tensor in zip(function.input, tensors, strict=True)}
        return tuple(map(torch.from_numpy, session.run(None, feeds)))

    return run
