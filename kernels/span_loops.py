"""The loops of `span`, for numba; arguments that all share are explained there."""

from __future__ import annotations

import math

import numpy as np

from .blocks import loop, store, upcast
from .exponentials import exp_down, log_near
from .reference_methods import BLOCK


@loop
def _values(addresses, forms, is_delta, from_base, offset, n, base, values):
    """values[i, :n] of all sources, deltas if `from_base`; base[:n] where there is a base."""
    has_base = addresses[0] != 0
    if has_base:
        upcast(addresses[0], forms[0], offset, n, base)
    for i in range(len(values)):
        value = values[i]
        upcast(addresses[i + 1], forms[i + 1], offset, n, value)
        if from_base and not is_delta[i]:
            for j in range(n):
                value[j] = value[j] - base[j]
        elif is_delta[i] and not from_base:
            for j in range(n):
                value[j] = value[j] + base[j]


@loop
def _add_products(a, b, n, lanes):
    """Add a * b, each to its own lane."""
    for j in range(n):
        lanes[j] = lanes[j] + np.float64(a[j]) * np.float64(b[j])


@loop
def products(
    addresses, forms, is_delta, from_base, start, elems, block_elems, base, values, lanes, out
):
    """out[block, a, b] = sum over the block of value_a * value_b, for a <= b."""
    first = np.int64(0)
    while first < elems:
        block = (start + first) // block_elems
        length = min((block + 1) * block_elems - start, elems) - first
        for a in range(len(values)):
            for b in range(a, len(values)):
                for j in range(BLOCK):
                    lanes[a, b, j] = 0.0
        for begin in range(0, length, BLOCK):
            n = min(BLOCK, length - begin)
            _values(addresses, forms, is_delta, from_base, first + begin, n, base, values)
            for a in range(len(values)):
                for b in range(a, len(values)):
                    _add_products(values[a], values[b], n, lanes[a, b])
        for a in range(len(values)):
            for b in range(a, len(values)):
                total = 0.0
                for j in range(min(BLOCK, length)):
                    total += lanes[a, b, j]
                out[block, a, b] = total
        first += length


@loop
def column_products(addresses, forms, is_delta, from_base, elems, row, base, values, out):
    """out[a, b, column] += sum over the tile's rows of value_a * value_b, for a <= b."""
    for number in range(elems // row):
        for begin in range(0, row, BLOCK):
            n = min(BLOCK, row - begin)
            _values(addresses, forms, is_delta, from_base, number * row + begin, n, base, values)
            for a in range(len(values)):
                for b in range(a, len(values)):
                    _add_products(values[a], values[b], n, out[a, b][begin:])


@loop
def _spread(weights, by_column, at, n, block):
    """block[:n] = the weights of n columns from `at` on, or that of row `at`."""
    if by_column:
        here = weights[at:]
        for j in range(n):
            block[j] = block.dtype.type(here[j])
    else:
        for j in range(n):
            block[j] = block.dtype.type(weights[at])


@loop
def _add_scaled(scale, values, minus, subtract, n, total):
    """total += scale * (values - minus), or scale * values without `subtract`."""
    if subtract:
        for j in range(n):
            total[j] = total[j] + scale[j] * (values[j] - minus[j])
    else:
        for j in range(n):
            total[j] = total[j] + scale[j] * values[j]


@loop
def combine(
    addresses, forms, is_delta, from_base, start, elems, row, by_column, weights, base,
    values, s,
):  # fmt: skip
    """The weighted sum; True if an output is not finite. s: (2, BLOCK), the scale and the sum."""
    last = len(addresses) - 1
    scale, total = s[0], s[1]
    zero = total.dtype.type(0)
    first_added = 0 if from_base else 1
    nonfinite = False
    for number in range(elems // row):
        for begin in range(0, row, BLOCK):
            n = min(BLOCK, row - begin)
            offset = number * row + begin
            at = begin if by_column else start // row + number
            _values(addresses, forms, is_delta, from_base, offset, n, base, values)
            for j in range(n):
                total[j] = zero
            for i in range(first_added, len(values)):
                _spread(weights[i], by_column, at, n, scale)
                _add_scaled(scale, values[i], values[0], not from_base, n, total)
            if not from_base:
                # weights[-1] is what all weights together exceed 1 by.
                _spread(weights[len(values)], by_column, at, n, scale)
                _add_scaled(scale, values[0], values[0], False, n, total)
                for j in range(n):
                    base[j] = values[0, j]
            for j in range(n):
                old, new = base[j], base[j] + total[j]
                total[j] = old if total[j] == zero else new
            nonfinite |= store(total, addresses[last], forms[last], offset, n)
    return nonfinite


@loop
def _raise_tops(theta, base, n, tops):
    """tops[0, j], tops[1, j] = the largest of source and base seen in lane j."""
    for j in range(n):
        a, b = np.float64(theta[j]), np.float64(base[j])
        tops[0, j] = a if a > tops[0, j] else tops[0, j]
        tops[1, j] = b if b > tops[1, j] else tops[1, j]


@loop
def _add_exps(theta, base, n, top_p, top_q, sums):
    """Add exp(value - top) of source and base, each to its own lane."""
    for j in range(n):
        sums[0, j] = sums[0, j] + exp_down(np.float64(theta[j]) - top_p)
        sums[1, j] = sums[1, j] + exp_down(np.float64(base[j]) - top_q)


@loop
def _add_terms(theta, base, n, top_p, top_q, over_p, over_q, eps, sums):
    """Add (p + eps) log((p + eps) / (q + eps)), each to its own lane."""
    for j in range(n):
        p = exp_down(np.float64(theta[j]) - top_p) * over_p + eps
        q = exp_down(np.float64(base[j]) - top_q) * over_q + eps
        sums[0, j] = sums[0, j] + p * log_near(p / q)


@loop
def divergence(addresses, forms, is_delta, start, elems, row, eps, base, values, lanes, out):
    """out[row] = sum of (p + eps) log((p + eps) / (q + eps)), at least 0, of each row.

    p = softmax of the source's row, q = softmax of the base's. lanes: (2, BLOCK) fp64.
    """
    theta = values[0]
    for number in range(elems // row):
        top_p, top_q, sum_p, sum_q = -math.inf, -math.inf, 0.0, 0.0
        for stage in range(3):
            for j in range(BLOCK):
                lanes[0, j] = lanes[1, j] = -math.inf if stage == 0 else 0.0
            for begin in range(0, row, BLOCK):
                n = min(BLOCK, row - begin)
                _values(addresses, forms, is_delta, False, number * row + begin, n, base, values)
                if stage == 0:
                    _raise_tops(theta, base, n, lanes)
                elif stage == 1:
                    _add_exps(theta, base, n, top_p, top_q, lanes)
                else:
                    over_p, over_q = 1.0 / sum_p, 1.0 / sum_q
                    _add_terms(theta, base, n, top_p, top_q, over_p, over_q, eps, lanes)
            used = min(BLOCK, row)
            if stage == 0:
                for j in range(used):
                    top_p, top_q = max(top_p, lanes[0, j]), max(top_q, lanes[1, j])
            else:
                sum_p, sum_q = 0.0, 0.0
                for j in range(used):
                    sum_p += lanes[0, j]
                    sum_q += lanes[1, j]
        out[start // row + number] = 0.0 if sum_p < 0.0 else sum_p
