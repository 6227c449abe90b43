"""Parameters of a mergekit recipe: what each method takes, and what a value comes to for a tensor.

A value is a number, a list of numbers (a gradient over the layers), or a list of
`{filter, value}`, where the first filter that is part of the tensor's name decides. All three are
kept as one form here: a tuple of choices. Values are checked when the file is read, so that a
wrong one is named by its key and not found at the thousandth tensor.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from optimer_engine.errors import RecipeError, quoted

Base = Literal["required", "optional", "ordinary"]
Kind = Literal["float", "int", "bool"]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method: its kind, and its default unless it is required."""

    kind: Kind
    default: Any = None
    required: bool = False


@dataclass(frozen=True)
class Signature:
    """How mergekit 0.1.5 calls a method.

    Attributes:
        base: "required"; "optional" (changes the method when given); or "ordinary" (the base is
            one more input, with parameters of its own).
        sources: least and largest number of inputs beside a base that is not ordinary.
        shared: parameters with one value for a tensor.
        per_source: parameters with one value for each source.
        inert: parameters that mergekit takes and that change nothing.
    """

    base: Base
    sources: tuple[int, int | None]
    shared: dict[str, Parameter] = field(default_factory=dict)
    per_source: dict[str, Parameter] = field(default_factory=dict)
    inert: frozenset[str] = frozenset()


def _flag(default: bool) -> Parameter:
    return Parameter("bool", default)


def _number(default: float) -> Parameter:
    return Parameter("float", default)


_NEEDED = Parameter("float", required=True)


def _deltas(normalize: bool, rescale: bool, **more: Parameter) -> Signature:
    """Task arithmetic and all that prune its deltas first."""
    return Signature(
        "required",
        (0, None),
        {"normalize": _flag(normalize), "rescale": _flag(rescale), "lambda": _number(1.0)},
        {"weight": _NEEDED, "density": _number(1.0), **more},
        frozenset({"int8_mask"}),
    )


SIGNATURES: dict[str, Signature] = {
    "linear": Signature("ordinary", (1, None), {"normalize": _flag(True)}, {"weight": _NEEDED}),
    "task_arithmetic": Signature(
        "required",
        (0, None),
        {"normalize": _flag(False), "lambda": _number(1.0)},
        {"weight": _NEEDED},
        frozenset({"int8_mask", "rescale", "density"}),
    ),
    "ties": _deltas(normalize=True, rescale=False),
    "dare_ties": _deltas(normalize=False, rescale=True),
    "dare_linear": _deltas(normalize=False, rescale=True),
    "breadcrumbs": _deltas(normalize=False, rescale=False, gamma=_number(0.01)),
    "breadcrumbs_ties": _deltas(normalize=False, rescale=False, gamma=_number(0.01)),
    "della": _deltas(normalize=True, rescale=True, epsilon=_number(0.15)),
    "della_linear": _deltas(normalize=False, rescale=True, epsilon=_number(0.15)),
    "sce": Signature(
        "required", (0, None), {"select_topk": _number(1.0)}, {}, frozenset({"int8_mask"})
    ),
    "slerp": Signature("required", (1, 1), {"t": _NEEDED}),
    "nuslerp": Signature(
        "optional",
        (2, 2),
        {"nuslerp_row_wise": _flag(False), "nuslerp_flatten": _flag(True)},
        {"weight": _NEEDED},
    ),
    "multislerp": Signature(
        "optional",
        (1, None),
        {"normalize_weights": _flag(True), "eps": _number(1e-8)},
        {"weight": _NEEDED},
    ),
    "karcher": Signature(
        "ordinary", (1, None), {"max_iter": Parameter("int", 10), "tol": _number(1e-5)}
    ),
    "model_stock": Signature("required", (2, None), {"filter_wise": _flag(False)}),
    "arcee_fusion": Signature("required", (1, 1)),
    "nearswap": Signature("required", (1, 1), {"t": _NEEDED}),
    "passthrough": Signature("ordinary", (1, 1), {}, {"scale": _number(1.0)}),
}
"""The methods of mergekit 0.1.5 that this engine has, with mergekit's defaults."""

NOT_HERE = ("ram", "ramplus_tl")
"""Methods that mergekit has beside them."""


def signature_of(method: str) -> Signature | None:
    """mergekit's signature of a method, or that of one that a user registered; None for neither."""
    from optimer_engine.methods import protocol, registry

    if method in SIGNATURES or method not in registry.names():
        return SIGNATURES.get(method)
    own = registry.get(method)
    shared: dict[str, Parameter] = {}
    per_source: dict[str, Parameter] = {}
    for name, given in own.parameters.items():
        kind = _KINDS.get(given.kind)
        if kind is not None:
            required = given.default is protocol.REQUIRED
            parameter = Parameter(kind, None if required else given.default, required)
            (per_source if given.per_source else shared)[name] = parameter
    base: Base = "ordinary" if own.base == "unused" else own.base
    return Signature(base, (own.min_sources, own.max_sources), shared, per_source)


_KINDS: dict[type, Kind] = {float: "float", int: "int", bool: "bool"}

ALL_PARAMETERS = sorted(
    {name for s in SIGNATURES.values() for name in (*s.shared, *s.per_source, *s.inert)}
)


TOP_KEYS = ("dtype", "out_dtype", "base_model", "tokenizer_source", "tokenizer", "chat_template")


@dataclass(frozen=True)
class Choice:
    """Values along the layers, for tensors whose name holds `filter` (None: every tensor)."""

    filter: str | None
    values: tuple[Any, ...]


Setting = tuple[Choice, ...]


def read_setting(data: Any, at: str) -> Setting:
    """The choices that `data`, the value of the key `at`, states.

    Raises:
        RecipeError: when it is none of the three forms.
    """
    if isinstance(data, list) and any(isinstance(item, dict) for item in data):
        return tuple(_choice(item, f"{at}[{number}]") for number, item in enumerate(data))
    if isinstance(data, dict):
        return (_choice(data, at),)
    return (Choice(None, _values(data, at)),)


def _choice(data: Any, at: str) -> Choice:
    if not isinstance(data, dict):
        raise RecipeError(
            f"is {data!r} among conditions, expected {{filter: ..., value: ...}}",
            where=at,
            todo="write `- value: ...` for what holds where no filter matches",
        )
    unknown = sorted(str(key) for key in data.keys() - {"filter", "value"})
    if unknown:
        raise RecipeError(
            f"unknown key {unknown[0]!r} in a condition", where=at, todo="keys are filter and value"
        )
    if "value" not in data:
        raise RecipeError("a condition without a value", where=at, todo="add `value: ...`")
    wanted = data.get("filter")
    if wanted is not None and not (isinstance(wanted, str) and wanted):
        raise RecipeError(
            f"filter is {wanted!r}, expected a part of a tensor's name", where=f"{at}.filter"
        )
    return Choice(None if wanted == "*" else wanted, _values(data["value"], f"{at}.value"))


def _values(data: Any, at: str) -> tuple[Any, ...]:
    values = data if isinstance(data, list) else [data]
    if not values:
        raise RecipeError("an empty list", where=at, todo="write a number, or leave the key out")
    for value in values:
        if not isinstance(value, bool | int | float | str):
            raise RecipeError(
                f"is {value!r}, expected a number, a list of numbers, or conditions"
                " {filter: ..., value: ...}",
                where=at,
            )
    return tuple(values)


def typed(setting: Setting, kind: Kind, at: str) -> Setting:
    """`setting` with every value as `kind` reads it: "0.5" is a number for a float.

    Raises:
        RecipeError: for a value that is not of the kind.
    """
    if kind == "int" and any(len(set(choice.values)) > 1 for choice in setting):
        raise RecipeError("a whole number cannot vary over the layers", where=at)
    return tuple(
        Choice(choice.filter, tuple(_typed(value, kind, at) for value in choice.values))
        for choice in setting
    )


_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "1.0": True,
          "false": False, "no": False, "off": False, "0": False, "0.0": False}  # fmt: skip
"""mergekit itself writes `normalize: 1.0` into the files beside its outputs."""


def _typed(value: Any, kind: Kind, at: str) -> Any:
    if kind == "bool":
        read = value if isinstance(value, bool) else _BOOLS.get(str(value).lower())
        if read is None:
            raise RecipeError(f"is {value!r}, expected true or false", where=at)
        return read
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
        if not math.isfinite(number) or (kind == "int" and number != int(number)):
            raise ValueError
    except ValueError:
        expected = "a whole number" if kind == "int" else "a finite number"
        raise RecipeError(f"is {value!r}, expected {expected}", where=at) from None
    return int(number) if kind == "int" else number


def evaluate(setting: Setting, tensor: str, t: float) -> Any:
    """The value for `tensor` at position `t` (0 first layer, 1 last); None where no filter fits.

    Numbers are interpolated between the two nearest values, flags taken from the one before.
    """
    for choice in setting:
        if choice.filter is None or choice.filter in tensor:
            values = choice.values
            scaled = t * (len(values) - 1)
            low = int(scaled)
            if isinstance(values[low], bool):
                return values[low]
            high = min(len(values) - 1, low + 1)
            share = scaled - low
            mixed = (1 - share) * values[low] + share * values[high]
            return type(values[low])(mixed)
    return None


def check_parameter(name: str, method: str, signature: Signature, at: str) -> str | None:
    """A warning when `name` changes nothing for `method`; None when it is one of its parameters.

    Raises:
        RecipeError: when no method has such a parameter.
    """
    if name in signature.shared or name in signature.per_source:
        return None
    if name in signature.inert or name in ALL_PARAMETERS:
        return f"{at} changes nothing for {method} (nor in mergekit)"
    if name in TOP_KEYS:
        raise RecipeError("is no parameter", where=at, todo=f"write {name} at the top of the file")
    near = difflib.get_close_matches(name, ALL_PARAMETERS, n=1)
    known = sorted({*signature.shared, *signature.per_source})
    raise RecipeError(
        f"no method has a parameter {quoted(name)!r}",
        where=at,
        todo=f"did you mean {near[0]!r}?" if near else f"{method} takes: {', '.join(known)}",
    )
