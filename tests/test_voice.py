"""Voice encoder against transformers' Whisper, its pooling against numpy, and its weights' reader."""

import struct
import wave
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mosear.config import VoiceConfig
from mosear.errors import CheckpointError
from mosear_export.demo.fetch import DemoFiles
from mosear_export.demo.whisper import read_encoder, read_variables
from mosear_export.model.voice import VoiceEncoder

SMALL = VoiceConfig(mels=8, hidden_size=24, blocks=2, heads=3, intermediate_size=40, max_frames=50, segments=4)


def whisper(config: VoiceConfig, *, layers: int, frames: int) -> WhisperEncoder:
    """transformers' encoder of the same shape; it takes clips of exactly 2 * frames mel columns."""
    return WhisperEncoder(
        WhisperConfig(
            num_mel_bins=config.mels,
            d_model=config.hidden_size,
            encoder_layers=layers,
            encoder_attention_heads=config.heads,
            encoder_ffn_dim=config.intermediate_size,
            max_source_positions=frames,
            attn_implementation="eager",
        )
    ).eval()


def hidden_state(encoder: WhisperEncoder, mel: Tensor, index: int) -> Tensor:
    state: Tensor = encoder(mel, output_hidden_states=True).hidden_states[index]
    return state


def pooled(hidden: npt.NDArray[np.float64], frames: int, segments: int) -> npt.NDArray[np.float64]:
    """Mean || deviation of the clip and of its segments, written as a loop; hidden [F, d] -> [1 + segments, 2 d]."""
    bounds = [(0, frames)]
    for i in range(segments):
        start = i * frames // segments
        bounds.append((start, max(start + 1, -(-(i + 1) * frames // segments))))
    return np.stack([np.concatenate([hidden[a:b].mean(0), hidden[a:b].std(0)]) for a, b in bounds])


@pytest.mark.parametrize("frames", [1, 7, 50])
def test_hidden_is_that_of_transformers(frames: int) -> None:
    torch.manual_seed(0)
    ours = VoiceEncoder(SMALL).eval()
    theirs = whisper(SMALL, layers=3, frames=frames)
    state = ours.state_dict()
    state["embed_positions.weight"] = state["embed_positions.weight"][:frames]
    left = theirs.load_state_dict(state, strict=False)
    assert not left.unexpected_keys and all(key.startswith(("layers.2.", "layer_norm.")) for key in left.missing_keys)
    mel = torch.randn(2, SMALL.mels, 2 * frames)
    with torch.no_grad():
        torch.testing.assert_close(ours.hidden(mel), hidden_state(theirs, mel, SMALL.blocks), rtol=0, atol=1e-5)


@pytest.mark.parametrize("segments", [1, 4, 8])
def test_pooling_is_a_mean_and_a_deviation_over_each_segment(segments: int) -> None:
    torch.manual_seed(0)
    config = VoiceConfig(mels=8, hidden_size=24, blocks=1, heads=3, intermediate_size=40, segments=segments)
    net = VoiceEncoder(config).eval()
    frames = torch.tensor([1, 3, 4, 9, 16, 31, 40], dtype=torch.int32)
    mel = torch.randn(len(frames), config.mels, 80) + 3
    with torch.no_grad():
        features, hidden = net(mel, frames), net.hidden(mel).double().numpy()
    assert features.shape == (len(frames), config.tokens, config.feature_size)
    for row, (clip, n) in enumerate(zip(hidden, frames.tolist(), strict=True)):
        expected = torch.from_numpy(pooled(clip, n, segments))
        # Measured: 5e-6, where a deviation of exactly 0 (one frame) comes out as the root of a rounding error.
        torch.testing.assert_close(features[row].double(), expected, rtol=0, atol=1e-4)


def test_frames_after_the_voice_are_not_pooled() -> None:
    torch.manual_seed(0)
    net = VoiceEncoder(SMALL).eval()
    hidden = torch.randn(1, 40, SMALL.hidden_size)
    other = hidden.clone()
    other[:, 25:] = 1e4
    frames = torch.tensor([25], dtype=torch.int32)
    assert net._pool(hidden, frames).equal(net._pool(other, frames))
    assert not net._pool(hidden, frames + 1).equal(net._pool(other, frames + 1))


@pytest.mark.parametrize("frames", [0, 1, 5, 1000])
def test_any_count_of_frames_gives_finite_features(frames: int) -> None:
    net = VoiceEncoder(SMALL).eval()
    with torch.no_grad():
        features = net(torch.zeros(1, SMALL.mels, 10), torch.tensor([frames], dtype=torch.int32))
    assert features.isfinite().all() and bool(features.any()) == (frames > 0)


def test_it_exports_with_any_length_and_batch() -> None:
    torch.manual_seed(0)
    net = VoiceEncoder(SMALL).eval()
    batch, half = torch.export.Dim("B", min=1, max=16), torch.export.Dim("half", min=2, max=SMALL.max_frames)
    mel, frames = torch.randn(2, SMALL.mels, 60), torch.tensor([30, 11], dtype=torch.int32)
    shapes = ({0: batch, 2: 2 * half}, {0: batch})
    program = torch.export.export(net, (mel, frames), dynamic_shapes=shapes, strict=True).module()
    for some, n in (
        (mel, frames),
        (mel[:1, :, :4], frames[:1] // 15),
        (torch.randn(5, SMALL.mels, 100), torch.arange(1, 6)),
    ):
        with torch.no_grad():
            given = (some, n.to(torch.int32))
            torch.testing.assert_close(program(*given), net(*given), rtol=0, atol=1e-5)


@pytest.mark.demo
def test_real_weights_on_real_speech_are_those_of_transformers(demo_files: DemoFiles) -> None:
    config = VoiceConfig()
    ours = VoiceEncoder(config).eval()
    state = read_encoder(demo_files.whisper_bin, config)
    ours.load_state_dict(state)
    theirs = whisper(config, layers=4, frames=config.max_frames)
    theirs.load_state_dict(state, strict=False)
    with wave.open(str(demo_files.speech[-1].wav)) as file:
        sound = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
    mel = WhisperFeatureExtractor()(sound, sampling_rate=16000, return_tensors="pt").input_features
    with torch.no_grad():
        expected = hidden_state(theirs, mel, config.blocks)
        # Measured: 7e-6 beside values up to 9.
        torch.testing.assert_close(ours.hidden(mel), expected, rtol=0, atol=1e-4)


def variable(name: str, values: npt.NDArray[np.generic], dtype: int) -> bytes:
    header = struct.pack("<H", len(name) + 1) + name.encode() + b"\0" + struct.pack("<B", values.ndim)
    return header + struct.pack(f"<{values.ndim}IBI", *values.shape, dtype, values.nbytes) + values.tobytes()


def binary(*variables: bytes, version: int = 6) -> bytes:
    head = struct.pack("<I", version) + struct.pack("<H", 5) + b"Spec\0" + struct.pack("<I", 3)
    return head + struct.pack("<I", len(variables)) + b"".join(variables) + struct.pack("<I", 0)


def test_variables_of_a_binary_are_read_by_prefix(tmp_path: Path) -> None:
    weight = np.arange(6, dtype=np.float16).reshape(2, 3)
    path = tmp_path / "model.bin"
    path.write_bytes(binary(variable("decoder/x", weight, 4), variable("encoder/w", weight, 4)))
    found = read_variables(path, "encoder/")
    assert list(found) == ["encoder/w"] and np.array_equal(found["encoder/w"], weight)


def test_a_binary_of_another_form_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(binary(version=7))
    with pytest.raises(CheckpointError, match="format 7"):
        read_variables(path, "encoder/")
    path.write_bytes(binary(variable("encoder/w", np.zeros((2, 3), np.float32), 0))[:-12])
    with pytest.raises(CheckpointError, match="no whole CTranslate2 model"):
        read_variables(path, "encoder/")
    path.write_bytes(binary(variable("encoder/w", np.zeros((2, 3), np.float32), 0)))
    with pytest.raises(CheckpointError, match="encoder/position_encodings"):
        read_encoder(path, SMALL)
