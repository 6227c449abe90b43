"""The same files through both programs: at most one bf16 step apart, and ours correctly rounded.

OPTIMER_MERGEKIT_PYTHON names an interpreter that has mergekit 0.1.5; `python -m
benchmarks.agreement` is the same for all architectures, with mergekit installed by the way.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.agreement import JOBS, family_rows

PYTHON = os.environ.get("OPTIMER_MERGEKIT_PYTHON")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="OPTIMER_MERGEKIT_PYTHON names no interpreter"),
]


@pytest.mark.parametrize("family", ["llama, tied", "gemma3, vision"])
def test_methods_agree_on_whole_models(family, tmp_path):
    for row in family_rows(family, list(JOBS), tmp_path, Path(PYTHON)):
        decided = row.elems - row.undecided
        assert not row.only_ours and not row.only_theirs, row
        # In fp64 mergekit's Arcee Fusion is ours; in fp32 it follows its own rounding.
        allowed = {"cancels", "undecided"} | ({"theirs"} if row.label == "arcee_fusion" else set())
        assert row.causes.keys() <= allowed, row
        assert row.misrounded <= 1e-4 * decided, row
        assert row.error <= 1.0, row
