"""The bits of a merge do not depend on how it is cut into tiles, nor on the threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimer_engine import methods
from optimer_engine.kernels import reference_methods
from optimer_engine.kernels.reference import BF16, upcast
from optimer_engine.methods.protocol import REQUIRED, Operand, Tile, prepare
from optimer_engine.tensor_recipe import Ref, TensorRecipe
from optimer_engine.types import DType

SHAPES = st.sampled_from(
    [(1,), (70001,), (140000,), (300, 500), (2000, 70), (70, 2000), (40, 9, 400), (66000, 2), (3,)]
) | st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 700)).map(
    lambda sizes: tuple(size for size in sizes if size > 4) or (4,)
)


def in_tiles(recipe, base, sources, step, threads):
    """Merge as an engine does: tiles in a mixed order, on several threads.

    sources: (array, dtype, whether it is a delta) of each.
    """
    method = methods.get(recipe.method)
    count = base.size
    unit = method.unit(recipe)
    step = max(1, step // unit) * unit
    tiles = [
        Tile(
            recipe, start, stop, Operand(base[start:stop], DType.BF16),
            tuple(Operand(s[start:stop], dtype, delta) for s, dtype, delta in sources),
        )
        for start in range(0, count, step)
        for stop in (min(start + step, count),)
    ]  # fmt: skip
    order = np.random.default_rng(step).permutation(len(tiles))
    out = np.full(count, 0x7FC0, np.uint16)

    def execute(wanted):
        def work(mine):
            accumulator = wanted.start()
            for number in mine:
                wanted.map(tiles[number], accumulator)
            return accumulator

        with ThreadPoolExecutor(threads) as pool:
            return wanted.finish(list(pool.map(work, np.array_split(order, threads))))

    state = prepare(method, recipe, execute)
    for number in order:
        tile = tiles[number]
        assert not method.merge(tile, state, out[tile.start : tile.stop])
    return out


@pytest.mark.parametrize("name", methods.names())
@settings(max_examples=6, deadline=None)
@given(
    shape=SHAPES, steps=st.tuples(*[st.sampled_from([2000, 65536, 100_000, 1 << 20])] * 2),
    threads=st.integers(1, 3), compat=st.sampled_from(["paper", "mergekit"]),
    option=st.integers(0, 2), seed=st.integers(0, 9), stored=st.booleans(),
)  # fmt: skip
def test_tiles_and_threads_do_not_change_bits(
    name, shape, steps, threads, compat, option, seed, stored
):
    method = methods.get(name)
    count = method.max_sources or 3
    shared, per_source = {"compat": compat}, [{} for _ in range(count)]
    for key, parameter in method.parameters.items():
        for number, each in enumerate(per_source):
            if key == "density":
                each[key] = [0.5, 0.31, 0.77][number]
            elif parameter.default is REQUIRED and parameter.per_source:
                each[key] = [0.5, 0.3, -0.4][number]
        if parameter.default is REQUIRED and not parameter.per_source:
            shared[key] = 0.01
    switches = {
        "nuslerp": ({}, {"nuslerp_flatten": False},
                    {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
        "model_stock": ({}, {"filter_wise": True}, {}),
        "sce": ({"select_topk": 0.3}, {}, {"select_topk": 0.01}),
        "ties": ({}, {"rescale": True}, {"consensus": "count"}),
    }  # fmt: skip
    shared |= switches.get(name, ({}, {}, {}))[option]
    random = np.random.default_rng(seed)
    base = bf16(random.normal(0, 0.02, shape))
    deltas = [random.normal(0, 1e-3, base.size) for _ in per_source]
    sources = [(bf16(upcast(base, BF16, np.float64) + d), DType.BF16, False) for d in deltas]
    if stored:  # the first as a distribution vector in fp32
        sources[0] = (deltas[0].astype(np.float32), DType.F32, True)
    recipe = TensorRecipe(
        "t", shape, DType.BF16, name, method.settings(shared, per_source), Ref(0, "t"),
        tuple(Ref(1 + number, "t") for number in range(count)),
    )  # fmt: skip
    whole = in_tiles(recipe, base, sources, steps[0], 1)
    assert np.array_equal(whole, in_tiles(recipe, base, sources, steps[1], threads))


def bf16(values):
    return (np.asarray(values, np.float32).reshape(-1).view(np.uint32) >> 16).astype(np.uint16)


@settings(max_examples=40, deadline=None)
@given(
    keys=st.lists(st.integers(0, 3) | st.integers(0, 1 << 20), min_size=1, max_size=300),
    share=st.floats(0.001, 0.999), weights=st.lists(st.floats(-1, 1), min_size=2, max_size=2),
    consensus=st.sampled_from(["sum", "count"]), compat=st.sampled_from(["paper", "mergekit"]),
)  # fmt: skip
def test_the_kernel_is_its_specification_to_the_bit(keys, share, weights, consensus, compat):
    values = np.array(keys, np.float32) / 1024
    base = np.linspace(-1, 1, values.size, dtype=np.float32)
    deltas = [values, -values[::-1].copy()]
    wide = [d.astype(np.float64) for d in deltas]
    count = max(1, int(share * values.size))
    kept = [
        np.where(reference_methods.top(reference_methods.magnitudes(d), count), d, 0) for d in wide
    ]
    kept = [np.where(w == 0, 0, d) for w, d in zip(weights, kept, strict=True)]
    divisors = weights if compat == "mergekit" else [abs(w) for w in weights]
    wanted = reference_methods.merge(
        base, 2, kept, weights, weights, divisors,
        reference_methods.COUNT if consensus == "count" else reference_methods.SUM, 1.0,
        compat == "mergekit", 2,
    )  # fmt: skip
    got = methods.merge_arrays(
        "ties", base, deltas, {"consensus": consensus, "compat": compat},
        [{"weight": w, "density": share} for w in weights], deltas=True,
    )  # fmt: skip
    assert np.array_equal(got.view(np.uint32), wanted.view(np.uint32))
