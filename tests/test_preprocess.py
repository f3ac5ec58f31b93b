"""What the encoders take: features equal to Whisper's, squares and crops of any picture."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mosear.config import VoiceConfig
from mosear.runtime.preprocess import best_face, crop_face, log_mel, scene_image, square

VOICE = VoiceConfig()
SIZES = st.tuples(st.integers(1, 90), st.integers(1, 90))  # height, width


def noise(seconds: float, level: float = 0.1) -> NDArray[np.float32]:
    rng = np.random.default_rng(round(seconds * 1000))
    return (level * rng.standard_normal(round(seconds * VOICE.sample_rate))).astype(np.float32)


def gradient(height: int, width: int) -> NDArray[np.uint8]:
    """RGB [height, width, 3] whose red grows to the right, whose green grows downwards, whose blue is 200."""
    image = np.full((height, width, 3), 200, np.uint8)
    image[..., 0] = np.linspace(0, 255, width)
    image[..., 1] = np.linspace(0, 255, height)[:, None]
    return image


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("seconds", [0.01, 0.0126, 0.5, 3.0, 29.3, 29.9, 30.0, 31.0])
def test_log_mel_equals_transformers(seconds: float, mels: int) -> None:
    transformers = pytest.importorskip("transformers")
    waveform = noise(seconds)
    mel, _ = log_mel(waveform, VoiceConfig(mels=mels))
    theirs = transformers.WhisperFeatureExtractor(feature_size=mels)
    wanted = theirs(waveform, sampling_rate=16000, return_tensors="np")["input_features"][0]  # [mels, 3000]
    assert mel.dtype == np.float32 and mel.shape[0] == mels
    assert np.abs(mel - wanted[:, : mel.shape[1]]).max() < 1e-4  # measured: 3.3e-5; theirs is in fp32, ours in fp64


def test_log_mel_of_a_sine_peaks_in_its_band() -> None:
    time = np.arange(VOICE.sample_rate) / VOICE.sample_rate
    mel, _ = log_mel(np.sin(2 * np.pi * 440 * time).astype(np.float32), VOICE)
    assert set(mel[:, 10:90].argmax(axis=0)) == {11}  # centres lie 37.3 Hz apart here; band 11 is at 447 Hz


def test_log_mel_of_silence() -> None:
    mel, voiced = log_mel(np.zeros(VOICE.sample_rate, np.float32), VOICE)
    assert (mel == -1.5).all() and voiced == 50  # (log10(1e-10) + 4) / 4


def test_log_mel_of_nothing() -> None:
    mel, voiced = log_mel(np.zeros(0, np.float32), VOICE)
    assert mel.shape == (80, 50) and voiced == 1


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(0, 40_000), max_frames=st.integers(30, 80))
def test_log_mel_shapes(samples: int, max_frames: int) -> None:
    config = VoiceConfig(max_frames=max_frames)
    mel, voiced = log_mel(noise(samples / VOICE.sample_rate)[:samples], config)
    frames = mel.shape[1]
    assert frames % 2 == 0 and frames <= 2 * max_frames
    assert frames == 2 * max_frames or samples + 8000 <= frames * 160 < samples + 8000 + 320
    assert 1 <= voiced <= frames // 2
    assert voiced == min(max(1, -(-samples // 320)), max_frames)
    assert mel.max() - mel.min() <= 2 + 1e-6 and np.isfinite(mel).all()


@settings(max_examples=20, deadline=None)
@given(gain=st.floats(0.01, 0.99))
def test_log_mel_of_quieter_sound_is_shifted(gain: float) -> None:
    loud, quiet = log_mel(noise(0.5), VOICE)[0], log_mel(np.float32(gain) * noise(0.5), VOICE)[0]
    np.testing.assert_allclose(quiet[:, :48], loud[:, :48] + np.log10(gain) / 2, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(size=SIZES, side=st.integers(1, 64), center=st.booleans())
def test_square_keeps_the_shape_of_what_it_shows(size: tuple[int, int], side: int, center: bool) -> None:
    out = square(np.full((*size, 3), 255, np.uint8), side, center=center)
    assert out.shape == (side, side, 3) and out.dtype == np.uint8
    share = min(size) / max(size)
    assert abs(out.mean() / 255 - share) < 2 / side + 0.02
    if not center and share < 1:
        assert out[0, 0].min() > out[-1, -1].max() or side == 1


def test_square_puts_the_picture_where_it_says() -> None:
    image = np.full((20, 40, 3), 255, np.uint8)
    top, middle = (square(image, 40, center=center)[:, 20, 0] for center in (False, True))
    assert (top[:20] == 255).all() and (top[20:] == 0).all()
    assert (middle[10:30] == 255).all() and (middle[:10] == 0).all() and (middle[30:] == 0).all()


def test_square_of_a_square_is_a_bilinear_resize() -> None:
    image = gradient(32, 32)
    np.testing.assert_array_equal(square(image, 32, center=True), image)
    smaller = square(image, 16, center=False)
    assert np.abs(smaller.astype(int) - image.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))).max() <= 3


def test_best_face_is_the_surest_whole_box() -> None:
    boxes = np.array(
        [
            [0.1, 0.1, 0.2, 0.3],
            [0.5, 0.5, 0.9, 0.8],
            [0.6, 0.5, 0.6, 0.8],  # no width
            [0.5, 0.8, 0.9, 0.2],  # upside down
            [0.5, np.nan, 0.9, 0.8],
            [0.5, 0.5, np.inf, 0.8],
        ],
        np.float32,
    )
    scores = np.array([0.5, 0.7, 0.9, 0.9, 0.9, 0.9], np.float32)
    assert best_face(boxes, scores, 0.4) == pytest.approx((0.5, 0.5, 0.9, 0.8))
    assert best_face(boxes, scores, 0.7001) is None
    assert best_face(boxes[:1], scores[:1], 0.5) == pytest.approx((0.1, 0.1, 0.2, 0.3))
    assert best_face(boxes[:2], np.array([0.5, np.nan], np.float32), 0.4) == pytest.approx((0.1, 0.1, 0.2, 0.3))
    assert best_face(boxes[:0], scores[:0], 0.4) is None


def test_a_face_is_cut_out_where_the_detector_saw_it() -> None:
    image = np.zeros((30, 60, 3), np.uint8)
    image[6:18, 24:36] = 255
    seen = square(image, 120, center=False)
    rows, columns = (np.flatnonzero(seen[..., 0].max(axis=axis) > 127) for axis in (1, 0))
    box = tuple(edge / 120 for edge in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    crop = crop_face(image, (box[0], box[1], box[2], box[3]))
    assert crop.shape == (12, 12, 3) and (crop == 255).all()


def test_boxes_are_clipped_to_the_picture() -> None:
    image = gradient(30, 60)
    np.testing.assert_array_equal(crop_face(image, (-1.0, -1.0, 2.0, 2.0)), image)
    np.testing.assert_array_equal(crop_face(image, (0.5, -0.5, 1.5, 0.25)), image[:15, 30:])


@pytest.mark.parametrize(
    "box",
    [
        None,
        (0.5, 0.1, 0.5, 0.2),
        (0.5, 0.2, 0.6, 0.1),
        (1.2, 0.1, 1.4, 0.2),
        (0.1, 0.6, 0.2, 0.9),  # in the padding below a wide picture
        (0.5, 0.1, 0.501, 0.2),  # less than a pixel
        (float("nan"), 0.1, 0.5, 0.2),
        (0.1, 0.1, float("inf"), 0.2),
    ],
)
def test_without_a_face_the_middle_is_taken(box: tuple[float, float, float, float] | None) -> None:
    image = gradient(30, 60)
    np.testing.assert_array_equal(crop_face(image, box), image[:, 15:45])


@settings(max_examples=80, deadline=None)
@given(size=SIZES, box=st.tuples(*[st.floats(allow_nan=True, allow_infinity=True, width=32)] * 4))
def test_every_crop_has_pixels(size: tuple[int, int], box: tuple[float, float, float, float]) -> None:
    image = gradient(*size)
    crop = crop_face(image, box)
    assert crop.dtype == np.uint8 and crop.ndim == 3 and crop.shape[2] == 3
    assert 1 <= crop.shape[0] <= size[0] and 1 <= crop.shape[1] <= size[1]
    assert square(crop, 8, center=True).shape == (8, 8, 3)


@settings(max_examples=40, deadline=None)
@given(size=SIZES, side=st.integers(1, 64))
def test_scene_image_is_the_middle_square(size: tuple[int, int], side: int) -> None:
    image = gradient(*size)
    out = scene_image(image, side)
    assert out.shape == (side, side, 3) and out.dtype == np.uint8 and (out[..., 2] == 200).all()
    if side == min(size):
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        np.testing.assert_array_equal(out, image[top : top + side, left : left + side])
