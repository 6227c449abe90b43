"""From a recipe to a plan: every name, shape and dtype checked, every output byte placed.

Planning reads headers only (and a few KiB per tensor where a fingerprint is compared). All
mismatches are reported at once, before anything is written. A plan is immutable; `with_weights`
gives the same plan with other weights for the price of a copy, which is what a search trial needs.

Neighbouring tensors are joined into *runs*: stretches that are contiguous, in the same order and
of one dtype in every operand and in the output. A run is one flat array to the engine, so a
thousand small norms cost what one tensor of their size costs, and tiles are cut from runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from optimer_engine.alignment import Match, align
from optimer_engine.checkpoint import MODEL, VECTOR, Checkpoint
from optimer_engine.errors import MemoryLimitError, MismatchError, RecipeError
from optimer_engine.hub import locate
from optimer_engine.recipe import Recipe, Source
from optimer_engine.safetensors_format import place
from optimer_engine.types import DType, TensorInfo, format_bytes, parse_bytes

if TYPE_CHECKING:
    from optimer_engine.events import Callback
    from optimer_engine.report import Report
    from optimer_engine.sink import Sink

MEM_LIMIT = "512MiB"
TILE_BYTES = 512 * 1024
"""Per operand: larger tiles fall out of the second-level cache, smaller ones cost bookkeeping."""
MIN_TILE_BYTES = 16 * 1024
BOOKKEEPING_BYTES = 500
"""Rough cost in memory of one tensor's names and offsets in one checkpoint."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Where an operand's bytes of a run begin."""

    file: int
    offset: int
    dtype: DType


@dataclass(frozen=True, slots=True)
class Run:
    """A flat stretch of `elems` elements.

    Attributes:
        tensors: the output tensors it consists of, and `starts`, the first element of each.
        base: where the base's bytes are; `sources`: (number of the source, where) of those read.
        out: where the output's bytes go; `file` is the number of the shard.
        copied: the base's bytes are the output (no arithmetic); any source must equal them.
    """

    tensors: tuple[TensorInfo, ...]
    starts: tuple[int, ...]
    elems: int
    base: Piece
    sources: tuple[tuple[int, Piece], ...]
    out: Piece
    copied: bool

    def tile_elems(self, tile_bytes: int) -> int:
        """Elements of a tile whose widest operand takes `tile_bytes`."""
        pieces = (self.base, self.out, *(piece for _, piece in self.sources))
        widest = max(piece.dtype.itemsize for piece in pieces)
        return max(1, tile_bytes // widest)

    def parts(self, start: int, stop: int) -> Iterator[tuple[TensorInfo, int, int, int]]:
        """Tensors met by elements start..stop: (tensor, first element in it, from, to in run)."""
        for info, begin in zip(self.tensors, self.starts, strict=True):
            low, high = max(start, begin), min(stop, begin + info.elems)
            if low < high:
                yield info, low - begin, low, high


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: name, first bytes (the header), total size, tensors in file order."""

    name: str
    header: bytes
    size: int
    tensors: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class Plan:
    """A recipe resolved against real files; made by `plan` or `plan_difference`.

    Attributes:
        recipe: what was asked for; its weights are the ones used.
        base, sources: the opened checkpoints.
        shards: the output files, every byte placed.
        add_base: True for a merge, False for a difference.
        kind: "model" or "vector", the kind of checkpoint that comes out.
        threads, tile_bytes: how it runs; neither changes a bit of the output.
        warnings: what was noticed and not refused.
    """

    recipe: Recipe
    base: Checkpoint
    sources: tuple[Checkpoint, ...]
    shards: tuple[Shard, ...]
    threads: int
    tile_bytes: int
    add_base: bool = True
    kind: str = MODEL
    warnings: tuple[str, ...] = ()
    _matches: tuple[Match, ...] = field(default=(), repr=False)

    @property
    def weights(self) -> tuple[float, ...]:
        """One weight per source, in the recipe's order."""
        return tuple(source.weight for source in self.recipe.sources)

    @property
    def out_bytes(self) -> int:
        """Bytes of tensor data in the output."""
        return sum(match.out.nbytes for match in self._matches)

    @property
    def projected_mem_bytes(self) -> int:
        """Upper bound of what running the plan adds to the interpreter and its libraries."""
        operands = len(self.sources) + 2
        ring = self.threads * operands * (self.tile_bytes + 4096 + 64)
        return ring + BOOKKEEPING_BYTES * operands * len(self._matches)

    def facts(self) -> dict[str, Any]:
        """What running the plan reads, writes and needs, as plain data."""
        read = 0
        for stretch in self.runs():
            pieces = (stretch.base, *(piece for _, piece in stretch.sources))
            read += stretch.elems * sum(piece.dtype.itemsize for piece in pieces)
        return {
            "formula": " + ".join(
                ["base", *(f"{s.weight:g}*({s.name})" for s in self.recipe.sources if s.weight)]
            ),
            "tensors": len(self._matches),
            "files": [shard.name for shard in self.shards],
            "read_bytes": read,
            "write_bytes": sum(shard.size for shard in self.shards),
            "memory_bytes": self.projected_mem_bytes,
            "tile_bytes": self.tile_bytes,
            "threads": self.threads,
            "warnings": list(self.warnings),
        }

    def with_weights(self, weights: Mapping[str, float]) -> Plan:
        """The same plan with new weights by source name; sources not named keep theirs.

        Raises:
            RecipeError: for an unknown name or a weight that is not finite.
        """
        known = [source.name for source in self.recipe.sources]
        unknown = sorted(set(weights) - set(known))
        if unknown:
            raise RecipeError(
                f"no source is named {unknown[0]!r}",
                where="weights",
                todo=f"sources are {', '.join(known)}",
            )
        sources = [
            Source(s.name, s.model, float(weights.get(s.name, s.weight)), s.revision)
            for s in self.recipe.sources
        ]
        recipe = Recipe(
            self.recipe.base,
            sources,
            self.recipe.base_revision,
            self.recipe.out_dtype,
            self.recipe.max_shard_size,
        )
        return replace(self, recipe=recipe)

    def runs(self) -> list[Run]:
        """The whole output as runs, in file order; sources of weight 0 are not read."""
        active = [i for i, weight in enumerate(self.weights) if weight != 0]
        runs: list[Run] = []
        group: list[Match] = []
        layout: list[tuple[Any, ...]] = []
        ends: list[int] = []
        for match in self._matches:
            operands = match.operands(active)
            here = [(number, info.file, info.dtype) for number, info in operands]
            if group and (here != layout or [info.offset for _, info in operands] != ends):
                runs.append(_run(group, active))
                group = []
            group.append(match)
            layout = here
            ends = [info.offset + info.nbytes for _, info in operands]
        return [*runs, _run(group, active)] if group else runs

    def run(
        self, sink: Sink, *, threads: int | None = None, callbacks: Sequence[Callback] = ()
    ) -> Report:
        """Run into `sink`; see `engine.run`."""
        from optimer_engine import engine  # the ladder's one step back: a plan runs itself

        return engine.run(replace(self, threads=threads or self.threads), sink, callbacks=callbacks)

    def close(self) -> None:
        """Close the checkpoints' files."""
        for checkpoint in (self.base, *self.sources):
            checkpoint.close()


def plan(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    mem_limit: int | str = MEM_LIMIT,
    threads: int | None = None,
) -> Plan:
    """Resolve a recipe: open every checkpoint, check that they fit, lay out the output.

    Args:
        recipe: a Recipe, a mapping, or the path of a YAML file.
        mem_limit: bytes the run may add to the interpreter; tiles shrink to fit.
        threads: default one per available core.

    Raises:
        RecipeError, CheckpointError: what was written, or a checkpoint, is unusable.
        MismatchError: all the ways in which the sources do not fit the base, at once.
        MemoryLimitError: when not even small tiles fit.
    """
    recipe = Recipe.load(recipe)
    base = Checkpoint.open(locate(recipe.base, recipe.base_revision))
    sources = tuple(Checkpoint.open(locate(s.model, s.revision)) for s in recipe.sources)
    names = [source.name for source in recipe.sources]
    if base.kind == VECTOR:
        raise MismatchError("is a distribution vector, not a model", where=recipe.base)
    out_dtype = DType.parse(recipe.out_dtype) if recipe.out_dtype else None
    matches, warnings = align(base, list(zip(names, sources, strict=True)), out_dtype)
    return _finish(recipe, base, sources, matches, warnings, mem_limit, threads, {"format": "pt"})


def plan_difference(
    base: str | Path,
    trained: str | Path,
    *,
    dtype: str = "float32",
    metadata: Mapping[str, str] | None = None,
    mem_limit: int | str = MEM_LIMIT,
    threads: int | None = None,
) -> Plan:
    """Plan tau = theta_trained - theta_base, a distribution vector stored as `dtype`.

    Tensors that are not floating point must be equal and are left out. `metadata` joins the
    vector's header, beside the fingerprint of the base. Raises as `plan` does.
    """
    recipe = Recipe(str(base), [Source("trained", str(trained))], out_dtype=dtype)
    opened = Checkpoint.open(locate(recipe.base)), Checkpoint.open(locate(str(trained)))
    for checkpoint, name in zip(opened, (base, trained), strict=True):
        if checkpoint.kind == VECTOR:
            raise MismatchError(
                "is a distribution vector already, expected a model", where=str(name)
            )
    matches, warnings = align(opened[0], [("trained", opened[1])], DType.parse(dtype))
    kept = [match for match in matches if match.base.dtype.mergeable]
    header = {
        **(metadata or {}),
        "format": "pt",
        "kind": VECTOR,
        "base_fingerprint": opened[0].fingerprint,
    }
    made = _finish(
        recipe, opened[0], opened[1:], kept, warnings, mem_limit, threads, header, VECTOR
    )
    return replace(made, add_base=False)


def _finish(
    recipe: Recipe,
    base: Checkpoint,
    sources: tuple[Checkpoint, ...],
    matches: list[Match],
    warnings: list[str],
    mem_limit: int | str,
    threads: int | None,
    metadata: dict[str, str],
    kind: str = MODEL,
) -> Plan:
    """Lay out the shards and fit the tiles into the memory limit."""
    shards = _lay_out(matches, parse_bytes(recipe.max_shard_size), kind, metadata)
    by_name = {match.out.name: match for match in matches}
    placed = tuple(
        msgspec.structs.replace(by_name[info.name], out=info)
        for shard in shards
        for info in shard.tensors
    )
    threads = threads or available_cores()
    made = Plan(
        recipe, base, sources, shards, threads, TILE_BYTES, True, kind, tuple(warnings), placed
    )
    limit = parse_bytes(mem_limit)
    while made.projected_mem_bytes > limit:
        if made.tile_bytes // 2 < MIN_TILE_BYTES:
            raise MemoryLimitError(
                f"needs {format_bytes(made.projected_mem_bytes)}, the limit is"
                f" {format_bytes(limit)}",
                where="memory",
                todo="raise the limit or use fewer threads",
            )
        made = replace(made, tile_bytes=made.tile_bytes // 2)
    return made


def available_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _lay_out(
    matches: Iterable[Match], max_bytes: int, kind: str, metadata: dict[str, str]
) -> tuple[Shard, ...]:
    """Fill shards in the base's file order, named as `save_pretrained` names them."""
    groups: list[list[TensorInfo]] = [[]]
    filled = 0
    for match in matches:
        if groups[-1] and filled + match.out.nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(match.out)
        filled += match.out.nbytes
    shards = []
    for number, group in enumerate(groups):
        header, tensors = place(group, metadata, number)
        name = f"{kind}-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        size = len(header) + sum(info.nbytes for info in tensors)
        shards.append(
            Shard(name if len(groups) > 1 else f"{kind}.safetensors", header, size, tuple(tensors))
        )
    return tuple(shards)


def _run(group: list[Match], active: list[int]) -> Run:
    starts, elems = [], 0
    for match in group:
        starts.append(elems)
        elems += match.out.elems
    (_, base), (_, out), *sources = (
        (number, Piece(info.file, info.offset, info.dtype))
        for number, info in group[0].operands(active)
    )
    copied = not base.dtype.mergeable or (not sources and out.dtype == base.dtype)
    tensors = tuple(match.out for match in group)
    return Run(tensors, tuple(starts), elems, base, tuple(sources), out, copied)
