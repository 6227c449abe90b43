"""Case `inspect`: what `optimer inspect` needs for a pool of large models and their base.

A whole process over sparse files, as in case `memory`, beside reading the same files: memory, and
how far the arithmetic is from the speed of the page cache. That a cold inspection goes as fast as
the disk reads, case `vectors` shows on files with numbers in them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import ceilings, measure, memory
from benchmarks.checkpoints import weight_files
from benchmarks.runner import Case, Contestant
from optimer_engine.plans import available_cores

DEFAULT_BYTES = memory.DEFAULT_BYTES
RIVALS = ()


def case(
    work: Path, size_bytes: int, sources: int, cold: bool, rivals: tuple[str, ...], command: str
) -> Case:
    """Make the files, and inspect `sources` of them with their base."""
    numbers = range(sources + 1)
    folders = [memory.sparse(work / f"sparse-{size_bytes}-{n}", size_bytes) for n in numbers]
    files = [file for folder in folders for file in weight_files(folder)]
    moved = sum(file.stat().st_size for file in files)
    optimer = Path(sys.executable).with_name("optimer")
    program = [optimer, "inspect", *folders[1:], "--base", folders[0]]

    def read() -> measure.Cost:
        return measure.of_call(lambda: ceilings.read(files, available_cores()))

    def inspect() -> measure.Cost:
        return measure.of_process(program, work / "log.txt")

    return Case(
        name="inspect",
        command=command,
        parameters={"size_bytes": size_bytes, "sources": sources, "sparse": True},
        contestants=[
            Contestant("optimer inspect", "ours", moved, inspect, "read the files"),
            Contestant("read the files", "ceiling", moved, read),
        ],
        before=lambda: None,
    )
