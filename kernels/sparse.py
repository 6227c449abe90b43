"""Sparse merges on the CPU: mask every source's delta, elect signs, sum and round, in one pass.

One kernel serves TIES, DARE, DELLA, Breadcrumbs, SCE and their combinations; what it computes is in
`reference_methods`, how is in `sparse_loops`. Memory sees every input byte once per pass, and the
scratch of a call is a few blocks, or a few rows where a mask ranks rows.

The alternative to masks that are recomputed from thresholds and counters is to store them: a bit or
a byte per element and source, which for a model of 27 billion weights is more than the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .conversion import conversions
from .native import compiled
from .reference import accumulates_in_fp64
from .reference_methods import BINS, BLOCK, CHANCE, CUT, MAGNITUDE, PITCH, RANK

CUTS, DRAWS, RANKS = 1, 2, 4
"""Bits of `Masks.kinds`."""

PAGE, GAP = 4096, PITCH - BLOCK


@dataclass(frozen=True, slots=True)
class Masks:
    """Which elements of each source's delta are kept.

    Attributes:
        rows: (sources + 1, 8) int64: the kind of mask, then for CUT two cuts of three numbers each
            (key, granule, quota), then for CHANCE the chance in units of 2**-32, for RANK whether
            to divide by the probability. An element is within a cut when its key is larger, or
            equal and in an earlier granule, or equal, in the same granule, and among the first
            `quota` there. Elements within the first cut and not within the second are kept. The
            last row is a CUT on `measure`, one mask for all sources, or KEEP.
        chances: (sources, 2) fp64: for RANK, the least probability and the span to the largest.
        streams: (sources, 4) int64: for CHANCE and RANK, the key and upper counter words.
        measure: what a cut of the last row compares.
        factors: (rows of the tensor,) fp64: for IMPORTANCE.
        row: length of a row.
        kinds: of masks that may occur, as bits of CUTS, DRAWS and RANKS; other code is not
            compiled. By default those that do occur.
    """

    rows: np.ndarray
    chances: np.ndarray
    streams: np.ndarray
    measure: int = MAGNITUDE
    factors: np.ndarray = field(default_factory=lambda: np.empty(0))
    row: int = 1
    kinds: int = 0

    @property
    def parts(self) -> tuple[bool, bool, bool, bool]:
        """Which kinds of masks, and whether a measure, the code must have; see `masker`."""
        found = set(self.rows[:, 0].tolist())
        wanted = ((CUT, CUTS), (CHANCE, DRAWS), (RANK, RANKS))
        cuts, draws, ranks = (kind in found or bool(self.kinds & bit) for kind, bit in wanted)
        return cuts, draws, ranks, self.measure != MAGNITUDE

    @property
    def width(self) -> int:
        """Elements that are masked at a time."""
        return self.row if (self.rows[:, 0] == RANK).any() else BLOCK


@dataclass(frozen=True, slots=True)
class Inputs:
    """The operands of a tile: elements from `start` of the tensor on.

    Attributes:
        base, sources: 1-D, contiguous, equal length, in the storage dtypes of their codes.
        is_delta: for each source, whether it is a stored tau_i.
        wide: whether to compute in fp64; see `reference.accumulates_in_fp64`.
    """

    base: np.ndarray
    base_code: int
    sources: Sequence[np.ndarray]
    codes: Sequence[int]
    is_delta: Sequence[bool]
    start: int
    wide: bool

    @classmethod
    def of(
        cls, base: np.ndarray, base_code: int, sources: Sequence[np.ndarray], codes: Sequence[int],
        is_delta: Sequence[bool], start: int, out_code: int,
    ) -> Inputs:  # fmt: skip
        """For a result in `out_code`."""
        wide = accumulates_in_fp64(base_code, list(codes), out_code)
        return cls(base, base_code, sources, codes, is_delta, start, wide)

    @property
    def dtype(self) -> type:
        """Of the arithmetic."""
        return np.float64 if self.wide else np.float32


def address(array: np.ndarray) -> int:
    """Where a contiguous array lies."""
    return array.ctypes.data


def _arguments(inputs: Inputs, masks: Masks, out: np.ndarray | None, out_code: int) -> list[Any]:
    """What `_opened` takes apart: arrays, passed by address, and integers."""
    n, width = len(inputs.sources), masks.width
    operands = [inputs.base, *inputs.sources, inputs.base if out is None else out]
    return [
        n, width, masks.measure, masks.row, inputs.start, inputs.base.shape[0],
        np.array([address(a) for a in operands], np.int64),
        conversions((inputs.base_code, *inputs.codes, out_code), inputs.wide),
        np.array(inputs.is_delta, np.int64),
        masks.rows, masks.chances, masks.streams, masks.factors, len(masks.factors),
        _scratch(0, width, inputs.dtype), _scratch(1, n * (width + GAP), inputs.dtype),
        _scratch(2, width, np.uint32), _scratch(3, width + 128, np.uint32),
        np.empty((2, width), np.int64), np.empty(2 * BINS, np.int64),
        np.zeros((n, 2), np.int64), _scratch(4, 6 * PITCH, inputs.dtype),
    ]  # fmt: skip


def _scratch(number: int, elems: int, dtype: type) -> np.ndarray:
    """Memory that begins at a place within a page which depends on `number`; see PITCH."""
    size = elems * np.dtype(dtype).itemsize
    memory = np.empty(size + PAGE, np.uint8)
    first = (number * 320 - address(memory)) % PAGE
    return memory[first : first + size]


def call(entry: Callable[[int], Any], arguments: list[Any]) -> Any:
    """Call a compiled entry with integers and with arrays, which are passed by address."""
    packed = np.array(
        [address(a) if isinstance(a, np.ndarray) else int(a) for a in arguments], np.int64
    )
    return entry(address(packed))


def _opened() -> Any:
    """A jitted function that undoes `_arguments`."""
    from .blocks import loop
    from .elements import array

    @loop
    def opened(p, dtype):
        n, width = p[0], p[1]
        return (
            array(p[6], np.int64, (n + 2,)), array(p[7], np.int64, (n + 2, 2)),
            array(p[8], np.int64, (n,)), array(p[9], np.int64, (n + 1, 8)),
            array(p[10], np.float64, (n, 2)), array(p[11], np.int64, (n, 4)),
            array(p[12], np.float64, (p[13],)), array(p[14], dtype, (width,)),
            array(p[15], dtype, (n, width + GAP)), array(p[16], np.uint32, (width,)),
            array(p[17], np.uint32, (width + 128,)), array(p[18], np.int64, (2, width)),
            array(p[19], np.int64, (2 * BINS,)), array(p[20], np.int64, (n, 2)),
            array(p[21], dtype, (6 * PITCH,)),
        )  # fmt: skip

    return opened


@compiled("boolean(int64)")
def _merge(wide: bool, parts: tuple[bool, bool, bool, bool]) -> Any:
    from .elements import array
    from .sparse_loops import masker, merger

    merge = merger(masker(*parts))
    opened, dtype = _opened(), np.float64 if wide else np.float32

    def function(arguments):  # type: ignore[no-untyped-def]
        p = array(arguments, np.int64, (29,))
        (
            addresses, forms, is_delta, masks, chances, streams, factors, base, deltas, keys, words,
            items, counts, seen, s,
        ) = opened(p, dtype)  # fmt: skip
        n = p[0]
        multipliers = array(p[22], np.float64, (n + 1,))
        return merge(
            addresses, forms, is_delta, masks, chances, streams, p[2], factors, p[3], p[1], p[4],
            p[5], multipliers, array(p[23], np.float64, (n,)), array(p[24], np.float64, (n,)),
            p[25], p[26], p[27], multipliers[n], base, deltas, keys, words, items, counts, seen, s,
        )  # fmt: skip

    return function


def merge(
    inputs: Inputs,
    masks: Masks,
    multipliers: Sequence[float],
    votes: Sequence[float],
    divisors: Sequence[float] | None,
    consensus: int,
    scale: float,
    zero_is_positive: bool,
    out: np.ndarray,
    out_code: int,
) -> bool:
    """out = round(base + total); `reference_methods.merge` says what the numbers mean.

    Args:
        out: 1-D, contiguous, of the inputs' length; not one of them.

    Returns:
        True when an input that is looked at, or an output, is NaN or infinite.
    """
    arguments = _arguments(inputs, masks, out, out_code)
    arguments += [
        np.array([*multipliers, scale], np.float64),
        np.array(votes, np.float64),
        np.array(divisors or [0.0] * len(multipliers), np.float64),
        consensus, divisors is not None, zero_is_positive, 0,
    ]  # fmt: skip
    return bool(call(_merge(inputs.wide, masks.parts), arguments))


@compiled("void(int64)")
def _norms(wide: bool, parts: tuple[bool, bool, bool, bool]) -> Any:
    from .elements import array
    from .sparse_loops import masker, measurer

    norms = measurer(masker(*parts))
    opened, dtype = _opened(), np.float64 if wide else np.float32

    def function(arguments):  # type: ignore[no-untyped-def]
        p = array(arguments, np.int64, (26,))
        (
            addresses, forms, is_delta, masks, chances, streams, factors, base, deltas, keys, words,
            items, counts, seen, s,
        ) = opened(p, dtype)  # fmt: skip
        norms(
            addresses, forms, is_delta, masks, chances, streams, p[2], factors, p[3], p[1], p[4],
            p[5], p[22], base, deltas, keys, words, items, counts, seen, s,
            array(p[23], np.float64, (p[0], 2, BLOCK)), array(p[24], np.float64, (p[25], p[0], 3)),
        )  # fmt: skip

    return function


def norms(inputs: Inputs, masks: Masks, block_elems: int, sums: np.ndarray) -> None:
    """sums[block, i] = (sum |delta_i|, sum |masked delta_i|, sum masked delta_i**2).

    Args:
        block_elems: length of a block, a multiple of BLOCK or a row; a tile holds whole ones.
        sums: (blocks of the tensor, sources, 3) fp64.
    """
    arguments = _arguments(inputs, masks, None, inputs.base_code)
    arguments += [block_elems, np.empty((len(inputs.sources), 2, BLOCK)), sums, sums.shape[0]]
    call(_norms(inputs.wide, masks.parts), arguments)


@compiled("void(int64)")
def _count(wide: bool, measures: bool) -> Any:
    from .elements import array
    from .sparse_loops import counter

    count = counter(measures)
    opened, dtype = _opened(), np.float64 if wide else np.float32

    def function(arguments):  # type: ignore[no-untyped-def]
        p = array(arguments, np.int64, (29,))
        opened_ = opened(p, dtype)
        addresses, forms, is_delta, factors = opened_[0], opened_[1], opened_[2], opened_[6]
        base, deltas, keys, s = opened_[7], opened_[8], opened_[9], opened_[14]
        count(
            addresses, forms, is_delta, p[2], factors, p[3], p[4], p[5], p[22],
            array(p[23], np.int64, (p[24], 2)), array(p[25], np.int64, (p[24], p[26])),
            array(p[27], np.int64, (p[24], p[28])), base, deltas, keys, s,
        )  # fmt: skip

    return function


def count(
    inputs: Inputs,
    masks: Masks,
    stage: int,
    wanted: np.ndarray,
    bins: np.ndarray,
    equal: np.ndarray,
) -> None:
    """Count magnitudes of a tile for exact order statistics, without a sort.

    A magnitude is 31 bits. Stage 0 counts its upper 15 (deltas that are exact in bf16 have no
    others). Stage 1 counts the lower 16 of the elements that share their upper ones with an order
    statistic, and per granule those that equal the bin's first value, which is the threshold itself
    in most 16-bit checkpoints. Stage 2 counts per granule those that equal a given key.

    Args:
        masks: for its `measure`, `factors` and `row`; MAGNITUDE has a stream of keys per source,
            the other measures one in all.
        wanted: (k, 2) int64: a stream, and for stage 1 the upper bits, for stage 2 the key. Stage 0
            takes each stream once.
        bins: (k, HIGH) int64 in stage 0, (k, LOW) in stage 1, added to.
        equal: (k, granules) int64, added to; (k, 0) where places do not matter.
    """
    arguments = _arguments(inputs, masks, None, inputs.base_code)
    arguments += [stage, wanted, len(wanted), bins, bins.shape[1], equal, equal.shape[1]]
    call(_count(inputs.wide, masks.measure != MAGNITUDE), arguments)
