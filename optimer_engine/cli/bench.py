"""`optimer bench`."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import click

from optimer_engine.errors import MissingExtraError

CLONE = Path(__file__).parents[2]


@click.command(
    name="bench",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Measure merging and the GPU kernels beside rivals: `python -m benchmarks` of a clone."""
    if not (CLONE / "benchmarks" / "__main__.py").exists():
        raise MissingExtraError(
            "the benchmarks are no part of the installed package",
            todo="clone the repository and pip install -e it; then optimer bench is there",
        )
    sys.path.insert(0, str(CLONE))
    sys.argv = ["optimer bench", *ctx.args]
    runpy.run_module("benchmarks", run_name="__main__")
