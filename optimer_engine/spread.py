"""One merge on many machines: a part per Dask worker slot, on a disk that all of them share.

The parts are those of `merge(part=(i, n))`, which any job array can run without Dask.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimer_engine.engine import merge
from optimer_engine.errors import MissingExtraError, RecipeError
from optimer_engine.mergekit import MergekitConfig
from optimer_engine.planner import plan
from optimer_engine.recipe import Recipe
from optimer_engine.report import Report


def merge_on_dask(
    recipe: Recipe | MergekitConfig, out: str | Path, scheduler: str, **options: Any
) -> Report:
    """Merge `recipe` into `out` by the workers of a Dask cluster; the bytes are the same.

    Args:
        scheduler: its address, e.g. "tcp://host:8786". All paths must mean the same on its workers.
        options: of `merge`, for every part.

    Raises:
        MissingExtraError: without Dask.
        RecipeError: when no scheduler answers, or it has no worker.
        OptimerError: as `merge` raises; the first part that failed. What the others finished is
            kept and continued by the same call.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise MissingExtraError(
            "dask.distributed is not installed",
            where="--dask-scheduler",
            todo="pip install 'dask[distributed]', or use --part in a job array",
        ) from error
    made = plan(recipe, every_source=False)  # so that mistakes are found here and not on a worker
    shards = len(made.shards)
    made.close()
    try:
        client = Client(scheduler, timeout=10)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"no Dask scheduler answers: {error}", where=scheduler, todo="check its address"
        ) from error
    with client:
        workers = len(client.scheduler_info(n_workers=-1)["workers"])
        if not workers:
            raise RecipeError("has no workers", where=scheduler, todo="start dask-worker")
        count = min(shards, workers)
        futures = [
            client.submit(
                merge, recipe, str(out), part=(number, count), pure=False, retries=0, **options
            )
            for number in range(1, count + 1)
        ]
        reports: list[Report] = client.gather(futures)
    return next(report for report in reports if report.part is None)
