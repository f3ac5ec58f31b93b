"""Parts of toys as ONNX files, each exported once in a test run, by whichever worker comes first: an export takes 10 s."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from toy import toy_model

from mosear.config import ModelConfig
from mosear.contract import parts
from mosear_export.ops import ExportOps
from mosear_export.to_onnx import export_part


def export_toy(config: ModelConfig, name: str, folder: Path) -> Path:
    """Put a part of the toy of a configuration into `folder`, one of pytest's own (`tmp_path`, `mktemp`)."""
    run = folder.parent.parent if "PYTEST_XDIST_WORKER" in os.environ else folder.parent
    kept = run / "toy_exports" / hashlib.sha256(f"{name} {config!r}".encode()).hexdigest()[:20]
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=kept.parent))
        export_part(toy_model(config, ops=ExportOps()), parts(config)[name], aside / f"{name}.onnx")
        try:
            aside.rename(kept)
        except OSError:  # another worker was first
            shutil.rmtree(aside)
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    return folder / f"{name}.onnx"
