"""How many directions a delta's matrices really use.

The effective rank of a matrix is exp(H), H being the entropy of its singular values divided by
their sum (Roy and Vetterli, EUSIPCO 2007). Singular values come from the product of the matrix with
its own transpose, on the shorter side, gathered from blocks of rows in fp64: memory is that product
and two blocks, never the matrix.
"""

from __future__ import annotations

import numpy as np

from optimer_engine.inspection.measure import Pool

BLOCK_BYTES = 32 << 20


def effective_ranks(pool: Pool) -> dict[str, list[float | None]]:
    """Per matrix (both sides longer than 1), the effective rank of each vector; None where it is 0
    or not finite."""
    alone = [pool.only(number) for number in range(len(pool.names))]
    return {
        name: [_effective(_gram(one, row, shape)) for one in alone]
        for row, (name, shape, *_) in enumerate(pool.rows)
        if len(shape) == 2 and min(shape) > 1
    }


def _effective(gram: np.ndarray) -> float | None:
    if not np.isfinite(gram).all() or not gram.any():
        return None
    sizes = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0.0))
    shares = sizes[sizes > 0] / sizes.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _gram(pool: Pool, row: int, shape: tuple[int, ...]) -> np.ndarray:
    """tau tau' or tau' tau of the pool's one vector, whichever is smaller."""
    rows, columns = shape
    step = max(1, BLOCK_BYTES // (8 * columns))

    def block(first: int) -> np.ndarray:
        last = min(first + step, rows)
        return _delta(pool, row, first * columns, last * columns).reshape(-1, columns)

    if columns <= rows:
        gram = np.zeros((columns, columns))
        for first in range(0, rows, step):
            part = block(first)
            gram += part.T @ part
        return gram
    gram = np.zeros((rows, rows))
    for first in range(0, rows, step):
        left = block(first)
        for second in range(first, rows, step):
            right = left if second == first else block(second)
            gram[first : first + len(left), second : second + len(right)] = left @ right.T
    return np.triu(gram) + np.triu(gram, 1).T


def _delta(pool: Pool, row: int, start: int, stop: int) -> np.ndarray:
    """Elements of the one vector's delta, in fp64."""
    count = stop - start
    rows = np.zeros((2, count), np.float32)
    pool.deltas(row, start, stop, rows, [np.zeros(count * 8, np.uint8) for _ in range(2)])
    return rows[0].astype(np.float64)
