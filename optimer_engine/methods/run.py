"""Merge tensors that are in memory by any method: what the engine does with files, on arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optimer_engine.errors import MismatchError, NonFiniteError
from optimer_engine.methods.protocol import GRANULE, Operand, Pass, Tile, prepare
from optimer_engine.methods.registry import get
from optimer_engine.tensor_recipe import Ref, TensorRecipe
from optimer_engine.types import DType

TILE_ELEMS = 16 * GRANULE


def merge_arrays(
    method: str,
    base: Any,
    sources: Sequence[Any],
    shared: Mapping[str, Any] | None = None,
    per_source: Sequence[Mapping[str, Any]] | None = None,
    *,
    tile_elems: int = TILE_ELEMS,
    out_dtype: str | None = None,
    deltas: bool | Sequence[bool] = False,
    name: str = "tensor",
) -> Any:
    """Merge whole tensors in main memory as `optimer_engine.methods` defines `method`.

    Args:
        base: numpy array (float16, float32, float64) or torch tensor (bfloat16 and 8-bit floats
            too), any shape; None for methods without one.
        sources: like `base`, of its shape; dtypes may differ.
        shared, per_source: the method's parameters; one mapping per source.
        tile_elems: elements per tile, raised to the method's unit; the result does not depend on
            it.
        out_dtype: default the base's, or the first source's.
        deltas: whether sources are stored deltas; for all, or for each.
        name: of the tensor; random masks depend on it.

    Returns:
        A new array of the kind and shape of the first input; a torch tensor where numpy has no such
        dtype.

    Raises:
        RecipeError: for an unknown method, unusable parameters, or a wrong number of sources.
        MismatchError: for shapes or dtypes that do not fit.
        NonFiniteError: for NaN or infinity in an input or in the result.
    """
    given = ([] if base is None else [base]) + list(sources)
    kind = get(method)
    settings = kind.settings(
        dict(shared or {}), [dict(p) for p in per_source or [{}] * len(sources)]
    )
    if not given:
        raise MismatchError("no tensor is given", where=f"method {method}")
    shape = tuple(given[0].shape)
    for number, array in enumerate(given):
        if tuple(array.shape) != shape:
            raise MismatchError(
                f"shape {tuple(array.shape)}, {shape} expected", where=f"input {number}"
            )
    stored = [_stored(array) for array in given]
    is_delta = [deltas] * len(sources) if isinstance(deltas, bool) else list(deltas)
    dtype = DType.parse(out_dtype) if out_dtype else stored[0][1]
    refs = tuple(Ref(number + 1, name) for number in range(len(sources)))
    recipe = TensorRecipe(
        name, shape, dtype, method, settings, None if base is None else Ref(0, name), refs
    )
    kind.check(recipe)
    count = math.prod(shape)
    unit = kind.unit(recipe)
    step = max(1, tile_elems // unit) * unit

    def tiles() -> list[Tile]:
        cut = []
        for start in range(0, count, step):
            stop = min(start + step, count)
            parts = [Operand(data[start:stop], code) for data, code in stored]
            with_deltas = [
                Operand(part.data, part.dtype, delta)
                for part, delta in zip(parts[len(given) - len(sources) :], is_delta, strict=True)
            ]
            first = None if base is None else parts[0]
            cut.append(Tile(recipe, start, stop, first, tuple(with_deltas)))
        return cut

    def execute(wanted: Pass) -> Any:
        accumulator = wanted.start()
        for tile in tiles():
            wanted.map(tile, accumulator)
        return wanted.finish([accumulator])

    out = np.empty(count, dtype.storage)
    state = prepare(kind, recipe, execute)
    if any(kind.merge(tile, state, out[tile.start : tile.stop]) for tile in tiles()):
        raise NonFiniteError(
            "NaN or infinity in an input, or in the result", where=f"method {method}, {name}"
        )
    return _like(given[0], out, dtype).reshape(shape)


def _stored(array: Any) -> tuple[np.ndarray, DType]:
    """An array's bits, flat, and their dtype."""
    name = str(array.dtype).removeprefix("torch.")
    dtype = next((d for d in DType if d.torch_name == name and d.code[0] in "FB"), None)
    if dtype is None or dtype is DType.BOOL:
        raise MismatchError(f"dtype {array.dtype} cannot be merged", where="tensor")
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array).reshape(-1).view(dtype.storage), dtype
    import torch

    flat = array.detach().cpu().contiguous().reshape(-1)
    if dtype.itemsize < 4:
        flat = flat.view({1: torch.uint8, 2: torch.int16}[dtype.itemsize])
    return flat.numpy().view(dtype.storage), dtype


def _like(array: Any, out: np.ndarray, dtype: DType) -> Any:
    """`out` as the kind of tensor that `array` is."""
    if isinstance(array, np.ndarray) and dtype in (DType.F16, DType.F32, DType.F64):
        return out.view(np.float16) if dtype is DType.F16 else out
    import torch

    signed = out.view(np.int16) if dtype.itemsize == 2 else out
    return torch.from_numpy(signed).view(getattr(torch, dtype.torch_name))
