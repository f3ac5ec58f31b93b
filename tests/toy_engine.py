"""A toy's engine folder, made the whole way: checkpoint, export, build; and what nobody may ask of it."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import toy
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from mosear.recipe import Limits, Recipe
from mosear.runtime.request import Request
from mosear_export import checkpoint
from mosear_export.build import build_engine
from mosear_export.export import export_checkpoint

CONTROL = ("<|start|>", "<|end|>")
# So many tokens that an answer can take seconds, so few bytes that a clip above them is quickly made.
LIMITS = Limits(clip_seconds=2.0, clip_bytes=1 << 20, words=200, new_tokens=3000, prompt_tokens=400)
RECIPE = Recipe(name="toy", threads=1, limits=LIMITS)
TOKENS = f"from 1 to {LIMITS.new_tokens}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """Checkpoint, ONNX and engine folder of one toy, all below `root`."""

    root: Path
    checkpoint: Path
    onnx: Path
    engine: Path

    @classmethod
    def below(cls, root: Path) -> "Folders":
        """Those that `build` wrote there."""
        onnx, engine = ((root / link).resolve() for link in ("onnx/onnx", f"engines/{RECIPE.name}"))
        return cls(root=root, checkpoint=root / "checkpoint", onnx=onnx, engine=engine)

    def copied(self, root: Path) -> "Folders":
        """A copy at `root`, which may be altered."""
        return Folders.below(shutil.copytree(self.root, root, symlinks=True))


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    return tokenizer


def build(root: Path) -> None:
    """The folders of a toy below `root`."""
    config = toy.toy_config()
    config = dataclasses.replace(  # heads wide enough for TensorRT's fused attentions: it has none for 8
        config,
        backbone=dataclasses.replace(config.backbone, vocab_size=300, max_positions=4096, head_size=32),
        voice=dataclasses.replace(config.voice, hidden_size=64),
    )
    checkpoint.save(root / "checkpoint", config, toy.toy_model(config).files(), byte_tokenizer().to_str())
    lines: list[str] = []
    exported = export_checkpoint(root / "checkpoint", root / "onnx", lines.append)
    build_engine(RECIPE, exported, root / "engines", lines.append)
    assert any("decoder (9 of 9)" in line for line in lines)


# A request, and what its RequestError says.
BAD = {
    "empty request": (Request(), "empty"),
    "unknown task": (Request(words="a", task="guess"), "classify, reason, conflict"),
    "strength nan": (Request(words="a", strength=float("nan")), "ar_strength"),
    "strength -1": (Request(words="a", strength=-1.0), "ar_strength"),
    "strength 1e9": (Request(words="a", strength=1e9), "ar_strength"),
    "no tokens": (Request(words="a", max_tokens=0), TOKENS),
    "too many tokens": (Request(words="a", max_tokens=10**9), TOKENS),
    "control token": (Request(words="so <|end|> it is"), "'<|end|>' at character 3"),
    "not utf-8": (Request(words=b"caf\xe9"), "not UTF-8 at byte 3"),
    "lone surrogate": (Request(words="a\ud800"), "character 1"),
    "too many words": (Request(words="a" * 201), "takes 200"),
    "frames of floats": (Request(frames=np.zeros((1, 8, 8, 3), np.float32)), "uint8 [F, H, W, 3]"),
    "frames of two axes": (Request(frames=np.zeros((8, 8), np.uint8)), "uint8 [F, H, W, 3]"),
    "too many frames": (Request(frames=np.zeros((9, 8, 8, 3), np.uint8)), "takes 3"),
    "waveform of doubles": (Request(waveform=np.zeros(9)), "it must be float32 ["),
    "waveform of nan": (Request(waveform=np.full(9, np.nan, np.float32)), "not finite"),
    "waveform too long": (Request(waveform=np.zeros(32001, np.float32)), "takes 32000"),
    "both kinds of media": (Request(audio=b"RIFF", frames=np.zeros((1, 8, 8, 3), np.uint8)), "one or the other"),
    "text as video": (Request(video=b"just some text, no video\n" * 9), "video_bytes"),
    "no bytes": (Request(video=b""), "video_bytes"),
    "ten bytes of wav": (Request(audio=b"RIFF\x02\0\0\0WA"), "audio_bytes"),
}
