"""Merges in a GPU's memory: launches of the kernels in `kernels.triton_linear`.

Two ways to hand over tensors:

* `linear`, one tensor at a time, by arguments, which the hardware reads from its constant bank: no
  table to upload, so it suits large tensors and tiles that stream through a ring of buffers.
* `Batch`, thousands of tensors of any sizes at once, from a table of addresses in device memory, in
  one launch of as many programs as the GPU holds at once. Built once, it is launched again and
  again with other weights, which is what a search does.

A launch of its own for every norm and bias would cost far more than the merge of their few
kilobytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton

from .triton_linear import (
    OPTIONS,
    TRITON_DTYPES,
    batch_kernel,
    constexprs,
    linear_kernel,
    with_nulls,
)

TORCH_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""What each dtype code of `kernels.reference` is called in torch."""


def linear(
    base: torch.Tensor,
    base_code: int,
    sources: Sequence[torch.Tensor],
    source_codes: Sequence[int],
    is_delta: Sequence[bool],
    weights: Sequence[float],
    out: torch.Tensor,
    out_code: int,
    add_base: bool = True,
) -> bool:
    """out = round(base + sum_i w_i delta_i), as `reference.linear` specifies, into `out`.

    Args:
        base, sources: 1-D, contiguous, equal length, on one device; of the dtypes of their codes,
            or any of the same size. Starts that are multiples of 16 bytes make it fast.
        out: 1-D, contiguous, same length; may be `base` itself when the dtypes are equal.

    Returns:
        True when any output element is NaN or infinite. To know, it waits for the GPU; `enqueue`
        does not.

    Raises:
        ValueError: for more than MAX_SOURCES sources, or another number of weights.
    """
    flag = torch.zeros(1, dtype=torch.int32, device=base.device)
    enqueue(
        base, base_code, sources, source_codes, is_delta, weights, out, out_code, add_base, flag
    )
    return bool(flag.item())


def enqueue(
    base: torch.Tensor,
    base_code: int,
    sources: Sequence[torch.Tensor],
    source_codes: Sequence[int],
    is_delta: Sequence[bool],
    weights: Sequence[float],
    out: torch.Tensor,
    out_code: int,
    add_base: bool,
    flag: torch.Tensor,
) -> None:
    """`linear` on the current stream, without waiting; `flag` ([1] int32) becomes 1 if nonfinite.

    `flag` is never cleared, so that one serves many launches.
    """
    elems = base.numel()
    if elems == 0:
        return
    base = base.view(TORCH_DTYPES[base_code])
    typed = [t.view(TORCH_DTYPES[code]) for t, code in zip(sources, source_codes, strict=True)]
    operands = with_nulls(base, typed)
    codes = [TORCH_DTYPES.index(operand.dtype) for operand in operands]
    constants = constexprs(base_code, codes, out_code, add_base, _warp_threads())
    with _on_device(base):
        linear_kernel[(triton.cdiv(elems, constants["BLOCK"]),)](
            base,
            tuple(operands),
            _pack(weights, len(typed), len(operands), constants["WIDE"]),
            _mask_of_models(is_delta),
            len(typed),
            out.view(TORCH_DTYPES[out_code]),
            flag,
            elems,
            **constants,
            **OPTIONS,
        )


class Batch:
    """Many tensors of any sizes, merged by one launch for each mixture of dtypes among them.

    Args:
        bases, outs: one 1-D contiguous tensor per merged tensor, bf16, fp16, fp32 or fp64, all on
            one device; an `out` may be its `base`.
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
        """(table, owners, blocks, compile-time arguments) of tensors that one launch can take."""
        aligned, base, out, *sources = key
        constants = constexprs(base, sources, out, self.add_base, _warp_threads())
        lengths = torch.tensor([triton.cdiv(row[0], constants["BLOCK"]) for row in rows])
        firsts = lengths.cumsum(0) - lengths
        table = torch.tensor(rows)
        table = torch.cat([table[:, :1], firsts[:, None], table[:, 1:]], 1)
        owners = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(lengths)
        device = self.tensors[0][0].device
        constants |= {
            "BASE": TRITON_DTYPES[base],
            "SOURCES": tuple(TRITON_DTYPES[code] for code in sources),
            "OUT": TRITON_DTYPES[out],
            "ALIGNED": aligned,
        }
        return table.to(device), owners.to(device), len(owners), constants

    def merge(self, weights: Sequence[float]) -> bool:
        """Merge all of them; True when any output element is NaN or infinite.

        Raises:
            ValueError: for another number of weights than of sources.
        """
        if not self.groups:
            return False
        flag = torch.zeros(1, dtype=torch.int32, device=self.tensors[0][0].device)
        self.enqueue(weights, flag)
        return bool(flag.item())

    def enqueue(self, weights: Sequence[float], flag: torch.Tensor) -> None:
        """`merge` on the current stream, without waiting; see `enqueue` for `flag`."""
        for table, owners, blocks, constants in self.groups:
            with _on_device(table):
                batch_kernel[(min(blocks, _resident_programs(table)),)](
                    table,
                    owners,
                    blocks,
                    _pack(
                        weights,
                        len(self.is_delta),
                        len(constants["SOURCES"]),
                        constants["WIDE"],
                    ),
                    _mask_of_models(self.is_delta),
                    len(self.is_delta),
                    flag,
                    **constants,
                    **OPTIONS,
                )


def _pack(weights: Sequence[float], count: int, places: int, wide: bool) -> tuple:
    """The weights as kernel arguments, with zeros for null sources.

    Triton passes a Python float as fp32. An fp64 weight therefore travels as the halves of its bit
    pattern, each made odd and larger than 32 bits, since Triton compiles anew for integers that are
    short, 1 or multiples of 16.
    """
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} sources")
    padded = [*map(float, weights), *[0.0] * (places - count)]
    if not wide:
        return tuple(padded)
    bits = [struct.unpack("<II", struct.pack("<d", weight)) for weight in padded]
    return tuple(tuple((1 << 40) | (half << 1) | 1 for half in (high, low)) for low, high in bits)


def _mask_of_models(is_delta: Sequence[bool]) -> int:
    return sum(1 << i for i, delta in enumerate(is_delta) if not delta)


def _warp_threads() -> int:
    return 64 if torch.version.hip else 32


def _resident_programs(tensor: torch.Tensor) -> int:
    """Programs that the tensor's GPU runs at once: 2048 threads on each multiprocessor."""
    if not tensor.is_cuda:
        return 3
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count * 8


def _on_device(tensor: torch.Tensor) -> AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
