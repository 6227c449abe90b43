"""The readers under random damage, for some seconds each; see `fuzz` for the long form."""

from __future__ import annotations

import pytest

from tests.faults import fuzz

# Executions of the default suite; the long form is `python -m tests.faults.fuzz TARGET`.
COUNTS = {"header": 60_000, "index": 10_000, "config": 500, "recipe": 2_000, "journal": 60_000}
LONG = {
    "header": 500_000, "index": 100_000, "config": 10_000, "recipe": 100_000, "journal": 100_000,
}  # fmt: skip


@pytest.mark.parametrize("target", COUNTS)
def test_random_damage_is_refused_or_harmless(target):
    done, accepted = fuzz.run(target, COUNTS[target], seed=0)
    assert done == COUNTS[target]
    assert accepted > done / 200  # or it would only test that rubbish is refused


@pytest.mark.slow
@pytest.mark.parametrize("target", LONG)
def test_much_random_damage_is_refused_or_harmless(target):
    assert fuzz.run(target, LONG[target], seed=1)[0] == LONG[target]
