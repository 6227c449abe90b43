"""Sparse and low-rank merges, statistics and packed vectors on GPUs, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from optimer_engine.kernels import reference, reference_moments, sparse
from optimer_engine.kernels import reference_methods as rm
from optimer_engine.kernels import reference_packed as rp
from optimer_engine.methods import run as methods_run
from optimer_engine.methods.registry import get

pytest.importorskip("triton", reason="triton is not installed; it exists for Linux only")

from tests.unit.triton_interpreter import as_torch, assert_same, interpreted, values

gpu_sparse = interpreted("gpu_sparse")
gpu_moments = interpreted("triton_moments")
low_rank = interpreted("triton_lowrank")
gpu_packed = interpreted("triton_packed")

ALL_EQUAL, NOTHING = 1 << 40, (0xFFFFFFFE, -1, 0)


@pytest.fixture(autouse=True)
def _quiet_numpy():
    """The interpreter computes in numpy, which warns of what these tests do on purpose."""
    with np.errstate(all="ignore"):
        yield


def on_gpu(inputs):
    return replace(
        inputs, base=as_torch(inputs.base), sources=[as_torch(s) for s in inputs.sources]
    )


def tile(elems, codes, base_code=0, out_code=0, start=0, seed=0, wild=False):
    """A tile whose deltas take few values, so that many are equal or zero."""
    rng = np.random.default_rng(seed)
    base = values(rng, elems, base_code, wild)
    theta = reference.upcast(base, base_code, np.float64)
    deltas = [rng.integers(-4, 5, elems) / 64 for _ in codes]
    is_delta = [i % 3 == 1 for i in range(len(codes))]
    sources = [
        reference.round_to(delta if stored else theta + delta, code)
        for delta, stored, code in zip(deltas, is_delta, codes, strict=True)
    ]
    return sparse.Inputs.of(base, base_code, sources, codes, is_delta, start, out_code)


def masks(rows, shared=None, measure=rm.MAGNITUDE):
    table = np.zeros((len(rows) + 1, 8), np.int64)
    table[:, 0] = rm.KEEP
    for row, given in zip(table, [*rows, shared or [rm.KEEP]], strict=True):
        row[: len(given)] = given
    streams = np.random.default_rng(7).integers(0, 2**32, (len(rows), 4))
    return sparse.Masks(table, np.zeros((len(rows), 2)), streams, measure)


def key(value):
    return int(np.float32(value).view(np.uint32))


CUT_WITHIN = [rm.CUT, key(2 / 64), 1, 100, *NOTHING]
CUT_BETWEEN = [rm.CUT, key(1 / 64), ALL_EQUAL, 0, key(3 / 64), 1, 40]
CUT_EARLIER = [rm.CUT, key(3 / 64), 0, 7, *NOTHING]
CHANCE = [rm.CHANCE, *[0] * 6, 1 << 31]


@pytest.mark.parametrize("consensus", [rm.NO_CONSENSUS, rm.SUM, rm.COUNT])
@pytest.mark.parametrize(
    ("rows", "codes", "base_code", "out_code", "elems"),
    [
        ([CUT_WITHIN, CUT_BETWEEN, CUT_EARLIER], [0, 0, 0], 0, 0, 2700),
        ([CHANCE, [rm.KEEP], [rm.DROP], CHANCE, CUT_WITHIN], [0, 2, 0, 1, 4], 0, 0, 2049),
        ([CUT_BETWEEN, CHANCE], [2, 2], 2, 2, 1100),
        ([[rm.KEEP]], [0], 0, 1, 0),
    ],
)
def test_a_sparse_merge_equals_the_cpu_s_to_the_bit(
    consensus, rows, codes, base_code, out_code, elems
):
    inputs = tile(elems, codes, base_code, out_code, start=rm.GRANULE, seed=elems)
    weights = [0.5, -0.25, 0.75, 1.5, 0.125][: len(rows)]
    for divisors, zero_is_positive in ((None, True), ([0.5, 0.25, 1.0, 2.0, 3.0], False)):
        terms = (
            masks(rows), weights, weights, divisors and divisors[: len(rows)], consensus, 0.7,
            zero_is_positive,
        )  # fmt: skip
        want, got = (np.zeros(elems, reference.STORAGE[out_code]) for _ in range(2))
        assert not sparse.merge(inputs, *terms, want, out_code)
        assert not gpu_sparse.merge(on_gpu(inputs), *terms, as_torch(got), out_code)
        assert_same(got, want, out_code)


def test_what_is_not_finite_is_found_even_where_it_is_masked():
    inputs = tile(300, [0])
    inputs.sources[0][123] = 0x7F80
    drops_large = masks([[rm.CUT, key(1 / 64), ALL_EQUAL, 0, key(1), 0, 0]])
    out = np.zeros(300, np.uint16)
    flag = gpu_sparse.merge(
        on_gpu(inputs), drops_large, [1.0], [1.0], None, 0, 1.0, False, as_torch(out), 0
    )
    assert flag
    assert not np.any((out & 0x7F80) == 0x7F80)


@pytest.mark.parametrize("code", [0, 2])
def test_counts_are_the_cpu_s(code):
    inputs = tile(2500, [code, code], code, code, start=rm.GRANULE)
    if code == 2:  # denormals fill the second bin
        inputs.sources[1][:200] = np.arange(0xFFC0, 0x10088, dtype=np.uint32).view(np.float32)
    keep, wanted = masks([[rm.KEEP]] * 2), key(2 / 64)
    for stage, width in enumerate((rm.HIGH, rm.LOW, 0)):
        value = (0, wanted >> 16, wanted)[stage]
        streams = np.array([[1, value], [0, value]])
        results = []
        for kernel, given in ((sparse.count, inputs), (gpu_sparse.count, on_gpu(inputs))):
            bins, equal = np.zeros((2, width), np.int64), np.zeros((2, 3), np.int64)
            kernel(given, keep, stage, streams, bins, equal if stage else equal[:, :0])
            results.append((bins, equal))
        for mine, theirs in zip(*results, strict=True):
            assert np.array_equal(mine, theirs)
        assert results[0][0].sum() or results[0][1].sum()


def test_norms_agree_with_the_cpu_s():
    inputs = tile(2600, [0, 2, 0])
    some = masks([CUT_EARLIER, CHANCE, [rm.DROP]])
    want, got = (np.zeros((1, 3, 3)) for _ in range(2))
    sparse.norms(inputs, some, rm.GRANULE, want)
    gpu_sparse.norms(on_gpu(inputs), some, rm.GRANULE, got)
    assert np.allclose(got, want, rtol=1e-13)


def test_masks_without_a_gpu_kernel_are_refused():
    inputs = on_gpu(tile(64, [0]))
    importance = masks([[rm.KEEP]], measure=rm.IMPORTANCE)
    with pytest.raises(ValueError, match="by importance"):
        gpu_sparse.count(inputs, importance, 0, np.zeros((1, 2)), None, None)
    with pytest.raises(ValueError, match="stand alone"):
        gpu_sparse.norms(inputs, masks([[rm.RANK], CHANCE]), 64, None)
    with pytest.raises(ValueError, match="a multiple of 65536 expected"):
        gpu_sparse.norms(replace(inputs, start=64), masks([[rm.KEEP]]), rm.GRANULE, None)


class OnGpu:
    """`kernels.sparse` with the GPU's functions, on arrays."""

    Masks, Inputs = sparse.Masks, sparse.Inputs

    def __getattr__(self, name):
        def call(inputs, *arguments):
            made = [as_torch(a) if isinstance(a, np.ndarray) and name == "merge" else a
                    for a in arguments]  # fmt: skip
            return getattr(gpu_sparse, name)(on_gpu(inputs), *made)

        return call


@pytest.mark.parametrize(
    ("method", "settings", "densities"),
    [
        ("ties", {}, (0.2, 0.3)),
        ("dare_ties", {"compat": "mergekit"}, (0.5, 0.3)),
        ("breadcrumbs_ties", {}, (0.6, 0.3)),
        ("della_linear", {}, (0.6, 0.3)),
        ("della", {"epsilon": 0.3}, (0.5, 1.0)),
        ("sce", {"select_topk": 0.3}, None),
    ],
)
def test_methods_give_the_same_bits_on_either(monkeypatch, method, settings, densities):
    get(method)
    from optimer_engine.methods import sparse as methods_sparse
    from optimer_engine.methods import threshold, tiles

    rng = np.random.default_rng(3)
    base = torch.from_numpy(rng.standard_normal(2300)).bfloat16()
    noise = torch.from_numpy(rng.standard_normal((2, 2300)) * 0.01).bfloat16()
    sources = [base + noise[0], base + noise[1]]
    per_source = [{"weight": 0.6, "density": d} for d in densities or ()] or [{}] * 2
    arguments = (method, base, sources, settings, per_source)
    want = methods_run.merge_arrays(*arguments)
    for module in (methods_sparse, threshold, tiles):
        monkeypatch.setattr(module, "sparse", OnGpu())
    got = methods_run.merge_arrays(*arguments)
    assert torch.equal(got.view(torch.int16), want.view(torch.int16))
    assert not torch.equal(got, base)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_moments_agree_with_the_reference(count):
    rng = np.random.default_rng(count)
    codes = [(0, 1, 2, 4, 5)[i % 5] for i in range(count)]
    base = values(rng, 1500, 0)
    sources = [values(rng, 1500, code) for code in codes]
    sources[0][5] = reference.round_to(np.array([np.inf]), codes[0])[0]
    sources[-1][:7] = 0
    is_delta = [i % 2 == 0 for i in range(count)]
    start = reference.upcast(base, 0, np.float32)
    for from_base in (True, False):
        read = [
            reference.upcast(source, code, np.float32)
            + start * (delta * (not from_base) - (not delta) * from_base)
            for source, code, delta in zip(sources, codes, is_delta, strict=True)
        ]
        products, zeros, nonfinite = reference_moments.moments(np.array(read))
        got = gpu_moments.moments(
            as_torch(base), 0, [as_torch(s) for s in sources], codes, is_delta, from_base
        )
        finite = np.isfinite(products)
        assert np.allclose(got.products.sum(0).numpy()[finite], products[finite], rtol=1e-12)
        assert np.array_equal(got.zeros.numpy(), zeros)
        assert np.array_equal(got.nonfinite.numpy(), nonfinite)


@pytest.mark.parametrize(
    ("factor", "ranks", "out_code"), [(0, (8, 40), 0), (1, (16,), 0), (2, (8, 3), 0), (0, (8,), 2)]
)
@pytest.mark.parametrize("shape", [(70, 96), (1, 33), (0, 5)])
def test_low_rank_products_are_merged_without_being_formed(factor, ranks, out_code, shape):
    rng = np.random.default_rng(len(ranks))
    rows, columns = shape
    base = values(rng, rows * columns, 0)
    want = reference.upcast(base, 0, np.float64).reshape(shape)
    adapters, weights = [], [0.3, -0.7][: len(ranks)]
    for rank, weight in zip(ranks, weights, strict=True):
        left, right = values(rng, rows * rank, factor), values(rng, rank * columns, factor)
        a = as_torch(left).reshape(rows, rank)
        b = as_torch(right).reshape(columns, rank).T if rank == 3 else as_torch(right)
        adapters.append(low_rank.Factors(a, b.reshape(rank, columns), factor, 2.0))
        turned = reference.upcast(right, factor, np.float64)
        turned = turned.reshape(columns, rank).T if rank == 3 else turned.reshape(rank, columns)
        product = reference.upcast(left, factor, np.float64).reshape(rows, rank) @ turned
        want = want + weight * 2.0 * product
    out = np.zeros(rows * columns, reference.STORAGE[out_code])
    shaped = as_torch(base).reshape(shape), as_torch(out).reshape(shape)
    assert not low_rank.low_rank(shaped[0], 0, adapters, weights, shaped[1], out_code)
    got = reference.upcast(out, out_code, np.float64).reshape(shape)
    step = 2.0**-8 if out_code == 0 else 2.0**-20
    assert np.all(np.abs(got - want) <= step * np.abs(want) + 2e-5)


def test_factors_that_do_not_fit_are_refused():
    base = torch.zeros(4, 6, dtype=torch.int16)
    left, right = torch.zeros(4, 8, dtype=torch.int16), torch.zeros(8, 5, dtype=torch.int16)
    with pytest.raises(ValueError, match=r"\(4, 8\) and \(8, 5\) for a matrix \(4, 6\)"):
        low_rank.low_rank(base, 0, [low_rank.Factors(left, right, 0, 1.0)], [1.0], base, 0)


def packed_exactly(rng, elems, code, base_code):
    """(stream, index, base, trained) of a tensor that training moved here and there."""
    numbers = rng.standard_normal(elems)
    base = reference.round_to(numbers, code if base_code == rp.SAME else base_code)
    moved = rng.standard_normal(elems) * 10.0 ** rng.integers(-8, 0, elems)
    numbers = numbers + moved * (rng.random(elems) < 0.4)
    numbers[rng.random(elems) < 0.01] = np.nan
    trained = reference.round_to(numbers, code)
    origin = rp.reference_bits(base, base_code, code)
    z = rp.distance(origin, trained.view(origin.dtype))
    blocks = [rp.pack_block(z[k : k + rp.BLOCK]) for k in range(0, elems, rp.BLOCK)]
    ends = np.cumsum([0, *map(len, blocks)])
    index = [*ends[: len(blocks) : rp.CHUNK_BLOCKS], ends[-1]]
    return np.frombuffer(b"".join(blocks), np.uint8).copy(), np.array(index), base, trained


@pytest.mark.parametrize(
    ("code", "base_code", "elems"),
    [(0, rp.SAME, 34000), (1, 0, 2100), (2, rp.SAME, 1500), (3, 0, 1025), (2, 1, 1), (0, 2, 0)],
)
def test_exact_vectors_are_unpacked_to_the_bit(code, base_code, elems):
    data, index, base, trained = packed_exactly(np.random.default_rng(1), elems, code, base_code)
    out = np.zeros_like(trained)
    unpack = gpu_packed.unpack_exact
    arguments = torch.from_numpy(index + 800), as_torch(base), base_code, as_torch(out), code
    assert not unpack(as_torch(data), *arguments)
    assert np.array_equal(out.view(np.uint8), trained.view(np.uint8))
    if elems:
        for place, value in ((0, 200), (5, 0xFF), (7, 0xFF), (0, data[0] + 1)):
            damaged = data.copy()
            damaged[place] = value
            assert unpack(as_torch(damaged), *arguments), place
        assert unpack(as_torch(data[:-8].copy()), *arguments) if len(data) > 8 else True


@pytest.mark.parametrize(
    ("row", "codes", "base_code"),
    [(1, [0, 0], 0), (33, [2, 0], 0), (350, [0], 0), (33, [3], 0), (40, [4, 5], 4)],
)
def test_masks_by_rank_are_the_cpu_s_to_the_bit(codes, base_code, row):
    """Few magnitudes, so that most ranks are settled by index; rows begin anywhere."""
    inputs = tile(3 * row, codes, base_code, start=7 * row, seed=row)
    for rescale in (1, 0):
        rows = masks([[rm.RANK, *[0] * 6, rescale]] * len(codes))
        given = replace(rows, chances=np.array([[0.3, 0.4]] * len(codes)), row=row)
        terms = given, [0.5, -0.7][: len(codes)], [1.0] * len(codes), None, rm.SUM, 1.0, False
        want, got = (np.zeros(3 * row, reference.STORAGE[base_code]) for _ in range(2))
        assert not sparse.merge(inputs, *terms, want, base_code)
        assert not gpu_sparse.merge(on_gpu(inputs), *terms, as_torch(got), base_code)
        assert_same(got, want, base_code)
        sums = [np.zeros((10, len(codes), 3)) for _ in range(2)]
        sparse.norms(inputs, given, row, sums[0])
        gpu_sparse.norms(on_gpu(inputs), given, row, sums[1])
        assert np.allclose(sums[0], sums[1], rtol=1e-13)
        assert not sums[0][:7].any()
    everything = masks([[rm.KEEP]] * len(codes)), *terms[1:]
    assert not sparse.merge(inputs, *everything, want, base_code)
    assert not gpu_sparse.merge(on_gpu(inputs), *everything, as_torch(got), base_code)
    assert_same(got, want, base_code)
