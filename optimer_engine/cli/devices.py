"""Where a merge computes and where its inputs stay: options of several commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from optimer_engine.errors import RecipeError


def device_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--device` and `--storage-device`, as parameters device and storage_device."""
    computes = click.option(
        "--device",
        "--compute-device",
        "device",
        metavar="DEVICE",
        default="cpu",
        show_default=True,
        help="cpu; cuda for all GPUs, cuda:0,cuda:1 for some; auto: GPUs if there are any, and main"
        " memory for what has no GPU form.",
    )
    stores = click.option(
        "--storage-device",
        type=click.Choice(["cpu", "cuda"]),
        default="cpu",
        show_default=True,
        help="cuda: inputs that were read stay in free GPU memory for a method's next pass.",
    )
    return computes(stores(command))


def resident_mem(device: str, storage_device: str) -> int | str:
    """What the two options mean for `planner.plan`.

    Raises:
        RecipeError: for inputs that are to stay on a GPU of a merge in main memory.
    """
    if storage_device == "cuda" and device == "cpu":
        raise RecipeError(
            "inputs stay where they are merged, which is main memory",
            where="--storage-device cuda",
            todo="add --device cuda",
        )
    return "free" if storage_device == "cuda" else 0
