"""Products of all pairs of inputs, and counts of zeros and non-finite values, in one pass on a GPU.

What `span.products` and `reference_moments` specify: norms, cosines and the weights of spherical
methods all follow from it. Each program reduces one block to a few fp64 numbers, which a second,
tiny sum takes together granule by granule: no atomics, so the same bits in every run. The order is
not the CPU's, so the last bits may differ from it.

Up to CHUNK sources are read once. Beyond that, pairs of groups of half as many are, since a thread
cannot hold the values of more in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .reference_methods import GRANULE
from .triton_elements import load_where, total_of
from .triton_launch import NUM_WARPS, bits, fixed_block, mask_of_models, on_device, with_nulls

CHUNK = 8
"""Sources of one launch."""

HELD = 8
"""Elements of each operand that a thread holds: as many fp64 values per source."""


class Moments(NamedTuple):
    """Statistics of `count` inputs.

    Attributes:
        products: fp64 (blocks, count, count), symmetric: sums over each granule.
        zeros, nonfinite: int64 (count,).
    """

    products: torch.Tensor
    zeros: torch.Tensor
    nonfinite: torch.Tensor


@triton.jit
def _moments_part(
    operands, start, inside, products, counts,
    CODES: tl.constexpr, HAS_BASE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    base, sources, minus, plus, count = operands
    origin = tl.full((BLOCK,), 0.0, tl.float32)
    if HAS_BASE:
        origin = load_where(base, CODES[0], start, inside, True, BLOCK, 1, tl.float32)
    values = ()
    for i in tl.static_range(len(sources)):
        there = inside & (tl.full((BLOCK,), i, tl.int32) < count)
        value = load_where(sources[i], CODES[1 + i], start, there, count > i, BLOCK, 1, tl.float32)
        value -= tl.where(((minus.to(tl.uint64) >> i) & 1) != 0, origin, 0.0)
        value += tl.where(((plus.to(tl.uint64) >> i) & 1) != 0, origin, 0.0)
        values += (tl.where(there, value, 0.0),)  # type: ignore[assignment]
        exponent = value.to(tl.int32, bitcast=True) & 0x7F800000
        zeros, infinite = (value == 0.0) & there, (exponent == 0x7F800000) & there
        tl.store(counts + 2 * i, total_of(zeros.to(tl.int32)))
        tl.store(counts + 2 * i + 1, total_of(infinite.to(tl.int32)))
    for a in tl.static_range(len(sources)):
        for b in tl.static_range(a, len(sources)):
            total = total_of(values[a].to(tl.float64) * values[b].to(tl.float64))
            tl.store(products + a * len(sources) + b, total)


@triton.jit(do_not_specialize=["minus", "plus", "count", "elems"])
def moments_kernel(
    base, sources, minus: tl.uint64, plus: tl.uint64, count: tl.int32, elems: tl.int64, products,
    counts, CODES: tl.constexpr, HAS_BASE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """products[program, a, b] for a <= b, fp64; counts[program, i] = (zeros, non-finite), int32.

    Bit i of minus, plus: the base is subtracted from source i, or added.
    """
    program = tl.program_id(0).to(tl.int64)
    start = program * BLOCK
    operands = (base, sources, minus, plus, count)
    products += program * len(sources) * len(sources)
    counts += program * len(sources) * 2
    if start + BLOCK <= elems:
        _moments_part(
            operands, start, tl.full((BLOCK,), 1, tl.int1), products, counts, CODES, HAS_BASE, BLOCK
        )
    else:
        _moments_part(
            operands, start, tl.arange(0, BLOCK) < elems - start, products, counts, CODES,
            HAS_BASE, BLOCK,
        )  # fmt: skip


def moments(
    base: torch.Tensor | None,
    base_code: int,
    sources: Sequence[torch.Tensor],
    codes: Sequence[int],
    is_delta: Sequence[bool],
    from_base: bool,
) -> Moments:
    """Moments of the sources' values in fp32: of their deltas with `from_base`, else of models.

    Args:
        base: None where no source needs it; 1-D, contiguous like the sources, of their length.
        codes: of dtypes up to 32 bits, INT8 and INT4 included; see `gpu.linear`.

    Returns:
        Sums over granules counted from the first element.
    """
    n = len(sources)
    first = sources[0] if not isinstance(sources[0], tuple) else base
    assert first is not None
    blocks = triton.cdiv(first.numel(), GRANULE)
    made = Moments(
        torch.zeros((blocks, n, n), dtype=torch.float64, device=first.device),
        *(torch.zeros(n, dtype=torch.int64, device=first.device) for _ in range(2)),
    )
    half = CHUNK // 2
    groups = [range(n)] if n <= CHUNK else [range(k, min(k + half, n)) for k in range(0, n, half)]
    for a, rows in enumerate(groups):
        for columns in groups[a + 1 :] or ([rows] if len(groups) == 1 else []):
            chosen = list(dict.fromkeys([*rows, *columns]))
            part = _launch(
                first, base, base_code, [sources[i] for i in chosen], [codes[i] for i in chosen],
                [is_delta[i] for i in chosen], from_base, blocks,
            )  # fmt: skip
            made.products[:, torch.tensor(chosen)[:, None], torch.tensor(chosen)] = part.products
            made.zeros[chosen], made.nonfinite[chosen] = part.zeros, part.nonfinite
    return made


def _launch(
    first: torch.Tensor, base: torch.Tensor | None, base_code: int, sources: Sequence,
    codes: Sequence[int], is_delta: Sequence[bool], from_base: bool, blocks: int,
) -> Moments:  # fmt: skip
    """The moments of at most CHUNK sources."""
    n, block = len(sources), NUM_WARPS * 32 * HELD
    padded = with_nulls(base_code, codes)
    operands = tuple(map(bits, with_nulls(sources[0], sources), padded))
    models = mask_of_models(is_delta)
    places, deltas = len(operands), (1 << n) - 1 - models
    programs, each = triton.cdiv(first.numel(), block), GRANULE // block
    products = torch.zeros(
        (blocks * each, places, places), dtype=torch.float64, device=first.device
    )
    counts = torch.zeros((programs, places, 2), dtype=torch.int32, device=first.device)
    origin = operands[0] if base is None else bits(base, base_code)
    if programs:
        with on_device(first):
            moments_kernel[(programs,)](
                origin, operands, models if from_base else 0, 0 if from_base else deltas, n,
                first.numel(), products, counts,
                CODES=(base_code, *padded), HAS_BASE=base is not None, BLOCK=block,
                **fixed_block(),
            )  # fmt: skip
    upper = products.reshape(blocks, each, places, places).sum(1)[:, :n, :n]
    zeros, nonfinite = counts.sum(0, dtype=torch.int64)[:n].unbind(1)
    return Moments(upper.triu() + upper.triu(1).mT, zeros, nonfinite)
