"""Other ways to merge bf16 tensors that lie in a GPU's memory; each is made from the operands of
case `linear` and merges into a tensor of its own.

`eager`, `compiled` and `foreach` compute what we do, in fp32, rounded once. `mergekit` is the
arithmetic of that library's task_arithmetic: deltas, products and sums all in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Rival = Callable[[torch.Tensor, list[torch.Tensor], list[float]], Callable[[], torch.Tensor]]


def _sum(base: torch.Tensor, sources: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    start = base.float()
    total = torch.zeros_like(start)
    for source, weight in zip(sources, weights, strict=True):
        total += weight * (source.float() - start)
    return (start + total).to(base.dtype)


def eager(
    base: torch.Tensor, sources: list[torch.Tensor], weights: list[float]
) -> Callable[[], torch.Tensor]:
    """torch operation by operation."""
    return lambda: _sum(base, sources, weights)


def compiled(
    base: torch.Tensor, sources: list[torch.Tensor], weights: list[float]
) -> Callable[[], torch.Tensor]:
    """The same through torch.compile, for these shapes alone."""
    torch._dynamo.reset()  # else shapes that were compiled before count against its limit
    made: Any = torch.compile(_sum, dynamic=False)
    return lambda: made(base, sources, weights)


PIECES = 64


def foreach(
    base: torch.Tensor, sources: list[torch.Tensor], weights: list[float]
) -> Callable[[], torch.Tensor]:
    """torch's multi-tensor operations, over the tensors of a model."""
    pieces = [list(t.chunk(PIECES)) for t in (base, *sources)]
    merged = torch.empty_like(base)
    outs = list(merged.chunk(PIECES))

    def run() -> torch.Tensor:
        start = [piece.float() for piece in pieces[0]]
        total = [torch.zeros_like(piece) for piece in start]
        for own, weight in zip(pieces[1:], weights, strict=True):
            deltas = torch._foreach_sub([piece.float() for piece in own], start)
            torch._foreach_add_(total, deltas, alpha=weight)
        torch._foreach_add_(total, start)
        torch._foreach_copy_(outs, total)
        return merged

    return run


def mergekit(
    base: torch.Tensor, sources: list[torch.Tensor], weights: list[float]
) -> Callable[[], torch.Tensor]:
    """Deltas stacked, weighted and summed in the base's dtype."""

    def run() -> torch.Tensor:
        deltas = torch.stack([source - base for source in sources])
        scale = torch.tensor(weights, dtype=deltas.dtype, device=deltas.device)
        return base + (scale[:, None] * deltas).sum(dim=0)

    return run


RIVALS: dict[str, Rival] = {
    "torch, eager": eager, "torch.compile": compiled, "torch._foreach": foreach,
    "mergekit's arithmetic": mergekit,
}  # fmt: skip
