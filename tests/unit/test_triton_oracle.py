"""Every GPU kernel in Triton's interpreter against fp64: 1 to 32 sources, odd sizes, starts that
are not aligned, NaN and infinity, and nothing at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optimer_engine.kernels import reference, sparse
from optimer_engine.kernels import reference_methods as rm
from optimer_engine.kernels import reference_packed as rp

pytest.importorskip("triton", reason="triton is not installed; it exists for Linux only")

from tests.unit.triton_interpreter import as_torch, interpreted, place, values

gpu = interpreted("gpu")
gpu_sparse = interpreted("gpu_sparse")
low_rank = interpreted("triton_lowrank")
moments = interpreted("triton_moments")
elements = interpreted("triton_elements")

COUNTS = (1, 2, 5, 9, 32)
ELEMS = 2049
"""A whole block of most kernels, and one more."""
BF16, F16, F32 = 0, 1, 2
EVERYWHERE, NOTHING = 1 << 40, (0xFFFFFFFE, -1, 0)


@pytest.fixture(autouse=True)
def _quiet_numpy():
    """The interpreter computes in numpy, which warns of what these tests do on purpose."""
    with np.errstate(all="ignore"):
        yield


def operands(count, elems=ELEMS, spoiled=False):
    """Base and sources near it, bf16, each at another distance from an aligned address."""
    rng = np.random.default_rng(count)
    base = values(rng, elems, BF16)
    exact = reference.upcast(base, BF16, np.float64)
    near = [
        reference.round_to(exact + 0.1 * rng.standard_normal(elems), BF16) for _ in range(count)
    ]
    if spoiled:
        near[-1][[3, elems - 1]] = 0x7FC0, 0xFF80
    return [place(array, k % 3)[1] for k, array in enumerate([base, *near])]


def numbers(array, code=BF16):
    return reference.upcast(array, code, np.float64)


def deltas(base, sources):
    return [numbers(source) - numbers(base) for source in sources]


def weights_of(count):
    return [(-1) ** i * (0.9 - 0.02 * i) for i in range(count)]


def assert_near(out, want, size, code=BF16):
    """Off by a rounding of the result, and by what fp32 loses of terms of this total size."""
    step = {BF16: 2.0**-7, F32: 2.0**-23}[code]
    fine = np.isfinite(want)
    error = np.abs(numbers(out, code) - want)[fine]
    assert np.all(error <= (step / 2 * 1.01 * np.abs(want) + 2.0**-22 * size)[fine])
    assert not np.isfinite(numbers(out, code)[~fine]).any()


@pytest.mark.parametrize("spoiled", [False, True])
@pytest.mark.parametrize("out_code", [BF16, F32])
@pytest.mark.parametrize("count", COUNTS)
def test_linear_and_batch(count, out_code, spoiled):
    base, *sources = operands(count, spoiled=spoiled)
    weights = weights_of(count)
    terms = [w * d for w, d in zip(weights, deltas(base, sources), strict=True)]
    want, size = numbers(base) + sum(terms), sum(map(np.abs, terms)) + np.abs(numbers(base))
    out = place(np.zeros(ELEMS, reference.STORAGE[out_code]), 1)[1]
    flag = gpu.linear(
        as_torch(base), BF16, [as_torch(s) for s in sources], [BF16] * count, [False] * count,
        weights, as_torch(out), out_code,
    )  # fmt: skip
    assert bool(flag) == spoiled
    assert_near(out, want, size, out_code)
    again = np.zeros(ELEMS, reference.STORAGE[out_code])
    typed = [as_torch(a).view(torch.bfloat16) for a in (base, *sources)]
    kinds = {BF16: torch.bfloat16, F32: torch.float32}
    target = as_torch(again).view(kinds[out_code])
    cuts = [[part[:700], part[700:]] for part in (*typed, target)]
    batch = gpu.Batch(cuts[0], list(zip(*cuts[1:-1], strict=True)), [False] * count, cuts[-1])
    assert bool(batch.merge(weights)) == spoiled
    assert_near(again, want, size, out_code)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("count", COUNTS)
def test_packed_sources(count, bits):
    base, *_ = operands(count)
    rng = np.random.default_rng(count)
    packed = [
        rp.quantise((rng.standard_normal(ELEMS) * 0.1).astype(np.float32), bits)
        for _ in range(count)
    ]
    weights = weights_of(count)
    read = [rp.dequantise(*pair, bits)[:ELEMS].astype(np.float64) for pair in packed]
    terms = [w * d for w, d in zip(weights, read, strict=True)]
    out = place(np.zeros(ELEMS, np.uint16), 1)[1]
    code = elements.INT8 if bits == 8 else elements.INT4
    flag = gpu.linear(
        as_torch(base), BF16, [tuple(map(as_torch, pair)) for pair in packed], [code] * count,
        [True] * count, weights, as_torch(out), BF16,
    )  # fmt: skip
    assert not flag
    assert_near(out, numbers(base) + sum(terms), sum(map(np.abs, terms)) + np.abs(numbers(base)))


def masks(kind, count):
    table = np.zeros((count + 1, 8), np.int64)
    table[:, 0] = rm.KEEP
    table[:count, 0] = kind
    threshold = int(np.float32(0.08).view(np.uint32))
    table[:count, 1:7] = [threshold, EVERYWHERE, 0, *NOTHING]
    table[:count, 7] = 1 << 31 if kind == rm.CHANCE else 1
    streams = np.random.default_rng(7).integers(0, 2**32, (count, 4))
    return sparse.Masks(table, np.full((count, 2), [0.3, 0.5]), streams, row=ROW)


ROW = 683
"""ELEMS is three rows."""


def kept(kind, delta, given, i):
    """A delta as its mask leaves it, by the specification."""
    start = rm.GRANULE if kind != rm.RANK else 5 * ROW
    keys = rm.magnitudes(delta.astype(np.float32))
    if kind == rm.CUT:
        return np.where(keys >= given.rows[i, 1], delta, 0)
    if kind == rm.CHANCE:
        return np.where(rm.chance_mask(given.streams[i], start, delta.size, 1 << 31), delta, 0)
    chances = rm.rank_probabilities(keys.reshape(-1, ROW), 0.3, 0.5).reshape(-1)
    words = rm.uniform_words(given.streams[i], start, delta.size)
    return np.where(words < chances * 2**32, delta / chances, 0)


QUICK = {(1, rm.CUT), (2, rm.RANK), (5, rm.CHANCE), (5, rm.RANK), (9, rm.CUT), (32, rm.CUT)}
SPARSE = [
    pytest.param(count, kind, marks=[] if (count, kind) in QUICK else pytest.mark.slow)
    for count in COUNTS
    for kind in (rm.CUT, rm.CHANCE, rm.RANK)
]


@pytest.mark.parametrize(("count", "kind"), SPARSE)
def test_sparse_merges_and_norms(count, kind):
    base, *sources = operands(count)
    given, weights = masks(kind, count), weights_of(count)
    start = rm.GRANULE if kind != rm.RANK else 5 * ROW
    inputs = sparse.Inputs.of(
        as_torch(base), BF16, [as_torch(s) for s in sources], [BF16] * count, [False] * count,
        start, BF16,
    )  # fmt: skip
    left = [kept(kind, d, given, i) for i, d in enumerate(deltas(base, sources))]
    terms = [w * d for w, d in zip(weights, left, strict=True)]
    size = sum(map(np.abs, terms)) + np.abs(numbers(base))
    for consensus in (rm.SUM,) if count > 2 else (rm.NO_CONSENSUS, rm.SUM):
        total = sum(terms)
        if consensus == rm.SUM:
            plus = total > 0
            agree = [np.where(np.where(plus, t > 0, t < 0), t, 0) for t in terms]
            # Where terms cancel, fp32 and fp64 may elect differently.
            clear = np.abs(total) > 1e-5
            total = np.where(total == 0, 0, sum(agree))
        out = place(np.zeros(ELEMS, np.uint16), 1)[1]
        flag = gpu_sparse.merge(
            inputs, given, weights, weights, None, consensus, 1.0, False, as_torch(out), BF16
        )
        assert not flag
        chosen = clear if consensus == rm.SUM else np.full(ELEMS, True)
        assert_near(out[chosen], (numbers(base) + total)[chosen], size[chosen])
    block = ROW if kind == rm.RANK else rm.GRANULE
    sums = np.zeros((5 + 3, count, 3))
    gpu_sparse.norms(inputs, given, block, sums)
    first, last = start // block, -(-(start + ELEMS) // block)
    for i, delta in enumerate(deltas(base, sources)):
        want = [np.abs(delta).sum(), np.abs(left[i]).sum(), np.square(left[i]).sum()]
        assert np.allclose(sums[first:last, i].sum(0), want, rtol=1e-6)


@pytest.mark.parametrize("kind", [rm.CUT, rm.CHANCE, rm.RANK], ids=["cut", "chance", "rank"])
def test_sparse_merges_find_what_is_not_finite_and_take_nothing(kind):
    for elems, spoiled in ((ELEMS, True), (0, False)):
        base, *sources = operands(2, elems, spoiled)
        inputs = sparse.Inputs.of(
            as_torch(base), BF16, [as_torch(s) for s in sources], [BF16] * 2, [False] * 2, 0, BF16
        )
        out = np.zeros(elems, np.uint16)
        flag = gpu_sparse.merge(
            inputs, masks(kind, 2), [0.5, 0.25], [0.5, 0.25], None, 0, 1.0, False, as_torch(out), 0
        )
        assert bool(flag) == spoiled
        sums = np.zeros((3, 2, 3))
        gpu_sparse.norms(inputs, masks(kind, 2), ROW if kind == rm.RANK else rm.GRANULE, sums)
        assert np.isfinite(sums).all() != spoiled
        bins, equal = np.zeros((2, rm.HIGH), np.int64), np.zeros((2, 1), np.int64)
        gpu_sparse.count(inputs, masks(rm.KEEP, 2), 0, np.array([[0, 0], [1, 0]]), bins, equal)
        assert bins.sum() == 2 * elems


@pytest.mark.parametrize("count", COUNTS)
def test_counts(count):
    base, *sources = operands(count)
    inputs = sparse.Inputs.of(
        as_torch(base), BF16, [as_torch(s) for s in sources], [BF16] * count, [False] * count,
        2 * rm.GRANULE, BF16,
    )  # fmt: skip
    keys = [rm.magnitudes(d.astype(np.float32)) for d in deltas(base, sources)]
    chosen = [int(np.median(k)) for k in keys]
    for stage, width in enumerate((rm.HIGH, rm.LOW, 0)):
        wanted = np.array([[i, (0, c >> 16, c)[stage]] for i, c in enumerate(chosen)])
        bins = np.zeros((count, width), np.int64)
        equal = np.zeros((count, 4 if stage else 0), np.int64)
        gpu_sparse.count(inputs, masks(rm.KEEP, count), stage, wanted, bins, equal)
        for i, key in enumerate(keys):
            if stage == 0:
                assert np.array_equal(bins[i], np.bincount(key >> 16, minlength=rm.HIGH))
            elif stage == 1:
                low = key[key >> 16 == chosen[i] >> 16] & 0xFFFF
                assert np.array_equal(bins[i], np.bincount(low, minlength=rm.LOW))
                assert list(equal[i]) == [0, 0, np.count_nonzero(low == 0), 0]
            else:
                assert list(equal[i]) == [0, 0, np.count_nonzero(key == chosen[i]), 0]


@pytest.mark.parametrize(
    ("count", "spoiled"),
    [(1, False), (2, True), (5, False), (9, True), pytest.param(32, True, marks=pytest.mark.slow)],
)
def test_moments(count, spoiled):
    base, *sources = operands(count, spoiled=spoiled)
    found = moments.moments(
        as_torch(base), BF16, [as_torch(s) for s in sources], [BF16] * count, [False] * count, True
    )
    exact = np.array(deltas(base, sources), np.float32).astype(np.float64)
    fine = np.isfinite(exact).all(1)
    want = (exact @ exact.T)[np.ix_(fine, fine)]
    got = found.products.sum(0).numpy()[np.ix_(fine, fine)]
    assert np.allclose(got, want, rtol=1e-12, atol=1e-12)
    assert found.zeros.tolist() == np.count_nonzero(exact == 0, axis=1).tolist()
    assert found.nonfinite.tolist() == np.count_nonzero(~np.isfinite(exact), axis=1).tolist()


@pytest.mark.parametrize("count", COUNTS)
def test_low_rank(count):
    rng = np.random.default_rng(count)
    rows, columns, rank = 7, 33, 5
    base = place(values(rng, rows * columns, BF16), 1)[1]
    want, adapters, weights = numbers(base).reshape(rows, columns), [], weights_of(count)
    size = np.abs(want)
    for k, weight in enumerate(weights):
        code = (BF16, F16, F32)[k % 3]
        left, right = (place(values(rng, n * rank, code), k % 2)[1] for n in (rows, columns))
        pair = as_torch(left).reshape(rows, rank), as_torch(right).reshape(rank, columns)
        adapters.append(low_rank.Factors(*pair, code, 0.5))
        exact = [numbers(left, code).reshape(rows, rank), numbers(right, code).reshape(rank, -1)]
        want = want + weight * 0.5 * (exact[0] @ exact[1])
        size = size + abs(weight) * (np.abs(exact[0]) @ np.abs(exact[1]))
    out = place(np.zeros(rows * columns, np.uint16), 1)[1]
    arguments = as_torch(base).reshape(rows, columns), BF16
    target = as_torch(out).reshape(rows, columns), BF16
    assert not low_rank.low_rank(*arguments, adapters, weights, *target)
    assert_near(out, want.reshape(-1), size.reshape(-1))
    adapters[-1].left.view(-1)[2] = {BF16: 0x7F80, F16: 0x7C00, F32: 0x7F800000}[adapters[-1].code]
    assert low_rank.low_rank(*arguments, adapters, weights, *target)
