"""Case `vectors`: packed vectors beside plain copies, and merging them beside full checkpoints.

Packing reads base and trained checkpoint and writes the vector; unpacking reads base and vector and
writes the checkpoint again. The ceiling of both is a plain copy of the trained checkpoint's files
by the same number of threads, synced to disk as ours are; GB/s count the checkpoint's bytes for
all, so that a ratio of 1 means "as fast as copying". Then a merge of all sources into nothing, from
full checkpoints, and from packed vectors of two modes.

The parameters of the record say what each mode takes, as a share of the checkpoint's bytes: here,
and for Gaussian weights and changes of several sizes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from benchmarks import ceilings, checkpoints, measure
from benchmarks.accuracy import Accuracy
from benchmarks.checkpoints import weight_files
from benchmarks.merge import NullSink
from benchmarks.runner import Case, Contestant
from optimer_engine import plan
from optimer_engine.checkpoint import Checkpoint
from optimer_engine.kernels import packed
from optimer_engine.kernels.reference import BF16, F16, F32, round_to, upcast
from optimer_engine.kernels.reference_packed import BLOCK, CHUNK, SAME
from optimer_engine.packing import pack, unpack
from optimer_engine.plans import available_cores

DEFAULT_BYTES = 600_000_000
RIVALS = ()
CHANGES = (0.001, 0.003, 0.01, 0.03, 0.1)
"""|tau| / |theta| of the synthetic deltas."""


def case(
    work: Path, size_bytes: int, sources: int, cold: bool, rivals: tuple[str, ...], command: str
) -> Case:
    """Make and pack the files, and say who runs on them."""
    del rivals
    inputs = checkpoints.make(work, size_bytes, sources)
    trained, out, threads = inputs.sources[0], work / "out", available_cores()
    full = inputs.base_bytes
    shares: dict[str, float] = {}
    folders: dict[str, list[Path]] = {}
    for mode in ("exact", "int8"):
        folders[mode] = [_packed(inputs.base, source, mode) for source in inputs.sources]
        size = sum(file.stat().st_size for file in weight_files(folders[mode][0]))
        shares[f"{mode}_share"] = round(size / full, 4)
    read = [*inputs.files, *(f for made in folders.values() for v in made for f in weight_files(v))]

    def before() -> None:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()  # or one contestant would wait for the write-back of another
        (measure.evict if cold else measure.warm)(read)

    def ours(name: str, run: Callable[[], object], other: str | None = None) -> Contestant:
        return Contestant(name, "ours", full, lambda: measure.of_call(run), other)

    contestants = [
        Contestant(
            "copy the files",
            "ceiling",
            full,
            lambda: measure.of_call(lambda: _copy(weight_files(trained), out, threads)),
        ),
        ours("pack exact", lambda: pack(inputs.base, trained, out), "copy the files"),
        Contestant(
            "unpack exact",
            "ours",
            full,
            lambda: measure.of_call(lambda: unpack(inputs.base, folders["exact"][0], out)),
            "copy the files",
            lambda: _compare(out, trained),
        ),
        ours("pack int8", lambda: pack(inputs.base, trained, out, mode="int8"), "copy the files"),
        ours("merge full checkpoints", lambda: _merge(inputs.base, inputs.sources)),
    ]
    contestants += [
        ours(
            f"merge {mode} vectors",
            lambda mode=mode: _merge(inputs.base, folders[mode]),  # type: ignore[misc]
            "merge full checkpoints",
        )
        for mode in folders
    ]
    shared = {
        f"exact_share_of_{name}_at_{'_'.join(map(str, CHANGES))}": _synthetic(code)
        for name, code in (("bf16", BF16), ("fp16", F16), ("fp32", F32))
    }
    return Case(
        name="vectors",
        command=command,
        parameters={
            "checkpoint_bytes": full,
            "sources": sources,
            "page_cache": "cold" if cold else "warm",
            **shares,
            **shared,
        },
        contestants=contestants,
        before=before,
    )


def _packed(base: Path, source: Path, mode: str) -> Path:
    """The source as a vector beside it, made once."""
    out = source.with_name(f"{source.name}-{mode}")
    if not out.exists():
        pack(base, source, out, mode=mode)
    return out


def _copy(files: list[Path], out: Path, threads: int) -> None:
    """Copy by pread and pwrite into preallocated files, and sync them."""
    out.mkdir()
    for path in files:
        source = os.open(path, os.O_RDONLY)
        target = os.open(out / path.name, os.O_WRONLY | os.O_CREAT)
        size = os.fstat(source).st_size
        os.posix_fallocate(target, 0, size)

        def work(numbers: Iterable[int], source: int = source, target: int = target) -> None:
            buffer = memoryview(bytearray(ceilings.PIECE_BYTES))
            for number in numbers:
                offset = number * ceilings.PIECE_BYTES
                count = os.preadv(source, [buffer], offset)
                os.pwrite(target, buffer[:count], offset)

        try:
            ceilings.in_threads(threads, work, -(-size // ceilings.PIECE_BYTES))
            os.fsync(target)
        finally:
            os.close(source)
            os.close(target)


def _merge(base: Path, sources: Iterable[Path]) -> None:
    named = [{"name": s.name, "model": str(s), "weight": 0.3} for s in sources]
    made = plan({"base": str(base), "sources": named})
    try:
        made.run(NullSink())
    finally:
        made.close()


def _compare(out: Path, trained: Path) -> Accuracy:
    """Every bit of every tensor."""
    elems = unlike = 0
    with Checkpoint.open(out) as got, Checkpoint.open(trained) as want:
        for name in want.tensors:
            elems += got.view(name).size
            unlike += int(np.count_nonzero(got.view(name) != want.view(name)))
    return Accuracy(checked_elems=elems, unlike_reference_elems=unlike)


def _synthetic(code: int) -> list[float]:
    """Packed over unpacked bytes of Gaussian weights, for each of CHANGES."""
    rng = np.random.default_rng(0)
    theta = rng.standard_normal(16 * CHUNK) * 0.02
    base = round_to(theta, code)
    shares = []
    for change in CHANGES:
        moved = upcast(base, code, np.float64) + rng.standard_normal(theta.size) * 0.02 * change
        trained = round_to(moved, code)
        out = np.zeros(theta.size // BLOCK * (8 + BLOCK * trained.itemsize) + 8, np.uint8)
        sizes, scratch = np.zeros(16, np.int64), np.zeros(packed.SCRATCH_BYTES, np.uint8)
        used = packed.pack_exact(trained.itemsize, SAME, 0)(
            trained.ctypes.data, base.ctypes.data, theta.size, out.ctypes.data, sizes.ctypes.data,
            scratch.ctypes.data,
        )  # fmt: skip
        shares.append(round(used / trained.nbytes, 4))
    return shares
