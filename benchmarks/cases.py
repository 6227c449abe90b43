"""The registry: every case by name. A case module has `case`, `DEFAULT_BYTES` and `RIVALS`."""

from __future__ import annotations

from benchmarks import kernel, memory, merge, methods, startup, vectors

CASES = {
    "kernel": kernel,
    "memory": memory,
    "merge": merge,
    "methods": methods,
    "startup": startup,
    "vectors": vectors,
}
