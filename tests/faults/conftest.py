from __future__ import annotations

import pytest

from tests.faults.recipes import KINDS, Case


@pytest.fixture
def make_case(tmp_path, write_checkpoint, monkeypatch):
    return lambda kind: Case(kind, tmp_path, write_checkpoint, monkeypatch)


@pytest.fixture(params=KINDS)
def case(request, make_case):
    return make_case(request.param)
