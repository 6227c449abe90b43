"""The registry: every case by name. A case module has `case`, `DEFAULT_BYTES` and `RIVALS`."""

from __future__ import annotations

from benchmarks import inspection, kernel, memory, merge, methods, overhead, startup, vectors

CASES = {
    "inspect": inspection,
    "kernel": kernel,
    "memory": memory,
    "merge": merge,
    "methods": methods,
    "overhead": overhead,
    "startup": startup,
    "vectors": vectors,
}
