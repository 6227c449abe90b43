"""Every merge method against its formula, written out in fp64 from the paper."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from optimer_engine import methods
from optimer_engine.errors import MismatchError, NonFiniteError, RecipeError
from optimer_engine.methods.protocol import REQUIRED

SHAPES = [(1,), (7, 1), (1300,), (33, 47), (5, 4, 6), ()]
WEIGHTS = [0.5, 0.3, 0.4]
DENSITIES = [0.5, 0.8, 0.3]


def tensors(shape, count, seed=0, scale=1e-2):
    """A base and sources, fp32, all magnitudes of deltas different."""
    random = np.random.default_rng(seed)
    base = np.asarray(random.normal(0, 1, shape), np.float32)
    noise = [scale * random.normal(0, 1, shape) for _ in range(count)]
    return base, [np.asarray(base + extra, np.float32) for extra in noise]


def per_source(count, **columns):
    return [{key: values[i] for key, values in columns.items()} for i in range(count)]


def exact(base, sources):
    """Deltas in fp64, of which magnitudes are compared in fp32 as the methods do."""
    return [s.astype(np.float64) - base.astype(np.float64) for s in sources]


def first(delta, count):
    """Mask of the `count` largest magnitudes, of equals those of lowest index."""
    flat = np.abs(delta).astype(np.float32).ravel()
    order = sorted(range(flat.size), key=lambda j: (-flat[j], j))
    mask = np.zeros(flat.size, bool)
    mask[order[:count]] = True
    return mask.reshape(delta.shape)


def elected(terms, divisors=None):
    """Sum of the terms whose sign is that of their sum, over the sum of their divisors."""
    total = sum(terms)
    agree = [(t * np.sign(total)) > 0 for t in terms]
    merged = sum(np.where(a, t, 0) for a, t in zip(agree, terms, strict=True))
    if divisors is None:
        return merged
    below = sum(np.where(a, d, 0) for a, d in zip(agree, divisors, strict=True))
    return merged / np.where(below == 0, 1, below)


def merge(method, base, sources, shared=None, given=None, **options):
    return methods.merge_arrays(method, base, sources, shared, given, **options)


def assert_close(got, wanted):
    """Within a few units in the last place of fp32 of the larger terms."""
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, rtol=3e-7, atol=3e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_and_task_arithmetic(shape):
    base, sources = tensors(shape, 3)
    wide = [s.astype(np.float64) for s in sources]
    given = per_source(3, weight=WEIGHTS)
    soup = sum(w * s for w, s in zip(WEIGHTS, wide, strict=True))
    assert_close(merge("linear", None, sources, {}, given), soup / sum(WEIGHTS))
    assert_close(merge("linear", None, sources, {"normalize": False}, given), soup)
    task = sum(w * d for w, d in zip(WEIGHTS, exact(base, sources), strict=True))
    assert_close(merge("task_arithmetic", base, sources, {"lambda": 0.7}, given), base + 0.7 * task)
    normal = merge("task_arithmetic", base, sources, {"normalize": True}, given)
    assert_close(normal, base + task / sum(WEIGHTS))


def test_linear_is_correctly_rounded_to_bf16():
    import torch

    _, sources = tensors((64, 500), 3)
    sources = [torch.from_numpy(s).bfloat16() for s in sources]
    got = merge("linear", None, sources, {}, per_source(3, weight=WEIGHTS))
    exactly = sum(w * s.double() for w, s in zip(WEIGHTS, sources, strict=True)) / sum(WEIGHTS)
    assert got.dtype == torch.bfloat16
    # A double rounded to float before bf16 differs in ties alone.
    assert (got.double() - exactly).abs().le((exactly.bfloat16().double() - exactly).abs() * 1.001
                                             ).float().mean() > 0.9999  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_ties(shape):
    base, sources = tensors(shape, 3)
    deltas = exact(base, sources)
    kept = [
        w * np.where(first(d, max(1, int(rho * d.size))), d, 0)
        for w, rho, d in zip(WEIGHTS, DENSITIES, deltas, strict=True)
    ]
    given = per_source(3, weight=WEIGHTS, density=DENSITIES)
    assert_close(merge("ties", base, sources, {"lambda": 0.9}, given),
                 base + 0.9 * elected(kept, WEIGHTS))  # fmt: skip
    plain = merge("ties", base, sources, {"normalize": False}, given)
    assert_close(plain, base + elected(kept))


def test_ties_by_count_follows_the_majority():
    base = np.zeros(3, np.float32)
    sources = [np.array(v, np.float32) for v in ([5, 1, -1], [-1, 1, -1], [-1, -9, 4])]
    given = per_source(3, weight=[1, 1, 1])
    assert merge("ties", base, sources, {"consensus": "count"}, given).tolist() == [-1, 1, -1]
    assert merge("ties", base, sources, {}, given).tolist() == [5, -9, 4]


def test_ties_rescale_keeps_the_l1_norm():
    base, sources = tensors((40, 50), 1)
    delta = exact(base, sources)[0]
    kept = np.where(first(delta, 200), delta, 0)
    got = merge("ties", base, sources, {"rescale": True, "normalize": False},
                [{"weight": 1, "density": 0.1}])  # fmt: skip
    assert_close(got, base + kept * np.abs(delta).sum() / np.abs(kept).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs(shape, name):
    base, sources = tensors(shape, 3)
    kept, gammas = [], [0.1, 0.3, 0.0]
    for w, rho, gamma, d in zip(WEIGHTS, DENSITIES, gammas, exact(base, sources), strict=True):
        target, above = int(rho * d.size), int(gamma * d.size)
        below = max(0, d.size - target - above)
        mask = first(d, d.size - below) & ~first(d, d.size - below - target)
        assert mask.sum() == target
        kept.append(w * np.where(mask, d, 0))
    total = sum(kept) if name == "breadcrumbs" else elected(kept)
    given = per_source(3, weight=WEIGHTS, density=DENSITIES, gamma=gammas)
    assert_close(merge(name, base, sources, {}, given), base + total)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize(
    "name", ["ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs"]
)
def test_density_of_nothing_and_of_all(name, density):
    base, sources = tensors((12, 30), 2)
    got = merge(name, base, sources, {}, per_source(2, weight=[1, 0.5], density=[density] * 2))
    terms = [w * d * density for w, d in zip([1, 0.5], exact(base, sources), strict=True)]
    if name in ("ties", "della"):
        assert_close(got, base + elected(terms, [1, 0.5]))
    else:
        assert_close(got, base + (elected(terms) if name == "dare_ties" else sum(terms)))
    if density == 0:
        assert np.array_equal(got, base)


def test_equal_magnitudes_are_settled_by_the_lowest_index():
    # More than one granule, in tiles of one granule: the cut falls into the second.
    count = 2 * methods.GRANULE + 100
    base = np.zeros(count, np.float32)
    signs = np.where(np.arange(count) % 3, 1, -1).astype(np.float32)
    kept = int(0.7 * count)
    for size in (1.0, 1 + 2.0**-20):  # exact in bf16, and not
        got = merge("ties", base, [signs * np.float32(size)], {},
                    [{"weight": 1.0, "density": 0.7}], tile_elems=1)  # fmt: skip
        assert np.array_equal(got[:kept], signs[:kept] * np.float32(size))
        assert not got[kept:].any()
        for density in (0.5, 0.001):  # the two cuts far apart, and in one block
            crumbs = merge("breadcrumbs", base, [signs * np.float32(size)], {},
                           [{"weight": 1.0, "density": density, "gamma": 0.2}])  # fmt: skip
            first = int(0.2 * count)
            assert np.flatnonzero(crumbs)[[0, -1]].tolist() == [
                first, first + int(density * count) - 1
            ]  # fmt: skip


def test_weights_of_both_signs_do_not_explode():
    base, sources = tensors((50, 50), 2, scale=1e-3)
    given = per_source(2, weight=[0.5, -0.499])
    largest = max(np.abs(d).max() for d in exact(base, sources))
    got = merge("ties", base, sources, {}, given)
    assert np.abs(got - base).max() <= largest * 1.01
    theirs = merge("ties", base, sources, {"compat": "mergekit"}, given)
    wx = [w * d for w, d in zip([0.5, -0.499], exact(base, sources), strict=True)]
    assert_close(theirs, base + elected(wx, [0.5, -0.499]))
    task = merge("task_arithmetic", base, sources, {"normalize": True}, given)
    assert np.abs(task - base).max() <= largest * 1.01


def test_a_tie_of_votes_elects_nobody_or_plus():
    base = np.zeros(2, np.float32)
    sources = [np.array([1, 2], np.float32), np.array([-1, -2], np.float32)]
    given = per_source(2, weight=[1, 1])
    assert merge("ties", base, sources, {}, given).tolist() == [0, 0]
    assert merge("ties", base, sources, {"compat": "mergekit"}, given).tolist() == [1, 2]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_sce(shape, share):
    base, sources = tensors(shape, 3, scale=0.3)
    deltas = exact(base, sources)
    mean = sum(deltas) / 3
    spread = sum((d - mean) ** 2 for d in deltas) / 3
    if share < 1:
        mask = first(spread, int(np.count_nonzero(spread) * share))
        deltas = [np.where(mask, d, 0) for d in deltas]
    energy = np.array([(d**2).mean() for d in deltas])
    weights = energy / energy.sum() if energy.sum() else np.ones(3) / 3
    sign = np.sign(sum(deltas))
    above = sum(np.where(d * sign > 0, w * d, 0) for w, d in zip(weights, deltas, strict=True))
    below = sum(np.where(d * sign > 0, w, 0) for w, d in zip(weights, deltas, strict=True))
    got = merge("sce", base, sources, {"select_topk": share})
    assert_close(got, base + above / np.where(below == 0, 1, below))


def sphere(a, b, t):
    """Slerp of two vectors, by definition."""
    cos = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    if 1 - abs(cos) < 1e-9:
        return (1 - t) * a + t * b
    angle = np.arccos(cos)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


@pytest.mark.parametrize("shape", SHAPES)
def test_slerp_and_nuslerp(shape):
    base, (a, b) = tensors(shape, 2, scale=0.7)
    assert_close(merge("slerp", base, [a], {"t": 0.3}),
                 sphere(base.astype(np.float64), a.astype(np.float64), 0.3))  # fmt: skip
    given = per_source(2, weight=[1.5, 0.5])
    wide = [x.astype(np.float64) for x in (a, b)]
    assert_close(merge("nuslerp", None, [a, b], {}, given), sphere(*wide, 0.25))
    da, db = exact(base, [a, b])
    assert_close(merge("nuslerp", base, [a, b], {}, given), base + sphere(da, db, 0.25))
    if len(shape) < 2:
        return
    by_row = np.empty(shape)
    for index in np.ndindex(shape[:-1]):
        by_row[index] = sphere(da[index], db[index], 0.25)
    got = merge("nuslerp", base, [a, b], {"nuslerp_flatten": False}, given)
    np.testing.assert_allclose(got, base + by_row, rtol=2e-6, atol=2e-7)
    by_column = np.empty(shape)
    for index in np.ndindex(shape[1:]):
        at = (slice(None), *index)
        by_column[at] = sphere(wide[0][at], wide[1][at], 0.25)
    got = merge(
        "nuslerp", None, [a, b], {"nuslerp_flatten": False, "nuslerp_row_wise": True}, given
    )
    np.testing.assert_allclose(got, by_column, rtol=2e-6, atol=2e-7)


def test_slerp_of_parallel_and_opposite_tensors_is_straight():
    base = np.arange(1, 7, dtype=np.float32)
    assert_close(merge("slerp", base, [2 * base], {"t": 0.5}), 1.5 * base)
    assert_close(merge("slerp", base, [-base], {"t": 0.25}), 0.5 * base)
    assert_close(merge("slerp", base, [0 * base], {"t": 0.0}), base)


def unit(x):
    return x / np.sqrt((x * x).sum())


@pytest.mark.parametrize("shape", [(33, 47), (5, 4, 6), (1300,)])
def test_multislerp_and_karcher(shape):
    base, sources = tensors(shape, 3, scale=0.5)
    weights = np.array(WEIGHTS) / sum(WEIGHTS)
    for origin, vectors in ((base, exact(base, sources)), (None, sources)):
        vectors = [v.astype(np.float64) for v in vectors]
        # The tangential mean at the mean direction is zero, so the barycentre is that direction.
        direction = unit(sum(w * unit(v) for w, v in zip(weights, vectors, strict=True)))
        length = sum(w * np.sqrt((v * v).sum()) for w, v in zip(weights, vectors, strict=True))
        got = merge("multislerp", origin, sources, {}, per_source(3, weight=WEIGHTS))
        wanted = direction * length + (0 if origin is None else origin)
        np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-6)
    # At the Karcher mean the logarithms of all inputs sum to zero.
    got = unit(merge("karcher", None, sources, {"max_iter": 50, "tol": 1e-9}).astype(np.float64))
    logs = 0
    for s in sources:
        u = unit(s.astype(np.float64))
        angle = np.arccos((u * got).sum())
        logs = logs + angle / np.sin(angle) * (u - np.cos(angle) * got)
    assert np.sqrt((logs * logs).sum()) < 1e-6
    with_base = merge("karcher", base, sources)
    assert_close(with_base, merge("karcher", None, [base, *sources]))


def test_multislerp_without_a_direction_is_refused():
    a = np.ones(4, np.float32)
    three = [a, -a, 0 * a]
    with pytest.raises(RecipeError, match="directions is zero"):
        merge("multislerp", None, three, {}, per_source(3, weight=[1, 1, 1]))


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("shape", [(33, 47), (5, 4, 6), (1300,), (1,)])
def test_model_stock(shape, by_row):
    base, sources = tensors(shape, 3, scale=0.5)
    deltas = exact(base, sources)
    axes = -1 if by_row else tuple(range(len(shape)))

    def cos(a, b):
        lengths = np.sqrt((a * a).sum(axes, keepdims=True) * (b * b).sum(axes, keepdims=True))
        return (a * b).sum(axes, keepdims=True) / lengths

    mean = sum(cos(a, b) for a, b in itertools.combinations(deltas, 2)) / 3
    t = 3 * mean / (1 + 2 * mean)
    if shape == (1,):
        t = np.where(np.abs(1 + 2 * mean) < 1e-6, 0, t)
    got = merge("model_stock", base, sources, {"filter_wise": by_row})
    np.testing.assert_allclose(got, base + t * sum(deltas) / 3, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("shape", [(33, 47), (5, 4, 6), (1300,), (6, 1)])
def test_arcee_fusion(shape):
    base, (source,) = tensors(shape, 1, scale=0.5)
    delta = exact(base, [source])[0]

    def softmax(x):
        e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True) + 1e-8

    p, q = softmax(source), softmax(base)
    score = np.abs(delta) * np.maximum((p * np.log(p / q)).sum(-1, keepdims=True), 0)
    ordered = np.sort(score, axis=None)
    low, median, high = (ordered[int(x * (score.size - 1))] for x in (0.25, 0.5, 0.75))
    # The threshold is one of fp32 scores; none lies next to it here.
    mask = score >= (median + 1.5 * (high - low)) * (1 - 1e-6)
    assert_close(merge("arcee_fusion", base, [source]), base + np.where(mask, delta, 0))


@pytest.mark.parametrize("shape", SHAPES)
def test_nearswap_and_passthrough(shape):
    base, (source,) = tensors(shape, 1)
    delta = exact(base, [source])[0]
    with np.errstate(divide="ignore"):
        w = np.clip(0.003 / np.abs(delta), 0, 1)
    wanted = base + np.where(delta == 0, 0, w * delta)
    assert_close(merge("nearswap", base, [source], {"t": 0.003}), wanted)
    assert np.array_equal(merge("passthrough", None, [source]), source)
    assert_close(merge("passthrough", None, [source], {}, [{"scale": 0.5}]), source * 0.5)
    vector = np.asarray(source - base, np.float32)
    assert_close(merge("passthrough", base, [vector], deltas=True), base + vector.astype(float))


def arguments(name, count=None):
    """Any valid parameters of a method, for `count` sources."""
    method = methods.get(name)
    count = count or max(method.min_sources, method.max_sources or 3)
    shared, given = {}, [{} for _ in range(count)]
    for key, parameter in method.parameters.items():
        if key == "density":
            for number, each in enumerate(given):
                each[key] = [0.5, 0.6, 0.4][number]
        elif parameter.default is REQUIRED and parameter.per_source:
            for number, each in enumerate(given):
                each[key] = WEIGHTS[number]
        elif parameter.default is REQUIRED:
            shared[key] = 0.01
    if name == "sce":
        shared["select_topk"] = 0.5
    return shared, given


def with_base(name):
    return methods.get(name).base == "required"


BUILT_IN = methods.names()


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_method_takes_an_empty_tensor(name):
    shared, given = arguments(name)
    base, sources = tensors((0, 5), len(given))
    assert merge(name, base if with_base(name) else None, sources, shared, given).shape == (0, 5)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_every_method_finds_a_value_that_is_not_finite(name, bad):
    shared, given = arguments(name)
    base, sources = tensors((20, 30), len(given))
    sources[0][3, 4] = bad
    with pytest.raises(NonFiniteError):
        merge(name, base if with_base(name) else None, sources, shared, given)
    base, sources = tensors((20, 30), len(given))
    base[3, 4] = bad
    if with_base(name):
        with pytest.raises(NonFiniteError):
            merge(name, base, sources, shared, given)


@pytest.mark.parametrize("name", [n for n in BUILT_IN if methods.get(n).base == "required"])
def test_stored_deltas_are_merged_as_the_models_they_come_from(name):
    shared, given = arguments(name)
    random = np.random.default_rng(3)
    # Multiples of 2**-12: differences are exact.
    base = (random.integers(-4000, 4000, (20, 30)) / 4096).astype(np.float32)
    taus = [(random.integers(-400, 400, (20, 30)) / 4096).astype(np.float32) for _ in given]
    models = [base + tau for tau in taus]
    got = merge(name, base, taus, shared, given, deltas=True)
    assert np.array_equal(got, merge(name, base, models, shared, given))


@pytest.mark.parametrize(
    "name",
    # A weight of nuslerp and multislerp is that of a direction.
    [n for n in BUILT_IN if {"weight", "normalize"} <= methods.get(n).parameters.keys()],
)
def test_a_source_of_weight_zero_changes_nothing(name):
    shared, given = arguments(name)
    base, sources = tensors((20, 30), len(given))
    origin = base if with_base(name) else None
    given[2]["weight"] = 0.0
    less = merge(name, origin, sources[:2], shared, given[:2])
    assert np.array_equal(merge(name, origin, sources, shared, given), less)


def test_dtypes_may_differ_and_bf16_is_rounded_once():
    import torch

    base, sources = tensors((40, 50), 2)
    mixed = [torch.from_numpy(sources[0]).bfloat16(), torch.from_numpy(sources[1]).half()]
    start = torch.from_numpy(base).bfloat16()
    given = per_source(2, weight=[0.5, 0.6], density=[0.5, 0.4])
    got = merge("ties", start, mixed, {}, given)
    wide = merge("ties", start.double(), [m.double() for m in mixed], {}, given)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, wide.bfloat16()) or (got != wide.bfloat16()).float().mean() < 2e-3
    small = merge("ties", start, mixed, {}, given, out_dtype="float32")
    assert torch.allclose(small.double(), wide, rtol=3e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("method", "shared", "given", "match"),
    [
        ("tiees", {}, [{}], "no merge method"),
        ("ties", {}, [{}], "needs weight"),
        ("ties", {}, [{"weight": 1, "densty": 1}], "no parameter 'densty'"),
        ("ties", {}, [{"weight": "a"}], "not a float"),
        ("ties", {}, [{"weight": 1, "density": 1.5}], "outside 0 to 1"),
        ("ties", {"lambda": float("nan")}, [{"weight": 1}], "not a float"),
        ("ties", {}, [{"weight": 1, "lambda": 2}], "one value for the whole tensor"),
        ("ties", {"compat": "other"}, [{"weight": 1}], "not one of"),
        ("model_stock", {}, [{}], "2 or more"),
        ("linear", {}, [{"weight": 0.0}, {"weight": 0.0}], None),
        ("linear", {}, [{"weight": 1.0}, {"weight": -1.0}], "cannot be normalised"),
        ("della", {}, [{"weight": 1, "density": 0.1}], "not within 0 to 1"),
    ],
)
def test_what_a_method_refuses(method, shared, given, match):
    base, sources = tensors((3, 4), len(given))
    if match is None:
        assert np.array_equal(merge(method, base, sources, shared, given), base)
        return
    with pytest.raises(RecipeError, match=match):
        merge(method, base, sources, shared, given)


def test_a_missing_base_and_other_shapes_are_refused():
    base, sources = tensors((3, 4), 1)
    with pytest.raises(RecipeError, match="needs a base"):
        merge("ties", None, sources, {}, [{"weight": 1}])
    with pytest.raises(MismatchError, match="expected"):
        merge("ties", base.T, sources, {}, [{"weight": 1}])


def test_every_method_says_where_it_comes_from():
    for name in BUILT_IN:
        method = methods.get(name)
        assert method.paper and method.formula
        for parameter in method.parameters.values():
            assert parameter.meaning


def test_memory_does_not_grow_with_elements():
    from optimer_engine.tensor_recipe import Ref, TensorRecipe
    from optimer_engine.types import DType

    for name in BUILT_IN:
        method = methods.get(name)
        shared, given = arguments(name)
        recipe = TensorRecipe(
            name, (262208, 5376), DType.BF16, name, method.settings(shared, given),
            Ref(0, name), tuple(Ref(1, name) for _ in given),
        )  # fmt: skip
        memory = method.memory(recipe)
        assert memory.shared_bytes + 2 * memory.thread_bytes < 64e6


@pytest.fixture
def forget(monkeypatch):
    """Methods registered in a test are gone after it."""
    from optimer_engine.methods import registry

    registry.names()  # ours are imported on demand, and only once
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


def test_a_method_of_ones_own_from_a_function_of_elements(forget):
    @methods.elementwise("clipped", deltas=True)
    def clipped(base, deltas, *, weight: list[float], limit: float = 1e-3):
        total = sum(w * d for w, d in zip(weight, deltas, strict=True))
        return np.clip(total, -limit, limit)

    base, sources = tensors((300, 400), 2)
    given = per_source(2, weight=[1, 0.5])
    got = merge("clipped", base, sources, {"limit": 0.002}, given, tile_elems=1)
    a, b = exact(base, sources)
    assert_close(got, base + np.clip(a + 0.5 * b, -0.002, 0.002))
    with pytest.raises(RecipeError, match="already"):
        methods.elementwise("clipped")(clipped)


def test_a_method_of_ones_own_from_a_function_of_tensors(forget):
    @methods.per_tensor("rank_one", deltas=True, arrays=4)
    def rank_one(base, deltas, *, weight: list[float]):
        total = sum(w * d for w, d in zip(weight, deltas, strict=True))
        if total.ndim != 2:
            return total
        u, s, v = np.linalg.svd(total, full_matrices=False)
        return s[0] * np.outer(u[:, 0], v[0])

    base, sources = tensors((30, 20), 2)
    got = merge("rank_one", base, sources, {}, per_source(2, weight=[1, 1]))
    assert np.linalg.matrix_rank(got - base, tol=1e-4) == 1


def test_a_function_of_models_without_a_base(forget):
    @methods.elementwise("largest", base="unused")
    def largest(base, models):
        assert base is None
        return np.maximum.reduce(models)

    _, sources = tensors((300, 4), 3)
    assert np.array_equal(merge("largest", None, sources), np.maximum.reduce(sources))
