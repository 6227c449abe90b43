"""Lengths and angles of distribution vectors, one tensor at a time.

Merging works where vectors are short beside the base (the loss is then nearly linear along them)
and nearly orthogonal to each other (then none undoes another). Both are read off the Gram matrix
G_ij = <tau_i, tau_j>, which is a sum over tensors: it needs one tensor of each vector in memory and
never a whole vector. Products are accumulated in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np

from optimer_engine.checkpoint import Checkpoint
from optimer_engine.errors import MismatchError
from optimer_engine.ops import as_torch


class Geometry(msgspec.Struct, frozen=True):
    """Attributes: norm of each vector over that of the base, and the cosine of each pair."""

    names: list[str]
    relative_norms: list[float]
    cosines: list[list[float]]


def geometry(base: str | Path, vectors: Mapping[str, str | Path]) -> Geometry:
    """Relative norms and cosines of distribution vectors (folders that `extract` wrote).

    Tied and absent tensors count once, as they are stored.

    Raises:
        CheckpointError: a folder cannot be read.
        MismatchError: a vector lacks a tensor that the first one has, or has it in another shape.
    """
    opened = {name: Checkpoint.open(folder) for name, folder in vectors.items()}
    first = next(iter(opened.values()))
    gram = np.zeros((len(opened), len(opened)))
    with Checkpoint.open(base) as start:
        base_square = sum(
            float(np.square(_flat(start, name)).sum())
            for name, info in start.tensors.items()
            if info.dtype.mergeable
        )
    for tensor, info in first.tensors.items():
        for checkpoint in opened.values():
            found = checkpoint.tensors.get(tensor)
            if found is None or found.shape != info.shape:
                shape = "absent" if found is None else found.shape
                raise MismatchError(
                    f"{tensor}: {shape}, expected {info.shape}",
                    where=str(checkpoint.folder),
                    todo="compare vectors of one base",
                )
        rows = np.stack([_flat(checkpoint, tensor) for checkpoint in opened.values()])
        gram += rows @ rows.T
    for checkpoint in opened.values():
        checkpoint.close()
    norms = np.sqrt(np.diag(gram))
    scale = np.where(norms > 0, norms, 1.0)
    return Geometry(
        names=list(opened),
        relative_norms=[float(n) for n in norms / base_square**0.5],
        cosines=(gram / np.outer(scale, scale)).tolist(),
    )


def _flat(checkpoint: Checkpoint, name: str) -> np.ndarray:
    info = checkpoint.tensors[name]
    values = as_torch(checkpoint.view(name).reshape(-1).copy(), info.dtype)
    return values.double().numpy()
