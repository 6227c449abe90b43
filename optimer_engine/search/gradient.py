"""A start along exact gradients, where the objective has them: bits per byte.

The cost of a merge is differentiable in its weights,

    ∂L/∂w_i = ⟨∇_θ L(θ(w)), τ_i⟩        τ_i = θ_i − θ_base

so one backward pass, followed by one streaming pass over each vector, gives all of them: the engine
merges the pool with weight 1 on vector i alone and the sink multiplies the tiles with the gradient
as they come, never holding a vector. A few L-BFGS steps (Byrd and others 1995) inside the ranges
then lead to a point that the search starts from. It costs about four evaluations a step and the
memory of one gradient (fp32, as large as the model), and pays in more than a dozen dimensions;
below that the search finds the same point as cheaply (docs/search.md).

Inner products are taken in fp64 of the fp32 merge, so that what rounding leaves of a small vector
does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optimer_engine import ops
from optimer_engine.plans import Plan
from optimer_engine.search.corpus import CorpusObjective
from optimer_engine.search.space import Space
from optimer_engine.sink import LiveModelSink
from optimer_engine.types import TensorInfo


def descend(
    plan: Plan,
    model: Any,
    objective: CorpusObjective,
    goal: Mapping[str, float],
    space: Space,
    *,
    steps: int,
    examples: Mapping[str, Sequence[int]],
) -> dict[str, float]:
    """The weights that ``steps`` L-BFGS steps from the uniform average lead to.

    Args:
        plan: of the pool, its output in fp32.
        model: the live model; it is left holding some merge.
        objective: whose bits per byte are minimised.
        goal: weight of each of its terms.
        space: names and ranges of the weights.
        steps: at most so many.
        examples: the blocks of each term that are used, the same at every step.
    """
    from scipy.optimize import minimize

    def cost(point: np.ndarray) -> tuple[float, np.ndarray]:
        weights = dict(zip(space.names, map(float, point), strict=True))
        plan.with_weights(weights).run(LiveModelSink(model))
        return loss_and_gradient(plan, model, objective, goal, space.names, examples)

    start = np.clip(np.full(len(space.names), 1.0 / len(space.names)), space.low, space.high)
    found = minimize(
        cost, start, jac=True, method="L-BFGS-B",
        bounds=list(zip(space.low, space.high, strict=True)),
        options={"maxiter": steps, "maxfun": 2 * steps},
    )  # fmt: skip
    return space.to_weights((found.x - space.low) / (space.high - space.low))


def loss_and_gradient(
    plan: Plan,
    model: Any,
    objective: CorpusObjective,
    goal: Mapping[str, float],
    names: Sequence[str],
    examples: Mapping[str, Sequence[int]],
) -> tuple[float, np.ndarray]:
    """Weighted mean of bits per byte of ``model`` as it is, and its derivative by each weight."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    total = sum(goal.values())
    value = 0.0
    for name, at in examples.items():
        value += objective.backward(model, name, at, goal[name] / total)
    zero = dict.fromkeys(names, 0.0)
    base = _Product(model)
    plan.with_weights(zero).run(base, threads=1)
    slopes = []
    for name in names:
        sink = _Product(model)
        plan.with_weights(zero | {name: 1.0}).run(sink, threads=1)
        slopes.append(sink.value - base.value)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return value, np.array(slopes)


class _Product(LiveModelSink):
    """The inner product of what is merged with the model's gradient, tile by tile."""

    value = 0.0
    on_gpu = False

    def open(self, plan: Plan) -> None:
        super().open(plan)
        gradients = {
            p.data_ptr(): p.grad.view(-1) for p in self.model.parameters() if p.grad is not None
        }
        self._flat = {
            name: gradients[flat.data_ptr()]
            for name, flat in self._flat.items()
            if flat.data_ptr() in gradients
        }

    def write(self, info: TensorInfo, start: int, tile: np.ndarray) -> None:
        """Add the tile's part."""
        gradient = self._flat.get(info.name)
        if gradient is not None:
            part = gradient[start : start + tile.size].double()
            self.value += float(part @ ops.as_torch(tile, info.dtype).to(part.device).double())
