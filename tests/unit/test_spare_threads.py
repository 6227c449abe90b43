"""Where reading is slow more threads join; the bytes stay the same."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from optimer_engine import FolderSink, LiveModelSink, checkpoint, engine, execution, merge, plan
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("slow", [True, False])
def test_large_inputs_that_are_slow_leave_the_page_cache_behind_the_reader(
    write_checkpoint, tmp_path, monkeypatch, slow
):
    base = random_tensors(0)
    folders = [str(write_checkpoint(n, m)) for n, m in (("base", base), ("ja", nearby(base, 1)))]
    recipe = {"base": folders[0], "sources": [{"name": "ja", "model": folders[1], "weight": 0.5}]}
    merge(recipe, tmp_path / "whole")
    monkeypatch.setattr(execution, "SLOW_BYTES_PER_S", 1e30 if slow else 0.0)
    monkeypatch.setattr(execution, "SAMPLED_BYTES", 0)
    monkeypatch.setattr(execution, "KEPT_SHARE", 0)
    monkeypatch.setattr(checkpoint, "FREE_BYTES", 512)
    freed, real = [], os.posix_fadvise

    def note(fd, offset, size, advice):
        if advice == os.POSIX_FADV_DONTNEED:
            freed.append((str(Path(f"/proc/self/fd/{fd}").readlink()), offset, size))
        real(fd, offset, size, advice)

    monkeypatch.setattr(os, "posix_fadvise", note)
    made = plan(recipe, threads=1)
    engine.run(replace(made, tile_bytes=256), FolderSink(tmp_path / "out"))
    for folder in folders:
        ranges = [(at, at + size) for path, at, size in freed if path.startswith(f"{folder}/")]
        assert bool(ranges) == slow
        assert [begin for begin, _ in ranges[1:]] == [end for _, end in ranges[:-1]]
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()

    class Again(FolderSink):
        """As the live model of a search: the next trial reads the same inputs."""

        repeats = True

    freed.clear()
    engine.run(replace(plan(recipe, threads=1), tile_bytes=256), Again(tmp_path / "again"))
    assert LiveModelSink.repeats
    assert not [path for path, *_ in freed if path.startswith(tuple(f"{f}/" for f in folders))]
