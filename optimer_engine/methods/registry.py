"""The methods by name."""

from __future__ import annotations

import difflib
import importlib

from optimer_engine.errors import RecipeError
from optimer_engine.methods.protocol import Method

_METHODS: dict[str, Method] = {}
_MODULES = ("linear", "sparse", "spherical", "fusion", "function")
"""Where ours are: imported one after the other until a name is found, as most merges are linear."""
_importing: list[str] = []


def register(method: Method) -> Method:
    """Make a method known under its name.

    Raises:
        RecipeError: when another one has the name.
    """
    if not _importing:  # one of the user's: it must not take a name of ours
        _import()
    if method.name in _METHODS:
        raise RecipeError(
            f"there is a method {method.name!r} already", todo="register it under another name"
        )
    _METHODS[method.name] = method
    return method


def get(name: str) -> Method:
    """The method called `name`.

    Raises:
        RecipeError: when there is none.
    """
    _import(until=name)
    if name not in _METHODS:
        near = difflib.get_close_matches(name, _METHODS, 1)
        raise RecipeError(
            f"there is no merge method {name!r}",
            where="merge_method",
            todo=f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(names())}",
        )
    return _METHODS[name]


def names() -> list[str]:
    """All names, sorted."""
    _import()
    return sorted(_METHODS)


def _import(until: str = "") -> None:
    _importing.append(until)
    try:
        for module in _MODULES:
            if until in _METHODS:
                return
            importlib.import_module(f"{__package__}.{module}")
    finally:
        _importing.pop()
