"""Case `methods`: the merges people make, by the same mergekit file in both programs.

Whole processes from the start of the interpreter to its end, each reading one YAML file: ours, and
mergekit with its default options. Ours syncs its output to disk, mergekit's stays in the page
cache. That both compute the same is the matter of `python -m benchmarks.agreement`; here ours is
checked to have written every tensor, finite and changed.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from benchmarks import checkpoints, measure, mergekit
from benchmarks.runner import Case, Contestant

DEFAULT_BYTES = 1_200_000_000
RIVALS = ("mergekit",)
METHODS: dict[str, dict[str, float]] = {
    "task_arithmetic": {},
    "linear": {},
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.15},
    "breadcrumbs": {"density": 0.5, "gamma": 0.01},
}


def case(
    work: Path, size_bytes: int, sources: int, cold: bool, rivals: tuple[str, ...], command: str
) -> Case:
    """Make the files and say who runs on them."""
    inputs = checkpoints.make(work, size_bytes, sources)
    out = work / "out"
    moved = inputs.read_bytes + inputs.base_bytes

    def before() -> None:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        (measure.evict if cold else measure.warm)(inputs.files)

    contestants = []
    for method, parameters in METHODS.items():
        config = work / f"{method}.yaml"
        text = mergekit.config(inputs, "bfloat16", method, parameters)
        if method == "linear":  # a mean of models has no base
            text = text.replace(f"base_model: {inputs.base}\n", "")
        config.write_text(text)
        ours, theirs = f"{method}, optimer", f"{method}, mergekit"
        program = [Path(sys.executable).with_name("optimer"), "merge", config, "-o", out]
        contestants.append(_contestant(ours, "ours", program, moved, work, None))
        if rivals:
            program = [mergekit.install(work), config, out]
            contestants.append(_contestant(theirs, "rival", program, moved, work, ours))
    return Case(
        name="methods",
        command=command,
        parameters={
            "base_bytes": inputs.base_bytes,
            "sources": sources,
            "weights": list(inputs.weights),
            "density": 0.5,
            "page_cache": "cold" if cold else "warm",
        },
        contestants=contestants,
        before=before,
        versions={"mergekit": mergekit.VERSION} if rivals else {},
    )


def _contestant(
    name: str, kind: str, program: list[str | Path], moved: int, work: Path, against: str | None
) -> Contestant:
    return Contestant(
        name, kind, moved, lambda: measure.of_process(program, work / "log.txt"), against
    )
