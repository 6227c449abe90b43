"""The packed forms: kernels against their specification, every bit pattern, every range."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimer_engine.kernels import packed
from optimer_engine.kernels import reference_packed as spec
from optimer_engine.kernels.reference import BF16, F32, STORAGE, round_to, upcast

SAME = spec.SAME
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def pack(trained, base, base_code=SAME, code=0):
    """(packed bytes with slack, chunk sizes) by the kernel; unsigned arrays."""
    blocks = -(-trained.size // spec.BLOCK)
    out = np.full(blocks * (8 + spec.BLOCK * trained.itemsize) + packed.SLACK_BYTES, 0xA5, np.uint8)
    sizes = np.zeros(-(-trained.size // spec.CHUNK), np.int64)
    scratch = np.full(packed.SCRATCH_BYTES, 0x5A, np.uint8)
    used = packed.pack_exact(trained.itemsize, base_code, code)(
        trained.ctypes.data, base.ctypes.data, trained.size, out.ctypes.data, sizes.ctypes.data,
        scratch.ctypes.data,
    )  # fmt: skip
    assert sizes.sum() == used
    return out[: used + packed.SLACK_BYTES], sizes


def unpack(data, sizes, base, start, stop, elems, dtype, base_code=SAME, code=0):
    """(what the kernel returns, elements start..stop)."""
    first = start // spec.CHUNK
    out = np.full(stop - start, 0x77, dtype)
    begin = data[int(sizes[:first].sum()) :]
    ends, part = sizes[first:].copy(), base[start:stop].copy()
    scratch = np.full(packed.SCRATCH_BYTES, 0x5A, np.uint8)
    failed = packed.unpack_exact(out.itemsize, base_code, code)(
        begin.ctypes.data, ends.ctypes.data, start - first * spec.CHUNK,
        elems - first * spec.CHUNK, stop - start, part.ctypes.data, out.ctypes.data,
        scratch.ctypes.data,
    )  # fmt: skip
    return failed, out


def roundtrip(trained, base, base_code=SAME, code=0):
    data, sizes = pack(trained, base, base_code, code)
    size, dtype = trained.size, trained.dtype
    failed, out = unpack(data, sizes, base, 0, size, size, dtype, base_code, code)
    assert not failed
    assert np.array_equal(out, trained)


SPECIAL_16 = [0, 0x8000, 1, 0x8001, 0x7F80, 0xFF80, 0x7F81, 0xFFFF, 0x7C00, 0xFC01, 0x3F80, 0x7FFF]


def test_all_16_bit_patterns_come_back_from_every_kind_of_base():
    trained = np.arange(65536, dtype=np.uint16)
    rng = np.random.default_rng(0)
    for value in (*SPECIAL_16, *rng.integers(0, 65536, 20)):
        roundtrip(trained, np.full(65536, value, np.uint16))
    roundtrip(trained, rng.permutation(trained))
    roundtrip(trained, trained)


@settings(max_examples=60, deadline=None)
@given(
    itemsize=st.sampled_from([1, 2, 4, 8]),
    elems=st.sampled_from([1, 2, 1023, 1024, 1025, 5000]),
    bits=st.lists(st.integers(0, 64), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_kernel_writes_the_specification_s_bytes_and_reads_them(itemsize, elems, bits, seed):
    """Distances of any size in any proportion: each element draws its number of bits."""
    rng = np.random.default_rng(seed)
    dtype = UNSIGNED[itemsize]
    widths = np.minimum(rng.choice(bits, elems, p=skewed(len(bits))), 8 * itemsize)
    wide = rng.integers(0, 2**64 - 1, elems, np.uint64, endpoint=True)
    shifts = np.minimum(np.uint64(64) - widths.astype(np.uint64), np.uint64(63))
    z = np.where(widths > 0, wide >> shifts, 0).astype(dtype)
    base = rng.integers(0, 256, elems * itemsize, np.uint8).view(dtype)
    trained = spec.moved(base, z)
    assert np.array_equal(spec.distance(base, trained), z)
    data, _ = pack(trained, base)
    pieces = [z[start : start + spec.BLOCK] for start in range(0, elems, spec.BLOCK)]
    blocks = [spec.pack_block(piece) for piece in pieces]
    assert data[: -packed.SLACK_BYTES].tobytes() == b"".join(blocks)
    for block, piece in zip(blocks, pieces, strict=True):
        values, size = spec.unpack_block(block, np.dtype(dtype))
        assert size == len(block)
        assert np.array_equal(values[: piece.size], piece)
    roundtrip(trained, base)


def skewed(count):
    """Probabilities that make the first the most frequent, as in real distances."""
    weights = 8.0 ** -np.arange(count)
    return weights / weights.sum()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(BF16, F32), (F32, BF16)]),
    st.sampled_from([1, 1000, 4100]),
    st.integers(0, 2**32 - 1),
)
def test_any_bits_come_back_from_a_base_of_another_dtype(codes, elems, seed):
    base_code, code = codes
    rng = np.random.default_rng(seed)
    base_dtype = STORAGE[base_code]
    base = rng.integers(0, 256, elems * base_dtype.itemsize, np.uint8)
    trained = rng.integers(0, 256, elems * STORAGE[code].itemsize, np.uint8)
    trained = trained.view(UNSIGNED[STORAGE[code].itemsize])
    trained[::3] = spec.reference_bits(base.view(base_dtype), base_code, code)[::3]
    base = base.view(UNSIGNED[base_dtype.itemsize])
    roundtrip(trained, base, base_code, code)


def test_a_base_of_another_dtype_is_converted_as_the_specification_says():
    """Distances from it are 0 where the trained values are its conversion: no bits are needed."""
    every = np.arange(65536, dtype=np.uint16)
    trained = spec.reference_bits(every, BF16, F32)
    assert not np.isnan(trained.view(np.float32)).any()
    assert pack(trained, every, BF16, F32)[0].size == 64 * 8 + packed.SLACK_BYTES
    values = np.random.default_rng(0).standard_normal(4096).astype(np.float32) * 1e-3
    halved = spec.reference_bits(values, F32, BF16)
    assert np.array_equal(halved, round_to(values, BF16))
    assert pack(halved, values.view(np.uint32), F32, BF16)[0].size == 4 * 8 + packed.SLACK_BYTES


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 100_000), st.integers(0, 100_000))
def test_any_range_equals_the_whole(a, b):
    start, stop = min(a, b), max(a, b) + 1
    data, sizes, base, trained = _sample()
    failed, out = unpack(data, sizes, base, start, stop, trained.size, np.uint16)
    assert not failed
    assert np.array_equal(out, trained[start:stop])


def _sample(kept=[]):  # noqa: B006
    if not kept:
        rng = np.random.default_rng(1)
        theta = rng.standard_normal(100_001) * 0.02
        base = round_to(theta, BF16)
        trained = round_to(upcast(base, BF16, np.float64) + theta[::-1] * 0.03, BF16)
        kept.append((*pack(trained, base), base, trained))
    return kept[0]


def test_training_that_moved_little_takes_little_room():
    data, _, _, trained = _sample()
    assert data.size < 0.5 * trained.nbytes
    assert pack(trained, trained)[0].size == 98 * 8 + packed.SLACK_BYTES


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_blocks_are_reported_or_harmless(data):
    """Any byte may be anything: the kernel says so or decodes garbage, inside of its buffers."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    base = rng.integers(0, 65536, 3000, np.uint16)
    trained = spec.moved(base, rng.geometric(0.05, 3000).astype(np.uint16))
    good, sizes = pack(trained, base)
    bad = good.copy()
    for _ in range(data.draw(st.integers(1, 4))):
        header = data.draw(st.booleans())
        at = data.draw(st.integers(0, 7 if header else bad.size - packed.SLACK_BYTES - 1))
        bad[at] = data.draw(st.integers(0, 255))
    fence = np.full(64, 0xEE, np.uint8)
    out = np.concatenate([fence, np.zeros(6000, np.uint8), fence])
    scratch = np.zeros(packed.SCRATCH_BYTES, np.uint8)
    failed = packed.unpack_exact(2, SAME, 0)(
        bad.ctypes.data, sizes.ctypes.data, 0, 3000, 3000, base.ctypes.data, out.ctypes.data + 64,
        scratch.ctypes.data,
    )  # fmt: skip
    assert 0 <= failed <= 3
    assert (out[:64] == 0xEE).all() and (out[-64:] == 0xEE).all()
    if failed == 0 and np.array_equal(bad, good):
        assert np.array_equal(out[64:-64].view(np.uint16), trained)


@pytest.mark.parametrize("layer", ["first", "second"])
@pytest.mark.parametrize("change", ["one more", "one less", "elsewhere"])
def test_a_bitmap_must_mark_what_its_header_says(layer, change):
    """Layer 1 of 2 bits; 90 elements with 3 bits more, of which 10 have 7 more still."""
    z = np.ones(1024, np.uint16)
    z[:90], z[20:30] = 0b10101, 0b10_1010_10101
    base = np.zeros(1024, np.uint16)
    data, sizes = pack(spec.moved(base, z), base)
    w1, w2, w3 = data[:3]
    n1, n2 = data[4:8].view(np.uint16)
    assert (n1, n2) == (90, 10) and w3
    at = 8 + 128 * int(w1) + (0 if layer == "first" else 128 + -(-int(n1) * int(w2) // 64) * 8)
    bitmap = data[at : at + 16]
    if change != "one less":
        # Behind the last one that is marked; in the second layer, behind the last there is.
        bitmap[-1] |= 0x80
    if change != "one more":
        bitmap[2 if layer == "first" else 3] &= 0xEF
    failed, out = unpack(data, sizes, base, 0, 1024, 1024, np.uint16)
    if layer == "first" and change == "elsewhere":
        assert failed == 0  # as good a block as any, with other values
        assert not np.array_equal(out, spec.moved(base, z))
    else:
        assert failed == 1


@pytest.mark.parametrize("bits", [8, 4])
@settings(max_examples=40, deadline=None)
@given(
    elems=st.sampled_from([1, 63, 64, 65, 1000]),
    power=st.integers(-149, 120),
    seed=st.integers(0, 2**32 - 1),
)
def test_quantised_values_keep_their_bound_and_the_kernel_its_specification(
    bits, elems, power, seed
):
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(elems) * 2.0**power).astype(np.float32)
    values[rng.random(elems) < 0.2] = 0
    groups = -(-elems // spec.GROUP)
    q = np.full(groups * spec.GROUP * bits // 8, 0xA5, np.uint8)
    scales = np.full(groups, 0xA5A5, np.uint16)
    packed.quantise(bits)(values.ctypes.data, elems, q.ctypes.data, scales.ctypes.data)
    want_q, want_scales = spec.quantise(values, bits)
    assert np.array_equal(scales, want_scales)
    assert np.array_equal(q, want_q)
    whole = spec.dequantise(q, scales, bits)
    scale = upcast(scales, BF16, np.float64).repeat(spec.GROUP)[:elems]
    assert np.all(np.abs(whole[:elems] - values.astype(np.float64)) <= scale * 0.50001)
    largest = np.abs(np.resize(np.r_[values, np.zeros(groups * 64 - elems)], (groups, 64))).max(1)
    steps = largest / spec.LEVELS[bits]
    assert np.all(upcast(scales, BF16, np.float64) <= steps * (1 + 2**-7) + 2.0**-133)
    start, stop = sorted(rng.integers(0, elems + 1, 2))
    first = start // spec.GROUP
    out = np.zeros(stop - start, np.float32)
    packed.dequantise(bits)(
        q[first * spec.GROUP * bits // 8 :].ctypes.data, scales[first:].ctypes.data,
        start - first * spec.GROUP, stop - start, out.ctypes.data,
    )  # fmt: skip
    assert np.array_equal(out, whole[start:stop])
