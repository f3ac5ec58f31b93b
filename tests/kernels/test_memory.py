"""Every kernel under the sanitizer: no access out of bounds, no race, nothing undefined, and bf16 numbers as float64's.

Small tensors of exactly the size that they must have, the longest sequence last. That the sanitizer sees mistakes in
these very calls is test_mutants.py's matter.
"""

import pytest
from executor import Verdict, sanitise
from sweep import chosen, sweep

LAUNCHES = {  # of each call, so that none is passed over
    "experts_memory": 6,
    "experts_prefill_memory": 2,
    "experts_stray_ids": 2,
    "decode_memory": 2,
    "decode_paged_memory": 4,
    "prefill_memory": 2,
    "prefill_runs_memory": 2,
}


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verdict]:
    """Of all checks that this run holds, in one process."""
    names = chosen(request, "verdicts", "check")
    found = sanitise([f"mutant_checks:{name}" for name in names], cache=tmp_path_factory.mktemp("cache"))
    return {name: found[f"mutant_checks:{name}"] for name in names}


@pytest.mark.parametrize("check", sweep(LAUNCHES, "experts_prefill_memory", "decode_memory", "prefill_runs_memory"))
def test_it_touches_nothing_but_its_own(check: str, verdicts: dict[str, Verdict]) -> None:
    verdict = verdicts[check]
    assert verdict.clean, verdict.message or verdict
    assert verdict.launches == LAUNCHES[check]
