"""Case `vectors`: packed vectors beside plain copies, and merging them beside full checkpoints.

Packing reads base and trained checkpoint and writes the vector; unpacking reads base and vector and
writes the checkpoint again, of which every bit is compared before anything is timed. The ceiling of
both is a plain copy of the trained checkpoint's files, twice: by as many threads as ours, synced to
the disk as ours are, and by `cp`, which leaves the output in the page cache. GB/s count the
checkpoint's bytes for all of these, so that a ratio of 2 means "half as fast as copying". The row
"into nothing" does all but the writing.

Then, from a cold page cache, all sources are merged into nothing: full checkpoints, and packed
vectors of three modes; and the full ones are inspected. The ceiling is reading the files of base
and full checkpoints. GB/s count the bytes that are read.

The parameters of the record say what each mode takes, as a share of the checkpoint's bytes, and
what a merge reads. For Gaussian weights and changes of several sizes they also say what `exact`
takes beside the entropy of the distances, where each is known to have the base element's exponent:
no lossless form that codes every element by itself and knows the base takes less.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks import ceilings, checkpoints, measure
from benchmarks.accuracy import Accuracy
from benchmarks.checkpoints import weight_files
from benchmarks.entropy import entropy_share
from benchmarks.merge import NullSink
from benchmarks.runner import Case, Contestant
from optimer_engine import plan
from optimer_engine.checkpoint import Checkpoint
from optimer_engine.inspection.measure import Pool
from optimer_engine.inspection.measure import measure as measure_pool
from optimer_engine.kernels import packed
from optimer_engine.kernels.reference import BF16, F16, F32, round_to, upcast
from optimer_engine.kernels.reference_packed import BLOCK, CHUNK, SAME
from optimer_engine.packing import pack, plan_unpack, unpack
from optimer_engine.plans import Plan, available_cores

DEFAULT_BYTES = 1_200_000_000
RIVALS = ()
MODES = ("exact", "int8", "int4")
CHANGES = (0.001, 0.003, 0.01, 0.03, 0.1)
"""|tau| / |theta| of the synthetic deltas."""
COPY, READ = "copy, synced", "read base and full, cold"


def case(
    work: Path, size_bytes: int, sources: int, cold: bool, rivals: tuple[str, ...], command: str
) -> Case:
    """Make and pack the files, and say who runs on them."""
    del rivals
    inputs = checkpoints.make(work, size_bytes, sources)
    base, trained, out, threads = inputs.base, inputs.sources[0], work / "out", available_cores()
    full = inputs.base_bytes
    folders = {"full": list(inputs.sources)}
    for mode in MODES:
        folders[mode] = [_packed(base, source, mode) for source in inputs.sources]
    read_bytes = {mode: _bytes(base, *made) for mode, made in folders.items()}
    vector = folders["exact"][0]

    def prepare() -> None:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()  # or one contestant would wait for the write-back of another

    def copying(
        name: str, kind: str, run: Callable[[], object], *reads: Path, other: str | None = COPY
    ) -> Contestant:
        bring = measure.evict if cold else measure.warm
        return Contestant(
            name, kind, full, lambda: measure.of_call(run), other,
            before=lambda: bring(_files(*reads)),
        )  # fmt: skip

    def reading(
        name: str, kind: str, run: Callable[[], object], mode: str, other: str | None = READ
    ) -> Contestant:
        return Contestant(
            name, kind, read_bytes[mode], lambda: measure.of_call(run), other,
            before=lambda: measure.evict(_files(base, *folders[mode])),
        )  # fmt: skip

    unpacking = copying("unpack exact", "ours", lambda: unpack(base, vector, out), base, vector)
    unpacking.check = lambda: _compare(out, trained)
    plain, cp = lambda: _copy(weight_files(trained), out, threads), ["cp", "-r", trained, out]
    everything = _files(base, *inputs.sources)
    contestants = [
        copying(COPY, "ceiling", plain, trained, other=None),
        copying(
            "cp, not synced", "ceiling", lambda: subprocess.run(cp, check=True), trained, other=None
        ),
        *(
            copying(
                f"pack {mode}", "ours", lambda m=mode: pack(base, trained, out, mode=m),  # type: ignore[misc]
                base, trained,
            )
            for mode in MODES
        ),
        unpacking,
        copying(
            "unpack exact into nothing", "ours", lambda: _run(plan_unpack(base, vector)), base,
            vector,
        ),
        reading(READ, "ceiling", lambda: ceilings.read(everything, 2 * threads), "full", None),
        reading("inspect full, cold", "ours", lambda: _inspect(base, inputs.sources), "full"),
        *(
            reading(
                f"merge {sources} {mode}, cold", "ours", lambda m=mode: _merge(base, folders[m]),  # type: ignore[misc]
                mode, READ if mode == "full" else f"merge {sources} full, cold",
            )
            for mode in folders
        ),
    ]  # fmt: skip
    parameters: dict[str, int | float | str | bool | list[float]] = {
        "checkpoint_bytes": full,
        "sources": sources,
        "page_cache": "cold" if cold else "warm",
        "changes": list(CHANGES),
    }
    parameters |= {f"{mode}_share": round(_bytes(folders[mode][0]) / full, 4) for mode in MODES}
    parameters |= {f"merge_{mode}_reads_bytes": count for mode, count in read_bytes.items()}
    for name, code in (("bf16", BF16), ("fp16", F16), ("fp32", F32)):
        shares = [_synthetic(code, change) for change in CHANGES]
        parameters[f"exact_share_{name}"], parameters[f"entropy_share_{name}"] = (
            [round(share, 3) for share in column] for column in zip(*shares, strict=True)
        )
    return Case("vectors", command, parameters, contestants, prepare)


def _files(*folders: Path) -> list[Path]:
    return [file for folder in folders for file in weight_files(folder)]


def _bytes(*folders: Path) -> int:
    return sum(file.stat().st_size for file in _files(*folders))


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
    _run(plan({"base": str(base), "sources": named}))


def _inspect(base: Path, folders: Iterable[Path]) -> None:
    with ExitStack() as stack:
        opened = [stack.enter_context(Checkpoint.open(folder)) for folder in (base, *folders)]
        measure_pool(Pool(opened[1:], opened[0]), threads=available_cores())


def _run(made: Plan) -> None:
    """Into nothing."""
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


def _synthetic(code: int, change: float) -> tuple[float, float]:
    """Packed over unpacked bytes of Gaussian weights, and what their entropy allows."""
    rng = np.random.default_rng(0)
    theta = rng.standard_normal(16 * CHUNK) * 0.02
    base = round_to(theta, code)
    moved = upcast(base, code, np.float64) + rng.standard_normal(theta.size) * 0.02 * change
    trained = round_to(moved, code)
    out = np.zeros(theta.size // BLOCK * (8 + BLOCK * trained.itemsize) + 64, np.uint8)
    sizes, scratch = np.zeros(16, np.int64), np.zeros(packed.SCRATCH_BYTES, np.uint8)
    used = packed.pack_exact(trained.itemsize, SAME, 0)(
        trained.ctypes.data, base.ctypes.data, theta.size, out.ctypes.data, sizes.ctypes.data,
        scratch.ctypes.data,
    )  # fmt: skip
    return used / trained.nbytes, entropy_share(base, trained, code)
