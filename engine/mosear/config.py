"""Model configuration: what `config.json` of a checkpoint holds, parsed strictly into frozen dataclasses."""

import dataclasses
import difflib
import enum
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from mosear.errors import ConfigError

T = TypeVar("T")


class Route(enum.StrEnum):
    """Where the gate looks: at each token, or at the mean of a modality's prompt tokens."""

    TOKEN = "token"
    MODALITY = "modality"


class Select(enum.StrEnum):
    """How experts are mixed: by their soft weights, or the best one alone."""

    SOFT = "soft"
    TOP1 = "top1"


class Target(enum.StrEnum):
    """Linear layers that can carry experts."""

    Q_PROJ = "q_proj"
    K_PROJ = "k_proj"
    V_PROJ = "v_proj"
    O_PROJ = "o_proj"
    GATE_PROJ = "gate_proj"
    UP_PROJ = "up_proj"
    DOWN_PROJ = "down_proj"


class Policy(enum.StrEnum):
    """Attention reallocation policy (the map pi of the attention masses)."""

    OFF = "off"
    BALANCE = "balance"
    TARGET = "target"


class Statistic(enum.StrEnum):
    """What `balance` compares: a modality's mass, or its mass per visible key."""

    SUM = "sum"
    MEAN = "mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneConfig:
    """Shape of a LLaMA-type decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    rope_theta: float
    norm_eps: float
    max_positions: int
    tied_embeddings: bool

    def __post_init__(self) -> None:
        _check_positive("backbone", self, [field.name for field in dataclasses.fields(self)][:-1])
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"backbone.heads is {self.heads}, which is no multiple of kv_heads {self.kv_heads}: "
                "every key/value head must serve the same number of query heads"
            )
        if self.head_size % 2:
            raise ConfigError(f"backbone.head_size is {self.head_size}: rotary embedding needs an even number")

    def linear_size(self, target: "Target") -> tuple[int, int]:
        """Input and output width of a linear layer."""
        query, cached = self.heads * self.head_size, self.kv_heads * self.head_size
        hidden, wide = self.hidden_size, self.intermediate_size
        return {
            Target.Q_PROJ: (hidden, query),
            Target.K_PROJ: (hidden, cached),
            Target.V_PROJ: (hidden, cached),
            Target.O_PROJ: (query, hidden),
            Target.GATE_PROJ: (hidden, wide),
            Target.UP_PROJ: (hidden, wide),
            Target.DOWN_PROJ: (wide, hidden),
        }[target]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoSEConfig:
    """Modality-specific LoRA experts. What the paper leaves open is a choice here (docs/architecture.md)."""

    targets: tuple[Target, ...] = (Target.Q_PROJ, Target.V_PROJ)
    rank: int = 8
    alpha: float = 16.0
    experts: int = 2
    share_a: bool = True
    route: Route = Route.TOKEN
    select: Select = Select.SOFT

    def __post_init__(self) -> None:
        _check_positive("mose", self, ["rank", "experts"])
        if len(set(self.targets)) < len(self.targets):
            raise ConfigError(f"mose.targets is {list(map(str, self.targets))}: name each layer once")

    @property
    def scale(self) -> float:
        """alpha / R."""
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True, kw_only=True)
class ARConfig:
    """Attention reallocation: one policy for the model, switched on in `layers` (empty: all of them)."""

    policy: Policy = Policy.BALANCE
    statistic: Statistic = Statistic.SUM
    layers: tuple[int, ...] = ()
    move: float = 0.5
    tau_lo: float = 0.4
    tau_hi: float = 0.6
    ramp: float = 0.1
    sigma: float = 0.02
    audio_share: float = 0.5
    strength: float = 0.5

    def __post_init__(self) -> None:
        for name in ("move", "tau_lo", "tau_hi", "audio_share", "strength"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"ar.{name} is {getattr(self, name)}: it is a share, from 0 to 1")
        if self.tau_lo >= self.tau_hi:
            raise ConfigError(f"ar.tau_lo {self.tau_lo} must lie below ar.tau_hi {self.tau_hi}")
        if self.ramp <= 0 or self.sigma <= 0:
            raise ConfigError(f"ar.ramp {self.ramp} and ar.sigma {self.sigma} must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConflictConfig:
    """When a conflict report says that face and voice disagree (`runtime/disagreement.py`): temperatures that calibrate what
    is said from each alone, and the score from which on they disagree (None: where their labels differ)."""

    face_temperature: float = 1.0
    voice_temperature: float = 1.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        _check_positive("conflict", self, ["face_temperature", "voice_temperature"])
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ConfigError(f"conflict.threshold is {self.threshold}: it is a probability, from 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class VoiceConfig:
    """Voice encoder (Whisper architecture, its first `blocks` blocks) and how a clip becomes tokens."""

    sample_rate: int = 16000
    mels: int = 80
    window: int = 400
    hop: int = 160
    hidden_size: int = 384
    blocks: int = 2
    heads: int = 6
    intermediate_size: int = 1536
    max_frames: int = 1500
    segments: int = 8

    @property
    def tokens(self) -> int:
        """One token for the whole clip, then one for each segment."""
        return 1 + self.segments

    @property
    def feature_size(self) -> int:
        """Mean and deviation of the hidden state."""
        return 2 * self.hidden_size

    @property
    def max_seconds(self) -> float:
        """Longest sound that the position table covers (two mel hops a frame)."""
        return self.max_frames * 2 * self.hop / self.sample_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class FaceConfig:
    """Face detector and expression net: one token for each sampled frame."""

    detector_size: int = 416
    detector_threshold: float = 0.4
    crop_size: int = 112
    feature_size: int = 263
    frames: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneConfig:
    """Scene net: pooled patches of the first frame."""

    image_size: int = 224
    feature_size: int = 1280
    grid: int = 2

    @property
    def tokens(self) -> int:
        return self.grid * self.grid


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptConfig:
    """Words around the modality tokens. `{face}`, `{scene}`, `{voice}`, `{words}` stand for what a clip brings."""

    prefix: str
    face: str
    scene: str
    voice: str
    words: str
    classify: str
    reason: str
    suffix: str
    label_prefix: str
    reason_prefix: str
    stop: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """All of `config.json`."""

    name: str
    groups: tuple[str, ...] = ("text", "video", "audio")
    labels: tuple[str, ...]
    backbone: BackboneConfig
    mose: MoSEConfig
    ar: ARConfig
    voice: VoiceConfig
    face: FaceConfig
    scene: SceneConfig
    prompt: PromptConfig
    conflict: ConflictConfig = dataclasses.field(default_factory=ConflictConfig)

    def __post_init__(self) -> None:
        if self.groups[:3] != ("text", "video", "audio") or len(self.groups) > 8:
            raise ConfigError(
                f"groups is {list(self.groups)}: it must begin with text, video, audio and hold at most 8 names"
            )
        if not self.labels:
            raise ConfigError("labels is empty: name at least one emotion")
        if unknown := [layer for layer in self.ar.layers if not 0 <= layer < self.backbone.layers]:
            raise ConfigError(f"ar.layers names {unknown}: backbone.layers is {self.backbone.layers}, counted from 0")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read `config.json`; raises ConfigError naming file, field and value."""
        try:
            data = json.loads(path.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist: name a checkpoint folder with a config.json") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
        return parse(cls, data, where=str(path))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def parse(cls: type[T], data: object, *, where: str) -> T:
    """Build dataclass `cls` from plain data, strictly.

    Raises ConfigError for an unknown key (with the nearest known one), a missing key, or a value of the wrong type.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must be a table of {cls.__name__} keys, not {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}  # Any: no type for "a dataclass type"
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"{where} has an unknown key '{key}': {hint}")
    values: dict[str, object] = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], f"{where}: {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where} lacks the key '{name}' ({hints[name]}): add it")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _check_positive(section: str, config: object, names: Iterable[str]) -> None:
    for name in names:
        if (value := getattr(config, name)) <= 0:
            raise ConfigError(f"{section}.{name} is {value}: it must be above 0")


def _value(hint: Any, data: object, where: str) -> object:  # Any: a type hint has no static type
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return parse(hint, data, where=where)
    if origin is tuple and isinstance(data, list | tuple):
        return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        return _value(next(a for a in arguments if a is not type(None)), data, where)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        choices = [member.value for member in hint]
        if data not in choices:
            raise ConfigError(f"{where} is {data!r}: choose one of {', '.join(map(str, choices))}")
        return hint(data)
    if hint is float and isinstance(data, int | float) and not isinstance(data, bool):
        if not math.isfinite(data):
            raise ConfigError(f"{where} is {data!r}: it must be a finite number")
        return float(data)
    if hint in (int, str, bool) and type(data) is hint:
        return data
    raise ConfigError(f"{where} is {data!r}, which is not of type {getattr(hint, '__name__', hint)}")
