"""What a plan would do, for people: formulas, bytes, memory, disk, and about how long it takes."""

from __future__ import annotations

import time
from pathlib import PurePath
from typing import Any

import numpy as np

from optimer_engine import methods
from optimer_engine.checkpoint import Checkpoint
from optimer_engine.downloads import needs
from optimer_engine.plans import Plan
from optimer_engine.recipe import Recipe
from optimer_engine.runs import DIFFERENCE, JOINED, Run

SAMPLE_BYTES = 4 << 20
"""Read from each input to see how fast its disk, or its cache, is."""
CACHED_BYTES_PER_S = 5e9
"""Of one thread, cautiously: a tensor's later readings follow at once."""
WRITE_BYTES_PER_S = 1e9
"""Synced to a common solid-state disk; the part of the estimate that is not measured."""

LINEAR_NS, OWN_NS = 0.2, 20.0
NS = {
    "ties": 3.0, "breadcrumbs": 3.0, "breadcrumbs_ties": 3.0, "dare_linear": 1.2, "dare_ties": 1.2,
    "della": 4.5, "della_linear": 4.5, "sce": 5.0, "slerp": 1.0, "nuslerp": 1.0, "multislerp": 1.0,
    "karcher": 1.0, "model_stock": 1.0, "nearswap": 1.5, "arcee_fusion": 17.0,
    "linear": LINEAR_NS, "passthrough": LINEAR_NS,
}  # fmt: skip
"""Of one thread of a server's processor for an element of a source, in all readings of bf16, as
measured; a method of a user's own is taken to be slow."""


def facts(plan: Plan) -> dict[str, Any]:
    """What running the plan reads, writes and needs, as plain data.

    Returns:
        formula, groups (tensors treated alike: formula, how many, the first and the last one's
        name, bytes in and out, readings of the inputs at most, memory_bytes of the method beside
        the buffers of all, seconds), models (label to folder), methods (name to formula), tensors,
        files, read_bytes, write_bytes, disk_bytes (free space needed beside the output's folder),
        download_bytes and least_disk_limit_bytes (if something comes from the Hub), memory_bytes
        (the promised bound, beyond interpreter and libraries), with GPUs device,
        pinned_memory_bytes (a part of it), gpu_memory_bytes and gpu_resident_bytes (of each GPU,
        for the run and for what stays), seconds (a rough estimate from a sample of the inputs),
        tile_bytes, threads, warnings.
    """
    runs = plan.runs()
    own = set(plan.own_shards)
    write = sum(shard.size for number, shard in enumerate(plan.shards) if number in own)
    labels = _labels(plan)
    groups = _groups(plan, runs, labels)
    return {
        "formula": groups[0]["formula"] if len(groups) == 1 else f"{len(groups)} groups of tensors",
        "groups": groups,
        "models": {
            label: place
            for label, place, checkpoint in zip(
                labels, _places(plan), plan.checkpoints, strict=True
            )
            if checkpoint is not None
        },
        "methods": {
            name: methods.get(name).formula
            for name in dict.fromkeys(run.treatment.method for run in runs)
            if name not in JOINED
        },
        "tensors": sum(group["tensors"] for group in groups),
        "files": [shard.name for shard in plan.shards],
        "read_bytes": sum(group["read_bytes"] for group in groups),
        "write_bytes": write,
        "disk_bytes": write,
        **_downloads(runs),
        "memory_bytes": plan.projected_mem_bytes,
        **_gpus(plan),
        "seconds": round(max(sum(g["seconds"] for g in groups), write / WRITE_BYTES_PER_S), 1),
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


def _groups(plan: Plan, runs: list[Run], labels: list[str]) -> list[dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    rate = _reading_rate(plan)
    for run in runs:
        notes = sorted({getattr(operand, "note", "") for operand in run.operands} - {""})
        formula = _formula(run, labels) + "".join(f" [{note}]" for note in notes)
        group = groups.setdefault(
            formula,
            {
                "formula": formula,
                "tensors": 0,
                "first": run.tensors[0].name,
                "last": "",
                "read_bytes": 0,
                "write_bytes": 0,
                "readings": 0,
                "memory_bytes": 0,
                "seconds": 0.0,
            },
        )
        readings, memory = 1, 0
        if run.method is not None:
            recipe = run.recipe
            readings, held = run.method.readings(recipe), run.method.memory(recipe)
            memory = held.shared_bytes + plan.threads * held.thread_bytes
        once = run.elems * run.read_bytes_per_elem
        read = int(readings * once)
        group["tensors"] += len(run.tensors)
        group["last"] = run.tensors[-1].name
        group["read_bytes"] += read
        group["write_bytes"] += run.elems * run.out.dtype.itemsize
        group["readings"] = max(group["readings"], readings)
        group["memory_bytes"] = max(group["memory_bytes"], memory)
        worked = 1e-9 * _ns(run) * run.elems * max(1, len(run.sources))
        reading = once / rate + (readings - 1) * once / max(rate, CACHED_BYTES_PER_S)
        group["seconds"] += (worked + reading) / plan.threads
    for group in groups.values():
        group["seconds"] = round(group["seconds"], 2)
    return list(groups.values())


def _ns(run: Run) -> float:
    """Nanoseconds of one thread for an element of a source."""
    return LINEAR_NS if run.method is None else NS.get(run.treatment.method, OWN_NS)


def _labels(plan: Plan) -> list[str]:
    """What each checkpoint is called: the last parts of its paths, where they are its alone."""
    short = ["+".join(PurePath(part).name for part in n.split("+")) for n in plan.names]
    return [s if short.count(s) == 1 else n for s, n in zip(short, plan.names, strict=True)]


def _places(plan: Plan) -> list[str]:
    """Where each checkpoint lies, as the user wrote it."""
    if isinstance(plan.recipe, Recipe):
        return [plan.recipe.base, *(source.model for source in plan.recipe.sources)]
    return list(plan.names)


def _formula(run: Run, labels: list[str]) -> str:
    """What is done to the run's tensors, with its numbers."""
    treatment = run.treatment
    first, *others = treatment.checkpoints
    names = [labels[number] for number in others]
    base = labels[first] if first >= 0 else None
    if not run.sources and treatment.method in JOINED:
        return f"{base}, unchanged"
    if treatment.method == DIFFERENCE:
        return f"{names[0]} - {base}"
    if treatment.method in JOINED:
        weights = zip(names, treatment.weights, strict=True)
        moved = [
            f" {'+' if w > 0 else '-'} {abs(w):g}*({n} - {base})"
            for n, w in weights
            if w and n != base
        ]
        return f"{base}{''.join(moved)}"
    parameters = methods.get(treatment.method).parameters
    given = [str(base)] if base else []
    for name, pairs in zip(names, treatment.settings.per_source, strict=True):
        own = [f"{key} {_number(value)}" for key, value in pairs if key != "stream"]
        given.append(f"{name} {{{', '.join(own)}}}" if own else name)
    settings = [
        f"{key} {_number(value)}"
        for key, value in treatment.settings.shared
        if value != (parameters[key].default if key in parameters else "paper")
    ]
    return f"{treatment.method}({', '.join([*given, *settings])})"


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _reading_rate(plan: Plan) -> float:
    """Bytes per second of one thread, the mean over the inputs that are large enough to tell."""
    rates = [_sampled_rate(checkpoint) for checkpoint in plan.read_checkpoints.values()]
    seen = [rate for rate in rates if rate]
    return sum(seen) / len(seen) if seen else float("inf")


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
