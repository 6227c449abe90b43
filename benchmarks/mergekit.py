"""mergekit, the tool most people merge with, in a virtual environment of its own.

It is installed on first use, at a fixed version, with the same torch as ours, so that neither its
requirements nor ours bend the other's. It runs as a user would run it: `mergekit-yaml CONFIG OUT`
with default options.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from benchmarks.checkpoints import Inputs

VERSION = "0.1.5"


def install(work: Path) -> Path:
    """The `mergekit-yaml` program, installed under `work` unless it is there already."""
    folder = work / f"mergekit-{VERSION}"
    program = folder / "bin" / "mergekit-yaml"
    if not program.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        torch = version("torch").split("+")[0]
        # torch first and alone: where pip is set up for the build without CUDA, it stays so.
        for packages in ([f"torch=={torch}"], [f"mergekit=={VERSION}", f"torch=={torch}"]):
            subprocess.run([*pip, *packages], check=True, stdout=sys.stderr)
    return program


def config(
    inputs: Inputs, dtype: str, method: str = "task_arithmetic", extra: Mapping[str, float] = {}
) -> str:
    """Its configuration for a merge, computed in `dtype` and written as bfloat16.

    Args:
        extra: parameters of every source beside its weight.
    """
    more = "".join(f"      {key}: {value}\n" for key, value in extra.items())
    models = "".join(
        f"  - model: {folder}\n    parameters:\n      weight: {weight}\n{more}"
        for folder, weight in zip(inputs.sources, inputs.weights, strict=True)
    )
    return (
        f"merge_method: {method}\nbase_model: {inputs.base}\nmodels:\n{models}"
        f"dtype: {dtype}\nout_dtype: bfloat16\n"
    )
