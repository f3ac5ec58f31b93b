"""Checkpoint folder: config.json, tokenizer.json, one safetensors file for each set of weights, manifest.json.

Nothing in it is code. Loading is strict: the hash of every file, and the name and shape of every tensor, must be right.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mosear.artifacts import CHECKPOINT, CONFIG, TOKENIZER, Manifest, folder_hashes, key_of
from mosear.config import ModelConfig
from mosear.errors import CheckpointError, EngineError
from mosear.hashes import HashOf, file_hash

KIND = CHECKPOINT
REMEDY = "copy the folder anew from where it was made"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint folder whose files are those of its manifest."""

    folder: Path
    config: ModelConfig
    hashes: dict[str, str]

    @classmethod
    def open(cls, folder: Path, *, hash_of: HashOf = file_hash) -> Self:
        """Check the manifest and read the configuration; raises CheckpointError or ConfigError."""
        try:
            manifest = Manifest.load(folder, kind=KIND, remedy=REMEDY)
            manifest.verify(folder, remedy=REMEDY, hash_of=hash_of)
        except EngineError as error:
            raise CheckpointError(str(error)) from error
        return cls(folder=folder, config=ModelConfig.load(folder / CONFIG), hashes=manifest.files)

    def load_into(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Fill each file's tensors in place; raises CheckpointError that lists every fault of every file."""
        faults: list[str] = []
        for name, wanted in files.items():
            path = self.folder / f"{name}.safetensors"
            try:
                with safe_open(path, framework="pt") as file:
                    faults += _fill(path.name, file, wanted)
            except (OSError, SafetensorError) as error:
                faults.append(f"{path.name} cannot be read: {error}")
        if faults:
            raise CheckpointError(
                f"{self.folder} does not fit its {CONFIG}:\n  " + "\n  ".join(faults) + "\n"
                "Correct the configuration, or convert the checkpoint again."
            )


def _fill(where: str, file: safe_open, wanted: Mapping[str, Tensor]) -> list[str]:  # type: ignore[type-arg, valid-type, unused-ignore]
    present = set(file.keys())
    faults = [f"{where}: missing {name} {list(wanted[name].shape)}" for name in wanted if name not in present]
    faults += [f"{where}: extra {name}" for name in sorted(present - set(wanted))]
    for name in wanted:
        if name not in present:
            continue
        found = file.get_slice(name).get_shape()
        if found != list(wanted[name].shape):
            faults.append(f"{where}: {name} has shape {found}, not {list(wanted[name].shape)}")
        elif not faults:
            wanted[name].copy_(file.get_tensor(name))
    return faults


def save(folder: Path, config: ModelConfig, files: Mapping[str, Mapping[str, Tensor]], tokenizer: str) -> None:
    """Write a checkpoint into an empty folder: configuration, tokenizer, weights, manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save(folder / CONFIG)
    (folder / TOKENIZER).write_text(tokenizer)
    for name, tensors in files.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    seal(folder)


def seal(folder: Path) -> None:
    """Write the manifest of a checkpoint's files as they are now."""
    hashes = folder_hashes(folder)
    Manifest(kind=KIND, key=key_of(hashes), inputs={}, files=hashes, notes={}).save(folder)
