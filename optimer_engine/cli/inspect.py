"""`optimer inspect`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optimer_engine.cli.output import emit, json_option
from optimer_engine.errors import MismatchError, RecipeError

if TYPE_CHECKING:
    from optimer_engine.checkpoint import Checkpoint


@click.command(name="inspect")
@click.argument("folders", nargs=-1, required=True)
@click.option("--base", help="What they were trained from; needed for models and exact vectors.")
@click.option("--headers", is_flag=True, help="Only what the headers say; reads no weights.")
@click.option("--rank", is_flag=True, help="Add the effective rank of every matrix (slow).")
@click.option("--trajectory", is_flag=True, help="FOLDERS are checkpoints of one run, in order.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw into this .png or .svg file.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: one per core.")
@json_option
def command(
    folders: tuple[str, ...],
    base: str | None,
    headers: bool,
    rank: bool,
    trajectory: bool,
    plot: Path | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Say what is in FOLDERS, and how the vectors of a pool lie to each other.

    A folder that is a pool stands for all its vectors. One folder: kind, shapes, dtypes, sizes,
    fingerprint, at once. Several, or one with its base or a vector: also norms, cosines and
    unchanged parameters, by layer and module type, in one pass over the files; and warnings about
    what is probably not as meant.

    \b
    Examples:
      optimer inspect runs/ja/vector
      optimer inspect vectors/* --base org/base --plot pool.png
      optimer inspect pool --base org/base
      optimer inspect runs/ja/checkpoint-* --base org/base --trajectory
    """
    from optimer_engine.checkpoint import Checkpoint
    from optimer_engine.hub import locate
    from optimer_engine.inspection.summary import summarise

    if headers and (rank or trajectory or plot):
        raise RecipeError("--headers reads no weights", where="--headers", todo="leave it out")
    with ExitStack() as stack:
        places = [place for folder in folders for place in _vectors(folder)]
        opened = [stack.enter_context(Checkpoint.open(locate(place))) for place in places]
        against = stack.enter_context(Checkpoint.open(locate(base))) if base else None
        result: dict[str, Any] = {"folders": [summarise(checkpoint) for checkpoint in opened]}
        if not as_json:
            from optimer_engine.inspection.report import summary_text

            click.echo("\n".join(map(summary_text, result["folders"])))
        lines: list[str] = []
        if not headers:
            try:
                measured = _measure(opened, against, rank, trajectory, plot, threads)
            except MismatchError as error:
                # The headers of a single folder are an answer; what a model moved needs its base.
                if len(opened) > 1 or against or rank or trajectory or plot:
                    raise
                measured = {}
                lines = [f"  for norms and cosines: {error.todo}"]
            result |= measured
            if measured:
                from optimer_engine.inspection.report import table

                lines = [table(measured), *(f"warning: {line}" for line in measured["warnings"])]
    if as_json:
        emit(result, "", True)
    elif lines:
        click.echo("\n" + "\n".join(lines))


def _vectors(folder: str) -> list[str]:
    """The folder itself, or those of a pool's vectors."""
    if not (Path(folder) / "pool.json").is_file():
        return [folder]
    from optimer_engine.pool import read

    entries = read(folder).vectors
    if not entries:
        raise RecipeError(
            "is a pool with no vectors in it", where=folder, todo="put one in: optimer pool add"
        )
    return [str(Path(folder) / entry.name) for entry in entries]


def _measure(
    opened: list[Checkpoint],
    against: Checkpoint | None,
    rank: bool,
    trajectory: bool,
    plot: Path | None,
    threads: int | None,
) -> dict[str, Any]:
    """All that takes a pass over the weights, as plain data."""
    from tqdm import tqdm

    from optimer_engine.inspection import findings
    from optimer_engine.inspection.measure import Pool, measure
    from optimer_engine.inspection.report import as_data
    from optimer_engine.plans import available_cores

    pool = Pool(opened, against)
    with tqdm(desc="inspect", total=pool.elems, unit_scale=True, delay=2.0, leave=False) as bar:
        measured = measure(
            pool,
            threads=threads or available_cores(),
            progress=lambda done: bar.update(done) and None,
        )
    data = as_data(measured)
    data["warnings"] = findings.warnings(measured, opened, against, one_path=trajectory)
    if trajectory:
        data["trajectory"] = findings.trajectory(measured)
    if rank:
        from optimer_engine.inspection.ranks import effective_ranks

        data["ranks"] = effective_ranks(pool)
    if plot:
        from optimer_engine.inspection.picture import draw

        draw(data, plot)
    return data
