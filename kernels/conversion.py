"""Stored elements to blocks and back, compiled once for each dtype and shared by other kernels.

A block is a short fp32 or fp64 array that stays in the cache. Kernels that keep intermediate values
in blocks call these by address: an indirect call per thousand elements costs nothing, and no kernel
needs a variant for every mixture of dtypes.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

from .native import compiled
from .reference import STORAGE


@compiled("void(int64, int64, int64)")
def _reading(code: int, wide: bool) -> Any:
    from .elements import reader, store

    read, dtype = reader(code), np.float64 if wide else np.float32

    def function(address, n, block):  # type: ignore[no-untyped-def]
        for j in range(n):
            store(block, dtype, j, dtype(read(address, j)))

    return function


@compiled("int64(int64, int64, int64)")
def _writing(code: int, wide: bool) -> Any:
    from .elements import load, writer

    write, dtype = writer(code, wide), np.float64 if wide else np.float32

    def function(address, n, block):  # type: ignore[no-untyped-def]
        bad = np.uint32(0)
        for j in range(n):
            bad |= write(address, j, load(block, dtype, j))
        return np.int64(bad)

    return function


@functools.cache
def conversions(codes: tuple[int, ...], wide: bool) -> np.ndarray:
    """What kernels need to reach operands of these dtype codes: (len(codes), 2) int64.

    For each the address of a function (address, n, block), and the bytes of an element. Functions
    fill a block of fp64 (`wide`) or fp32 exactly; that of the last code rounds a block into
    elements, once, to nearest even, and returns whether any is NaN or infinite.
    """
    *read, written = codes
    functions: list[Any] = [*(_reading(code, wide) for code in read), _writing(written, wide)]
    return np.array(
        [
            (ctypes.cast(function, ctypes.c_void_p).value, STORAGE[code].itemsize)
            for function, code in zip(functions, codes, strict=True)
        ],
        np.int64,
    )
