"""What launches of Triton kernels share: how tensors, weights and counts become arguments."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton

from .reference import BF16, accumulates_in_fp64
from .triton_elements import INT4, INT8, ITEM_BYTES

MAX_SOURCES = 64
"""Sources that one launch can take: the bits of the mask that tells models from vectors."""

NUM_WARPS = 8

OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
"""Of every launch: multiply and add stay apart, as in `kernels.reference`."""

HELD_BYTES, HELD_BYTES_AMD = 36 * 16, 18 * 16
"""What one thread may hold of all operands together, or its registers would spill to memory.

One 128-bit access each of base, sources and output, with 32 or 16 sources and some to spare; AMD's
buffer descriptors take registers too. What is summed in fp64 counts as such."""

TORCH_DTYPES = (
    torch.bfloat16, torch.float16, torch.float32, torch.float64,
    torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
"""What each dtype code of `kernels.reference` is called in torch."""

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on no GPU; settled when they are defined."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(operand: Any, code: int) -> Any:
    """A tensor of that code as integers of its size; both tensors of a packed source."""
    if code in (INT8, INT4):
        numbers, scales = operand
        return numbers.view(torch.int8 if code == INT8 else torch.uint8), bits(scales, BF16)
    return operand.view(_BITS[operand.itemsize])


def held(codes: Sequence[int], wide: bool) -> int:
    """Neighbouring elements that a thread holds of each operand: 16 bytes of the narrowest."""
    sizes = [ITEM_BYTES[code] for code in codes]
    limit = HELD_BYTES_AMD if warp_threads() == 64 and not wide else HELD_BYTES
    elems = 16 // min(sizes)
    # A byte is two when it counts: decoding takes registers beside.
    elem_bytes = 8 * len(sizes) if wide else sum(max(size, 2) for size in sizes)
    while elems > 1 and elems * elem_bytes > limit:
        elems //= 2
    return elems


def form(base: int, out: int, sources: Sequence[int], warps: int = NUM_WARPS) -> dict[str, Any]:
    """The compile-time arguments that follow from the dtype codes and the warps of a program."""
    wide = accumulates_in_fp64(base, list(sources), out)
    elems = held((base, out, *sources), wide)
    block = warps * warp_threads() * elems
    return {"CODES": (base, out, *sources), "WIDE": wide, "BLOCK": block, "HELD": elems}


def with_nulls(base: Any, sources: Sequence[Any]) -> list[Any]:
    """The sources, and null sources up to a power of two: never loaded, so any operand will do.

    Raises:
        ValueError: for more than MAX_SOURCES.
    """
    count = len(sources)
    if count > MAX_SOURCES:
        raise ValueError(f"{count} sources in one launch; at most {MAX_SOURCES} fit")
    places = 1 << max(count - 1, 0).bit_length()
    return [*sources, *[sources[-1] if sources else base] * (places - count)]


def packed_weights(weights: Sequence[float], count: int, places: int, wide: bool) -> tuple:
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
    words = [struct.unpack("<II", struct.pack("<d", weight)) for weight in padded]
    return tuple(tuple((1 << 40) | (half << 1) | 1 for half in (high, low)) for low, high in words)


def mask_of_models(is_delta: Sequence[bool]) -> int:
    """Bit i is set where source i is a model, from which the base is subtracted."""
    return sum(1 << i for i, delta in enumerate(is_delta) if not delta)


def flag_on(device: Any) -> torch.Tensor:
    """[1] int32, 0: what a kernel sets to 1 when it meets NaN or infinity."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def warp_threads() -> int:
    """Threads of a warp of the GPU at hand: 32, or 64 on AMD's."""
    return 32 if INTERPRETED else triton.runtime.driver.active.get_current_target().warp_size


def fixed_block() -> dict[str, Any]:
    """OPTIONS with as many threads on every GPU, for blocks that are no larger on AMD's: where a
    thread held less its accesses would be narrower."""
    return OPTIONS | {"num_warps": NUM_WARPS * 32 // warp_threads()}


_LAUNCHING = threading.Lock()


@contextmanager
def on_device(tensor: torch.Tensor) -> Iterator[None]:
    """The tensor's GPU as the current one, for one thread at a time.

    A kernel's first launch loads its code; Triton lets a second thread launch it half loaded.
    """
    with _LAUNCHING, torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
        yield
