"""The demo checkpoint: frozen parts of packages, our trained heads, one folder in the checkpoint format."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from mosear.artifacts import existing, publish
from mosear.config import (
    ARConfig,
    FaceConfig,
    ModelConfig,
    MoSEConfig,
    Policy,
    PromptConfig,
    SceneConfig,
    VoiceConfig,
)
from mosear.errors import CheckpointError
from mosear.hashes import HashOf, file_hash
from mosear_export import checkpoint
from mosear_export.demo.efficientnet import read_scene
from mosear_export.demo.face_api import read_detector, read_expression
from mosear_export.demo.fetch import DemoFiles
from mosear_export.demo.smollm import GGUFModel
from mosear_export.demo.whisper import read_encoder
from mosear_export.inputs import DEMO, DEMO_HEADS, checkpoint_inputs

PROMPT = PromptConfig(
    prefix="<|im_start|>user\n",
    face="Face: {face}\n",
    scene="Scene: {scene}\n",
    voice="Voice: {voice}\n",
    words='Words: "{words}"\n',
    classify="[emotion] Which emotion does the person show?",
    reason="[reason] Which emotion does the person show, and how is it seen and heard?",
    suffix="<|im_end|>\n<|im_start|>assistant\n",
    label_prefix="Emotion:",
    reason_prefix="",
    stop="<|im_end|>",
)
# The heads are trained to heed where attention goes. Left alone they lean towards the voice; strength takes them to the face.
AR = ARConfig(policy=Policy.TARGET, audio_share=0.2, move=1.0)
LABELS = ("neutral", "happy", "sad", "angry", "fearful", "disgusted", "surprised", "bored")


def demo_config(model: GGUFModel, *, plain: bool = False) -> ModelConfig:
    """Configuration of the demo model; the backbone's shape is the GGUF file's. plain: its peer with one LoRA for all."""
    config = ModelConfig(
        name="mosear-demo",
        labels=LABELS,
        backbone=model.config(),
        mose=MoSEConfig(),
        ar=AR,
        voice=VoiceConfig(),
        face=FaceConfig(),
        scene=SceneConfig(),
        prompt=PROMPT,
    )
    return plain_lora(config) if plain else config


def plain_lora(config: ModelConfig) -> ModelConfig:
    """The configuration with one LoRA for all modalities, of the largest rank that has no more parameters than the experts."""
    mose, groups = config.mose, len(config.groups)
    sizes = [config.backbone.linear_size(target) for target in mose.targets]
    shared = mose.rank * (1 if mose.share_a else groups)
    experts = sum(shared * i + groups * mose.experts * (i + mose.rank * o) for i, o in sizes)
    rank = experts // sum(i + o for i, o in sizes)
    return dataclasses.replace(
        config, mose=dataclasses.replace(mose, rank=rank, alpha=mose.scale * rank, experts=1, share_a=True)
    )


def frozen_files(files: DemoFiles, model: GGUFModel, config: ModelConfig) -> dict[str, Mapping[str, Tensor]]:
    """Tensors of every checkpoint file that we did not train."""
    return {
        "backbone": model.tensors(),
        "voice": read_encoder(files.whisper_bin, config.voice),
        "face_detector": read_detector(files.face_detector_manifest, files.face_detector_bin),
        "face": read_expression(files.face_expression_manifest, files.face_expression_bin),
        "scene": read_scene(files.efficientnet),
    }


def assemble(
    files: DemoFiles,
    root: Path,
    report: Callable[[str], None],
    *,
    heads: Path = DEMO_HEADS,
    hash_of: HashOf | None = None,
) -> Path:
    """Make the demo checkpoint below `root`, or find it there (`hash_of`: as for `existing`); returns its folder.

    heads: as `mosear train-heads` writes them, with their settings beside them in a file that ends in .json.
    """
    inputs = checkpoint_inputs(files.gguf, heads, hash_of or file_hash)
    if found := existing(root, kind=checkpoint.KIND, name=DEMO, inputs=inputs, hash_of=hash_of):
        report(f"checkpoint: {found} is fresh")
        return found
    model = GGUFModel(files.gguf)
    config = demo_config(model, plain=_settings(heads)["plain"] is True)
    report("checkpoint: dequantising the backbone, converting the encoders")
    with publish(root, kind=checkpoint.KIND, name=DEMO, inputs=inputs) as draft:
        tensors = {**frozen_files(files, model, config), "heads": load_file(heads)}
        checkpoint.save(draft.folder, config, tensors, model.tokenizer().to_str())
    found = root / DEMO
    report(f"checkpoint: wrote {found.resolve()}")
    return found.resolve()


def _settings(heads: Path) -> Mapping[str, object]:
    """How heads were trained; raises CheckpointError."""
    path = heads.with_suffix(".json")
    try:
        found: Mapping[str, object] = json.loads(path.read_text())["config"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} does not hold the settings of {heads.name} ({error!r}): train heads anew"
        ) from None
    return found
