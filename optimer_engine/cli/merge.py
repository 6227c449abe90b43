"""`optimer merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optimer_engine.cli.devices import device_options, resident_mem
from optimer_engine.cli.output import emit, json_option
from optimer_engine.errors import RecipeError
from optimer_engine.types import format_bytes

if TYPE_CHECKING:
    from optimer_engine.mergekit import MergekitConfig
    from optimer_engine.planner import ReadBackend


@click.command(name="merge")
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("--base", metavar="MODEL", help="Base checkpoint: a folder, or org/name[@revision].")
@click.option(
    "--add",
    "added",
    multiple=True,
    metavar="MODEL=WEIGHT",
    help="A source, full checkpoint or vector, and its weight. Repeat for each.",
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="New folder.")
@click.option("--out-dtype", metavar="DTYPE", help="E.g. float32; default: the base's.")
@click.option("--max-shard-size", metavar="SIZE", help="Per file; default 5GB.")
@click.option(
    "--compat",
    type=click.Choice(["mergekit", "paper"]),
    help="Whose definition of a method holds where they differ; default: the paper's.",
)
@click.option("--seed", type=int, help="Of random masks and rounding; default 0.")
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "stochastic"]),
    help="To bf16; stochastic keeps small deltas on average.",
)
@click.option("--allow-nonfinite", is_flag=True, help="Keep NaN and infinity of the inputs.")
@click.option(
    "--on-overflow",
    type=click.Choice(["refuse", "clamp"]),
    default="refuse",
    show_default=True,
    help="Of sums too large for the output's dtype.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--discard", is_flag=True, help="Start afresh; default: continue if interrupted.")
@click.option("--mem-limit", default="512MiB", show_default=True, help="Beyond the interpreter.")
@click.option(
    "--read-backend",
    type=click.Choice(["pread", "mmap", "kvikio"]),
    default="pread",
    show_default=True,
    help="How inputs are read; kvikio: straight into GPU memory. The bits are the same.",
)
@device_options
@click.option("--part", metavar="I/N", help="Make only the I-th of N parts; the last publishes.")
@click.option(
    "--dask-scheduler", metavar="ADDRESS", help="Spread the parts over its workers, e.g. tcp://…"
)
@click.option("--disk-limit", metavar="SIZE", help="Of downloads at a time; removed after use.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: one per core.")
@json_option
def command(
    recipe: Path | None,
    base: str | None,
    added: tuple[str, ...],
    out: Path,
    out_dtype: str | None,
    max_shard_size: str | None,
    compat: str | None,
    seed: int | None,
    rounding: str | None,
    allow_nonfinite: bool,
    on_overflow: str,
    dry_run: bool,
    discard: bool,
    mem_limit: str,
    disk_limit: str | None,
    threads: int | None,
    read_backend: ReadBackend,
    device: str,
    storage_device: str,
    part: str | None,
    dask_scheduler: str | None,
    as_json: bool,
) -> None:
    """Merge a base and weighted sources into a new checkpoint.

    Computes base + sum of weight x (source - base), tile by tile, in bounded memory.

    \b
    Examples:
      optimer merge recipe.yaml -o merged
      optimer merge --base org/base --add org/ja=0.4 --add runs/math/vector=0.25 -o merged
      optimer merge recipe.yaml -o merged --device cuda:0,cuda:1
    """
    from optimer_engine.engine import merge
    from optimer_engine.planner import load_recipe, plan
    from optimer_engine.progress import bar
    from optimer_engine.recipe import Recipe

    if (recipe is None) == (base is None):
        raise RecipeError(
            "give a recipe file, or --base with --add, and not both",
            where="merge",
            todo="optimer merge --help shows an example of each",
        )
    options: dict[str, Any] = {"mem_limit": mem_limit, "max_shard_size": max_shard_size}
    options |= {"threads": threads, "backend": read_backend, "compat": compat, "seed": seed}
    options |= {"rounding": rounding, "disk_limit": disk_limit, "device": device}
    options |= {"nonfinite": "keep" if allow_nonfinite else "refuse", "overflow": on_overflow}
    options["resident_mem"] = resident_mem(device, storage_device)
    wanted: Recipe | MergekitConfig
    if recipe is not None:
        if added:
            raise RecipeError("--add belongs to --base, not to a recipe file", where="merge")
        wanted = load_recipe(recipe)
    else:
        sources = [_source(text) for text in added]
        wanted = Recipe.load({"base": base, "sources": sources})
    if out_dtype is not None:
        if not isinstance(wanted, Recipe):
            raise RecipeError("write out_dtype into the mergekit file", where="--out-dtype")
        wanted.out_dtype = out_dtype
    if dry_run:
        from optimer_engine.cli.plan import explanation
        from optimer_engine.explain import facts

        found = facts(plan(wanted, every_source=False, whole=False, **options))
        return emit(found, explanation(found), as_json)
    options["discard"] = discard
    if dask_scheduler is not None:
        if part is not None:
            raise RecipeError("give --part or --dask-scheduler, not both", where="merge")
        from optimer_engine.spread import merge_on_dask

        report = merge_on_dask(wanted, out, dask_scheduler, **options)
    else:
        options["callbacks"] = [bar(f"merge {out.name}")]
        report = merge(wanted, out, part=_part(part), **options)
    for warning in report.warnings:
        click.echo(f"optimer: warning: {warning}", err=True)
    moved = report.bytes_read + report.bytes_written
    where = f"part {report.part} of {out}" if report.part else str(out)
    text = (
        f"{where}: {report.tensors} tensors, {format_bytes(report.bytes_written)} written,"
        f" {format_bytes(report.bytes_read)} read in {report.wall_s:.2f} s"
        f" ({moved / 1e9 / report.wall_s:.1f} GB/s), peak memory"
        f" {format_bytes(report.peak_mem_bytes)} for the whole process"
    )
    emit(report.to_dict(), text, as_json)


def _part(text: str | None) -> tuple[int, int]:
    if text is None:
        return 1, 1
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise RecipeError(f"{text!r} is not I/N", where="--part", todo="write for example 2/4")
    return int(number), int(count)


def _source(text: str) -> dict[str, object]:
    model, _, weight = text.rpartition("=")
    try:
        return {"name": model, "model": model, "weight": float(weight)}
    except ValueError:
        raise RecipeError(
            f"{text!r} is not MODEL=WEIGHT",
            where="--add",
            todo="write for example --add runs/ja=0.4",
        ) from None
