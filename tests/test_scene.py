"""Scene encoder against the stored answers of `efficientnet-lite-pytorch` (made by efficientnet_factory.py)."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from efficientnet_factory import DATA, made_up, picture, samples
from torch import Tensor

from mosear.config import SceneConfig
from mosear.errors import CheckpointError
from mosear_export.demo.efficientnet import fold, read_scene
from mosear_export.demo.fetch import DemoFiles
from mosear_export.model.scene import SceneEncoder

WHOLE_MAP = SceneConfig(grid=7)


@pytest.fixture(scope="module")
def original() -> dict[str, Any]:  # Any: a JSON document
    answers: dict[str, Any] = json.loads(DATA.read_text())
    return answers


@pytest.fixture(scope="module")
def state(original: dict[str, Any]) -> dict[str, Tensor]:
    return fold(made_up(original["shapes"]))


def encoder(state: Mapping[str, Tensor], config: SceneConfig) -> SceneEncoder:
    net = SceneEncoder(config).eval()
    net.load_state_dict(state)
    return net


@torch.no_grad()
def check(state: Mapping[str, Tensor], expected: list[float]) -> None:
    actual = torch.tensor(samples(encoder(state, WHOLE_MAP)(picture())))
    # Measured: 2e-5 at most, beside features of 0 to 6.
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=1e-4)
    assert 0.1 < (actual > 0).float().mean() < 1.0


def test_features_are_those_of_the_original_with_made_up_weights(
    state: dict[str, Tensor], original: dict[str, Any]
) -> None:
    check(state, original["made_up"])


@pytest.mark.demo
def test_features_are_those_of_the_original(demo_files: DemoFiles, original: dict[str, Any]) -> None:
    state = read_scene(demo_files.efficientnet)
    assert all(tensor.is_contiguous() for tensor in state.values())
    check(state, original["real"])


@pytest.mark.parametrize("grid", [1, 2, 3, 7])
def test_patches_are_pooled_as_adaptive_average_pooling_does(state: dict[str, Tensor], grid: int) -> None:
    with torch.no_grad():
        whole = encoder(state, WHOLE_MAP)(picture())
        pooled = encoder(state, SceneConfig(grid=grid))(picture())
    expected = F.adaptive_avg_pool2d(whole.mT.unflatten(2, (7, 7)), grid).flatten(2).mT
    assert pooled.shape == (1, grid * grid, 1280)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-5)


def test_it_exports_with_any_batch(state: dict[str, Tensor]) -> None:
    net = encoder(state, SceneConfig())
    images = torch.cat([picture(), picture().flip(2), picture().flip(1)])
    batch = {0: torch.export.Dim("B", min=1, max=16)}
    program = torch.export.export(net, (images[:2],), dynamic_shapes=(batch,), strict=True).module()
    for some in (images[:1], images):
        with torch.no_grad():
            torch.testing.assert_close(program(some), net(some), rtol=0, atol=1e-5)


def test_another_picture_size_gives_the_same_grid(state: dict[str, Tensor]) -> None:
    net = encoder(state, dataclasses.replace(SceneConfig(), image_size=96))
    with torch.no_grad():
        assert net(picture()[:, :96, :96]).shape == (1, 4, 1280)


def test_a_checkpoint_of_another_net_is_refused(tmp_path: Path, original: dict[str, Any]) -> None:
    checkpoint = made_up({"_conv_stem.weight": original["shapes"]["_conv_stem.weight"]})
    torch.save(checkpoint, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no EfficientNet-Lite0"):
        read_scene(tmp_path / "other.pth")
