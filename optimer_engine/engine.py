"""Merge and extract: plan, run into a sink, report. The threads are in `execution`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optimer_engine import ops
from optimer_engine.errors import MemoryLimitError, MismatchError, NonFiniteError
from optimer_engine.events import Callback, Finished, Started
from optimer_engine.execution import Execution
from optimer_engine.folder_sink import FolderSink
from optimer_engine.planner import ReadBackend, plan, plan_difference
from optimer_engine.plans import MEM_LIMIT, MIN_TILE_BYTES, Plan
from optimer_engine.recipe import Recipe, fingerprint
from optimer_engine.report import Report, peak_mem_bytes, versions
from optimer_engine.runs import DIFFERENCE
from optimer_engine.sink import Sink

if TYPE_CHECKING:
    from optimer_engine.device import Lane
    from optimer_engine.mergekit import MergekitConfig


def merge(
    recipe: Recipe | MergekitConfig | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    discard: bool = False,
    part: tuple[int, int] = (1, 1),
    max_shard_size: int | str | None = None,
    compat: str | None = None,
    seed: int | None = None,
    rounding: Literal["nearest", "stochastic"] | None = None,
    nonfinite: Literal["refuse", "keep"] = "refuse",
    overflow: Literal["refuse", "clamp"] = "refuse",
    mem_limit: int | str = MEM_LIMIT,
    threads: int | None = None,
    backend: ReadBackend = "pread",
    disk_limit: int | str | None = None,
    device: str = "cpu",
    resident_mem: int | str = 0,
    callbacks: Sequence[Callback] = (),
) -> Report:
    """Merge as `recipe` says into the new folder `out`.

    A merge that was interrupted, by a signal, a full disk or a power cut, is continued by the same
    call and ends with the same bytes.

    Args:
        recipe: a Recipe, a mapping, or the path of a YAML file; mergekit's files work as well.
        out: must not exist, or be empty; appears only when it is complete.
        discard: start afresh instead of continuing.
        part: (i, n) to write only the i-th of n parts, counted from 1; n runs, on any machines that
            share the disk, make one output, and the one that ends last publishes it.
        max_shard_size, compat, seed, rounding, nonfinite, overflow: see `planner.plan`.
        backend: how inputs are read: "pread", or "mmap" (see `checkpoint`), or "kvikio" straight
            into GPU memory.
        device, resident_mem: where it is merged, see `planner.plan`; the bytes are the same, but
            for the last bits of LoRA adapters' products on a GPU.
        disk_limit: most that downloads from the Hub may take on the disk at any time; they are
            removed after use. Without a limit they go to the Hub's cache and stay.

    Raises:
        OptimerError: bad input leaves nothing behind, a failing disk a state to continue from; see
            `plan` for what is checked before the start.
    """
    made = plan(
        recipe,
        mem_limit=mem_limit,
        threads=threads,
        every_source=False,
        max_shard_size=max_shard_size,
        compat=compat,
        seed=seed,
        rounding=rounding,
        nonfinite=nonfinite,
        overflow=overflow,
        part=part,
        backend=backend,
        whole=False,
        disk_limit=disk_limit,
        device=device,
        resident_mem=resident_mem,
    )
    return _run_closing(made, FolderSink(out, discard=discard), callbacks)


def extract(
    base: str | Path,
    trained: str | Path,
    out: str | Path,
    *,
    dtype: str = "float32",
    metadata: Mapping[str, str] | None = None,
    discard: bool = False,
    mem_limit: int | str = MEM_LIMIT,
    threads: int | None = None,
    callbacks: Sequence[Callback] = (),
) -> Report:
    """Write the distribution vector tau = theta_trained - theta_base (OptiMer) into folder `out`.

    The vector's header names the base by fingerprint; `metadata` joins it. In float32, base + tau
    rounds back to a bf16 or fp16 trained checkpoint to the bit, but for elements that training
    moved by more than 2^15 times their new size; a float32 one within one rounding. `discard` and
    what may be raised are as in `merge`.
    """
    made = plan_difference(
        base, trained, dtype=dtype, metadata=metadata, mem_limit=mem_limit, threads=threads
    )
    return _run_closing(made, FolderSink(out, discard=discard), callbacks)


def _run_closing(made: Plan, sink: Sink, callbacks: Sequence[Callback]) -> Report:
    try:
        return run(made, sink, callbacks=callbacks)
    finally:
        made.close()


def run(
    made: Plan, sink: Sink, *, callbacks: Sequence[Callback] = (), impl: ops.Impl = "auto"
) -> Report:
    """Run a plan into a sink and report.

    Raises:
        NonFiniteError: NaN or infinity in a source or in the result, named.
        CheckpointError: a source that changed or failed while being read.
        MemoryLimitError: a GPU has no room, even for small tiles.
        OutputError: from the sink. On any error the sink is aborted.
    """
    started = time.perf_counter()
    made, lanes = _with_lanes(made)
    execution = Execution(made, sink, callbacks, ops.linear_kernel(impl), lanes)
    try:
        for checkpoint in made.read_checkpoints.values():
            checkpoint.check_hashes()
        sink.open(made)
        execution.emit(Started(made.out_bytes))
        with execution.begin():
            execution.run()
        for checkpoint in made.read_checkpoints.values():
            checkpoint.check_unchanged()
        report = _report(made, execution, time.perf_counter() - started)
        sink.commit(report)
    except BaseException as error:
        sink.abort(error)
        if isinstance(error, MismatchError | NonFiniteError):
            for checkpoint in made.read_checkpoints.values():
                checkpoint.check_unchanged()  # then that is why
        raise
    execution.emit(Finished(report))
    return report


def _with_lanes(made: Plan) -> tuple[Plan, list[list[Lane]]]:
    """The buffers of a plan's GPUs; with smaller tiles where somebody took memory meanwhile."""
    while made.devices is not None:
        try:
            return made, made.devices.lanes(made.threads, *made.ring_shape)
        except MemoryLimitError:
            if made.tile_bytes // 2 < MIN_TILE_BYTES:
                raise
            made = replace(made, tile_bytes=made.tile_bytes // 2)
    return made, []


def _operation(made: Plan) -> str:
    used = sorted({treatment.method for treatment in made.treatments})
    return "base + sum_i w_i * tau_i" if used == ["task_arithmetic"] else ", ".join(used)


def _amended(execution: Execution) -> list[str]:
    count = execution.amended
    return [f"{count} values that are NaN, infinite or too large were kept or clamped"] * (
        count > 0
    )


def _report(made: Plan, execution: Execution, wall_s: float) -> Report:
    extracted = any(treatment.method == DIFFERENCE for treatment in made.treatments)
    read = made.read_checkpoints.items()
    return Report(
        operation="trained - base" if extracted else _operation(made),
        recipe=made.written_recipe,
        recipe_fingerprint=fingerprint(made.written_recipe),
        fingerprints={name: checkpoint.fingerprint for name, checkpoint in read},
        options=dict(made.options),
        origins={name: checkpoint.origin for name, checkpoint in read if checkpoint.origin},
        tensors=len(made.rows),
        kept={made.names[i]: share for i, share in execution.kept.shares().items()},
        bytes_read=execution.bytes_read,
        bytes_written=made.out_bytes,
        wall_s=wall_s,
        threads=made.threads,
        device=made.devices.name if made.devices else "cpu",
        device_mem_bytes=made.device_mem_bytes,
        tile_bytes=made.tile_bytes,
        projected_mem_bytes=made.projected_mem_bytes,
        peak_mem_bytes=peak_mem_bytes(),
        warnings=[*made.warnings, *_amended(execution)],
        versions=versions("numpy", "numba", *(("torch", "triton") if made.devices else ())),
    )
