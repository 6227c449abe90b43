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


@triton.jit(do_not_specialize=["rows", "columns"])
def lowrank_kernel(
    base, out, lefts, rights, ranks, strides, scales, weights, flag, rows: tl.int64,
    columns: tl.int64,
    CODES: tl.constexpr, AS_F32: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the matrix per program; neighbours in a row of tiles share the left factor.

    ranks: int64, of each adapter; strides: int64, four of each: left's and right's. CODES: of base,
    out and factors. AS_F32: widen the factors first, where the interpreter multiplies raw bits.
    """
    across = tl.cdiv(columns, BLOCK_N)
    first_row = tl.program_id(0).to(tl.int64) // across * BLOCK_M
    first_column = tl.program_id(0).to(tl.int64) % across * BLOCK_N
    row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    real: tl.constexpr = tl.float64 if WIDE else tl.float32
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, real)
    for i in tl.static_range(len(lefts)):
        rank = tl.load(ranks + i)
        left_row, left_k = tl.load(strides + 4 * i), tl.load(strides + 4 * i + 1)
        right_k, right_column = tl.load(strides + 4 * i + 2), tl.load(strides + 4 * i + 3)
        product = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
        for begin in range(0, rank, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            left = tl.load(
                lefts[i] + row[:, None] * left_row + k[None, :] * left_k,
                (row < rows)[:, None] & (k < rank)[None, :],
                0,
            )
            right = tl.load(
                rights[i] + k[:, None] * right_k + column[None, :] * right_column,
                (k < rank)[:, None] & (column < columns)[None, :],
                0,
            )
            product = tl.dot(
                _factor(left, CODES[2 + i], AS_F32),
                _factor(right, CODES[2 + i], AS_F32),
                product,
                input_precision="ieee",
            )
        total += weight(weights[i], WIDE) * (scales[i] * product).to(real)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
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
            raise ValueError(
                f"factors {tuple(left.shape)} and {tuple(right.shape)} for a matrix {(rows, columns)}"
            )
        if code not in (BF16, F16, F32):
            raise ValueError(f"factors of code {code}; bf16, fp16 or fp32 expected")
    wide = accumulates_in_fp64(base_code, [], out_code)
    packed = packed_weights(weights, len(adapters), len(adapters), wide)
    if not base.numel():
        return flag
    ranks = [a.left.shape[1] for a in adapters]
    strides = [[*a.left.stride(), *a.right.stride()] for a in adapters]
    single = any(a.code == F32 for a in adapters)
    m, n, k = (32, 32, 16) if single or wide else (64, 64, 16 if max(ranks, default=0) <= 16 else 32)
    with on_device(base):
        lowrank_kernel[(triton.cdiv(rows, m) * triton.cdiv(columns, n),)](
            bits(base, base_code), bits(out, out_code),
            tuple(bits(a.left, a.code) for a in adapters),
            tuple(bits(a.right, a.code) for a in adapters),
            torch.tensor(ranks or [0]).to(base.device), torch.tensor(strides or [0]).to(base.device),
            tuple(float(a.scale) for a in adapters), packed, flag, rows, columns,
            CODES=(base_code, out_code, *(a.code for a in adapters)), AS_F32=INTERPRETED,
            WIDE=wide, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, **OPTIONS,
        )  # fmt: skip
    return flag
