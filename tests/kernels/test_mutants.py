"""Every seeded mistake is seen, by the check that is named for it; and without mistakes no check complains."""

import importlib
import json
import sys

import pytest
from executor import Verdict
from mutants import MEMORY, MUTANTS, NUMBERS, RESULTS, Mutant, memory_faults, run, seeded, source_of
from sweep import chosen, sweep

BY_NUMBERS = [m for m in MUTANTS if m.how == NUMBERS]
BY_MEMORY = [m for m in MUTANTS if m.how == MEMORY]


def marked(mutants: list[Mutant]) -> list[object]:
    """A handful in the default run, all in `make test-full` and in the committed table."""
    return [pytest.param(m, id=m.name, marks=[] if m.often else [pytest.mark.full]) for m in mutants]


@pytest.mark.parametrize("check", sweep(sorted({m.check for m in BY_NUMBERS}), "decode", "experts_ties"))
def test_without_a_mistake_a_check_is_silent(check: str) -> None:
    assert run(None, check) == ""


@pytest.mark.parametrize("mutant", marked(BY_NUMBERS))
def test_numbers_see_it(mutant: Mutant) -> None:
    said = run(mutant, mutant.check)
    print(said)
    assert said, f"{mutant.name} lives: {mutant.check} sees nothing"


@pytest.fixture(scope="module")
def faults(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verdict]:
    """Verdicts of the sanitizer on this run's mutants, all in one process."""
    return memory_faults(chosen(request, "faults", "mutant"), tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("mutant", marked(BY_MEMORY))
def test_the_sanitizer_sees_it(mutant: Mutant, faults: dict[str, Verdict]) -> None:
    verdict = faults[mutant.name]
    assert verdict.kind in ("oob_read", "oob_write", "race"), f"{mutant.name} lives: {verdict.message or verdict}"
    assert verdict.line, "the fault has no line"
    print(verdict.message)


def test_a_mutant_leaves_nothing_behind() -> None:
    kernel = importlib.import_module("mosear.kernels.modality_experts.kernel")
    with seeded(MUTANTS[0]):
        other = importlib.import_module("mosear.kernels.modality_experts.kernel")
        assert other is not kernel and MUTANTS[0].new in open(other.__file__ or "").read()  # noqa: PTH123, SIM115
    assert sys.modules["mosear.kernels.modality_experts.kernel"] is kernel
    assert importlib.import_module("mosear.kernels.modality_experts.launches").SHRINK is kernel.SHRINK


def test_the_committed_table_is_of_these_mutants() -> None:
    """Each caught; `python tests/kernels/mutants.py` writes it anew."""
    rows = {row["mutant"]: row for row in json.loads(RESULTS.read_text())}
    assert rows.keys() == {m.name for m in MUTANTS} and len(MUTANTS) >= 10
    for mutant in MUTANTS:
        row = rows[mutant.name]
        assert (row["old"], row["new"], row["caught_by"]) == (mutant.old, mutant.new, mutant.how), mutant.name
        assert source_of(mutant)
