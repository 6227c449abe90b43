"""Methods from plain functions: `elementwise` and `per_tensor`, for this package and for users."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from optimer_engine.errors import RecipeError
from optimer_engine.kernels import cpu
from optimer_engine.kernels.reference import F32, F64, accumulates_in_fp64, upcast
from optimer_engine.methods.protocol import (
    GRANULE,
    REQUIRED,
    Memory,
    Method,
    Operand,
    Parameter,
    Tile,
    elems,
)
from optimer_engine.methods.registry import register
from optimer_engine.methods.tiles import CODE
from optimer_engine.tensor_recipe import TensorRecipe

STEP = 4 * GRANULE
"""Elements that an elementwise function is given at a time."""

_ARRAYS = 8


@dataclass(frozen=True)
class _Function(Method):
    """A method whose arithmetic is a Python function of arrays."""

    call: Callable[..., np.ndarray] = np.asarray
    deltas: bool = False
    whole: bool = False
    arrays: int = _ARRAYS

    def unit(self, recipe: TensorRecipe) -> int:
        """The whole tensor for `per_tensor`."""
        return max(1, elems(recipe.shape)) if self.whole else GRANULE

    def memory(self, recipe: TensorRecipe) -> Memory:
        """The inputs and as many arrays beside them as the function says, in fp64 at most."""
        length = elems(recipe.shape) if self.whole else min(STEP, elems(recipe.shape))
        return Memory(0, 8 * length * (len(recipe.sources) + 1 + self.arrays))

    def merge(self, tile: Tile, state: Any, out: np.ndarray) -> bool:
        """Upcast, call the function, round once."""
        step = max(1, tile.stop - tile.start) if self.whole else STEP
        nonfinite = False
        for first in range(0, tile.stop - tile.start, step):
            nonfinite |= self._step(tile, slice(first, first + step), out)
        return nonfinite

    def _step(self, tile: Tile, part: slice, out: np.ndarray) -> bool:
        recipe = tile.recipe
        given = ([tile.base] if tile.base else []) + list(tile.sources)
        codes = [CODE[operand.dtype] for operand in given]
        wide = accumulates_in_fp64(codes[0], codes, CODE[recipe.dtype])
        dtype = np.float64 if wide else np.float32

        def values(operand: Operand) -> np.ndarray:
            flat = upcast(operand.data[part], CODE[operand.dtype], dtype)
            return flat.reshape(recipe.shape) if self.whole else flat

        with np.errstate(all="ignore"):
            base = values(tile.base) if tile.base else None
            inputs = []
            for source in tile.sources:
                value = values(source)
                if base is not None and self.deltas and not source.is_delta:
                    value = value - base
                elif base is not None and source.is_delta and not self.deltas:
                    value = value + base
                inputs.append(value)
            shared = {k: v for k, v in recipe.settings.shared if k in self.parameters}
            columns = {
                k: recipe.settings.column(k) for k, p in self.parameters.items() if p.per_source
            }
            merged = np.asarray(self.call(base, inputs, **shared, **columns))
        if merged.shape != inputs[0].shape:
            raise RecipeError(
                f"the function returned shape {merged.shape}, {inputs[0].shape} expected",
                where=f"method {self.name}",
            )
        flat = np.ascontiguousarray(merged, dtype).reshape(-1)
        code = F64 if wide else F32
        add = self.deltas and tile.base is not None
        # The function's result is a stored delta to the base's own bits, or to nothing.
        anchor, anchor_code = (
            (tile.base.data[part], codes[0]) if add and tile.base else (flat, code)
        )
        bad = cpu.linear(
            anchor, anchor_code, [flat], [code], [True], [1.0], out[part], CODE[recipe.dtype], add
        )
        finite = all(bool(np.isfinite(array).all()) for array in inputs)
        return bad or not finite or (base is not None and not bool(np.isfinite(base).all()))


def elementwise(
    name: str,
    *,
    paper: str = "",
    formula: str = "",
    base: typing.Literal["required", "optional", "unused"] = "required",
    deltas: bool = False,
    sources: tuple[int, int | None] = (1, None),
) -> Callable[[Callable[..., np.ndarray]], Callable[..., np.ndarray]]:
    """Register a function of single elements as the merge method `name`.

        @elementwise("clipped", deltas=True)
        def clipped(base, deltas, *, weight: list[float], limit: float = 1e-3):
            total = sum(w * d for w, d in zip(weight, deltas))
            return np.clip(total, -limit, limit)

    The function is given base (None without one) and a list of the sources' values, 1-D arrays of
    equal length in fp32 (fp64 where an input or the output asks for it), any part of a tensor. It
    returns the merged values; with `deltas` it is given deltas and returns the delta to be added to
    the base. Its keyword-only arguments are the method's parameters: a float, int, bool or str for
    the tensor, a list of them for one value per source; without a default they must be given.
    `Annotated[float, "what it means"]` documents one.

    Args:
        sources: least and greatest number beside the base; None is no limit.
    """
    return _decorator(name, paper, formula, base, deltas, sources, whole=False, arrays=_ARRAYS)


def per_tensor(
    name: str,
    *,
    paper: str = "",
    formula: str = "",
    base: typing.Literal["required", "optional", "unused"] = "required",
    deltas: bool = False,
    sources: tuple[int, int | None] = (1, None),
    arrays: int = _ARRAYS,
) -> Callable[[Callable[..., np.ndarray]], Callable[..., np.ndarray]]:
    """Register a function of whole tensors as the merge method `name`; else as `elementwise`.

        @per_tensor("rank_one", deltas=True, arrays=4)
        def rank_one(base, deltas, *, weight: list[float]):
            total = sum(w * d for w, d in zip(weight, deltas))
            if total.ndim != 2:
                return total
            u, s, v = np.linalg.svd(total, full_matrices=False)
            return s[0] * np.outer(u[:, 0], v[0])

    Arrays have the tensor's shape, and memory grows with the tensor.

    Args:
        arrays: how many arrays of the tensor's size it holds at once beside its inputs; the memory
            that a plan promises counts them.
    """
    return _decorator(name, paper, formula, base, deltas, sources, whole=True, arrays=arrays)


def _decorator(
    name: str, paper: str, formula: str, base: Any, deltas: bool, sources: tuple[int, int | None],
    whole: bool, arrays: int,
) -> Callable[[Callable[..., np.ndarray]], Callable[..., np.ndarray]]:  # fmt: skip
    def decorate(call: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        register(
            _Function(
                name,
                paper,
                formula,
                _parameters(call),
                base,
                *sources,
                call=call,
                deltas=deltas,
                whole=whole,
                arrays=arrays,
            )
        )
        return call

    return decorate


def _parameters(call: Callable[..., Any]) -> dict[str, Parameter]:
    """From the keyword-only arguments of a function."""
    hints = typing.get_type_hints(call, include_extras=True)
    parameters = {}
    for name, argument in inspect.signature(call).parameters.items():
        if argument.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint, meaning = hints.get(name, float), ""
        if typing.get_origin(hint) is typing.Annotated:
            hint, meaning = typing.get_args(hint)
        per_source = typing.get_origin(hint) is list
        kind = typing.get_args(hint)[0] if per_source else hint
        if kind not in (float, int, bool, str):
            raise RecipeError(
                f"parameter {name} is annotated {hint}", where=f"function {call.__name__}",
                todo="annotate it as float, int, bool, str, or a list of one of them",
            )  # fmt: skip
        default = REQUIRED if argument.default is inspect.Parameter.empty else argument.default
        parameters[name] = Parameter(kind, default, per_source, meaning=meaning)
    return parameters


@elementwise(
    "nearswap",
    paper="alchemonaut, 2024, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    formula="theta_0 + clip(delta, -t, t)",
    deltas=True,
    sources=(1, 1),
)
def nearswap(
    base: np.ndarray, deltas: list[np.ndarray], *, t: typing.Annotated[float, "largest move"]
) -> np.ndarray:
    """Move towards the source by no more than t: w = clip(t / |delta|, 0, 1) of the delta."""
    return np.clip(deltas[0], -max(t, 0), max(t, 0))
