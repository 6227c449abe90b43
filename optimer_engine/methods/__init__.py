"""Merge methods: their registry, their protocol, and a way to add one.

A method is defined by passes over tiles and a merge of tiles (`protocol`), so that memory does not
grow with the tensor. Most users want one of these:

    merge_arrays("ties", base, [a, b], {"lambda": 1.0}, [{"weight": 1, "density": .5}] * 2)

merges tensors in memory; `names()` lists the methods and `get(name)` tells about one (its paper,
formula and parameters). A method of one's own is a function with a decorator:

    from optimer_engine.methods import elementwise, per_tensor

    @elementwise("clipped", deltas=True)
    def clipped(base, deltas, *, weight: list[float], limit: float = 1e-3):
        total = sum(w * d for w, d in zip(weight, deltas))
        return np.clip(total, -limit, limit)

    @per_tensor("rank_one", deltas=True, arrays=4)
    def rank_one(base, deltas, *, weight: list[float]):
        total = sum(w * d for w, d in zip(weight, deltas))
        if total.ndim != 2:
            return total
        u, s, v = np.linalg.svd(total, full_matrices=False)
        return s[0] * np.outer(u[:, 0], v[0])

It then has a name in recipes, parameters that are checked, any mixture of input dtypes, stored
deltas, one rounding at the end, and a search for NaN.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from optimer_engine.methods.protocol import (
    GRANULE,
    Fold,
    Memory,
    Method,
    Operand,
    Parameter,
    Pass,
    Tile,
    prepare,
)
from optimer_engine.methods.registry import get, names, register

if TYPE_CHECKING:
    from optimer_engine.methods.function import elementwise, per_tensor
    from optimer_engine.methods.run import merge_arrays

__all__ = [
    "GRANULE",
    "Fold",
    "Memory",
    "Method",
    "Operand",
    "Parameter",
    "Pass",
    "Tile",
    "elementwise",
    "get",
    "merge_arrays",
    "names",
    "per_tensor",
    "prepare",
    "register",
]

_HOME = {"elementwise": "function", "per_tensor": "function", "merge_arrays": "run"}


def __getattr__(name: str) -> object:
    """Loaded on first use: a plan of weighted sums needs none of these."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
