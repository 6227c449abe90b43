"""One shape for every result: written as JSON, printed as a table, pasted into README from JSON."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.accuracy import Accuracy
from benchmarks.measure import Cost

LIBRARIES = ("optimer-engine", "numpy", "numba", "safetensors", "torch")


class Spread(msgspec.Struct):
    """The median of the rounds, with the 20th and 80th percentiles."""

    p50: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Of at least one value."""
        return cls(*(float(v) for v in np.percentile(values, (50, 20, 80))))


class Row(msgspec.Struct):
    """One contestant.

    Attributes:
        name: what ran.
        kind: "ours", "rival" or "ceiling".
        moved_bytes: read plus written, by the least that the task needs.
        rounds: what each round cost, in order.
        wall_s: of the rounds.
        gb_per_s: moved_bytes over the median wall time.
        compared_to: name of the row by which `ratio` divides.
        ratio: wall time over the other's in the same round.
        accuracy: of its output; None where nothing is written.
    """

    name: str
    kind: str
    moved_bytes: int
    rounds: list[Cost]
    wall_s: Spread
    gb_per_s: float
    compared_to: str | None = None
    ratio: Spread | None = None
    accuracy: Accuracy | None = None

    def most(self, measure: str) -> int | None:
        """The largest `peak_..._bytes` of all rounds."""
        values = [getattr(cost, measure) for cost in self.rounds]
        return None if None in values else max(values)

    @property
    def cpu_s(self) -> float | None:
        """The median of the processor time."""
        values = [cost.cpu_s for cost in self.rounds if cost.cpu_s is not None]
        return statistics.median(values) if values else None


class Record(msgspec.Struct):
    """One run of one case.

    Attributes:
        case, command: what was run, and how to run it again.
        parameters: sizes and options.
        machine, versions: where and with what.
        load_average: of the machine over the minute before the first and after the last round;
            the benchmark's own work is part of the second.
    """

    case: str
    command: str
    date: str
    parameters: dict[str, int | float | str | bool | list[float]]
    machine: dict[str, str | int | float]
    versions: dict[str, str]
    load_average: list[float]
    rows: list[Row]

    def to_json(self, indent: bool = False) -> str:
        """The record as JSON, on one line unless `indent`."""
        line = msgspec.json.encode(self)
        return (msgspec.json.format(line, indent=1) if indent else line).decode()

    @classmethod
    def load(cls, path: Path) -> Record:
        """A record from its JSON file."""
        return msgspec.json.decode(path.read_bytes(), type=cls)


def machine_card() -> dict[str, str | int | float]:
    """What a reader needs to judge the numbers; nothing that names the machine or its user."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
    }


def library_versions(**more: str) -> dict[str, str]:
    """Versions of what took part."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            print(f"{library} is not installed", file=sys.stderr)
    return found | more


def table(record: Record) -> str:
    """The record as a Markdown table."""
    lines = [
        "| | wall s, p50 (p20–p80) | GB/s | CPU s | peak resident | anonymous | file-backed"
        " | misrounded | time ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record.rows:
        wall, accuracy = row.wall_s, row.accuracy
        ratio = ""
        if row.ratio is not None:
            ratio = f"{row.ratio.p50:.2f} × {row.compared_to}"
        cells = [
            f"**{row.name}**" if row.kind == "ours" else row.name,
            f"{wall.p50:.2f} ({wall.p20:.2f}–{wall.p80:.2f})",
            f"{row.gb_per_s:.2f}",
            "" if row.cpu_s is None else f"{row.cpu_s:.2f}",
            *(_megabytes(row.most(f"peak_{part}_bytes")) for part in ("rss", "anon", "file")),
            "" if accuracy is None else f"{accuracy.misrounded_share:.3%}",
            ratio,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(record: Record) -> str:
    """Table with what it takes to read it: case, machine, load, command."""
    card, load = record.machine, record.load_average
    libraries = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    parameters = ", ".join(f"{key} {value}" for key, value in record.parameters.items())
    return (
        f"{table(record)}\n\n"
        f"{record.case}: {parameters}. {record.date}, {card['cpu']}, {card['cores']} cores,"
        f" {card['memory_gib']} GiB, {card['system']}, Python {card['python']}, {libraries}."
        f" Load average {load[0]:.1f} before, {load[1]:.1f} after.\n\n"
        f"    {record.command}"
    )


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.0f} MB"
