"""The CPU kernel against the reference bit for bit, and the reference against fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimer_engine import ops
from optimer_engine.kernels import cpu, reference
from optimer_engine.types import MERGEABLE

BF16, F16, F32, F64 = reference.BF16, reference.F16, reference.F32, reference.F64
E4M3, E5M2 = reference.F8_E4M3, reference.F8_E5M2
CODES = range(6)
WIDE_CODES = range(4)
TORCH_F8 = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}

# (base, dtypes that sources may have, output): each form of the kernel, and every dtype in each
# place. Every one is compiled, so they are few.
ALIKE = [(BF16, BF16, BF16), *sorted(cpu.SPECIAL)]
MIXED = [
    (BF16, list(CODES), BF16),
    (F16, [BF16, F32], F16),
    (F32, [E4M3, E5M2], F32),
    (F64, [F16, F64], E4M3),
    (E4M3, [BF16, E4M3], E5M2),
    (E5M2, [F32, E5M2], F64),
]


def stored(values: np.ndarray, code: int) -> np.ndarray:
    return reference.round_to(values.astype(np.float64), code)


def run_cpu(base, base_code, sources, codes, is_delta, weights, out_code, add_base=True):
    out = np.full(base.shape, 0x7E, np.uint8).repeat(reference.STORAGE[out_code].itemsize)
    out = out.view(reference.STORAGE[out_code])
    nonfinite = cpu.linear(
        base, base_code, sources, codes, is_delta, weights, out, out_code, add_base
    )
    return out, nonfinite


def assert_equal_to_reference(elems, base_code, codes, is_delta, out_code, add_base, seed):
    rng = np.random.default_rng(seed)
    base = stored(rng.standard_normal(elems), base_code)
    sources = [stored(rng.standard_normal(elems), code) for code in codes]
    # Some elements that no source changes.
    for source, code in zip(sources, codes, strict=True):
        if code == base_code:
            source[::7] = base[::7]
    weights = list(rng.uniform(-1, 1.5, len(codes)))
    got, nonfinite = run_cpu(base, base_code, sources, codes, is_delta, weights, out_code, add_base)
    want = reference.linear(base, base_code, sources, codes, is_delta, weights, out_code, add_base)
    assert got.tobytes() == want.tobytes()
    assert not nonfinite


ELEMS = st.sampled_from([0, 1, 2, 7, 31, 2047, 2048, 2049, 5000])
SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=150, deadline=None)
@given(
    elems=ELEMS,
    mixture=st.sampled_from(ALIKE),
    count=st.sampled_from([1, 2, 3, 4, 16, 17]),
    deltas=st.sampled_from(["none", "all", "some"]),
    seed=SEEDS,
)
def test_sources_of_one_dtype_equal_reference_to_the_bit(elems, mixture, count, deltas, seed):
    base_code, source_code, out_code = mixture
    if mixture != (BF16, BF16, BF16):
        count = 3 if count < 17 else 17  # each is compiled
    is_delta = [deltas == "all" or (deltas == "some" and i % 2 == 1) for i in range(count)]
    add_base = mixture != (BF16, BF16, F32)
    codes = [source_code] * count
    assert_equal_to_reference(elems, base_code, codes, is_delta, out_code, add_base, seed)


@settings(max_examples=150, deadline=None)
@given(
    elems=ELEMS,
    mixture=st.sampled_from(MIXED),
    picks=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    seed=SEEDS,
)
def test_any_mixture_equals_reference_to_the_bit(elems, mixture, picks, seed):
    base_code, possible, out_code = mixture
    codes = [*possible, *(possible[pick % len(possible)] for pick in picks)]
    is_delta = [bool(pick % 2) for pick in np.random.default_rng(seed).integers(0, 2, len(codes))]
    add_base = out_code != F32
    assert_equal_to_reference(elems, base_code, codes, is_delta, out_code, add_base, seed)


@pytest.mark.parametrize("add_base", [True, False])
def test_no_sources_give_the_base_or_nothing(add_base):
    assert_equal_to_reference(2049, BF16, [], [], BF16, add_base, 0)


@pytest.mark.parametrize("code", WIDE_CODES)
@pytest.mark.parametrize("count", [1, 2, 5, 9, 32])
def test_reference_is_within_one_rounding_of_fp64(code, count):
    rng = np.random.default_rng(count)
    base = stored(rng.standard_normal(4099), code)
    sources = [stored(rng.standard_normal(4099), code) for _ in range(count)]
    weights = list(rng.uniform(-0.5, 1, count))
    exact = reference.upcast(base, code, np.float64).astype(np.longdouble)
    total = np.zeros_like(exact)
    for source, weight in zip(sources, weights, strict=True):
        value = reference.upcast(source, code, np.float64).astype(np.longdouble)
        total += np.longdouble(weight) * (value - exact)
    oracle = exact + total
    got = reference.linear(base, code, sources, [code] * count, [False] * count, weights, code)
    values = reference.upcast(got, code, np.float64)
    digits = {reference.BF16: 8, reference.F16: 11, reference.F32: 24, reference.F64: 53}[code]
    half_step = np.exp2(np.floor(np.log2(np.abs(values))) - digits)
    # The sum itself errs by a few units of the accumulator (fp32 for the halves, else fp64).
    accumulator = 2.0**-24 if code in (reference.BF16, reference.F16) else 2.0**-53
    slack = (count + 2) * accumulator * (np.abs(exact) + sum(abs(w) for w in weights) * 8)
    assert np.all(np.abs(values - oracle) <= half_step + slack)
    if code in (reference.BF16, reference.F16):
        right = reference.round_to(oracle.astype(np.float64), code)
        assert np.mean(right != got) < (1e-3 if code == reference.BF16 else 4e-3)


def test_rounding_matches_torch_on_every_half_way_case():
    bits = np.arange(0, 2**32, 4093, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    want = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(reference.round_to(values, reference.BF16), want)
    zeros = np.zeros(values.shape, np.uint16)
    got, _ = run_cpu(zeros, 0, [values], [reference.F32], [True], [1.0], reference.BF16)
    assert np.array_equal(got[values != 0], want[values != 0])


def test_fp64_is_rounded_to_bf16_once_not_twice():
    # Just above a tie in bf16; rounding to fp32 first would land on the tie and go down to even.
    value = np.array([1.0 + 2.0**-8 + 2.0**-40, -(1.0 + 2.0**-8 + 2.0**-40)])
    got, _ = run_cpu(np.zeros(2), 3, [value], [3], [True], [1.0], reference.BF16)
    assert list(reference.upcast(got, 0, np.float64)) == [1.0 + 2.0**-7, -(1.0 + 2.0**-7)]


@pytest.mark.parametrize("code", [E4M3, E5M2])
def test_all_256_values_of_an_f8_are_those_of_torch(code):
    every = np.arange(256, dtype=np.uint8)
    want = torch.from_numpy(every).view(TORCH_F8[code]).float().numpy()
    for dtype in (np.float32, np.float64):
        got = reference.upcast(every, code, dtype)
        assert np.array_equal(got, want, equal_nan=True)
        assert np.array_equal(np.signbit(got), np.signbit(want))
    values, nonfinite = run_cpu(np.zeros(256), F64, [every], [code], [True], [1.0], F64)
    assert np.array_equal(values, want, equal_nan=True)
    assert nonfinite


@pytest.mark.parametrize("code", [E4M3, E5M2])
def test_rounding_to_an_f8_is_that_of_torch(code):
    every = np.arange(256, dtype=np.uint8)
    values = np.unique(reference.upcast(every, code, np.float64))
    values = values[np.isfinite(values)]
    beyond = values[-1] * np.array([1 + 2.0**-4, 1.0625, 1.125, 1.2, 2, 1e6])
    ties = np.concatenate([(values[1:] + values[:-1]) / 2, values, beyond, -beyond])
    ties = ties.astype(np.float32)
    halves = np.arange(2**16, dtype=np.uint32) << 16
    tested = np.concatenate(
        [
            ties,
            np.nextafter(ties, np.float32(np.inf)),
            np.nextafter(ties, np.float32(-np.inf)),
            halves.view(np.float32),
            (halves | 0x8000).view(np.float32),
            np.array([np.inf, -np.inf, np.nan, 1e-45, -1e-45], np.float32),
        ]
    )
    want = torch.from_numpy(tested).to(TORCH_F8[code]).view(torch.uint8).numpy()
    number = ~np.isnan(tested)
    if code == E4M3:
        # Past 448 and what rounds to it, torch has returned NaN in some versions and 448 in others.
        number &= np.abs(tested) <= 464
    for wide in (np.float32, np.float64):
        with np.errstate(invalid="ignore"):  # some NaNs are signalling
            got = reference.round_to(tested.astype(wide), code)
        assert np.array_equal(got[number], want[number])
        assert np.isnan(reference.upcast(got[~number], code, np.float32)).all()
    # From an fp32 sum and from an fp64 one. A sum of zero has the base's sign, here plus.
    changed = number & (tested != 0)
    for source_code in (F32, F64):
        with np.errstate(invalid="ignore"):
            source = tested.astype(reference.STORAGE[source_code])
        base = np.zeros(source.shape, np.uint8)
        got, nonfinite = run_cpu(base, E5M2, [source], [source_code], [True], [1.0], code)
        assert np.array_equal(got[changed], want[changed])
        assert np.isnan(reference.upcast(got[~number], code, np.float32)).all()
        assert nonfinite


def test_fp64_is_rounded_to_f8_once_not_twice():
    # Just above a tie; rounding to fp32 first would land on the tie and go down to even.
    value = np.array([1.0 + 2.0**-4 + 2.0**-40, -(1.0 + 2.0**-4 + 2.0**-40), 2.0**-10 + 2.0**-60])
    want = [1.125, -1.125, 2.0**-9]
    got, nonfinite = run_cpu(np.zeros(3), F64, [value], [F64], [True], [1.0], E4M3)
    assert list(reference.upcast(got, E4M3, np.float64)) == want
    assert list(reference.upcast(reference.round_to(value, E4M3), E4M3, np.float64)) == want
    assert not nonfinite


@pytest.mark.parametrize(("code", "end"), [(E4M3, 448.0), (E5M2, 57344.0)])
def test_the_largest_f8_is_finite_and_what_rounds_past_it_is_reported(code, end):
    zero = np.zeros(4, np.float32)
    largest = np.full(4, end, np.float32)
    got, nonfinite = run_cpu(zero, F32, [largest], [F32], [True], [1.0], code)
    assert (reference.upcast(got, code, np.float64) == end).all()
    assert not nonfinite
    got, nonfinite = run_cpu(zero, F32, [largest], [F32], [True], [1.2], code)
    assert not np.isfinite(reference.upcast(got, code, np.float64)).any()
    assert nonfinite


def test_unchanged_elements_keep_their_bits_with_negative_zero_and_denormals():
    base = np.array([0x8000, 0x0000, 0x0001, 0x8001, 0x3F80, 0x7F7F], np.uint16)
    got, nonfinite = run_cpu(base, 0, [base, base], [0, 0], [False, False], [0.7, -2.0], 0)
    assert np.array_equal(got, base)
    assert not nonfinite


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 4321, 5000])
def test_nonfinite_results_are_reported(code, bad, at):
    values = np.ones(5001)
    values[at] = bad
    source = stored(np.ones(5001), code)
    with np.errstate(invalid="ignore"):
        base = stored(values, code)
    got, nonfinite = run_cpu(base, code, [source], [code], [False], [0.5], code)
    assert nonfinite
    wrong = ~np.isfinite(reference.upcast(got, code, np.float64))
    assert list(np.flatnonzero(wrong)) == [at]
    if code < len(MERGEABLE):
        dtype = MERGEABLE[code]
        assert list(np.flatnonzero(ops.nonfinite(base, dtype))) == [at]


@pytest.mark.parametrize("bits", [0x7F7F, 0xFF7F])
def test_the_largest_bf16_is_finite(bits):
    base = np.full(101, bits, np.uint16)
    _, nonfinite = run_cpu(base, BF16, [base], [BF16], [False], [1.0], BF16)
    assert not nonfinite


def test_every_bf16_nan_stays_one():
    every = np.arange(2**16, dtype=np.uint16)
    nans = every[np.isnan(reference.upcast(every, BF16, np.float32))]
    ones = stored(np.ones(nans.size), BF16)
    for base, source in ((nans, ones), (ones, nans), (nans, nans)):
        for delta in (False, True):
            got, nonfinite = run_cpu(base, BF16, [source], [BF16], [delta], [0.5], BF16)
            assert np.isnan(reference.upcast(got, BF16, np.float32)).all()
            assert nonfinite


def test_overflow_of_the_output_dtype_is_reported():
    base = np.full(100, 6e4)
    got, nonfinite = run_cpu(base, 3, [base], [3], [True], [1.0], reference.F16)
    assert nonfinite
    assert np.isinf(got.view(np.float16)).all()


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("count", [1, 4, 17])
def test_merging_in_place_is_allowed(code, count):
    rng = np.random.default_rng(0)
    base, *sources = (stored(rng.standard_normal(5001), code) for _ in range(count + 1))
    is_delta, weights = [False] * count, [0.4] * count
    want = reference.linear(base, code, sources, [code] * count, is_delta, weights, code)
    cpu.linear(base, code, sources, [code] * count, is_delta, weights, base, code)
    assert base.tobytes() == want.tobytes()


def test_tiles_may_begin_at_any_byte_and_be_read_only():
    rng = np.random.default_rng(0)
    base, source, out = (np.zeros(2 * 1001 + 1, np.uint8)[1:].view(np.uint16) for _ in range(3))
    base[:], source[:] = (stored(rng.standard_normal(1001), BF16) for _ in range(2))
    base.flags.writeable = source.flags.writeable = False
    want = reference.linear(base, BF16, [source], [BF16], [False], [0.7], BF16)
    cpu.linear(base, BF16, [source], [BF16], [False], [0.7], out, BF16)
    assert np.array_equal(out, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("impl", ["auto", "cpu", "reference"])
def test_merge_tensors_takes_torch_and_keeps_shape_and_dtype(dtype, impl):
    base = torch.randn(3, 5, 7).to(dtype)
    source = base + torch.randn(3, 5, 7).to(dtype) * 0.1
    merged = ops.merge_tensors(base, [source], [1.0], impl=impl)
    assert merged.dtype == dtype
    assert merged.shape == base.shape
    torch.testing.assert_close(merged, source)


def test_merge_tensors_takes_numpy_and_another_output_dtype():
    base = np.ones((2, 3), np.float16)
    merged = ops.merge_tensors(base, [np.full((2, 3), 0.5)], [2.0], deltas=True)
    assert merged.dtype == np.float16
    assert np.array_equal(merged, np.full((2, 3), 2.0))
    wide = ops.merge_tensors(base, [base], [1.0], out_dtype="float32")
    assert wide.dtype == np.float32


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="'gpu' is no implementation"):
        ops.linear_kernel("gpu")  # type: ignore[arg-type]


def test_dtype_codes_are_the_order_of_mergeable():
    for code, dtype in enumerate(MERGEABLE):
        assert getattr(reference, dtype.name) == code
        assert reference.STORAGE[code] == dtype.storage
