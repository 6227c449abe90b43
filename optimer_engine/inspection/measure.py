"""One pass over all elements of a pool: the products of all pairs of vectors, tensor by tensor.

Each tile is read from every folder, turned into fp32 deltas in place, and gone through once for all
products and counts. Tiles are cut at fixed places counted from a tensor's start and their sums are
added in that order, in fp64: threads do not change a bit of the result. Memory is threads x
(folders + 1) x tile, and a small matrix for each tensor.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field

import numpy as np

from optimer_engine import ops, vectors
from optimer_engine.adapter import adapter_tensors
from optimer_engine.checkpoint import ADAPTER, MODEL, VECTOR, Checkpoint
from optimer_engine.errors import CheckpointError, MismatchError, quoted
from optimer_engine.inspection.summary import is_float, layer_of, module_type, small_name
from optimer_engine.operands import Operand, Stored
from optimer_engine.types import DType, TensorInfo

TILE_ELEMS = 128 * 1024


@dataclass
class Measured:
    """What one pass found.

    Attributes:
        names: of the vectors, in the order given.
        tensors: names, in file order; elems: their sizes, int64 (tensors,).
        products: fp64 (tensors, n, n), n = vectors, plus the base as the last where there is one:
            sums of x_a * x_b over a tensor's elements.
        unchanged, nonfinite: int64 (tensors, vectors): deltas that are 0; NaN or infinite ones.
        has_base: whether the base is the last row of `products`.
    """

    names: list[str]
    tensors: list[str]
    elems: np.ndarray
    products: np.ndarray
    unchanged: np.ndarray
    nonfinite: np.ndarray
    has_base: bool
    groups: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for label, key in (("layers", layer_of), ("modules", module_type)):
            found: dict[str, list[int]] = {}
            for number, name in enumerate(self.tensors):
                found.setdefault(key(name), []).append(number)
            self.groups[label] = found

    @property
    def count(self) -> int:
        """Vectors, without the base."""
        return len(self.names)

    def total(self, among: Sequence[int] | None = None) -> np.ndarray:
        """Products over all tensors, or over some."""
        return (self.products if among is None else self.products[list(among)]).sum(axis=0)

    def norms(self, among: Sequence[int] | None = None) -> np.ndarray:
        """Euclidean norm of each vector."""
        return np.sqrt(np.diagonal(self.total(among))[: self.count])

    def cosines(self, among: Sequence[int] | None = None) -> np.ndarray:
        """(vectors, vectors); NaN for a vector that is 0."""
        return cosines(self.total(among)[: self.count, : self.count])

    def unchanged_share(self) -> np.ndarray:
        """Fraction of the parameters that each vector leaves as they are."""
        return self.unchanged.sum(axis=0) / max(1, int(self.elems.sum()))


def cosines(products: np.ndarray) -> np.ndarray:
    """Cosines from products; NaN where a norm is 0."""
    norms = np.sqrt(np.diagonal(products))
    with np.errstate(invalid="ignore", divide="ignore"):
        return products / np.outer(norms, norms)


class Pool:
    """Opened folders whose tensors are matched by name; what `measure` and `ranks` read from.

    Args:
        folders: vectors, adapters or, with a base, models of one shape.
        base: needed by models and by vectors of mode exact.

    Raises:
        MismatchError: for folders that do not hold the same tensors, or lack their base.
    """

    def __init__(self, folders: Sequence[Checkpoint], base: Checkpoint | None) -> None:
        self.folders, self.base = folders, base
        given = [_operands(checkpoint) for checkpoint in folders]
        where = base.tensors if base is not None else given[0]
        self.names = _distinct([small_name(checkpoint.folder) for checkpoint in folders])
        self.rows: list[tuple[str, tuple[int, ...], Operand | None, list[Operand | None]]] = []
        problems: list[str] = []
        for name, tensor in where.items():
            if not is_float(tensor.dtype):
                continue
            found = []
            for label, checkpoint, tensors in zip(self.names, folders, given, strict=True):
                operand = tensors.get(name)
                # An adapter touches some tensors; a tied head is stored in one of two models.
                optional = checkpoint.kind == ADAPTER or name.endswith("lm_head.weight")
                if operand is None and not optional:
                    problems.append(f"{label} lacks {quoted(name)}")
                elif operand is not None and operand.shape != tensor.shape:
                    shape, expected = list(operand.shape), list(tensor.shape)
                    problems.append(f"{label}: {quoted(name)} is {shape}, not {expected}")
                elif base is None and operand is not None and _needs_base(operand):
                    problems.append(f"{label} is stored relative to its base")
                found.append(operand)
            operand = None
            if isinstance(tensor, TensorInfo):
                assert base is not None
                operand = Stored(base, tensor, False)
            self.rows.append((name, tensor.shape, operand, found))
        if problems:
            listed = list(dict.fromkeys(problems))
            more = f"\n  - and {len(listed) - 20} more" if len(listed) > 20 else ""
            todo = "give the base of the pool with --base" if base is None else "check the folders"
            raise MismatchError(
                "the folders do not fit:\n  - " + "\n  - ".join(listed[:20]) + more, todo=todo
            )

    @property
    def elems(self) -> int:
        """Elements of one vector."""
        return sum(math.prod(shape) for _, shape, *_ in self.rows)

    def only(self, number: int) -> Pool:
        """The same with one vector."""
        one = copy(self)
        one.names = [self.names[number]]
        one.rows = [(name, shape, base, [all_[number]]) for name, shape, base, all_ in self.rows]
        return one

    def deltas(
        self, row: int, start: int, stop: int, rows: np.ndarray, scratch: list[np.ndarray]
    ) -> None:
        """rows[i, :stop - start] = fp32 delta of vector i, then the base's values if there is one.

        Args:
            scratch: two buffers of uint8, each of (stop - start) * 8 bytes.
        """
        _, _, base, operands = self.rows[row]
        count = stop - start
        base_tile = None if base is None else base.read(start, stop, scratch[0], None)
        subtract = ops.linear_kernel("cpu")
        for number, operand in enumerate(operands):
            out = rows[number, :count]
            if operand is None:
                out[:] = 0
                continue
            tile = operand.read(start, stop, scratch[1], base_tile)
            anchor, dtype = (tile, operand.dtype) if base is None else (base_tile, base.dtype)
            subtract(
                anchor, dtype, [tile], [operand.dtype], [operand.is_delta], [1.0], out, DType.F32,
                False,
            )  # fmt: skip
        if base is not None:
            out = rows[len(operands), :count]
            assert base_tile is not None
            subtract(
                base_tile, base.dtype, [base_tile], [base.dtype], [True], [1.0], out, DType.F32,
                False,
            )  # fmt: skip


def measure(
    pool: Pool, *, threads: int = 2, progress: Callable[[int], None] | None = None
) -> Measured:
    """Stream all folders of a pool once.

    Args:
        threads: how many; the result is the same with any number.
        progress: called with the number of elements just done.

    Raises:
        CheckpointError: when a folder cannot be read, or is changed meanwhile.
    """
    work = _Work(pool, progress)
    with ThreadPoolExecutor(threads, thread_name_prefix="inspect") as executor:
        for worker in [executor.submit(work.run) for _ in range(threads)]:
            worker.result()
    for checkpoint in (*pool.folders, *([pool.base] if pool.base else [])):
        checkpoint.check_unchanged()
    return work.result()


class _Work:
    """The tiles of a pool, dealt to threads, and their sums."""

    def __init__(self, pool: Pool, progress: Callable[[int], None] | None) -> None:
        self.pool, self.progress = pool, progress
        self.count = len(pool.names) + (pool.base is not None)
        self.elems = [math.prod(shape) for _, shape, *_ in pool.rows]
        self.products = np.zeros((len(self.elems), self.count, self.count))
        self.counts = np.zeros((len(self.elems), 2, self.count), np.int64)
        # Sums of tiles that wait for one before them: the order of addition is part of the result.
        self._waiting: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._next = [0] * len(self.elems)
        self._lock = threading.Lock()
        self._tiles = iter(
            (row, start, min(start + TILE_ELEMS, elems))
            for row, elems in enumerate(self.elems)
            for start in range(0, elems, TILE_ELEMS)
        )

    def run(self) -> None:
        """One thread's share."""
        from optimer_engine.kernels.moments import moments

        add = moments(self.count)
        rows = np.zeros((self.count, TILE_ELEMS + 16), np.float32)
        scratch = [np.zeros(TILE_ELEMS * 8, np.uint8) for _ in range(2)]
        while True:
            with self._lock:
                row, start, stop = next(self._tiles, (-1, 0, 0))
            if row < 0:
                return
            self.pool.deltas(row, start, stop, rows, scratch)
            products = np.zeros((self.count, self.count))
            counts = np.zeros((2, self.count), np.int64)
            add(
                rows.ctypes.data, rows.strides[0], stop - start, products.ctypes.data,
                counts.ctypes.data,
            )  # fmt: skip
            with self._lock:
                self._waiting[row, start] = products, counts
                self._add_ready(row)
                if self.progress is not None:
                    self.progress(stop - start)

    def _add_ready(self, row: int) -> None:
        while (row, self._next[row]) in self._waiting:
            products, counts = self._waiting.pop((row, self._next[row]))
            self.products[row] += products
            self.counts[row] += counts
            self._next[row] += TILE_ELEMS

    def result(self) -> Measured:
        """All that was found."""
        upper = np.triu(self.products)
        count = len(self.pool.names)
        return Measured(
            self.pool.names,
            [name for name, *_ in self.pool.rows],
            np.array(self.elems, np.int64),
            upper + np.triu(self.products, 1).transpose(0, 2, 1),
            self.counts[:, 0, :count],
            self.counts[:, 1, :count],
            self.pool.base is not None,
        )


def _operands(checkpoint: Checkpoint) -> dict[str, Operand]:
    if checkpoint.kind == VECTOR:
        return vectors.open(checkpoint).tensors
    if checkpoint.kind == ADAPTER:
        return {
            name: Stored(checkpoint, given, False) if isinstance(given, TensorInfo) else given
            for name, given in adapter_tensors(checkpoint).items()
        }
    if checkpoint.kind != MODEL:
        raise CheckpointError(f"is a {checkpoint.kind}", where=str(checkpoint.folder))
    return {name: Stored(checkpoint, info, False) for name, info in checkpoint.tensors.items()}


def _needs_base(operand: Operand) -> bool:
    return not operand.is_delta


def _distinct(names: list[str]) -> list[str]:
    """The names, with a number behind those that occur twice."""
    found: list[str] = []
    for name in names:
        number = 2
        label = name
        while label in found:
            label, number = f"{name} {number}", number + 1
        found.append(label)
    return found
