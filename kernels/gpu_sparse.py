"""Sparse merges in a GPU's memory: what `kernels.sparse` does on the CPU, under the same names.

`count`, `norms` and `merge` take the same `sparse.Inputs` and `sparse.Masks` with torch tensors in
place of arrays, so that the methods' passes run on either. Nothing waits for the GPU but `count`
and `norms`, whose results are read at once.

Masks by rank within a row (DELLA) are applied first, source by source (`triton_rank`), and merged
as deltas of which all is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton

from .reference import F32, F64
from .reference_methods import (
    CHANCE,
    CUT,
    DROP,
    GRANULE,
    HIGH,
    IMPORTANCE,
    KEEP,
    LOW,
    RANK,
    VARIANCE,
)
from .sparse import Inputs, Masks
from .triton_counts import count_kernel, norms_kernel
from .triton_elements import ITEM_BYTES
from .triton_launch import (
    NUM_WARPS,
    OPTIONS,
    bits,
    fixed_block,
    flag_on,
    form,
    mask_of_models,
    on_device,
    warp_threads,
    with_nulls,
)
from .triton_rank import keep_by_rank, ranks_of, row_norms
from .triton_sparse import ROW, merge_kernel

COPIES = 32
"""Histograms that programs count in, so that few add to the same place at once."""

HELD_OF_ALL = 64
"""Elements of all sources together that a thread can mask without spilling."""

EVERYWHERE = 1 << 62
"""A place behind every element."""

_ALL_WORDS, _NO_KEY = 0xFFFFFFFF, 0x7FFFFFFF


def merge(
    inputs: Inputs,
    masks: Masks,
    multipliers: Sequence[float],
    votes: Sequence[float],
    divisors: Sequence[float] | None,
    consensus: int,
    scale: float,
    zero_is_positive: bool,
    out: torch.Tensor,
    out_code: int,
    flag: torch.Tensor | None = None,
) -> torch.Tensor:
    """out = round(base + total); `reference_methods.merge` says what the numbers mean.

    Args:
        inputs: begins at a granule, for masks by rank at a row, where all is kept anywhere.
        out: 1-D, contiguous, of the inputs' length; may be the base itself.
        flag: as in `gpu.linear`.

    Returns:
        The flag: 1 when an input that is looked at, or an output, is NaN or infinite.

    Raises:
        ValueError: for masks by importance, or too many sources.
    """
    _check(masks, inputs)
    flag = flag_on(out.device) if flag is None else flag
    inputs, masks = _ranked(inputs, masks, flag)
    used = [
        i
        for i, kind in enumerate(masks.rows[:-1, 0])
        if kind != DROP and not (kind == CHANCE and masks.rows[i, 7] == 0)
    ]
    shared = bool(masks.rows[-1, 0] == CUT)
    if shared:
        used = list(range(len(inputs.sources)))  # the variance is that of all
    sources, codes = ([values[i] for i in used] for values in (inputs.sources, inputs.codes))
    operands, padded = with_nulls(inputs.base, sources), with_nulls(inputs.base_code, codes)
    places = len(operands)
    numbers = np.zeros((places + 1, 3))
    for k, i in enumerate(used):
        numbers[k] = multipliers[i], votes[i], divisors[i] if divisors else 0.0
    numbers[places, 0] = scale
    rows = torch.zeros((places + 1, ROW), dtype=torch.int64)
    for k, i in enumerate(used):
        rows[k] = _row(masks.rows[i], masks.streams[i])
    rows[places] = _row(masks.rows[-1], np.zeros(4, np.int64))
    rows = rows.to(out.device, non_blocking=True)
    for k, i in enumerate(used):
        _place(inputs, masks, i, masks.rows[i], rows[k])
    if shared:
        _place(inputs, masks, 0, masks.rows[-1], rows[places])
    constants = form(inputs.base_code, out_code, padded)
    wide_words = constants["WIDE"] or (shared and max(ITEM_BYTES[code] for code in padded) > 2)
    held = min(constants["HELD"], 4 if wide_words else 8, HELD_OF_ALL // places)
    constants["HELD"] = held = max(2, held)
    constants["BLOCK"] = block = NUM_WARPS * warp_threads() * held
    kinds = set(masks.rows[used, 0].tolist())
    elems = inputs.base.shape[0]
    if elems:
        with on_device(out):
            merge_kernel[(triton.cdiv(elems, block),)](
                bits(inputs.base, inputs.base_code), bits(out, out_code),
                tuple(map(bits, operands, padded)), rows,
                torch.from_numpy(numbers).to(out.device, non_blocking=True),
                mask_of_models([inputs.is_delta[i] for i in used]), len(used), flag,
                inputs.start, elems, CUTS=CUT in kinds, CHANCES=CHANCE in kinds, SHARED=shared,
                CONSENSUS=consensus, DIVIDE=divisors is not None,
                ZERO_IS_POSITIVE=zero_is_positive, **constants, **OPTIONS,
            )  # fmt: skip
    return flag


def count(
    inputs: Inputs, masks: Masks, stage: int, wanted: np.ndarray, bins: np.ndarray,
    equal: np.ndarray,
) -> None:  # fmt: skip
    """Count magnitudes of a tile for exact order statistics: `sparse.count`, the same integers."""
    _check(masks, inputs, GRANULE)
    granules = triton.cdiv(inputs.base.shape[0], GRANULE)
    first = inputs.start // GRANULE
    for k, (stream, value) in enumerate(wanted.tolist()):
        copies, own = _count(inputs, masks, stream, stage, value)
        bins[k] += copies.sum(0, dtype=torch.int64)[: bins.shape[1]].cpu().numpy()
        if equal.shape[1]:  # other threads add to other granules
            equal[k, first : first + granules] += own.cpu().numpy()


def norms(inputs: Inputs, masks: Masks, block_elems: int, sums: np.ndarray) -> None:
    """sums[block, i] = (sum |delta_i|, sum |masked delta_i|, sum masked delta_i**2).

    As `sparse.norms`, in fp64 and in an order of its own that does not depend on the tiling.

    Args:
        block_elems: a multiple of GRANULE; for masks by rank a row.
    """
    _check(masks, inputs, GRANULE)
    if RANK in masks.rows[:, 0]:
        return _row_norms(inputs, masks, block_elems, sums)
    if block_elems % GRANULE:
        raise ValueError(f"blocks of {block_elems} elements; whole granules expected")
    shared, elems = bool(masks.rows[-1, 0] == CUT), inputs.base.shape[0]
    first_block = inputs.start // block_elems
    for i, kind in enumerate(masks.rows[:-1, 0]):
        if kind == DROP or not elems:
            continue
        row = masks.rows[-1] if shared else masks.rows[i]
        rows = _row(row, masks.streams[i])[None].to(inputs.base.device)
        _place(inputs, masks, i, row, rows[0])
        arguments, constants = _keyed(inputs, shared, i)
        base, sources, thetas, number = arguments
        programs = triton.cdiv(elems, constants["BLOCK"])
        each = block_elems // constants["BLOCK"]
        blocks = triton.cdiv(programs, each)
        partial = torch.zeros((blocks * each, 3), dtype=torch.float64, device=base.device)
        with on_device(base):
            norms_kernel[(programs,)](
                base, sources, rows, i if shared else 0, thetas, number, inputs.start, elems,
                partial, CUTS=bool(kind == CUT), CHANCES=bool(kind == CHANCE), SHARED=shared,
                **constants, **fixed_block(),
            )  # fmt: skip
        totals = partial.reshape(blocks, each, 3).sum(1)
        sums[first_block : first_block + blocks, i] = totals.cpu().numpy()


def _check(masks: Masks, inputs: Inputs, unit: int = 1) -> None:
    """Refuse masks without a GPU kernel, and tiles that do not begin at a multiple of `unit`."""
    kinds = set(masks.rows[:, 0].tolist())
    if masks.measure == IMPORTANCE:
        raise ValueError("masks by importance have no GPU kernel")
    if RANK in kinds and kinds & {CUT, CHANCE}:
        raise ValueError("masks by rank stand alone")
    if RANK in kinds:
        unit = masks.row
    elif kinds & {CUT, CHANCE}:
        unit = GRANULE
    if inputs.start % unit:
        raise ValueError(f"a tile from element {inputs.start}; a multiple of {unit} expected")


def _ranked(inputs: Inputs, masks: Masks, flag: torch.Tensor) -> tuple[Inputs, Masks]:
    """Sources that are masked by rank as what is left of them, of which all is kept."""
    ranked = [i for i, kind in enumerate(masks.rows[:-1, 0].tolist()) if kind == RANK]
    if not ranked:
        return inputs, masks
    sources: list[Any] = list(inputs.sources)
    codes = list(inputs.codes)
    is_delta, rows = list(inputs.is_delta), masks.rows.copy()
    for i in ranked:
        sources[i] = _kept_by_rank(inputs, masks, i, flag)
        codes[i], is_delta[i], rows[i] = F64 if inputs.wide else F32, True, KEEP
    kept = replace(inputs, sources=sources, codes=codes, is_delta=is_delta)
    return kept, replace(masks, rows=rows)


def _kept_by_rank(inputs: Inputs, masks: Masks, i: int, flag: torch.Tensor) -> torch.Tensor:
    keys = _magnitudes(inputs, masks, i, 0, inputs.base.shape[0])
    (low, span), rescale = masks.chances[i].tolist(), bool(masks.rows[i, 7])
    return keep_by_rank(
        *_bits_of(inputs, i), inputs.wide, ranks_of(keys, masks.row), masks.row, low, span, rescale,
        masks.streams[i].tolist(), inputs.start, flag,
    )  # fmt: skip


def _row_norms(inputs: Inputs, masks: Masks, row: int, sums: np.ndarray) -> None:
    first = inputs.start // row
    for i, kind in enumerate(masks.rows[:-1, 0]):
        if kind == DROP or not inputs.base.shape[0]:
            continue
        if kind == RANK:
            masked = _kept_by_rank(inputs, masks, i, flag_on(inputs.base.device))
        else:
            masked = _deltas(inputs, i)
        found = row_norms(*_bits_of(inputs, i), inputs.wide, masked, row).cpu().numpy()
        sums[first : first + len(found), i] = found


def _deltas(inputs: Inputs, i: int) -> torch.Tensor:
    """A whole source: all are kept with probability 1."""
    ranks = torch.zeros(inputs.base.shape[0], dtype=torch.int32, device=inputs.base.device)
    return keep_by_rank(
        *_bits_of(inputs, i), inputs.wide, ranks, 1, 1.0, 0.0, False, [0] * 4, 0,
        flag_on(inputs.base.device),
    )  # fmt: skip


def _bits_of(inputs: Inputs, i: int) -> tuple[Any, Any, tuple[int, int], bool]:
    """Base and one source as bits, their codes, and whether the source is a model."""
    codes = inputs.base_code, inputs.codes[i]
    base, source = bits(inputs.base, codes[0]), bits(inputs.sources[i], codes[1])
    return base, source, codes, not inputs.is_delta[i]


def _row(mask: np.ndarray, stream: np.ndarray) -> torch.Tensor:
    """A row of masks as the kernels take it, with places at whole granules."""
    row = [-1, 0, _NO_KEY, 0, _ALL_WORDS, *stream.tolist()]  # keeps everything
    if mask[0] == CUT:
        for cut in (0, 1):
            key, granule, _ = mask[1 + 3 * cut : 4 + 3 * cut].tolist()
            row[2 * cut] = min(key, _NO_KEY)
            row[2 * cut + 1] = min(max(granule, 0) * GRANULE, EVERYWHERE)
    elif mask[0] == CHANCE:
        row[4] = int(mask[7]) - 1
    return torch.tensor(row)


def _place(inputs: Inputs, masks: Masks, i: int, mask: np.ndarray, row: torch.Tensor) -> None:
    """Where a cut ends within a granule of this tile: behind the `quota`-th equal key there."""
    if mask[0] != CUT:
        return
    for cut in (0, 1):
        key, granule, quota = mask[1 + 3 * cut : 4 + 3 * cut].tolist()
        start = granule * GRANULE - inputs.start
        if quota and 0 <= start < inputs.base.shape[0]:
            keys = _magnitudes(inputs, masks, i, start, min(GRANULE, inputs.base.shape[0] - start))
            so_far = (keys == key).cumsum(0)
            row[2 * cut + 1] = granule * GRANULE + 1 + torch.searchsorted(so_far, quota)


def _magnitudes(inputs: Inputs, masks: Masks, i: int, start: int, elems: int) -> torch.Tensor:
    """The keys of a stretch of elements, int32."""
    keys = torch.empty(elems, dtype=torch.int32, device=inputs.base.device)
    stretch = slice(start, start + elems)
    part = replace(
        inputs, base=inputs.base[stretch], sources=[source[stretch] for source in inputs.sources]
    )
    _launch_count(part, masks, i, 3, 0, keys, keys, keys)
    return keys


def _count(
    inputs: Inputs, masks: Masks, i: int, stage: int, wanted: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(histograms, equal keys of each granule) of one source, or of the measure of all."""
    device = inputs.base.device
    width = (HIGH, LOW, 1)[stage]
    bins = torch.zeros((COPIES if stage < 2 else 1, width), dtype=torch.int32, device=device)
    granules = triton.cdiv(inputs.base.shape[0], GRANULE)
    equal = torch.zeros(granules, dtype=torch.int64, device=device)
    if granules:
        _launch_count(inputs, masks, i, stage, wanted, bins, equal, bins)
    return bins, equal


def _launch_count(
    inputs: Inputs, masks: Masks, i: int, stage: int, wanted: int,
    bins: torch.Tensor, equal: torch.Tensor, keys: torch.Tensor,
) -> None:  # fmt: skip
    arguments, constants = _keyed(inputs, masks.measure == VARIANCE, i)
    elems = inputs.base.shape[0]
    base: Any = inputs.base
    with on_device(base):
        count_kernel[(triton.cdiv(elems, constants["BLOCK"]),)](
            *arguments, elems, wanted, bins, equal, keys,
            STAGE=stage, COPIES=COPIES, BINS=(HIGH, LOW, 1, 1)[stage],
            SHARED=masks.measure == VARIANCE, **constants, **fixed_block(),
        )  # fmt: skip


def _keyed(inputs: Inputs, shared: bool, i: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Operands of kernels that look at one source, or at all where the measure is `shared`."""
    chosen = range(len(inputs.sources)) if shared else [i]
    sources = [inputs.sources[k] for k in chosen]
    is_delta = [inputs.is_delta[k] for k in chosen]
    padded = with_nulls(inputs.base_code, [inputs.codes[k] for k in chosen])
    operands = tuple(map(bits, with_nulls(inputs.base, sources), padded))
    base = bits(inputs.base, inputs.base_code)
    constants = {
        "CODES": (inputs.base_code, inputs.base_code, *padded),
        "WIDE": inputs.wide,
        "BLOCK": 8 * NUM_WARPS * 32,
    }
    return (base, operands, mask_of_models(is_delta), len(sources)), constants
