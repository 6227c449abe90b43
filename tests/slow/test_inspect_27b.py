"""A pool of 27B shapes is inspected in far less memory than one of its tensors takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import measure, memory


@pytest.mark.slow
def test_a_pool_of_27b_shapes_stays_under_a_gibibyte(tmp_path):
    """Sparse files: 275 GB are read, none is stored. Half a minute to two minutes."""
    folders = [memory.sparse(tmp_path / f"{n}", memory.DEFAULT_BYTES) for n in range(5)]
    optimer = Path(sys.executable).with_name("optimer")
    program = [optimer, "inspect", *folders[1:], "--base", folders[0], "--json"]
    cost = measure.of_process(program, tmp_path / "log.txt")
    log = (tmp_path / "log.txt").read_text()  # with the progress bar before it
    found = json.loads(log[log.index("{") : log.rindex("}") + 1])
    assert found["folders"][0]["parameters"] > 27e9
    assert found["unchanged"] == [1.0] * 4
    assert len(found["layers"]) > 50 and "attention" in found["modules"]
    assert cost.peak_rss_bytes is not None and cost.peak_rss_bytes < 2**30 / 4
