"""The load benchmarks' arithmetic and reports, without a server."""

import csv
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import load
import observed
import perf_analyzer
import served
import throughput_report as report
import workload

from mosear.errors import BusyError, DeadlineError, EngineError
from mosear.runtime.pipeline import Event, StageDone, Words
from mosear.runtime.prompt import Task
from mosear.runtime.request import Answer, Judgement
from mosear.serving.tensors import request_tensors


def answer(text: str = "calm now", *, tokens: int = 4, score: float = -0.5) -> Answer:
    return Answer(
        task=Task.REASON, text=text, joint=Judgement(label="calm", scores={"calm": score, "sad": -1.0}),
        modality_mass=np.zeros((1, 2, 3), np.float32), expert_weights=np.zeros((3, 2), np.float32),
        groups=("text", "video", "audio"), tokens=tokens, prompt_tokens=9,
        timings_ms={"media": 5.0, "prefill": 100.0, "total": 300.0}, notes=(),
    )  # fmt: skip


def timed(start_s: float, *words_s: float, end_s: float, text: str = "calm now") -> load.Timed:
    return load.Timed(start_s=start_s, words_s=words_s, end_s=end_s, answer=answer(text))


def events(pause_s: float = 0.0) -> Iterator[Event]:
    yield StageDone(name="media", ms=1.0)
    for words in ("calm", " now"):
        time.sleep(pause_s)
        yield Words(text=words)
    yield answer()


def test_times_of_an_answer() -> None:
    found = timed(10.0, 10.5, 10.6, 10.8, end_s=11.0)
    assert found.first_token_ms == pytest.approx(500) and found.total_ms == pytest.approx(1000)
    assert found.gaps_ms == pytest.approx([100, 200])


def test_first_token_is_the_first_words() -> None:
    found = load.time_events(events(0.02))
    assert len(found.words_s) == 2 and found.first_token_ms >= 20 and found.gaps_ms[0] >= 20
    assert found.total_ms >= found.first_token_ms + found.gaps_ms[0]


def test_rates_leave_rise_and_end_out() -> None:
    answered = [timed(0, end_s=end_s) for end_s in (9, 1, 2, 4, 3)]
    found = load.Load(answered=answered, failed=Counter(BusyError=1), begun_s=0, full_s=5, rise=2)
    assert [one.end_s for one in found.steady] == [1, 2, 3, 4]
    # from 2 s to 5 s: a third of the answer at 3 s, half of that at 4 s, a third of that at 9 s, four tokens each
    assert found.window_s == (2, 5) and found.counted == pytest.approx(7 / 6)
    assert found.requests_s == pytest.approx(7 / 18) and found.tokens_s == pytest.approx(28 / 18)
    assert (found.tries, found.busy_share) == (6, pytest.approx(1 / 6))


def test_rates_of_few_answers() -> None:
    one = load.Load(answered=[timed(0, end_s=4)], failed=Counter(), begun_s=0, full_s=2, rise=8)
    assert (len(one.steady), one.seconds, one.requests_s) == (1, 4, 0.25)  # none in time: all count, from the begin
    two = load.Load(answered=[timed(0, end_s=4), timed(0, end_s=6)], failed=Counter(), begun_s=0, full_s=9, rise=8)
    assert two.window_s == (4, 6) and two.requests_s == pytest.approx(1 / 3 / 2)


def test_rates_do_not_depend_on_waves() -> None:
    """Four askers, each answer takes 10 s: 0.4 answers/s, whether they end together or spread out."""
    for offsets in ((0, 0, 0, 0), (0, 1, 2, 3), (0, 2.5, 5, 7.5)):
        starts = [wave * 10 + offset for offset in offsets for wave in range(4)]
        answered = [timed(start_s, end_s=start_s + 10) for start_s in starts]
        found = load.Load(answered=answered, failed=Counter(), begun_s=0, full_s=40, rise=4)
        assert found.requests_s == pytest.approx(0.4)


def test_closed_loop_keeps_each_asker_at_work() -> None:
    running, most, lock = [0], [0], threading.Lock()

    def ask() -> Iterator[Event]:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        yield from events(0.005)
        with lock:
            running[0] -= 1

    found = load.closed_loop([ask] * 3, requests=12, limit_s=10)
    assert (len(found.answered), most[0], found.failed) == (12, 3, Counter())
    assert (found.rise, len(found.steady)) == (3, pytest.approx(11, abs=1)) and found.begun_s < found.full_s


def test_closed_loop_asks_again_when_refused_and_gives_up_on_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "RETRY_S", 0.0)
    outcomes = iter([BusyError("full"), None, DeadlineError("late"), BusyError("full"), None, None])

    def ask() -> Iterator[Event]:
        if error := next(outcomes):
            raise error
        return events()

    found = load.closed_loop([ask], requests=4, limit_s=10)
    assert (len(found.answered), found.failed) == (3, {"BusyError": 2, "DeadlineError": 1})


def test_closed_loop_ends_in_time_when_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "RETRY_S", 0.01)

    def ask() -> Iterator[Event]:
        raise BusyError("full")

    found = load.closed_loop([ask, ask], requests=4, limit_s=0.05)
    assert not found.answered and found.busy_share == 1 and found.full_s - found.begun_s < 1


def test_arrivals_are_poisson_and_the_same_for_a_seed() -> None:
    times = load.arrivals(5.0, count=4000, limit_s=1e9, seed=3)
    gaps = np.diff([0.0, *times])
    assert (
        times
        == load.arrivals(5.0, count=4000, limit_s=1e9, seed=3)
        != load.arrivals(5.0, count=4000, limit_s=1e9, seed=4)
    )
    assert gaps.min() > 0 and gaps.mean() == pytest.approx(0.2, rel=0.1) and gaps.std() == pytest.approx(0.2, rel=0.1)


def test_arrivals_are_bounded_by_count_and_time() -> None:
    assert len(load.arrivals(10.0, count=5, limit_s=1e9, seed=0)) == 5
    short = load.arrivals(10.0, count=1000, limit_s=2.0, seed=0)
    assert len(short) < 40 and max(short) <= 2.0


def test_open_loop_does_not_wait_for_answers() -> None:
    calls = iter(range(5))

    def ask() -> Iterator[Event]:
        if next(calls) == 4:
            raise BusyError("full")
        return events(0.05)

    found = load.open_loop(ask, [0.0, 0.01, 0.02, 0.03, 0.04])
    assert (len(found.answered), found.failed, found.busy_share) == (4, {"BusyError": 1}, pytest.approx(0.2))
    assert found.seconds < 4 * 0.1  # one after the other they take 0.1 each
    assert all(one.total_ms >= 100 for one in found.answered) and found.late_ms < 100


def level(offered: float, *, alone: float | None) -> report.Level:
    answered = [timed(0, 1.0, 1.01, 1.03, end_s=2), timed(0, 2.0, 2.05, end_s=4, text="another")]
    found = load.Load(answered=answered, failed=Counter(BusyError=2), begun_s=0, full_s=4, rise=0)
    loop = report.Loop.CLOSED if alone else report.Loop.OPEN
    return report.summarise(
        Task.REASON, loop, offered, found, text="calm now", alone=alone, server_counted={"mosear_tokens_total": 8.0},
        server_pss_bytes=7,
    )  # fmt: skip


def test_level_of_known_numbers() -> None:
    found = level(2, alone=0.25)
    assert (found.answered, found.counted, found.requests_s, found.speedup, found.tokens_s) == (2, 2, 0.5, 2.0, 2.0)
    assert found.inter_token_ms and found.inter_token_ms.p50 == pytest.approx(20)  # of 10, 20 and 50
    assert found.inter_token_p99_over_p50 == pytest.approx(49.4 / 20)
    assert (found.busy_share, found.failed, found.other_text) == (0.5, {"BusyError": 2}, 1)
    assert (found.server_tokens, found.server_pss_bytes) == (8, 7)


def test_percentiles_of_known_numbers() -> None:
    found = report.Percentiles.of([float(i) for i in range(100, -1, -1)])
    assert found and (found.n, found.p50, found.p90, found.p99) == (101, 50, 90, 99)
    assert report.Percentiles.of([]) is None


def test_throughput_report_is_written(tmp_path: Path) -> None:
    levels = [level(1, alone=0.5), level(2, alone=0.5), level(0.7, alone=None)]
    result = report.Result(
        machine={"cpu": "toy", "cores": 2}, settings={"tokens": 4}, checks={}, levels=levels,
        server_times_s={"stop": 1.0}, stopped_by_itself=True, server_pss_bytes={"at the start": {"server": 7_000_000}},
        server_counted={},
    )  # fmt: skip
    paths = report.write(result, tmp_path / "new")
    assert [path.name for path in paths] == ["throughput.json", "throughput.csv", "throughput.png"]
    assert json.loads(paths[0].read_text())["levels"][0]["first_token_ms"]["p50"] == pytest.approx(1500)
    with paths[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["loop"], row["speedup"], row["failed"]) for row in rows] == [
        ("closed", "1.0", "BusyError 2"), ("closed", "1.0", "BusyError 2"), ("open", "", "BusyError 2"),
    ]  # fmt: skip
    assert float(rows[0]["inter_token_ms_p50"]) == pytest.approx(20)
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    text = report.text(result)
    assert "memory at the start: 7 MB" in text and "other text 1" in text and "server stop: 1.0 s" in text


def test_paired_differences_of_known_numbers() -> None:
    pairs = [
        (timed(0, 0.5, 0.52, 0.56, end_s=1.0), timed(0, 0.4, 0.41, 0.44, end_s=0.8)),
        (timed(0, 0.9, 0.93, 0.98, end_s=2.0), timed(0, 0.3, 0.31, 0.32, end_s=0.5)),
        (timed(0, 0.3, 0.31, 0.32, end_s=0.6), timed(0, 0.3, 0.31, 0.32, end_s=0.5)),
    ]
    rows = {(row.subject, row.measure): row for row in served.tabulate("reason", pairs, stages=False)}
    assert rows["server", "total"].p50 == pytest.approx(1000) and rows["in process", "total"].p50 == pytest.approx(500)
    # By pair 200, 1500 and 100: their median is not the difference of the medians.
    assert rows["difference", "total"].p50 == pytest.approx(200)
    assert rows["difference", "first token"].p50 == pytest.approx(100)
    assert rows["server", "inter-token"].n == 6 and rows["difference", "inter-token"].n == 3
    assert rows["difference", "inter-token"].p50 == pytest.approx(10)  # of 30 - 20, 40 - 10 and 0


def test_stages_of_classify_are_those_of_the_answer() -> None:
    rows = served.tabulate("classify", [(timed(0, end_s=1), timed(0, end_s=0.5))], stages=True)
    assert {row.measure for row in rows} == {"total", "media", "prefill"}


def test_pairs_change_who_begins() -> None:
    order: list[str] = []

    def side(name: str) -> load.Ask:
        def ask() -> Iterator[Event]:
            order.append(name)
            return events()

        return ask

    pairs = served.time_pairs(side("server"), side("local"), n=3, quiet_s=0)
    assert order == ["server", "local", "local", "server", "server", "local"] and len(pairs) == 3


@pytest.mark.parametrize("other", [{"text": "sad"}, {"tokens": 5}, {"score": -0.6}])
def test_nothing_is_timed_where_answers_differ(other: dict[str, object]) -> None:
    one = load.Timed(start_s=0, words_s=(), end_s=1, answer=answer())
    served.check(Task.REASON, one, one)
    wrong = load.Timed(start_s=0, words_s=(), end_s=1, answer=answer(**other))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="Nothing was timed"):
        served.check(Task.REASON, wrong, one)


PAGE = """# HELP nv_inference_count Number of inferences
nv_inference_count{model="face",version="1"} 8
nv_inference_request_failure{model="face",reason="OTHER",version="1"} 1
nv_inference_request_failure{model="face",reason="BACKEND",version="1"} 2
mosear_tokens_total 64
mosear_modality_mass_bucket{group="text",le="0.1"} 3
nv_inference_count{model="scene",version="1"} 1
"""


def test_counters_are_read_and_subtracted() -> None:
    found = observed.parse_counters(PAGE)
    assert found == {
        "nv_inference_count face": 8, "nv_inference_request_failure face": 3, "mosear_tokens_total": 64,
        "nv_inference_count scene": 1,
    }  # fmt: skip
    assert observed.growth({"mosear_tokens_total": 60.0, "nv_inference_count scene": 1.0}, found) == {
        "nv_inference_count face": 8, "nv_inference_request_failure face": 3, "mosear_tokens_total": 4,
    }  # fmt: skip


def test_perf_analyzer_is_given_what_the_client_sends() -> None:
    tensors = request_tensors(workload.request(Task.REASON, b"\x00\x01\xff", tokens=16))
    found = perf_analyzer.unary_inputs(tensors)
    assert found["video_bytes"] == {"content": {"b64": "AAH/"}, "shape": [3]}
    assert found["task"] == {"content": ["reason"], "shape": [1]}
    assert found["min_tokens"] == found["max_tokens"] == {"content": {"b64": "EAAAAA=="}, "shape": [1]}


def test_perf_analyzer_results_and_failures_are_written(tmp_path: Path) -> None:
    row = {"Concurrency": "1", "Inferences/Second": "3.5", "p50 latency": "280000"}
    perf_analyzer.write({"voice": [row, {"failed": "status 2"}], "face": [{"failed": "status 1"}]}, tmp_path, {})
    assert (tmp_path / "voice.csv").read_text().splitlines() == [
        "Concurrency,Inferences/Second,p50 latency",
        "1,3.5,280000",
    ]
    assert not (tmp_path / "face.csv").exists()
    assert json.loads((tmp_path / "outcome.json").read_text())["failed"] == {
        "voice": ["status 2"],
        "face": ["status 1"],
    }
