"""Statistics of several vectors over one stretch of elements: the specification, in numpy.

products[a, b] = sum over the elements of x_a * x_b in fp64, for every pair; zeros[a] and
nonfinite[a] count. From the products come norms, cosines and every linear combination's norm.
"""

from __future__ import annotations

import numpy as np


def moments(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(products, zeros, nonfinite) of `vectors`, fp32 of shape (count, elems).

    Returns:
        products: fp64 (count, count), symmetric. zeros, nonfinite: int64 (count,).
    """
    wide = vectors.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        products = wide @ wide.T
    zeros = (vectors == 0).sum(axis=1, dtype=np.int64)
    return products, zeros, (~np.isfinite(vectors)).sum(axis=1, dtype=np.int64)
