"""Parts of toys as ONNX files, each exported once in a test run: an export takes 10 s."""

import dataclasses
from pathlib import Path

from shared_files import made_once
from toy import toy_model

from mosear.artifacts import key_of
from mosear.config import ModelConfig
from mosear.contract import parts
from mosear_export.ops import ExportOps
from mosear_export.to_onnx import export_part


def export_toy(config: ModelConfig, name: str, shared: Path) -> Path:
    """The file of a part of a configuration's toy, below the fixture `shared`."""

    def make(folder: Path) -> None:
        export_part(toy_model(config, ops=ExportOps()), parts(config)[name], folder / f"{name}.onnx")

    return made_once(shared / f"{name}-{key_of(dataclasses.asdict(config))}", make) / f"{name}.onnx"
