"""Products of all pairs of vectors, and counts of zeros and non-finite values, in one pass.

What `kernels.reference_moments` specifies, summed in 16 interleaved lanes over short blocks: the
order of the additions is fixed, so the result does not depend on the machine's vector width, and
its error grows with the length of a lane and not with the tile's.
"""

from __future__ import annotations

import numpy as np

from .native import compiled

BLOCK, LANES = 1024, 16


@compiled("void(int64, int64, int64, int64, int64)")
def moments(count: int):
    """A function that adds the moments of `count` fp32 vectors to what is there.

    Its arguments, all int64: address of the vectors' first elements, one behind the other; bytes
    from one vector to the next; elements; address of fp64 (count, count), of which the part with
    column >= row is written; address of int64 (2, count): zeros and non-finite values.
    """
    from numba import njit

    from .elements import array

    lanes = _lane_products()

    @njit(error_model="numpy")
    def product(a, b, n):
        """The sum of a * b over n elements."""
        left, right = array(a, np.float32, n), array(b, np.float32, n)
        whole = n - n % LANES
        total = lanes(a, b, whole // LANES)
        for j in range(whole, n):
            total += np.float64(left[j]) * np.float64(right[j])
        return total

    def add(vectors, step, elems, products, counts):
        sums = array(products, np.float64, count * count)
        found = array(counts, np.int64, 2 * count)
        for start in range(0, elems, BLOCK):
            n = min(BLOCK, elems - start)
            for a in range(count):
                row = vectors + a * step + start * 4
                values = array(row, np.float32, n)
                zeros = nonfinite = np.int32(0)
                for j in range(n):
                    zeros += np.int32(values[j] == np.float32(0))
                    nonfinite += np.int32(not (abs(values[j]) < np.float32(np.inf)))
                found[a] += zeros
                found[count + a] += nonfinite
                for b in range(a, count):
                    other = vectors + b * step + start * 4
                    sums[a * count + b] += product(row, other, n)

    return add


def _lane_products():
    """A jitted (a, b, rows): the sum of the products of rows x LANES fp32 at two addresses.

    As a plain loop it would be summed one element after the other: the compiler may not reorder
    additions.
    """
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    narrow, wide = (ir.VectorType(kind, LANES) for kind in (ir.FloatType(), ir.DoubleType()))

    @intrinsic
    def lanes(_context, a, b, rows):
        def generate(_target_context, builder, _signature, args):
            def load(address, row):
                at = builder.add(address, builder.mul(row, ir.Constant(row.type, 4 * LANES)))
                pointer = builder.inttoptr(at, narrow.as_pointer())
                return builder.fpext(builder.load(pointer, align=4), wide)

            sums = cgutils.alloca_once_value(builder, ir.Constant(wide, [0.0] * LANES))
            with cgutils.for_range(builder, args[2]) as loop:
                both = builder.fmul(load(args[0], loop.index), load(args[1], loop.index))
                builder.store(builder.fadd(builder.load(sums), both), sums)
            parts = [
                builder.extract_element(builder.load(sums), ir.Constant(ir.IntType(32), lane))
                for lane in range(LANES)
            ]
            while len(parts) > 1:
                half = len(parts) // 2
                parts = [builder.fadd(parts[i], parts[half + i]) for i in range(half)]
            return parts[0]

        return types.float64(types.int64, types.int64, types.int64), generate

    return lanes
