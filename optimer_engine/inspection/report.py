"""What was found as plain data, and as text."""

from __future__ import annotations

from typing import Any

import numpy as np

from optimer_engine.inspection.measure import Measured
from optimer_engine.types import format_bytes

MAX_ROWS = 40
"""Rows of a table for people; `--json` has them all."""


def as_data(measured: Measured) -> dict[str, Any]:
    """Norms, cosines and unchanged shares: of the whole, per layer, per module type, per tensor.

    Cosines are matrices in the order of "names"; null where a vector is 0 there. "norm_ratio" is a
    norm over the base's own.
    """
    found: dict[str, Any] = {
        "names": measured.names,
        "unchanged": measured.unchanged_share().tolist(),
        "nonfinite": measured.nonfinite.sum(axis=0).tolist(),
        "whole": _group(measured, None),
    }
    for label, groups in measured.groups.items():
        found[label] = {key: _group(measured, among) for key, among in groups.items()}
    found["tensors"] = {
        name: {
            **_group(measured, [number]),
            "unchanged": (measured.unchanged[number] / max(1, measured.elems[number])).tolist(),
        }
        for number, name in enumerate(measured.tensors)
    }
    return found


def _group(measured: Measured, among: list[int] | None) -> dict[str, Any]:
    total = measured.total(among)
    group: dict[str, Any] = {
        "norms": _numbers(measured.norms(among)),
        "cosines": [_numbers(row) for row in measured.cosines(among)],
    }
    if measured.has_base and total[-1, -1] > 0:
        group["norm_ratio"] = _numbers(measured.norms(among) / np.sqrt(total[-1, -1]))
    return group


def _numbers(values: np.ndarray) -> list[float | None]:
    """As JSON has them: null for what is not finite."""
    return [float(value) if np.isfinite(value) else None for value in values]


def summary_text(facts: dict[str, Any]) -> str:
    """The headers of one folder."""
    dtypes = ", ".join(
        f"{code} {counted['parameters']:,} in {counted['tensors']} tensors"
        for code, counted in facts["dtypes"].items()
    )
    lines = [
        f"{facts['folder']}: {facts['kind']}"
        + (f", mode {facts['mode']}" if "mode" in facts else "")
        + "".join(f", {value}" for value in [facts["config"].get("model_type")] if value),
        f"  {facts['parameters']:,} parameters in {facts['tensors']} tensors,"
        f" {facts['layers']} layers; {format_bytes(facts['bytes'])} in {facts['files']} files",
        f"  {dtypes}",
        "  largest: " + ", ".join(f"{name} {shape}" for name, shape in facts["largest"]),
        f"  fingerprint {facts['fingerprint'][:16]}"
        + (f", base {str(facts['base_fingerprint'])[:16]}" if "base_fingerprint" in facts else ""),
    ]
    return "\n".join(lines)


def table(data: dict[str, Any]) -> str:
    """Everything as text: the whole, cosines, module types, layers, what was asked for beside."""
    names, whole = data["names"], data["whole"]
    ratios = whole.get("norm_ratio", [None] * len(names))
    rows = [["vector", "norm", "norm/base", "unchanged"]]
    rows += [
        [name, _shown(norm), _shown(ratio), f"{unchanged:.1%}"]
        for name, norm, ratio, unchanged in zip(
            names, whole["norms"], ratios, data["unchanged"], strict=True
        )
    ]
    parts = [_aligned(rows)]
    if len(names) > 1:
        rows = [["cosine", *names]]
        rows += [
            [name, *map(_shown, row)] for name, row in zip(names, whole["cosines"], strict=True)
        ]
        parts.append(_aligned(rows))
    for label, title in (("modules", "module"), ("layers", "layer")):
        parts.append(_groups(title, data[label], names))
    if "ranks" in data:
        rows = [["effective rank", *names]]
        rows += [[name, *map(_shown, found)] for name, found in data["ranks"].items()]
        parts.append(_aligned(_cut(rows)))
    if "trajectory" in data:
        parts.append(_path(data["trajectory"], names))
    return "\n\n".join(parts)


def _groups(title: str, groups: dict[str, Any], names: list[str]) -> str:
    """Norms, relative to the base's where known, and the mean cosine between vectors."""
    relative = all("norm_ratio" in group for group in groups.values())
    heading = [f"{title}, {'norm/base' if relative else 'norm'}", *names]
    rows = [heading + (["mean cosine"] if len(names) > 1 else [])]
    in_order = sorted(groups.items(), key=lambda item: int(item[0]) if item[0].isdigit() else -1)
    for key, group in in_order:
        row = [key, *map(_shown, group["norm_ratio" if relative else "norms"])]
        if len(names) > 1:
            pairs = [
                c
                for a, cosines in enumerate(group["cosines"])
                for c in cosines[a + 1 :]
                if c is not None
            ]
            row.append(_shown(sum(pairs) / len(pairs) if pairs else None))
        rows.append(row)
    return _aligned(_cut(rows))


def _path(path: dict[str, Any], names: list[str]) -> str:
    turns = ["-", *map(_shown, path["turns"])]
    rows = [["checkpoint", "step length", "cosine to step before", "cosine to end"]]
    rows += [
        [name, _shown(length), turn, _shown(to_end)]
        for name, length, turn, to_end in zip(
            names, path["lengths"], turns, path["to_end"], strict=True
        )
    ]
    return (
        f"{_aligned(rows)}\nstraightness {path['straightness']:.3f} (1: a straight line);"
        f" {path['explained']:.1%} of the deltas' squared length lies along the last one"
    )


def _cut(rows: list[list[str]]) -> list[list[str]]:
    if len(rows) <= MAX_ROWS + 1:
        return rows
    left = len(rows) - MAX_ROWS - 1
    return [*rows[: MAX_ROWS + 1], [f"… {left} more, see --json", *[""] * (len(rows[0]) - 1)]]


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )


def _shown(value: float | None) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{value:.4g}"
