"""Pack: every tensor's tiles are encoded by several threads and placed in their order.

A tile's packed size is known only when it is packed, and the next one begins where it ends. So
threads take numbered tiles, read and encode them side by side, wait for their turn to be told a
place, and write side by side again. Memory is threads x (tile of base, source and result) whatever
the size of tensor or model; `lowrank` alone holds two thin matrices of a tensor.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from optimer_engine import vectors
from optimer_engine.adapter import LowRank
from optimer_engine.alignment import align
from optimer_engine.checkpoint import MODEL, VECTOR, Checkpoint
from optimer_engine.errors import MismatchError, OptimerError, RecipeError, quoted
from optimer_engine.events import Advanced, Callback, Finished, Started
from optimer_engine.hub import locate
from optimer_engine.operands import Stored
from optimer_engine.packing.encode import (
    TILE_ELEMS,
    Encoder,
    Equal,
    Exact,
    Hands,
    Pair,
    Plain,
    Quantised,
    Zero,
    pair_of,
)
from optimer_engine.packing.lowrank import MIN_TOLERANCE, Spill, factored, native
from optimer_engine.packing.store import OutFolder, PartsFile
from optimer_engine.plans import available_cores
from optimer_engine.recipe import Recipe, Source
from optimer_engine.report import Report, peak_mem_bytes, versions
from optimer_engine.types import DType, TensorInfo, parse_bytes
from optimer_engine.vectors.format import CODES, MODES, PARTS, TENSOR, VERSION, part_name

if TYPE_CHECKING:
    from optimer_engine.report import Digest

MAX_TENSORS_PER_FILE = 20_000
"""Keeps headers far below what readers accept."""

SMALL_ELEMS = 4096
"""Tensors below this size are never approximated: it would save nothing."""


def pack(
    base: str | Path,
    source: str | Path,
    out: str | Path,
    *,
    mode: str = "exact",
    rank: int | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int | str = "5GB",
    threads: int | None = None,
    callbacks: Sequence[Callback] = (),
) -> Report:
    """Store what training changed between `base` and `source` as the vector folder `out`.

    Args:
        source: a trained checkpoint, a distribution vector in any mode, or a LoRA adapter.
        mode: "exact" (lossless; not from a vector that is not itself exact), "float32", "bf16",
            "int8", "int4" or "lowrank". Scalars, vectors and other small tensors are not
            approximated; matrices that a low rank does not suit are kept exact (fp32, from a
            vector).
        rank: for lowrank, the rank of every matrix; or
        tolerance: the largest relative error in the Frobenius norm, for which each matrix gets
            the smallest rank (a multiple of 4). Exactly one of them; a LoRA adapter needs neither
            and keeps its factors.
        seed: of the randomised factorisation.
        metadata: joins the vector's header, such as {"dataset": ..., "tokens": ..., "seed": ...}.

    Returns:
        The report that is also in `out`/report.json.

    Raises:
        RecipeError: for settings that do not fit the mode or the source.
        CheckpointError, MismatchError: as `plan` raises them.
        NonFiniteError: NaN or infinity in a source, in any mode but exact.
        OutputError: the disk refuses. On any error nothing is left behind.
    """
    started = time.perf_counter()
    _check_settings(mode, rank, tolerance)
    with (
        Checkpoint.open(locate(str(base))) as base_checkpoint,
        Checkpoint.open(locate(str(source))) as source_checkpoint,
    ):
        if base_checkpoint.kind != MODEL:
            raise MismatchError("is not a model, which a base must be", where=str(base))
        pairs, warnings = _pairs(base_checkpoint, source_checkpoint)
        _check_source(pairs, mode, rank, tolerance)
        threads = threads or available_cores()
        header = {
            **(metadata or {}),
            "format": "pt",
            "kind": VECTOR,
            "vector_format": VERSION,
            "vector_mode": mode,
            "base_fingerprint": base_checkpoint.fingerprint,
            "optimer_engine": versions()["optimer-engine"],
        }
        folder = OutFolder(Path(out), [base_checkpoint.folder, source_checkpoint.folder])
        spill = Spill(folder.partial)
        try:
            encoders = _encoders(pairs, mode, rank, tolerance, seed, spill, threads)
            made = _Run(encoders, threads, callbacks)
            files, weight_map = made.write(folder, header, parse_bytes(max_shard_size))
            for checkpoint in (base_checkpoint, source_checkpoint):
                checkpoint.check_unchanged()
            recipe = Recipe(str(base), [Source("source", str(source))])
            report = Report(
                operation=f"pack {mode}",
                recipe=recipe.to_dict(),
                recipe_fingerprint=recipe.fingerprint(),
                fingerprints={
                    "base": base_checkpoint.fingerprint,
                    "source": source_checkpoint.fingerprint,
                },
                tensors=len(encoders),
                bytes_read=made.bytes_read,
                bytes_written=made.bytes_written,
                threads=made.threads,
                tile_bytes=TILE_ELEMS * 2,
                peak_mem_bytes=peak_mem_bytes(),
                wall_s=time.perf_counter() - started,
                warnings=warnings,
                versions=versions("numpy", "numba"),
                files=files,
            )
            folder.publish(report, weight_map)
        except BaseException as error:
            folder.abandon()
            if isinstance(error, OSError) and not isinstance(error, OptimerError):
                raise folder.failed(error) from error
            raise
        finally:
            spill.close()
    for callback in callbacks:
        callback(Finished(report))
    return report


def _pairs(base: Checkpoint, source: Checkpoint) -> tuple[list[Pair], list[str]]:
    """Every tensor of the base with what the source has for it; and warnings."""
    if source.kind == VECTOR:
        packed = vectors.open(source)
        packed.check_base(base)
        return [
            pair_of(info, Stored(base, info, False), packed.tensors.get(info.name))
            for info in base.tensors.values()
        ], []
    rows, warnings, *_ = align(base, [("source", source)], None)
    pairs = []
    for row in rows:
        info, given = base.tensors[row.out.name], row.inputs[1]
        if row.inputs[0] != info or row.out.shape != info.shape:
            raise MismatchError(
                f"{quoted(info.name)} is quantised or of another shape; packing takes neither",
                where=str(base.folder),
                todo="convert base and trained model to bf16 first",
            )
        operand = Stored(source, given, False) if isinstance(given, TensorInfo) else given
        if operand is None and source.kind == MODEL:  # a part that the source leaves alone
            operand = Stored(base, info, False)
        pairs.append(pair_of(info, Stored(base, info, False), operand))
    return pairs, warnings


def _check_settings(mode: str, rank: int | None, tolerance: float | None) -> None:
    if mode not in MODES:
        raise RecipeError(f"{mode!r} is no mode", where="mode", todo=f"use {', '.join(MODES)}")
    if mode != "lowrank" and (rank is not None or tolerance is not None):
        raise RecipeError(f"mode {mode} takes no rank or tolerance", where="mode")
    if rank is not None and tolerance is not None:
        raise RecipeError("give a rank or a tolerance, not both", where="lowrank")
    bad_tolerance = tolerance is not None and not MIN_TOLERANCE <= tolerance < 1
    if (rank is not None and rank < 1) or bad_tolerance:
        raise RecipeError(
            f"rank {rank}, tolerance {tolerance}; a rank of at least 1 or a tolerance from"
            f" {MIN_TOLERANCE} to 1 expected",
            where="lowrank",
        )


def _check_source(pairs: list[Pair], mode: str, rank: int | None, tolerance: float | None) -> None:
    """What the mode cannot do with this source, before anything is written."""
    sources = [pair.source for pair in pairs if pair.base.dtype in CODES]
    if mode == "exact" and any(source is None or source.is_delta for source in sources):
        raise RecipeError(
            "the source is a vector or an adapter, which keeps no trained bits",
            where="exact",
            todo="pack the trained checkpoint itself, or choose another mode",
        )
    free = rank is None and tolerance is None
    if mode == "lowrank" and free and not any(isinstance(s, LowRank) for s in sources):
        raise RecipeError(
            "give a rank or a tolerance", where="lowrank", todo="for example tolerance 0.1"
        )


def _encoders(
    pairs: list[Pair],
    mode: str,
    rank: int | None,
    tolerance: float | None,
    seed: int,
    spill: Spill,
    threads: int,
) -> list[Encoder]:
    """How each tensor is stored; factors are found now, side by side."""

    def encoder(pair: Pair) -> Encoder | None:
        source = pair.source
        if pair.base.dtype not in CODES:
            return Equal(pair) if source is not None else None
        if source is None:
            return Zero(pair)
        if mode in ("float32", "bf16"):
            return Plain(pair, DType.F32 if mode == "float32" else DType.BF16)
        if mode == "lowrank":
            found: Encoder | None = native(pair)
            if found is None and (rank is not None or tolerance is not None):
                found = factored(pair, rank, tolerance, seed, spill)
            if found is not None:
                return found
        if mode in ("int8", "int4") and len(pair.shape) > 1 and pair.elems >= SMALL_ELEMS:
            return Quantised(pair, int(mode[3:]))
        return Plain(pair, DType.F32) if source.is_delta else Exact(pair)

    if mode != "lowrank":
        return [found for found in map(encoder, pairs) if found is not None]
    with ThreadPoolExecutor(threads, thread_name_prefix="factor") as pool:
        return [found for found in pool.map(encoder, pairs) if found is not None]


class _Run:
    """The state that the threads share."""

    def __init__(
        self, encoders: list[Encoder], threads: int, callbacks: Sequence[Callback]
    ) -> None:
        # The wider the units of its parts, the sooner: so all parts are aligned in their file.
        self.encoders = sorted(encoders, key=lambda encoder: -encoder.unit)
        self.threads, self.callbacks = threads, callbacks
        self.bytes_read = self.bytes_written = 0
        self._changed = threading.Condition()
        self._stopped = False

    def write(
        self, folder: OutFolder, header: dict[str, str], max_bytes: int
    ) -> tuple[dict[str, list[Digest]], dict[str, str]]:
        """All files; returns their digests, and the file of each part."""
        for callback in self.callbacks:
            callback(Started(sum(_bytes(encoder) for encoder in self.encoders)))
        groups = list(self._groups(max_bytes))
        digests: dict[str, list[Digest]] = {}
        weight_map: dict[str, str] = {}
        for number, group in enumerate(groups, start=1):
            name = "vector.safetensors"
            if len(groups) > 1:
                name = f"vector-{number:05d}-of-{len(groups):05d}.safetensors"
            file = _open_file(folder.partial / name, header, group)
            try:
                self._pack_file(group, file)
                digests[name] = file.finish(_metadata(header, group))
                weight_map |= file.weight_map
                self.bytes_written += file.data_bytes
            finally:
                file.close()
        return digests, weight_map

    def _groups(self, max_bytes: int) -> Iterator[list[Encoder]]:
        """The tensors of each file: no more than `max_bytes` before packing."""
        group: list[Encoder] = []
        filled = 0
        for encoder in self.encoders:
            size = _bytes(encoder)
            if group and (filled + size > max_bytes or len(group) == MAX_TENSORS_PER_FILE):
                yield group
                group, filled = [], 0
            group.append(encoder)
            filled += size
        yield group

    def _pack_file(self, group: list[Encoder], file: PartsFile) -> None:
        for unit in sorted({encoder.unit for encoder in group}, reverse=True):
            part = [encoder for encoder in group if encoder.unit == unit]
            self._tiles = enumerate((e, start, stop) for e in part for start, stop in e.tiles)
            self._turn = 0
            with ThreadPoolExecutor(self.threads, thread_name_prefix="pack") as pool:
                for worker in [pool.submit(self._work, file) for _ in range(self.threads)]:
                    worker.result()
            for encoder in part:
                for offset, data in encoder.finish(file):
                    file.write(offset, data)

    def _work(self, file: PartsFile) -> None:
        hands = Hands()
        try:
            while True:
                with self._changed:
                    number, (encoder, start, stop) = next(self._tiles, (-1, (None, 0, 0)))
                if encoder is None:
                    return
                pieces = encoder.encode(start, stop, hands)
                with self._changed:
                    while self._turn != number and not self._stopped:
                        self._changed.wait()
                    if self._stopped:
                        return
                    placed = encoder.place(file, start, pieces)
                    self._turn += 1
                    self._changed.notify_all()
                for offset, data in placed:
                    file.write(offset, data)
                self._advance(encoder, stop - start)
        except BaseException:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()
            raise

    def _advance(self, encoder: Encoder, elems: int) -> None:
        pair = encoder.pair
        read = 0.0 if pair.source is None else pair.source.read_bytes_per_elem
        with self._changed:
            self.bytes_read += int(elems * (read + pair.base.dtype.itemsize))
            for callback in self.callbacks:
                callback(Advanced(elems * pair.base.dtype.itemsize))


def _bytes(encoder: Encoder) -> int:
    """Size of the tensor before packing, for progress and for filling files."""
    pair = encoder.pair
    return pair.elems * (pair.base if pair.source is None else pair.source).dtype.itemsize


def _metadata(header: dict[str, str], group: list[Encoder]) -> dict[str, str]:
    said = {TENSOR + e.pair.name: e.description.text() for e in group if e.description}
    return {**header, **said}


def _open_file(path: Path, header: dict[str, str], group: list[Encoder]) -> PartsFile:
    longest = []
    for encoder in group:
        name, said = encoder.pair.name, encoder.description
        if said is None:
            longest.append((name, len(encoder.pair.shape)))
        else:
            longest += [(part_name(name, part), 2) for part in PARTS[said.mode]]
    most = sum(2 * _bytes(encoder) + 4096 for encoder in group)
    return PartsFile(path, _metadata(header, group), longest, most)
