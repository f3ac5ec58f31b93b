"""Every kernel under the sanitizer: no access out of bounds, no race, nothing undefined, and bf16 numbers as float64's.

Small tensors of exactly the size that they must have, the longest sequence last. That the sanitizer sees mistakes in
these very calls is test_mutants.py's matter.
"""

import pytest
from executor import Verdict, sanitise

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
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verdict]:
    """All in one process."""
    found = sanitise([f"mutant_checks:{name}" for name in LAUNCHES], cache=tmp_path_factory.mktemp("cache"))
    return {name: found[f"mutant_checks:{name}"] for name in LAUNCHES}


@pytest.mark.parametrize("check", LAUNCHES)
def test_it_touches_nothing_but_its_own(check: str, verdicts: dict[str, Verdict]) -> None:
    verdict = verdicts[check]
    assert verdict.clean, verdict.message or verdict
    assert verdict.launches == LAUNCHES[check]
