"""NaN and infinity: refused with their place, unless they are to be kept, or overflow clamped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np

from optimer_engine import ops
from optimer_engine.errors import NonFiniteError, quoted
from optimer_engine.kernels import reference
from optimer_engine.runs import Run
from optimer_engine.types import DType

_LARGEST = {
    DType.BF16: (0x8000, 0x7F7F), DType.F16: (0x8000, 0x7BFF),
    DType.F8_E5M2: (0x80, 0x7B), DType.F8_E4M3: (0x80, 0x7E),
}  # fmt: skip
"""Bit of the sign, and bits of the largest number, of dtypes whose tiles hold bits."""


def amend(run: Run, tiles: Sequence[np.ndarray], out: np.ndarray, keep: bool, clamp: bool) -> int:
    """Make of a weighted sum that met NaN or infinity what the user asked for.

    Args:
        tiles: of the run's operands, the base first; out: their sum, which is changed in place.
        keep: what is NaN or infinite in an input is so in the output: the base's own bits where no
            source departs from them, else what the sum gives.
        clamp: a sum of finite inputs that is too large becomes the dtype's largest number.

    Returns:
        How many elements were kept or clamped; 0 where something is to be refused.
    """
    given = np.zeros(out.shape, bool)
    for tile, operand in zip(tiles, run.operands, strict=True):
        given |= ops.nonfinite(tile, operand.dtype)
    beyond = ops.nonfinite(out, run.out.dtype) & ~given
    if (given.any() and not keep) or (beyond.any() and not clamp):
        return 0
    if run.base is not None:
        same = given.copy()
        for tile, (_, source) in zip(tiles[1:], run.sources, strict=True):
            if source.is_delta:
                same &= tile == 0
            elif source.dtype is run.base.dtype:
                same &= (_bits(tile) == _bits(tiles[0])).all(1)
            else:
                same[:] = False
        wide = reference.upcast(tiles[0][same], ops.code(run.base.dtype), np.float64)
        out[same] = reference.round_to(wide, ops.code(run.out.dtype))
    if run.out.dtype in _LARGEST:
        sign, largest = _LARGEST[run.out.dtype]
        out[beyond] = (out[beyond] & sign) | largest
    else:
        out[beyond] = np.copysign(np.finfo(out.dtype).max, out[beyond])
    return int(given.sum() + beyond.sum())


def _bits(tile: np.ndarray) -> np.ndarray:
    return tile.view(np.uint8).reshape(tile.size, -1)


def refuse(
    run: Run, start: int, stop: int, tiles: Sequence[np.ndarray], name: Callable[[int], str]
) -> NoReturn:
    """Say which input, or the sum, holds NaN or infinity in elements start..stop of a run.

    Args:
        name: of the source of a number.

    Raises:
        NonFiniteError: always.
    """
    names = [] if run.base is None else ["base"]
    names += [name(number) for number, _ in run.sources]
    for label, operand, values in zip(names, run.operands, tiles, strict=True):
        for info, first, low, high in run.parts(start, stop):
            bad = ops.nonfinite(values[low - start : high - start], operand.dtype)
            if bad.any():
                raise NonFiniteError(
                    f"{quoted(info.name)} holds NaN or infinity: first at element"
                    f" {first + int(bad.argmax())}, {np.count_nonzero(bad)} in this tile;"
                    " finite numbers expected",
                    where=label,
                    todo="repair or leave out this source, or keep them with --allow-nonfinite",
                )
    tensors = ", ".join(quoted(info.name) for info, *_ in run.parts(start, stop))
    raise NonFiniteError(
        f"{tensors}: the merged values are too large for {run.out.dtype.torch_name}",
        where="output",
        todo="use smaller weights, out_dtype: float32, or --on-overflow clamp",
    )
