"""Whole merges by the GPU's kernels, in Triton's interpreter: the bytes of a merge on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from optimer_engine import FolderSink, merge, plan
from optimer_engine.errors import NonFiniteError
from optimer_engine.packing import pack
from tests.conftest import nearby

pytest.importorskip("triton", reason="triton is not installed; it exists for Linux only")

from tests.unit.gpus import interpreted_gpu, on_gpus
from tests.unit.test_adapter import adapter, factors


@pytest.fixture(autouse=True)
def _quiet_numpy():
    """The interpreter computes in numpy, which warns of what these tests do on purpose."""
    with np.errstate(all="ignore"):
        yield


SHAPES = {"embed": (11, 24), "a": (7, 53), "b": (7, 53), "norm": (24,), "scale": (), "no": (0, 3)}


def tensors(dtype=torch.bfloat16, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return {n: (torch.randn(s, generator=generator) * 0.1).to(dtype) for n, s in shapes.items()}


def recipe_of(write_checkpoint, count, dtype=torch.bfloat16, **more):
    base = tensors(dtype)
    sources = [
        {
            "name": f"s{seed}",
            "model": str(write_checkpoint(f"s{seed}", nearby(base, seed, 0.05))),
            "weight": 0.7 / seed,
        }
        for seed in range(1, count + 1)
    ]
    return {"base": str(write_checkpoint("base", base)), "sources": sources, **more}


def on_interpreter(monkeypatch, recipe, out, tile_bytes=1 << 20, **options):
    with monkeypatch.context() as patch:
        devices = interpreted_gpu(patch)
        made = on_gpus(plan(recipe, **options), devices, threads=1, tile_bytes=tile_bytes)
        return made.run(FolderSink(out))


def assert_same_bytes(monkeypatch, recipe, tmp_path, **options):
    on_interpreter(monkeypatch, recipe, tmp_path / "gpu", **options)
    merge(recipe, tmp_path / "cpu")
    first, second = (tmp_path / name / "model.safetensors" for name in ("gpu", "cpu"))
    assert first.read_bytes() == second.read_bytes()
    return load_file(second)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize(
    "more", [{}, {"out_dtype": "float32"}, {"rounding": "stochastic"}], ids=str
)
def test_weighted_sums(monkeypatch, write_checkpoint, tmp_path, count, more):
    recipe = recipe_of(write_checkpoint, count, **more)
    assert_same_bytes(monkeypatch, recipe, tmp_path, tile_bytes=1400)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_other_dtypes(monkeypatch, write_checkpoint, tmp_path, dtype):
    recipe = recipe_of(write_checkpoint, 2, dtype)
    assert_same_bytes(monkeypatch, recipe, tmp_path)


@pytest.mark.parametrize(
    ("method", "own", "shared"),
    [
        ("ties", {"density": 0.3}, {}),
        ("dare_linear", {"density": 0.5}, {}),
        ("dare_ties", {"density": 0.5}, {}),
        ("della_linear", {"density": 0.6, "epsilon": 0.2}, {}),
        ("della", {"density": 0.5}, {"rescale": False}),
        ("breadcrumbs_ties", {"density": 0.7}, {}),
        ("sce", {}, {"select_topk": 0.3}),
        ("linear", {}, {"normalize": False}),
    ],
)
def test_methods(monkeypatch, write_checkpoint, tmp_path, method, own, shared):
    recipe = recipe_of(write_checkpoint, 2, method=method, parameters=shared, seed=3)
    for source in recipe["sources"]:
        source["parameters"] = own
        if method == "sce":
            source["weight"] = 1.0
    merged = assert_same_bytes(monkeypatch, recipe, tmp_path)
    assert any(not torch.equal(merged[n], t) for n, t in tensors().items())


@pytest.mark.parametrize(
    "method", ["task_arithmetic", pytest.param("ties", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("mode", ["exact", "int8", "int4"])
def test_packed_vectors(monkeypatch, write_checkpoint, tmp_path, mode, method):
    base = tensors(shapes={"a": (64, 65), "b": (300,)})
    folders = [write_checkpoint("base", base), write_checkpoint("tuned", nearby(base, 1, 0.001))]
    pack(*folders, tmp_path / "packed", mode=mode)
    source = {"name": "s", "model": str(tmp_path / "packed"), "weight": 0.7}
    if method == "ties":
        source["parameters"] = {"density": 0.4}
    recipe = {"base": str(folders[0]), "sources": [source], "method": method}
    assert_same_bytes(monkeypatch, recipe, tmp_path)


@pytest.fixture
def adapted(tmp_path, write_checkpoint):
    torch.manual_seed(0)
    base = {"q.weight": torch.randn(33, 24), "c.weight": torch.randn(24, 40), "n": torch.randn(24)}
    tensors = factors("q", 33, 24, seed=1) | factors("c", 24, 40, seed=2)
    half = factors("q", 33, 24, dtype=torch.bfloat16, seed=3)
    write_checkpoint("base", {name: t.bfloat16() for name, t in base.items()})
    write_checkpoint("full", {name: (t + 0.01).bfloat16() for name, t in base.items()})
    adapter(tmp_path / "first", tensors)
    adapter(tmp_path / "second", half, lora_alpha=2)
    return lambda *names: {
        "base": str(tmp_path / "base"),
        "sources": [{"name": n, "model": str(tmp_path / n), "weight": 0.5} for n in names],
        "out_dtype": "float32",
    }


@pytest.mark.parametrize(
    ("names", "tile_bytes"),
    [
        (["first"], 1 << 20),
        (["first", "second"], 1 << 20),
        (["first", "full"], 1 << 20),
        (["first", "full"], 800),  # tiles that cut rows
        (["second"], 24 * 4 * 5),
    ],
)
def test_low_rank_products_are_formed_there(monkeypatch, adapted, tmp_path, names, tile_bytes):
    report = on_interpreter(monkeypatch, adapted(*names), tmp_path / "gpu", tile_bytes)
    merge(adapted(*names), tmp_path / "cpu")
    got, want = (load_file(tmp_path / n / "model.safetensors") for n in ("gpu", "cpu"))
    for name in want:
        assert torch.allclose(got[name], want[name], rtol=2e-6, atol=2e-6), name
    if names == ["first"]:  # bf16 base and factors: fewer bytes than the deltas in fp32
        assert report.bytes_read < 4 * (33 * 24 + 24 * 40)


def test_adapters_among_the_sources_of_a_method(monkeypatch, adapted, tmp_path):
    recipe = adapted("first", "second") | {"method": "ties", "parameters": {"density": 0.5}}
    on_interpreter(monkeypatch, recipe, tmp_path / "gpu")
    merge(recipe, tmp_path / "cpu")
    got, want = (load_file(tmp_path / n / "model.safetensors") for n in ("gpu", "cpu"))
    close = [torch.isclose(got[n], want[n], rtol=1e-5, atol=1e-5).double().mean() for n in want]
    assert min(close) > 0.99  # a last bit may decide which of two magnitudes is the larger


def test_the_device_is_part_of_what_decides_the_bytes_of_adapters(adapted, monkeypatch):
    from optimer_engine import cuda

    monkeypatch.setattr(cuda, "cuda", lambda *_: interpreted_gpu(monkeypatch))
    assert plan(adapted("first"), device="cuda").options == {"device": "cuda"}
    assert plan(adapted("full"), device="cuda").options == {}
    assert plan(adapted("first")).options == {}


def test_nan_is_found_by_the_kernels(monkeypatch, write_checkpoint, tmp_path):
    recipe = recipe_of(write_checkpoint, 1)
    bad = tensors()
    bad["norm"][3] = float("inf")
    recipe["sources"][0]["model"] = str(write_checkpoint("bad", bad))
    for method in ("task_arithmetic", "della"):
        with pytest.raises(NonFiniteError, match="norm holds NaN or infinity"):
            on_interpreter(monkeypatch, {**recipe, "method": method}, tmp_path / "never")
