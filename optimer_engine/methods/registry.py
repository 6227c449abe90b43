"""The methods by name."""

from __future__ import annotations

import difflib

from optimer_engine.errors import RecipeError
from optimer_engine.methods.protocol import Method

_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Make a method known under its name.

    Raises:
        RecipeError: when another one has the name.
    """
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
    return sorted(_METHODS)
