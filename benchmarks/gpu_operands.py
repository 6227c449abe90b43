"""Operands of the GPU cases, in GPU memory and as the CPU's specification takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from optimer_engine.kernels import gpu, reference, reference_packed
from optimer_engine.kernels.reference import BF16, F8_E4M3, F8_E5M2, F16, F32, F64
from optimer_engine.kernels.triton_elements import INT4, INT8, ITEM_BYTES

DTYPES = {
    "bf16": (BF16, BF16, BF16),
    "fp16": (F16, F16, F16),
    "fp32": (F32, F32, F32),
    "fp64": (F64, F64, F64),
    "bf16 + fp32 vectors": (BF16, F32, BF16),
    "bf16 to fp32": (BF16, BF16, F32),
    "bf16 + fp8 e4m3": (BF16, F8_E4M3, BF16),
    "fp8 e4m3": (F8_E4M3, F8_E4M3, F8_E4M3),
    "fp8 e5m2": (F8_E5M2, F8_E5M2, F8_E5M2),
    "bf16 + int8 vectors": (BF16, INT8, BF16),
    "bf16 + int4 vectors": (BF16, INT4, BF16),
}
"""Codes of base, sources and output."""

SPREAD, STEP = 0.02, 0.001
CHECKED_ELEMS = 1 << 18


@dataclass
class Prepared:
    """A case on a device.

    Attributes:
        launch: runs the kernel once, on the current stream.
        moved_bytes: what it must read and write.
        wrong: how many of the elements that were looked at differ from the specification, after a
            launch; a NaN is not checked.
        operands: base, sources and weights of a merge, for rivals.
    """

    launch: Callable[[], Any]
    moved_bytes: int
    wrong: Callable[[], int]
    operands: tuple[torch.Tensor, list[torch.Tensor], list[float]] | None = None


def weights(count: int) -> list[float]:
    """Of the sources of a case."""
    return [0.3 + 0.4 * (i % 3) for i in range(count)]


def stored(values: torch.Tensor, code: int) -> torch.Tensor:
    """fp32 values in a dtype; for INT8 and INT4 as a pair of numbers and scales."""
    if code in (INT8, INT4):
        bits = 8 if code == INT8 else 4
        head = values[:CHECKED_ELEMS].cpu().numpy()  # quantised here, by the slow specification
        numbers, scales = reference_packed.quantise(head, bits)
        pair = torch.from_numpy(numbers), torch.from_numpy(scales.view(np.int16))
        repeats = -(-values.numel() // CHECKED_ELEMS)
        return tuple(part.to(values.device).repeat(repeats) for part in pair)  # type: ignore[return-value]
    return values.to(gpu.TORCH_DTYPES[code])


def operands(device: str, elems: int, code: int, source: int, count: int) -> tuple[Any, list[Any]]:
    """A base and sources near it, or small vectors where sources are packed or wider."""
    generator = torch.Generator(device).manual_seed(count)
    normal = partial(torch.randn, elems, generator=generator, device=device)
    base = normal() * SPREAD
    deltas = source in (INT8, INT4) or source != code
    theta = 0.0 if deltas else base
    return stored(base, code), [stored(theta + normal() * STEP, source) for _ in range(count)]


def as_stored(tensor: torch.Tensor, code: int) -> np.ndarray:
    """A tensor in main memory in the storage of its code."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return tensor.detach().cpu().view(width).numpy().view(reference.STORAGE[code])


def source_of(tensor: Any, code: int, elems: int) -> tuple[np.ndarray, int]:
    """The first elements of a source as the CPU's specification takes them."""
    if code in (INT8, INT4):
        groups = -(-elems // reference_packed.GROUP)
        bits = 8 if code == INT8 else 4
        numbers = tensor[0][: groups * reference_packed.GROUP * bits // 8].cpu().numpy()
        scales = tensor[1][:groups].cpu().numpy().view(np.uint16)
        return reference_packed.dequantise(numbers, scales, bits)[:elems], F32
    return as_stored(tensor[:elems], code), code


def differing(got: np.ndarray, want: np.ndarray) -> int:
    """Elements whose bits differ."""
    width = f"u{got.itemsize}"
    return int(np.count_nonzero(got.view(width) != want.view(width)))


def expected(base: Any, code: int, sources: list[Any], source: int, out: int) -> np.ndarray:
    """The first elements of the linear merge, by the specification."""
    elems = min(base.numel(), CHECKED_ELEMS)
    read = [source_of(tensor, source, elems) for tensor in sources]
    deltas = [source != code] * len(sources)
    return reference.linear(
        as_stored(base[:elems], code), code, [array for array, _ in read], [c for _, c in read],
        deltas, weights(len(sources)), out,
    )  # fmt: skip


def moved(elems: int, code: int, source: int, out: int, count: int) -> int:
    """Bytes that a merge of so many elements must read and write."""
    packed = {INT8: 1 + 2 / reference_packed.GROUP, INT4: 0.5 + 2 / reference_packed.GROUP}
    each = packed.get(source, ITEM_BYTES[source])
    return int(elems * (ITEM_BYTES[code] + count * each + ITEM_BYTES[out]))
