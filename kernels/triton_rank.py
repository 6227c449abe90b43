"""DELLA's masks on GPUs: keep elements with a probability that grows with their rank in the row.

`reference_methods.rank_probabilities` is the specification. Ranks come from torch's sort of each
row, stable, so that equal magnitudes are settled by index as on the CPU; a sort in a kernel's
registers would be limited to short rows. What is kept is divided by its probability in fp64 and
handed on as a stored delta: the merge that follows then has nothing left to mask.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .triton_elements import load_where, raise_where, total_of
from .triton_launch import NUM_WARPS, OPTIONS, fixed_block, on_device, warp_threads
from .triton_sparse import delta_of, four_words, magnitude

_INFINITY = tl.constexpr(0x7F800000)
HELD = 8
"""Elements of a thread: 128 bits of bf16. More would spill, as probabilities are fp64."""


ROW_BLOCK = 8 * NUM_WARPS * 32
"""Elements of a row that are summed at a time, on every GPU: it is a part of the order."""


@triton.jit
def _word(stream, element, ELEMS: tl.constexpr):
    """`reference_methods.uniform_words` of any elements, each from a counter of its own."""
    number = element.to(tl.uint64)
    counter = number // 64 * 16 + number % 16
    w0, w1, w2, w3 = four_words(stream, counter, ELEMS)
    which = number // 16 % 4
    low, high = tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3)
    return tl.where(which < 2, low, high)


@triton.jit
def _rank_part(
    operands, chances, stream, flag, model, first, start, inside,
    CODES: tl.constexpr, WIDE: tl.constexpr, RESCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    base, source, ranks, out = operands
    lane = tl.arange(0, BLOCK)
    real: tl.constexpr = tl.float64 if WIDE else tl.float32
    old = load_where(base, CODES[0], start, inside, True, BLOCK, 1, real)
    value = delta_of(source, CODES[1], 0, 1, model, old, start, inside, WIDE, BLOCK, 1)
    raise_where(magnitude(value), _INFINITY, flag, 1)
    rank = tl.load(ranks + start + lane, inside, 0, eviction_policy="evict_first")
    probability = tl.load(chances) + tl.load(chances + 1) * rank.to(tl.float64)
    word = _word(stream, first + start + lane, BLOCK).to(tl.float64)
    if RESCALE:
        scaled = (value.to(tl.float64) / tl.where(inside, probability, 1.0)).to(real)
    else:
        scaled = value
    kept = tl.where(word < probability * 4294967296.0, scaled, 0.0)
    tl.store(out + start + lane, kept, inside, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["model", "first", "elems"])
def rank_kernel(
    base, source, ranks, stream, chances, out, flag, model: tl.int32, first: tl.int64,
    elems: tl.int64,
    CODES: tl.constexpr, WIDE: tl.constexpr, RESCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = the deltas that are kept, fp32 or where WIDE fp64, and 0 for the others.

    ranks: int32 of each element, 0 for its row's least. chances: fp64, the least probability and
    what each rank adds. model: 1 where the source is one. first: the operands' first element's
    number in the tensor. *flag: set on a delta that is NaN or infinite.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    operands = (base, source, ranks, out)
    if start + BLOCK <= elems:
        _rank_part(
            operands, chances, stream, flag, model, first, start, tl.full((BLOCK,), 1, tl.int1),
            CODES, WIDE, RESCALE, BLOCK,
        )  # fmt: skip
    else:
        _rank_part(
            operands, chances, stream, flag, model, first, start,
            tl.arange(0, BLOCK) < elems - start, CODES, WIDE, RESCALE, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["model"])
def row_norms_kernel(
    base, source, masked, sums, model: tl.int32, row: tl.int64,
    CODES: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums[row] = sum |delta|, sum |masked|, sum masked**2 in fp64, in a fixed order; one program
    per row."""
    begin = tl.program_id(0).to(tl.int64) * row
    real: tl.constexpr = tl.float64 if WIDE else tl.float32
    zero = tl.full((BLOCK,), 0.0, tl.float64)
    before, after, square = zero, zero, zero
    for at in range(0, row, BLOCK):
        inside = tl.arange(0, BLOCK) < row - at
        old = load_where(base, CODES[0], begin + at, inside, True, BLOCK, 1, real)
        value = delta_of(source, CODES[1], 0, 1, model, old, begin + at, inside, WIDE, BLOCK, 1)
        before += tl.abs(value).to(tl.float64)
        left = tl.load(masked + begin + at + tl.arange(0, BLOCK), inside, 0.0).to(tl.float64)
        after += tl.abs(left)
        square += left * left
    mine = sums + 3 * tl.program_id(0).to(tl.int64)
    tl.store(mine, total_of(before))
    tl.store(mine + 1, total_of(after))
    tl.store(mine + 2, total_of(square))


def ranks_of(keys: torch.Tensor, row: int) -> torch.Tensor:
    """int32 ranks of keys within their rows: 0 for the least; of equal ones the last."""
    backwards = keys.reshape(-1, row).flip(1)
    order = backwards.sort(dim=1, stable=True).indices
    ranks = torch.empty_like(backwards)
    places = torch.arange(row, dtype=torch.int32, device=keys.device).expand_as(order)
    return ranks.scatter_(1, order, places).flip(1).reshape(-1).contiguous()


def keep_by_rank(
    base: Any, source: Any, codes: tuple[int, int], model: bool, wide: bool, ranks: torch.Tensor,
    row: int, low: float, span: float, rescale: bool, stream: list[int], first: int,
    flag: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """What `rank_kernel` makes of a source; base and source are bits.

    Args:
        low, span: as in `reference_methods.rank_probabilities`.
    """
    chances = [low, span / (row - 1)] if row > 1 else [low + span / 2, 0.0]
    device, elems, block = ranks.device, len(ranks), HELD * NUM_WARPS * warp_threads()
    out = torch.empty(elems, dtype=torch.float64 if wide else torch.float32, device=device)
    if elems:
        with on_device(ranks):
            rank_kernel[(triton.cdiv(elems, block),)](
                base, source, ranks, torch.tensor(stream).to(device),
                torch.tensor(chances, dtype=torch.float64).to(device), out, flag, int(model),
                first, elems, CODES=codes, WIDE=wide, RESCALE=rescale, BLOCK=block, **OPTIONS,
            )  # fmt: skip
    return out


def row_norms(
    base: Any, source: Any, codes: tuple[int, int], model: bool, wide: bool, masked: torch.Tensor,
    row: int,
) -> torch.Tensor:  # fmt: skip
    """fp64 (rows, 3): what `row_norms_kernel` says of a source and of what was kept of it."""
    rows = len(masked) // row
    sums = torch.zeros((rows, 3), dtype=torch.float64, device=masked.device)
    if rows:
        with on_device(masked):
            row_norms_kernel[(rows,)](
                base, source, masked, sums, int(model), row, CODES=codes, WIDE=wide,
                BLOCK=ROW_BLOCK, **fixed_block(),
            )  # fmt: skip
    return sums
