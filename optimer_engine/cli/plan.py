"""`optimer plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from optimer_engine.cli.devices import device_options, resident_mem
from optimer_engine.cli.output import emit, json_option
from optimer_engine.types import format_bytes


@click.command(name="plan")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--mem-limit", default="512MiB", show_default=True, help="Beyond the interpreter.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: one per core.")
@device_options
@json_option
def command(
    recipe: Path,
    mem_limit: str,
    threads: int | None,
    device: str,
    storage_device: str,
    as_json: bool,
) -> None:
    """Say what a merge would read, write and need, and refuse what cannot work.

    Opens every checkpoint's headers, checks that they fit, and writes nothing.

    \b
    Example:
      optimer plan recipe.yaml
    """
    from optimer_engine.explain import facts
    from optimer_engine.planner import plan

    made = plan(
        recipe,
        mem_limit=mem_limit,
        threads=threads,
        every_source=False,
        whole=False,
        device=device,
        resident_mem=resident_mem(device, storage_device),
    )
    found = facts(made)
    emit(found, explanation(found), as_json)


def explanation(found: dict[str, Any]) -> str:
    """The facts of a plan as lines of text."""
    lines = [
        f"{key.removesuffix('_bytes').replace('_', ' '):>14}: {_shown(key, value)}"
        for key, value in found.items()
        if key != "groups"
    ]
    if len(found["groups"]) > 1:
        lines += [
            f"{group['tensors']} tensors, {format_bytes(group['read_bytes'])} in,"
            f" {format_bytes(group['write_bytes'])} out: {group['formula']}"
            for group in found["groups"]
        ]
    return "\n".join(lines)


def _shown(key: str, value: Any) -> str:
    if key.endswith("_bytes"):
        return format_bytes(value)
    if key == "seconds":
        return f"about {value:.3g}, from a sample of the inputs"
    if key == "files" and len(value) > 3:
        return f"{value[0]} ... {value[-1]}"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
