"""The demo's plans, really built within 2 GB, every attention fused (seconds: docs/targets.md)."""

from pathlib import Path

import pytest

from mosear.artifacts import Manifest
from mosear.engine import KIND
from mosear.recipe import Recipe
from mosear_export.build_tensorrt import build_engine
from mosear_export.demo.assemble import assemble
from mosear_export.demo.fetch import DemoFiles
from mosear_export.export import export_checkpoint

RECIPE = Path(__file__).parents[1] / "export" / "recipes" / "rtx-fp16.toml"
MEMORY_MB, LAYERS = 2048, 30


@pytest.mark.full
@pytest.mark.demo
def test_the_demos_plans_are_built_within_2_gb(demo_files: DemoFiles, tmp_path: Path) -> None:
    checkpoint = assemble(demo_files, tmp_path / "checkpoints", print)
    exported = export_checkpoint(checkpoint, tmp_path / "onnx", print)
    plans = Manifest.load(
        build_engine(Recipe.load(RECIPE), exported, tmp_path / "engines", print), kind=KIND, remedy=""
    ).notes["plans"]
    assert isinstance(plans, dict)
    assert max(plan["memory_mb"] for plan in plans.values()) < MEMORY_MB
    profiles = plans["decoder.plan"]["report"]["profiles"]
    assert [profile["fused_attentions"] for profile in profiles] == [LAYERS, LAYERS]
