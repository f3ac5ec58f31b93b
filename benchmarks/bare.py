"""Engines of the same backbone without the two mechanisms: what these cost is the difference."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from mosear.artifacts import TOKENIZER
from mosear.config import Policy
from mosear.recipe import Recipe

SUFFIX = "-bare"


def bare_engine(recipe: Recipe, checkpoint: Path, work: Path, say: Callable[[str], None]) -> Path:
    """Export and build the checkpoint below `work` with policy off and no adapted linear, or find it there."""
    from mosear_export import checkpoint as files
    from mosear_export.build import build_engine
    from mosear_export.export import export_checkpoint
    from mosear_export.model.whole import ReferenceModel

    full = ReferenceModel.load(checkpoint)
    config, source = full.config, full.files()
    config = dataclasses.replace(
        config, mose=dataclasses.replace(config.mose, targets=()), ar=dataclasses.replace(config.ar, policy=Policy.OFF)
    )
    bare = ReferenceModel(config)
    for name, tensors in bare.files().items():
        for key, tensor in tensors.items():
            tensor.copy_(source[name][key])
    files.save(work / "checkpoint", config, bare.files(), (checkpoint / TOKENIZER).read_text())
    onnx_folder = export_checkpoint(work / "checkpoint", work / "onnx", say)
    return build_engine(dataclasses.replace(recipe, name=recipe.name + SUFFIX), onnx_folder, work / "engines", say)
