"""YAML narrowed until what is written means one thing.

PyYAML reads YAML 1.1, where a repeated key silently wins, `no` is False, `1e-3` is a text, `012` is
ten, and a few hundred bytes of aliases unfold into gigabytes. Here duplicate keys, aliases, anchors
and tags are refused, depth is bounded, and plain words become null, booleans or numbers by the core
rules of YAML 1.2 only, without infinities and NaN.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from optimer_engine.errors import RecipeError

MAX_DEPTH = 16
MAX_VALUES = 30_000
"""Keys and values of a file; reading takes about a second then, and a minute for a megabyte."""

_CORE = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?",
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # type: ignore[misc]  # noqa: RUF012
    depth = values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            _refuse("aliases (*) are refused", event)
        if getattr(event, "tag", None) is not None or getattr(event, "anchor", None):
            _refuse("tags (!) and anchors (&) are refused", event)
        self.values += 1
        if self.values > MAX_VALUES:
            _refuse(f"more than {MAX_VALUES} keys and values", event)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            _refuse(f"nested deeper than {MAX_DEPTH}", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    _refuse("a key is not a plain text", key)
                if key.value in seen:
                    _refuse(f"key {key.value!r} stands twice", key)
                seen.add(key.value)
        return node


for _tag, _pattern, _first in _CORE:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first
    )


def _finite(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    value = loader.construct_yaml_float(node)
    if not math.isfinite(value):
        _refuse(f"{node.value} is too large a number", node)
    return float(value)


_Loader.add_constructor("tag:yaml.org,2002:float", _finite)


def _refuse(problem: str, at: Any) -> None:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def parse(text: str, where: str) -> object:
    """Plain data of one YAML document; `where` names it in errors.

    Raises:
        RecipeError: naming the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"not usable YAML: {error.problem}", where=f"{where}{line}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"not usable YAML: {error}", where=where) from None
