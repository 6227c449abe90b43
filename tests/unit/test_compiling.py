"""The first use of a kernel compiles it: the program says so, once, and then never again."""

from __future__ import annotations

import os
import subprocess
import sys

import torch


def test_compiling_is_announced_once_per_processor(tmp_path, write_checkpoint):
    base = write_checkpoint("base", {"w": torch.ones(4)})
    other = write_checkpoint("other", {"w": torch.zeros(4)})
    environment = {**os.environ, "OPTIMER_CACHE_DIR": str(tmp_path / "cache")}

    def merge(out):
        program = [sys.executable, "-c", "from optimer_engine.cli import main; main()", "merge"]
        done = subprocess.run(
            [*program, "--base", base, "--add", f"{other}=0.5", "-o", tmp_path / out],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert merge("first").count("optimer: compiling kernels for this processor, once") == 1
    assert "compiling" not in merge("second")
