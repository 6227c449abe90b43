"""The CPU kernel: the reference's arithmetic, fused, without the GIL, at memory speed.

Three loops, of which each merge takes the most special one that fits:

* `_words`, all operands bf16, two elements to a 32-bit word: shifting and masking make fp32 of both
  halves, and no vector lane ever changes its width.
* `_elements`, one dtype each for base, sources and output: one element after the other, the
  dtypes compiled in. Only for mixtures that checkpoints really have.
* `_blocks`, anything: the sum of one block is kept in the first-level cache and the sources are
  added to it one after the other.

In the first two the number of sources is a constant, so that the compiler unrolls the sum and keeps
it in registers: memory sees each input byte once and each output byte once.

Each is compiled by numba when first used and kept by `kernels.native`. Multiply and add are never
contracted, so vector bodies and scalar tails, any tile size and any instruction set give the same
bits. Buffers are passed by address; the caller keeps them alive.
"""

from __future__ import annotations

from ctypes import addressof
from ctypes import c_byte as _Byte
from ctypes import c_double as _Double
from ctypes import c_int64 as _Int

import numpy as np

from .native import compiled
from .reference import BF16, F16, F32, accumulates_in_fp64

UNROLLED = 16
"""Most sources that are summed in registers. The compiler does not unroll a much longer sum, and a
loop over sources inside the loop over elements is not vectorised."""

SPECIAL = {
    (BF16, F32, BF16),
    (BF16, BF16, F32),
    (F16, F16, F16),
    (F16, F32, F16),
    (F32, F32, F32),
}
"""Mixtures (base, every source, output) that `_elements` is compiled for: models of one dtype, the
fp32 vectors of half-precision models, and the making of such vectors."""

BLOCK = 2048
"""Elements per block: two fp32 blocks are 16 KiB, inside any first-level data cache."""


@compiled("boolean(int64, int64, int64)")
def _words(thetas):
    """thetas: for each source, whether it is a model theta_i rather than a vector tau_i."""
    from .elements import f32_of_bits, load, nearest_bf16, store

    count, models = len(thetas), _mask(thetas)
    u, zero = np.uint32, np.float32(0)
    upper, magnitudes, to_infinity, signs = map(u, (0xFFFF0000, 0x7FFF7FFF, 0x00800080, 0x80008000))

    def merge(addresses, weights, words):
        seen = u(0)
        for j in range(words):
            word = load(load(addresses, np.int64, 0), np.uint32, j)
            low, high = f32_of_bits(u(word << u(16))), f32_of_bits(u(word & upper))
            low_sum, high_sum = zero, zero
            for i in range(count):
                weight = np.float32(load(weights, np.float64, i))
                word = load(load(addresses, np.int64, i + 1), np.uint32, j)
                of_model = models >> i & 1
                low_sum += weight * (f32_of_bits(u(word << u(16))) - (low if of_model else zero))
                high_sum += weight * (f32_of_bits(u(word & upper)) - (high if of_model else zero))
            low = low if low_sum == zero else low + low_sum
            high = high if high_sum == zero else high + high_sum
            # A NaN here is one of arithmetic on bf16 inputs or an input itself: its lower half is
            # zero, and rounding lets it be.
            word = u(u(nearest_bf16(low) >> u(16)) | u(nearest_bf16(high) & upper))
            store(load(addresses, np.int64, count + 1), np.uint32, j, word)
            # An exponent of ones, and no smaller one, carries into the sign's place.
            seen = u(seen | u(u(word & magnitudes) + to_infinity))
        return u(seen & signs) != u(0)

    return merge


@compiled("boolean(int64, int64, int64)")
def _elements(base_code, source_code, out_code, thetas, add_base):
    from .elements import load, reader, writer

    count, models = len(thetas), _mask(thetas)
    wide = accumulates_in_fp64(base_code, [source_code], out_code)
    real = np.float64 if wide else np.float32
    zero = real(0)
    read_base, read_source, write = reader(base_code), reader(source_code), writer(out_code, wide)

    def merge(addresses, weights, elems):
        seen = np.uint32(0)
        for j in range(elems):
            base = real(read_base(load(addresses, np.int64, 0), j))
            total = zero
            for i in range(count):
                value = real(read_source(load(addresses, np.int64, i + 1), j))
                origin = base if models >> i & 1 else zero
                total += real(load(weights, np.float64, i)) * (value - origin)
            if add_base:
                total = base if total == zero else base + total
            seen = np.uint32(seen | write(load(addresses, np.int64, count + 1), j, total))
        return seen != np.uint32(0)

    return merge


def _mask(flags: tuple[bool, ...]) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


@compiled("boolean(int64, int64, int64, int64, int64, int64, int64)")
def _blocks(base_code, source_codes, out_code, add_base):
    """source_codes: those that occur; codes and thetas (int64) say which each source has and is."""
    from .elements import array, load, reader, writer

    wide = accumulates_in_fp64(base_code, source_codes, out_code)
    real = np.float64 if wide else np.float32
    zero = real(0)
    read_base, write, add = reader(base_code), writer(out_code, wide), _adder(source_codes, real)

    def merge(addresses, codes, thetas, weights, count, elems, scratch):
        base = array(scratch, real, BLOCK)
        total = array(scratch + base.nbytes, real, BLOCK)
        nothing = array(scratch + 2 * base.nbytes, real, BLOCK)
        nothing[:] = zero
        stored_base, out = load(addresses, np.int64, 0), load(addresses, np.int64, count + 1)
        seen = np.uint32(0)
        for start in range(0, elems, BLOCK):
            n = min(BLOCK, elems - start)
            for j in range(n):
                base[j] = real(read_base(stored_base, start + j))
            total[:n] = zero
            for i in range(count):
                source = load(addresses, np.int64, i + 1)
                weight = real(load(weights, np.float64, i))
                origin = base if load(thetas, np.int64, i) else nothing
                add(load(codes, np.int64, i), source, start, n, weight, origin, total)
            for j in range(n):
                value, origin = total[j], base[j]
                if add_base:
                    value = origin if value == zero else origin + value
                seen = np.uint32(seen | write(out, start + j, value))
        return seen != np.uint32(0)

    return merge


def _adder(codes, real):
    """A jitted (code, source, start, n, weight, origin, total): total += weight * delta."""
    from numba import njit

    from .elements import reader

    code, *others = codes
    read = reader(code)

    @njit
    def add(_, source, start, n, weight, origin, total):
        for j in range(n):
            total[j] += weight * (real(read(source, start + j)) - origin[j])

    if not others:
        return add
    add_other = _adder(others, real)

    @njit
    def add_any(which, source, start, n, weight, origin, total):
        if which == code:
            add(which, source, start, n, weight, origin, total)
        else:
            add_other(which, source, start, n, weight, origin, total)

    return add_any


def linear(
    base: np.ndarray,
    base_code: int,
    sources: list[np.ndarray],
    source_codes: list[int],
    is_delta: list[bool],
    weights: list[float],
    out: np.ndarray,
    out_code: int,
    add_base: bool = True,
) -> bool:
    """out = round(base + sum_i w_i delta_i), as `reference.linear` specifies, into `out`.

    Args:
        base, sources: 1-D, contiguous, equal length, in the storage dtypes of their codes.
        out: 1-D, contiguous, same length; may be `base` itself when the dtypes are equal.

    Returns:
        True when any output element is NaN or infinite.
    """
    elems, count = base.shape[0], len(sources)
    addresses = [_address(array) for array in (base, *sources, out)]
    thetas = tuple([not delta for delta in is_delta])
    seen = False
    if 0 < count <= UNROLLED and len(set(source_codes)) == 1:
        mixture = (base_code, source_codes[0], out_code)
        table, factors = (_Int * (count + 2))(*addresses), (_Double * count)(*weights)
        if mixture == (BF16, BF16, BF16) and add_base:
            seen = _words(thetas)(addressof(table), addressof(factors), elems // 2)
            if elems % 2 == 0:
                return seen
            addresses = [address + 2 * (elems - 1) for address in addresses]
            elems = 1
        elif mixture in SPECIAL:
            run = _elements(*mixture, thetas, add_base)
            return run(addressof(table), addressof(factors), elems)
    wide = accumulates_in_fp64(base_code, source_codes, out_code)
    scratch = np.empty((3, BLOCK), np.float64 if wide else np.float32)
    table, factors = (_Int * (count + 2))(*addresses), (_Double * count)(*weights)
    codes, flags = (_Int * count)(*source_codes), (_Int * count)(*thetas)
    occurring = tuple(sorted(set(source_codes))) or (base_code,)
    run = _blocks(base_code, occurring, out_code, add_base)
    lists = [addressof(numbers) for numbers in (table, codes, flags, factors)]
    return run(*lists, count, elems, scratch.ctypes.data) or seen


def _address(array: np.ndarray) -> int:
    """Where an array's memory begins; in a third of the time that `array.ctypes` takes."""
    try:
        return addressof(_Byte.from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError):  # read-only, empty
        return array.ctypes.data
