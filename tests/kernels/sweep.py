"""Sweeps of tests: a few cases in the default run, all of them in `make test-full`."""

from collections.abc import Iterable
from typing import Any

import pytest


def sweep(cases: Iterable[Any], *default: Any) -> list[Any]:  # Any: a parameter, or a tuple of several; pytest's params
    """The cases as parameters; those that are not in `default` are marked `full`."""
    cases = list(cases)
    assert all(case in cases for case in default), "a default case is none of the sweep's"
    found = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marks = [] if case in default else [pytest.mark.full]
        found.append(pytest.param(*values, id="-".join(map(str, values)), marks=marks))
    return found


def chosen(request: pytest.FixtureRequest, fixture: str, parameter: str) -> list[Any]:  # Any: the parameter's values
    """Values of `parameter` of the tests in this run that ask for `fixture`: so one fixture can serve all at once."""
    return [
        item.callspec.params[parameter]
        for item in request.session.items
        if isinstance(item, pytest.Function) and fixture in item.fixturenames and item.path == request.path
    ]
