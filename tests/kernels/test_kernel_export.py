"""`mosear export kernels`: what it writes, the same bytes again, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest

from mosear.artifacts import MANIFEST, folder_hashes
from mosear.cli import main
from mosear.errors import ConfigError, EngineError
from mosear.kernels.chips import ARCHS
from mosear_export.kernels import export_kernels, parse_archs, read

HERE = Path(__file__).parent


def export(root: Path, said: list[str]) -> Path:
    return export_kernels((80, 100), root, said.append, data=("bf16",), modules=("tiny_kernels",), paths=(str(HERE),))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    said: list[str] = []
    return export(tmp_path_factory.mktemp("kernels"), said), said


def test_manifest_states_all_that_a_launch_needs(exported: tuple[Path, list[str]]) -> None:
    folder, said = exported
    rows = read(folder)
    assert [(row["arch"], [case["label"] for case in row["cases"]]) for row in rows] == [
        (arch, labels) for arch in (80, 100) for labels in (["tiny", "again"], ["aligned"], ["large"])
    ]
    row = rows[0]
    assert [p["name"] for p in row["parameters"]] == [
        "x_ptr", "w_ptr", "row_group_ptr", "rows", "cols", "y_ptr", "global_scratch", "profile_scratch"
    ]  # fmt: skip
    assert row["cases"][1] == {"label": "again", "grid": [3, 1, 1], "scalars": {"rows": 151, "cols": 512}}
    assert row["constants"] == {"N": 64, "BLOCK": 64, "SCALE": 0.5}
    assert row["resources"]["registers"] > 0 and row["warps"] == 4 and row["symbol"] == "product"
    assert (folder / row["cubin"]).read_bytes().startswith(b"\x7fELF")
    assert ".target sm_80" in (folder / row["ptx"]).read_text()
    assert any(line.startswith("6/6 ") for line in said), "no progress was told"


@pytest.mark.full
def test_a_rerun_gives_the_same_bytes(exported: tuple[Path, list[str]], tmp_path: Path) -> None:
    first, _ = exported
    second = export(tmp_path, [])
    assert second != first and second.name == first.name
    assert folder_hashes(second) == folder_hashes(first)
    assert (second / MANIFEST).read_bytes() == (first / MANIFEST).read_bytes()


def test_a_folder_that_is_there_is_not_made_again(exported: tuple[Path, list[str]]) -> None:
    folder, _ = exported
    said: list[str] = []
    assert export(folder.parent, said) == folder
    assert said == [f"kernels: {folder} is up to date"]


def test_an_altered_binary_is_refused(exported: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder = tmp_path / "altered"
    shutil.copytree(exported[0], folder)
    row = read(folder)[0]
    (folder / row["cubin"]).write_bytes(b"")
    with pytest.raises(EngineError, match=f"{row['cubin']} was altered"):
        read(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("80,75", "--arch names '75'"),
        ("sm_90", "--arch names 'sm_90'"),
        ("", "--arch is empty"),
        (",", "--arch is empty"),
    ],
)
def test_archs_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_archs(text)


def test_archs() -> None:
    assert parse_archs("90, 80,90") == (80, 90)
    assert parse_archs(None) == ARCHS


def test_the_command_line_refuses_what_does_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "kernels", "--arch", "75"]) == 1
    assert "--arch names '75': kernels are compiled for 80, 86, 89, 90, 100, 120" in capsys.readouterr().err
    assert main(["export", "kernels", "--checkpoint", "x"]) == 1
    assert main(["export", "onnx", "--arch", "80"]) == 1
    assert "--arch goes with `export kernels`" in capsys.readouterr().err


def test_manifest_names_no_machine(exported: tuple[Path, list[str]]) -> None:
    text = (exported[0] / MANIFEST).read_text()
    assert str(HERE) not in text and "seconds" not in json.loads(text)["notes"]["kernels"][0]
