"""Tiles as the kernels take them, and the passes that kernels make over them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from optimer_engine.kernels import cpu, span, sparse
from optimer_engine.kernels.reference import accumulates_in_fp64
from optimer_engine.methods.protocol import GRANULE, Fold, Operand, Tile, elems
from optimer_engine.tensor_recipe import TensorRecipe
from optimer_engine.types import DType

CODE = {
    dtype: code
    for code, dtype in enumerate(
        (DType.BF16, DType.F16, DType.F32, DType.F64, DType.F8_E4M3, DType.F8_E5M2)
    )
}
"""The kernels' number of each dtype."""


def blocks(recipe: TensorRecipe, block_elems: int = GRANULE) -> int:
    """Number of blocks of a tensor."""
    return -(-elems(recipe.shape) // block_elems)


def inputs(tile: Tile) -> sparse.Inputs:
    """A tile with a base, for the kernels of sparse merges."""
    assert tile.base is not None
    return sparse.Inputs.of(
        tile.base.data,
        CODE[tile.base.dtype],
        [source.data for source in tile.sources],
        [CODE[source.dtype] for source in tile.sources],
        [source.is_delta for source in tile.sources],
        tile.start,
        CODE[tile.recipe.dtype],
    )


def kernels_for(tile: Tile) -> Any:
    """`kernels.sparse`, or its like for tiles in a GPU's memory."""
    assert tile.base is not None
    if isinstance(tile.base.data, np.ndarray):
        return sparse
    from optimer_engine.kernels import gpu_sparse

    return gpu_sparse


def operands(tile: Tile, from_base: bool, base_is_source: bool = False) -> span.Operands:
    """A tile for the kernels of sums within the span of the inputs; see `span.Operands`."""
    sources = tile.sources
    if base_is_source and tile.base is not None:
        sources = (tile.base, *sources)
    codes = [CODE[source.dtype] for source in sources]
    base_code = CODE[tile.base.dtype] if tile.base else codes[0]
    return span.Operands(
        tile.base.data if tile.base else None,
        base_code,
        [source.data for source in sources],
        codes,
        [source.is_delta for source in sources],
        tile.start,
        accumulates_in_fp64(base_code, codes, CODE[tile.recipe.dtype]),
        from_base,
    )


def merge_fold(tile: Tile, fold: Fold, out: np.ndarray) -> bool:
    """Write a weighted sum with the fused linear kernel; True if an output is not finite."""
    sources = list(zip(tile.sources, fold.weights, strict=True))
    if fold.anchor_is_base:
        assert tile.base is not None
        anchor = tile.base
    else:
        anchor, sources = tile.sources[0], sources[1:]
    kept = [(source, weight) for source, weight in sources if weight != 0]
    if fold.scale != 1:
        kept.append((Operand(anchor.data, anchor.dtype, True), fold.scale - 1))
    linear: Any = cpu.linear
    if not isinstance(anchor.data, np.ndarray):
        from optimer_engine.kernels import gpu

        linear = gpu.linear
    return linear(  # type: ignore[no-any-return]
        anchor.data,
        CODE[anchor.dtype],
        [source.data for source, _ in kept],
        [CODE[source.dtype] for source, _ in kept],
        [source.is_delta for source, _ in kept],
        [weight for _, weight in kept],
        out,
        CODE[tile.recipe.dtype],
        True,
    )


class Norms:
    """For every source: sum |delta|, sum |masked delta|, sum masked delta**2.

    The result has shape (sources, 3), fp64, exactly rounded from the sums of blocks.
    """

    def __init__(self, recipe: TensorRecipe, masks: sparse.Masks, block_elems: int) -> None:
        self.masks, self.block_elems = masks, block_elems
        self.sums = np.zeros((blocks(recipe, block_elems), len(recipe.sources), 3))

    def start(self) -> Any:
        """Nothing: every block has its own place."""
        return None

    def map(self, tile: Tile, accumulator: Any) -> None:
        """Measure the tile's blocks."""
        kernels_for(tile).norms(inputs(tile), self.masks, self.block_elems, self.sums)

    def finish(self, accumulators: list[Any]) -> np.ndarray:
        """The totals."""
        return exact_sum(self.sums)


class Products:
    """Products of all pairs of sources: (sources, sources) fp64, or (rows, ...) by row."""

    def __init__(
        self, recipe: TensorRecipe, from_base: bool, base_is_source: bool, row: int | None
    ) -> None:
        self.from_base, self.base_is_source = from_base, base_is_source
        self.block_elems, self.by_row = row or GRANULE, row is not None
        count = len(recipe.sources) + (base_is_source and recipe.base is not None)
        self.products = np.zeros((blocks(recipe, self.block_elems), count, count))

    def start(self) -> Any:
        """Nothing: every block has its own place."""
        return None

    def map(self, tile: Tile, accumulator: Any) -> None:
        """Multiply the tile's blocks."""
        given = operands(tile, self.from_base, self.base_is_source)
        span.products(given, self.block_elems, self.products)

    def finish(self, accumulators: list[Any]) -> np.ndarray:
        """The products as symmetric matrices."""
        return symmetric(self.products if self.by_row else exact_sum(self.products))


def exact_sum(parts: np.ndarray) -> np.ndarray:
    """The sum over the first axis, as if taken exactly and rounded once: no order matters."""
    flat = parts.reshape(len(parts), math.prod(parts.shape[1:]))
    sums = [_fsum(flat[:, k].tolist()) for k in range(flat.shape[1])]
    return np.array(sums).reshape(parts.shape[1:])


def _fsum(values: list[float]) -> float:
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # infinities of both signs, or beyond fp64
        return math.nan


def symmetric(upper: np.ndarray) -> np.ndarray:
    """Matrices (..., n, n) of which the upper triangle is given."""
    strict = np.triu(upper, 1)
    return np.triu(upper) + np.swapaxes(strict, -1, -2)
