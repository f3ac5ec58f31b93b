"""Every tensor that crosses a boundary: its name, element type and axes.

ONNX inputs and outputs, engine bindings, server configuration, client tensors and test inputs are derived from here.
An axis is a number, or the name of a dynamic size. Letters: B batch, S query length, L cache capacity, K key/value
heads, D head size, H query heads, P policy parameters, G groups, E experts, R rank, V vocabulary, N pictures, T mel
frames, Q rows whose logits are wanted.
"""

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mosear.config import ModelConfig, Route


class DType(enum.StrEnum):
    """Element types, by numpy's names."""

    F32 = "float32"
    I32 = "int32"
    I64 = "int64"
    U8 = "uint8"
    U64 = "uint64"
    BOOL = "bool"
    STRING = "object"  # UTF-8 bytes

    @property
    def numpy(self) -> np.dtype[np.generic]:
        return np.dtype(self.value)


Axis = int | str
Tensors = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a part."""

    name: str
    dtype: DType
    axes: tuple[Axis, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """One network of the model: a file in the ONNX folder, a session in an engine, a model on a server."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    heads: tuple[TensorSpec, ...] = ()  # inputs that are bound once: experts, gates and policy parameters
    state: tuple[tuple[str, str], ...] = ()  # (input, output) pairs that live in one buffer: the cache


@dataclass(frozen=True, slots=True)
class Served:
    """One model of a server that is not a part: what a request may hold, and what each response may hold."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    decoupled: bool  # a stream of responses, of which the last one is marked by the server's own final flag


# Columns of `ar_params`, one row for each head. Those in twos are for the masses of (video, audio): the share above which
# a modality gives way, the width of that threshold's ramp, and what part of its mass it then gives at full strength.
AR_PARAMS = ("tau_video", "tau_audio", "ramp_video", "ramp_audio", "move_video", "move_audio", "sigma", "audio_share")
MODALITY_WEIGHT = "modality_weight"
EMBEDDING = "embedding"
DECODER = "decoder"
ENCODERS = ("voice", "face_detector", "face", "scene")  # parts that a server serves as they are
# Fields of a prompt that a projector fills, and the id of each one's positions among the token ids.
HOLES = {"face": -1, "scene": -2, "voice": -3}


def parts(config: ModelConfig) -> dict[str, Part]:
    """All parts of a model, in the order a clip meets them."""
    f32, i32, u8 = DType.F32, DType.I32, DType.U8
    voice, face, scene, d = config.voice, config.face, config.scene, config.backbone.hidden_size
    detector, crop, image = face.detector_size, face.crop_size, scene.image_size
    voice_features = TensorSpec("voice_features", f32, ("B", voice.tokens, voice.feature_size))
    face_features = TensorSpec("face_features", f32, ("N", face.feature_size))
    scene_features = TensorSpec("scene_features", f32, ("B", scene.tokens, scene.feature_size))
    table = (
        Part(
            "voice",
            (TensorSpec("mel", f32, ("B", voice.mels, "T")), TensorSpec("voice_frames", i32, ("B",))),
            (voice_features,),
        ),
        Part(
            "face_detector",
            (TensorSpec("pictures", u8, ("N", detector, detector, 3)),),
            (TensorSpec("boxes", f32, ("N", "A", 4)), TensorSpec("box_scores", f32, ("N", "A"))),
        ),
        Part("face", (TensorSpec("crops", u8, ("N", crop, crop, 3)),), (face_features,)),
        Part("scene", (TensorSpec("images", u8, ("B", image, image, 3)),), (scene_features,)),
        Part("voice_projector", (voice_features,), (TensorSpec("voice_tokens", f32, ("B", voice.tokens, d)),)),
        Part("face_projector", (face_features,), (TensorSpec("face_tokens", f32, ("N", d)),)),
        Part("scene_projector", (scene_features,), (TensorSpec("scene_tokens", f32, ("B", scene.tokens, d)),)),
        Part(
            EMBEDDING,
            (TensorSpec("token_ids", i32, ("B", "S")),),
            (TensorSpec("hidden", f32, ("B", "S", d)),),
        ),
        _decoder(config),
    )
    return {part.name: part for part in table}


def _decoder(config: ModelConfig) -> Part:
    f32, i32 = DType.F32, DType.I32
    backbone, mose, groups = config.backbone, config.mose, len(config.groups)
    adapted = backbone.layers * len(mose.targets)
    inputs = [
        TensorSpec("hidden", f32, ("B", "S", backbone.hidden_size)),
        TensorSpec("position", i32, ("B", "S")),  # cache slot of each row; -1: padding row, at the end only
        TensorSpec("group", i32, ("B", "S")),  # modality of each row
        TensorSpec("key_group", i32, ("B", "L")),  # modality of each cache slot
        TensorSpec("key_length", i32, ("B",)),  # slots filled once this call has written its rows
        TensorSpec("first_row", i32, ("B",)),  # position from which attention is reallocated
        TensorSpec("strength", f32, ("B",)),
        TensorSpec("group_bias", f32, ("B", groups)),  # -inf mutes
        TensorSpec("logit_row", i32, ("B", "Q")),  # rows whose logits are wanted
    ]
    outputs = [
        TensorSpec("logits", f32, ("B", "Q", backbone.vocab_size)),
        TensorSpec("mass_before", f32, ("B", backbone.layers, backbone.heads, "S", groups)),
        TensorSpec("mass_after", f32, ("B", backbone.layers, backbone.heads, "S", groups)),
        TensorSpec("expert_weights", f32, ("B", adapted, "S", mose.experts)),
    ]
    state = []
    if mose.route is Route.MODALITY:
        axes = ("B", adapted, groups, mose.experts)
        inputs.append(TensorSpec("gate_state", f32, axes))  # -1: to be made from this call's rows
        outputs.append(TensorSpec("gate_state_out", f32, axes))
    cache = ("B", backbone.kv_heads, "L", backbone.head_size)
    for layer in range(backbone.layers):
        for kind in ("key", "value"):
            name = f"{kind}_{layer}"
            inputs.append(TensorSpec(name, f32, cache))
            outputs.append(TensorSpec(f"{name}_out", f32, cache))
            state.append((name, f"{name}_out"))
    return Part(DECODER, tuple(inputs), tuple(outputs), heads=heads(config), state=tuple(state))


def heads(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Experts, gates and policy parameters of every layer: inputs of the decoder that are bound once."""
    f32, mose, backbone, groups = DType.F32, config.mose, config.backbone, len(config.groups)
    rank, experts = mose.rank, mose.experts
    found = [TensorSpec(MODALITY_WEIGHT, f32, (groups,))]
    for layer in range(backbone.layers):
        for target in mose.targets:
            prefix = f"layers.{layer}.{target}"
            width_in, width_out = backbone.linear_size(target)
            found += [
                TensorSpec(f"{prefix}.a", f32, (rank if mose.share_a else groups * rank, width_in)),
                TensorSpec(f"{prefix}.gate", f32, (groups * experts, width_in)),
                TensorSpec(f"{prefix}.b", f32, (groups * experts * rank, width_out)),
            ]
        found.append(TensorSpec(f"layers.{layer}.ar_params", f32, (backbone.heads, len(AR_PARAMS))))
    return tuple(found)


def served(config: ModelConfig) -> dict[str, Served]:
    """The models of a server beside its encoders. Every input may be left out, but for the decoder's prompt."""
    public, answer = asked_tensors() + feature_tensors(config), _answer(config)
    table = (
        Served("mosear", public, answer, decoupled=True),
        Served("mosear_unary", public, answer, decoupled=False),
        Served(DECODER, *_decoding(config), decoupled=True),
    )
    return {model.name: model for model in table}


def _some(name: str, dtype: DType, *axes: Axis) -> TensorSpec:
    return TensorSpec(name, dtype, axes or (1,), optional=True)


def _settings() -> tuple[TensorSpec, ...]:
    """How to answer: `Request`'s fields of the same meaning."""
    return (
        _some("task", DType.STRING),
        _some("max_tokens", DType.I32),
        _some("min_tokens", DType.I32),
        _some("temperature", DType.F32),
        _some("top_p", DType.F32),
        _some("seed", DType.U64),
        _some("ar_strength", DType.F32),
        _some("deadline_ms", DType.I32),
    )


def feature_tensors(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """What the encoders say of a clip, in place of the clip."""
    return (
        _some("face_features", DType.F32, "N", config.face.feature_size),
        _some("scene_features", DType.F32, config.scene.tokens, config.scene.feature_size),
        _some("voice_features", DType.F32, config.voice.tokens, config.voice.feature_size),
    )


def asked_tensors() -> tuple[TensorSpec, ...]:
    """What a request may hold whatever the model is: settings, words and a clip."""
    return (
        *_settings(),
        _some("text_input", DType.STRING),
        _some("video_bytes", DType.U8, "BYTES"),
        _some("audio_bytes", DType.U8, "BYTES"),
        _some("frames", DType.U8, "F", "H", "W", 3),
        _some("waveform", DType.F32, "SAMPLES"),
        _some("feature_schema", DType.STRING),  # hash of the encoders that made the features
    )


def _answer(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Of a stream, a response holds what is new: a stage that ended, words, or (the last one) all the rest."""
    labels, groups = len(config.labels), len(config.groups)
    judged = [
        spec
        for who in ("", "face_", "voice_")
        for spec in (
            TensorSpec(f"{who}label", DType.STRING, (1,)), TensorSpec(f"{who}label_scores", DType.F32, (labels,))
        )
    ]  # fmt: skip
    return (
        TensorSpec("stage", DType.STRING, (1,)),
        TensorSpec("stage_ms", DType.F32, (1,)),
        TensorSpec("text_output", DType.STRING, (1,)),
        *judged,
        TensorSpec("conflict", DType.BOOL, (1,)),
        TensorSpec("modality_mass", DType.F32, (config.backbone.layers, 2, groups)),
        TensorSpec("expert_weights", DType.F32, (groups, config.mose.experts)),
        TensorSpec("timings_ms", DType.STRING, (1,)),  # JSON: stage to ms
        TensorSpec("report_json", DType.STRING, (1,)),  # JSON: `Answer.record()`
        TensorSpec("final", DType.BOOL, (1,)),
    )


def _decoding(config: ModelConfig) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """A prompt, then masses and gates, tokens or label scores as they come."""
    labels, groups = len(config.labels), len(config.groups)
    inputs = (
        _some("token_ids", DType.I32, "S"),  # HOLES where features go
        _some("group", DType.I32, "S"),
        *_settings(),
        *feature_tensors(config),
    )
    outputs = (
        TensorSpec("modality_mass", DType.F32, (config.backbone.layers, 2, groups)),
        TensorSpec("expert_weights", DType.F32, (groups, config.mose.experts)),
        TensorSpec("token", DType.I32, (1,)),
        TensorSpec("label_scores", DType.F32, ("ROWS", labels)),
    )
    return inputs, outputs
