from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.faults.recipes import KINDS, Case


@pytest.fixture
def in_memory(tmp_path):
    """A folder in memory, where there is one: nothing here needs a disk, and it is quicker."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shutil.disk_usage(shared).free < 100_000_000:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared, prefix="optimer-") as folder:
        yield Path(folder)


@pytest.fixture
def make_case(in_memory, write_checkpoint, monkeypatch):
    return lambda kind: Case(kind, in_memory, write_checkpoint, monkeypatch)


@pytest.fixture(params=KINDS)
def case(request, make_case):
    return make_case(request.param)
