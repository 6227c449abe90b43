"""The fused linear kernels without a GPU: results in Triton's interpreter, and what compiles."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimer_engine import kernels, ops
from optimer_engine.errors import MissingExtraError, RecipeError
from optimer_engine.kernels import cpu, reference, reference_packed
from optimer_engine.types import MERGEABLE

pytest.importorskip("triton", reason="triton is not installed; it exists for Linux only")

from tests.unit.triton_interpreter import (
    POISON,
    as_torch,
    assert_same,
    interpreted,
    place,
    values,
)

gpu = interpreted("gpu")
elements = interpreted("triton_elements")
CODES = range(6)


@pytest.fixture(autouse=True)
def _quiet_numpy():
    """The interpreter computes in numpy, which warns of what these tests do on purpose."""
    with np.errstate(all="ignore"):
        yield


def check(elems, base_code, codes, out_code, add_base, seed, wild=False, offsets=(0,)):
    rng = np.random.default_rng(seed)
    offset = lambda: int(rng.choice(offsets))  # noqa: E731
    _, base = place(values(rng, elems, base_code, wild), offset())
    sources = [place(values(rng, elems, code, wild), offset())[1] for code in codes]
    is_delta = [bool(b) for b in rng.integers(0, 2, len(codes))]
    weights = list(rng.uniform(-1, 1.5, len(codes)))
    room, out = place(np.zeros(elems, reference.STORAGE[out_code]), offset())
    want = reference.linear(base, base_code, sources, codes, is_delta, weights, out_code, add_base)
    nonfinite = gpu.linear(
        as_torch(base), base_code, [as_torch(s) for s in sources], codes, is_delta, weights,
        as_torch(out), out_code, add_base,
    )  # fmt: skip
    assert_same(out, want, out_code)
    assert bool(nonfinite) == ops.nonfinite(want, MERGEABLE[out_code]).any()
    out.view(np.uint8)[:] = POISON
    assert np.all(room.view(np.uint8) == POISON), "written outside of the output"


@settings(max_examples=40, deadline=None)
@given(
    elems=st.sampled_from([0, 1, 2, 7, 255, 256, 257, 1025, 2047, 2048, 2049, 4100]),
    base_code=st.sampled_from(CODES),
    codes=st.lists(st.sampled_from(CODES), max_size=9),
    out_code=st.sampled_from(CODES),
    add_base=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    wild=st.booleans(),
    offsets=st.sampled_from([(0,), (1,), (0, 1, 3)]),
)
def test_linear_equals_the_reference_to_the_bit(**case):
    check(**case)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("count", [0, 1, 2, 5, 9, 32, 33])
def test_any_number_of_sources(code, count):
    check(2049, code, [code] * count, code, True, seed=count)


def test_rounding_to_bf16_matches_torch_on_half_way_cases():
    high = np.arange(0, 2**16, 37, dtype=np.uint32)[:, None] << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    singles = (high | low).reshape(-1).view(np.float32)
    singles = singles[np.isfinite(singles) & (singles != 0)]
    want = torch.from_numpy(singles).to(torch.bfloat16).view(torch.int16)
    out = torch.empty(singles.size, dtype=torch.int16)
    base = torch.zeros_like(out)
    gpu.linear(base, 0, [torch.from_numpy(singles)], [2], [True], [1.0], out, 0)
    assert torch.equal(out, want)


def test_fp64_is_rounded_to_a_half_once_not_twice():
    for out_code, digits in ((reference.BF16, 8), (reference.F16, 11)):
        above = 1 + 2.0**-digits + 2.0**-40
        just_above_a_tie = torch.tensor([above, -above], dtype=torch.float64)
        out = torch.empty(2, dtype=torch.int16)
        gpu.linear(
            torch.zeros(2, dtype=torch.float64), 3, [just_above_a_tie], [3], [True], [1.0],
            out, out_code,
        )  # fmt: skip
        rounded = reference.upcast(out.numpy().view(np.uint16), out_code, np.float64)
        assert list(rounded) == [1 + 2.0 ** (1 - digits), -(1 + 2.0 ** (1 - digits))]


@pytest.mark.parametrize("weight", [0.1, 1e300, 5e-324, 2.0, 0.0, -0.0])
def test_fp64_weights_arrive_to_the_bit(weight):
    out = torch.empty(3, dtype=torch.float64)
    source = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    gpu.linear(torch.zeros(3, dtype=torch.float64), 3, [source], [3], [True], [weight], out, 3)
    assert torch.equal(out, source * weight)


def test_unchanged_elements_keep_their_bits_with_negative_zero_and_denormals():
    base = np.array([0x8000, 0x0000, 0x0001, 0x8001, 0x3F80, 0x7F7F], np.uint16)
    out, same = np.zeros_like(base), as_torch(base)
    assert not gpu.linear(same, 0, [same] * 2, [0] * 2, [False] * 2, [0.7, -2], as_torch(out), 0)
    assert np.array_equal(out, base)


def test_merging_in_place_is_allowed():
    rng = np.random.default_rng(0)
    base, source = (values(rng, 5001, 0, False) for _ in range(2))
    want = reference.linear(base, 0, [source], [0], [False], [0.4], 0)
    gpu.linear(as_torch(base), 0, [as_torch(source)], [0], [False], [0.4], as_torch(base), 0)
    assert np.array_equal(base, want)


def batch_of(seed, sizes, count, wild=False):
    """Bases, sources and outputs of mixed dtypes and alignments; output 0 is its base."""
    rng = np.random.default_rng(seed)
    bases, sources, outs = [], [], []
    for size in sizes:
        base_code, code, out_code = (int(c) for c in rng.integers(0, 6, 3))
        start = lambda: int(rng.choice([0, 0, 1]))  # noqa: E731

        def typed(code, size=size, start=start):
            stored = place(values(rng, size, code, wild), start())[1]
            return as_torch(stored).view(gpu.TORCH_DTYPES[code])

        bases.append(typed(base_code))
        sources.append([typed(code) for _ in range(count)])
        outs.append(typed(out_code) if outs else bases[0])
    return bases, sources, outs


def stored(tensor):
    code = gpu.TORCH_DTYPES.index(tensor.dtype)
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return tensor.view(width).numpy().view(reference.STORAGE[code]), code


@settings(max_examples=8, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 5, 256, 2048, 2049, 7000]), min_size=1, max_size=7),
    count=st.sampled_from([0, 1, 2, 5]),
    seed=st.integers(0, 2**32 - 1),
    wild=st.booleans(),
)
def test_a_batch_equals_the_reference_to_the_bit(sizes, count, seed, wild):
    bases, sources, outs = batch_of(seed, sizes, count, wild)
    is_delta = [i % 2 == 0 for i in range(count)]
    weights = list(np.random.default_rng(seed).uniform(-1, 1.5, count))
    wanted, verdict = [], False
    for base, own, out in zip(bases, sources, outs, strict=True):
        stored_own, codes = [stored(s)[0] for s in own], [stored(s)[1] for s in own]
        code = stored(out)[1]
        wanted.append(reference.linear(*stored(base), stored_own, codes, is_delta, weights, code))
        verdict |= bool(ops.nonfinite(wanted[-1], MERGEABLE[code]).any())
    assert gpu.Batch(bases, sources, is_delta, outs).merge(weights).item() == verdict
    for out, want in zip(outs, wanted, strict=True):
        assert_same(stored(out)[0], want, stored(out)[1])


def test_a_batch_is_merged_again_with_other_weights():
    bases, outs = ([torch.zeros(size) for size in (3, 300)] for _ in range(2))
    sources = [[torch.ones(size)] for size in (3, 300)]
    batch = gpu.Batch(bases, sources, [False], outs)
    for weight in (0.5, 2.0):
        assert not batch.merge([weight])
        assert all(torch.equal(out, torch.full_like(out, weight)) for out in outs)


def test_offsets_beyond_32_bits():
    # A tensor of 2^33 elements of which only the last ones exist: the table says it began earlier.
    bases, sources, outs = [torch.zeros(100)], [[torch.ones(100)]], [torch.empty(100)]
    batch = gpu.Batch(bases, sources, [False], outs)
    (table, *_, constants), before = batch.groups[0], 2**33
    table[0, 0] += before
    table[0, 1] -= before // constants["BLOCK"]
    table[0, 2:] -= before * 4
    batch.merge([0.25])
    assert torch.equal(outs[0], torch.full((100,), 0.25))


def test_what_does_not_fit_is_refused():
    one = torch.zeros(1)
    with pytest.raises(ValueError, match="65 sources in one launch; at most 64"):
        gpu.linear(one, 2, [one] * 65, [2] * 65, [True] * 65, [0.0] * 65, one, 2)
    with pytest.raises(ValueError, match="1 weights for 2 sources"):
        gpu.Batch([one], [[one, one]], [True, True], [one]).merge([1.0])


@pytest.mark.parametrize("code", [reference.F8_E4M3, reference.F8_E5M2])
def test_every_8_bit_value_is_read_and_every_rounding_to_8_bits_is_right(code):
    every = np.arange(256, dtype=np.uint8)
    for out_code in CODES:
        out = np.zeros(256, reference.STORAGE[out_code])
        gpu.linear(as_torch(every), code, [], [], [], [], as_torch(out), out_code)
        assert_same(out, reference.linear(every, code, [], [], [], [], out_code), out_code)
    finite = np.unique(np.abs(reference.upcast(every, code, np.float64)))
    finite = finite[np.isfinite(finite)]
    ties = (finite[1:] + finite[:-1]) / 2
    near = np.concatenate(
        [finite, ties, ties * (1 + 2e-7), ties * (1 - 2e-7), finite[-1:] * 1.0625]
    )
    near = np.concatenate([near, -near, [np.inf, -np.inf, np.nan, 1e-40, 3e38]])
    for wide, dtype in ((2, np.float32), (3, np.float64)):
        given_ = near.astype(dtype)
        out = np.zeros(near.size, np.uint8)
        gpu.linear(as_torch(given_), wide, [], [], [], [], as_torch(out), code)
        assert_same(out, reference.round_to(given_, code), code)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("elems", [1, 64, 1000, 4096, 4500])
def test_packed_vectors_are_decoded_in_registers(bits, elems):
    rng = np.random.default_rng(elems)
    tau = (rng.standard_normal(elems) * 0.01).astype(np.float32)
    numbers, scales = reference_packed.quantise(tau, bits)
    decoded = reference_packed.dequantise(numbers, scales, bits)[:elems]
    base, other = values(rng, elems, 0), values(rng, elems, 0)
    code = elements.INT8 if bits == 8 else elements.INT4
    for out_code in (0, 2):
        out = np.zeros(elems, reference.STORAGE[out_code])
        gpu.linear(
            as_torch(base), 0, [(as_torch(numbers), as_torch(scales)), as_torch(other)], [code, 0],
            [True, False], [0.7, 0.2], as_torch(out), out_code,
        )  # fmt: skip
        want = reference.linear(
            base, 0, [decoded, other], [2, 0], [True, False], [0.7, 0.2], out_code
        )
        assert_same(out, want, out_code)


def test_a_packed_source_is_a_delta():
    one = torch.zeros(64, dtype=torch.int16)
    packed = torch.zeros(64, dtype=torch.int8), torch.zeros(1, dtype=torch.int16)
    with pytest.raises(ValueError, match="packed sources are deltas"):
        gpu.linear(one, 0, [packed], [elements.INT8], [False], [1.0], one, 0)


@pytest.fixture
def pretend_gpu(monkeypatch):
    """As if there were a GPU, whose memory is main memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "optimer_engine.kernels.gpu", gpu)
    monkeypatch.setattr(kernels, "gpu", gpu, raising=False)
    monkeypatch.setattr(ops, "_on_gpu", lambda array: isinstance(array, torch.Tensor))


@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_merge_tensors_runs_where_the_tensors_are(pretend_gpu, monkeypatch, impl):
    monkeypatch.setattr(cpu, "linear", None)
    base = torch.randn(3, 5, 7).to(torch.bfloat16)
    source = base + 1
    merged = ops.merge_tensors(base, [source], [1.0], impl=impl, out_dtype="float32")
    assert (merged.dtype, merged.shape) == (torch.float32, base.shape)
    assert torch.equal(merged, source.float())


def test_tensors_elsewhere_are_refused_not_moved(pretend_gpu):
    array = np.ones(3, np.float32)
    with pytest.raises(RecipeError, match="all on one GPU expected"):
        ops.linear_kernel("triton")(
            array, MERGEABLE[2], [array], [MERGEABLE[2]], [True], [1.0], array,
            MERGEABLE[2], True,
        )  # fmt: skip
    with pytest.raises(RecipeError, match="main memory expected"):
        ops.merge_tensors(torch.ones(3), [torch.ones(3)], [1.0], impl="cpu")


def test_triton_asked_for_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="no CUDA or ROCm device"):
        ops.merge_tensors(torch.ones(3), [torch.ones(3)], [1.0], impl="triton")


def test_triton_asked_for_without_triton_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optimer_engine.kernels.gpu", None)
    monkeypatch.delattr(kernels, "gpu", raising=False)
    with pytest.raises(MissingExtraError, match="triton cannot be imported") as caught:
        ops.linear_kernel("triton")
    assert "optimer-engine[gpu]" in str(caught.value)
