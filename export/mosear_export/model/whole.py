"""The whole reference model: one module for each part of the contract, called by the contract's names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from mosear.config import ModelConfig
from mosear.contract import DECODER, EMBEDDING, Part, parts
from mosear_export.checkpoint import Checkpoint
from mosear_export.model.decoder import Decoder, Ops, zero_heads
from mosear_export.model.face import FaceDetector, FaceEncoder
from mosear_export.model.projector import Projector, VoiceProjector
from mosear_export.model.scene import SceneEncoder
from mosear_export.model.voice import VoiceEncoder


class ReferenceModel(nn.Module):
    """All parts of MoSEAR in PyTorch, fp32, on the CPU. `heads` holds experts, gates and policy parameters by name."""

    def __init__(self, config: ModelConfig, ops: Ops | None = None) -> None:
        super().__init__()
        d = config.backbone.hidden_size
        self.config = config
        self.decoder = Decoder(config, ops)
        self.voice, self.face_detector = VoiceEncoder(config.voice), FaceDetector(config.face)
        self.face, self.scene = FaceEncoder(config.face), SceneEncoder(config.scene)
        self.voice_projector = VoiceProjector(config.voice.feature_size, d)
        self.face_projector = Projector(config.face.feature_size, d)
        self.scene_projector = Projector(config.scene.feature_size, d)
        self.heads = zero_heads(config)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: Path, ops: Ops | None = None) -> Self:
        """Read a checkpoint folder; raises CheckpointError naming every missing, extra or wrongly shaped tensor."""
        checkpoint = Checkpoint.open(folder)
        model = cls(checkpoint.config, ops)
        checkpoint.load_into(model.files())
        return model

    def files(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of each checkpoint file, by name: views into this model, to be read or filled."""
        decoder = {_llama_name(name): tensor for name, tensor in self.decoder.state_dict().items()}
        if self.config.backbone.tied_embeddings:
            del decoder["lm_head.weight"]
        heads = {name: tensor for name, tensor in self.heads.items() if not name.endswith(".ar_params")}
        for name in ("voice_projector", "face_projector", "scene_projector"):
            heads |= {f"{name}.{key}": tensor for key, tensor in self.get_submodule(name).state_dict().items()}
        encoders = {
            name: dict(self.get_submodule(name).state_dict()) for name in ("voice", "face_detector", "face", "scene")
        }
        return {"backbone": decoder, **encoders, "heads": heads}

    def run(self, part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of a part for its inputs, both by the contract's names. The decoder's heads are this model's."""
        spec = parts(self.config)[part]
        with torch.no_grad():
            if part == DECODER:
                return run_decoder(self.decoder, spec, tensors, self.heads)
            if part == EMBEDDING:
                outputs = self.decoder.embed_tokens(tensors["token_ids"].long())
            else:
                outputs = self.get_submodule(part)(*(tensors[i.name] for i in spec.inputs))
        return dict(
            zip((o.name for o in spec.outputs), outputs if isinstance(outputs, tuple) else (outputs,), strict=True)
        )


def run_decoder(
    decoder: Decoder, spec: Part, tensors: Mapping[str, Tensor], heads: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Call the decoder with the contract's flat names."""
    cache = [tensors[name] for name, _ in spec.state]
    plain = {i.name: tensors[i.name] for i in spec.inputs if i.name not in dict(spec.state)}
    outputs: dict[str, Tensor] = decoder(**plain, cache=cache, heads=heads)
    return outputs


def _llama_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"
