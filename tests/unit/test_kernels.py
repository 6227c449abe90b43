"""The CPU kernel against the reference bit for bit, and the reference against fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimer_engine import ops
from optimer_engine.kernels import cpu, reference
from optimer_engine.types import MERGEABLE, DType

CODES = range(4)


def stored(values: np.ndarray, code: int) -> np.ndarray:
    return reference.round_to(values.astype(np.float64), code)


def run_cpu(base, base_code, sources, codes, is_delta, weights, out_code, add_base=True):
    out = np.full(base.shape, 0x7E, np.uint8).repeat(reference.STORAGE[out_code].itemsize)
    out = out.view(reference.STORAGE[out_code])
    nonfinite = cpu.linear(
        base, base_code, sources, codes, is_delta, weights, out, out_code, add_base
    )
    return out, nonfinite


@settings(max_examples=150, deadline=None)
@given(
    elems=st.sampled_from([0, 1, 2, 7, 31, 2047, 2048, 2049, 5000]),
    base_code=st.sampled_from(CODES),
    codes=st.lists(st.sampled_from(CODES), min_size=0, max_size=9),
    out_code=st.sampled_from(CODES),
    add_base=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_cpu_equals_reference_to_the_bit(elems, base_code, codes, out_code, add_base, seed):
    rng = np.random.default_rng(seed)
    base = stored(rng.standard_normal(elems), base_code)
    sources = [stored(rng.standard_normal(elems), code) for code in codes]
    is_delta = [bool(b) for b in rng.integers(0, 2, len(codes))]
    weights = list(rng.uniform(-1, 1.5, len(codes)))
    got, nonfinite = run_cpu(base, base_code, sources, codes, is_delta, weights, out_code, add_base)
    want = reference.linear(base, base_code, sources, codes, is_delta, weights, out_code, add_base)
    assert got.tobytes() == want.tobytes()
    assert not nonfinite


@pytest.mark.parametrize("code", CODES)
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


def test_unchanged_elements_keep_their_bits_with_negative_zero_and_denormals():
    base = np.array([0x8000, 0x0000, 0x0001, 0x8001, 0x3F80, 0x7F7F], np.uint16)
    got, nonfinite = run_cpu(base, 0, [base, base], [0, 0], [False, False], [0.7, -2.0], 0)
    assert np.array_equal(got, base)
    assert not nonfinite


@pytest.mark.parametrize("dtype", MERGEABLE)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_results_are_reported(dtype, bad):
    code = MERGEABLE.index(dtype)
    values = np.ones(5000)
    values[4321] = bad
    source = stored(np.ones(5000), code)
    with np.errstate(invalid="ignore"):
        base = stored(values, code)
    _, nonfinite = run_cpu(base, code, [source], [code], [False], [0.5], code)
    assert nonfinite
    assert list(np.flatnonzero(ops.nonfinite(base, dtype))) == [4321]


def test_overflow_of_the_output_dtype_is_reported():
    base = np.full(100, 6e4)
    got, nonfinite = run_cpu(base, 3, [base], [3], [True], [1.0], reference.F16)
    assert nonfinite
    assert np.isinf(got.view(np.float16)).all()


def test_merging_in_place_is_allowed():
    rng = np.random.default_rng(0)
    base, source = (stored(rng.standard_normal(5001), 0) for _ in range(2))
    want, _ = run_cpu(base.copy(), 0, [source], [0], [False], [0.4], 0)
    cpu.linear(base, 0, [source], [0], [False], [0.4], base, 0)
    assert np.array_equal(base, want)


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
    assert MERGEABLE == (DType.BF16, DType.F16, DType.F32, DType.F64)
    assert [d.storage for d in MERGEABLE] == list(reference.STORAGE)
