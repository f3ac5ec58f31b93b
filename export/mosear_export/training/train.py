"""Training of the heads on the frozen backbone: projectors, experts, gate and modality weights. Fixed seeds."""

import dataclasses
import enum
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mosear.config import ARConfig, Policy
from mosear.contract import MODALITY_WEIGHT
from mosear.errors import ConfigError
from mosear.kernels.reallocated_attention.policy import params
from mosear.runtime.prompt import PromptBuilder
from mosear_export.model.face import LABELS as FACE_LABELS
from mosear_export.model.projector import Projector, VoiceProjector
from mosear_export.model.whole import ReferenceModel
from mosear_export.training import linear, regularise
from mosear_export.training.batch import Batch
from mosear_export.training.examples import Example, Sampler
from mosear_export.training.features import Features, Labelled, Report
from mosear_export.training.ops import TrainOps

PROJECTORS = {"face": "face_projector", "scene": "scene_projector", "voice": "voice_projector"}
VOICE_DECAY = 1e-2  # of the voice's linear classifier (training/linear.py)
SHARES = (0.1, 0.9)  # of audio, drawn for each batch with reallocation


class Start(enum.StrEnum):
    """Where projectors of face and voice start: from linear classifiers of the frozen features, or at random."""

    CLASSIFIER = "classifier"
    RANDOM = "random"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How heads are trained. load, entropy, balance: factors of training/regularise.py's terms."""

    steps: int = 200
    batch: int = 10
    learning_rate: float = 1e-3
    projector_rate: float = 0.2  # of the learning rate
    weight_decay: float = 0.01
    warm_up: int = 20
    noise: float = 0.3  # standard deviation added to standardised features
    load: float = 0.01
    entropy: float = 0.0
    balance: float = 0.01
    direct: float = 0.5  # share of examples whose text rows see no face and no voice (training/ops.py)
    reasons: float = 0.5  # share of examples answered by a reason; the others by a label alone
    reallocate: float = 0.5  # share of batches with attention reallocated; 0: never, as the paper's
    start: Start = Start.CLASSIFIER
    base: str = ""  # heads file that training goes on from (seen of the same data); empty: from the start
    plain: bool = False  # one LoRA for all modalities in place of experts, as a peer
    left_out: tuple[str, ...] = ("14", "15")  # speakers that training never hears: a woman and a man
    held_faces: int = (
        0  # training photos of each label kept out and measured in place of the dev photos, to choose settings
    )
    seed: int = 0
    bfloat16: bool = (
        False  # matrix products in bfloat16: a gain where the CPU has them, four times the time where it has not
    )
    threads: int = 0  # 0: torch's own choice
    save_every: int = 20  # steps

    def __post_init__(self) -> None:
        for name in ("direct", "reasons", "reallocate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it is a share, from 0 to 1")
        for name in ("steps", "batch", "learning_rate", "save_every"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be above 0")


class Trainer:
    """Owns the trainable tensors of a model (built with TrainOps) and turns examples into batches."""

    def __init__(self, model: ReferenceModel, builder: PromptBuilder, features: Features, config: TrainConfig) -> None:
        assert isinstance(model.decoder.ops, TrainOps)
        self.model, self.builder, self.config, self.ops = model, builder, config, model.decoder.ops
        torch.manual_seed(config.seed)
        self.random = torch.Generator().manual_seed(config.seed)
        self.shared: dict[str, Tensor] = {}  # plain LoRA: the one B of all modalities, by the name of their B
        self._initialise(features)
        if config.base:
            self._go_on_from(Path(config.base), features.faces)
        self.trained = {name: tensor for name, tensor in model.heads.items() if tensor.requires_grad} | self.shared
        self.projected = {
            f"{name}.{key}": tensor.requires_grad_()
            for name in PROJECTORS.values()
            for key, tensor in model.get_submodule(name).named_parameters()
        }
        rates = ((self.trained, 1.0), (self.projected, config.projector_rate))
        self.optimiser = torch.optim.AdamW(
            [{"params": list(p.values()), "rate": rate * config.learning_rate} for p, rate in rates],
            weight_decay=config.weight_decay,
        )

    def _initialise(self, features: Features) -> None:
        model = self.model
        for name, tensor in model.heads.items():
            if name.endswith(".a"):
                nn.init.kaiming_uniform_(tensor, a=5**0.5)
            elif name.endswith(".gate"):
                nn.init.normal_(tensor, std=0.02)
            if self.config.plain and name.endswith(".b"):
                self.shared[name] = torch.zeros(model.config.mose.rank, tensor.shape[1]).requires_grad_()
            elif name.endswith(".a") or (not self.config.plain and name.endswith((".gate", ".b", MODALITY_WEIGHT))):
                tensor.requires_grad_()
        voices = features.voices
        labels = list(model.config.labels)
        directions = linear.words(
            {label: ids[0] for label, ids in zip(labels, self.builder.labels, strict=True)},
            model.decoder.embed_tokens.weight,
        )
        faces = features.faces
        variants, segments = voices.values.shape[1], voices.values.shape[2] - 1
        decay = linear.face_decay(faces.values.shape[-1])
        for projector, values, emotion, held in (
            (model.face_projector, faces.values, faces.emotion.repeat(faces.values.shape[1]), decay),
            (model.scene_projector, features.scenes, None, None),
            (model.voice_projector.clip, voices.values[:, :, 0], voices.emotion.repeat(variants), VOICE_DECAY),
            (model.voice_projector.segment, voices.values[:, :, 1:], voices.emotion.repeat(variants * segments), VOICE_DECAY),
        ):  # fmt: skip
            flat = torch.from_numpy(values).flatten(0, -2)
            projector.mean.copy_(flat.mean(0))
            projector.deviation.copy_(flat.std(0) + 1e-3)
            projector.gain.fill_(float(model.decoder.embed_tokens.weight.std()))
            if self.config.start is Start.RANDOM or emotion is None or held is None:
                continue
            standard = (flat - projector.mean) / projector.deviation
            with torch.enable_grad():
                weights = linear.fit(standard, labels, list(emotion), decay=held)
            linear.start_from(projector, weights, directions, standard)

    def _go_on_from(self, base: Path, faces: Labelled) -> None:
        """Take heads from a file, whose face projector then reads the classifier that is fitted to `faces`; raises ConfigError
        where it cannot be read or holds others."""
        own = self.model.files()["heads"]
        try:
            found = load_file(base)
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"base is {base}, which cannot be read as heads ({error}): name a file of train-heads"
            ) from None
        if {name: t.shape for name, t in found.items()} != {name: t.shape for name, t in own.items()}:
            raise ConfigError(f"base is {base}, whose tensors are not this model's: name heads of the same settings")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(found[name])
        projector, labels = self.model.face_projector, list(self.model.config.labels)
        flat = torch.from_numpy(faces.values).flatten(0, -2)
        standard = (flat - projector.mean) / projector.deviation
        emotion, decay = list(faces.emotion.repeat(faces.values.shape[1])), linear.face_decay(flat.shape[1])
        fitted = linear.fit(standard, labels, emotion, decay=decay)
        with torch.no_grad():
            linear.reread(projector, fitted[[labels.index(label) for label in FACE_LABELS]], standard)

    def tokens(self, example: Example, *, noise: bool) -> dict[str, Tensor]:
        """Projected tokens [n, d] of what is there, with noise on the features while training."""
        found = {}
        for field, name in PROJECTORS.items():
            features = getattr(example, field)
            if features is None:
                continue
            projector = self.model.get_submodule(name)
            values = torch.from_numpy(features)[None]
            if noise:
                inner = projector.segment if isinstance(projector, VoiceProjector) else projector
                assert isinstance(inner, Projector)
                deviation = inner.deviation
                values = values + torch.randn(values.shape, generator=self.random) * deviation * self.config.noise
            found[field] = projector(values)[0]
        return found

    def batch(self, examples: list[Example], *, noise: bool) -> Batch:
        """Examples as the decoder takes them."""
        model = self.model
        tokens = [self.tokens(example, noise=noise) for example in examples]
        return Batch.make(model.config, self.builder, model.decoder.embed_tokens, examples, tokens)

    def run_decoder(self, batch: Batch, *, ar: ARConfig | None) -> dict[str, Tensor]:
        """The decoder's outputs, attention reallocated on answer rows as `ar` says (None: not at all)."""
        self.ops.policy = Policy.OFF if ar is None else ar.policy
        if ar is not None:
            self.ops.params = params(ar, layer=0, heads=self.model.config.backbone.heads)
        self.ops.direct = batch.direct
        groups = len(self.model.config.groups)
        heads = self.model.heads | {name: one.repeat(groups, 1) for name, one in self.shared.items()}
        out: dict[str, Tensor] = self.model.decoder(**batch.inputs, cache=batch.cache, heads=heads)
        return out

    def loss(self, sampler: Sampler) -> Tensor:
        """Of a batch that is drawn: answers, and the gate's regularisers."""
        config, rng = self.config, sampler.rng
        share = float(rng.uniform(*SHARES)) if rng.random() < config.reallocate else None
        examples = [sampler.draw(share, direct=config.direct, reasons=config.reasons) for _ in range(config.batch)]
        ar = None if share is None else ARConfig(policy=Policy.TARGET, audio_share=share, move=1.0)
        batch = self.batch(examples, noise=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.bfloat16):
            out = self.run_decoder(batch, ar=ar)
        answers = F.cross_entropy(out["logits"].float().flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
        gates, there = out["expert_weights"].float(), batch.inputs["position"] >= 0
        groups = len(self.model.config.groups)
        return (
            answers
            + config.load * regularise.load(gates, batch.inputs["group"], there, groups=groups)
            + config.entropy * regularise.entropy(gates, there)
            + config.balance * regularise.balance(self.model.heads[MODALITY_WEIGHT])
        )

    def run(self, sampler: Sampler, report: Report, kept: Path) -> None:
        """Train from where `kept` (a file of this configuration's own) says, else from the start."""
        config, start = self.config, time.monotonic()
        first = self._resume(kept, sampler)
        if first:
            report(f"going on at step {first} from {kept}")
        for step in range(first, config.steps):
            left = min(1, (step + 1) / config.warm_up) * max(1 - step / config.steps, 0.02)
            for group in self.optimiser.param_groups:
                group["lr"] = group["rate"] * left
            loss = self.loss(sampler)
            self.optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*self.trained.values(), *self.projected.values()], 1.0)
            self.optimiser.step()
            if (step + 1) % config.save_every == 0 or step == config.steps - 1:
                self._keep(kept, sampler, step + 1)
                report(f"step {step + 1} of {config.steps}: loss {loss.item():.3f}, {time.monotonic() - start:.0f} s")

    def _keep(self, path: Path, sampler: Sampler, step: int) -> None:
        state = {
            "config": str(dataclasses.asdict(self.config)), "step": step, "optimiser": self.optimiser.state_dict(),
            "tensors": self.trained | self.projected, "noise": self.random.get_state(),
            "sampler": sampler.rng.bit_generator.state,
        }  # fmt: skip
        partial = path.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(path)

    def _resume(self, path: Path, sampler: Sampler) -> int:
        """The step to go on at. Raises ConfigError where the file is of another configuration."""
        if not path.exists():
            return 0
        state = torch.load(path, weights_only=True)
        if state["config"] != str(dataclasses.asdict(self.config)):
            raise ConfigError(f"{path} is of a training with other settings: remove it, or name another --work folder")
        with torch.no_grad():
            for name, tensor in (self.trained | self.projected).items():
                tensor.copy_(state["tensors"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.random.set_state(state["noise"])
        sampler.rng.bit_generator.state = state["sampler"]
        return int(state["step"])
