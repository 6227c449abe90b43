"""The words of the format: what a header says of a vector and of each packed tensor in it.

A packed tensor has no entry of its own in a file. The file's metadata describes it, one line of
text under the key "tensor:NAME", and its bytes lie in ordinary safetensors entries called
NAME::PART, in the same file:

    exact T D SHAPE      stream, index      T: dtype of the trained tensor; D: of the base's
    int8 SHAPE           q, scale
    int4 SHAPE           q, scale
    lowrank SCALE SHAPE  a, b               tau = SCALE * b @ a
    zero SHAPE           (none)             tau = 0

SHAPE is "scalar" or dimensions joined by "x". An entry without such a description is a delta stored
as it is, in its own dtype.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from optimer_engine.types import DTYPE_OF_CODE, DType

VERSION = "1"
MODES = ("exact", "float32", "bf16", "int8", "int4", "lowrank")

TENSOR = "tensor:"
"""Prefix of the metadata keys that describe packed tensors."""

PARTS = {
    "exact": ("stream", "index"),
    "int8": ("q", "scale"),
    "int4": ("q", "scale"),
    "lowrank": ("a", "b"),
    "zero": (),
}

CODES = (DType.BF16, DType.F16, DType.F32, DType.F64, DType.F8_E4M3, DType.F8_E5M2)
"""In the order of the kernels' dtype codes: the dtypes whose values the kernels know."""


@dataclass(frozen=True)
class Description:
    """One packed tensor, as its file's metadata has it.

    Attributes:
        mode: a key of PARTS.
        dtype: what decoding gives: the trained dtype for exact, else fp32.
        base_dtype: for exact, the base tensor's.
        scale: for lowrank.
    """

    mode: str
    shape: tuple[int, ...]
    dtype: DType = DType.F32
    base_dtype: DType = DType.F32
    scale: float = 1.0

    @property
    def elems(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def text(self) -> str:
        """The line of metadata."""
        words = [self.mode]
        if self.mode == "exact":
            words += [self.dtype.code, self.base_dtype.code]
        if self.mode == "lowrank":
            words.append(repr(self.scale))
        return " ".join([*words, "x".join(map(str, self.shape)) or "scalar"])


_SHAPE = re.compile(r"scalar|(?:0|[1-9]\d{0,18})(?:x(?:0|[1-9]\d{0,18})){0,31}")


def parse(text: str) -> Description | str:
    """The description in a line of metadata, or what is wrong with it."""
    mode, *words = text.split(" ")
    if mode not in PARTS:
        return f"mode {mode!r} is not one of {', '.join(PARTS)}"
    count = {"exact": 3, "lowrank": 2}.get(mode, 1)
    if len(words) != count or not _SHAPE.fullmatch(words[-1]):
        return f"{text!r} is not a description of {mode}"
    shape = () if words[-1] == "scalar" else tuple(map(int, words[-1].split("x")))
    if math.prod(shape) >= 2**56:
        return f"shape {words[-1]} is larger than any file"
    if mode == "exact":
        dtype, base = (DTYPE_OF_CODE.get(code) for code in words[:2])
        if dtype not in CODES or base not in CODES:
            return f"{words[0]} measured from {words[1]} is not a pair of floating-point dtypes"
        return Description(mode, shape, dtype, base)
    if mode == "lowrank":
        try:
            scale = float(words[0])
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            return f"scale {words[0]!r} is not a finite number"
        return Description(mode, shape, scale=scale)
    return Description(mode, shape)


def part_name(name: str, part: str) -> str:
    """The safetensors entry that holds a part of tensor `name`."""
    return f"{name}::{part}"
