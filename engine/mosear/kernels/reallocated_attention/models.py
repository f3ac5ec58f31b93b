"""The models and the prompt that attention is compiled and costed for."""

from dataclasses import dataclass

from mosear.kernels.reallocated_attention.runs import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model's heads."""

    name: str
    heads: int
    kv_heads: int
    head_size: int


DEMO = Shape(name="demo", heads=9, kv_heads=3, head_size=64)
LLAMA = Shape(name="llama2-7b", heads=32, kv_heads=32, head_size=128)
GROUPS, BATCHES = 3, (1, 8, 64)
TEXT, VIDEO, AUDIO = range(GROUPS)
# Emotion-LLaMA's prompt: words, 258 tokens of the pictures, one of the sound, one of the pictures; words follow.
LAYOUT: tuple[Run, ...] = ((20, TEXT), (258, VIDEO), (1, AUDIO), (1, VIDEO))


def usual_layout(keys: int) -> list[int]:
    """Group ids of that prompt, filled with text to `keys`."""
    return ([group for count, group in LAYOUT for _ in range(count)] + [TEXT] * keys)[:keys]
