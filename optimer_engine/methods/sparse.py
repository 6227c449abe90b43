"""Sparsified, sign-consistent merges of deltas: TIES, DARE, DELLA, Breadcrumbs, SCE.

All are one sum (`kernels.reference_methods`): mask each delta, weight it, elect a sign for each
element, sum what agrees. They differ in the mask, in what is made of its loss, and in whether signs
are elected.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from optimer_engine.errors import RecipeError
from optimer_engine.kernels import sparse
from optimer_engine.kernels.reference_methods import (
    BINS,
    CHANCE,
    COUNT,
    CUT,
    DROP,
    HIGH,
    KEEP,
    LOW,
    NO_CONSENSUS,
    RANK,
    SUM,
    VARIANCE,
)
from optimer_engine.methods.linear import INT8_MASK, LAMBDA, NORMALIZE, WEIGHT, divisor
from optimer_engine.methods.protocol import (
    GRANULE,
    Memory,
    Method,
    Parameter,
    Statistics,
    Tile,
    elems,
    row_elems,
)
from optimer_engine.methods.registry import register
from optimer_engine.methods.threshold import NOTHING, Cut, Keys, cuts
from optimer_engine.methods.tiles import CODE, Norms, blocks, inputs, kernels_for
from optimer_engine.tensor_recipe import Settings, TensorRecipe

_KINDS = {
    "top": sparse.CUTS, "outliers": sparse.CUTS, "random": sparse.DRAWS, "rank": sparse.RANKS
}  # fmt: skip
_CODES = {"none": NO_CONSENSUS, "sum": SUM, "count": COUNT}

_GPU_SCRATCH_BYTES = 16 << 20
"""Of a tile's histograms, which are counted in copies."""


@dataclass(frozen=True, slots=True)
class Sum:
    """The arguments of the fused kernel for one tensor; see `kernels.sparse.merge`."""

    masks: sparse.Masks
    multipliers: list[float]
    votes: list[float]
    divisors: list[float] | None
    consensus: int
    scale: float
    zero_is_positive: bool

    def merge(self, tile: Tile, out: np.ndarray) -> bool:
        """Write a tile; True if anything is not finite."""
        return kernels_for(tile).merge(  # type: ignore[no-any-return]
            inputs(tile), self.masks, self.multipliers, self.votes, self.divisors, self.consensus,
            self.scale, self.zero_is_positive, out, CODE[tile.recipe.dtype],
        )  # fmt: skip


def stream(seed: int, source: str, tensor: str) -> list[int]:
    """Key and upper counter words of a source's random numbers in a tensor."""
    text = f"{seed}\0{source}\0{tensor}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=16).digest()
    return [int.from_bytes(digest[k : k + 4], "little") for k in range(0, 16, 4)]


def _write_cuts(row: np.ndarray, within: Cut, beyond: Cut = NOTHING) -> None:
    """Make a row of masks keep what is within the first cut and not within the second."""
    row[:7] = [CUT, *within, *beyond]


@dataclass(frozen=True)
class _Sparse(Method):
    mask: Literal["top", "outliers", "random", "rank"] = "top"

    skips_zero = True
    on_gpu = True

    @property
    def by_rank(self) -> bool:
        """Whether a mask looks at whole rows."""
        return self.mask == "rank"

    def _rescales_by_norm(self, settings: Settings) -> bool:
        by_probability = self.mask in ("random", "rank") and settings["compat"] != "mergekit"
        return settings["rescale"] and not by_probability

    def check(self, recipe: TensorRecipe) -> None:
        """Refuse probabilities outside 0 to 1."""
        super().check(recipe)
        if self.mask != "rank":
            return
        pairs = zip(
            recipe.settings.column("density"), recipe.settings.column("epsilon"), strict=True
        )
        for number, (density, epsilon) in enumerate(pairs):
            if 0 < density < 1 and not (epsilon <= density <= 1 - epsilon):
                raise RecipeError(
                    f"density {density:g} with epsilon {epsilon:g}: keep probabilities from"
                    f" {density - epsilon:g} to {density + epsilon:g} are not within 0 to 1",
                    where=f"{recipe.name}, source {number}",
                    todo="use a smaller epsilon",
                )

    def unit(self, recipe: TensorRecipe) -> int:
        """A row where rows are ranked."""
        return row_elems(recipe.shape) if self.by_rank else GRANULE

    def memory(self, recipe: TensorRecipe) -> Memory:
        """Histograms, counts per granule, sums per granule or row, and a few rows when ranking."""
        n, row = len(recipe.sources), row_elems(recipe.shape)
        parts = blocks(recipe, self.unit(recipe))
        sums = parts * n * 24 if self._rescales_by_norm(recipe.settings) else 0
        if self.by_rank:
            # Work dtype: at most fp64. Rows of base, deltas, keys, words, two rows of items.
            return Memory(sums, row * (8 * n + 32) + 16 * BINS)
        cut_count = {"top": n, "outliers": 2 * n}.get(self.mask, 0)
        return Memory(
            sums + cut_count * parts * 8, max(n * HIGH, cut_count * LOW) * 8 if cut_count else 0
        )

    def gpu_bytes(self, recipe: TensorRecipe, elems: int) -> int:
        """Histograms; when ranking, what a sort takes, and what is kept of every source."""
        return elems * (40 + 8 * len(recipe.sources)) if self.by_rank else _GPU_SCRATCH_BYTES

    def readings(self, recipe: TensorRecipe) -> int:
        """One for a random mask, three or four where it has thresholds, one more for norms."""
        masked = any(0 < density < 1 for density in recipe.settings.column("density"))
        cut = 3 if self.mask in ("top", "outliers") else 0
        return 1 + masked * (cut + self._rescales_by_norm(recipe.settings))

    def statistics(self, recipe: TensorRecipe) -> Statistics:
        """Thresholds where the mask has one, norms where they rescale."""
        settings = recipe.settings
        weights, densities = settings.column("weight"), settings.column("density")
        n, count = len(weights), elems(recipe.shape)
        rows = np.zeros((n + 1, 8), np.int64)
        rows[:, 0] = KEEP
        chances, streams = np.zeros((n, 2)), np.zeros((n, 4), np.int64)
        factors = [1.0] * n
        masked = []
        for i, (weight, density) in enumerate(zip(weights, densities, strict=True)):
            if weight == 0 or density <= 0 or count == 0:
                rows[i, 0] = DROP
            elif density < 1:
                masked.append(i)
        by_norm = self._rescales_by_norm(settings)
        if self.mask in ("random", "rank"):
            names = settings.column("stream")
            for i in masked:
                streams[i] = stream(settings["seed"], names[i] or str(i), recipe.name)
                if self.mask == "random":
                    rows[i, 0] = CHANCE
                    rows[i, 7] = min(round(densities[i] * 2**32), 2**32 - 1)
                    factors[i] = 1 / densities[i] if settings["rescale"] else 1.0
                else:
                    epsilon = settings.column("epsilon")[i]
                    chances[i] = densities[i] - epsilon, 2 * epsilon
                    rows[i, 0], rows[i, 7] = RANK, settings["rescale"] and not by_norm
        elif masked:
            yield from self._cut(recipe, masked, rows)
        row, kinds = row_elems(recipe.shape), _KINDS[self.mask]
        masks = sparse.Masks(rows, chances, streams, row=row, kinds=kinds)
        if by_norm and masked:
            norms = yield Norms(recipe, masks, self.unit(recipe))
            least = 1e-7 if settings["compat"] == "mergekit" else 0.0
            for i in masked:
                before, after = norms[i, 0], norms[i, 1]
                usable = before > least and after > least
                factors[i] = before / after if usable else 1.0
        return self._sum(settings, masks, weights, factors)

    def _sum(
        self, settings: Settings, masks: sparse.Masks, weights: list[float], factors: list[float]
    ) -> Sum:
        consensus = _CODES[settings["consensus"]]
        multipliers = [w * f for w, f in zip(weights, factors, strict=True)]
        scale, divisors = settings["lambda"], None
        mergekit = settings["compat"] == "mergekit"
        if consensus == NO_CONSENSUS:
            scale /= divisor(weights, settings)
            multipliers = [m * scale for m in multipliers]
        elif settings["normalize"]:
            divisors = weights if mergekit else [abs(w) for w in weights]
        return Sum(masks, multipliers, multipliers, divisors, consensus, scale, mergekit)

    def _cut(self, recipe: TensorRecipe, masked: list[int], rows: np.ndarray) -> Statistics:
        """Fill in thresholds, by the k-th largest magnitude."""
        count = elems(recipe.shape)
        wanted = []
        for i in masked:
            density = recipe.settings.column("density")[i]
            kept = int(density * count)
            if self.mask == "top":
                wanted.append((i, max(1, kept)))
            else:
                above = int(recipe.settings.column("gamma")[i] * count)
                below = max(0, count - kept - above)
                wanted += [(i, count - below), (i, count - below - kept)]
        found = yield from cuts(Keys(recipe), masked, lambda _: wanted)
        for k, i in enumerate(masked):
            if self.mask == "top":
                _write_cuts(rows[i], found[k])
            else:
                _write_cuts(rows[i], found[2 * k], found[2 * k + 1])

    def merge(self, tile: Tile, state: Sum, out: np.ndarray) -> bool:
        """Write the sum."""
        return state.merge(tile, out)


class _Sce(Method):
    """Select elements by variance, calculate weights by energy, erase minority signs."""

    on_gpu = True

    def gpu_bytes(self, recipe: TensorRecipe, elems: int) -> int:
        """Histograms."""
        return _GPU_SCRATCH_BYTES

    def memory(self, recipe: TensorRecipe) -> Memory:
        """A histogram, counts and sums per granule."""
        parts = blocks(recipe)
        return Memory(parts * (8 + 24 * len(recipe.sources)), 8 * LOW)

    def readings(self, recipe: TensorRecipe) -> int:
        """One for the energies, and three more for a threshold."""
        return 5 if 0 < recipe.settings["select_topk"] < 1 else 2

    def statistics(self, recipe: TensorRecipe) -> Statistics:
        """The threshold of the variance, then the squares of what is left."""
        settings = recipe.settings
        n, count, share = len(recipe.sources), elems(recipe.shape), settings["select_topk"]
        mergekit = settings["compat"] == "mergekit"
        rows = np.zeros((n + 1, 8), np.int64)
        rows[:, 0] = KEEP
        masks = sparse.Masks(
            rows, np.zeros((n, 2)), np.zeros((n, 4), np.int64), VARIANCE, kinds=sparse.CUTS
        )
        if share <= 0 or count == 0:
            rows[:n, 0] = DROP
        elif share < 1:

            def sought(histograms: dict[int, np.ndarray]) -> list[tuple[int, int]]:
                # The lowest bin holds zero and variances below the least normal number.
                return [(0, int((count - int(histograms[0][0])) * share))]

            (cut,) = yield from cuts(Keys(recipe, VARIANCE), [0], sought)
            if cut == NOTHING:
                rows[:n, 0] = DROP
            else:
                _write_cuts(rows[n], cut)
        weights = np.full(n, 1 / n)
        if rows[0, 0] != DROP:
            norms = yield Norms(recipe, masks, GRANULE)
            energy = norms[:, 2] / count
            if energy.sum() > (1e-6 if mergekit else 0.0):
                with np.errstate(invalid="ignore"):  # infinities are found while merging
                    weights = energy / energy.sum()
        each = [float(w) for w in weights]
        return Sum(masks, each, [1.0] * n, each, SUM, 1.0, mergekit)

    def merge(self, tile: Tile, state: Sum, out: np.ndarray) -> bool:
        """Write the sum."""
        return state.merge(tile, out)


_DENSITY = Parameter(float, 1.0, per_source=True, low=0, high=1, meaning="share of delta kept")
_SEED = {
    "seed": Parameter(int, 0, meaning="of the random masks"),
    "stream": Parameter(
        str, "", per_source=True, meaning="names a source's random numbers; its number by default"
    ),
}
_OF_MASK: dict[str, dict[str, Parameter]] = {
    "top": {},
    "outliers": {
        "gamma": Parameter(
            float, 0.01, per_source=True, low=0, high=1, meaning="share of largest dropped"
        )
    },
    "random": _SEED,
    "rank": {
        "epsilon": Parameter(
            float, 0.15, per_source=True, low=0, high=1, meaning="half the span of probabilities"
        ),
        **_SEED,
    },
}
_Mask = Literal["top", "outliers", "random", "rank"]
_TIES = "Yadav et al., TIES-merging, 2023, https://arxiv.org/abs/2306.01708"
_DARE = "Yu et al., Language models are super mario, 2023, https://arxiv.org/abs/2311.03099"
_DELLA = "Deep et al., DELLA-merging, 2024, https://arxiv.org/abs/2406.11617"
_CRUMBS = "Davari and Belilovsky, Model breadcrumbs, 2023, https://arxiv.org/abs/2312.06795"


def _register(
    name: str,
    paper: str,
    mask: _Mask,
    elects: bool,
    normalize: bool,
    rescale: bool,
    formula: str,
) -> None:
    consensus = (
        Parameter(str, "sum", choices=("sum", "count"), meaning="what elects a sign")
        if elects
        else Parameter(str, "none", choices=("none",), meaning="no sign is elected")
    )
    register(
        _Sparse(
            name,
            paper,
            formula,
            {
                "weight": WEIGHT,
                "density": _DENSITY,
                "normalize": Parameter(bool, normalize, meaning=NORMALIZE),
                "rescale": Parameter(bool, rescale, meaning="make up for what is masked"),
                "lambda": LAMBDA,
                "int8_mask": INT8_MASK,
                "consensus": consensus,
                **_OF_MASK[mask],
            },
            mask=mask,
        )
    )


_elected = partial(_register, elects=True)
_summed = partial(_register, elects=False)
_elected(
    "ties", _TIES, "top", normalize=True, rescale=False,
    formula="theta_0 + lambda mean of w_i top_i(delta_i) with the sign of their sum",
)  # fmt: skip
_summed(
    "dare_linear", _DARE, "random", normalize=False, rescale=True,
    formula="theta_0 + lambda sum w_i m_i delta_i / density_i, m_i ~ Bernoulli(density_i)",
)  # fmt: skip
_elected(
    "dare_ties", _DARE, "random", normalize=False, rescale=True,
    formula="as dare_linear, terms with the sign of their sum",
)  # fmt: skip
_summed(
    "della_linear", _DELLA, "rank", normalize=False, rescale=True,
    formula="theta_0 + lambda sum w_i m_i delta_i / p_i, m_i ~ Bernoulli(p_i), p_i by rank in row",
)  # fmt: skip
_elected(
    "della", _DELLA, "rank", normalize=True, rescale=True,
    formula="as della_linear, mean of terms with the sign of their sum",
)  # fmt: skip
_summed(
    "breadcrumbs", _CRUMBS, "outliers", normalize=False, rescale=False,
    formula="theta_0 + lambda sum w_i m_i delta_i, m_i drops the largest and the smallest",
)  # fmt: skip
_elected(
    "breadcrumbs_ties", _CRUMBS, "outliers", normalize=False, rescale=False,
    formula="as breadcrumbs, terms with the sign of their sum",
)  # fmt: skip
register(
    _Sce(
        "sce",
        "Wan et al., FuseChat, 2024, https://arxiv.org/abs/2408.07990",
        "theta_0 + mean of delta_i with the sign of their sum, weighted by mean square",
        {
            "select_topk": Parameter(
                float, 1.0, low=0, high=1, meaning="share of elements kept, by variance"
            ),
            "int8_mask": INT8_MASK,
        },
    )
)
