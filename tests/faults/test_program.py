"""The program among signals, closed terminals and odd environments."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import nearby, random_tensors
from tests.faults.recipes import contents

PROGRAM = [sys.executable, "-c", "from optimer_engine.cli import main; main()"]
EAGER = [
    sys.executable, "-c",
    "from optimer_engine import folder_sink; folder_sink.SETTLE_BYTES = 200_000\n"
    "from optimer_engine.cli import main; main()",
]  # fmt: skip


@pytest.fixture
def arguments(write_checkpoint):
    import torch

    base = random_tensors(0) | {f"model.{n}": torch.linspace(-1, 1, 10**6) for n in range(4)}
    folders = write_checkpoint("base", base), write_checkpoint("ja", nearby(base, 1))
    return [
        "merge", "--base", str(folders[0]), "--add", f"{folders[1]}=0.5", "--max-shard-size", "1MB",
    ]  # fmt: skip


def test_a_reader_that_goes_away_does_not_stop_the_work(arguments, tmp_path):
    ends = [os.pipe(), os.pipe()]
    process = subprocess.Popen(
        [*PROGRAM, *arguments, "-o", str(tmp_path / "out"), "--json"],
        stdin=subprocess.DEVNULL, stdout=ends[0][1], stderr=ends[1][1],
    )  # fmt: skip
    for reader, writer in ends:
        os.close(reader)
        os.close(writer)
    assert process.wait() == 0
    assert (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize("stream", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_were_never_open(arguments, tmp_path, stream):
    quoted = " ".join(f"'{word}'" for word in [*PROGRAM, *arguments, "-o", str(tmp_path / "out")])
    done = subprocess.run(["sh", "-c", f"{quoted} {stream}"], check=False, capture_output=True)
    assert (tmp_path / "out" / "report.json").exists(), done.stderr


@pytest.mark.parametrize(
    "changed",
    [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"TZ": "Asia/Kathmandu"}, {"LC_ALL": "tr_TR.UTF-8"}],
)
def test_locale_and_clock_change_nothing(arguments, tmp_path, changed):
    run = [*PROGRAM, *arguments, "-o"]
    subprocess.run([*run, str(tmp_path / "one")], check=True, capture_output=True)
    environment = {**os.environ, **changed}
    done = subprocess.run([*run, str(tmp_path / "two")], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_files_get_the_mode_that_the_umask_leaves(arguments, tmp_path):
    for mask in (0o022, 0o077, 0o002):
        out = tmp_path / f"out{mask}"
        run = [*PROGRAM, *arguments, "-o", str(out)]
        subprocess.run(run, check=True, capture_output=True, umask=mask)
        assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~mask}


def signal_at_random(arguments, tmp_path, times):
    """Ends with the signal's exit code in a second or so, and the same command goes on."""
    rng = random.Random(1)
    codes = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
    run = [*EAGER, *arguments, "--threads", "2", "-o"]
    started = time.monotonic()
    subprocess.run([*run, str(tmp_path / "whole")], check=True, capture_output=True)
    whole_s, stopped = time.monotonic() - started, 0
    for _ in range(times):
        number = rng.choice(sorted(codes))
        process = subprocess.Popen(
            [*run, str(tmp_path / "out")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        time.sleep(rng.uniform(0.5, 1.1) * whole_s)
        process.send_signal(number)
        try:
            errors = process.communicate(timeout=60)[1].decode()
        finally:
            process.kill()
        # Before the program has begun, a signal ends it as it ends any other.
        assert process.returncode in (0, codes[number], -number), errors
        if process.returncode == codes[number]:
            stopped += 1
            assert "interrupted; run the same command to continue" in errors
        if (tmp_path / "out").exists():  # a signal may also come after the rename
            assert contents(tmp_path / "out") == contents(tmp_path / "whole")
            shutil.rmtree(tmp_path / "out")
        else:
            assert process.returncode != 0
    subprocess.run([*run, str(tmp_path / "out")], check=True, capture_output=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    return stopped


def test_signals_at_random_times(arguments, tmp_path):
    signal_at_random(arguments, tmp_path, 6)


def test_a_second_signal_ends_it_at_once(arguments, tmp_path):
    """Also where unwinding hangs, on a disk that answers no more."""
    slow = (
        "import sys, time\n"
        "from optimer_engine import folder_sink\n"
        "def write(*_): print('begun', file=sys.stderr, flush=True); time.sleep(0.2)\n"
        "def abort(*_): print('unwinding', file=sys.stderr, flush=True); time.sleep(600)\n"
        "folder_sink.FolderSink.write_run, folder_sink.FolderSink.abort = write, abort\n"
        "from optimer_engine.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments, "-o", str(tmp_path / "out")],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for word in ("begun", "unwinding"):
        while word not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM
    process.stderr.close()


@pytest.mark.slow
def test_many_signals_at_random_times(arguments, tmp_path):
    assert signal_at_random(arguments, tmp_path, 50) > 10
