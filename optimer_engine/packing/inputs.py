"""What is packed: base and source matched tensor by tensor, and how each tensor is to be stored."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from optimer_engine import vectors
from optimer_engine.adapter import LowRank
from optimer_engine.alignment import align
from optimer_engine.checkpoint import MODEL, VECTOR, Checkpoint
from optimer_engine.errors import MismatchError, RecipeError, quoted
from optimer_engine.hub import locate
from optimer_engine.operands import Stored
from optimer_engine.packing.encode import (
    Encoder,
    Equal,
    Exact,
    Pair,
    Plain,
    Quantised,
    Zero,
    pair_of,
)
from optimer_engine.packing.lowrank import MIN_TOLERANCE, Spill, factored, native
from optimer_engine.types import DType, TensorInfo
from optimer_engine.vectors.format import CODES, MODES

PACKING_VERSION = 1
"""Raised when the same inputs and options would give other bytes."""

SMALL_ELEMS = 4096
"""Tensors below this size are never approximated: it would save nothing."""


class Inputs:
    """Base and source, opened and matched; use as a context manager.

    Attributes:
        pairs: every tensor of the base, with what the source has for it.
        options: keywords of `pack` that decide the vector's bytes.
    """

    def __init__(self, base: str, source: str, options: dict[str, Any]) -> None:
        self.names, self.options = (base, source), options
        _check_settings(options["mode"], options["rank"], options["tolerance"])
        with ExitStack() as stack:
            self.base = stack.enter_context(Checkpoint.open(locate(base)))
            self.source = stack.enter_context(Checkpoint.open(locate(source)))
            if self.base.kind != MODEL:
                raise MismatchError("is not a model, which a base must be", where=base)
            self.pairs, self.warnings = _pairs(self.base, self.source)
            _check_source(self.pairs, options["mode"], options["rank"], options["tolerance"])
            self._stack = stack.pop_all()

    def __enter__(self) -> Inputs:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def encoders(self, spill: Spill, threads: int) -> list[Encoder]:
        """How each tensor is stored."""
        given = self.options
        return _encoders(
            self.pairs, given["mode"], given["rank"], given["tolerance"], given["seed"], spill,
            threads,
        )  # fmt: skip

    def head(self, header: dict[str, str]) -> dict[str, Any]:
        """All that decides the vector's bytes, as the first line of the journal."""
        opened = (self.base, self.source)
        head = {
            "operation": "pack",
            "packing_version": PACKING_VERSION,
            "options": self.options,
            "header": header,
            "inputs": [checkpoint.identity for checkpoint in opened],
            "files": [
                (file.path.name, *file.identity[2:])
                for checkpoint in opened
                if not checkpoint.origin
                for file in checkpoint.files
            ],
        }
        plain: dict[str, Any] = json.loads(json.dumps(head))
        return plain

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a file was written to meanwhile."""
        for checkpoint in (self.base, self.source):
            checkpoint.check_unchanged()


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
