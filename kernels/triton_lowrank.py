"""LoRA adapters merged into a matrix on a GPU: B A is formed tile by tile in registers.

    tau_i = s_i * (B_i A_i)         B_i [rows, r_i], A_i [r_i, columns] (LoRA, arXiv 2106.09685)
    out   = round(base + sum_i w_i * tau_i)

HBM sees the base and the output once and the factors, which are small, a few times from its cache.
The product would take as much memory as the model. The sum over i is that of `reference.linear`:
in the order given, in fp32 (fp64 for a wide output), multiply and add apart. Within a product,
terms are exact and summed in fp32 in the tensor cores' own order, so B A agrees with the CPU's to
fp32 rounding, not to the bit.

16-bit factors go to the tensor cores as they are. fp32 factors, which PEFT saves, are multiplied
as fp32 without rounding to tf32: exact, and far slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .reference import BF16, F16, F32, accumulates_in_fp64
from .triton_elements import report_nonfinite, rounded, upcast, weight
from .triton_launch import (
    INTERPRETED,
    MAX_SOURCES,
    bits,
    flag_on,
    on_device,
    packed_weights,
)

MAX_RANK = 1024

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False, "num_stages": 2}

_BF16, _F16, _F32 = map(tl.constexpr, (BF16, F16, F32))


class Factors(NamedTuple):
    """One adapter of a matrix: scale * (left @ right).

    Attributes:
        left, right: (rows, r) and (r, columns), both of dtype code `code`: BF16, F16 or F32; any
            strides.
    """

    left: torch.Tensor
    right: torch.Tensor
    code: int
    scale: float


@triton.jit
def _factor(stored, CODE: tl.constexpr, AS_F32: tl.constexpr):
    """Elements of a factor as the tensor cores take them."""
    if AS_F32 or CODE == _F32:
        return upcast(stored, CODE, tl.float32)
    elif CODE == _BF16:
        return stored.to(tl.bfloat16, bitcast=True)
    else:
        return stored.to(tl.float16, bitcast=True)


@triton.jit
def _number(entry, EIGHTS: tl.constexpr):
    """An int64 of a table, known to be a multiple of 8 where EIGHTS."""
    value = tl.load(entry)
    return tl.multiple_of(value, 8) if EIGHTS else value


@triton.jit
def _part(
    factor, first_row, first_column, rows, columns, apart,
    BY_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS x COLUMNS of a rows x columns factor; its rows, or else its columns, lie `apart`.

    Offsets within the part are 32 bits wide, which takes half the registers.
    """
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (row < rows - first_row)[:, None] & (column < columns - first_column)[None, :]
    if BY_ROW:
        start = factor + first_row * apart + first_column
        at = row[:, None] * apart.to(tl.int32) + column[None, :]
    else:
        start = factor + first_column * apart + first_row
        at = row[:, None] + column[None, :] * apart.to(tl.int32)
    return tl.load(start + at, inside, 0)


@triton.jit(do_not_specialize=["rows"])
def lowrank_kernel(
    base, out, lefts, rights, table, scales, weights, flag, rows: tl.int64, columns: tl.int64,
    CODES: tl.constexpr, BY_ROW: tl.constexpr, EIGHTS: tl.constexpr, AS_F32: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the matrix per program; neighbours in a row of tiles share the left factor.

    table: int64, three of each adapter: its rank, and what separates the rows (where BY_ROW, for
    each factor) or columns of left and of right. CODES: of base, out and factors. EIGHTS: all of
    the table, and `columns`, are multiples of 8. AS_F32: widen the factors first, where the
    interpreter multiplies raw bits.
    """
    first_column = tl.program_id(0).to(tl.int64) * BLOCK_N
    first_row = tl.program_id(1).to(tl.int64) * BLOCK_M
    real: tl.constexpr = tl.float64 if WIDE else tl.float32
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, real)
    for i in tl.static_range(len(lefts)):
        rank = _number(table + 3 * i, EIGHTS)
        left_apart, right_apart = (
            _number(table + 3 * i + 1, EIGHTS),
            _number(table + 3 * i + 2, EIGHTS),
        )
        product = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
        for k in range(0, rank.to(tl.int32), BLOCK_K):
            left = _part(
                lefts[i], first_row, k, rows, rank, left_apart, BY_ROW[2 * i], BLOCK_M, BLOCK_K
            )
            right = _part(
                rights[i], k, first_column, rank, columns, right_apart, BY_ROW[2 * i + 1], BLOCK_K,
                BLOCK_N,
            )  # fmt: skip
            product = tl.dot(
                _factor(left, CODES[2 + i], AS_F32),
                _factor(right, CODES[2 + i], AS_F32),
                product,
                input_precision="ieee",
            )
        total += weight(weights[i], WIDE) * (scales[i] * product).to(real)
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = (row < rows - first_row)[:, None] & (column < columns - first_column)[None, :]
    at = first_row * columns + first_column + row[:, None] * columns + column[None, :]
    old = upcast(tl.load(base + at, inside, 0, eviction_policy="evict_first"), CODES[0], real)
    stored = rounded(tl.where(total == 0.0, old, old + total), CODES[1])
    report_nonfinite(tl.reshape(stored, (BLOCK_M * BLOCK_N,)), CODES[1], flag, 1)
    tl.store(out + at, stored, inside, eviction_policy="evict_first")


def low_rank(
    base: torch.Tensor,
    base_code: int,
    adapters: Sequence[Factors],
    weights: Sequence[float],
    out: torch.Tensor,
    out_code: int,
    flag: torch.Tensor | None = None,
) -> torch.Tensor:
    """out = round(base + sum_i w_i s_i left_i right_i); see the module docstring.

    Args:
        base, out: (rows, columns), contiguous, of their codes' dtypes or any of the same size; may
            be one tensor.
        flag: as in `gpu.linear`.

    Returns:
        The flag: 1 when any output element is NaN or infinite.

    Raises:
        ValueError: for more than MAX_SOURCES adapters or another number of weights, factors that do
            not fit the base, a rank above MAX_RANK, or factors that are not bf16, fp16 or fp32.
    """
    flag = flag_on(base.device) if flag is None else flag
    if len(adapters) > MAX_SOURCES:
        raise ValueError(f"{len(adapters)} adapters in one launch; at most {MAX_SOURCES} fit")
    rows, columns = base.shape
    for left, right, code, _ in adapters:
        rank = left.shape[1]
        if (left.shape, right.shape) != ((rows, rank), (rank, columns)) or rank > MAX_RANK:
            shapes = f"{tuple(left.shape)} and {tuple(right.shape)}"
            raise ValueError(f"factors {shapes} for a matrix {(rows, columns)}")
        if code not in (BF16, F16, F32):
            raise ValueError(f"factors of code {code}; bf16, fp16 or fp32 expected")
    wide = accumulates_in_fp64(base_code, [], out_code)
    packed = packed_weights(weights, len(adapters), len(adapters), wide)
    if not base.numel():
        return flag
    by_row, table = [], []
    for left, right, _, _ in adapters:
        for factor in (left, right):
            if 1 not in factor.stride() and min(factor.shape) > 1:
                raise ValueError(
                    f"a factor with strides {factor.stride()}; rows or columns expected"
                )
            by_row.append(factor.stride(1) == 1)
        table += [left.shape[1], *(max(factor.stride()) for factor in (left, right))]
    single = any(a.code == F32 for a in adapters)
    narrow = max(table[::3], default=0) <= 16
    m, n, k = (32, 32, 16) if single or wide else (64, 64, 16 if narrow else 32)
    with on_device(base):
        lowrank_kernel[(triton.cdiv(columns, n), triton.cdiv(rows, m))](
            bits(base, base_code), bits(out, out_code),
            tuple(bits(a.left, a.code) for a in adapters),
            tuple(bits(a.right, a.code) for a in adapters),
            torch.tensor(table or [0]).to(base.device, non_blocking=True),
            tuple(float(a.scale) for a in adapters), packed, flag, rows, columns,
            CODES=(base_code, out_code, *(a.code for a in adapters)), BY_ROW=tuple(by_row),
            EIGHTS=not any(number % 8 for number in (*table, columns)), AS_F32=INTERPRETED,
            WIDE=wide, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, **OPTIONS,
        )  # fmt: skip
    return flag
