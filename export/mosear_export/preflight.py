"""`mosear build --dry-run`: what would stop a build, in seconds and without building, each finding with its mend."""

import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto

from mosear.artifacts import CONFIG
from mosear.backends.tensorrt_builder import MODULES, RTX
from mosear.backends.tensorrt_load import INSTALL, first_device, unusable
from mosear.config import ModelConfig
from mosear.config import Target as Linear
from mosear.contract import DECODER, parts
from mosear.errors import EngineError
from mosear.recipe import ON_TENSORRT, Mechanisms, Recipe, Target
from mosear_export import masked, pack, plugin_flavour
from mosear_export.ops import DOMAIN

ROWS_OF_A_REPORT = 3
# Peak memory of a build, fitted to the most measured: the demo's decoder (30 layers, 269 MB of weights) took 1.5 to 1.9 GB,
# a decoder of 8 layers (246 MB)
# 1.05 GB, a part without layers 0.25 GB.
BASE_MB, PER_WEIGHT_BYTE, PER_LAYER_MB = 250, 2.0, 37


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What would go wrong (or what is good to know), where, and what to do."""

    where: str
    problem: str
    mend: str
    stops: bool = True

    def __str__(self) -> str:
        return f"{'stops' if self.stops else 'note '} {self.where}: {self.problem}: {self.mend}"


def preflight(recipe: Recipe, onnx_folder: Path) -> list[Finding]:
    """All findings for a recipe's target, those that stop a build first."""
    config = ModelConfig.load(onnx_folder / CONFIG)
    found = [*_shapes(recipe, config)]
    if recipe.target is Target.TENSORRT_RTX:
        found += [*_operators(onnx_folder, config), *_memory(recipe, config)]
    if recipe.target is Target.TENSORRT:
        found += [*_gpu(recipe), *_plugins(recipe, config)]
    if recipe.target in ON_TENSORRT:
        found += _library(recipe)
    return sorted(found, key=lambda finding: not finding.stops)


def _shapes(recipe: Recipe, config: ModelConfig) -> Iterator[Finding]:
    limits, longest = recipe.limits, config.backbone.max_positions
    if limits.prompt_tokens + limits.new_tokens > longest:
        yield Finding(
            where="limits", problem=f"prompt and answer together exceed the model's {longest} positions",
            mend="lower limits.prompt_tokens or limits.new_tokens",
        )  # fmt: skip
    if recipe.target not in ON_TENSORRT:
        return
    plans = recipe.plans
    if plans.capacity > longest:
        yield Finding(
            where="tensorrt.capacity", problem=f"{plans.capacity} slots, the model knows {longest} positions",
            mend=f"lower it to {longest}",
        )  # fmt: skip
    if plans.decode_batch < ROWS_OF_A_REPORT:
        yield Finding(
            where="tensorrt.decode_batch", problem=f"{plans.decode_batch} rows; a conflict report decodes 3 at once",
            mend="raise it to 3",
        )  # fmt: skip
    if limits.prompt_tokens > plans.prefill_rows:
        yield Finding(
            where="tensorrt.prefill_rows", stops=False,
            problem=f"a prompt of {limits.prompt_tokens} tokens enters in pieces of {plans.prefill_rows}",
            mend="nothing need be done; raise it to read long prompts in one call",
        )  # fmt: skip


def _operators(onnx_folder: Path, config: ModelConfig) -> Iterator[Finding]:
    if unusable(RTX):
        return
    trt = importlib.import_module(RTX)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    parser = trt.OnnxParser(builder.create_network(0), logger)
    for name in parts(config):
        model = onnx.load(onnx_folder / f"{name}.onnx", load_external_data=False)
        for operator, node in sorted(operators(model, config).items()):
            if not parser.supports_operator(operator):
                yield Finding(
                    where=f"{name}, node {node}", problem=f"TensorRT-RTX has no operator {operator}",
                    mend="write that part of the model in operators that it has",
                )  # fmt: skip


def operators(model: ModelProto, config: ModelConfig) -> dict[str, str]:
    """Operators that a prepared graph will hold, and a node of each; mechanisms by the functions that take their place."""
    found = {node.op_type: node.name for node in model.graph.node if node.domain != DOMAIN}
    if any(node.domain == DOMAIN for node in model.graph.node):
        for function in (*masked.functions(config), *pack.functions(config)):
            found |= {node.op_type: function.name for node in function.node if node.op_type != "Constant"}
    return found


def _memory(recipe: Recipe, config: ModelConfig) -> Iterator[Finding]:
    needed, here = memory_mb(config), machine_mb()
    if needed > here:
        yield Finding(
            where="this machine", problem=f"the decoder's build needs about {needed} MB (computed), there are {here}",
            mend="build on a machine with more memory; it needs no GPU",
        )  # fmt: skip
    if needed > recipe.plans.builder_memory_mb:
        yield Finding(
            where=DECODER, problem=f"its build needs about {needed} MB (computed), builder_memory_mb allows "
            f"{recipe.plans.builder_memory_mb}", mend=f"set tensorrt.builder_memory_mb to {needed} or more",
        )  # fmt: skip


def machine_mb() -> int:
    """This machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20


def memory_mb(config: ModelConfig) -> int:
    """Peak memory of the decoder's build, computed: base + weights * PER_WEIGHT_BYTE + layers * PER_LAYER_MB."""
    backbone = config.backbone
    weights = backbone.vocab_size * backbone.hidden_size * 2
    for target in Linear:
        width_in, width_out = backbone.linear_size(target)
        weights += 2 * width_in * width_out * backbone.layers
    return round(BASE_MB + PER_WEIGHT_BYTE * weights / 1e6 + PER_LAYER_MB * backbone.layers)


def _library(recipe: Recipe) -> Iterator[Finding]:
    module = MODULES[recipe.target]
    if why := unusable(module):
        yield Finding(where="this environment", problem=why, mend=INSTALL[module])


def _gpu(recipe: Recipe) -> Iterator[Finding]:
    """TensorRT itself builds on the GPU that will run the plan."""
    (wanted,), device = recipe.plans.compute_capabilities, first_device()
    if device.compute_capability is None:
        yield Finding(
            where="this machine", problem=device.reason,
            mend=f"build on a machine with a GPU of compute capability {wanted}",
        )  # fmt: skip
    elif device.compute_capability != wanted:
        yield Finding(
            where="tensorrt.compute_capabilities", problem=f"{wanted} is wanted, this GPU is {device.compute_capability}",
            mend="name this one's, or build on the other",
        )  # fmt: skip


def _plugins(recipe: Recipe, config: ModelConfig) -> Iterator[Finding]:
    """Sizes that our kernels serve."""
    if recipe.plans.mechanisms is not Mechanisms.PLUGINS:
        return
    try:
        plugin_flavour.check(config)
    except EngineError as error:
        yield Finding(where=DECODER, problem=str(error), mend="set tensorrt.mechanisms to operators")
