"""Stage checkpoint to ONNX folder: every part exported, probed and given golden tensors."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime
import onnxscript
import torch
from safetensors.torch import save_file

from mosear.artifacts import existing, file_hash, publish
from mosear.contract import DECODER, parts
from mosear.engine import CONFIG, HEADS, TOKENIZER
from mosear_export import golden, plain
from mosear_export.checkpoint import Checkpoint
from mosear_export.completeness import check_complete
from mosear_export.model.whole import ReferenceModel
from mosear_export.ops import ExportOps
from mosear_export.precision import short
from mosear_export.probe import probe_axes
from mosear_export.reference_backend import ReferenceBackend
from mosear_export.to_onnx import export_part

Report = Callable[[str], None]
KIND = "onnx"
GOLDEN = "golden"


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxFolder:
    """An exported model."""

    folder: Path
    key: str


def sources_hash() -> dict[str, str]:
    """Hashes of the code that decides what an exported graph is."""
    package = Path(plain.__file__).parent
    files = [package / name for name in ("plain.py", "ops.py", "to_onnx.py", "golden.py", "precision/short.py")]
    files += sorted((package / "model").glob("*.py"))
    return {path.name: file_hash(path) for path in files}


def export_checkpoint(folder: Path, root: Path, report: Report, *, name: str = "onnx") -> Path:
    """Export a checkpoint below `root`, or find the export there; returns its folder.

    Raises CheckpointError for a bad checkpoint and EngineError where a finished file fails its probe.
    """
    checkpoint = Checkpoint.open(folder)
    inputs: dict[str, object] = {
        "checkpoint": checkpoint.hashes,
        "code": sources_hash(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxscript": onnxscript.__version__,
    }
    if found := existing(root, kind=KIND, name=name, inputs=inputs):
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
        short.write(ReferenceBackend(model), draft.folder)
        draft.notes["unused"] = check_complete(model, draft.folder)
        draft.notes["onnxruntime"] = onnxruntime.__version__
    report(f"onnx: wrote {(root / name).resolve()}")
    return (root / name).resolve()


def head_tensors(model: ReferenceModel) -> dict[str, torch.Tensor]:
    """The decoder's head inputs, by the contract's names."""
    return {spec.name: model.heads[spec.name] for spec in parts(model.config)[DECODER].heads}
