"""What a plan would do, for people: formulas, bytes, memory, disk, and about how long it takes."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np

from optimer_engine.checkpoint import Checkpoint
from optimer_engine.downloads import needs
from optimer_engine.plans import Plan
from optimer_engine.runs import DIFFERENCE, JOINED, Run, Treatment

SAMPLE_BYTES = 4 << 20
"""Read from each input to see how fast its disk, or its cache, is."""
KERNEL_BYTES_PER_S = 5e9
"""In and out of memory by one thread of the fused linear kernel, cautiously."""
WRITE_BYTES_PER_S = 1e9
"""Synced to a common solid-state disk; the part of the estimate that is not measured."""
METHOD_PASSES = 3
"""Readings of the inputs by a method that needs statistics, at most, merge included."""


def facts(plan: Plan) -> dict[str, Any]:
    """What running the plan reads, writes and needs, as plain data.

    Returns:
        formula, groups (tensors treated alike: formula, how many, bytes in and out), tensors,
        files, read_bytes, write_bytes, disk_bytes (free space needed beside the output's
        folder), download_bytes and least_disk_limit_bytes (if something comes from the Hub),
        memory_bytes (the promised bound, beyond interpreter and libraries), with GPUs device,
        pinned_memory_bytes (a part of it), gpu_memory_bytes and gpu_resident_bytes (of each GPU,
        for the run and for what stays), seconds (a rough estimate from a sample of the inputs),
        tile_bytes, threads, warnings.
    """
    runs = plan.runs()
    read = sum(_read_bytes(run) for run in runs)
    own = set(plan.own_shards)
    write = sum(shard.size for number, shard in enumerate(plan.shards) if number in own)
    groups = _groups(plan, runs)
    return {
        "formula": groups[0]["formula"] if len(groups) == 1 else f"{len(groups)} groups of tensors",
        "groups": groups,
        "tensors": len(plan.rows),
        "files": [shard.name for shard in plan.shards],
        "read_bytes": int(read),
        "write_bytes": write,
        "disk_bytes": write,
        **_downloads(runs),
        "memory_bytes": plan.projected_mem_bytes,
        **_gpus(plan),
        "seconds": round(_seconds(plan, runs, read, write), 1),
        "tile_bytes": plan.tile_bytes,
        "threads": plan.threads,
        "warnings": list(plan.warnings),
    }


def _gpus(plan: Plan) -> dict[str, Any]:
    if plan.devices is None:
        return {}
    return {
        "device": plan.devices.name,
        "pinned_memory_bytes": plan.pinned_mem_bytes,
        "gpu_memory_bytes": plan.device_mem_bytes,
        "gpu_resident_bytes": plan.devices.resident_bytes,
    }


def _downloads(runs: list[Run]) -> dict[str, int]:
    total, least = needs([run.reads for run in runs])
    return {"download_bytes": total, "least_disk_limit_bytes": least} if total else {}


def _read_bytes(run: Run) -> float:
    passes = 1 if run.method is None else METHOD_PASSES
    return passes * run.elems * sum(operand.read_bytes_per_elem for operand in run.operands)


def _groups(plan: Plan, runs: list[Run]) -> list[dict[str, Any]]:
    tensors: Counter[Treatment] = Counter()
    read: Counter[Treatment] = Counter()
    written: Counter[Treatment] = Counter()
    for run in runs:
        tensors[run.treatment] += len(run.tensors)
        read[run.treatment] += int(_read_bytes(run))
        written[run.treatment] += run.elems * run.out.dtype.itemsize
    return [
        {
            "formula": _formula(plan, treatment),
            "tensors": count,
            "read_bytes": read[treatment],
            "write_bytes": written[treatment],
        }
        for treatment, count in tensors.items()
    ]


def _formula(plan: Plan, treatment: Treatment) -> str:
    """The treatment with its numbers."""
    first, *others = treatment.checkpoints
    names = [plan.names[number] for number in others]
    base = plan.names[first] if first >= 0 else None
    if treatment.method == DIFFERENCE:
        return f"{names[0]} - {base}"
    if treatment.method in JOINED:
        weights = zip(names, treatment.weights, strict=True)
        return " + ".join([str(base), *(f"{w:g}*({n} - {base})" for n, w in weights if w)])
    settings = [f"{key}={value}" for key, value in treatment.settings.shared]
    given = [f"base {base}"] if base else []
    for name, pairs in zip(names, treatment.settings.per_source, strict=True):
        own = ", ".join(f"{key} {value}" for key, value in pairs)
        given.append(f"{name} ({own})" if own else name)
    return f"{treatment.method}({', '.join([*given, *settings])})"


def _seconds(plan: Plan, runs: list[Run], read: float, write: int) -> float:
    """The slower of writing, and of what each thread does in turn: reading and arithmetic."""
    rates = [_sampled_rate(checkpoint) for checkpoint in plan.read_checkpoints.values()]
    seen = [rate for rate in rates if rate]
    reading = read / (sum(seen) / len(seen)) if seen else 0.0
    return max((reading + (read + write) / KERNEL_BYTES_PER_S) / plan.threads,
               write / WRITE_BYTES_PER_S)  # fmt: skip


def _sampled_rate(checkpoint: Checkpoint) -> float | None:
    """Bytes per second of reading from the middle of the largest tensor; None if it is tiny."""
    largest = max(checkpoint.tensors.values(), key=lambda info: info.nbytes, default=None)
    if largest is None or largest.nbytes < SAMPLE_BYTES:
        return None
    buffer = np.empty(SAMPLE_BYTES, np.uint8)
    buffer.fill(0)  # the pages' first touch is not the disk's time
    offset = largest.offset + (largest.nbytes - SAMPLE_BYTES) // 2
    begun = time.perf_counter()
    checkpoint.read_into(largest.file, offset, buffer.data)
    return SAMPLE_BYTES / max(time.perf_counter() - begun, 1e-6)
