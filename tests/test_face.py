"""Face nets against the answers of face-api's own JavaScript (made by face_api_factory.py)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from face_api_factory import DATA, NETS, pictures, write_weights
from torch import Tensor

from mosear.config import FaceConfig
from mosear.errors import CheckpointError
from mosear_export.demo.face_api import read_detector, read_expression, read_weights
from mosear_export.demo.fetch import DemoFiles
from mosear_export.model.face import LABELS, FaceDetector, FaceEncoder

# Measured: 7e-6 beside values up to 17 (real weights), 2e-5 beside 88 (made-up ones).
TOLERANCE = {"atol": 1e-4, "rtol": 1e-5}
Original = dict[str, Any]  # Any: a JSON document


def load(manifest: Path) -> tuple[Path, Path]:
    return manifest, manifest.with_name(manifest.name.replace("-weights_manifest.json", ".bin"))


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("face_api")
    write_weights(folder)
    detector, expression = (folder / f"{net}-weights_manifest.json" for net in NETS)
    return detector, expression


def original(name: str) -> Original:
    answers: Original = json.loads((DATA / f"{name}_weights.json").read_text())
    return answers


def detector(manifest: Path, config: FaceConfig | None = None) -> FaceDetector:
    net = FaceDetector(config or FaceConfig()).eval()
    net.load_state_dict(read_detector(*load(manifest)))
    return net


def encoder(manifest: Path) -> FaceEncoder:
    net = FaceEncoder(FaceConfig()).eval()
    net.load_state_dict(read_expression(*load(manifest)))
    return net


def picture(*names: str) -> Tensor:
    return torch.stack([torch.from_numpy(pictures()[name]) for name in names])


@torch.no_grad()
def check_detector(net: FaceDetector, expected: Original) -> None:
    boxes, scores = net(picture("square"))
    assert boxes.shape == (1, expected["anchors"], 4) and scores.shape == (1, expected["anchors"])
    index = torch.tensor([found["index"] for found in expected["detections"]])
    best = torch.tensor([found["score"] for found in expected["detections"]])
    torch.testing.assert_close(scores[0, index], best, **TOLERANCE)
    torch.testing.assert_close(
        boxes[0, index], torch.tensor([found["box"] for found in expected["detections"]]), **TOLERANCE
    )
    torch.testing.assert_close(scores.sum(), torch.tensor(expected["score_sum"]), **TOLERANCE)
    assert scores[0].topk(len(index)).indices.sort().values.equal(index.sort().values)


@torch.no_grad()
def check_encoder(net: FaceEncoder, expected: Original) -> None:
    names = tuple(expected["expressions"])
    answers = net(picture(*names))
    rows = [expected["expressions"][name]["features"] + expected["expressions"][name]["logits"] for name in names]
    torch.testing.assert_close(answers, torch.tensor(rows), **TOLERANCE)


def test_the_detector_answers_as_the_original_with_made_up_weights(made_up: tuple[Path, Path]) -> None:
    check_detector(detector(made_up[0]), original("made_up"))


def test_the_encoder_answers_as_the_original_with_made_up_weights(made_up: tuple[Path, Path]) -> None:
    check_encoder(encoder(made_up[1]), original("made_up"))


@pytest.mark.demo
def test_the_detector_answers_as_the_original(demo_files: DemoFiles) -> None:
    check_detector(detector(demo_files.face_detector_manifest), original("real"))


@pytest.mark.demo
def test_the_encoder_answers_as_the_original(demo_files: DemoFiles) -> None:
    net = encoder(demo_files.face_expression_manifest)
    check_encoder(net, original("real"))
    with torch.no_grad():
        assert LABELS[int(net(picture("face"))[0, -len(LABELS) :].argmax())] == "happy"


@pytest.mark.parametrize("size", [96, 224, 415])
def test_boxes_scale_with_the_picture(made_up: tuple[Path, Path], size: int) -> None:
    net = detector(made_up[0], FaceConfig(detector_size=size))
    with torch.no_grad():
        boxes, scores = net(torch.full((2, size, size, 3), 117, dtype=torch.uint8))
    assert boxes.shape == (2, 5 * net.cells**2, 4) and scores.shape == boxes.shape[:2]
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    assert centres.min() > 0 and centres.max() < 1


def test_both_nets_export_with_any_number_of_pictures(made_up: tuple[Path, Path]) -> None:
    generator = torch.Generator().manual_seed(0)
    for net, size in ((detector(made_up[0]), 416), (encoder(made_up[1]), 112)):
        batch = {0: torch.export.Dim("N", min=1, max=64)}
        images = torch.randint(256, (3, size, size, 3), dtype=torch.uint8, generator=generator)
        program = torch.export.export(net, (images[:2],), dynamic_shapes=(batch,), strict=True).module()
        for some in (images[:1], images):
            with torch.no_grad():
                torch.testing.assert_close(program(some), net(some), rtol=0, atol=1e-6)


def test_a_manifest_that_does_not_fit_its_binary_is_refused(made_up: tuple[Path, Path], tmp_path: Path) -> None:
    manifest, binary = load(made_up[0])
    (tmp_path / "short.bin").write_bytes(binary.read_bytes()[:-1])
    (tmp_path / "long.bin").write_bytes(binary.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="ends before conv8/bias"):
        read_weights(manifest, tmp_path / "short.bin")
    with pytest.raises(CheckpointError, match="names"):
        read_weights(manifest, tmp_path / "long.bin")
