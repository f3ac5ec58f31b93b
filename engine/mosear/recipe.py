"""A recipe: one deployable choice (target, precision, threads, limits), read strictly from a TOML file."""

import dataclasses
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
    ONNXRUNTIME_CUDA = "onnxruntime-cuda"
    TENSORRT_RTX = "tensorrt-rtx"
    TENSORRT = "tensorrt"


class Precision(enum.StrEnum):
    """Weights of the decoder's linear layers and head. Experts, gates and norms stay in the target's wider type.

    On ONNX Runtime that is fp32. On TensorRT it is 16 bits: products in fp16 or bf16, all else in fp32; below 16 bits
    the weights alone are narrower (products in fp16).
    """

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"


PRECISIONS = {
    Target.ONNXRUNTIME_CPU: (Precision.FP32, Precision.INT8),
    Target.ONNXRUNTIME_CUDA: (Precision.FP32,),
    Target.TENSORRT_RTX: (Precision.FP16, Precision.BF16, Precision.INT8, Precision.INT4, Precision.FP8),
    Target.TENSORRT: (Precision.FP16, Precision.BF16),
}
ON_TENSORRT = (Target.TENSORRT_RTX, Target.TENSORRT)
CAPACITY_STEP = 64  # cache slots: a capacity is a multiple
# Compute capabilities that TensorRT-RTX builds for. It takes 7.5 too, but has no fp32 products there, which pooling needs.
CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")
PLUGIN_CAPABILITIES = (
    "8.0",
    "8.6",
    "8.9",
    "9.0",
    "10.0",
    "12.0",
)  # of our kernels, which plans of the target tensorrt hold
FP8_CAPABILITIES = ("8.9", "12.0", "12.1")


# Linear layers by kind, joined where they share an input: in the order of a decoder layer, then the vocabulary head.
LINEARS = ("qkv", "o", "gate_up", "down", "head")


class Mechanisms(enum.StrEnum):
    """How the decoder's two mechanisms get into a plan: our kernels as plugins, or operators that TensorRT fuses."""

    PLUGINS = "plugins"
    OPERATORS = "operators"


class Compatibility(enum.StrEnum):
    """On which GPUs beside the one that built it a plan of the target tensorrt runs, at some price in speed."""

    NONE = "none"
    SAME_COMPUTE_CAPABILITY = "same_compute_capability"
    AMPERE_PLUS = "ampere_plus"  # 8.0 and above


class Provider(enum.StrEnum):
    """Who runs a graph of the target onnxruntime-cuda: ONNX Runtime's own kernels, or TensorRT within it."""

    CUDA = "cuda"
    TENSORRT = "tensorrt"


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
class TensorRT:
    """Chips, and the shapes that a plan serves. A plan has two profiles: prefill (rows of a prompt) and decode (one row)."""

    compute_capabilities: tuple[str, ...] = ("8.6", "8.9", "12.0")
    capacity: int = 1280  # cache slots of a sequence
    prefill_batch: int = 4
    prefill_rows: int = 512  # rows of a prompt in one call
    decode_batch: int = 8
    builder_memory_mb: int = (
        4096  # that the builder may allocate: of this machine (tensorrt-rtx), of the GPU (tensorrt)
    )
    mechanisms: Mechanisms = Mechanisms.OPERATORS
    compatibility: Compatibility = Compatibility.NONE

    def __post_init__(self) -> None:
        for name in self.__slots__[1:-2]:
            if getattr(self, name) <= 0:
                raise ConfigError(f"tensorrt.{name} is {getattr(self, name)}: it must be above 0")
        if min(self.prefill_batch, self.decode_batch) < 2:
            raise ConfigError(
                f"tensorrt.prefill_batch and decode_batch are {self.prefill_batch} and {self.decode_batch}: they must be 2 "
                "or more, as a plan of a fixed batch of 1 in one profile holds weights twice"
            )
        if self.capacity % CAPACITY_STEP:
            raise ConfigError(
                f"tensorrt.capacity is {self.capacity}: it must be a multiple of {CAPACITY_STEP}, in which a cache grows, so "
                "that each sequence begins at an address that TensorRT takes"
            )
        if self.prefill_rows > self.capacity:
            raise ConfigError(
                f"tensorrt.prefill_rows is {self.prefill_rows}: a call cannot hold more rows than the cache has slots, "
                f"tensorrt.capacity {self.capacity}"
            )
        given = self.compute_capabilities
        if not given or len(set(given)) < len(given):
            raise ConfigError(f"tensorrt.compute_capabilities is {list(given)}: name at least one, and each once")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All of a recipe file."""

    name: str
    target: Target = Target.ONNXRUNTIME_CPU
    precision: Precision = Precision.FP32
    block: int = 32  # weights that share a scale (int8 on onnxruntime-cpu; int4: 128)
    fine: tuple[str, ...] = ()  # kinds of linear layers that take fine_block (int8 on onnxruntime-cpu)
    fine_block: int = 32
    wide: tuple[str, ...] = ()  # kinds of linear layers that stay in fp32 (int8 on onnxruntime-cpu)
    heads: Heads = Heads.INPUTS
    threads: int = 0  # 0: as many as this process may use
    limits: Limits = field(default_factory=Limits)
    provider: Provider = Provider.CUDA  # of the target onnxruntime-cuda
    tensorrt: TensorRT | None = None  # of the TensorRT targets

    def __post_init__(self) -> None:
        for name in ("block", "fine_block"):
            if getattr(self, name) not in (16, 32, 64, 128, 256):
                raise ConfigError(f"recipe {self.name}: {name} is {getattr(self, name)}; choose 16, 32, 64, 128 or 256")
        for name in ("fine", "wide"):
            if unknown := set(getattr(self, name)) - set(LINEARS):
                raise ConfigError(
                    f"recipe {self.name}: {name} has {', '.join(sorted(unknown))}; choose of {', '.join(LINEARS)}"
                )
        if self.threads < 0:
            raise ConfigError(f"recipe {self.name}: threads is {self.threads}; 0 means all that this process may use")
        fits = PRECISIONS[self.target]
        if self.precision not in fits:
            raise ConfigError(
                f"recipe {self.name}: precision is {self.precision}; target {self.target} takes {', '.join(fits)}"
            )
        if self.provider is not Provider.CUDA and self.target is not Target.ONNXRUNTIME_CUDA:
            raise ConfigError(f"recipe {self.name}: provider is for the target {Target.ONNXRUNTIME_CUDA}: leave it out")
        if self.target in ON_TENSORRT:
            self._check_tensorrt()
            self._check_chips()
        elif self.tensorrt is not None:
            raise ConfigError(f"recipe {self.name}: a [tensorrt] table is for the targets {', '.join(ON_TENSORRT)}")

    def _check_tensorrt(self) -> None:
        settings, needed = self.plans, self.limits.prompt_tokens + self.limits.new_tokens
        if needed > settings.capacity:
            raise ConfigError(
                f"recipe {self.name}: limits.prompt_tokens + limits.new_tokens is {needed}, above tensorrt.capacity "
                f"{settings.capacity}: raise the capacity, or lower the limits"
            )
        without = [c for c in settings.compute_capabilities if c not in FP8_CAPABILITIES]
        if self.precision is Precision.FP8 and without:
            raise ConfigError(
                f"recipe {self.name}: precision is fp8, which compute capability {', '.join(without)} does not have: "
                f"leave it out of tensorrt.compute_capabilities (fp8: {', '.join(FP8_CAPABILITIES)}), or choose fp16"
            )
        if self.precision is Precision.INT4 and self.block != 128:
            raise ConfigError(f"recipe {self.name}: block is {self.block}; int4 on TensorRT takes blocks of 128")

    def _check_chips(self) -> None:
        given, with_plugins = self.plans.compute_capabilities, self.plans.mechanisms is Mechanisms.PLUGINS
        served: tuple[str, ...]
        if self.target is Target.TENSORRT_RTX:
            if with_plugins:
                raise ConfigError(
                    f"recipe {self.name}: tensorrt.mechanisms is plugins, which TensorRT-RTX does not take: leave it out, or "
                    f"choose the target {Target.TENSORRT}"
                )
            if self.plans.compatibility is not Compatibility.NONE:
                raise ConfigError(
                    f"recipe {self.name}: tensorrt.compatibility is {self.plans.compatibility}, which TensorRT-RTX has not: "
                    "name each chip in tensorrt.compute_capabilities"
                )
            served, note = (
                CAPABILITIES,
                (" (7.5 lacks fp32 products; 9.0 and 10.0, the data-centre chips, need the target tensorrt)"),
            )
        else:
            served, note = PLUGIN_CAPABILITIES, ""
            if with_plugins and self.plans.compatibility is Compatibility.AMPERE_PLUS:
                raise ConfigError(
                    f"recipe {self.name}: tensorrt.compatibility is ampere_plus, and our kernels in a plan are those of one "
                    "chip: set tensorrt.mechanisms to operators, or leave compatibility out"
                )
            if len(given) != 1:
                raise ConfigError(
                    f"recipe {self.name}: tensorrt.compute_capabilities is {list(given)}: the target {self.target} builds on "
                    "the GPU that will run the plan: name that one's"
                )
        for capability in given:
            if capability not in served:
                raise ConfigError(
                    f"recipe {self.name}: tensorrt.compute_capabilities has {capability!r}: the target {self.target} serves "
                    f"{', '.join(served)}{note}"
                )

    @property
    def plans(self) -> TensorRT:
        """Settings of the TensorRT targets."""
        return self.tensorrt or TensorRT()

    def record(self) -> dict[str, object]:
        """What a manifest says of it: without the settings of other targets."""
        found = dataclasses.asdict(self)
        if self.target not in ON_TENSORRT:
            del found["tensorrt"]
        if self.target is not Target.ONNXRUNTIME_CUDA:
            del found["provider"]
        return found

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
