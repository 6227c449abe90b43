"""Case `kernel`: the fused CPU kernel on arrays in memory, beside the stream that memory allows.

Tiles of the engine's size are dealt to one thread or to all, over arrays far larger than any cache;
and one tile is merged over and over, as it is in a merge, where it was read a moment ago. The rival
is the same formula in torch on whole arrays, as most merging code has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import accuracy, ceilings, measure
from benchmarks.accuracy import Accuracy
from benchmarks.checkpoints import WEIGHTS
from benchmarks.runner import Case, Contestant
from optimer_engine.kernels import cpu, reference
from optimer_engine.kernels.reference import BF16, F32
from optimer_engine.plans import TILE_BYTES, available_cores

DEFAULT_BYTES = 128_000_000
RIVALS = ("torch",)
CHECKED_ELEMS = 1 << 20


def case(
    work: Path, size_bytes: int, sources: int, cold: bool, rivals: tuple[str, ...], command: str
) -> Case:
    """Make arrays of `size_bytes` per operand and say who runs on them."""
    del work, cold  # nothing here is on disk
    contestants: list[Contestant] = []
    weights = [WEIGHTS[i % len(WEIGHTS)] for i in range(sources)]
    all_threads = available_cores()
    moved = 0
    for code, dtype in ((BF16, "bfloat16"), (F32, "float32")):
        arrays = _arrays(code, size_bytes, sources)
        out = np.ones_like(arrays[0])
        moved = out.nbytes * (sources + 2)
        step = TILE_BYTES // out.itemsize
        one_tile = [array[:step] for array in arrays], np.ones_like(out[:step])
        contestants += _pair(f"{dtype}, 1 thread, one tile", code, *one_tile, weights, 1, moved)
        for threads in sorted({1, all_threads}):
            name = f"{dtype}, {threads} thread" + "s" * (threads > 1)
            contestants += _pair(name, code, arrays, out, weights, threads, moved)
        if "torch" in rivals:
            contestants.append(
                Contestant(
                    f"torch {dtype}, whole arrays, {all_threads} threads",
                    "rival",
                    moved,
                    _timed(_torch(code, arrays, out, weights)),
                    f"cpu.linear {name}",
                    _checker(code, arrays, out, weights),
                )
            )
    return Case(
        name="kernel",
        command=command,
        parameters={
            "operand_bytes": moved // (sources + 2),
            "sources": sources,
            "weights": weights,
            "tile_bytes": TILE_BYTES,
        },
        contestants=contestants,
        before=lambda: None,
    )


def _pair(
    name: str,
    code: int,
    arrays: list[np.ndarray],
    out: np.ndarray,
    weights: list[float],
    threads: int,
    moved: int,
) -> list[Contestant]:
    """The kernel, and the memory that it works on; both go through the arrays as often as need be
    to move `moved` bytes."""
    ours = f"cpu.linear {name}"
    return [
        Contestant(
            ours,
            "ours",
            moved,
            _timed(_merger(code, arrays, out, weights, threads, moved)),
            check=_checker(code, arrays, out, weights),
        ),
        Contestant(
            f"memory, {len(arrays)} in and 1 out, beside {name}",
            "ceiling",
            moved,
            _stream(len(arrays), out.nbytes, threads, moved),
            ours,
        ),
    ]


def _arrays(code: int, size_bytes: int, sources: int) -> list[np.ndarray]:
    """Base and sources as the checkpoints of case `merge` have them, in the storage of `code`."""
    storage = reference.STORAGE[code]
    rng = np.random.default_rng(0)
    elems = size_bytes // storage.itemsize // 2048 * 2048
    base = rng.standard_normal(elems, np.float32) * np.float32(0.02)
    arrays = [reference.round_to(base, code)]
    for number in range(sources):
        noise = rng.standard_normal(elems, np.float32) * np.float32(0.0006)
        # Skewed, or equal offsets would compete for the same cache sets.
        skew = (number + 1) * 576
        array = np.empty(elems + skew, storage)[skew:]
        array[:] = reference.round_to(base + noise, code)
        arrays.append(array)
    return arrays


def _timed(function: Callable[[], object]) -> Callable[[], measure.Cost]:
    return lambda: measure.of_call(function)


def _merger(
    code: int,
    arrays: list[np.ndarray],
    out: np.ndarray,
    weights: list[float],
    threads: int,
    moved: int,
) -> Callable[[], None]:
    step = min(TILE_BYTES // out.itemsize, out.size)
    tiles = -(-out.size // step)
    codes, full = [code] * len(weights), [False] * len(weights)

    def work(numbers: Iterable[int]) -> None:
        for number in numbers:
            start = number % tiles * step
            tile = slice(start, start + step)
            sources = [array[tile] for array in arrays[1:]]
            cpu.linear(arrays[0][tile], code, sources, codes, full, weights, out[tile], code)

    rounds = moved // (out.nbytes * (len(arrays) + 1))
    return lambda: ceilings.in_threads(threads, work, tiles * rounds)


def _stream(inputs: int, size_bytes: int, threads: int, moved: int) -> Callable[[], measure.Cost]:
    stream = ceilings.memory_stream(inputs, size_bytes, threads)
    return lambda: measure.of_call(lambda: stream(moved))


def _torch(
    code: int, arrays: list[np.ndarray], out: np.ndarray, weights: list[float]
) -> Callable[[], None]:
    import torch

    def tensor(array: np.ndarray) -> Any:
        if code == F32:
            return torch.from_numpy(array)
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)

    base, *sources = map(tensor, arrays)
    merged = tensor(out)

    def run() -> None:
        start = base.float()
        total = torch.zeros_like(start)
        for source, weight in zip(sources, weights, strict=True):
            total += weight * (source.float() - start)
        merged.copy_(start + total)

    return run


def _checker(
    code: int, arrays: list[np.ndarray], out: np.ndarray, weights: list[float]
) -> Callable[[], Accuracy]:
    def check() -> Accuracy:
        spans = (slice(0, CHECKED_ELEMS), slice(-CHECKED_ELEMS, None))
        return sum(
            (
                accuracy.compare(out[s], arrays[0][s], [a[s] for a in arrays[1:]], weights, code)
                for s in spans
            ),
            Accuracy(),
        )

    return check
