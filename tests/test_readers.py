"""Readers of published benchmarks on small folders of their layouts, and the way from a folder to its figures."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import accuracy
import accuracy_published as published
from readers import ca_mer, dfew, emer, mer2023
from readers.clips import BenchmarkClip

from mosear.errors import ConfigError

if TYPE_CHECKING:
    from toy_engine import Folders


def ca_mer_folder(root: Path) -> Path:
    for subset, labels in (
        ("video-aligned", ["Sad", "worried"]),
        ("audio-aligned", "angry"),
        ("consistent", ["happy"]),
    ):
        entries = [{"file_name": f"{subset}-1", "labels": labels}]
        (root / f"{subset}.json").write_text(json.dumps(entries))
        (root / subset).mkdir()
    return root


def mer_folder(root: Path) -> Path:
    (root / mer2023.LIST).write_text("sample_1 125 sad -10\nsample_2 80 worried 3.5\n\n")
    (root / "test3").mkdir()
    (root / "test3" / "sample_1.mp4").write_bytes(b"x")
    (root / mer2023.SPEECH).write_text("name,sentence_en\nsample_1,Go away\n")
    return root


def dfew_folder(root: Path) -> Path:
    tables = root / dfew.TABLES
    tables.mkdir(parents=True)
    for fold, rows in ((1, "2,1\n1,7\n"), (2, "3,4\n")):
        (tables / f"set_{fold}.csv").write_text("video_name,label\n" + rows)
    (root / "Clip" / "original").mkdir(parents=True)
    (root / "Clip" / "original" / "00002.mp4").write_bytes(b"x")
    return root


def test_ca_mer(tmp_path: Path) -> None:
    clips = ca_mer.read(ca_mer_folder(tmp_path))
    assert [(c.name, c.subset, c.labels) for c in clips] == [
        ("video-aligned-1", "video-aligned", ("sad", "worried")),
        ("audio-aligned-1", "audio-aligned", ("angry",)),
        ("consistent-1", "consistent", ("happy",)),
    ]
    assert clips[0].video == tmp_path / "video-aligned" / "video-aligned-1.avi"


def test_mer2023(tmp_path: Path) -> None:
    clips = mer2023.read(mer_folder(tmp_path))
    assert [(c.name, c.labels, c.words) for c in clips] == [
        ("sample_1", ("sad",), "Go away"),
        ("sample_2", ("worried",), ""),
    ]
    assert clips[0].video == tmp_path / "test3" / "sample_1.mp4"


def test_dfew(tmp_path: Path) -> None:
    clips = dfew.read(dfew_folder(tmp_path))
    assert [(c.name, c.labels, c.subset) for c in clips] == [
        ("2", ("happy",), "set_1"),
        ("1", ("fear",), "set_1"),
        ("3", ("angry",), "set_2"),
    ]
    assert clips[0].video == tmp_path / "Clip" / "original" / "00002.mp4"


def test_emer(tmp_path: Path) -> None:
    (tmp_path / emer.TABLE).write_text("name,labels\na,Sad; lonely\nb.mkv,happy\n")
    clips = emer.read(tmp_path)
    assert [(c.name, c.labels) for c in clips] == [("a", ("sad", "lonely")), ("b.mkv", ("happy",))]
    assert clips[1].video == tmp_path / "video" / "b.mkv"


@pytest.mark.parametrize(
    ("reader", "file", "content", "message"),
    [
        (ca_mer, "video-aligned.json", "{", "cannot be read as JSON"),
        (ca_mer, "video-aligned.json", "{}", "must hold a list"),
        (ca_mer, "video-aligned.json", '["a"]', "no text 'file_name'"),
        (ca_mer, "video-aligned.json", '[{"file_name": "a"}]', "a has labels None"),
        (mer2023, mer2023.LIST, "sample_1 125 bored 0\n", r"line 1: .* names 0 of"),
        (mer2023, mer2023.LIST, "", "names no clips"),
        (dfew, "x", "", "no set_1.csv"),
        (dfew, f"{dfew.TABLES}/set_1.csv", "video_name,label\n1,8\n", "label '8'"),
        (dfew, f"{dfew.TABLES}/set_1.csv", "name,label\n1,8\n", "lacks the column 'video_name'"),
        (emer, emer.TABLE, "name,labels\na, ;\n", "a has no labels"),
        (emer, "x", "", "cannot be read"),
    ],
)
def test_bad_folders_are_named(tmp_path: Path, reader: object, file: str, content: str, message: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(ConfigError, match=message):
        reader.read(tmp_path)  # type: ignore[attr-defined]


def clip(labels: tuple[str, ...], subset: str = "all") -> BenchmarkClip:
    return BenchmarkClip(name="x", video=Path("x"), labels=labels, subset=subset)


def test_each_benchmark_has_its_own_metric() -> None:
    clips = [clip(("sad", "worried"), "a"), clip(("angry",), "b")]
    found = published.open_vocabulary(clips, [{"sad"}, {"angry", "happy"}])
    assert found["a accuracy"] == 1 and found["a recall"] == 0.5 and found["b accuracy"] == 0.5
    assert found["average"] == pytest.approx(0.75)
    assert published.overlap(clips, [{"fearful"}, set()]) == {"label overlap": 0.25}
    single = [clip(("fear",)), clip(("fear",)), clip(("happy",))]
    figures = published.one_label(single, [{"fearful"}, {"happy"}, {"happy"}])
    assert figures == {"weighted F1": pytest.approx(2 / 3), "WAR": pytest.approx(2 / 3), "UAR": 0.75}


def test_failed_clips_are_counted() -> None:
    clips = [clip(("happy",)), clip(("sad",))]
    keys = [question.key for question in published.questions(clips, published.BENCHMARKS["dfew"].task)]
    found = published.evaluate(published.BENCHMARKS["dfew"], clips, {keys[0]: {"joint": {"label": "happy"}}}, ["happy"])
    assert (found["clips"], found["answered"]) == (2, 1)
    assert found["of those answered"]["WAR"] == 1 and found["failed as wrong"]["WAR"] == 0.5  # type: ignore[index]
    assert found["labels that the model has no word for"] == ["sad"]


def test_one_command_from_folder_to_table(
    tmp_path: Path, folders: "Folders", clip: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    root = dfew_folder(tmp_path / "dfew")
    (root / "Clip" / "original" / "00001.mp4").write_bytes(clip)
    command = [
        "--benchmark",
        "dfew",
        "--root",
        str(root),
        "--engine",
        str(folders.engine),
        "--work",
        str(tmp_path / "w"),
    ]
    for _ in range(2):  # the second run asks nothing
        assert accuracy.main([*command, "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "dfew.json").read_text())
    assert found["answered"] == 1 and {key.split("/")[1] for key in found["failed"]} == {"2", "3"}
    assert "00003.avi" in next(why for key, why in found["failed"].items() if key.endswith("/3"))
    said = capsys.readouterr()
    assert "1 of 3 clips answered" in said.out and "3 of 3 answers are in" in said.err
    assert accuracy.main([*command[:2], "--root", str(tmp_path), *command[4:]]) == 1
