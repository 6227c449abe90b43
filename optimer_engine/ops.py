"""Tensor-level operations: validate meaning, choose an implementation, call a kernel.

The only module that imports kernels. An implementation asked for by name is used or refused, never
replaced silently; "auto" takes the fastest that runs where the tensors are: "triton" for those in a
GPU's memory, "cpu" for all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from optimer_engine.errors import MismatchError, MissingExtraError, RecipeError
from optimer_engine.types import MERGEABLE, DType

Impl = Literal["auto", "triton", "cpu", "reference"]
Kernel = Callable[..., bool]

_CODE = {dtype: code for code, dtype in enumerate(MERGEABLE)}
_PACKED = {8: 6, 4: 7}


def code(dtype: DType, packed_bits: int = 0) -> int:
    """The kernels' number of a dtype, or of a packed vector's form."""
    return _PACKED[packed_bits] if packed_bits else _CODE[dtype]


def linear_kernel(impl: Impl = "auto") -> Kernel:
    """The fused linear merge on tiles, in the implementation asked for.

    Returns:
        kernel(base, base_dtype, sources, source_dtypes, is_delta, weights, out, out_dtype,
        add_base) -> whether any output element is NaN or infinite. Tiles are 1-D arrays in the
        storage dtypes of their DTypes, for "triton" torch tensors on a GPU; `out` is written. The
        mathematics is in `kernels.reference`.

    Raises:
        RecipeError: when there is no such implementation, or no GPU for it.
        MissingExtraError: when triton is not installed.
    """
    merge = _implementation(impl)

    def run(base, base_dtype, sources, dtypes, is_delta, weights, out, out_dtype, add_base):  # type: ignore[no-untyped-def]
        codes = [_CODE[dtype] for dtype in dtypes]
        return merge(
            base, _CODE[base_dtype], sources, codes, is_delta, weights, out, _CODE[out_dtype],
            add_base,
        )  # fmt: skip

    return run


def round_stochastically(
    values: np.ndarray, out: np.ndarray, start: int, stream: list[int]
) -> bool:
    """fp32 to bf16 by chance; see `kernels.stochastic`."""
    from optimer_engine.kernels import stochastic

    return stochastic.round_stochastically(values, out, start, stream)


def _implementation(impl: Impl) -> Kernel:
    """The kernel, by dtype codes instead of DTypes."""
    if impl in ("auto", "cpu"):
        from optimer_engine.kernels import cpu

        return cpu.linear
    if impl == "triton":
        return _triton_linear()
    if impl == "reference":
        from optimer_engine.kernels import reference

        def run(base, base_code, sources, codes, is_delta, weights, out, out_code, add_base):  # type: ignore[no-untyped-def]
            out[:] = reference.linear(
                base, base_code, sources, codes, is_delta, weights, out_code, add_base
            )
            return bool(nonfinite(out, MERGEABLE[out_code]).any())

        return run
    raise RecipeError(
        f"{impl!r} is no implementation", where="impl", todo="use auto, triton, cpu or reference"
    )


class GpuKernels(NamedTuple):
    """What merges tensors in a GPU's memory, by dtype codes; see `kernels.gpu` and its siblings."""

    linear: Callable[..., Any]
    low_rank: Callable[..., Any]
    factors: Callable[..., Any]
    max_rank: int
    unpack: Callable[..., Any]
    same: int


def gpu_kernels() -> GpuKernels:
    """The GPU's kernels, or what is missing for them.

    Raises:
        MissingExtraError: when triton is not installed. RecipeError: when there is no GPU.
    """
    import torch

    try:
        from optimer_engine.kernels import gpu, reference_packed, triton_lowrank, triton_packed
    except ImportError as error:
        raise MissingExtraError(
            f"triton cannot be imported ({error})",
            where="impl triton",
            todo="pip install 'optimer-engine[gpu]' on Linux, or merge in main memory",
        ) from error
    if not torch.cuda.is_available():
        raise RecipeError(
            "torch finds no CUDA or ROCm device here",
            where="impl triton",
            todo="install torch for your GPU, or use impl cpu",
        )
    return GpuKernels(
        gpu.linear, triton_lowrank.low_rank, triton_lowrank.Factors, triton_lowrank.MAX_RANK,
        triton_packed.unpack_exact, reference_packed.SAME,
    )  # fmt: skip


def _triton_linear() -> Kernel:
    """The GPU kernel for tensors that all are on one GPU."""
    linear = gpu_kernels().linear

    def run(base, base_code, sources, codes, is_delta, weights, out, out_code, add_base):  # type: ignore[no-untyped-def]
        places = {str(getattr(array, "device", "main memory")) for array in (base, *sources, out)}
        if len(places) > 1 or not _on_gpu(base):
            raise RecipeError(
                f"tensors in {', '.join(sorted(places))}; all on one GPU expected",
                where="impl triton",
                todo="move them to one GPU",
            )
        return linear(base, base_code, sources, codes, is_delta, weights, out, out_code, add_base)

    return run


def _on_gpu(array: Any) -> bool:
    return bool(getattr(array, "is_cuda", False))


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
        base: a numpy array or torch tensor, any shape; float16, bfloat16 (torch), float32 or
            float64. A tensor on a GPU is merged there.
        sources: like `base`, of its shape and on its device; dtypes may differ.
        weights: one finite number per source.
        deltas: the sources are distribution vectors tau_i, added as they are.
        out_dtype: default the base's.

    Returns:
        A new array of the base's kind and shape.

    Raises:
        MismatchError: for shapes or dtypes that do not fit.
        RecipeError: for weights, and for tensors that are not where `impl` works.
        MissingExtraError: when the implementation is not installed.
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
    arrays = (base, *sources)
    dtypes = [_dtype(array) for array in arrays]
    target = DType.parse(out_dtype) if out_dtype else dtypes[0]
    if impl == "auto" and any(_on_gpu(array) for array in arrays):
        impl = "triton"
    kernel = linear_kernel(impl)
    tiles: list[Any]
    out: Any
    if impl == "triton":
        import torch

        tiles = [torch.as_tensor(array).detach().contiguous().reshape(-1) for array in arrays]
        out = torch.empty_like(tiles[0], dtype=getattr(torch, target.torch_name))
    else:
        tiles = [_storage(array, dtype) for array, dtype in zip(arrays, dtypes, strict=True)]
        out = np.empty(tiles[0].shape, target.storage)
    deltas_or_models = [deltas] * len(sources)
    kernel(
        tiles[0], dtypes[0], tiles[1:], dtypes[1:], deltas_or_models, list(weights), out, target,
        True,
    )  # fmt: skip
    if impl == "triton":
        return out.reshape(base.shape)
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
    if dtype is DType.F8_E4M3:  # one NaN of each sign, no infinities
        return (tile & 0x7F) == 0x7F
    if dtype is DType.F8_E5M2:
        return (tile & 0x7C) == 0x7C
    return ~np.isfinite(tile.view(np.float16) if dtype is DType.F16 else tile)


def _dtype(array: Any) -> DType:
    """The DType of a numpy array or torch tensor."""
    name = str(array.dtype).removeprefix("torch.")
    dtype = next((d for d in MERGEABLE if d.torch_name == name), None)
    if dtype is None:
        raise MismatchError(f"dtype {array.dtype} cannot be merged", where="tensor")
    return dtype


def _storage(array: Any, dtype: DType) -> np.ndarray:
    """Any array's bits in main memory, flat."""
    if _on_gpu(array):
        raise RecipeError(
            f"a tensor is on {array.device}; main memory expected",
            where="impl",
            todo="move it there, or use impl auto",
        )
    if not isinstance(array, np.ndarray):
        import torch

        flat = array.detach().contiguous().reshape(-1)
        narrow = {1: torch.uint8, 2: torch.int16}.get(dtype.itemsize)
        as_ints = flat if narrow is None else flat.view(narrow)
        return as_ints.numpy().view(dtype.storage)
    return np.ascontiguousarray(array).reshape(-1).view(dtype.storage)
