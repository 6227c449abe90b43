"""What a run did, as data: report.json beside every output, and the result of every call."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

Digest = tuple[int, int, str]
"""(first byte, byte after the last, xxh3-128 in hex) of a range of a file."""


class Report(msgspec.Struct, kw_only=True):
    """Facts of one run of the engine.

    Attributes:
        operation: the formula that was computed.
        recipe: the recipe, canonical; with `recipe_fingerprint`, its sha256.
        fingerprints: name of each checkpoint read to its fingerprint.
        options: what was asked for beside the recipe and decides the output's bytes.
        origins: of each checkpoint from the Hub its repository, commit and file hashes.
        tensors: number of output tensors.
        kept: for each source of a weighted sum, the share of its delta that the output's grid
            kept (see `kept`), from a sample.
        bytes_read, bytes_written: of tensor data.
        device: where it was merged: "cpu", or the GPUs by name.
        device_mem_bytes: the bound the plan gave for each GPU, but for what stays resident.
        wall_s: seconds from the first tile to the last file in place.
        projected_mem_bytes: the bound the plan gave for the engine's own buffers.
        peak_mem_bytes: largest resident size of the whole process so far, as the system saw it.
        warnings: what was noticed and not refused.
        part: "i/n" for one part of a merge that n runs share, whose last one publishes.
        files: ranges and hashes that cover every file of the output but report.json itself.
        identity: hash of all that decides the output's bytes; equal ones are the same output.
        versions: of this package, Python and the libraries that touched the numbers.
    """

    operation: str
    recipe: dict[str, Any]
    recipe_fingerprint: str
    fingerprints: dict[str, str]
    origins: dict[str, dict[str, Any]] = {}
    out: str | None = None
    options: dict[str, Any] = {}
    part: str | None = None
    tensors: int = 0
    kept: dict[str, float] = {}
    bytes_read: int = 0
    bytes_written: int = 0
    wall_s: float = 0.0
    threads: int = 0
    device: str = "cpu"
    device_mem_bytes: int = 0
    tile_bytes: int = 0
    projected_mem_bytes: int = 0
    peak_mem_bytes: int = 0
    warnings: list[str] = []
    versions: dict[str, str] = {}
    files: dict[str, list[Digest]] = {}
    identity: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return msgspec.to_builtins(self)


def combined(parts: Sequence[Report]) -> Report:
    """One report of all parts of a merge: sums, the slowest part's time, the largest memory."""
    return msgspec.structs.replace(
        parts[0],
        part=None,
        bytes_read=sum(part.bytes_read for part in parts),
        bytes_written=sum(part.bytes_written for part in parts),
        wall_s=max(part.wall_s for part in parts),
        peak_mem_bytes=max(part.peak_mem_bytes for part in parts),
        files={name: digests for part in parts for name, digests in part.files.items()},
    )


def peak_mem_bytes() -> int:
    """Largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: Linux counts the memory of the process that started this one into it.
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of this package, Python and `packages`; absent ones are left out."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for package in ("optimer-engine", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
