"""Matrices as a product of two thin ones: tau = scale * b @ a.

A LoRA adapter brings its factors and they are kept. Any other delta is factored by a randomised
range finder with power iterations (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4): each
iteration is a pass over the rows of tau, in tiles, so that what is held is (rows + columns) x rank
numbers and never the matrix. With a tolerance the rank doubles until the error is small enough, or
until the factors would cost more than half of the bf16 matrix: such a delta has no low rank, and is
stored whole.
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
import zlib
from pathlib import Path

import numpy as np

from optimer_engine.adapter import LowRank, Matrix
from optimer_engine.kernels.reference import round_to
from optimer_engine.packing.encode import (
    TILE_ELEMS,
    Encoder,
    File,
    Hands,
    Pair,
    Placed,
    Zero,
)
from optimer_engine.types import DType
from optimer_engine.vectors.format import CODES, Description, part_name

MIN_SIDE = 32
"""A matrix with a shorter side is not worth factoring."""

OVERSAMPLING, POWER_ITERATIONS = 8, 2
FIRST_RANK = 16
MIN_TOLERANCE = 0.001
"""The error is a difference of two fp32 sums of squares, which cannot tell smaller ones from 0."""

FINE_TOLERANCE = 0.02
"""Below this, factors are kept in fp32: rounding them to bf16 alone costs up to 0.4 %."""


class Spill:
    """Factors that wait on disk for their turn, in a file without a name; a context manager.

    Args:
        folder: on whose disk; None for the system's temporary one.
    """

    def __init__(self, folder: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._end, self._lock = 0, threading.Lock()

    def put(self, data: bytes) -> int:
        """Keep `data`; returns where."""
        with self._lock:
            begin = self._end
            self._end += len(data)
        left = memoryview(data)
        while left:
            left = left[os.pwrite(self._file.fileno(), left, begin + len(data) - len(left)) :]
        return begin

    def get(self, begin: int, size: int) -> np.ndarray:
        """`size` bytes that were put at `begin`."""
        data = bytearray(size)
        left = memoryview(data)
        while left:
            left = left[os.preadv(self._file.fileno(), [left], begin + size - len(left)) :]
        return np.frombuffer(data, np.uint8)

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class Factors(Encoder):
    """An encoder of two factors that are there already.

    Args:
        a, b: what gives their bytes, with dtype and shape.
    """

    stores = True

    def __init__(self, pair: Pair, scale: float, a: _Factor, b: _Factor) -> None:
        super().__init__(pair)
        self._parts = (a, b)
        self.tiles = [(0, pair.elems)]
        self.description = Description("lowrank", pair.shape, scale=scale)
        whole = all(part.size % 8 == 0 for part in self._parts)
        self.unit = 8 if whole else min(part.dtype.itemsize for part in self._parts)

    def encode(self, start: int, stop: int, hands: Hands) -> list[np.ndarray]:
        """Both factors' bytes."""
        return [part.bytes() for part in self._parts]

    def place(self, file: File, start: int, pieces: list[np.ndarray]) -> Placed:
        """One behind the other."""
        names = [part_name(self.pair.name, part) for part in "ab"]
        return [
            (file.layout.add(name, part.dtype, part.shape), piece)
            for name, part, piece in zip(names, self._parts, pieces, strict=True)
        ]


class _Factor:
    """A stored matrix: an array, or its place in a Spill."""

    def __init__(
        self, dtype: DType, shape: tuple[int, ...], held: Matrix | np.ndarray | tuple[Spill, int]
    ) -> None:
        self.dtype, self.shape, self._held = dtype, shape, held
        self.size = math.prod(shape) * dtype.itemsize

    def bytes(self) -> np.ndarray:
        if not isinstance(self._held, tuple):
            return np.ascontiguousarray(self._held).reshape(-1).view(np.uint8)
        spill, begin = self._held
        return spill.get(begin, self.size)


def native(pair: Pair) -> Factors | None:
    """A LoRA adapter's own factors."""
    source = pair.source
    if not isinstance(source, LowRank):
        return None
    left, right = source.left, source.right.stored
    return Factors(
        pair,
        source.scale,
        _Factor(source.right.dtype, right.shape, right),
        _Factor(source.left_dtype, left.shape, left),
    )


def factored(
    pair: Pair, rank: int | None, tolerance: float | None, seed: int, spill: Spill
) -> Encoder | None:
    """tau in factors of `rank`, or of the smallest rank that keeps the relative error (Frobenius)
    within `tolerance`; None where no rank worth having does; `Zero` where tau is 0."""
    if len(pair.shape) != 2 or min(pair.shape) < MIN_SIDE:
        return None
    rows, columns = pair.shape
    most = (
        min(rows, columns) if rank is not None else max(4, rows * columns // (2 * (rows + columns)))
    )
    wanted = min(rank or FIRST_RANK, most)
    matrix = _Matrix(pair)
    rng = np.random.default_rng([seed, zlib.crc32(pair.name.encode())])
    dtype = DType.F32 if tolerance is not None and tolerance < FINE_TOLERANCE else DType.BF16
    while True:
        b, a = matrix.factors(min(wanted + OVERSAMPLING, rows, columns), rng)
        if matrix.total == 0:
            return Zero(pair)
        kept = rank or _smallest(a, matrix.total, tolerance or 0.0)
        if kept is not None and kept <= wanted:
            break
        if wanted == most:
            return None
        wanted = min(2 * wanted, most)
    kept = min(-(-kept // 4) * 4, a.shape[0])
    sizes = np.sqrt(np.linalg.norm(a[:kept], axis=1))
    safe = np.where(sizes > 0, sizes, 1)
    stored = []
    for factor in (a[:kept] / safe[:, None], b[:, :kept] * safe):
        bits = np.ascontiguousarray(round_to(factor.astype(np.float32), CODES.index(dtype)))
        stored.append(_Factor(dtype, bits.shape, (spill, spill.put(bits.tobytes()))))
    return Factors(pair, 1.0, *stored)


def _smallest(a: np.ndarray, total: float, tolerance: float) -> int | None:
    """The smallest rank with an error within `tolerance`; a has the singular values as norms."""
    caught = np.cumsum(np.square(a, dtype=np.float64).sum(axis=1))
    left = np.maximum(total - np.concatenate([[0.0], caught]), 0.0)
    good = np.flatnonzero(left <= (0.97 * tolerance) ** 2 * total)  # the rest is for rounding
    return int(max(1, good[0])) if good.size else None


class _Matrix:
    """tau of one tensor, by rows; `total` is its squared Frobenius norm once it has been read."""

    def __init__(self, pair: Pair) -> None:
        self.pair, self.total = pair, 0.0
        self.rows, self.columns = pair.shape
        self._hands = Hands()

    def _tiles(self):  # type: ignore[no-untyped-def]
        """(first row, rows of tau in fp32)."""
        step = max(1, TILE_ELEMS // self.columns)
        for first in range(0, self.rows, step):
            last = min(first + step, self.rows)
            flat = self.pair.delta(first * self.columns, last * self.columns, self._hands)
            yield first, flat.reshape(last - first, self.columns)

    def factors(self, rank: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """b (rows, rank), orthonormal columns, and a (rank, columns), rows sorted by norm."""
        basis = rng.standard_normal((self.columns, rank), np.float32)
        for _ in range(POWER_ITERATIONS):
            image = np.linalg.qr(self._times(basis))[0]
            basis = np.linalg.qr(self._transposed_times(image)[0])[0]
        image = np.linalg.qr(self._times(basis))[0]
        caught, self.total = self._transposed_times(image)
        left, sizes, right = np.linalg.svd(caught.T.astype(np.float64), full_matrices=False)
        a = (sizes[:, None] * right).astype(np.float32)
        return image @ left.astype(np.float32), a

    def _times(self, thin: np.ndarray) -> np.ndarray:
        out = np.empty((self.rows, thin.shape[1]), np.float32)
        for first, tile in self._tiles():
            np.matmul(tile, thin, out=out[first : first + len(tile)])
        return out

    def _transposed_times(self, thin: np.ndarray) -> tuple[np.ndarray, float]:
        out = np.zeros((self.columns, thin.shape[1]), np.float32)
        total = 0.0
        for first, tile in self._tiles():
            out += tile.T @ thin[first : first + len(tile)]
            total += float(np.square(tile, dtype=np.float64).sum())
        return out, total
