"""Case `startup`: what a command costs before it does anything, beside the bare interpreter.

CPU seconds of whole processes: `python -c pass`, and `optimer` commands that read no weight. A
merge of a megabyte shows what a merge pays before its first tile.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from benchmarks import checkpoints, measure
from benchmarks.runner import Case, Contestant

DEFAULT_BYTES = 1_000_000
RIVALS = ()


def case(
    work: Path, size_bytes: int, sources: int, cold: bool, rivals: tuple[str, ...], command: str
) -> Case:
    """Make small files, so that nothing is measured but the start."""
    inputs = checkpoints.make(work, size_bytes, sources)
    out = work / "out"
    recipe = work / "startup.yaml"
    named = [
        {"name": folder.name, "model": str(folder), "weight": weight}
        for folder, weight in zip(inputs.sources, inputs.weights, strict=True)
    ]
    recipe.write_text(json.dumps({"base": str(inputs.base), "sources": named}))  # JSON is YAML
    optimer = Path(sys.executable).with_name("optimer")
    programs: dict[str, list[str | Path]] = {
        "optimer --help": [optimer, "--help"],
        "optimer plan": [optimer, "plan", recipe],
        "optimer inspect --headers": [optimer, "inspect", inputs.base, "--headers"],
        "optimer merge, 1 MB": [optimer, "merge", recipe, "-o", out],
    }
    bare: list[str | Path] = [sys.executable, "-c", "pass"]
    interpreter = "python -c pass"
    contestants = [
        Contestant(
            name,
            "ours",
            0,
            lambda program=program: measure.of_process(program, work / "log.txt"),  # type: ignore[misc]
            interpreter,
        )
        for name, program in programs.items()
    ]
    contestants.append(
        Contestant(interpreter, "ceiling", 0, lambda: measure.of_process(bare, work / "log.txt"))
    )
    return Case(
        name="startup",
        command=command,
        parameters={"base_bytes": inputs.base_bytes, "sources": sources},
        contestants=contestants,
        before=lambda: shutil.rmtree(out, ignore_errors=True),
    )
