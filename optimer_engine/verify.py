"""Is an output still what was published, and is it what its sources give?

Every output carries the hashes of its files in report.json, so damage is found by reading it once.
`full` goes further: the recipe is run again, tile by tile, into a sink that compares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from optimer_engine.checkpoint import Checkpoint
from optimer_engine.engine import run
from optimer_engine.errors import CheckpointError
from optimer_engine.events import Callback
from optimer_engine.journal import damage
from optimer_engine.planner import plan, plan_difference
from optimer_engine.plans import Plan
from optimer_engine.recipe import Recipe, decode
from optimer_engine.report import Report
from optimer_engine.runs import Run
from optimer_engine.sink import Sink


def verify_output(
    out: str | Path, *, full: bool = False, callbacks: Sequence[Callback] = ()
) -> dict[str, object]:
    """Check a folder that `merge` or `extract` wrote.

    Args:
        full: also compute the output again from its sources, and compare every byte.

    Returns:
        {"files": number checked, "bytes": hashed, "recomputed": bytes compared,
        "sha256": of each file by name, as hubs publish it}.

    Raises:
        CheckpointError: naming the first file, or tensor, that is not as published.
        OptimerError: with `full`, whatever keeps the recipe from running again.
    """
    out = Path(out)
    report = _read_report(out)
    present = {path.name for path in out.iterdir()} - {"report.json"}
    for name in sorted(present ^ set(report.files)):
        what = "is missing" if name in report.files else "was not written by the merge"
        raise CheckpointError(what, where=str(out / name), todo="merge again")
    sha256 = {name: hashlib.sha256() for name in report.files}
    for name, ranges in report.files.items():
        if problem := damage(out / name, ranges, sha256[name]):
            raise CheckpointError(
                problem,
                where=str(out / name),
                todo="the file was changed or the disk is failing; merge again",
            )
    total = sum((out / name).stat().st_size for name in report.files)
    Checkpoint.open(out).close()
    recomputed = 0
    if full and report.recipe:  # a converted pickle has none, and is not read again
        with Checkpoint.open(out) as published:
            made = _plan_again(report, out, published.metadata)
            try:
                recomputed = run(made, _Compare(published), callbacks=callbacks).bytes_written
            finally:
                made.close()
    return {
        "files": len(report.files),
        "bytes": total,
        "recomputed": recomputed,
        "sha256": {name: digest.hexdigest() for name, digest in sha256.items()},
    }


def _read_report(out: Path) -> Report:
    path = out / "report.json"
    try:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"no readable report: {error}",
            where=str(path),
            todo="name a folder that optimer merge or optimer extract wrote",
        ) from error
    return report


def _plan_again(report: Report, out: Path, metadata: Mapping[str, str]) -> Plan:
    if report.operation == "trained - base":
        recipe = decode(report.recipe, Recipe, str(out / "report.json"))
        assert recipe.out_dtype is not None
        trained = recipe.sources[0]
        return plan_difference(
            _at(recipe.base, recipe.base_revision),
            _at(trained.model, trained.revision),
            dtype=recipe.out_dtype,
            metadata=metadata,
        )
    return plan(report.recipe, **report.options)


def _at(model: str, revision: str | None) -> str:
    return f"{model.partition('@')[0]}@{revision}" if revision else model


class _Compare(Sink):
    """Compares tiles with the bytes of a folder that should hold them already."""

    def __init__(self, published: Checkpoint) -> None:
        self.published, self.out = published, published.folder

    def open(self, plan: Plan) -> None:
        """Raises CheckpointError when the sources now lead to another layout."""
        names = [file.path.name for file in self.published.files]
        if names != [shard.name for shard in plan.shards]:
            raise CheckpointError(
                f"has files {', '.join(names)}, the recipe gives"
                f" {', '.join(shard.name for shard in plan.shards)}",
                where=str(self.out),
            )

    def write_run(self, run: Run, start: int, tile: np.ndarray) -> None:
        found = np.empty(tile.nbytes, np.uint8)
        offset = run.out.offset + start * run.out.dtype.itemsize
        self.published.read_into(run.out.file, offset, found.data)
        if not np.array_equal(found, tile.view(np.uint8)):
            names = ", ".join(info.name for info, *_ in run.parts(start, start + tile.size))
            raise CheckpointError(
                f"{names} differs from what the sources give now",
                where=str(self.out),
                todo="the sources or the output changed since; merge again",
            )
