"""Weights that a search found, read as ratios of a data mixture.

The OptiMer paper (arXiv 2603.28858) finds that a mixture trained at the ratios of the searched
weights beats the uniform one; how weights became ratios is not known to us. The rule here is this
project's assumption: weights below 0 count as 0, what has no dataset (the instruct vector) is left
out, and the rest is divided by its sum.
"""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from optimer_engine.errors import RecipeError
from optimer_engine.train.config import RatioOrigin, TrainConfig

_REPORT = "search_report.json"
RULE = (
    "weights clipped at 0, vectors without a dataset left out, divided by their sum;"
    " an assumption of this project"
)


class _Found(msgspec.Struct):
    best_weights: dict[str, float]


def ratios_of(weights: dict[str, float], names: list[str]) -> dict[str, float]:
    """Shares of the datasets `names`, in that order, with sum 1.

    Args:
        weights: by vector; those of other names are left out.

    Raises:
        RecipeError: a dataset without a weight, a weight that is no number, or no positive one.
    """
    if missing := [name for name in names if name not in weights]:
        raise RecipeError(
            f"the search has no vector {', '.join(map(repr, missing))}; it has"
            f" {', '.join(sorted(weights))}",
            where="ratios",
            todo="name each dataset as its vector was named in the search",
        )
    clipped = {name: max(float(weights[name]), 0.0) for name in names}
    total = math.fsum(clipped.values())
    if not (math.isfinite(total) and total > 0):
        raise RecipeError(
            f"weights {', '.join(f'{n} {weights[n]:g}' for n in names)} have no positive, finite"
            " sum",
            where="ratios",
            todo="without a dataset that helps there is no mixture to train",
        )
    return {name: weight / total for name, weight in clipped.items()}


def with_ratios_from(config: TrainConfig, search: str | Path) -> TrainConfig:
    """`config` with the ratios of a search's best weights.

    Args:
        search: the search's run folder.

    Raises:
        RecipeError: no finished search there, or as `ratios_of`.
    """
    path = Path(search) / _REPORT
    try:
        weights = msgspec.json.decode(path.read_bytes(), type=_Found).best_weights
    except (OSError, msgspec.MsgspecError) as error:
        raise RecipeError(
            f"cannot be read: {error}", where=str(path), todo="name a finished search's run folder"
        ) from error
    names = [dataset.name for dataset in config.datasets]
    ratios = ratios_of(weights, names)
    left_out = [name for name in weights if name not in names]
    return msgspec.structs.replace(
        config,
        datasets=[msgspec.structs.replace(d, ratio=ratios[d.name]) for d in config.datasets],
        ratios_from=RatioOrigin(weights=weights, left_out=left_out, rule=RULE),
    )
