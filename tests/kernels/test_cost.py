"""The cost model: loops and branches read from machine code, turns counted, and the committed results against the bars."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from tiny_kernels import tiny

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import kernels_bytes  # noqa: E402
import kernels_cost  # noqa: E402
import kernels_counts  # noqa: E402
import kernels_cycles  # noqa: E402
import kernels_report  # noqa: E402

from mosear.errors import KernelError  # noqa: E402
from mosear.kernels import sass  # noqa: E402
from mosear.kernels.catalogue import cases  # noqa: E402
from mosear.kernels.chips import ARCHS, CHIPS, chip_of  # noqa: E402

RESULTS = json.loads((ROOT / "benchmarks" / "results" / "kernel_cost.json").read_text())
ROWS: list[dict[str, Any]] = RESULTS["calls"]

SOURCE = """
def body(n):
    x = 1
    for i in tl.range(0, n):
        if MASKED:
            x += 1
        if one >= 0:
            x += 2
        else:
            x += 3
    return x
"""
# Lines 3, 4 (the loop), 6 (MASKED), 8 and 10 (the arms). A wait out of line jumps back into the loop; BRA.DIV leads to what
# never runs.
CODE = """
	//## File "k.py", line 3
        /*0000*/                   FFMA R0, R0, R0, R0 ;
.L_x_0:
	//## File "k.py", line 4
        /*0010*/                   HMMA.16816.F32.BF16 R0, R4, R8, R0 ;
        /*0020*/              @!P0 BRA `(.L_x_4) ;
.L_x_3:
        /*0030*/                   BRA.DIV UR4, `(.L_x_6) ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
	//## File "k.py", line 8
        /*0050*/                   MUFU.EX2 R0, R0 ;
        /*0060*/                   BRA `(.L_x_2) ;
.L_x_1:
	//## File "k.py", line 10
        /*0070*/                   FADD R0, R0, R0 ;
        /*0080*/                   FADD R0, R0, R0 ;
.L_x_2:
	//## File "k.py", line 4
        /*0090*/                   LDS.128 R4, [R0] ;
        /*00a0*/                   BRA.U UP0, `(.L_x_0) ;
        /*00b0*/                   EXIT ;
.L_x_4:
        /*00c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R0], R1 ;
        /*00d0*/              @!P0 BRA `(.L_x_4) ;
        /*00e0*/                   BRA `(.L_x_3) ;
.L_x_6:
        /*00f0*/                   SHFL.BFLY PT, R0, R0, 0x1, 0x1f ;
        /*0100*/                   BRA `(.L_x_3) ;
.L_x_5:
        /*0110*/                   BRA `(.L_x_5);
"""


def test_a_loop_is_what_turns_and_nothing_else() -> None:
    code = sass.parse(CODE)
    assert len(code.instructions) == 18
    (loop,) = code.loops  # not the wait, not the padding behind the end
    assert loop == frozenset({*range(1, 11), 12, 13, 14})
    assert not {15, 16, 17} & code.reached


def test_overlapping_loops_are_one_and_nested_ones_two() -> None:
    def text(*lines: str) -> str:
        return "\n".join(line if line.startswith(".") else f"/*0000*/ {line} ;" for line in lines)

    nested = sass.parse(
        text(".L_x_0:", "FADD R0", ".L_x_1:", "FMUL R0", "@P0 BRA `(.L_x_1)", "@P1 BRA `(.L_x_0)", "EXIT")
    )
    assert [sorted(loop) for loop in nested.loops] == [[0, 1, 2, 3], [1, 2]]
    twice = sass.parse(text(".L_x_0:", "FADD R0", "@P0 BRA `(.L_x_0)", "FMUL R0", "@P1 BRA `(.L_x_0)", "EXIT"))
    assert [sorted(loop) for loop in twice.loops] == [[0, 1, 2, 3]]  # a `continue`
    assert sass.innermost(nested.loops, 5) == [0, 1, 1, 0, -1]


def test_work_goes_to_the_arm_that_it_stands_in() -> None:
    passages, (loop,) = kernels_cycles.analyse(sass.parse(CODE), kernels_cycles.read_source(SOURCE), chip_of(90))
    assert loop.key == "body: i in tl.range(0, n)[]#0"
    assert set(loop.arms) == {"one >= 0", "not one >= 0"}  # MASKED is a constant: no arm
    assert loop.arms["one >= 0"].cycles["special"] == 2.0 and loop.arms["one >= 0"].instructions == 2
    assert loop.arms["not one >= 0"].cycles["fp32"] == 2 * 32 / 128
    assert loop.common.products == 2048 and loop.common.cycles["tensor"] == 2048 / 2048
    assert loop.common.cycles["shared"] == 4.0
    assert {(p.loops, p.header, p.work.instructions) for p in passages} == {
        ((loop.key,), "", 1),  # FFMA, before the loop
        ((loop.key,), "body: i in tl.range(0, n)", 1),  # EXIT, by its line
    }


TWO_WAYS = """
	//## File "/k.py", line 3
        /*0000*/              @P0 BRA `(.L_x_2) ;
        /*0010*/                   FADD R0, R0, R0 ;
.L_x_0:
	//## File "/k.py", line 4
        /*0020*/                   FMUL R0, R0, R0 ;
        /*0030*/              @P1 BRA `(.L_x_0) ;
	//## File "/other.py", line 4
        /*0040*/                   FADD R0, R0, R0 ;
        /*0050*/                   BRA `(.L_x_4) ;
.L_x_2:
	//## File "/k.py", line 3
        /*0060*/                   FADD R0, R0, R0 ;
.L_x_3:
	//## File "/k.py", line 8
        /*0070*/                   FFMA R0, R0, R0, R0 ;
        /*0080*/              @P1 BRA `(.L_x_3) ;
.L_x_4:
	//## File "/k.py", line 3
        /*0090*/                   EXIT ;
"""


def test_code_on_the_way_to_another_loop_does_not_count() -> None:
    """An `if` before two loops: each way's own instructions count for programs that turn its loop."""
    code = sass.parse(TWO_WAYS, "k.py")
    assert [sorted(code.beside[at]) for at in range(10)] == [[0, 1], [0], [0], [0], [0], [0], [1], [1], [1], [0, 1]]
    assert [instruction.line for instruction in code.instructions[4:6]] == [0, 0]  # another file's lines are no lines
    passages, loops = kernels_cycles.analyse(code, kernels_cycles.read_source(SOURCE), chip_of(90))
    found = {"loops": [asdict(loop) for loop in loops], "passages": [asdict(passage) for passage in passages]}
    first, second = (loop.key for loop in loops)

    def instructions(**turns: float) -> float:
        given = {first: turns["one"], second: turns["other"]}
        return sum(times * work["instructions"] for times, work in kernels_cost._pieces(given, found))

    assert instructions(one=5, other=0) == 2 + 3 + 5 * 2  # the branch and the end, its own three, its loop of two
    assert instructions(one=0, other=5) == 2 + 1 + 5 * 2


def test_a_side_moved_out_of_a_loop_counts_by_its_share() -> None:
    work = {"cycles": {}, "instructions": 10, "products": 0.0}
    peeled = {"loops": ["h[]#0"], "header": "h", "arm": "one >= 0", "work": work}
    pieces = kernels_cost._pieces(
        {"h[]#0": 4, "h[]#0|one >= 0": 1},
        {"loops": [{"key": "h[]#0", "common": work, "arms": {}}], "passages": [peeled]},
    )
    assert [times for times, _ in pieces] == [0.25, 4]


CALLED = """
def helper(x):
    y = x + 1
    z = y + 1
    return z

def body(n):
    x = 1
    for i in tl.range(0, n):
        if one >= 0:
            x += 2
        else:
            x = helper(x)
    return x
"""


def test_what_a_loop_calls_belongs_to_the_side_that_calls_it() -> None:
    """A peeled turn whose lines are mostly those of a function that one side of the loop's `if` calls."""
    source = kernels_cycles.read_source(CALLED)
    assert source.called == ((2, 5),)
    home = kernels_cycles._home_of([3, 4, 4, 13], source)
    assert home and kernels_cycles._arm_of([3, 4, 4, 13], home) == "not one >= 0"
    assert kernels_cycles._home_of([3, 4, 8, 8, 13], source) is None  # mostly before the loop


def test_a_constants_side_is_a_flag_of_the_copy() -> None:
    many = "\n".join("        /*0011*/                   FADD R0, R0, R0 ;" for _ in range(8))
    text = CODE.replace("line 4\n        /*0090*/", f'line 6\n{many}\n	//## File "k.py", line 4\n        /*0090*/')
    _, (loop,) = kernels_cycles.analyse(sass.parse(text), kernels_cycles.read_source(SOURCE), chip_of(90))
    assert loop.key == "body: i in tl.range(0, n)[MASKED]#0"


def analysed(**changes: Any) -> dict[str, Any]:
    work = {"cycles": {"issue": 1.0, "tensor": 2.0}, "instructions": 4, "products": 100.0}
    once = {"cycles": {"issue": 10.0}, "instructions": 40, "products": 0.0}
    loop = {"header": "h", "key": "h[]#0", "common": work, "arms": {}}
    return {"warps": 4, "passages": [{"loops": [], "header": "", "arm": "", "work": once}], "loops": [loop]} | changes


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [kernels_counts.Programs(count=264, turns={"h[]#0": 3}, products=1200)]
    monkeypatch.setitem(kernels_counts.MODELS, "tiny_product", lambda case: known)  # type: ignore[arg-type]


@pytest.mark.usefixtures("counted")
def test_cycles_of_a_grid() -> None:
    found = kernels_cost.grid_cycles(tiny(), analysed(), chip_of(90))
    # 264 programs on 132 multiprocessors: 2 each, of 4 warps with 10 + 3 x 1 issue cycles, 3 x 2 on the tensor cores.
    assert found.pipes["issue"] == 2 * 4 * 13 and found.pipes["tensor"] == 2 * 4 * 6
    assert (found.bottleneck, found.cycles, found.products) == ("issue", 104, 264 * 1200)


@pytest.mark.usefixtures("counted")
def test_wrong_turns_are_seen_in_the_products() -> None:
    loop = analysed()["loops"][0]
    half = loop | {"common": loop["common"] | {"products": 50.0}}
    with pytest.raises(KernelError, match="kernels_counts has their turns wrong"):
        kernels_cost.grid_cycles(tiny(), analysed(loops=[half]), chip_of(90))


@pytest.mark.usefixtures("counted")
def test_a_loop_that_nobody_counted_is_refused() -> None:
    with pytest.raises(KernelError, match="kernels_counts lacks them"):
        kernels_cost.grid_cycles(tiny(), analysed(loops=[analysed()["loops"][0] | {"key": "other"}]), chip_of(90))


def test_turns_of_a_causal_prefill_add_up() -> None:
    case = next(case for case in cases(90) if case.label == "llama2-7b prefill 4096 x1")
    block_m, block_n = (int(case.launch.constants[name]) for name in ("BLOCK_M", "BLOCK_N"))
    groups = kernels_counts.programs(case)
    assert sum(group.count for group in groups) == case.launch.grid[0] * case.launch.grid[1] * case.launch.grid[2]
    flash = (f"{kernels_counts.SWEEP}[VALUES]#0", f"{kernels_counts.SWEEP}[MASKED VALUES]#0")
    turns = sum(group.count * group.turns[key] for group in groups for key in flash)
    rows = range(0, 4096 - block_m, block_m)  # the last tile's rows move mass: swept otherwise
    assert turns == 32 * sum(-(-min(row + block_m, 4096) // block_n) for row in rows)


def by(op: str, case: str, arch: int = 90) -> Mapping[str, Any]:
    (row,) = [row for row in ROWS if (row["op"], row["case"], row["arch"]) == (op, case, arch)]
    return row


def test_results_are_of_this_catalogue() -> None:
    expected = [(chip_of(arch).name, *key) for arch in ARCHS for key in kernels_cost.calls(cases(arch))]
    found = [(row["chip"], row["op"], row["case"]) for row in ROWS]
    assert found == expected, "kernels or launches changed: run `python benchmarks/kernels.py`"
    assert set(RESULTS["chips"]) == {chip.name for chip in CHIPS}
    assert all(row["source"] == "computed" for row in ROWS)


def test_committed_bytes_and_rooflines_are_what_the_shapes_give() -> None:
    for arch in ARCHS:
        chip = chip_of(arch)
        for (op, label), launches in kernels_cost.calls(cases(arch)).items():
            row, traffic = by(op, label, arch), kernels_bytes.call(launches)
            assert row["bytes"] == traffic.ours.bytes and row["operations"] == traffic.ours.operations
            least = max(row["bytes"] / chip.memory_bytes_s, row["operations"] / chip.tensor_flops_s)
            assert row["roofline_us"] == pytest.approx(1e6 * least, abs=1e-3)


def test_bytes_by_hand() -> None:
    """One request, 4096 keys, LLaMA-2-7B: 2 x 32 heads x 4096 x 128 x 2 bytes of cache are most of it."""
    row = by("decode", "llama2-7b decode 4096 x1")
    assert 67_108_864 < row["bytes"] < 1.02 * 67_108_864
    assert row["operations"] == 4 * 32 * 4096 * 128
    mose = by("modality_experts", "llama2-7b decode x1")
    a, gate, b = 2 * 8 * 4096, 2 * 2 * 4096, 2 * 8 * 8192
    assert mose["peer"]["bytes"] == 2 * (a + gate + b + 4096 + 2 * 8192) + 4 + 16 + 12


@pytest.mark.parametrize("arch", ARCHS)
def test_bars_on_bytes(arch: int) -> None:
    for model in ("demo", "llama2-7b"):
        for batch in (1, 8, 64):
            assert by("decode", f"{model} decode 4096 x{batch}", arch)["peer"]["byte_ratio"] <= 1.05
            assert by("modality_experts", f"{model} decode x{batch}", arch)["peer"]["byte_ratio"] <= 1.10


def test_tables_are_aligned_and_say_what_is_not_measured() -> None:
    text = kernels_report.cost(ROWS[:3])
    lines = text.splitlines()[1:]
    assert len({len(line) for line in lines[1:]}) == 1
    assert text.count("not measured") == 9 and "computed" in lines[0]
    timed = [dict(ROWS[0], times={"ours_us": 12.345})]
    assert "12.35" in kernels_report.cost(timed) or "12.34" in kernels_report.cost(timed)


def test_a_table_is_written_one_row_a_line(tmp_path: Path) -> None:
    kernels_report.write_cost(tmp_path / "c.json", ROWS[:4], RESULTS["versions"])
    text = (tmp_path / "c.json").read_text()
    assert json.loads(text)["calls"] == ROWS[:4] and text.count("\n") == 8


def test_a_longest_program_bounds_a_small_grid() -> None:
    case = replace(tiny(), label="x")
    assert case.launch.grid == (1, 1, 1)
    one = [kernels_counts.Programs(count=1, turns={"h[]#0": 3}, products=1200)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernels_counts.MODELS, "tiny_product", lambda _: one)  # type: ignore[arg-type]
        assert kernels_cost.grid_cycles(case, analysed(), chip_of(90)).cycles == 4 * 13
