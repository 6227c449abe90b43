"""What a merge method is: statistics of a tensor in passes over tiles, then tiles of the result.

A method never sees a whole tensor (unless its `unit` says so). It sees tiles: flat ranges of
elements, cut at multiples of `unit` elements counted from the tensor's start, in any order, on
several threads. The caller (the engine, or `run.merge_arrays`) does, per tensor:

    state = prepare(method, recipe, execute)      # execute(pass) -> result: all tiles through it
    for tile in tiles:                            # any order, any thread
        nonfinite = method.merge(tile, state, out)

and executes one pass as

    accumulators = [p.start() for each thread]
    p.map(tile, accumulator of this thread)       # every tile once, any order, any thread
    result = p.finish(accumulators)               # once, after the last tile

Passes are asked for one at a time, as what the next one looks for depends on what the last one
found; most methods need none or one, a threshold two or three. The result depends neither on how
tiles are cut nor on threads: counts are integers, floating-point sums are kept per fixed block
(`GRANULE` elements or one row) and added exactly at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from optimer_engine.errors import RecipeError
from optimer_engine.tensor_recipe import Settings, TensorRecipe
from optimer_engine.types import DType

GRANULE = 65536
"""Elements per block of sums and counts; tiles of elementwise methods begin at its multiples."""


@dataclass(frozen=True, slots=True)
class Operand:
    """One input of a tile.

    Attributes:
        data: 1-D, contiguous, in `dtype.storage` (the bits of bf16 and fp16 as uint16).
        is_delta: `data` is tau = theta - base, not theta.
    """

    data: np.ndarray
    dtype: DType
    is_delta: bool = False


@dataclass(frozen=True, slots=True)
class Tile:
    """Elements [start, stop) of the tensor of `recipe`, flat; sources in the recipe's order."""

    recipe: TensorRecipe
    start: int
    stop: int
    base: Operand | None
    sources: tuple[Operand, ...]


class Pass(Protocol):
    """One reading of all tiles for a statistic; see the module docstring."""

    def start(self) -> Any:
        """An accumulator for one thread."""

    def map(self, tile: Tile, accumulator: Any) -> None:
        """Add what this tile holds."""

    def finish(self, accumulators: list[Any]) -> Any:
        """The statistic, whatever tiles each accumulator saw."""


Statistics = Generator[Pass, Any, Any]
"""Yields passes, is sent their results, returns the state that `merge` needs."""


class Memory(NamedTuple):
    """Bytes a method holds beside the tiles: once for the tensor, and for each thread."""

    shared_bytes: int
    thread_bytes: int


class Fold(NamedTuple):
    """A method that is a weighted sum with known weights, for the fused linear kernel.

        out = scale * anchor + sum_i weights[i] * (theta_i - anchor)

    anchor is the base, or the first source where `anchor_is_base` is false (its own weight is then
    0). A stored tau_i stands for theta_i - base. Where scale is not 1, pass the anchor once more to
    the kernel as a stored delta with weight scale - 1.
    """

    anchor_is_base: bool
    weights: tuple[float, ...]
    scale: float = 1.0


REQUIRED: Any = object()
"""The default of a parameter that must be given."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        kind: float, int, bool or str.
        default: REQUIRED when there is none.
        per_source: one value for each source, otherwise one for the tensor.
        low, high: the range allowed, ends included.
        choices: all values allowed, for a str.
    """

    kind: type
    default: Any = REQUIRED
    per_source: bool = False
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[Any, ...] = ()
    meaning: str = ""

    def parse(self, value: Any, where: str) -> Any:
        """`value` as this parameter's kind.

        Raises:
            RecipeError: when it is of another kind, out of range or not finite.
        """
        if value == self.default and type(value) is type(self.default):
            return value
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if self.kind is float and number and math.isfinite(value):
            value = float(value)
        elif self.kind is int and number and float(value).is_integer():
            value = int(value)
        elif not (self.kind in (bool, str) and isinstance(value, self.kind)):
            raise RecipeError(f"{value!r} is not a {self.kind.__name__}", where=where)
        if self.choices and value not in self.choices:
            names = ", ".join(repr(choice) for choice in self.choices)
            raise RecipeError(f"{value!r} is not one of {names}", where=where)
        if self.kind in (float, int) and not self.low <= value <= self.high:
            raise RecipeError(
                f"{value!r} is outside {self.low:g} to {self.high:g}",
                where=where,
                todo="use a value in this range",
            )
        return value


COMPAT = Parameter(
    str,
    "paper",
    choices=("paper", "mergekit"),
    meaning="whose definition holds where they differ",
)


@dataclass(frozen=True)
class Method:
    """Base of all methods; a subclass says how in `statistics` and `merge`.

    Attributes:
        name: as in a recipe.
        paper: where it comes from, with a link.
        formula: in one line.
        parameters: by name; `compat` belongs to every method.
        base: whether a base is "required", "optional" or "unused".
        min_sources, max_sources: beside the base; None is no limit.
        by_row: tiles are whole rows. skips_zero: a source of weight 0 has no part in the result.
        on_gpu: its passes and its merge also take tiles that lie in a GPU's memory, as torch
            tensors; `merge` then returns a flag that is good once the GPU is done.
    """

    name: str
    paper: str
    formula: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    base: Literal["required", "optional", "unused"] = "required"
    min_sources: int = 1
    max_sources: int | None = None

    by_row: ClassVar[bool] = False
    skips_zero: ClassVar[bool] = False
    on_gpu: ClassVar[bool] = False

    def settings(self, shared: Mapping[str, Any], per_source: list[dict[str, Any]]) -> Settings:
        """All parameters of this method, checked, defaults filled in.

        A per-source parameter found in `shared` holds for every source that does not give it.

        Raises:
            RecipeError: for an unknown, missing or unusable parameter, named with its source.
        """
        parameters = {"compat": COMPAT, **self.parameters}
        for where, given in [("parameters", shared)] + [
            (f"parameters of source {number}", given) for number, given in enumerate(per_source)
        ]:
            for key in given:
                if key not in parameters:
                    raise RecipeError(
                        f"method {self.name} has no parameter {key!r}",
                        where=where,
                        todo=f"it knows {', '.join(sorted(parameters))}",
                    )
        for number, given in enumerate(per_source):
            for key in given:
                if not parameters[key].per_source:
                    raise RecipeError(
                        f"{key} of method {self.name} is one value for the whole tensor",
                        where=f"parameters of source {number}",
                        todo="give it beside merge_method",
                    )

        def value(key: str, parameter: Parameter, *levels: Mapping[str, Any]) -> Any:
            for level in levels:
                if key in level:
                    return parameter.parse(level[key], f"parameter {key}")
            if parameter.default is REQUIRED:
                raise RecipeError(
                    f"method {self.name} needs {key}"
                    + (" for every source" if parameter.per_source else ""),
                    where=f"parameter {key}",
                )
            return parameter.default

        return Settings.of(
            {k: value(k, p, shared) for k, p in parameters.items() if not p.per_source},
            [
                {k: value(k, p, given, shared) for k, p in parameters.items() if p.per_source}
                for given in per_source
            ],
        )

    def check(self, recipe: TensorRecipe) -> None:
        """Refuse what this method cannot do, before anything is read.

        Raises:
            RecipeError: for the number of sources, a missing base, or settings that do not fit
                each other.
        """
        count = len(recipe.sources)
        most = math.inf if self.max_sources is None else self.max_sources
        if not self.min_sources <= count <= most:
            wanted = (
                f"{self.min_sources}"
                if most == self.min_sources
                else f"{self.min_sources} or more"
                if most == math.inf
                else f"{self.min_sources} to {self.max_sources}"
            )
            raise RecipeError(
                f"method {self.name} takes {wanted} sources beside the base, got {count}",
                where=recipe.name,
            )
        if self.base == "required" and recipe.base is None:
            raise RecipeError(f"method {self.name} needs a base", where=recipe.name)
        if len(recipe.settings.per_source) != count:
            raise RecipeError(
                f"settings for {len(recipe.settings.per_source)} sources, {count} expected",
                where=recipe.name,
            )

    def unit(self, recipe: TensorRecipe) -> int:
        """Elements at whose multiples tiles may be cut: GRANULE, a row, or the whole tensor."""
        return row_elems(recipe.shape) if self.by_row else GRANULE

    def fold(self, recipe: TensorRecipe) -> Fold | None:
        """The weighted sum that this method is, where its weights are known without reading."""
        return None

    def memory(self, recipe: TensorRecipe) -> Memory:
        """An upper bound of what it holds beside the tiles and the kernels' blocks."""
        return Memory(0, 0)

    def gpu_bytes(self, recipe: TensorRecipe, elems: int) -> int:
        """An upper bound of what a tile of `elems` elements takes on a GPU beside its operands."""
        return 0

    def readings(self, recipe: TensorRecipe) -> int:
        """How often the inputs are read at most: the passes of `statistics`, and the merge."""
        return 1

    def statistics(self, recipe: TensorRecipe) -> Statistics:
        """Passes over the tensor; returns the state for `merge`. By default none, and None."""
        return None
        yield

    def merge(self, tile: Tile, state: Any, out: np.ndarray) -> bool:
        """Write the merged tile.

        Args:
            out: 1-D, contiguous, tile.stop - tile.start elements of recipe.dtype's storage; not
                one of the operands.

        Returns:
            True when an operand or a result is NaN or infinite.
        """
        raise NotImplementedError


def prepare(method: Method, recipe: TensorRecipe, execute: Callable[[Pass], Any]) -> Any:
    """The state for `method.merge`, by running every pass the method asks for.

    Args:
        execute: takes all tiles of the tensor through a pass and returns its result.
    """
    steps = method.statistics(recipe)
    try:
        wanted = next(steps)
        while True:
            wanted = steps.send(execute(wanted))
    except StopIteration as end:
        return end.value


def elems(shape: tuple[int, ...]) -> int:
    """Number of elements of a tensor."""
    return math.prod(shape)


def row_elems(shape: tuple[int, ...]) -> int:
    """Length of a row: the last dimension, at least 1; a tensor of one dimension is one row."""
    return max(1, shape[-1]) if shape else 1
