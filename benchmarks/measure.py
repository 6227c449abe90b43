"""What a program or a function costs, and the state of the page cache before it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

LAUNCHER = Path(__file__).with_name("launch.py")
READ_BYTES = 1 << 20


class Cost(msgspec.Struct):
    """One execution. Memory is known of whole processes only."""

    wall_s: float
    cpu_s: float | None = None
    peak_rss_bytes: int | None = None
    peak_anon_bytes: int | None = None
    peak_file_bytes: int | None = None


def of_process(program: Sequence[str | Path], log: Path) -> Cost:
    """Run a program to its end as a whole process; its output goes to `log`.

    Raises:
        RuntimeError: when it fails, with the last lines of its output.
    """
    arguments = [sys.executable, "-I", "-S", str(LAUNCHER), str(log), *map(str, program)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled once
    done = subprocess.run(arguments, stdout=subprocess.PIPE, check=True, env=environment)
    cost = json.loads(done.stdout)
    if code := cost.pop("exit_code"):
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{Path(program[0]).name} ended with {code}:\n{tail}")
    return Cost(**cost)


def of_call(function: Callable[[], object]) -> Cost:
    """Call a function in this process."""
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def warm(files: Iterable[Path]) -> None:
    """Bring files into the page cache by reading them."""
    buffer = bytearray(READ_BYTES)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def evict(files: Iterable[Path]) -> None:
    """Drop files from the page cache; pages that someone has mapped stay."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # only clean pages can be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
