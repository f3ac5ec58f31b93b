"""Stage checkpoint to ONNX folder: every part exported, probed and given golden tensors."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import torch
from safetensors.torch import save_file

from mosear.artifacts import CONFIG, HEADS, ONNX, TOKENIZER, existing, publish
from mosear.contract import DECODER, parts
from mosear.hashes import HashOf, file_hash
from mosear_export import golden
from mosear_export.checkpoint import Checkpoint
from mosear_export.completeness import check_complete
from mosear_export.inputs import onnx_inputs
from mosear_export.model.whole import ReferenceModel
from mosear_export.ops import ExportOps
from mosear_export.probe import probe_axes
from mosear_export.to_onnx import export_part

Report = Callable[[str], None]
KIND = ONNX
GOLDEN = "golden"


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxFolder:
    """An exported model."""

    folder: Path
    key: str


def export_checkpoint(
    folder: Path, root: Path, report: Report, *, name: str = "onnx", hash_of: HashOf | None = None
) -> Path:
    """Export a checkpoint below `root`, or find the export there; returns its folder.

    hash_of: as for `existing`. Raises CheckpointError for a bad checkpoint and EngineError where a finished file fails its probe.
    """
    checkpoint = Checkpoint.open(folder, hash_of=hash_of or file_hash)
    inputs = onnx_inputs(checkpoint.hashes)
    if found := existing(root, kind=KIND, name=name, inputs=inputs, hash_of=hash_of):
        report(f"onnx: {found} is fresh")
        return found
    model = ReferenceModel.load(folder, ExportOps())
    with publish(root, kind=KIND, name=name, inputs=inputs) as draft:
        shutil.copy(folder / CONFIG, draft.folder)
        shutil.copy(folder / TOKENIZER, draft.folder)
        save_file({key: value.contiguous() for key, value in head_tensors(model).items()}, draft.folder / HEADS)
        (draft.folder / GOLDEN).mkdir()
        table = parts(model.config)
        for index, part in enumerate(table.values(), 1):
            report(f"onnx: {part.name} ({index} of {len(table)})")
            path = draft.folder / f"{part.name}.onnx"
            export_part(model, part, path)
            golden.write(model, part, draft.folder / GOLDEN / f"{part.name}.safetensors")
            probe_axes(model, part, path)
        draft.notes["unused"] = check_complete(model, draft.folder)
        draft.notes["onnxruntime"] = onnxruntime.__version__
    report(f"onnx: wrote {(root / name).resolve()}")
    return (root / name).resolve()


def head_tensors(model: ReferenceModel) -> dict[str, torch.Tensor]:
    """The decoder's head inputs, by the contract's names."""
    return {spec.name: model.heads[spec.name] for spec in parts(model.config)[DECODER].heads}
