"""Weights from the products of n vectors: (..., n, n) -> (..., n), in fp64.

The mathematics of spherical interpolation, Karcher means and Model Stock, written on coefficients:
a vector is a weighted sum of the inputs, and the product of two such is w @ products @ v.
"""

from __future__ import annotations

import numpy as np

from optimer_engine.errors import RecipeError

COLINEAR = 1e-12
"""1 - cos**2 up to which two vectors count as parallel: fp64 leaves no angle to interpolate."""


def slerp_weights(products: np.ndarray, t: float, colinear: float) -> np.ndarray:
    """Weights of two vectors, a fraction t of the way from the first to the second (Shoemake 1985).

    Args:
        products: (..., 2, 2).
        colinear: vectors whose 1 - cos**2 is not above it are interpolated linearly.
    """
    norms = np.sqrt(products[..., 0, 0] * products[..., 1, 1])
    cos = np.clip(products[..., 0, 1] / np.where(norms > 0, norms, 1), -1, 1)
    straight = 1 - cos**2 <= colinear
    theta = np.arccos(np.where(straight, 0, cos))
    sin = np.sin(theta)
    return np.stack(
        [
            np.where(straight, 1 - t, np.sin((1 - t) * theta) / sin),
            np.where(straight, t, np.sin(t * theta) / sin),
        ],
        -1,
    )


def model_stock_weights(products: np.ndarray, least: float = 0.0) -> np.ndarray:
    """t / n for each delta, t = n cos / (1 + (n - 1) cos) of their mean cosine.

    Where the denominator vanishes there is no estimate, and the base is kept (weight 0).

    Args:
        least: products of two lengths are raised to it before a cosine is taken.
    """
    n = products.shape[-1]
    norms = np.sqrt(np.einsum("...ii->...i", products))
    pairs = np.maximum(norms[..., :, None] * norms[..., None, :], least)
    cosines = np.clip(products / np.where(pairs > 0, pairs, 1), -1, 1)
    first, second = np.triu_indices(n, 1)
    cos = cosines[..., first, second].mean(-1)
    below = 1 + (n - 1) * cos
    singular = np.abs(below) < 1e-6
    t = np.where(singular, 0, n * cos / np.where(singular, 1, below))
    return np.repeat(t[..., None] / n, n, -1)


def multislerp_weights(
    products: np.ndarray, weights: np.ndarray, eps: float, where: str
) -> np.ndarray:
    """Barycentre in the tangent space at the weighted mean direction, (n, n) -> (n,).

    Raises:
        RecipeError: when the mean of directions has none itself.
    """
    n = len(weights)
    norms = np.sqrt(np.diag(products))
    if not norms.any():
        return weights  # of nothing: a tensor that all sources share with the base
    units = norms + eps
    cosines = products / np.outer(units, units)
    length = _length(weights, cosines)
    if length < eps:
        if n == 2:
            return weights
        raise RecipeError(
            "the weighted mean of the inputs' directions is zero",
            where=where,
            todo="change the weights",
        )
    mean = weights / length
    tangent = weights - (weights @ (cosines @ mean)) * mean
    angle = _length(tangent, cosines) + eps
    merged = mean * np.cos(angle) + tangent * (np.sin(angle) / angle)
    return merged * (norms @ weights) / units


def karcher_weights(products: np.ndarray, max_iter: int, tol: float) -> np.ndarray:
    """Equally weighted Karcher mean of directions, times the mean length, (n, n) -> (n,)."""
    n = len(products)
    norms = np.sqrt(np.diag(products))
    valid = norms > tol
    if not valid.any():
        return np.zeros(n)
    share = valid / valid.sum()
    units = np.where(valid, norms, 1)
    cosines = products / np.outer(units, units)
    length = _length(share, cosines)
    mean = np.eye(n)[valid.argmax()] if length < tol else share / length
    for _ in range(max_iter):
        tangent = np.zeros(n)
        for i in np.flatnonzero(valid):
            cos = np.clip(cosines[i] @ mean, -1, 1)
            theta = np.arccos(cos)
            if theta >= tol and np.sin(theta) > 1e-9:  # opposite: no direction is the nearer
                tangent += share[i] * (theta / np.sin(theta)) * (np.eye(n)[i] - cos * mean)
        angle = _length(tangent, cosines)
        if angle < tol:
            break
        mean = np.cos(angle) * mean + np.sin(angle) * (tangent / angle)
        length = _length(mean, cosines)
        if length > tol:
            mean = mean / length
    return np.where(valid, mean / units, 0) * norms.mean()


def _length(weights: np.ndarray, cosines: np.ndarray) -> float:
    """Of a weighted sum of unit vectors."""
    return float(np.sqrt(max(0.0, weights @ cosines @ weights)))
