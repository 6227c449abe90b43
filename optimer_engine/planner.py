"""From a recipe to a plan: every name, shape and dtype checked, every output byte placed.

Planning reads headers only (and a few KiB per tensor where a fingerprint is compared). All
mismatches are reported at once, before anything is written. A plan is immutable; `with_weights`
gives the same plan with other weights for the price of a copy, which is what a search trial needs.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import msgspec

from optimer_engine import methods
from optimer_engine.alignment import align
from optimer_engine.checkpoint import ADAPTER, MODEL, VECTOR, Backend, Checkpoint
from optimer_engine.downloads import check_limit, memory_bytes
from optimer_engine.errors import MemoryLimitError, MismatchError, RecipeError
from optimer_engine.hub import locate
from optimer_engine.layout import Shard, lay_out
from optimer_engine.operands import Operand
from optimer_engine.recipe import Recipe, Source, decode, read_yaml
from optimer_engine.remote import open_checkpoint
from optimer_engine.runs import DIFFERENCE, JOINED, Row, Run, Treatment, anchored, fold, join
from optimer_engine.tensor_recipe import Settings
from optimer_engine.types import DType, TensorInfo, format_bytes, parse_bytes

if TYPE_CHECKING:
    from optimer_engine.events import Callback
    from optimer_engine.mergekit import MergekitConfig
    from optimer_engine.report import Report
    from optimer_engine.sink import Sink

MEM_LIMIT = "512MiB"
TILE_BYTES = 512 * 1024
"""Per operand: larger tiles fall out of the second-level cache, smaller ones cost bookkeeping."""
MIN_TILE_BYTES = 16 * 1024
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
        opened = zip(self.names, self.checkpoints, strict=True)
        return {n: c for i, (n, c) in enumerate(opened) if i in used and c is not None}

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
        """Upper bound of what running the plan adds to the interpreter and its libraries."""
        computed = (
            sum(i.scratch_bytes(self.tile_bytes) for i in row.inputs if _computes(i))
            for row in self.rows
        )
        rows, row_bytes = self.ring_shape
        per_thread = rows * row_bytes + max(computed, default=0)
        shared, threads = 0, self.threads + self.spare_threads
        for run in self._method_runs():
            assert run.method is not None
            memory = run.method.memory(run.recipe)
            shared = max(shared, memory.shared_bytes + threads * memory.thread_bytes)
        bookkeeping = BOOKKEEPING_BYTES * rows * len(self.rows)
        # A job's last tiles overlap the next one's first: two statistics may be held at once.
        downloads = memory_bytes(self.checkpoints)
        return threads * per_thread + 2 * shared + bookkeeping + downloads

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
        for source, checkpoint in zip(sources, self.sources, strict=True):
            if source.weight and checkpoint is None:
                raise RecipeError(
                    "was not opened, since its weight was 0",
                    where=f"source {source.name!r}",
                    todo="plan with every_source=True",
                )
        recipe = msgspec.structs.replace(self.recipe, sources=sources)
        return replace(self, recipe=recipe, treatments=(fold(_treatment(recipe)),))

    def runs(self) -> list[Run]:
        """The whole output as runs, in file order; sources of weight 0 are not read."""
        own = set(self.own_shards)
        rows = [row for row in self.rows if row.out.file in own] if self.part[1] > 1 else self.rows
        return join(rows, self.treatments, self.checkpoints, self.rounding_seed is not None)

    @property
    def rounding_seed(self) -> int | None:
        """The seed of stochastic rounding; None where results go to the nearest."""
        recipe = self.recipe
        if isinstance(recipe, Recipe) and recipe.rounding == "stochastic":
            return recipe.seed
        return None

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
        for checkpoint in self.checkpoints:
            if checkpoint is not None:
                checkpoint.close()


def plan(
    recipe: Recipe | MergekitConfig | Mapping[str, Any] | str | Path,
    *,
    mem_limit: int | str = MEM_LIMIT,
    threads: int | None = None,
    every_source: bool = True,
    max_shard_size: int | str | None = None,
    compat: str | None = None,
    seed: int | None = None,
    part: tuple[int, int] = (1, 1),
    backend: Backend = "pread",
    whole: bool = True,
    disk_limit: int | str | None = None,
) -> Plan:
    """Resolve a recipe: open every checkpoint, check that they fit, lay out the output.

    Args:
        recipe: a Recipe, a mapping, or the path of a YAML file; mergekit's files work as well.
        mem_limit: bytes the run may add to the interpreter; tiles shrink to fit.
        threads: default one per available core, and as many more where the inputs do not lie in
            the page cache.
        max_shard_size: bytes per output file, in place of the recipe's.
        compat: "mergekit" for what mergekit computes where it departs from a method's paper.
        seed: of random masks and stochastic rounding, in place of the recipe's.
        part: (i, n): plan only the i-th of n parts of the output, counted from 1.
        backend: how the inputs are read, see `checkpoint`.
        whole: download inputs from the Hub now; else headers only, the rest while the plan runs.
        disk_limit: bytes that downloads may take at any time, if `whole` is False.
        every_source: also open sources of weight 0, which `with_weights` may turn on.

    Raises:
        RecipeError, CheckpointError: what was written, or a checkpoint, is unusable.
        MismatchError: all the ways in which the sources do not fit the base, at once.
        MemoryLimitError: when not even small tiles fit.
    """
    if not 1 <= part[0] <= part[1]:
        raise RecipeError(
            f"{part[0]}/{part[1]} is no part", where="part", todo="write 1/4, 2/4, 3/4 or 4/4"
        )
    recipe = load_recipe(recipe)
    spare = available_cores() if threads is None else 0
    threads = threads or available_cores()
    given = {"max_shard_size": max_shard_size, "compat": compat, "seed": seed}
    options = {key: value for key, value in given.items() if value is not None}
    if isinstance(recipe, Recipe):
        made = _plan_recipe(_with_options(recipe, options), every_source, whole, backend)
    else:
        made = _plan_mergekit(recipe, options, whole, backend)
    notes = (note for checkpoint in made.checkpoints if checkpoint for note in checkpoint.notes)
    made = replace(
        made,
        threads=threads,
        spare_threads=spare,
        part=part,
        options=options,
        disk_limit=None if disk_limit is None else parse_bytes(disk_limit),
        warnings=(*notes, *made.warnings),
    )
    made = _fit(_placed(made), mem_limit)
    if made.disk_limit is not None:
        check_limit([run.reads for run in made.runs()], made.disk_limit)
    return made


def _with_options(recipe: Recipe, options: Mapping[str, Any]) -> Recipe:
    changed = {key: value for key, value in options.items() if key != "compat"}
    asked = {key: value for key, value in options.items() if key != "max_shard_size"}
    known = {"compat", *methods.get(recipe.method).parameters}
    shared = {key: value for key, value in asked.items() if key in known}
    parameters = {**recipe.parameters, **shared}
    return msgspec.structs.replace(recipe, **changed, parameters=parameters)


def load_recipe(
    recipe: Recipe | MergekitConfig | Mapping[str, Any] | str | Path,
) -> Recipe | MergekitConfig:
    """A recipe in either language, from a mapping or a YAML file; mergekit's has `merge_method`.

    Raises:
        RecipeError: naming the key and the nearest right one.
    """
    if not isinstance(recipe, Mapping | str | Path):
        return recipe
    try:
        data = recipe if isinstance(recipe, Mapping) else read_yaml(recipe)
        is_mergekit = isinstance(data, Mapping) and "merge_method" in data
    except RecipeError as error:
        is_mergekit = "another document" in error.what  # it says better what such files are
        if not is_mergekit:
            raise
    if is_mergekit:
        from optimer_engine import mergekit

        return mergekit.load(recipe)
    return decode(data, Recipe, "recipe" if isinstance(recipe, Mapping) else str(recipe))


def _plan_recipe(recipe: Recipe, every_source: bool, whole: bool, backend: Backend) -> Plan:
    base = open_checkpoint(recipe.base, recipe.base_revision, whole=whole, backend=backend)
    _require_model(base, recipe.base)
    sources = tuple(
        open_checkpoint(source.model, source.revision, whole=whole, backend=backend)
        if every_source or source.weight
        else None
        for source in recipe.sources
    )
    names = [source.name for source in recipe.sources]
    out_dtype = DType.parse(recipe.out_dtype) if recipe.out_dtype else None
    rows, warnings = align(base, list(zip(names, sources, strict=True)), out_dtype, recipe.rows)
    unfolded = _treatment(recipe)
    treatment = fold(unfolded)
    return Plan(
        _pinned(recipe, (base, *sources)),
        (base, *sources),
        ("base", *names),
        (treatment,),
        tuple(anchored(row, treatment, unfolded) for row in rows),
        lay_out((row.out for row in rows), parse_bytes(recipe.max_shard_size), MODEL, _FROM_TORCH),
        1,
        TILE_BYTES,
        warnings=tuple(warnings),
        files=_changed_config(base, out_dtype, rows),
    )


def _pinned(recipe: Recipe, opened: Sequence[Checkpoint | None]) -> Recipe:
    """The recipe with the commit of each checkpoint that came from the Hub."""
    commits = [checkpoint.origin.get("commit") if checkpoint else None for checkpoint in opened]
    sources = [
        msgspec.structs.replace(source, revision=commit or source.revision)
        for source, commit in zip(recipe.sources, commits[1:], strict=True)
    ]
    base_revision = commits[0] or recipe.base_revision
    return msgspec.structs.replace(recipe, base_revision=base_revision, sources=sources)


def _changed_config(base: Checkpoint, dtype: DType | None, rows: list[Row]) -> dict[str, bytes]:
    """config.json as a file to write, where dtype, vocabulary or scales are not the base's."""
    config = copy.deepcopy(base.config)
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype.torch_name
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    for row in rows:
        before = base.tensors[row.out.name].shape
        if row.out.shape != before and text.get("vocab_size") == before[0]:
            text["vocab_size"] = row.out.shape[0]
    if base.scales:
        config.pop("quantization_config", None)
    return {} if config == base.config and dtype is None else {"config.json": _json(config)}


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def _plan_mergekit(
    config: MergekitConfig, options: Mapping[str, Any], whole: bool, backend: Backend
) -> Plan:
    from optimer_engine.lowering import lower
    from optimer_engine.mergekit import expand

    models = config.models()
    opened = tuple(
        open_checkpoint(model.path, model.revision, whole=whole, backend=backend)
        for model in models
    )
    adapters = {
        number: open_checkpoint(model.lora, model.lora_revision, whole=whole, backend=backend)
        for number, model in enumerate(models)
        if model.lora is not None
    }
    for number, adapter in adapters.items():
        if adapter.kind != ADAPTER:
            raise MismatchError(
                f"is a {adapter.kind}, not a LoRA adapter",
                where=str(models[number].lora),
                todo="write MODEL+ADAPTER with a PEFT folder after the +",
            )
    folders = {
        model: locate(model.path, model.revision, weights=False)
        for model in config.tokenizer_models()
    }
    expansion = expand(config, dict(zip(models, opened, strict=True)), folders)
    rows, treatments = lower(expansion, opened, adapters, options)
    size = parse_bytes(options.get("max_shard_size", "5GB"))
    shards = lay_out((row.out for row in rows), size, MODEL, _FROM_TORCH)
    files = dict(expansion.files)
    config_json = dict(expansion.config)
    if opened[expansion.donor].scales:
        config_json.pop("quantization_config", None)
    if expansion.config_changes or config_json != expansion.config:
        files["config.json"] = _json(config_json)
    return Plan(
        config,
        (*opened, *adapters.values()),
        tuple(f"{i}" for i in (*models, *(models[number].lora for number in adapters))),
        tuple(treatments),
        tuple(rows),
        shards,
        1,
        TILE_BYTES,
        warnings=expansion.warnings,
        donor=expansion.donor,
        files=files,
        omitted=expansion.omitted,
    )


_FROM_TORCH = {"format": "pt"}


def _treatment(recipe: Recipe) -> Treatment:
    """The recipe's method over the base (checkpoint 0) and the sources (1, 2, ...)."""
    method = methods.get(recipe.method)
    given = []
    for source in recipe.sources:
        own: dict[str, Any] = {}
        if "weight" in method.parameters or source.weight != 1.0:
            own["weight"] = source.weight
        if "stream" in method.parameters:
            own["stream"] = source.name  # its mask does not depend on the other sources
        given.append({**own, **source.parameters})
    settings = method.settings(recipe.parameters, given)
    return Treatment(recipe.method, settings, tuple(range(len(given) + 1)), method.skips_zero)


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
    opened = open_checkpoint(recipe.base), open_checkpoint(str(trained))
    for checkpoint, name in zip(opened, (base, trained), strict=True):
        _require_model(checkpoint, str(name))
    rows, warnings = align(opened[0], [("trained", opened[1])], DType.parse(dtype))
    kept = tuple(row for row in rows if row.out.dtype.mergeable)
    header = {
        **(metadata or {}),
        **_FROM_TORCH,
        "kind": VECTOR,
        "base_fingerprint": opened[0].fingerprint,
    }
    made = Plan(
        _pinned(recipe, opened),
        opened,
        ("base", "trained"),
        (Treatment(DIFFERENCE, Settings.of({}, [{"weight": 1.0}]), (0, 1)),),
        kept,
        lay_out((row.out for row in kept), parse_bytes(recipe.max_shard_size), VECTOR, header),
        threads or available_cores(),
        TILE_BYTES,
        VECTOR,
        tuple(warnings),
    )
    return _fit(_placed(made), mem_limit)


def _require_model(checkpoint: Checkpoint, name: str) -> None:
    what = {VECTOR: "a distribution vector", ADAPTER: "a LoRA adapter"}.get(checkpoint.kind)
    if what:
        raise MismatchError(f"is {what}, not a model", where=name)


def _placed(made: Plan) -> Plan:
    """The rows in the shards' order, each knowing its output's place."""
    by_name = {row.out.name: row for row in made.rows}
    rows = (
        msgspec.structs.replace(by_name[info.name], out=info)
        for shard in made.shards
        for info in shard.tensors
    )
    return replace(made, rows=tuple(rows))


def _fit(made: Plan, mem_limit: int | str) -> Plan:
    """The plan with tiles that keep it within the limit."""
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


def _computes(given: TensorInfo | Operand | None) -> TypeGuard[Operand]:
    return given is not None and type(given) is not TensorInfo


def available_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
