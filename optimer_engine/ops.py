"""Tensor-level operations: validate meaning, choose an implementation, call a kernel.

The only module that imports kernels. An implementation asked for by name is used or refused, never
replaced silently; "auto" takes the fastest that runs here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from optimer_engine.errors import MismatchError, RecipeError
from optimer_engine.types import MERGEABLE, DType

Impl = Literal["auto", "cpu", "reference"]
Kernel = Callable[..., bool]

_CODE = {dtype: code for code, dtype in enumerate(MERGEABLE)}


def linear_kernel(impl: Impl = "auto") -> Kernel:
    """The fused linear merge on tiles, in the implementation asked for.

    Returns:
        kernel(base, base_dtype, sources, source_dtypes, is_delta, weights, out, out_dtype,
        add_base) -> whether any output element is NaN or infinite. Tiles are 1-D arrays in the
        storage dtypes of their DTypes; `out` is written. The mathematics is in
        `kernels.reference`.

    Raises:
        RecipeError: when there is no such implementation.
    """
    if impl in ("auto", "cpu"):
        from optimer_engine.kernels import cpu

        def run(base, base_dtype, sources, dtypes, is_delta, weights, out, out_dtype, add_base):  # type: ignore[no-untyped-def]
            codes = [_CODE[dtype] for dtype in dtypes]
            return cpu.linear(
                base, _CODE[base_dtype], sources, codes, is_delta, weights, out,
                _CODE[out_dtype], add_base,
            )  # fmt: skip

    elif impl == "reference":
        from optimer_engine.kernels import reference

        def run(base, base_dtype, sources, dtypes, is_delta, weights, out, out_dtype, add_base):  # type: ignore[no-untyped-def]
            codes = [_CODE[dtype] for dtype in dtypes]
            out[:] = reference.linear(
                base, _CODE[base_dtype], sources, codes, is_delta, weights, _CODE[out_dtype],
                add_base,
            )  # fmt: skip
            return bool(nonfinite(out, out_dtype).any())

    else:
        raise RecipeError(
            f"{impl!r} is no implementation", where="impl", todo="use auto, cpu or reference"
        )
    return run


def merge_tensors(
    base: Any,
    sources: Sequence[Any],
    weights: Sequence[float],
    *,
    deltas: bool = False,
    out_dtype: str | None = None,
    impl: Impl = "auto",
) -> Any:
    """round(base + sum_i w_i * (source_i - base)), one rounding, on whole tensors in memory.

    Args:
        base: a numpy array or CPU torch tensor, any shape; float16, bfloat16 (torch), float32 or
            float64.
        sources: like `base`, of its shape; dtypes may differ.
        weights: one finite number per source.
        deltas: the sources are distribution vectors tau_i, added as they are.
        out_dtype: default the base's.

    Returns:
        A new array of the base's kind and shape.

    Raises:
        MismatchError: for shapes or dtypes that do not fit; RecipeError: for weights.
    """
    if len(sources) != len(weights) or not all(math.isfinite(w) for w in weights):
        raise RecipeError(
            f"{len(weights)} weights for {len(sources)} sources; one finite number each expected"
        )
    for number, source in enumerate(sources):
        if tuple(source.shape) != tuple(base.shape):
            raise MismatchError(
                f"shape {tuple(source.shape)}, the base has {tuple(base.shape)}",
                where=f"source {number}",
            )
    flat_base, base_dtype = _storage(base)
    flat = [_storage(source) for source in sources]
    target = DType.parse(out_dtype) if out_dtype else base_dtype
    out = np.empty(flat_base.shape, target.storage)
    linear_kernel(impl)(
        flat_base,
        base_dtype,
        [tile for tile, _ in flat],
        [dtype for _, dtype in flat],
        [deltas] * len(flat),
        list(weights),
        out,
        target,
        True,
    )
    if isinstance(base, np.ndarray):
        values = out.view(np.float16) if target is DType.F16 else out
        return values.reshape(base.shape)
    return as_torch(out, target).reshape(base.shape)


def as_torch(tile: np.ndarray, dtype: DType) -> Any:
    """A tile as a torch tensor of `dtype` on the same memory."""
    import torch

    signed = tile.view(f"i{tile.itemsize}") if tile.dtype.kind == "u" else tile
    return torch.from_numpy(signed).view(getattr(torch, dtype.torch_name))


def nonfinite(tile: np.ndarray, dtype: DType) -> np.ndarray:
    """Which elements of a stored tile are NaN or infinite."""
    if dtype is DType.BF16:
        return (tile & 0x7F80) == 0x7F80
    return ~np.isfinite(tile.view(np.float16) if dtype is DType.F16 else tile)


def _storage(array: Any) -> tuple[np.ndarray, DType]:
    """Any array's bits, flat, with their DType."""
    dtype = next((d for d in MERGEABLE if d.torch_name == str(array.dtype).split(".")[-1]), None)
    if dtype is None:
        raise MismatchError(f"dtype {array.dtype} cannot be merged", where="tensor")
    if not isinstance(array, np.ndarray):
        import torch

        flat = array.detach().contiguous().reshape(-1)
        as_ints = flat.view(torch.int16) if dtype.itemsize == 2 else flat
        return as_ints.numpy().view(dtype.storage), dtype
    return np.ascontiguousarray(array).reshape(-1).view(dtype.storage), dtype
