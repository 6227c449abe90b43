"""What the products say: warnings, and how straight a training went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from optimer_engine.checkpoint import VECTOR, Checkpoint
from optimer_engine.inspection.measure import Measured, cosines

COINCIDE = 0.99
"""Vectors with a larger cosine are one vector to a merge."""

FULL_RATIO, FULL_COSINE = 0.5, 0.9
"""A delta longer than this share of the base and with this cosine to it is a model, not a delta."""

KIN_COSINE = 0.95
"""A trained model has a larger cosine to its base; even long training keeps it above .99."""


def warnings(
    measured: Measured,
    folders: Sequence[Checkpoint],
    base: Checkpoint | None,
    *,
    one_path: bool = False,
) -> list[str]:
    """One line for each thing that is probably not as meant.

    Args:
        one_path: they are checkpoints of one run, which lie close to each other.
    """
    found = [
        f"{name}: taken from the base {checkpoint.base_fingerprint[:16]}, the base given is"
        f" {base.fingerprint[:16]}"
        for name, checkpoint in zip(measured.names, folders, strict=True)
        if base is not None
        and checkpoint.kind == VECTOR
        and checkpoint.base_fingerprint is not None
        and checkpoint.base_fingerprint != base.fingerprint
    ]
    bases = {c.base_fingerprint for c in folders if c.kind == VECTOR}
    if base is None and len(bases) > 1:
        found.append(f"the vectors come from {len(bases)} different bases")
    found += [
        f"{name}: {count} values are NaN or infinite"
        for name, count in zip(measured.names, measured.nonfinite.sum(axis=0), strict=True)
        if count
    ]
    total = measured.total()
    if measured.has_base:
        found += _base_warnings(measured, total)
    close = measured.cosines()
    for a in range(measured.count):
        if total[a, a] == 0:
            found.append(f"{measured.names[a]}: is 0 everywhere")
        found += [
            f"{measured.names[a]} and {measured.names[b]} nearly coincide: cosine {close[a, b]:.5f}"
            for b in range(a + 1, measured.count)
            if close[a, b] > COINCIDE and not one_path
        ]
    return found


def _base_warnings(measured: Measured, total: np.ndarray) -> list[str]:
    """The tests by norm and cosine against the base."""
    found = []
    base = total[-1, -1]
    for number, name in enumerate(measured.names):
        own, with_base = total[number, number], total[number, -1]
        if not own or not base or not np.isfinite(own):
            continue
        ratio = float(np.sqrt(own / base))
        cosine = with_base / np.sqrt(own * base)
        trained = own + 2 * with_base + base
        kinship = (base + with_base) / np.sqrt(base * trained) if trained > 0 else 0.0
        if ratio > FULL_RATIO and cosine > FULL_COSINE:
            found.append(
                f"{name}: is {ratio:.2f} times as long as the base and points the same way"
                f" (cosine {cosine:.3f}): a full model instead of a vector?"
            )
        elif kinship < KIN_COSINE:
            found.append(
                f"{name}: base + vector has cosine {kinship:.3f} to the base (norm ratio"
                f" {ratio:.2f}): probably trained from another base"
            )
    return found


def trajectory(measured: Measured) -> dict[str, Any]:
    """How straight the path of a training was; the vectors are its checkpoints in order.

    Returns:
        lengths: of each step, the first from the base; turns: cosine between neighbouring steps;
        to_end: cosine of each checkpoint's delta with the last one's; straightness: distance from
        the base to the last checkpoint over the length of the path, 1 for a straight line;
        explained: share of the squared lengths of all deltas that lies along the last one.
    """
    total = measured.total()[: measured.count, : measured.count]
    steps = np.eye(measured.count) - np.eye(measured.count, k=-1)
    moves = steps @ total @ steps.T
    lengths = np.sqrt(np.maximum(np.diagonal(moves), 0.0))
    turns = cosines(moves)
    ends = cosines(total)[:, -1]
    own = np.diagonal(total)
    return {
        "lengths": lengths.tolist(),
        "turns": np.diagonal(turns, 1).tolist(),
        "to_end": ends.tolist(),
        "straightness": float(np.sqrt(own[-1]) / lengths.sum()) if lengths.sum() else 0.0,
        "explained": float((ends**2 * own).sum() / own.sum()) if own.sum() else 0.0,
    }
