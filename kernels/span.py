"""Merges whose weights depend on the inputs' products, on the CPU.

Spherical interpolation, Karcher means and Model Stock move within the span of their inputs. The
products of all pairs of inputs, per tensor, per row or per column, give the weights in closed form
or by an iteration on a few numbers; the result is then a weighted sum. Products are summed in fp64,
in a fixed order within a fixed block. Weights that hold for the whole tensor go to the linear
kernel; `combine` takes those that differ from row to row or from column to column.

Without a base (None) the values are the sources' own; with `from_base` they are deltas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .conversion import conversions
from .native import compiled
from .reference_methods import BLOCK
from .sparse import address, call


@dataclass(frozen=True, slots=True)
class Operands:
    """The operands of a tile: elements from `start` of the tensor on.

    Attributes:
        base: None where there is none; sources that are stored deltas and `from_base` need it.
        base, sources: 1-D, contiguous, equal length, in the storage dtypes of their codes.
        wide: whether to compute in fp64; see `reference.accumulates_in_fp64`.
        from_base: whether a source's values are its deltas.
    """

    base: np.ndarray | None
    base_code: int
    sources: Sequence[np.ndarray]
    codes: Sequence[int]
    is_delta: Sequence[bool]
    start: int
    wide: bool
    from_base: bool


def _arguments(operands: Operands, out: np.ndarray | None = None, out_code: int = 0) -> list[Any]:
    """What `_opened` takes apart: arrays, passed by address, and integers."""
    n = len(operands.sources)
    dtype = np.float64 if operands.wide else np.float32
    base = 0 if operands.base is None else address(operands.base)
    written = 0 if out is None else address(out)
    return [
        n, operands.from_base, operands.start, operands.sources[0].shape[0],
        np.array([base, *(address(a) for a in operands.sources), written], np.int64),
        conversions((operands.base_code, *operands.codes, out_code), operands.wide),
        np.array(operands.is_delta, np.int64),
        np.empty(BLOCK, dtype), np.empty((n, BLOCK), dtype),
    ]  # fmt: skip


def _opened() -> Any:
    """A jitted function that undoes `_arguments`."""
    from .blocks import loop
    from .elements import array

    @loop
    def opened(p, dtype):
        n = p[0]
        return (
            array(p[4], np.int64, (n + 2,)), array(p[5], np.int64, (n + 2, 2)),
            array(p[6], np.int64, (n,)), array(p[7], dtype, (BLOCK,)),
            array(p[8], dtype, (n, BLOCK)),
        )  # fmt: skip

    return opened


@compiled("void(int64)")
def _products(wide: bool) -> Any:
    from .elements import array
    from .span_loops import products

    opened, dtype = _opened(), np.float64 if wide else np.float32

    def function(arguments):  # type: ignore[no-untyped-def]
        p = array(arguments, np.int64, (13,))
        addresses, forms, is_delta, base, values = opened(p, dtype)
        n = p[0]
        products(
            addresses, forms, is_delta, p[1], p[2], p[3], p[9], base, values,
            array(p[10], np.float64, (n, n, BLOCK)), array(p[11], np.float64, (p[12], n, n)),
        )  # fmt: skip

    return function


def products(operands: Operands, block_elems: int, out: np.ndarray) -> None:
    """out[block, a, b] = sum over each block of value_a * value_b, for a <= b.

    Args:
        block_elems: length of a block, a granule or a row; a tile holds whole ones.
        out: (blocks of the tensor, sources, sources) fp64.
    """
    n = len(operands.sources)
    arguments = _arguments(operands)
    arguments += [block_elems, np.empty((n, n, BLOCK)), out, out.shape[0]]
    call(_products(operands.wide), arguments)


@compiled("void(int64)")
def _column_products(wide: bool) -> Any:
    from .elements import array
    from .span_loops import column_products

    opened, dtype = _opened(), np.float64 if wide else np.float32

    def function(arguments):  # type: ignore[no-untyped-def]
        p = array(arguments, np.int64, (11,))
        addresses, forms, is_delta, base, values = opened(p, dtype)
        out = array(p[10], np.float64, (p[0], p[0], p[9]))
        column_products(addresses, forms, is_delta, p[1], p[3], p[9], base, values, out)

    return function


def column_products(operands: Operands, row: int, out: np.ndarray) -> None:
    """out[a, b, column] += sum over the tile's rows of value_a * value_b, for a <= b.

    Args:
        row: length of a row; a tile holds whole ones.
        out: (sources, sources, row) fp64.
    """
    call(_column_products(operands.wide), [*_arguments(operands), row, out])


@compiled("boolean(int64)")
def _combine(wide: bool) -> Any:
    from .elements import array
    from .span_loops import combine

    opened, dtype = _opened(), np.float64 if wide else np.float32

    def function(arguments):  # type: ignore[no-untyped-def]
        p = array(arguments, np.int64, (14,))
        addresses, forms, is_delta, base, values = opened(p, dtype)
        weights = array(p[11], np.float64, (p[0] + 1, p[12]))
        return combine(
            addresses, forms, is_delta, p[1], p[2], p[3], p[9], p[10], weights, base, values,
            array(p[13], dtype, (2, BLOCK)),
        )  # fmt: skip

    return function


def combine(
    operands: Operands, row: int, by_column: bool, weights: np.ndarray, out: np.ndarray,
    out_code: int,
) -> bool:  # fmt: skip
    """out = round(base + sum_i w_i delta_i) where `from_base`, else round(sum_i w_i theta_i).

    The latter is taken as theta_0 + sum_i w_i (theta_i - theta_0) + (sum w - 1) theta_0, so that
    inputs which are equal stay equal to the bit where the weights sum to 1.

    Args:
        row: length of a row; a tile holds whole ones.
        weights: (sources, rows of the tensor) fp64, or (sources, row) where `by_column`.

    Returns:
        True when an output is NaN or infinite.
    """
    weights = np.ascontiguousarray(np.vstack([weights, weights.sum(0) - 1]))
    scratch = np.empty((2, BLOCK), np.float64 if operands.wide else np.float32)
    arguments = _arguments(operands, out, out_code)
    arguments += [row, by_column, weights, weights.shape[1], scratch]
    return bool(call(_combine(operands.wide), arguments))


@compiled("void(int64)")
def _divergence(wide: bool) -> Any:
    from .elements import array
    from .span_loops import divergence

    opened, dtype = _opened(), np.float64 if wide else np.float32

    def function(arguments):  # type: ignore[no-untyped-def]
        p = array(arguments, np.int64, (14,))
        addresses, forms, is_delta, base, values = opened(p, dtype)
        divergence(
            addresses, forms, is_delta, p[2], p[3], p[9], array(p[10], np.float64, (1,))[0], base,
            values, array(p[11], np.float64, (2, BLOCK)), array(p[12], np.float64, (p[13],)),
        )  # fmt: skip

    return function


def divergence(operands: Operands, row: int, eps: float, out: np.ndarray) -> None:
    """out[row] = sum over a row of (p + eps) log((p + eps) / (q + eps)), at least 0.

    p is the softmax of the first source's row, q of the base's, in fp64.

    Args:
        row: length of a row; a tile holds whole ones.
        out: (rows of the tensor,) fp64.
    """
    arguments = [*_arguments(operands), row, np.array([eps]), np.empty((2, BLOCK))]
    arguments += [out, out.shape[0]]
    call(_divergence(operands.wide), arguments)
