"""Stage checkpoint to ONNX folder: every part exported, probed and given golden tensors."""

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import torch
from safetensors.torch import save_file

from mosear.artifacts import CONFIG, HEADS, ONNX, TOKENIZER, Manifest, existing, key_of, publish
from mosear.contract import DECODER, Part, parts
from mosear.errors import EngineError
from mosear.hashes import HashOf, file_hash
from mosear_export import golden
from mosear_export.checkpoint import Checkpoint
from mosear_export.completeness import check_complete
from mosear_export.inputs import exported_inputs, onnx_inputs
from mosear_export.model.whole import ReferenceModel
from mosear_export.ops import ExportOps
from mosear_export.precision import short
from mosear_export.probe import probe_axes
from mosear_export.reference_backend import ReferenceBackend
from mosear_export.to_onnx import export_part

Report = Callable[[str], None]
KIND = ONNX
GOLDEN = "golden"
PROJECTOR = "_projector"  # how the names of such parts end


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
        table, newest, keys = parts(model.config), Newest(root / name, hash_of or file_hash), {}
        for index, part in enumerate(table.values(), 1):
            path = draft.folder / f"{part.name}.onnx"
            keys[part.name] = key_of(exported_inputs(part.name, checkpoint.hashes, constants(model, part)))
            stays = newest.copy(part.name, keys[part.name], draft.folder)
            report(f"onnx: {part.name} ({index} of {len(table)}){' stays as it is' if stays else ''}")
            if not stays:
                export_part(model, part, path)
            golden.write(model, part, draft.folder / GOLDEN / f"{part.name}.safetensors")
            if not stays:
                probe_axes(model, part, path)
        short.write(ReferenceBackend(model), draft.folder)
        draft.notes["exported"] = keys
        draft.notes["unused"] = check_complete(model, draft.folder)
        draft.notes["onnxruntime"] = onnxruntime.__version__
    report(f"onnx: wrote {(root / name).resolve()}")
    return (root / name).resolve()


class Newest:
    """The newest export, whose parts stay where what they were made from does: a changed expert changes no graph."""

    def __init__(self, folder: Path, hash_of: HashOf) -> None:
        self.folder, self.hash_of = folder.resolve(), hash_of
        self.files: dict[str, str] = {}
        self.keys: Mapping[str, object] = {}
        with contextlib.suppress(EngineError):
            manifest = Manifest.load(folder, kind=KIND, remedy="")
            keys = manifest.notes.get("exported")
            self.files, self.keys = manifest.files, keys if isinstance(keys, dict) else {}

    def copy(self, part: str, key: str, folder: Path) -> bool:
        """Copy a part's files into `folder` if they are there, whole, and of this key (onnx reads no weights with two links)."""
        names = [name for name in (f"{part}.onnx", f"{part}.onnx.data") if name in self.files]
        if self.keys.get(part) != key or not names:
            return False
        paths = [self.folder / name for name in names]
        if any(not path.is_file() or self.hash_of(path) != self.files[path.name] for path in paths):
            return False
        for path in paths:
            shutil.copyfile(path, folder / path.name)
        return True


def constants(model: ReferenceModel, part: Part) -> str:
    """Hash of a projector's tensors, which lie in one file with the experts; of other parts their file's hash says all."""
    if not part.name.endswith(PROJECTOR):
        return ""
    tensors = model.get_submodule(part.name).state_dict()
    return key_of({name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()})


def head_tensors(model: ReferenceModel) -> dict[str, torch.Tensor]:
    """The decoder's head inputs, by the contract's names."""
    return {spec.name: model.heads[spec.name] for spec in parts(model.config)[DECODER].heads}
