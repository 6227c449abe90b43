"""Is an output still what was published, and is it what its sources give?

Every output carries the hashes of its files in report.json, so damage is found by reading it once.
The recipe can also be run again, tile by tile, into a sink that compares: all of it, or a sample
that finds other sources or another version of the arithmetic at a fraction of the price.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from optimer_engine import packing
from optimer_engine.checkpoint import Checkpoint
from optimer_engine.engine import run
from optimer_engine.errors import CheckpointError
from optimer_engine.events import Callback
from optimer_engine.journal import damage
from optimer_engine.planner import plan, plan_difference
from optimer_engine.plans import Plan, available_cores
from optimer_engine.recipe import Recipe, decode
from optimer_engine.report import Report
from optimer_engine.runs import UNPACK, Run
from optimer_engine.sink import Sink

SAMPLED_SHARE = 20
"""Of so many tiles, or of so many tensors where a method needs whole ones, a sample has one."""


def verify_output(
    out: str | Path,
    *,
    sampled: bool = False,
    full: bool = False,
    callbacks: Sequence[Callback] = (),
) -> dict[str, object]:
    """Check what `merge`, `extract`, `pack` or `unpack` wrote: every byte against its hash.

    Args:
        sampled: also compute some tiles of every file again from the sources, and compare.
        full: compute and compare every byte.

    Returns:
        {"files": number checked, "bytes": hashed, "recomputed": bytes compared,
        "sha256": of each file by name, as hubs publish it}.

    Raises:
        CheckpointError: naming the first file, or tensor, that is not as published.
        OptimerError: with `sampled` or `full`, whatever keeps the recipe from running again.
    """
    out = Path(out)
    report = _read_report(out)
    present = {path.name for path in out.iterdir()} - {"report.json"}
    for name in sorted(present ^ set(report.files)):
        what = "is missing" if name in report.files else "was not written by the merge"
        raise CheckpointError(what, where=str(out / name), todo="merge again")
    sha256 = {name: hashlib.sha256() for name in report.files}
    with ThreadPoolExecutor(available_cores()) as pool:
        problems = pool.map(
            lambda name: damage(out / name, report.files[name], sha256[name]), report.files
        )
        found = dict(zip(report.files, problems, strict=True))
    for name, problem in found.items():
        if problem:
            raise CheckpointError(
                problem,
                where=str(out / name),
                todo="the file was changed or the disk is failing; merge again",
            )
    total = sum((out / name).stat().st_size for name in report.files)
    Checkpoint.open(out).close()
    recomputed = 0
    if (full or sampled) and report.recipe:  # a converted pickle has none, and is not read again
        with Checkpoint.open(out) as published:
            share = 1 if full else SAMPLED_SHARE
            recomputed = _recompute(published, report, share, callbacks)
    return {
        "files": len(report.files),
        "bytes": total,
        "recomputed": recomputed,
        "sha256": {name: digest.hexdigest() for name, digest in sha256.items()},
    }


def _recompute(
    published: Checkpoint, report: Report, share: int, callbacks: Sequence[Callback]
) -> int:
    """Bytes that were computed again and are equal; a packed vector is packed whole."""
    if report.operation.startswith("pack "):
        return packing.compare(published, report, callbacks=callbacks) or 0
    made = _plan_again(report, published.folder, published.metadata)
    comparison = _Compare(published, share)
    try:
        run(made, comparison, callbacks=callbacks)
    finally:
        made.close()
    return comparison.bytes


def _read_report(out: Path) -> Report:
    path = out / "report.json"
    try:
        if path.exists() and not path.is_file():  # a FIFO would be waited for
            raise OSError("it is not a regular file")
        report = msgspec.json.decode(path.read_bytes(), type=Report)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(
            f"no readable report: {error}",
            where=str(path),
            todo="name a folder that optimer merge, extract, pack or unpack wrote",
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
    if report.operation == UNPACK:
        recipe = decode(report.recipe, Recipe, str(out / "report.json"))
        return packing.plan_unpack(recipe.base, recipe.sources[0].model, **report.options)
    return plan(report.recipe, **report.options)


def _at(model: str, revision: str | None) -> str:
    return f"{model.partition('@')[0]}@{revision}" if revision else model


class _Compare(Sink):
    """Compares tiles with the bytes of a folder that should hold them already.

    Args:
        published: the folder.
        share: one of so many tiles is compared; what is not is said to be there already.
    """

    def __init__(self, published: Checkpoint, share: int) -> None:
        self.published, self.out, self.share = published, published.folder, share
        self.bytes = 0
        self._adding = threading.Lock()

    def has(self, run: Run, start: int, stop: int) -> bool:
        """Whether this tile, or all of a run, is left out."""
        step = run.elems if run.method is not None else run.tile_elems(self._tile_bytes)
        if (start, stop) == (0, run.elems):
            return not any(self._wanted(run, at) for at in range(0, run.elems, max(step, 1)))
        return not self._wanted(run, start // max(step, 1) * step)

    def _wanted(self, run: Run, start: int) -> bool:
        if not start and run.out.offset == self._starts[run.out.file]:
            return True  # of every file something
        place = f"{start} {run.tensors[0].name}".encode()
        return xxhash.xxh32_intdigest(place) % self.share == 0

    def open(self, plan: Plan) -> None:
        """Raises CheckpointError when the sources now lead to another layout."""
        self._tile_bytes = plan.tile_bytes
        self._starts = [len(shard.header) for shard in plan.shards]
        names = [file.path.name for file in self.published.files]
        if names != [shard.name for shard in plan.shards]:
            raise CheckpointError(
                f"has files {', '.join(names)}, the recipe gives"
                f" {', '.join(shard.name for shard in plan.shards)}",
                where=str(self.out),
            )

    def write_run(self, run: Run, start: int, tile: np.ndarray) -> None:
        with self._adding:
            self.bytes += tile.nbytes
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
