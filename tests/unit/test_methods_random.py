"""Random masks: the generator against its test vectors, masks against their probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from optimer_engine import methods
from optimer_engine.kernels import reference_methods
from optimer_engine.methods.sparse import stream


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_philox_gives_the_published_vectors(counter, key, words):
    def numbers(text):
        return np.array([int(word, 16) for word in text.split()], np.uint32)

    assert np.array_equal(reference_methods.philox(numbers(counter), numbers(key)), numbers(words))


def mask_of(name, shape, density, seed=0, stream_name="", tensor="tensor", **options):
    """Which of a delta of ones is kept."""
    base = np.zeros(shape, np.float32)
    given = [{"weight": 1.0, "density": density, "stream": stream_name}]
    got = methods.merge_arrays(
        name, base, [base + 1], {"seed": seed}, given, name=tensor, **options
    )
    return got


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_keeps_the_specified_elements_and_divides_by_the_density(name):
    n = 200_000
    got = mask_of(name, (n,), 0.3, seed=7, tensor="a.weight")
    words = np.array(stream(7, "0", "a.weight"), np.uint32)
    wanted = reference_methods.chance_mask(words, 0, n, round(0.3 * 2**32))
    np.testing.assert_array_equal(got, np.where(wanted, np.float32(1 / 0.3), 0))
    assert abs(wanted.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / n)


def test_dare_with_mergekits_rescaling_keeps_the_l1_norm():
    random = np.random.default_rng(0)
    base = np.zeros((400, 500))
    delta = random.normal(size=base.shape)
    given = [{"weight": 1.0, "density": 0.4}]
    got = methods.merge_arrays("dare_linear", base, [delta], {"compat": "mergekit"}, given)
    assert abs(np.abs(got).sum() / np.abs(delta).sum() - 1) < 1e-12
    plain = methods.merge_arrays("dare_linear", base, [delta], {"rescale": False}, given)
    kept = plain != 0
    np.testing.assert_allclose(plain[kept], delta[kept])
    np.testing.assert_allclose(got, plain * (np.abs(delta).sum() / np.abs(plain).sum()), rtol=1e-12)


def test_masks_depend_on_seed_source_and_tensor_and_on_nothing_else():
    kept = [
        mask_of("dare_linear", (5000,), 0.5, **options) != 0
        for options in (
            {}, {"tile_elems": 1}, {"out_dtype": "float64"}, {"stream_name": "0"},
            {"seed": 1}, {"stream_name": "b"}, {"tensor": "other"},
        )
    ]  # fmt: skip
    for same in kept[1:4]:
        assert np.array_equal(kept[0], same)
    for other in kept[4:]:
        assert 0.45 < np.mean(kept[0] == other) < 0.55


def test_two_sources_have_masks_of_their_own():
    base = np.zeros(5000, np.float32)
    given = [{"weight": 1.0, "density": 0.5}, {"weight": 1.0, "density": 0.5}]
    got = methods.merge_arrays("dare_linear", base, [base + 1, base + 10], {}, given)
    both = np.unique(got, return_counts=True)
    assert both[0].tolist() == [0, 2, 20, 22]
    assert (np.abs(both[1] / 5000 - 0.25) < 0.04).all()


@pytest.mark.parametrize("shape", [(300, 40), (7, 1300), (900,), (60, 1), (5, 6, 70)])
@pytest.mark.parametrize("inexact", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("octaves", [1, 30])
def test_della_keeps_by_rank_in_the_row_and_divides_by_the_probability(shape, inexact, octaves):
    random = np.random.default_rng(1)
    base = np.zeros(shape, np.float32)
    delta = random.normal(size=shape).astype(np.float32)
    delta *= np.exp2(-random.integers(0, octaves, shape)).astype(np.float32)
    delta.flat[::7] = 0.25  # many equal magnitudes
    delta.flat[3::11] = 0
    kept = np.where(random.random(shape) < inexact, 0xFFFFFFFF, 0xFFFF0000).astype(np.uint32)
    delta = (delta.view(np.uint32) & kept).view(np.float32)  # else exact in bf16
    given = [{"weight": 1.0, "density": 0.4, "epsilon": 0.2}]
    got = methods.merge_arrays("della_linear", base, [delta], {}, given)
    keys = reference_methods.magnitudes(delta.reshape(-1, shape[-1]))
    chances = reference_methods.rank_probabilities(keys, 0.4 - 0.2, 2 * 0.2).reshape(-1)
    words = np.array(stream(0, "0", "tensor"), np.uint32)
    drawn = reference_methods.uniform_words(words, 0, delta.size)
    wanted = np.where(drawn < chances * 2.0**32, delta.ravel() / chances, 0)
    np.testing.assert_allclose(got.ravel(), wanted, rtol=2e-7)


def test_ranks_run_from_the_least_to_the_largest():
    keys = np.array([[5, 1, 5, 9]])
    got = reference_methods.rank_probabilities(keys, 0.2, 0.6)
    np.testing.assert_allclose(got, [[0.6, 0.2, 0.4, 0.8]])


def test_della_with_mergekits_rescaling_keeps_the_l1_norm():
    random = np.random.default_rng(2)
    base = np.zeros((50, 600))
    delta = random.normal(size=base.shape)
    given = [{"weight": 1.0, "density": 0.5, "epsilon": 0.1}]
    got = methods.merge_arrays("della_linear", base, [delta], {"compat": "mergekit"}, given)
    assert abs(np.abs(got).sum() / np.abs(delta).sum() - 1) < 1e-12
