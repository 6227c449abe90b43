"""How every command prints: text for people, or one JSON document for programs, on stdout."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def json_option(function: F) -> F:
    """Add `--json` (parameter `as_json`) to a command."""
    option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
    return option(function)


def emit(result: dict[str, Any], text: str, as_json: bool) -> None:
    """Print `result` as JSON, or `text`."""
    click.echo(json.dumps(result, indent=2, ensure_ascii=False) if as_json else text)
