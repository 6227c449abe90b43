"""The GPU kernels in Triton's interpreter, and operands to try them on."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from optimer_engine.kernels import reference

ROOT = Path(__file__).parents[2]
POISON = 0x7E
_TOP = (0x7F80, 0x7C00, 0x7F800000, 0x7FF0000000000000, 0x7E, 0x7C)
_QUIET = (0x40, 0x200, 0x400000, 0x8000000000000, 0, 0)


def interpreted(module):
    """A module of kernels/ once more, under another package's name, run by the interpreter.

    Triton settles which of the two when it defines a kernel, so this works whatever another test
    has imported before.
    """
    name = "interpreted_kernels"
    if name not in sys.modules:
        package = types.ModuleType(name)
        package.__path__ = [str(ROOT / "kernels")]
        sys.modules[name] = package
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return importlib.import_module(f"{name}.{module}")


def values(rng, elems, code, wild=False, scale=1.0):
    """Stored values; if `wild`, with zeros, denormals, huge numbers, infinities and NaNs."""
    numbers = rng.standard_normal(elems) * scale
    if wild and elems:
        special = [0.0, -0.0, 1e-40, -3e-8, 6e4, -3e38, np.inf, -np.inf, np.nan]
        where = rng.random(elems) < 0.1
        numbers[where] = rng.choice(special, where.sum())
    return reference.round_to(numbers, code)


def as_torch(array):
    """The same memory as a torch tensor of integers."""
    return torch.from_numpy(array if array.itemsize == 1 else array.view(f"i{array.itemsize}"))


def place(array, offset):
    """A copy that starts `offset` elements past an aligned address, in poisoned surroundings."""
    room = np.full((array.size + 128) * array.itemsize, POISON, np.uint8).view(array.dtype)
    skip = 64 + -room.ctypes.data % 64 // array.itemsize + offset
    room[skip : skip + array.size] = array
    return room, room[skip : skip + array.size]


def assert_same(got, want, code):
    """Equal to the bit; a NaN to itself or any quiet NaN."""
    bits, expected = (array.view(f"u{array.itemsize}") for array in (got, want))
    magnitude, quiet = (np.array(of[code], bits.dtype) for of in (_TOP, _QUIET))
    sign = np.array(1 << (8 * bits.itemsize - 1), bits.dtype)
    is_nan = (expected & ~sign) > magnitude
    assert np.array_equal(bits[~is_nan], expected[~is_nan])
    assert np.all((bits[is_nan] & ~sign) > magnitude)
    assert np.all(((bits[is_nan] & quiet) == quiet) | (bits[is_nan] == expected[is_nan]))
