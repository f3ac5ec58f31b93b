"""The conflict benchmark: pairs, journal, figures and reports, on a small folder and an engine that is known."""

import dataclasses
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import accuracy_factory as factory
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import accuracy
import accuracy_card
import accuracy_parity as parity
import accuracy_report as report
import conflict_picture
from accuracy_asking import Journal, Question
from accuracy_bars import bars
from accuracy_pairs import Kind, encode_all, make_pairs, read_faces, read_voices, truth

from mosear.errors import ConfigError, MediaError, ServingError
from mosear.runtime.request import Answer, Request

ASKED = ("--pairs", "6", "--reasons", "2", "--speakers", "14", "--strengths", "0", "0.2", "0.4", "0.5", "0.8", "1")


@pytest.fixture(autouse=True)
def no_face_net(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "face_net", lambda encoded, faces: 0.9)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return factory.data_folder(tmp_path / "data")


def options(data: Path, tmp_path: Path, *more: str) -> Any:  # Any: argparse's namespace
    where = ["--data", str(data), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    return accuracy.parse_arguments([*where, *ASKED, *more])


def results(data: Path, tmp_path: Path, answer: Any = factory.answer_to) -> dict[str, Any]:
    with ExitStack() as stack:
        found = accuracy.run_conflict(options(data, tmp_path), factory.engine(answer), stack)  # type: ignore[arg-type]
    return json.loads(json.dumps(found))["engine"]


def test_pairs_are_what_they_are_called(data: Path) -> None:
    voices, faces = read_voices(data, ["14"]), read_faces(data, "dev")
    pairs = make_pairs(voices, faces, factory.LABELS, count=12, seed=3)
    assert [pair.kind for pair in pairs] == [kind for kind in Kind for _ in range(12)]
    assert {voices[p.voice].origin for p in pairs} == {"14"} and {faces[p.face].origin for p in pairs} == {"dev"}
    for pair in pairs:
        heard, seen = voices[pair.voice].emotion, faces[pair.face].emotion
        loud = (heard != "neutral", seen != "neutral")
        assert (heard == seen) is (pair.kind is Kind.CONSISTENT)
        if pair.kind is not Kind.CONSISTENT:
            assert (
                loud
                == {Kind.VOICE_LED: (True, False), Kind.FACE_LED: (False, True), Kind.OPEN: (True, True)}[pair.kind]
            )
        assert truth(pair, voices, faces) == (None if all(loud) and heard != seen else heard if loud[0] else seen)
    assert pairs == make_pairs(voices, faces, factory.LABELS, count=12, seed=3)
    assert pairs != make_pairs(voices, faces, factory.LABELS, count=12, seed=4)
    consistent = [voices[p.voice].emotion for p in pairs[:12]]
    assert {consistent.count(label) for label in factory.LABELS} == {3}


def test_pairs_need_shared_labels(data: Path) -> None:
    with pytest.raises(ConfigError, match="neutral and two other"):
        make_pairs(read_voices(data, ["14"]), read_faces(data, "dev"), ("neutral", "happy"), count=1, seed=0)


def test_folders_that_are_none_are_named(tmp_path: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match=r"no speaker 99"):
        read_voices(data, ["14", "99"])
    with pytest.raises(ConfigError, match=r"labels.csv cannot be read"):
        read_faces(tmp_path, "dev")
    (data / "faces" / "dev" / "labels.csv").write_text("file,feeling\na,b\n")
    with pytest.raises(ConfigError, match="emotion"):
        read_faces(data, "dev")


def test_clips_are_encoded_once(data: Path, tmp_path: Path) -> None:
    backend, voices, faces = factory.Backend(), read_voices(data, ["14"]), read_faces(data, "dev")
    made = [
        encode_all(backend, factory.config(), voices, faces, work=tmp_path, schema=schema, say=print)  # type: ignore[arg-type]
        for schema in ("a", "a", "b")
    ]
    assert backend.calls == 2 * (len(voices) + len(faces))
    assert made[0].of(0, 1).keys() == {"voice", "face"} and np.array_equal(made[0].voices, made[1].voices)
    assert made[0].faces[:, 0].tolist() == [factory.LABELS.index(face.emotion) for face in faces]


def test_figures_of_a_known_engine(data: Path, tmp_path: Path) -> None:
    found = results(data, tmp_path)
    assert found["words"]["voice"]["accuracy"]["value"] == found["words"]["face"]["unweighted recall"] == 1.0
    for strength, follows in (("0", "voice"), ("0.4", "voice"), ("0.5", "face"), ("1", "face")):
        row = found["labels"][strength]
        assert all(row[kind]["accuracy"]["value"] == 1 for kind in ("consistent", "voice-led", "face-led"))
        assert row["open"][follows]["value"] == 1 and row["open"]["neither"]["value"] == 0
    assert found["strength"]["voice share"] == [1, 1, 1, 0, 0, 0] and found["strength"]["end to end"]["value"] == -1
    assert found["strength"]["slope"]["high"] < 0 and found["strength"]["labels that change"] == 1
    assert found["detection"]["auroc"]["value"] == found["detection"]["independent words"] == 1
    assert found["detection"]["labels differ"]["recall of consistent"] == 1
    assert found["reasons"]["n"] == 8 and found["reasons"]["set average"] == 1
    assert found["reasons"]["whether they agree"]["value"] == 1
    assert np.array(found["masses"]).shape == (2, 2, 3) and found["failed"] == {}


def test_a_worse_engine_has_worse_figures(data: Path, tmp_path: Path) -> None:
    def deaf(request: Request) -> Answer:
        answer = factory.answer_to(request)
        happy = factory.judged("happy")
        return dataclasses.replace(answer, joint=happy, voice=happy if answer.voice else None)

    found = results(data, tmp_path, deaf)
    assert found["words"]["voice"]["accuracy"]["value"] == 0.25 and found["words"]["voice"]["by emotion"]["happy"] == 1
    assert found["labels"]["0"]["open"]["neither"]["value"] > 0
    assert found["detection"]["labels differ"]["recall of consistent"] < 1
    assert not any(bar.met for bar in bars(found, default=0.5) if "voice word" in bar.what)


def test_bars_are_judged(data: Path, tmp_path: Path) -> None:
    judged = {bar.what: bar for bar in bars(results(data, tmp_path), default=0.5)}
    assert len(judged) == 11
    missed = [what for what, bar in judged.items() if not bar.met]
    assert missed == ["each in 40 to 60 % of these", "strength moves reliance: Spearman 0.9 or more in size"]


def test_a_stopped_run_goes_on(data: Path, tmp_path: Path) -> None:
    asked: list[Request] = []

    def answer(request: Request) -> Answer:
        asked.append(request)
        if len(asked) == 20:
            raise ServingError("gone")
        return factory.answer_to(request)

    with pytest.raises(ServingError):
        results(data, tmp_path, answer)
    results(data, tmp_path, answer)
    assert len(asked) == 20 + 1 + (24 + 24 * 6 + 8) - 20  # the one that failed is asked again, none of the 19 before it
    assert len((tmp_path / "work" / "accuracy-engine.jsonl").read_text().splitlines()) == 1 + 24 + 24 * 6 + 8


def test_failures_are_named_and_kept(data: Path, tmp_path: Path) -> None:
    def answer(request: Request) -> Answer:
        if "voice" not in request.features:
            raise MediaError("no sound")
        return factory.answer_to(request)

    found = results(data, tmp_path, answer)
    assert len(found["failed"]) == 12 and set(found["failed"].values()) == {"MediaError: no sound"}
    assert "face" not in found["words"]
    lines = report.text("engine", found, [])
    assert "12 questions failed:" in lines and any(line.startswith("- face:0: MediaError") for line in lines)


def test_a_journal_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    Journal(path, {"seed": 0}).ask_all([_question("a")], factory.answer_to, print)
    assert "a" in Journal(path, {"seed": 0}).records
    with pytest.raises(ConfigError, match="other settings"):
        Journal(path, {"seed": 1})
    path.write_text("a\nb\n")
    with pytest.raises(ConfigError, match="no journal"):
        Journal(path, {"seed": 0})


def test_a_line_that_was_cut_is_asked_again(tmp_path: Path) -> None:
    path, questions = tmp_path / "a.jsonl", [_question("a"), _question("b")]
    Journal(path, {}).ask_all(questions, factory.answer_to, print)
    path.write_text(path.read_text()[:-9])
    journal = Journal(path, {})
    assert set(journal.records) == {"a"}
    journal.ask_all(questions, factory.answer_to, print)
    assert set(Journal(path, {}).answered(questions)) == {"a", "b"}


def test_what_failed_is_asked_again_if_wished(tmp_path: Path) -> None:
    def fails(request: Request) -> Answer:
        raise MediaError("broken")

    journal = Journal(tmp_path / "a.jsonl", {})
    journal.ask_all([_question("a")], fails, print)
    journal.ask_all([_question("a")], factory.answer_to, print)
    assert journal.failed() == {"a": "MediaError: broken"}
    journal.ask_all([_question("a")], factory.answer_to, print, retry=True)
    assert journal.failed() == {}


def test_reports_are_written(data: Path, tmp_path: Path) -> None:
    found = results(data, tmp_path)
    paths = report.write({"engine": found}, {"engine": bars(found, default=0.5)}, tmp_path / "out", name="accuracy")
    assert [path.suffix for path in paths] == [".json", ".md", ".png"]
    table = paths[1].read_text()
    assert "| 0.5 | open | - | 0.0 % (0.0 to 0.0, n 6) | 100.0 % (100.0 to 100.0, n 6) |" in table
    assert json.loads(paths[0].read_text())["engine"]["settings"]["seed"] == 0
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_parity_sees_an_engine_that_differs(data: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        made = factory.engine()
        plan = accuracy.make_plan(options(data, tmp_path), made)  # type: ignore[arg-type]
        wanted = _answers(plan, tmp_path / "a.jsonl", factory.answer_to)
        stubborn = _answers(
            plan, tmp_path / "b.jsonl", lambda r: factory.answer_to(dataclasses.replace(r, strength=0.0))
        )
        stack.close()
    builder: Any = type("Words", (), {"encode": lambda self, text: text.split()})()
    same = parity.compare(plan, made.config, builder, wanted, wanted)
    assert same["labels that agree"] == 1.0 and not same["first tokens that differ"]
    assert parity.faults(same, precision="fp32") == []
    other = parity.compare(plan, made.config, builder, stubborn, wanted)
    assert other["largest distance of the voice share"] == pytest.approx(0.25)
    assert len(parity.faults(other, precision="fp32")) == 2
    assert parity.first_difference(builder, "they do agree", "they do not") == 2


@pytest.mark.parametrize("wrong", [[], ["--data", "x", "--strengths", "2"], ["--data", "x", "--policy", "off"]])
def test_bad_arguments_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        accuracy.parse_arguments(wrong)


def test_policies_are_parsed() -> None:
    assert accuracy.policy_of("target:0.9", factory.config().ar).audio_share == 0.9
    with pytest.raises(ConfigError, match=r"target:0\.9"):
        accuracy.policy_of("push", factory.config().ar)


def _question(key: str) -> Question:
    features = {"voice": np.zeros((1, 1), np.float32)}
    return Question(key=key, make=lambda: Request(features=features))


def _answers(plan: Any, path: Path, answer: Any) -> Any:  # Any: of the benchmark's modules, whose path is made here
    journal = Journal(path, {})
    journal.ask_all(plan.questions(), answer, print)
    return journal.answered(plan.questions())


def test_a_card_takes_its_figures_from_results(data: Path, tmp_path: Path) -> None:
    found = results(data, tmp_path)
    (path,) = report.write({"engine": found}, {"engine": []}, tmp_path / "out", name="a")[:1]
    card = f"# Card\n{accuracy_card.BEGIN}\nstale figures\n{accuracy_card.END}\nlimits\n"
    filled = accuracy_card.filled(card, path, "engine")
    assert filled.startswith("# Card\n") and filled.endswith("limits\n") and "stale" not in filled
    assert "| voice | 100.0 % (100.0 to 100.0, n 12) | 100.0 % |" in filled
    assert accuracy_card.filled(filled, path, "engine") == filled
    for text, subject, message in ((card, "served", "no results of 'served'"), ("# Card", "engine", "markers")):
        with pytest.raises(ConfigError, match=message):
            accuracy_card.filled(text, path, subject)


def test_a_conflict_report_is_drawn(tmp_path: Path) -> None:
    asked = Request(
        task="conflict", features={n: np.ones((1, 1), np.float32) * i for n, i in (("voice", 1), ("face", 2))}
    )
    (tmp_path / "a.json").write_text(json.dumps(factory.answer_to(asked).record()))
    conflict_picture.draw(json.loads((tmp_path / "a.json").read_text()), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
