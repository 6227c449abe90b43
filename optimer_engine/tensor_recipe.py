"""What is wanted of one output tensor: a method, its settings and the input tensors.

The two languages a user may write, our recipe and mergekit's YAML, both end here; the planner
places these rows and the engine runs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optimer_engine.types import DType


@dataclass(frozen=True, slots=True)
class Ref:
    """Tensor `name` of checkpoint number `checkpoint` in a plan's list."""

    checkpoint: int
    name: str


@dataclass(frozen=True, slots=True)
class Settings:
    """A method's parameters, resolved for one tensor; equal settings hash equal.

    Attributes:
        shared: sorted (key, value) pairs that hold for the tensor, e.g. ("lambda", 1.0).
        per_source: the same for each source, e.g. ("weight", 0.3), ("density", 0.5).
    """

    shared: tuple[tuple[str, Any], ...] = ()
    per_source: tuple[tuple[tuple[str, Any], ...], ...] = ()

    @classmethod
    def of(cls, shared: dict[str, Any], per_source: list[dict[str, Any]]) -> Settings:
        """From plain dictionaries."""
        return cls(
            tuple(sorted(shared.items())), tuple(tuple(sorted(s.items())) for s in per_source)
        )

    def __getitem__(self, key: str) -> Any:
        """The shared value of `key`; KeyError when it has none."""
        return dict(self.shared)[key]

    def column(self, key: str) -> list[Any]:
        """The value of `key` for every source."""
        return [dict(pairs)[key] for pairs in self.per_source]


@dataclass(frozen=True, slots=True)
class TensorRecipe:
    """One output tensor.

    Attributes:
        name, shape, dtype: what is written.
        method: a name in `optimer_engine.methods`.
        base: the tensor that deltas are taken from; None for methods without one.
        sources: in the user's order; `settings.per_source` has one entry for each.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    method: str
    settings: Settings
    base: Ref | None
    sources: tuple[Ref, ...]
