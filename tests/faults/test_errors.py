"""A disk that refuses, at any call: said as such, exit code 3, and continued by the same run."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from optimer_engine import FolderSink, folder_sink, merge, plan
from optimer_engine.errors import CheckpointError, OutputError
from tests.conftest import nearby, random_tensors
from tests.faults.disk import Failing, Short
from tests.faults.recipes import Stepwise, contents


def check_failures(case, number, forever=False):
    """The error comes out as ours at every effect, and the next run ends well."""
    for at in range(case.effects()):
        out = case.folder / f"at{at}" / "out"
        out.parent.mkdir()
        disk = Failing(at, number, forever)
        with pytest.raises(OutputError) as caught:
            case.run(out, disk)
        assert disk.failed
        assert os.strerror(number) in str(caught.value)
        assert "run the same command again" in str(caught.value)
        assert caught.value.exit_code == 3
        case.check_resumes(out)
        shutil.rmtree(out.parent)


FAILURES = [(errno.EIO, False), (errno.ENOSPC, True), (errno.EINTR, False)]


@pytest.mark.parametrize(("number", "forever"), FAILURES)
@pytest.mark.parametrize("kind", ["single", "shards"])
def test_every_call_may_fail(make_case, kind, number, forever):
    check_failures(make_case(kind), number, forever)


def test_every_call_may_fail_in_parts(make_case):
    check_failures(make_case("parts"), errno.EIO)


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE])
@pytest.mark.parametrize("forever", [False, True])
def test_every_call_may_fail_in_every_way(case, number, forever):
    check_failures(case, number, forever)


@pytest.mark.parametrize("kind", ["single", "shards"])
def test_every_write_may_be_short(make_case, kind):
    case, shortened = make_case(kind), 0
    for at in range(case.effects()):
        out = case.folder / f"at{at}" / "out"
        out.parent.mkdir()
        disk = Short(at)
        case.run(out, disk)
        shortened += disk.shortened
        assert contents(out) == case.expected
        shutil.rmtree(out.parent)
    assert shortened > 30


def test_signals_that_interrupt_calls_change_nothing(make_case):
    case = make_case("shards")
    handler = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        merge(case.recipe, case.folder / "out", threads=2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert contents(case.folder / "out") == case.expected


def test_a_sync_that_failed_is_not_tried_again(make_case, monkeypatch):
    """The second one would succeed, and vouch for bytes that the disk has dropped."""
    case = make_case("single")
    made = plan(case.recipe, threads=1)
    sink = FolderSink(case.folder / "out")
    sink.open(made)
    syncs = []

    def fails(fd):
        syncs.append(fd)
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr("optimer_engine.durable.sync_data", fails)
    shard = sink._shards[0]
    shard.write(len(shard.header), memoryview(bytes(3000)))
    for _ in range(3):
        with pytest.raises(OutputError, match="cannot be written: lost"):
            sink.settle()
    assert len(syncs) == 1
    sink.abort(OutputError("lost"))


def test_ctrl_c_while_the_disk_lags_behind_ends_the_run(make_case, monkeypatch):
    """Nobody settles any more when a run ends, so nobody may wait for that."""
    case = make_case("single")
    monkeypatch.setattr(folder_sink, "MAX_UNSETTLED_BYTES", 1)

    class Lagging(FolderSink):
        tiles = itertools.count()

        def settle(self):
            pass

        def write_run(self, run, start, tile):
            if next(self.tiles) == 3:
                raise KeyboardInterrupt
            super().write_run(run, start, tile)

    made = replace(plan(case.recipe, threads=2), tile_bytes=2048)
    with pytest.raises(KeyboardInterrupt):
        made.run(Lagging(case.folder / "out"))
    merge(case.recipe, case.folder / "out")
    assert contents(case.folder / "out") == case.expected


def test_a_disk_that_fails_at_the_start_of_a_resume_costs_nothing(make_case):
    case = make_case("shards")
    out = case.folder / "run" / "out"
    out.parent.mkdir()
    with pytest.raises(OutputError):
        case.run(out, Failing(100, errno.EIO, forever=True))
    before = {n: c for n, c in contents(out.with_name("out.partial")).items() if "journal" not in n}
    assert before
    for at in range(8):
        with pytest.raises(OutputError):
            case.run(out, Failing(at, errno.EIO))
        left = contents(out.with_name("out.partial"))
        assert before.items() <= left.items()
    case.check_resumes(out)


def test_a_source_that_cannot_be_read_for_a_while_costs_nothing(make_case, monkeypatch):
    case = make_case("shards")
    out = case.folder / "run" / "out"
    out.parent.mkdir()
    read, write, written = os.preadv, Stepwise.write_run, itertools.count()
    source, failing = (case.sources[1] / "model.safetensors").stat().st_ino, False

    def fails(fd, buffers, offset, flags=0):
        if failing and os.fstat(fd).st_ino == source:
            raise OSError(errno.EIO, "Input/output error")
        return read(fd, buffers, offset, flags)

    def then_fails(sink, run, start, tile):
        nonlocal failing
        write(sink, run, start, tile)
        failing = next(written) == 4

    monkeypatch.setattr(os, "preadv", fails)
    monkeypatch.setattr(Stepwise, "write_run", then_fails)
    with pytest.raises(CheckpointError, match="reading failed: Input/output error"):
        case.run(out)
    assert out.with_name("out.partial").exists()
    failing = False
    case.check_resumes(out)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB of which `fill(n)` takes n bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def large(write_checkpoint):
    import torch

    base = random_tensors(0) | {f"model.{n}": torch.linspace(-1, 1, 10**6) for n in range(3)}
    tuned = write_checkpoint("ja", nearby(base, 1))
    return {
        "base": str(write_checkpoint("base", base)),
        "sources": [{"name": "ja", "model": str(tuned), "weight": 0.5}],
        "max_shard_size": "1MB",
    }


def test_a_disk_that_is_full_at_the_start(large, small_disk, tmp_path):
    (small_disk / "filler").write_bytes(bytes(8 << 20))
    with pytest.raises(OutputError, match=r"needs 12 MB, 8\.3\d MB are free"):
        merge(large, small_disk / "out")
    assert [p.name for p in small_disk.iterdir()] == ["filler"]


def test_a_disk_that_fills_up_midway(large, small_disk, tmp_path):
    """Another program takes the space: without preallocation, so that writes meet it."""
    whole = merge(large, tmp_path / "whole")
    script = f"""
import errno, os, sys
from pathlib import Path
from optimer_engine import durable, folder_sink
from optimer_engine.cli import main
folder_sink.SETTLE_BYTES, folder_sink.MAX_UNSETTLED_BYTES = 200_000, 500_000
folder_sink.FolderSink._check_space = lambda self: None
os.posix_fallocate = lambda *_: (_ for _ in ()).throw(OSError(errno.EOPNOTSUPP, "cannot"))
sys.argv = ["optimer", "merge", {str(tmp_path / "recipe.json")!r}, "-o", "out"]
main()
"""
    import json

    (tmp_path / "recipe.json").write_text(json.dumps(large))
    (small_disk / "filler").write_bytes(bytes(8 << 20))
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, cwd=small_disk, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "cannot be written: No space left on device" in done.stderr
    assert "are free" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in small_disk.iterdir()) == ["filler", "out.partial"]
    (small_disk / "filler").unlink()
    report = merge(large, small_disk / "out")
    assert 0 < report.bytes_read < whole.bytes_read
    assert contents(small_disk / "out") == contents(tmp_path / "whole")


def test_limits_on_file_size_and_open_files_are_named(large, tmp_path):
    for limit, words in (("FSIZE", "File too large"), ("NOFILE", "Too many open files")):
        value = 500_000 if limit == "FSIZE" else 9
        script = f"""
import resource, signal, sys
from optimer_engine import merge
from optimer_engine.errors import OutputError
merge({large!r}, sys.argv[1] + "-before", threads=1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_{limit}, ({value}, {value}))
try:
    merge({large!r}, sys.argv[1], threads=1)
except OutputError as error:
    print(error.exit_code, error)
"""
        run = [sys.executable, "-c", script, str(tmp_path / limit)]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert done.stdout.startswith("3 "), (done.stdout, done.stderr)
        assert words in done.stdout


def test_folders_that_cannot_be_written_to(make_case, tmp_path):
    case = make_case("single")
    if os.geteuid() == 0:
        target = Path("/proc/out")  # root may write anywhere else
    else:
        (tmp_path / "closed").mkdir(mode=0o500)
        target = tmp_path / "closed" / "out"
    with pytest.raises(OutputError, match="cannot be written"):
        merge(case.recipe, target)
