"""What a merge scored beyond the reference, from some of the examples.

**Pairing.** What counts of a score is its difference to the reference (the base; the first point
scored, where the ranges exclude the base) *on the same examples*:

    d(w) = Σ_{i∈S} a_i(w) / Σ_{i∈S} b_i(w) − Σ_{i∈S} a_i(ref) / Σ_{i∈S} b_i(ref)

with a the parts and b the sizes of a `Score`, S the examples scored at w. Some texts are hard for
every model; pairing takes that out, and the error of a subset shrinks about twelvefold against raw
means. What is left of example i is x_i = (Δa_i − d·b_i) / mean(b).

**Regression.** The rest is not noise either: an example gains from one vector and loses by
another, much the same way at all weights. So x_i(w) ≈ β_i · (1, w), and the β_i, one per example,
are learned from the trials that scored it, by ridge regression. What they predict for the examples
that happened to be in S, less what they predict for all, is taken off d (the difference estimator
of survey sampling: Särndal, Swensson and Wretman, "Model assisted survey sampling", chapter 6). The
constant in β_i lets the trials correct what was peculiar to the reference's own scores. A trial is
corrected by the other trials alone (leave one out), the ridge is the one that predicts best so, and
where nothing predicts better than zero nothing is taken off.

**Variance** of d is that of m of N examples drawn without replacement, (1 − m/N)/m times the
variance of what is left of x_i (Cochran, "Sampling Techniques", chapter 6). The variance of a few
examples is itself poorly known, and 0 where all answers agree; so it is drawn towards that of the
pool of all trials with the weight of `PRIOR_EXAMPLES`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from optimer_engine.search.objective import Score

PRIOR_EXAMPLES = 8
RIDGES = (0.1, 1.0, 10.0)
"""In units of one trial at the largest weights seen."""
ROUNDS = 3
LEAST_TRIALS = 4
"""Below which nothing is regressed."""


def differences(
    scores: Sequence[Score | None], weights: np.ndarray, reference: int
) -> tuple[np.ndarray, np.ndarray]:
    """Unsigned differences of one term to the reference, and their variances.

    Args:
        scores: of each point; None where it has none.
        weights: of each point, float64 [n, d].
        reference: index of the point that differences are taken to.

    Returns:
        Both float64 [n]; nan and 0 where a point has no score.
    """
    base = scores[reference]
    assert base is not None
    d, variances = np.full(len(scores), np.nan), np.zeros(len(scores))
    rows: list[int] = []
    for k, score in enumerate(scores):
        if score is None:
            continue
        d[k] = score.value - base.value
        if k != reference and score.parts and base.parts:
            rows.append(k)
    if not rows:
        return d, variances
    seen = _Seen([scores[k] for k in rows], base)
    features = _features(weights[rows] - weights[reference])
    d[rows], variances[rows] = seen.estimate(features)
    return d, variances


def difference(score: Score, base: Score) -> float:
    """Of two scores on their common examples, by pairing alone."""
    if not (score.parts and base.parts):
        return score.value - base.value
    return float(_Seen([score], base).paired[0])


class _Seen:
    """Scores of one term as matrices [points, examples of the reference]."""

    def __init__(self, scores: Sequence[Score | None], base: Score) -> None:
        at, base_a, base_b = _arrays(base)
        n = len(scores)
        self.seen = np.zeros((n, len(at)), dtype=bool)
        a, b = np.zeros(self.seen.shape), np.zeros(self.seen.shape)
        whole = []
        for k, score in enumerate(scores):
            assert score is not None
            mine, mine_a, mine_b = _arrays(score)
            both, here, there = np.intersect1d(mine, at, return_indices=True)
            self.seen[k, there] = True
            a[k, there], b[k, there] = mine_a[here], mine_b[here]
            whole.append(not score.examples and not base.examples)
            if not len(both):  # nothing in common: the values themselves
                whole[-1] = True
        self.whole = np.array(whole)
        self.m = self.seen.sum(axis=1)
        values = np.array([s.value - base.value for s in scores if s is not None])
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios = a.sum(axis=1) / b.sum(axis=1) - (self.seen @ base_a) / (self.seen @ base_b)
            self.size = b.sum(axis=1) / self.m  # mean over the examples seen
        # in full, where the parts are kept to 7 digits
        self.paired = np.where(self.whole, values, ratios)
        self.size[self.m == 0] = 1.0
        self.delta = np.where(self.seen, a - base_a, 0.0) / self.size[:, None]
        self.share = b / self.size[:, None]

    def residuals(self, d: np.ndarray) -> np.ndarray:
        """What is left of each example, 0 where it was not seen."""
        return np.where(self.seen, self.delta - d[:, None] * self.share, 0.0)

    def estimate(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Differences and variances, both [n]."""
        d, rest = self.paired, self.residuals(self.paired)
        least = float((rest**2).sum())
        if len(rest) >= LEAST_TRIALS and not self.whole.all():
            for ridge in RIDGES:
                corrected, left = self._corrected(features, ridge)
                error = float((left**2).sum())
                if error < least:
                    d, rest, least = corrected, left, error
        m, n = np.maximum(self.m, 1), self.seen.shape[1]
        spread = np.where(self.m > 1, (rest**2).sum(axis=1) / np.maximum(m - 1, 1), 0.0)
        pooled = (self.m * spread).sum() / max(self.m.sum(), 1)
        drawn = (self.m * spread + PRIOR_EXAMPLES * pooled) / (self.m + PRIOR_EXAMPLES)
        variances = np.where(self.m > 0, drawn / m * (1.0 - m / n), 0.0)
        return d, variances

    def _corrected(self, features: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
        """Differences [n] less what each trial's examples are predicted to be off, and the rest."""
        seen = self.seen.astype(np.float64)
        p = features.shape[1]
        outer = features[:, :, None] * features[:, None, :]
        inverse = np.linalg.inv(np.tensordot(seen.T, outer, 1) + ridge * np.eye(p))  # [N, p, p]
        turned = np.einsum("ipq,kq->kip", inverse, features)
        leverage = np.where(self.seen, np.einsum("kip,kp->ki", turned, features), 0.0)
        d = self.paired
        predicted = np.zeros(seen.shape)
        for _ in range(ROUNDS):
            rest = self.residuals(d)
            fitted = np.einsum("kip,ip->ki", turned, rest.T @ features)
            # without trial k itself: Sherman and Morrison's formula
            alone = np.where(self.seen, (fitted - leverage * rest) / (1.0 - leverage), fitted)
            predicted = np.where(self.seen, alone - alone.mean(axis=1, keepdims=True), 0.0)
            off = predicted.sum(axis=1) / np.maximum(self.m, 1)
            d = np.where(self.whole, self.paired, self.paired - off)
        return d, np.where(self.seen, self.residuals(d) - predicted, 0.0)


def _features(steps: np.ndarray) -> np.ndarray:
    """(1, w) of points at ``steps`` [n, d] from the reference, each weight in its largest step."""
    largest = np.abs(steps).max(axis=0)
    scaled = steps / np.where(largest > 0, largest, 1.0)
    return np.concatenate([np.ones((len(steps), 1)), scaled], axis=1)


def _arrays(score: Score) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Examples, parts and sizes of a score that has parts."""
    a = np.array(score.parts)
    at = np.array(score.examples, dtype=np.int64) if score.examples else np.arange(len(a))
    return at, a, np.array(score.sizes) if score.sizes else np.ones(len(a))
