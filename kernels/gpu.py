"""Linear merges in a GPU's memory: launches of the kernels in `kernels.triton_linear`.

Two ways to hand over tensors:

* `linear`, one tensor at a time, by arguments, which the hardware reads from its constant bank: no
  table to upload, so it suits large tensors and tiles that stream through a ring of buffers.
* `Batch`, thousands of tensors of any sizes at once, from a table of addresses in device memory, in
  one launch. Built once, it is launched again and again with other weights, which is what a search
  does.

A launch of its own for every norm and bias would cost far more than the merge of their few
kilobytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

from .triton_elements import INT8, ITEM_BYTES
from .triton_launch import (
    OPTIONS,
    TORCH_DTYPES,
    bits,
    flag_on,
    form,
    mask_of_models,
    on_device,
    packed_weights,
    with_nulls,
)
from .triton_linear import batch_kernel, linear_kernel

BATCH_WARPS = 2
"""Of a program of `Batch`: its blocks are small, so that little of a norm is a ragged end."""


def linear(
    base: torch.Tensor,
    base_code: int,
    sources: Sequence[Any],
    source_codes: Sequence[int],
    is_delta: Sequence[bool],
    weights: Sequence[float],
    out: torch.Tensor,
    out_code: int,
    add_base: bool = True,
    flag: torch.Tensor | None = None,
) -> torch.Tensor:
    """out = round(base + sum_i w_i delta_i), as `reference.linear` specifies, into `out`.

    Args:
        base, sources: 1-D, contiguous, equal length, on one device; of any dtypes of their codes'
            sizes. Starts that are multiples of 16 bytes make it fast. A source of code INT8 or INT4
            (`triton_elements`) is a delta given as a pair (packed numbers, bf16 scales) that begins
            with a group.
        out: 1-D, contiguous, same length; may be `base` itself when the dtypes are equal.
        flag: [1] int32 on that device, so that one serves many launches; by default a new one.

    Returns:
        The flag: 1 when any output element is NaN or infinite, else as it was. It is written on the
        current stream, and nothing here waits for that; `bool(...)` does.

    Raises:
        ValueError: for more than MAX_SOURCES sources, another number of weights, or a packed source
            that is said to be a model.
    """
    flag = flag_on(base.device) if flag is None else flag
    if any(code >= INT8 and not delta for code, delta in zip(source_codes, is_delta, strict=True)):
        raise ValueError("packed sources are deltas")
    elems, count = base.numel(), len(sources)
    operands, codes = with_nulls(base, sources), with_nulls(base_code, source_codes)
    constants = form(base_code, out_code, codes)
    packed = packed_weights(weights, count, len(operands), constants["WIDE"])
    if elems:
        with on_device(base):
            linear_kernel[(triton.cdiv(elems, constants["BLOCK"]),)](
                bits(base, base_code), bits(out, out_code),
                tuple(map(bits, operands, codes)), packed,
                mask_of_models(is_delta), count, flag, elems,
                ADD_BASE=add_base, **constants, **OPTIONS,
            )  # fmt: skip
    return flag


class Batch:
    """Many tensors of any sizes, merged by one launch for each mixture of dtypes among them.

    Args:
        bases, outs: one 1-D contiguous tensor per merged tensor, of TORCH_DTYPES, all on one
            device; an `out` may be its `base`.
        sources: for each merged tensor its sources, the same number everywhere, of its length.
        is_delta: for each source, whether it holds vectors tau_i instead of models theta_i.
        add_base: see `reference.linear`.

    Raises:
        ValueError: for more than MAX_SOURCES sources.
    """

    def __init__(
        self,
        bases: Sequence[torch.Tensor],
        sources: Sequence[Sequence[torch.Tensor]],
        is_delta: Sequence[bool],
        outs: Sequence[torch.Tensor],
        add_base: bool = True,
    ) -> None:
        self.tensors = (list(bases), [list(row) for row in sources], list(outs))
        """Kept, so that the addresses in the tables stay good."""
        self.is_delta, self.add_base = list(is_delta), add_base
        alike: dict[tuple, list[list[int]]] = {}
        for base, own, out in zip(*self.tensors, strict=True):
            if base.numel():
                operands = [base, out, *with_nulls(base, own)]
                addresses = [tensor.data_ptr() for tensor in operands]
                key = (
                    all(address % 16 == 0 for address in addresses),
                    *[TORCH_DTYPES.index(tensor.dtype) for tensor in operands],
                )
                alike.setdefault(key, []).append([base.numel(), *addresses])
        self.groups = [self._group(key, rows) for key, rows in alike.items()]

    def _group(self, key: tuple, rows: list[list[int]]) -> tuple:
        """(table, owners, compile-time arguments) of tensors that one launch can take."""
        aligned, base, out, *sources = key
        constants = form(base, out, sources, BATCH_WARPS)
        lengths = torch.tensor([triton.cdiv(row[0], constants["BLOCK"]) for row in rows])
        firsts = lengths.cumsum(0) - lengths
        table = torch.tensor(rows)
        table = torch.cat([table[:, :1], firsts[:, None], table[:, 1:]], 1)
        owners = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(lengths)
        device = self.tensors[0][0].device
        constants["SIZES"] = tuple(ITEM_BYTES[code] for code in constants["CODES"])
        constants |= {"ALIGNED": aligned, "ADD_BASE": self.add_base}
        return table.to(device), owners.to(device), constants

    def merge(self, weights: Sequence[float], flag: torch.Tensor | None = None) -> torch.Tensor:
        """Merge all of them with these weights; `flag` and what is returned are as in `linear`.

        Raises:
            ValueError: for another number of weights than of sources.
        """
        bases, count = self.tensors[0], len(self.is_delta)
        flag = flag_on(bases[0].device if bases else "cpu") if flag is None else flag
        for table, owners, constants in self.groups:
            places = len(constants["CODES"]) - 2
            with on_device(table):
                batch_kernel[(len(owners),)](
                    table, owners,
                    packed_weights(weights, count, places, constants["WIDE"]),
                    mask_of_models(self.is_delta), count, flag,
                    **constants, **OPTIONS | {"num_warps": BATCH_WARPS},
                )  # fmt: skip
        return flag
