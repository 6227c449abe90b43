"""Pack into a folder that is complete or absent, and compare a folder with what packing gives.

As with every output, the folder grows as OUT.partial, is continued after an interruption, and
appears by one rename (see `work_folder`, and `store` for its files).
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import xxhash

from optimer_engine import durable
from optimer_engine.checkpoint import VECTOR, Checkpoint
from optimer_engine.errors import CheckpointError, OptimerError, OutputError, RecipeError
from optimer_engine.events import Callback, Finished
from optimer_engine.packing.encode import TILE_ELEMS
from optimer_engine.packing.inputs import Inputs
from optimer_engine.packing.lowrank import Spill
from optimer_engine.packing.run import Run
from optimer_engine.packing.store import Layout, PartsFile, Published
from optimer_engine.plans import available_cores
from optimer_engine.recipe import Recipe, Source
from optimer_engine.report import Report, peak_mem_bytes, versions
from optimer_engine.types import parse_bytes
from optimer_engine.vectors.format import TENSOR, VERSION
from optimer_engine.work_folder import WorkFolder, check_place, finished


def pack(
    base: str | Path,
    source: str | Path,
    out: str | Path,
    *,
    mode: str = "exact",
    rank: int | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int | str = "5GB",
    discard: bool = False,
    threads: int | None = None,
    callbacks: Sequence[Callback] = (),
) -> Report:
    """Store what training changed between `base` and `source` as the vector folder `out`.

    A call that was interrupted is continued by the same call, as a merge is; only `lowrank` starts
    afresh.

    Args:
        source: a trained checkpoint, a distribution vector in any mode, or a LoRA adapter.
        mode: "exact" (lossless; not from a vector that is not itself exact), "float32", "bf16",
            "int8", "int4" or "lowrank". Scalars, vectors and other small tensors are not
            approximated; matrices that a low rank does not suit are kept exact (fp32, from a
            vector).
        rank: for lowrank, the rank of every matrix; or
        tolerance: the largest relative error in the Frobenius norm, for which each matrix gets
            the smallest rank (a multiple of 4). Exactly one of them; a LoRA adapter needs neither
            and keeps its factors.
        seed: of the randomised factorisation.
        metadata: joins the vector's header, such as {"dataset": ..., "tokens": ..., "seed": ...}.
        discard: start afresh instead of continuing.

    Returns:
        The report that is also in `out`/report.json.

    Raises:
        RecipeError: for settings that do not fit the mode or the source.
        CheckpointError, MismatchError: as `plan` raises them.
        NonFiniteError: NaN or infinity in a source, in any mode but exact.
        OutputError: the disk refuses, or another process writes `out`. After this the same call
            continues; any other error leaves nothing behind.
    """
    options = {
        "mode": mode,
        "rank": rank,
        "tolerance": tolerance,
        "seed": seed,
        "max_shard_size": parse_bytes(max_shard_size),
    }
    with Inputs(str(base), str(source), options) as inputs:
        header = {
            **(metadata or {}),
            "format": "pt",
            "kind": VECTOR,
            "vector_format": VERSION,
            "vector_mode": mode,
            "base_fingerprint": inputs.base.fingerprint,
            "optimer_engine": versions()["optimer-engine"],
        }
        threads = threads or available_cores()
        report = _write(inputs, Path(out), header, discard, threads, callbacks)
    for callback in callbacks:
        callback(Finished(report))
    return report


def compare(
    published: Checkpoint, report: Report, *, callbacks: Sequence[Callback] = ()
) -> int | None:
    """Pack once more and compare each byte with a vector's files; returns how many there are.

    None for factors that were computed: other libraries find others.

    Raises:
        CheckpointError: a file differs from what its inputs give now.
        OptimerError: as `pack`.
    """
    options = report.options
    if options["rank"] is not None or options["tolerance"] is not None:
        return None
    names = (report.recipe["base"], report.recipe["sources"][0]["model"])
    with Inputs(*names, options) as inputs, ExitStack() as stack:
        metadata = published.metadata.items()
        header = {key: text for key, text in metadata if not key.startswith(TENSOR)}
        spill = stack.enter_context(Spill(None))
        run = Run(inputs.encoders(spill, available_cores()), available_cores(), callbacks)
        numbers = {file.path.name: number for number, file in enumerate(published.files)}

        def opened(number: int, layout: Layout) -> Published:
            if layout.name not in numbers:
                raise CheckpointError(
                    "is missing, and packing again gives it",
                    where=str(published.folder / layout.name),
                    todo="pack again",
                )
            return Published(published, numbers[layout.name], layout)

        run.write(opened, header, options["max_shard_size"])
        return run.bytes_written


def _write(
    inputs: Inputs,
    out: Path,
    header: dict[str, str],
    discard: bool,
    threads: int,
    callbacks: Sequence[Callback],
) -> Report:
    """Pack into OUT.partial and publish it."""
    started = time.perf_counter()
    head = inputs.head(header)
    identity = xxhash.xxh3_128_hexdigest(json.dumps(head, sort_keys=True).encode())
    check_place(out, [inputs.base.folder, inputs.source.folder])
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        report = None if discard else finished(out, identity)
        if report is None:
            raise RecipeError(
                "exists and is not an empty folder",
                where=str(out),
                todo="choose another output or remove it first",
            )
        report.warnings.append("the output was complete already, and is as it was published")
        return report
    # Factors are found anew by each run, and another library, or number of threads, finds others.
    afresh = discard or inputs.options["mode"] == "lowrank"
    with ExitStack() as stack:
        try:
            work = WorkFolder(out, (1, 1), [], head, identity, afresh)
            stack.callback(work.close)
            if work.finished is None:
                report = _pack_into(work, inputs, header, threads, callbacks, started)
                report.identity, report.out = identity, str(out)
            else:
                report = work.finished
            work.publish(report)
        except OutputError:
            raise
        except OSError as error:
            raise _failed(out, error) from error
    return report


def _pack_into(
    work: WorkFolder,
    inputs: Inputs,
    header: dict[str, str],
    threads: int,
    callbacks: Sequence[Callback],
    started: float,
) -> Report:
    """All files of the vector; the report.

    Bad input removes what was written; what the next run can use stays after any other error.
    """
    files: list[PartsFile] = []

    def opened(number: int, layout: Layout) -> PartsFile:
        files.append(PartsFile(work.path, number, layout, work.journal))
        return files[-1]

    try:
        with Spill(work.path) as spill:
            encoders = inputs.encoders(spill, threads)
            run = Run(encoders, threads, callbacks)
            digests, weight_map = run.write(opened, header, inputs.options["max_shard_size"])
        inputs.check_unchanged()
        recipe = Recipe(inputs.names[0], [Source("source", inputs.names[1])])
        report = Report(
            operation=f"pack {inputs.options['mode']}",
            recipe=recipe.to_dict(),
            recipe_fingerprint=recipe.fingerprint(),
            fingerprints={
                "base": inputs.base.fingerprint,
                "source": inputs.source.fingerprint,
            },
            options=inputs.options,
            tensors=len(encoders),
            bytes_read=run.bytes_read,
            bytes_written=run.bytes_written,
            threads=threads,
            tile_bytes=TILE_ELEMS * 2,
            peak_mem_bytes=peak_mem_bytes(),
            wall_s=time.perf_counter() - started,
            warnings=inputs.warnings,
            versions=versions("numpy", "numba"),
            files=digests,
        )
        if len(set(weight_map.values())) > 1:
            index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
            text = (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
            name = "vector.safetensors.index.json"
            durable.write_file(work.path / name, text)
            report.files[name] = [(0, len(text), xxhash.xxh3_128_hexdigest(text))]
        return report
    except BaseException as error:
        bad_input = isinstance(error, OptimerError) and not (
            isinstance(error, OSError) or isinstance(error.__cause__, OSError)
        )
        if bad_input or not (work.journal.claims or any(file.digests for file in files)):
            with suppress(OSError):  # `error` is what the user must see
                work.abandon()
        raise


def _failed(out: Path, error: OSError) -> OutputError:
    """What the disk said, as an error of ours."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    todo = "free some space" if full else "check the disk and the folder"
    return OutputError(
        f"cannot be written: {error.strerror}",
        where=str(out),
        todo=f"{todo}, then run the same command again",
    )
