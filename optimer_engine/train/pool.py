"""Training a whole pool: a run for each dataset, and its vector put into the pool folder.

    OUT/NAME/       the run folder of dataset NAME
    OUT/tokens/     packed text, shared by the runs and by a mixture of the same datasets
    POOL/NAME/      its vector

A dataset is done when the pool holds a vector of this very run (same settings, base and text); its
run folder may be gone by then. Datasets are independent, so jobs on several machines can share one
configuration: a run folder admits one process at a time, and so does the pool's manifest.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from optimer_engine import pool as pools
from optimer_engine.errors import NonFiniteError, RecipeError
from optimer_engine.pool.manifest import MANIFEST
from optimer_engine.train.config import TrainConfig, checked
from optimer_engine.train.corpus import find, first_documents
from optimer_engine.train.cpt import run_cpt, run_fingerprint
from optimer_engine.train.processes import Processes
from optimer_engine.train.report import TrainReport

if TYPE_CHECKING:
    from transformers import TrainerCallback


class PoolRun(msgspec.Struct, frozen=True):
    """What became of one dataset.

    Attributes:
        name: the dataset's.
        vector: its folder in the pool.
        report: of the run; None where the vector was in the pool already.
    """

    name: str
    vector: str
    report: TrainReport | None


def train_pool(
    config: TrainConfig,
    out: str | Path,
    *,
    only: Iterable[str] = (),
    job: str | None = None,
    resume: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = False,
    said: Callable[[PoolRun], None] | None = None,
) -> list[PoolRun]:
    """Train each dataset of `config` by itself, skipping what is done.

    The same call continues a pool that was interrupted. A run that diverges does not stop the
    others; its error comes at the end.

    Args:
        config: with `pool` set; `tokens` is the budget of each dataset.
        out: folder of the run folders.
        only: names of datasets to train; all by default.
        job: "i/n" for the i-th of n jobs that share the datasets.
        resume, callbacks, progress: as in `run_cpt`.
        said: called after each dataset.

    Raises:
        RecipeError: no pool folder in `config`, an unknown name, a job that is none; and as
            `run_cpt`, for any of the datasets before the first is trained.
        NonFiniteError: some runs diverged; the others are done.
    """
    config, out = checked(config), Path(out)
    if config.pool is None:
        raise RecipeError("is not given", where="pool", todo="name the folder for the vectors")
    pool = Path(config.pool)
    config = msgspec.structs.replace(config, cache=config.cache or str(out / "tokens"))
    wanted = _shared([d.name for d in config.datasets], only, job)

    from optimer_engine.train.trainer import training_arguments

    done: list[PoolRun] = []
    diverged: list[NonFiniteError] = []
    with Processes(training_arguments(config, out / "checkpoints")) as processes:
        finished = processes.on_first(lambda: _look(config, pool, wanted, processes.count))
        for name in wanted:
            report = None
            if name not in finished:
                single = dataset_config(config, name)
                try:
                    report = run_cpt(
                        single, out / name, resume=resume, callbacks=callbacks, progress=progress
                    )
                except NonFiniteError as error:
                    error.where = f"{name}: {error.where}"
                    diverged.append(error)
                    continue
                finally:
                    _free()
                processes.on_first(partial(_put, pool, out / name, name))
            done.append(PoolRun(name, str(pool / name), report))
            if said is not None and processes.first:
                said(done[-1])
    if diverged:
        raise diverged[0]
    return done


def dataset_config(config: TrainConfig, name: str) -> TrainConfig:
    """The run of one dataset of a pool."""
    (dataset,) = [d for d in config.datasets if d.name == name]
    return msgspec.structs.replace(
        config,
        datasets=[msgspec.structs.replace(dataset, ratio=None)],
        vector=None if config.mode == "lora" else True,
        pool=None,
        ratios_from=None,
    )


def mixture_config(config: TrainConfig) -> TrainConfig:
    """The data-mixture run that costs what the pool costs: as many tokens as all its runs."""
    assert isinstance(config.tokens, int)
    tokens = config.tokens * len(config.datasets) if config.pool is not None else config.tokens
    keep_model = config.keep_model or not config.vector  # a mixture has no vector by default
    return msgspec.structs.replace(config, tokens=tokens, pool=None, keep_model=keep_model)


def _shared(names: list[str], only: Iterable[str], job: str | None) -> list[str]:
    """The datasets of this call: those named, and of them this job's."""
    chosen = list(only) or names
    for name in chosen:
        if name not in names:
            raise RecipeError(
                f"no dataset is called {name!r}; there is {', '.join(names)}", where="only"
            )
    if job is None:
        return chosen
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", job)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise RecipeError(f"{job!r} is no job", where="job", todo="write 1/4 to 4/4 for four jobs")
    return chosen[number - 1 :: count]


def _look(config: TrainConfig, pool: Path, names: list[str], processes: int) -> set[str]:
    """Those of `names` that are done, after a check of all the others."""
    manifest = pools.read(pool) if (pool / MANIFEST).exists() else None
    done = set()
    for name in names:
        single = dataset_config(config, name)
        entry = manifest.find(name) if manifest is not None else None
        if entry is None:
            first_documents(find(single.datasets[0]))
        elif entry.run == run_fingerprint(single, processes):
            done.add(name)
        else:
            raise RecipeError(
                f"there is a vector {name!r} of another run: other settings, base or text",
                where=str(pool),
                todo=f"choose another pool, or take it out: `optimer pool remove {pool} {name}`",
            )
    return done


def _put(pool: Path, run: Path, name: str) -> None:
    pools.add(pool, run, name, link=True)


def _free() -> None:
    """Give back the memory of a finished run: its Trainer refers to itself."""
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
