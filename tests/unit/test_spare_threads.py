"""Where reading is slow more threads join; the bytes stay the same."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace

import pytest

from optimer_engine import FolderSink, engine, execution, merge, plan
from tests.conftest import nearby, random_tensors


@pytest.mark.parametrize("slow", [True, False])
def test_more_threads_join_only_when_reading_is_slow(write_checkpoint, tmp_path, monkeypatch, slow):
    base = random_tensors(0)
    folders = [str(write_checkpoint(n, m)) for n, m in (("base", base), ("ja", nearby(base, 1)))]
    recipe = {"base": folders[0], "sources": [{"name": "ja", "model": folders[1], "weight": 0.5}]}
    merge(recipe, tmp_path / "whole")
    monkeypatch.setattr(execution, "SLOW_BYTES_PER_S", 1e30 if slow else 0.0)
    monkeypatch.setattr(execution, "SAMPLED_BYTES", 0)
    seen, together = set(), threading.Barrier(2) if slow else None

    class Notes(FolderSink):
        def write_run(self, run, start, tile):
            seen.add(threading.get_ident())
            super().write_run(run, start, tile)
            if together is not None and len(seen) == 2 and not together.broken:
                together.abort()
            elif together is not None and not together.broken and start > 0:
                with contextlib.suppress(threading.BrokenBarrierError):
                    together.wait(5)  # for another thread to have had its turn

    made = plan(recipe, mem_limit="300kB", threads=1)
    engine.run(replace(made, spare_threads=2, tile_bytes=512), Notes(tmp_path / "out"))
    assert (len(seen) > 1) == slow
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()
