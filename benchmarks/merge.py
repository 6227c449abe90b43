"""Case `merge`: one merge of full checkpoints, from files to a folder.

Whole processes, from the start of the interpreter to its end: `optimer merge`, mergekit in its
default precision and in float32, and two plain torch scripts. The engine alone, in a process that
is already warm: into a folder, into nothing, and into a folder with the arithmetic left out.
Ceilings: reading the files, writing the output, streaming memory, and from a cold cache a program
that reads the same files side by side, writes one, and does no merge. Ours and the ceilings sync
their output to disk; the rivals leave theirs in the page cache, for which they are not charged.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks import accuracy, ceilings, checkpoints, measure, mergekit
from benchmarks.checkpoints import Inputs
from benchmarks.measure import Cost
from benchmarks.runner import Case, Contestant
from optimer_engine import FolderSink, Sink, ops, plan
from optimer_engine.kept import Kept
from optimer_engine.plans import available_cores
from optimer_engine.types import TensorInfo

DEFAULT_BYTES = 1_200_000_000
OURS = "optimer merge"
RIVALS = ("mergekit", "mergekit float32", "torch per tensor", "torch load_file")
STREAM_BYTES = 64 << 20


class NullSink(Sink):
    """Takes the tiles and keeps nothing."""

    def write(self, info: TensorInfo, start: int, tile: np.ndarray) -> None:
        """Drop the tile."""


def case(
    work: Path, size_bytes: int, sources: int, cold: bool, rivals: tuple[str, ...], command: str
) -> Case:
    """Make the files and say who runs on them."""
    inputs = checkpoints.make(work, size_bytes, sources)
    out = work / "out"
    threads = available_cores()
    moved = inputs.read_bytes + inputs.base_bytes

    def before() -> None:
        shutil.rmtree(out, ignore_errors=True)
        (work / "raw").unlink(missing_ok=True)
        os.sync()  # or one contestant would wait for the write-back of another
        (measure.evict if cold else measure.warm)(inputs.files)

    def process(name: str, program: list[str | Path], kind: str = "rival") -> Contestant:
        return Contestant(
            name,
            kind,
            moved,
            lambda: measure.of_process(program, work / "log.txt"),
            None if kind == "ours" else OURS,
            lambda: accuracy.of_folder(out, inputs),
        )

    contestants = [process(OURS, _optimer(inputs, out), "ours")]
    contestants += [process(name, _rival(name, work, inputs, out)) for name in rivals]
    contestants += _engine(inputs, out, moved)
    contestants += [
        Contestant(
            "read the files",
            "ceiling",
            inputs.read_bytes,
            lambda: measure.of_call(lambda: ceilings.read(inputs.files, threads)),
            "engine into nothing",
        ),
        Contestant(
            "write the output",
            "ceiling",
            inputs.base_bytes,
            lambda: measure.of_call(
                lambda: ceilings.write(work / "raw", inputs.base_bytes, threads)
            ),
            "engine into a folder",
        ),
        _memory(sources, threads, moved),
    ]
    if cold:
        contestants.append(_disk(inputs, work / "raw", threads, moved))
    return Case(
        name="merge",
        command=command,
        parameters={
            "base_bytes": inputs.base_bytes,
            "sources": sources,
            "weights": list(inputs.weights),
            "tensors": 2 + checkpoints.LAYERS * 9,
            "page_cache": "cold" if cold else "warm",
        },
        contestants=contestants,
        before=before,
        versions={"mergekit": mergekit.VERSION} if set(rivals) & set(RIVALS[:2]) else {},
    )


def _optimer(inputs: Inputs, out: Path) -> list[str | Path]:
    program = Path(sys.executable).with_name("optimer")
    added = [
        f"--add={folder}={weight}"
        for folder, weight in zip(inputs.sources, inputs.weights, strict=True)
    ]
    return [program, "merge", "--base", inputs.base, *added, "-o", out]


def _rival(name: str, work: Path, inputs: Inputs, out: Path) -> list[str | Path]:
    if name.startswith("mergekit"):
        program = mergekit.install(work)
        config = work / f"{name.replace(' ', '-')}.yaml"
        dtype = "float32" if name.endswith("float32") else "bfloat16"
        config.write_text(mergekit.config(inputs, dtype))
        return [program, config, out]
    script = Path(__file__).with_name("rival_torch.py")
    form = "per-tensor" if name == "torch per tensor" else "whole"
    pairs = [f"{w}={folder}" for folder, w in zip(inputs.sources, inputs.weights, strict=True)]
    return [sys.executable, "-P", script, form, out, inputs.base, *pairs]


def _engine(inputs: Inputs, out: Path, moved: int) -> list[Contestant]:
    recipe = {
        "base": str(inputs.base),
        "sources": [
            {"name": folder.name, "model": str(folder), "weight": weight}
            for folder, weight in zip(inputs.sources, inputs.weights, strict=True)
        ],
    }

    def run(sink: Sink) -> None:
        made = plan(recipe)
        try:
            made.run(sink)
        finally:
            made.close()

    def without_arithmetic() -> Cost:
        with (
            mock.patch.object(ops, "linear_kernel", lambda _impl: lambda *_: False),
            mock.patch.object(Kept, "add", lambda *_: None),  # what it would look at is not there
        ):
            return measure.of_call(lambda: run(FolderSink(out)))

    def engine(name: str, sink: Callable[[], Sink], compared_to: str | None) -> Contestant:
        return Contestant(
            name, "ours", moved, lambda: measure.of_call(lambda: run(sink())), compared_to
        )

    return [
        engine("engine into a folder", lambda: FolderSink(out), OURS),
        engine("engine into nothing", NullSink, "engine into a folder"),
        Contestant(
            "engine into a folder, no arithmetic",
            "ceiling",
            moved,
            without_arithmetic,
            "engine into a folder",
        ),
    ]


def _disk(inputs: Inputs, out: Path, threads: int, moved: int) -> Contestant:
    folders = (inputs.base, *inputs.sources)
    shards = list(zip(*map(checkpoints.weight_files, folders), strict=True))

    def run() -> None:
        for files in shards:
            ceilings.read_and_write(files, out, threads)

    name, ours = "read and write, no merge", "engine into a folder"
    return Contestant(name, "ceiling", moved, lambda: measure.of_call(run), ours)


def _memory(sources: int, threads: int, moved: int) -> Contestant:
    stream: list[Callable[[int], None]] = []

    def run() -> Cost:
        if not stream:
            stream.append(ceilings.memory_stream(sources + 1, STREAM_BYTES, threads))
        return measure.of_call(lambda: stream[0](moved))

    name = f"memory, {sources + 1} in and 1 out"
    return Contestant(name, "ceiling", moved, run, "engine into nothing")
