"""The plan: a recipe resolved against real files, every output byte placed, its memory known.

A plan is immutable; `with_weights` gives the same plan with other weights for the price of a copy,
which is what a search trial needs. `planner` makes plans, `engine` runs them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeGuard

import msgspec

from optimer_engine import methods
from optimer_engine.adapter import LowRank
from optimer_engine.checkpoint import ADAPTER, MODEL, Checkpoint
from optimer_engine.downloads import memory_bytes
from optimer_engine.errors import MemoryLimitError, RecipeError, quoted
from optimer_engine.layout import Shard
from optimer_engine.operands import Operand
from optimer_engine.recipe import Recipe
from optimer_engine.runs import GPU_SOURCES, JOINED, Row, Run, Treatment, fold, join
from optimer_engine.types import TensorInfo, format_bytes, parse_bytes

if TYPE_CHECKING:
    from optimer_engine.device import Devices
    from optimer_engine.events import Callback
    from optimer_engine.mergekit import MergekitConfig
    from optimer_engine.report import Report
    from optimer_engine.sink import Sink

MEM_LIMIT = "512MiB"
TILE_BYTES = 1 << 20
"""Per operand: larger tiles fall out of the caches, smaller ones make threads wait for the GIL."""
MIN_TILE_BYTES = 16 * 1024
RING_BYTES = 8 << 20
"""Of a thread's tiles together: from eight sources on, more of them means smaller tiles..."""
LEAST_TILE_BYTES = 64 * 1024
"""...down to this size, below which starting a tile costs as much as doing it."""
HUGE_PAGES_FROM_BYTES, HUGE_PAGE_BYTES = 4 << 20, 2 << 20
"""numpy asks for huge pages for arrays from this size on; the last page is never quite used."""
BOOKKEEPING_BYTES = 500
"""Rough cost in memory of one tensor's names and offsets in one checkpoint."""


@dataclass(frozen=True)
class Plan:
    """A recipe resolved against real files; made by `plan` or `plan_difference`.

    Attributes:
        recipe: what was asked for; its weights are the ones used.
        checkpoints: the opened inputs, the base first; None for a source of weight 0 that was left
            unopened. `names`: what the user calls each.
        rows: every output tensor, placed; `treatments`: what is done to them.
        shards: the output files, every byte placed.
        part: (i, n) to make only the shards that are the i-th of n parts' share.
        kind: "model" or "vector", the kind of checkpoint that comes out.
        threads, tile_bytes: how it runs; neither changes a bit of the output.
        spare_threads: that join where the inputs turn out to be slow to read.
        warnings: what was noticed and not refused.
        donor: number of the checkpoint that configuration and tokenizer files come from; `files`
            are written in place of its own, `omitted` are not copied.
        options: keywords of `plan` that decide the output's bytes, beside the recipe.
        devices: the GPUs that merge, or None for main memory; what is resident there outlives a
            run, so that trials of a search share it.
    """

    recipe: Recipe | MergekitConfig
    checkpoints: tuple[Checkpoint | None, ...]
    names: tuple[str, ...]
    treatments: tuple[Treatment, ...]
    rows: tuple[Row, ...]
    shards: tuple[Shard, ...]
    threads: int
    tile_bytes: int
    kind: str = MODEL
    warnings: tuple[str, ...] = ()
    part: tuple[int, int] = (1, 1)
    donor: int = 0
    files: Mapping[str, bytes] = field(default_factory=dict)
    omitted: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    spare_threads: int = 0
    disk_limit: int | None = None
    devices: Devices | None = field(default=None, compare=False)

    @property
    def base(self) -> Checkpoint:
        """The checkpoint that configuration and tokenizer come from."""
        base = self.checkpoints[self.donor]
        assert base is not None
        return base

    @property
    def written_recipe(self) -> dict[str, Any]:
        """The recipe as plain data, as it goes into the report; `load_recipe` reads it back."""
        return self.recipe.to_dict() if isinstance(self.recipe, Recipe) else self.recipe.written

    @property
    def sources(self) -> tuple[Checkpoint | None, ...]:
        """The inputs beside the base."""
        return self.checkpoints[1:]

    @property
    def read_checkpoints(self) -> dict[str, Checkpoint]:
        """Name to checkpoint, of those that the plan reads."""
        used = {self.donor}
        for treatment in self.treatments:
            weights = (dict(pairs).get("weight", 1.0) for pairs in treatment.settings.per_source)
            read = zip(treatment.checkpoints[1:], weights, strict=True)
            skips = treatment.skips_zero
            used |= {number for number, weight in read if weight != 0 or not skips}
            used |= set(treatment.checkpoints[:1]) - {-1}
        if not isinstance(self.recipe, Recipe):  # adapters that a mergekit file puts on its models
            used |= {n for n, c in enumerate(self.checkpoints) if c and c.kind == ADAPTER}
        found: dict[str, Checkpoint] = {}
        for number, (name, opened) in enumerate(zip(self.names, self.checkpoints, strict=True)):
            if number in used and opened is not None:  # a source may be called "base"
                found[f"{name} ({number})" if name in found else name] = opened
        return found

    @property
    def out_bytes(self) -> int:
        """Bytes of tensor data that this plan, or its part, puts out."""
        own = set(self.own_shards)
        return sum(row.out.nbytes for row in self.rows if row.out.file in own)

    @property
    def own_shards(self) -> range:
        """Numbers of the shards that this part makes."""
        number, count = self.part
        return range(number - 1, len(self.shards), count)

    @property
    def projected_mem_bytes(self) -> int:
        """Upper bound of what running the plan adds to the interpreter and its libraries.

        With GPUs a thread's buffers are pinned: `pinned_mem_bytes` is a part of this.
        """
        rows, row_bytes = self.ring_shape
        ring_bytes = rows * row_bytes
        if ring_bytes >= HUGE_PAGES_FROM_BYTES and self.devices is None:
            ring_bytes += HUGE_PAGE_BYTES
        per_thread = ring_bytes + self._scratch_bytes()
        shared, threads = 0, self.threads + self.spare_threads
        for run in self._method_runs():
            assert run.method is not None
            memory = run.method.memory(run.recipe)
            # What the threads found is added up in one more of the same.
            shared = max(shared, memory.shared_bytes + (threads + 1) * memory.thread_bytes)
        bookkeeping = BOOKKEEPING_BYTES * rows * len(self.rows)
        # A job's last tiles overlap the next one's first: two statistics may be held at once.
        downloads = memory_bytes(self.checkpoints)
        return threads * per_thread + 2 * shared + bookkeeping + downloads

    def _scratch_bytes(self) -> int:
        """What a thread needs for operands that compute their elements, at most."""
        if not any(_computes(given) for row in self.rows for given in row.inputs):
            return 0
        tiles = ((run, min(run.elems, run.tile_elems(self.tile_bytes))) for run in self.runs())
        return max(sum(o.scratch_bytes(elems) for o in run.operands) for run, elems in tiles)

    @property
    def pinned_mem_bytes(self) -> int:
        """Main memory that GPUs read and write by themselves; 0 without."""
        rows, row_bytes = self.ring_shape
        return self.threads * rows * row_bytes if self.devices else 0

    @property
    def device_mem_bytes(self) -> int:
        """Upper bound of what the run takes of each GPU, but for what stays resident there."""
        if self.devices is None:
            return 0
        rows, row_bytes = self.ring_shape
        scratch = (
            run.method.gpu_bytes(run.recipe, run.tile_elems(self.tile_bytes))
            for run in self._method_runs()
            if run.method is not None and run.on_gpu
        )
        computed = [
            [given for given in row.inputs if _computes(given)]
            for row in self.rows
            if any(map(_computes, row.inputs))
        ]
        factors = (sum(_factor_bytes(given, row_bytes) for given in some) for some in computed)
        packed = row_bytes if computed else 0
        each = rows * row_bytes + packed + max(factors, default=0) + max(scratch, default=0)
        return self.threads * each

    @property
    def ring_shape(self) -> tuple[int, int]:
        """(operands and the output, bytes of each) of a thread's buffers."""
        rows = max((len(treatment.checkpoints) for treatment in self.treatments), default=1) + 1
        rows += self.rounding_seed is not None
        widths = (run.tile_elems(self.tile_bytes) * run.widest for run in self._method_runs())
        return rows, max([self.tile_bytes, *widths]) + 4096 + 64

    def _method_runs(self) -> list[Run]:
        """The runs that the fused linear kernel does not do."""
        if all(treatment.method in JOINED for treatment in self.treatments):
            return []
        return [run for run in self.runs() if run.method is not None]

    def with_weights(self, weights: Mapping[str, float]) -> Plan:
        """The same plan with new weights by source name; sources not named keep theirs.

        Raises:
            RecipeError: for an unknown name, a weight that is not finite, or a source that was left
                unopened.
        """
        if not isinstance(self.recipe, Recipe):
            raise RecipeError(
                "a mergekit file has weights for each tensor",
                where="weights",
                todo="write the merge as a recipe with base and sources to change its weights",
            )
        known = [source.name for source in self.recipe.sources]
        unknown = sorted(set(weights) - set(known))
        if unknown:
            raise RecipeError(
                f"no source is named {unknown[0]!r}",
                where="weights",
                todo=f"sources are {', '.join(known)}",
            )
        sources = [
            msgspec.structs.replace(s, weight=float(weights.get(s.name, s.weight)))
            for s in self.recipe.sources
        ]
        return self.with_settings(msgspec.structs.replace(self.recipe, sources=sources))

    def with_settings(self, recipe: Recipe) -> Plan:
        """The same plan with weights, factors by layer and parameters of `recipe`.

        Args:
            recipe: merges the same sources by the same method; its checkpoints are not looked at.

        Raises:
            RecipeError: the sources' names, the method or the number of layer groups differ, a
                parameter is unusable, or a source that was left unopened has a weight.
        """
        assert isinstance(self.recipe, Recipe)
        for what, mine, theirs in (
            ("sources", [s.name for s in self.recipe.sources], [s.name for s in recipe.sources]),
            ("method", self.recipe.method, recipe.method),
            ("layer groups", self.recipe.layer_groups, recipe.layer_groups),
        ):
            if mine != theirs:
                raise RecipeError(f"{what} are {theirs}, the plan was made for {mine}", where=what)
        for source, checkpoint in zip(recipe.sources, self.sources, strict=True):
            if source.weight and checkpoint is None:
                raise RecipeError(
                    "was not opened, since its weight was 0",
                    where=f"source {source.name!r}",
                    todo="plan with every_source=True",
                )
        sources = [
            msgspec.structs.replace(
                s, weight=n.weight, by_layer=n.by_layer, parameters=n.parameters
            )
            for s, n in zip(self.recipe.sources, recipe.sources, strict=True)
        ]
        changed = msgspec.structs.replace(
            self.recipe, sources=sources, parameters=recipe.parameters
        )
        return replace(self, recipe=changed, treatments=tuple(map(fold, treatments_of(changed))))

    def runs(self) -> list[Run]:
        """The whole output as runs, in file order; sources of weight 0 are not read."""
        own = set(self.own_shards)
        rows = [row for row in self.rows if row.out.file in own] if self.part[1] > 1 else self.rows
        return join(rows, self.treatments, self.checkpoints, self.rounding_seed is not None)

    @property
    def rounding_seed(self) -> int | None:
        """The seed of stochastic rounding; None where results go to the nearest."""
        rounding: str | None
        if isinstance(self.recipe, Recipe):
            rounding, seed = self.recipe.rounding, self.recipe.seed
        else:
            rounding, seed = self.options.get("rounding"), self.options.get("seed", 0)
        return seed if rounding == "stochastic" else None

    def run(
        self, sink: Sink, *, threads: int | None = None, callbacks: Sequence[Callback] = ()
    ) -> Report:
        """Run into `sink`; see `engine.run`."""
        from optimer_engine import engine  # the ladder's one step back: a plan runs itself

        made = self if threads is None else replace(self, threads=threads, spare_threads=0)
        return engine.run(made, sink, callbacks=callbacks)

    def iter_tensors(self) -> Iterator[tuple[str, Any]]:
        """Merge and give out (name, torch tensor) one by one; see `iteration.iter_tensors`."""
        from optimer_engine.iteration import iter_tensors

        return iter_tensors(self)

    def close(self) -> None:
        """Close the checkpoints' files."""
        if self.devices is not None:
            self.devices.close()
        for checkpoint in self.checkpoints:
            if checkpoint is not None:
                checkpoint.close()


def treatments_of(recipe: Recipe) -> list[Treatment]:
    """The method over the base (checkpoint 0) and the sources (1, 2, ...), by group of layers."""
    return [_treatment(recipe, group) for group in range(recipe.layer_groups)]


def _treatment(recipe: Recipe, group: int) -> Treatment:
    method = methods.get(recipe.method)
    shared, own_parameters = dict(recipe.parameters), [s.parameters for s in recipe.sources]
    if "seed" in method.parameters:
        if any("seed" in parameters for parameters in (shared, *own_parameters)):
            raise RecipeError(
                "is no parameter of a method: one seed decides all that is left to chance",
                where="parameters.seed",
                todo="write seed: at the top of the recipe",
            )
        shared["seed"] = recipe.seed
    given = []
    for source in recipe.sources:
        own: dict[str, Any] = {}
        weight = source.weight * (source.by_layer[group] if source.by_layer else 1.0)
        if "weight" in method.parameters or weight != 1.0:
            own["weight"] = weight
        if "stream" in method.parameters:
            own["stream"] = source.name  # its mask does not depend on the other sources
        given.append({**own, **source.parameters})
    settings = method.settings(shared, given)
    return Treatment(recipe.method, settings, tuple(range(len(given) + 1)), method.skips_zero)


def placed(made: Plan) -> Plan:
    """The rows in the shards' order, each knowing its output's place."""
    by_name = {row.out.name: row for row in made.rows}
    rows = (
        msgspec.structs.replace(by_name[info.name], out=info)
        for shard in made.shards
        for info in shard.tensors
    )
    return replace(made, rows=tuple(rows))


def fitted(made: Plan, mem_limit: int | str) -> Plan:
    """The plan with tiles that keep it within the limit, and that many sources do not enlarge."""
    limit = parse_bytes(mem_limit)
    rows, _ = made.ring_shape
    while (
        made.devices is None  # whose tiles are as large as a copy to them wants
        and rows * made.tile_bytes > RING_BYTES
        and made.tile_bytes > LEAST_TILE_BYTES
    ):
        made = replace(made, tile_bytes=made.tile_bytes // 2)
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


def fitted_on_gpus(made: Plan) -> Plan:
    """The plan with tiles that fit what its GPUs have free."""
    assert made.devices is not None
    free = made.devices.free_bytes()
    while made.device_mem_bytes + made.devices.resident_bytes > free:
        if made.tile_bytes // 2 < MIN_TILE_BYTES:
            needed = made.device_mem_bytes + made.devices.resident_bytes
            raise MemoryLimitError(
                f"needs {format_bytes(needed)} of a GPU's memory, {format_bytes(free)} are free",
                where=made.devices.name,
                todo="keep less resident, stop what else runs there, or use device cpu",
            )
        made = replace(made, tile_bytes=made.tile_bytes // 2)
    return made


def check_on_gpus(made: Plan) -> None:
    """Refuse what has no GPU form.

    Raises:
        RecipeError: naming each method and a tensor.
    """
    lacking: dict[str, str] = {}
    for run in made.runs():
        if not (run.on_gpu or run.copied):
            why = "has no GPU form"
            if len(run.sources) > GPU_SOURCES:
                why = f"has {len(run.sources)} sources, GPUs take {GPU_SOURCES}"
            method = run.treatment.method
            lacking.setdefault(method, f"{method} of {quoted(run.tensors[0].name)} {why}")
    if lacking:
        raise RecipeError(
            "; ".join(lacking.values()),
            where="device",
            todo="use device auto, which merges those in main memory, or device cpu",
        )


def multiplies_on_gpus(made: Plan) -> bool:
    """Whether low-rank products are formed on a GPU: their last bits are the hardware's."""
    return made.devices is not None and any(
        isinstance(given, LowRank) for row in made.rows for given in row.inputs
    )


def _factor_bytes(operand: Operand, tile_bytes: int) -> int:
    """What an adapter takes on a GPU: its right factor, rows of the left one, and the product."""
    if not isinstance(operand, LowRank):
        return 0
    columns, rank = operand.shape[1], operand.left.shape[1]
    rows = tile_bytes // (4 * max(1, columns)) + 2
    return 4 * (rank * (columns + rows) + rows * columns)


def _computes(given: TensorInfo | Operand | None) -> TypeGuard[Operand]:
    return given is not None and type(given) is not TensorInfo


def available_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
