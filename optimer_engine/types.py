"""Plain data shared by every layer: dtypes, tensor locations, tiles and byte sizes. No torch.

numpy has no bfloat16, so a tile of any dtype travels as its *storage* dtype (bf16 and fp16 as
uint16, fp32 and fp64 as themselves) and the kernels interpret the bits.
"""

from __future__ import annotations

import re
from enum import Enum

import msgspec
import numpy as np

from optimer_engine.errors import RecipeError


class DType(Enum):
    """Element types of the safetensors format: (code in the file, bits, name in torch).

    `itemsize` is in bytes; 1 for dtypes below a byte, which are only ever copied byte by byte.
    """

    BOOL = ("BOOL", 8, "bool")
    U8 = ("U8", 8, "uint8")
    I8 = ("I8", 8, "int8")
    F8_E5M2 = ("F8_E5M2", 8, "float8_e5m2")
    F8_E4M3 = ("F8_E4M3", 8, "float8_e4m3fn")
    F8_E8M0 = ("F8_E8M0", 8, "float8_e8m0fnu")
    F8_E4M3FNUZ = ("F8_E4M3FNUZ", 8, "float8_e4m3fnuz")
    F8_E5M2FNUZ = ("F8_E5M2FNUZ", 8, "float8_e5m2fnuz")
    F4 = ("F4", 4, "float4_e2m1fn_x2")
    F6_E2M3 = ("F6_E2M3", 6, "float6_e2m3")
    F6_E3M2 = ("F6_E3M2", 6, "float6_e3m2")
    U16 = ("U16", 16, "uint16")
    I16 = ("I16", 16, "int16")
    F16 = ("F16", 16, "float16")
    BF16 = ("BF16", 16, "bfloat16")
    U32 = ("U32", 32, "uint32")
    I32 = ("I32", 32, "int32")
    F32 = ("F32", 32, "float32")
    C64 = ("C64", 64, "complex64")
    U64 = ("U64", 64, "uint64")
    I64 = ("I64", 64, "int64")
    F64 = ("F64", 64, "float64")

    def __init__(self, code: str, bits: int, torch_name: str) -> None:
        self.code = code
        self.bits = bits
        self.torch_name = torch_name
        self.itemsize = max(1, bits // 8)

    @property
    def mergeable(self) -> bool:
        """Whether arithmetic on this dtype is defined here; others are copied when all agree."""
        return self in MERGEABLE

    @property
    def storage(self) -> np.dtype:
        """The numpy dtype in which tiles of this dtype are held."""
        return np.dtype(_STORAGE.get(self, f"u{self.itemsize}"))

    @classmethod
    def parse(cls, name: str) -> DType:
        """`name` as torch ("bfloat16"), safetensors ("BF16") or habit ("fp32") spells it.

        Raises:
            RecipeError: when no dtype that can be merged has that name.
        """
        wanted = _HABITS.get(name.lower(), name.lower()).removeprefix("torch.")
        for dtype in MERGEABLE:
            if wanted in (dtype.torch_name, dtype.code.lower()):
                return dtype
        raise RecipeError(
            f"{name!r} is not a dtype a merge can write",
            todo=f"use one of {', '.join(d.torch_name for d in MERGEABLE)}",
        )


MERGEABLE = (DType.BF16, DType.F16, DType.F32, DType.F64, DType.F8_E4M3, DType.F8_E5M2)
FP8 = (DType.F8_E4M3, DType.F8_E5M2)
DTYPE_OF_CODE = {dtype.code: dtype for dtype in DType}
_STORAGE = {DType.BF16: "u2", DType.F16: "u2", DType.F32: "f4", DType.F64: "f8"}
_HABITS = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}


class TensorInfo(msgspec.Struct, frozen=True, gc=False):
    """Where one tensor lies: `nbytes` bytes from `offset` in file number `file` of a checkpoint."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int

    @property
    def elems(self) -> int:
        """Number of elements (of bytes, for dtypes below a byte)."""
        return self.nbytes // self.dtype.itemsize


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def parse_bytes(size: int | str) -> int:
    """Bytes in `size`: an int, or text such as "5GB" (powers of ten, as Transformers) or "512MiB".

    Raises:
        RecipeError: when the text is not a size, or is not positive.
    """
    match = _SIZE.fullmatch(str(size).strip())
    if match is None or float(match[1]) == 0:
        raise RecipeError(f"{size!r} is not a size in bytes", todo='write for example "5GB"')
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " "))


def format_bytes(count: float) -> str:
    """`count` bytes as a short text in powers of ten, e.g. "1.22 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
