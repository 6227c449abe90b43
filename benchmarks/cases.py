"""The registry: every case by name. A case module has `case`, `DEFAULT_BYTES` and `RIVALS`."""

from __future__ import annotations

from benchmarks import kernel, merge

CASES = {"kernel": kernel, "merge": merge}
