"""From a recipe to a plan: every name, shape and dtype checked, every output byte placed.

Planning reads headers only (and a few KiB per tensor where a fingerprint is compared). All
mismatches are reported at once, before anything is written.
"""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from optimer_engine.alignment import align
from optimer_engine.checkpoint import ADAPTER, MODEL, VECTOR, Backend, Checkpoint
from optimer_engine.downloads import check_limit
from optimer_engine.errors import MismatchError, RecipeError
from optimer_engine.hub import locate
from optimer_engine.layout import lay_out
from optimer_engine.operands import Stored
from optimer_engine.plans import (
    MEM_LIMIT,
    TILE_BYTES,
    Plan,
    available_cores,
    check_on_gpus,
    fitted,
    fitted_on_gpus,
    multiplies_on_gpus,
    placed,
    treatments_of,
)
from optimer_engine.quantized import refuse_packed
from optimer_engine.recipe import Recipe, Source, decode, read_yaml
from optimer_engine.remote import open_checkpoint
from optimer_engine.runs import DIFFERENCE, JOINED, Row, Treatment, anchored, fold
from optimer_engine.suspicions import suspicions
from optimer_engine.tensor_recipe import Settings
from optimer_engine.types import DType, TensorInfo, parse_bytes

ReadBackend = Literal["pread", "mmap", "kvikio"]

if TYPE_CHECKING:
    from optimer_engine.device import Devices
    from optimer_engine.mergekit import MergekitConfig


@contextmanager
def _no_collection() -> Iterator[None]:
    """A plan is many small objects without cycles; to count them again and again took a fifth of
    the time of a large one."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collection()
def plan(
    recipe: Recipe | MergekitConfig | Mapping[str, Any] | str | Path,
    *,
    mem_limit: int | str = MEM_LIMIT,
    threads: int | None = None,
    every_source: bool = True,
    max_shard_size: int | str | None = None,
    compat: str | None = None,
    seed: int | None = None,
    rounding: Literal["nearest", "stochastic"] | None = None,
    nonfinite: Literal["refuse", "keep"] = "refuse",
    overflow: Literal["refuse", "clamp"] = "refuse",
    part: tuple[int, int] = (1, 1),
    backend: ReadBackend = "pread",
    whole: bool = True,
    disk_limit: int | str | None = None,
    device: str = "cpu",
    resident_mem: int | str = 0,
) -> Plan:
    """Resolve a recipe: open every checkpoint, check that they fit, lay out the output.

    Args:
        recipe: a Recipe, a mapping, or the path of a YAML file; mergekit's files work as well.
        mem_limit: bytes the run may add to the interpreter; tiles shrink to fit.
        threads: default one per available core, and as many more where the inputs do not lie in
            the page cache; four for each GPU.
        max_shard_size: bytes per output file, in place of the recipe's.
        compat: "mergekit" for what mergekit computes where it departs from a method's paper.
        seed: of random masks and stochastic rounding, in place of the recipe's.
        rounding: in place of the recipe's; mergekit's files cannot say it.
        nonfinite: "keep" to let NaN and infinity in the inputs pass into the output.
        overflow: "clamp" to make of sums that are too large the output dtype's largest number.
        part: (i, n): plan only the i-th of n parts of the output, counted from 1.
        backend: how the inputs are read, see `checkpoint`; or "kvikio", into GPU memory directly.
        device: "cpu"; "cuda" for all GPUs, "cuda:0,1" for some; "auto" for GPUs if there are any,
            where methods without a GPU form stay in main memory instead of being refused.
        resident_mem: bytes of each GPU in which inputs stay that were read once, for the next pass
            of a method and for the next run of the plan; "free" for what is free now.
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
    devices = _devices(device, backend)
    read_by: Backend = "mmap" if backend == "mmap" else "pread"
    workers = devices.workers if devices else available_cores()
    spare = available_cores() if threads is None and devices is None else 0
    threads = threads or workers
    given = {"max_shard_size": max_shard_size, "compat": compat, "seed": seed, "rounding": rounding}
    options = {key: value for key, value in given.items() if value is not None}
    if isinstance(recipe, Recipe):
        made = _plan_recipe(_with_options(recipe, options), every_source, whole, read_by)
    else:
        made = _plan_mergekit(recipe, options, whole, read_by)
    if nonfinite == "keep":
        _check_all_linear(made)
        options["nonfinite"] = nonfinite
    if overflow == "clamp":
        options["overflow"] = overflow
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
    if devices is not None:
        made = _on_gpus(made, devices, device)
    made = fitted(placed(made), mem_limit)
    if devices is not None:
        if resident_mem != "free":
            devices.keep(parse_bytes(resident_mem) if resident_mem else 0)
        made = fitted_on_gpus(made)
        if resident_mem == "free":
            devices.keep(int(FREE_SHARE * (devices.free_bytes() - made.device_mem_bytes)))
    if made.disk_limit is not None:
        check_limit([run.reads for run in made.runs()], made.disk_limit)
    return made


FREE_SHARE = 0.9
"""Of a GPU's free memory that `resident_mem="free"` takes: allocators need some room."""


def _check_all_linear(made: Plan) -> None:
    for treatment in made.treatments:
        if treatment.method not in JOINED:
            raise RecipeError(
                f"method {treatment.method} orders and measures values, which NaN has no place in",
                where="allow-nonfinite",
                todo="repair the source, or merge it by method: task_arithmetic",
            )


def _devices(device: str, backend: str) -> Devices | None:
    if device == "cpu" and backend in ("pread", "mmap"):
        return None
    from optimer_engine.cuda import devices_for

    return devices_for(device, backend)


def _on_gpus(made: Plan, devices: Devices, device: str) -> Plan:
    """The plan for GPUs; methods that have no GPU form are refused unless `device` is auto."""
    from optimer_engine.device import TILE_BYTES as GPU_TILE_BYTES

    made = replace(made, devices=devices, tile_bytes=GPU_TILE_BYTES)
    if device != "auto":
        check_on_gpus(placed(made))
    if multiplies_on_gpus(made):
        made = replace(made, options={**made.options, "device": "cuda"})
    return made


def _with_options(recipe: Recipe, options: Mapping[str, Any]) -> Recipe:
    changed = {key: value for key, value in options.items() if key != "compat"}
    shared = {key: value for key, value in options.items() if key == "compat"}
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
    for source, opened in zip(recipe.sources, sources, strict=True):
        if opened is not None and opened.kind == MODEL:
            refuse_packed(opened, source.model)
    names = [source.name for source in recipe.sources]
    out_dtype = DType.parse(recipe.out_dtype) if recipe.out_dtype else None
    named = list(zip(names, sources, strict=True))
    rows, warnings, files, omitted = align(base, named, out_dtype, recipe.rows, recipe.vocabulary)
    warnings += suspicions(base, named, out_dtype)
    if recipe.method not in JOINED:
        rows = [_unmoved(row, (base, *sources)) for row in rows]
    unfolded = treatments_of(recipe)
    treatments = tuple(map(fold, unfolded))
    groups = _layer_groups([row.out.name for row in rows], len(treatments))
    grouped = (
        msgspec.structs.replace(row, treatment=group)
        for row, group in zip(rows, groups, strict=True)
    )
    return Plan(
        _pinned(recipe, (base, *sources)),
        (base, *sources),
        ("base", *names),
        treatments,
        tuple(anchored(r, treatments[r.treatment], unfolded[r.treatment]) for r in grouped),
        lay_out((row.out for row in rows), parse_bytes(recipe.max_shard_size), MODEL, _FROM_TORCH),
        1,
        TILE_BYTES,
        warnings=tuple(warnings),
        files={**files, **_changed_config(base, out_dtype, rows)},
        omitted=omitted,
    )


def _unmoved(row: Row, checkpoints: Sequence[Checkpoint | None]) -> Row:
    """The row with the base's tensor for sources that leave it alone, where others do not.

    A weighted sum of deltas may leave them out; other methods count their inputs.
    """
    base, *given = row.inputs
    missing = [g is None and c is not None for g, c in zip(given, checkpoints[1:], strict=True)]
    if not any(missing) or not any(g is not None for g in given):
        return row
    if isinstance(base, TensorInfo):
        assert checkpoints[0] is not None
        base = Stored(checkpoints[0], base, False)
    inputs = [base if lacks else g for lacks, g in zip(missing, given, strict=True)]
    return msgspec.structs.replace(row, inputs=(row.inputs[0], *inputs))


def _layer_groups(names: Sequence[str], groups: int) -> list[int]:
    """By tensor, which of so many equal groups of consecutive layers it belongs to."""
    if groups == 1:
        return [0] * len(names)
    from optimer_engine.names import comes_first, layer, plain

    found = [layer(plain(name)) for name in names]
    layers: dict[str, int] = {}
    for at in found:
        if at is not None:
            layers[at[0]] = max(layers.get(at[0], 0), at[1] + 1)
    if not layers or max(layers.values()) < groups:
        raise RecipeError(
            f"{groups} groups of layers, and the base has {max(layers.values(), default=0)} layers",
            where="by_layer",
            todo="use fewer groups",
        )
    last = groups - 1
    return [
        at[1] * groups // layers[at[0]] if at else 0 if comes_first(plain(name)) else last
        for name, at in zip(names, found, strict=True)
    ]


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
    for model, found in zip(models, opened, strict=True):
        refuse_packed(found, model.path)
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
    rows, warnings, *_ = align(opened[0], [("trained", opened[1])], DType.parse(dtype))
    kept = tuple(row for row in rows if row.out.dtype.mergeable and row.inputs[1] is not None)
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
    return fitted(placed(made), mem_limit)


def _require_model(checkpoint: Checkpoint, name: str) -> None:
    what = {VECTOR: "a distribution vector", ADAPTER: "a LoRA adapter"}.get(checkpoint.kind)
    if what:
        raise MismatchError(
            f"is {what}, not a model", where=name, todo="name it among the sources of a base"
        )
    refuse_packed(checkpoint, name)
