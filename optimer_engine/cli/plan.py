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
        _line(_TITLES.get(key, key), _shown(key, value))
        for key, value in found.items()
        if key not in ("groups", "models", "methods", "warnings")
    ]
    models = [f"{label} = {name}" for label, name in found["models"].items() if label != name]
    methods = [f"{name}: {formula}" for name, formula in found["methods"].items() if formula]
    for title, entries in (
        ("models", models), ("methods", methods), ("warnings", found["warnings"] or ["none"]),
    ):  # fmt: skip
        lines += [_line(title if at == 0 else "", entry) for at, entry in enumerate(entries)]
    groups = found["groups"]
    for group in groups[:MOST_GROUPS] if len(groups) > 1 else []:
        lines += ["", *_group(group)]
    if len(groups) > MOST_GROUPS:
        lines += ["", f"and {len(groups) - MOST_GROUPS} more groups; --json has them all"]
    return "\n".join(lines)


def _line(title: str, text: str) -> str:
    return f"{title:>13}{':' if title else ' '} {text}"


def _group(group: dict[str, Any]) -> list[str]:
    which = group["first"]
    if group["tensors"] > 1:
        which = f"{group['tensors']} tensors, {group['first']} ... {group['last']}"
    again = f" ({group['readings']} readings)" if group["readings"] > 1 else ""
    parts = [
        f"{format_bytes(group['read_bytes'])} in{again}",
        f"{format_bytes(group['write_bytes'])} out",
        *([f"{format_bytes(group['memory_bytes'])} held"] if group["memory_bytes"] else []),
        f"{group['seconds']:.3g} s",
    ]
    return [f"{which}: {', '.join(parts)}", f"    {group['formula']}"]


def _shown(key: str, value: Any) -> str:
    if key.endswith("_bytes"):
        return format_bytes(value)
    if key == "seconds":
        return f"about {value:.3g} s, from a sample of the inputs"
    if key == "files" and len(value) > 3:
        return f"{len(value)}, {value[0]} ... {value[-1]}"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


_TITLES = {
    "read_bytes": "reads", "write_bytes": "writes", "disk_bytes": "needs disk",
    "download_bytes": "downloads", "least_disk_limit_bytes": "at a time", "memory_bytes": "memory",
    "pinned_memory_bytes": "pinned memory", "gpu_memory_bytes": "gpu memory",
    "gpu_resident_bytes": "gpu resident", "seconds": "time", "tile_bytes": "tile",
}  # fmt: skip
MOST_GROUPS = 40
