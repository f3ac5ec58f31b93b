"""A recipe: one deployable choice (target, precision, threads, limits), read strictly from a TOML file."""

import enum
import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from mosear.config import parse
from mosear.errors import ConfigError


class Target(enum.StrEnum):
    """Runtimes that engines are built for."""

    ONNXRUNTIME_CPU = "onnxruntime-cpu"


class Precision(enum.StrEnum):
    """Weights of the decoder's linear layers and head. Experts, gates and norms stay in fp32."""

    FP32 = "fp32"
    INT8 = "int8"


class Heads(enum.StrEnum):
    """Experts, gates and policy parameters as inputs bound once, or as constants of the graph."""

    INPUTS = "inputs"
    BAKED = "baked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request may ask for."""

    clip_seconds: float = 30.0
    clip_bytes: int = 64 << 20
    words: int = 4000  # characters
    prompt_tokens: int = 1024
    new_tokens: int = 256

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ConfigError(f"limits.{name} is {getattr(self, name)}: it must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All of a recipe file."""

    name: str
    target: Target = Target.ONNXRUNTIME_CPU
    precision: Precision = Precision.FP32
    block: int = 32  # weights that share a scale (int8)
    heads: Heads = Heads.INPUTS
    threads: int = 0  # 0: as many as this process may use
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.block not in (16, 32, 64, 128, 256):
            raise ConfigError(f"recipe {self.name}: block is {self.block}; choose 16, 32, 64, 128 or 256")
        if self.threads < 0:
            raise ConfigError(f"recipe {self.name}: threads is {self.threads}; 0 means all that this process may use")

    @property
    def used_threads(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a recipe; raises ConfigError naming file, key and value."""
        try:
            data = tomllib.loads(path.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist: name a recipe, such as export/recipes/cpu-fp32.toml") from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path} cannot be read as TOML: {error}") from error
        return parse(cls, data, where=str(path))
