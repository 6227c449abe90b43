"""A merge may be killed at any moment: the output is absent or complete, and is finished later."""

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
from tests.faults.disk import Dying, Killed
from tests.faults.recipes import contents


def fresh(case, number):
    folder = case.folder / f"at{number}"
    folder.mkdir()
    return folder / "out"


def test_killed_before_every_effect(case):
    count = case.effects()
    for at in range(count):
        out = fresh(case, at)
        with pytest.raises(Killed):
            case.run(out, Dying(at))
        case.check_resumes(out)
        shutil.rmtree(out.parent)
    assert count >= {"single": 70, "shards": 150, "parts": 180}[case.kind]  # 400 in all


def test_killed_again_and_again_while_it_resumes(case):
    rng = random.Random(0)
    count = case.effects()
    for number in range(25):
        out, kills = fresh(case, number), 0
        while kills < 30:
            try:
                case.run(out, Dying(rng.randrange(2, count)))
                break
            except Killed:
                kills += 1
                case.check_absent_or_complete(out)
        case.check_resumes(out)
        shutil.rmtree(out.parent)


def command(recipe, out):
    return [
        sys.executable, "-c",
        "from optimer_engine import folder_sink; folder_sink.SETTLE_BYTES = 200_000\n"
        "from optimer_engine.cli import main; main()",
        "merge", "--base", recipe["base"], "--add", recipe["sources"][0]["model"] + "=0.5",
        "-o", str(out), "--max-shard-size", "1MB", "--threads", "2",
    ]  # fmt: skip


def kill_at_random(folders, tmp_path, kills):
    """`kills` SIGKILLs of the real command, each run continuing what the killed one left."""
    import torch

    rng = random.Random(os.getpid())
    base = random_tensors(0) | {f"model.{n}": torch.linspace(-1, 1, 10**6) for n in range(4)}
    recipe = {
        "base": str(folders("base", base)),
        "sources": [{"model": str(folders("ja", nearby(base, 1)))}],
    }
    started = time.monotonic()
    subprocess.run(command(recipe, tmp_path / "whole"), check=True, capture_output=True)
    whole_s = time.monotonic() - started
    expected = contents(tmp_path / "whole")
    done, out = 0, tmp_path / "out"
    partials = 0
    while done < kills:
        started = time.monotonic()
        process = subprocess.Popen(
            command(recipe, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            process.wait(rng.uniform(0.3, 1.1) * whole_s)
            whole_s = time.monotonic() - started  # the machine may be busier now, or less so
        except subprocess.TimeoutExpired:
            process.kill()
        errors = process.communicate()[1].decode()
        assert process.returncode in (0, -signal.SIGKILL), errors
        done += process.returncode != 0
        partials += out.with_name("out.partial").exists()
        if out.exists():
            assert contents(out) == expected
            shutil.rmtree(out)
    subprocess.run(command(recipe, out), check=True, capture_output=True)
    assert contents(out) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "ja", "out", "whole"]
    return partials


def test_sigkill_of_the_real_command_at_random_times(write_checkpoint, tmp_path):
    kill_at_random(write_checkpoint, tmp_path, 20)


@pytest.mark.slow
def test_sigkill_of_the_real_command_a_thousand_times(write_checkpoint, tmp_path):
    assert kill_at_random(write_checkpoint, tmp_path, 1000) > 50
