"""`optimer inspect`: numbers against numpy in fp64, warnings, and what the command prints."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from optimer_engine import extract, pool
from optimer_engine.checkpoint import Checkpoint
from optimer_engine.cli.inspect import command
from optimer_engine.errors import MismatchError, RecipeError
from optimer_engine.inspection.findings import trajectory, warnings
from optimer_engine.inspection.measure import TILE_ELEMS, Measured, Pool, measure
from optimer_engine.inspection.ranks import effective_ranks
from optimer_engine.inspection.summary import layer_of, module_type, summarise
from optimer_engine.kernels import moments, reference_moments
from optimer_engine.packing import pack
from tests.conftest import nearby, random_tensors


def opened(*folders):
    return [Checkpoint.open(folder) for folder in folders]


def measured(folders, base=None, threads=2):
    return measure(Pool(opened(*folders), base and Checkpoint.open(base)), threads=threads)


@pytest.fixture
def folders(tmp_path, write_checkpoint):
    """base, three models, and the tensors of all four; the first tensor is larger than a tile."""
    base = random_tensors(0) | {"model.layers.1.big": torch.randn(TILE_ELEMS + 777).bfloat16()}
    base["model.ids"] = torch.arange(4)
    trained = [nearby(base, seed, 0.01) | {"model.ids": base["model.ids"]} for seed in (1, 2, 3)]
    trained[2]["model.norm.weight"] = base["model.norm.weight"].clone()
    names = [write_checkpoint(f"s{i}", tensors, files=1 + i) for i, tensors in enumerate(trained)]
    return write_checkpoint("base", base), names, base, trained


def deltas(base, trained):
    """name -> fp64 (sources + 1, elems): deltas in fp32 as stored, and the base."""
    return {
        name: np.stack(
            [*((t[name].float() - b.float()).reshape(-1).double().numpy() for t in trained),
             b.double().reshape(-1).numpy()]
        )
        for name, b in base.items()
        if b.is_floating_point()
    }  # fmt: skip


def test_norms_cosines_and_counts_equal_fp64(folders):
    base, names, before, after = folders
    found = measured(names, base)
    want = deltas(before, after)
    assert set(found.tensors) == set(want)
    total = sum(x @ x.T for x in want.values())
    np.testing.assert_allclose(found.total(), total, rtol=1e-12, atol=1e-12)
    norms = np.sqrt(np.diagonal(total))
    np.testing.assert_allclose(
        found.cosines(), (total / np.outer(norms, norms))[:3, :3], rtol=1e-9, atol=1e-12
    )
    for number, name in enumerate(found.tensors):
        x = want[name]
        np.testing.assert_allclose(found.products[number], x @ x.T, rtol=1e-12, atol=1e-12)
        assert list(found.unchanged[number]) == [(row == 0).sum() for row in x[:3]]
    layer = [found.tensors.index(name) for name in want if ".layers.0." in name]
    np.testing.assert_allclose(
        found.norms(layer)[1] ** 2,
        sum((want[found.tensors[number]][1] ** 2).sum() for number in layer),
        rtol=1e-12,
    )
    assert found.groups["layers"]["0"] == sorted(layer)
    assert found.nonfinite.sum() == 0


def test_threads_do_not_change_a_bit(folders):
    base, names, *_ = folders
    one, many = measured(names, base, threads=1), measured(names, base, threads=5)
    assert one.products.tobytes() == many.products.tobytes()


def test_vectors_of_every_mode_measure_alike(tmp_path, folders):
    base, names, *_ = folders
    extract(base, names[0], tmp_path / "plain")
    for mode in ("exact", "int8"):
        pack(base, names[0], tmp_path / mode, mode=mode)
    made = [names[0], *(tmp_path / name for name in ("plain", "exact", "int8"))]
    found = measured(made, base)
    norms = found.norms()
    assert norms[0] == norms[1] == norms[2]
    assert found.cosines()[0, 3] > 0.9999
    alone = measured([tmp_path / "plain"])  # a plain vector needs no base
    assert alone.norms()[0] == norms[0]
    with pytest.raises(MismatchError, match="--base"):
        measured([tmp_path / "exact"])


def test_nonfinite_values_are_counted_and_warned_of(folders, write_checkpoint):
    base, names, _, after = folders
    bad = {name: t.clone() for name, t in after[0].items()}
    bad["model.norm.weight"][:2] = torch.tensor([float("nan"), float("inf")])
    folder = write_checkpoint("bad", bad)
    pool = Pool(opened(folder, names[1]), Checkpoint.open(base))
    found = measure(pool)
    assert list(found.nonfinite.sum(axis=0)) == [2, 0]
    assert any("bad: 2 values" in line for line in warnings(found, pool.folders, pool.base))


def test_warnings_name_what_is_probably_not_meant(tmp_path, folders, write_checkpoint):
    base, names, before, after = folders
    other = write_checkpoint("other", random_tensors(9) | {
        "model.layers.1.big": torch.randn(TILE_ELEMS + 777).bfloat16(), "model.ids": torch.arange(4)
    })  # fmt: skip
    zeros = {n: torch.zeros_like(t) if t.is_floating_point() else t for n, t in before.items()}
    extract(write_checkpoint("zeros", zeros), names[0], tmp_path / "full")
    extract(other, names[1], tmp_path / "stranger")
    twin = {n: t + (t - before[n]) * 0.01 if n != "model.ids" else t for n, t in after[2].items()}
    extract(base, names[2], tmp_path / "one")
    extract(base, write_checkpoint("twin", twin), tmp_path / "two")

    def said(*vectors):
        pool = Pool(opened(*vectors), Checkpoint.open(base))
        return "\n".join(warnings(measure(pool), pool.folders, pool.base))

    text = said(tmp_path / "full", tmp_path / "stranger", tmp_path / "one", tmp_path / "two")
    assert "full: taken from the base" in text and "stranger: taken from the base" in text
    assert "full: is 1.0" in text and "a full model instead of a vector?" in text
    assert "stranger: base + vector has cosine" in text
    assert "one and two nearly coincide: cosine" in text
    assert "one:" not in text
    assert said(tmp_path / "one") == ""
    assert "other: base + vector has cosine" in said(other)


def test_a_straight_path_is_told_from_a_crooked_one():
    def path(points):
        points = np.array(points, float)
        count = len(points)
        return trajectory(
            Measured(
                [f"c{i}" for i in range(count)], ["w"], np.array([points.shape[1]]),
                (points @ points.T)[None], np.zeros((1, count), int), np.zeros((1, count), int),
                False,
            )
        )  # fmt: skip

    straight = path([[1, 1], [2, 2], [4, 4]])
    assert straight["straightness"] == pytest.approx(1)
    assert straight["explained"] == pytest.approx(1)
    np.testing.assert_allclose(straight["turns"], [1, 1])
    np.testing.assert_allclose(straight["lengths"], np.sqrt(2) * np.array([1, 1, 2]))
    crooked = path([[3, 0], [3, 4]])
    assert crooked["straightness"] == pytest.approx(5 / 7)
    np.testing.assert_allclose(crooked["turns"], [0], atol=1e-12)
    np.testing.assert_allclose(crooked["to_end"], [0.6, 1])


@pytest.mark.parametrize("shape", [(40, 25), (25, 40), (9000, 3), (3, 9000)])
def test_effective_rank_equals_that_of_a_singular_value_decomposition(shape, write_checkpoint):
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(shape, generator=generator)
    trained = base + torch.randn(shape, generator=generator) * torch.linspace(0, 1, shape[1])
    folders = [
        write_checkpoint("base", {"w": base, "v": torch.ones(3)}),
        write_checkpoint("trained", {"w": trained, "v": torch.ones(3)}),
    ]
    pool = Pool(opened(folders[1], folders[0]), Checkpoint.open(folders[0]))
    sizes = np.linalg.svd((trained - base).double().numpy(), compute_uv=False)
    shares = sizes[sizes > 0] / sizes.sum()
    found = effective_ranks(pool)
    assert list(found) == ["w"]
    assert found["w"][0] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
    assert found["w"][1] is None


def test_the_products_kernel_equals_its_specification():
    rng = np.random.default_rng(0)
    for count, elems in ((1, 0), (1, 1), (2, 15), (2, 5000)):
        values = (rng.standard_normal((count, elems)) * 1e-3).astype(np.float32)
        values[:, ::7] = 0
        if elems > 4000:
            values[1, 4000] = -np.inf
        products, counts = np.zeros((count, count)), np.zeros((2, count), np.int64)
        moments.moments(count)(
            values.ctypes.data, values.strides[0], elems, products.ctypes.data, counts.ctypes.data
        )
        want, zeros, nonfinite = reference_moments.moments(values)
        upper = np.triu_indices(count)
        np.testing.assert_allclose(products[upper], want[upper], rtol=1e-12, atol=1e-18)
        assert np.array_equal(counts, [zeros, nonfinite])


def test_headers_say_what_is_in_a_folder(tmp_path, folders):
    base, names, before, _ = folders
    pack(base, names[0], tmp_path / "vector", mode="int8", metadata={"dataset": "ja"})
    with Checkpoint.open(names[1]) as model, Checkpoint.open(tmp_path / "vector") as vector:
        facts, packed = summarise(model), summarise(vector)
    assert facts["parameters"] == sum(t.numel() for t in before.values())
    assert facts["tensors"] == len(before) and facts["files"] == 2 and facts["layers"] == 2
    assert facts["dtypes"]["I64"] == {"tensors": 1, "parameters": 4}
    assert facts["kind"] == "model" and packed["kind"] == "vector" and packed["mode"] == "int8"
    assert packed["parameters"] == facts["parameters"] - 4
    assert packed["metadata"]["dataset"] == "ja"
    assert packed["largest"][0] == ["model.layers.1.big", [TILE_ELEMS + 777]]


def test_names_are_sorted_into_layers_and_module_types():
    wanted = {
        "model.layers.11.self_attn.q_proj.weight": ("11", "attention"),
        "model.language_model.layers.3.mlp.experts.2.up_proj.weight": ("3", "mlp"),
        "model.layers.0.post_attention_layernorm.weight": ("0", "norm"),
        "transformer.h.7.ln_1.weight": ("7", "norm"),
        "transformer.h.7.attn.c_attn.weight": ("7", "attention"),
        "transformer.wte.weight": ("-", "embedding"),
        "model.embed_tokens.weight": ("-", "embedding"),
        "lm_head.weight": ("-", "embedding"),
        "vision.projector.weight": ("-", "other"),
    }
    assert {name: (layer_of(name), module_type(name)) for name in wanted} == wanted


def test_the_command_prints_tables_json_and_a_picture(tmp_path, folders):
    base, names, *_ = folders
    texts = [str(name) for name in names]
    run = CliRunner().invoke
    text = run(command, [*texts, "--base", str(base), "--trajectory", "--rank"])
    assert text.exit_code == 0, text.output
    for word in ("norm/base", "cosine", "mlp", "embedding", "straightness", "effective rank"):
        assert word in text.output
    picture = tmp_path / "pool.png"
    full = run(command, [*texts, "--base", str(base), "--json", "--plot", str(picture)])
    data = json.loads(full.stdout)
    assert data["names"] == ["s0", "s1", "s2"]
    found = measured(names, base)
    np.testing.assert_allclose(data["whole"]["cosines"], found.cosines())
    assert data["tensors"]["model.norm.weight"]["unchanged"][2] == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    alone = run(command, [texts[0]])
    assert alone.exit_code == 0
    assert "give the base of the pool with --base" in alone.output
    headers = run(command, [*texts, "--headers", "--json"])
    assert [f["kind"] for f in json.loads(headers.stdout)["folders"]] == ["model"] * 3


def test_a_pool_stands_for_its_vectors_and_a_path_may_lie_close(tmp_path, folders):
    base, names, *_ = folders
    run = CliRunner().invoke
    for number, name in enumerate(names[:2]):
        pack(base, name, tmp_path / f"v{number}")
        pool.add(tmp_path / "pool", tmp_path / f"v{number}", f"n{number}", base=str(base))
    shown = run(command, [str(tmp_path / "pool"), "--base", str(base), "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["names"] == ["n0", "n1"]
    for number in range(2):
        pool.remove(tmp_path / "pool", f"n{number}")
    refused = run(command, [str(tmp_path / "pool"), "--base", str(base)])
    assert isinstance(refused.exception, RecipeError) and "no vectors in it" in str(
        refused.exception
    )

    path = ["--trajectory"]
    twice = [str(names[0]), str(names[0]), "--base", str(base), "--json"]
    warned = [json.loads(run(command, [*twice, *more]).stdout)["warnings"] for more in ([], path)]
    assert "nearly coincide" in warned[0][0] and not warned[1]
