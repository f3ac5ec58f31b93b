"""From decoded clips to what the encoders take: log-mel features of sound, squares of pictures."""

import functools
import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image

from mosear.config import VoiceConfig

Box = tuple[float, float, float, float]

_TAIL_S = 0.5  # silence that Whisper hears after a clip: without any, it treats the clip as cut
_FLOOR = 1e-10
_RANGE = 8.0  # in powers of ten below the loudest cell


def log_mel(waveform: NDArray[np.float32], config: VoiceConfig) -> tuple[NDArray[np.float32], int]:
    """Whisper's features of a clip and half a second of silence after it.

    waveform: f32 [n], mono at config.sample_rate; what lies behind config.max_seconds is not heard.
    Returns mel f32 [mels, T], with T even and at most 2 * max_frames, and how many of the encoder's T/2 frames the
    clip itself covers (at least 1). Equal to the first T frames of `transformers.WhisperFeatureExtractor`, which pads
    to 30 s: the frames that it adds are the quietest ones, so they do not move the maximum.
    Formula: Radford et al. 2022 (https://github.com/openai/whisper, audio.py).
    """
    hop, edge, whole = config.hop, config.window // 2, config.max_frames * 2 * config.hop
    sound = np.zeros(whole, np.float32)
    samples = min(len(waveform), whole)
    sound[:samples] = waveform[:samples]
    frames = min(2 * math.ceil((samples + _TAIL_S * config.sample_rate) / (2 * hop)), 2 * config.max_frames)
    padded = np.pad(sound, edge, mode="reflect")[: (frames - 1) * hop + config.window]
    windows = sliding_window_view(padded, config.window)[::hop] * _hann(config.window)  # [T, window]
    spectrum = np.fft.rfft(windows)  # [T, window / 2 + 1]
    power = spectrum.real**2 + spectrum.imag**2
    mel = np.log10(np.maximum(_mel_filters(config.mels, config.window, config.sample_rate) @ power.T, _FLOOR))
    mel = (np.maximum(mel, mel.max() - _RANGE) + 4.0) / 4.0
    voiced = min(max(1, math.ceil(samples / (2 * hop))), frames // 2)
    return mel.astype(np.float32), voiced


def square(image: NDArray[np.uint8], size: int, *, center: bool) -> NDArray[np.uint8]:
    """Pad a picture u8 [H, W, 3] with black to a square and resize it, u8 [size, size, 3].

    The picture lies in the middle (center), or in the top left corner: then a place in the square, as a fraction of
    its side, is that of the picture's longer side, as `crop_face` takes it.
    """
    height, width = image.shape[:2]
    side = max(height, width)
    top, left = ((side - height) // 2, (side - width) // 2) if center else (0, 0)
    canvas = np.zeros((side, side, 3), np.uint8)
    canvas[top : top + height, left : left + width] = image
    return _resize(canvas, size)


def best_face(boxes: NDArray[np.float32], scores: NDArray[np.float32], threshold: float) -> Box | None:
    """The box with the highest score of at least `threshold`; None if there is none.

    boxes f32 [A, 4]: left, top, right, bottom as fractions of the detector's square; scores f32 [A]. Boxes without
    area or with values that are not finite are passed over.
    """
    whole = np.isfinite(boxes).all(axis=1) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    usable = np.where(whole & (scores >= threshold), scores, -np.inf)
    if not len(usable) or not np.isfinite(usable.max()):
        return None
    left, top, right, bottom = (float(value) for value in boxes[usable.argmax()])
    return left, top, right, bottom


def crop_face(image: NDArray[np.uint8], box: Box | None) -> NDArray[np.uint8]:
    """Cut a box of `best_face` out of its picture u8 [H, W, 3], as u8 [h, w, 3].

    The box is clipped to the picture. Without one, or with nothing left of it, the middle square is cut out.
    """
    height, width = image.shape[:2]
    if box is None or not all(map(math.isfinite, box)):
        return _middle(image)
    side = max(height, width)
    left, right = (min(max(round(x * side), 0), width) for x in (box[0], box[2]))
    top, bottom = (min(max(round(y * side), 0), height) for y in (box[1], box[3]))
    if left >= right or top >= bottom:
        return _middle(image)
    return image[top:bottom, left:right]


def scene_image(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The middle square of a picture u8 [H, W, 3], resized to u8 [size, size, 3]."""
    return _resize(_middle(image), size)


def _middle(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def _resize(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


@functools.cache
def _hann(window: int) -> NDArray[np.float64]:
    """Periodic Hann window, f64 [window]."""
    return np.asarray(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window), np.float64)


@functools.cache
def _mel_filters(mels: int, window: int, sample_rate: int) -> NDArray[np.float64]:
    """Triangles of equal area on Slaney's mel scale up to half the sample rate, f64 [mels, window / 2 + 1].

    Slaney 1998, Auditory Toolbox: linear to 1 kHz at 3/200 mel per Hz, above it 27 mel per factor of 6.4.
    """
    top = 15 + 27 * math.log(sample_rate / 2 / 1000) / math.log(6.4)
    mel = np.linspace(0, top, mels + 2)
    edges = np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * math.log(6.4) / 27))  # [mels + 2] Hz
    bins = np.linspace(0, sample_rate / 2, window // 2 + 1)
    slopes = bins[None, :] - edges[:, None]  # [mels + 2, window / 2 + 1] Hz
    width = np.diff(edges)[:, None]
    rising, falling = slopes[:-2] / width[:-1], -slopes[2:] / width[1:]
    area = 2 / (edges[2:] - edges[:-2])[:, None]
    return np.asarray(np.maximum(0, np.minimum(rising, falling)) * area, np.float64)
