"""Every method from files to a folder: what `merge_arrays` gives, whatever tiles and threads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from optimer_engine import FolderSink, OptimerError, merge, methods, plan, verify_output
from optimer_engine.errors import OutputError
from tests.conftest import nearby

SHAPES = {"model.a": (301, 257), "model.b": (70_003,), "model.c": (1,), "model.d": (64, 2048)}
CASES = {
    "linear": {"normalize": True},
    "task_arithmetic": {"lambda": 0.5, "normalize": True},
    "ties": {"density": 0.4},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.1},
    "della_linear": {"density": 0.5, "epsilon": 0.1},
    "breadcrumbs": {"density": 0.6, "gamma": 0.02},
    "breadcrumbs_ties": {"density": 0.6, "gamma": 0.02},
    "sce": {"select_topk": 0.5},
    "slerp": {"t": 0.3},
    "nuslerp": {},
    "multislerp": {},
    "karcher": {},
    "model_stock": {},
    "arcee_fusion": {},
    "nearswap": {"t": 0.001},
}
SOURCES = {"slerp": 1, "nearswap": 1, "arcee_fusion": 1}


@pytest.fixture
def models(write_checkpoint):
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=generator).bfloat16() for n, s in SHAPES.items()}
    all_models = [base, *(nearby(base, seed, 0.1) for seed in (1, 2, 3))]
    folders = [str(write_checkpoint(f"m{i}", m)) for i, m in enumerate(all_models)]
    return all_models, folders


def recipe_for(method, folders):
    count = SOURCES.get(method, 2 if method == "nuslerp" else 3)
    weighted = "weight" in methods.get(method).parameters
    sources = [
        {"name": f"s{i}", "model": folders[i], **({"weight": 0.2 + 0.1 * i} if weighted else {})}
        for i in range(1, count + 1)
    ]
    return {"base": folders[0], "method": method, "parameters": CASES[method], "sources": sources}


@pytest.mark.parametrize("method", sorted(CASES))
def test_folders_are_merged_as_arrays_are_for_any_tiles_and_threads(models, tmp_path, method):
    tensors, folders = models
    recipe = recipe_for(method, folders)
    kind = methods.get(method)
    per_source = [
        {k: v for k, v in {"weight": s.get("weight"), "stream": s["name"]}.items()
         if k in kind.parameters}
        for s in recipe["sources"]
    ]  # fmt: skip
    outputs = []
    for number, (tile_bytes, threads) in enumerate([(1, 1), (2**17, 3), (2**22, 2)]):
        made = replace(plan(recipe, threads=threads), tile_bytes=tile_bytes)
        made.run(FolderSink(tmp_path / str(number)))
        outputs.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]
    found = load_file(tmp_path / "0" / "model.safetensors")
    for name in SHAPES:
        inputs = [model[name] for model in tensors[: len(per_source) + 1]]
        expected = methods.merge_arrays(
            method, inputs[0], inputs[1:], CASES[method], per_source, name=name
        )
        assert torch.equal(found[name], expected), name
    assert any(not torch.equal(found[n], tensors[0][n]) for n in SHAPES)


@pytest.mark.parametrize("method", ["ties", "della", "karcher"])
def test_an_interrupted_merge_with_statistics_is_continued(models, tmp_path, method):
    recipe = recipe_for(method, models[1])
    recipe["max_shard_size"] = "150kB"
    merge(recipe, tmp_path / "whole")

    class Stops(FolderSink):
        left = 3

        def write_run(self, run, start, tile):
            self.left -= 1
            if self.left < 0:
                raise OutputError("disk full")
            super().write_run(run, start, tile)
            self._settle(1)

    with pytest.raises(OutputError):
        plan(recipe, threads=1).run(Stops(tmp_path / "out"))
    assert (tmp_path / "out.partial").exists()
    merge(recipe, tmp_path / "out")
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert verify_output(tmp_path / "out", full=True)["recomputed"] > 0


def test_a_mask_does_not_depend_on_the_other_sources(models, tmp_path):
    recipe = recipe_for("dare_linear", models[1])
    alone = {**recipe, "sources": recipe["sources"][2:]}
    merge(alone, tmp_path / "alone")
    for source in recipe["sources"][:2]:
        source["weight"] = 0.0
    merge(recipe, tmp_path / "zeros")
    files = [tmp_path / name / "model.safetensors" for name in ("alone", "zeros")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_plan_promises_the_memory_of_statistics(models):
    recipe = recipe_for("ties", models[1])
    plain = {**recipe, "method": "task_arithmetic", "parameters": {}}
    assert plan(recipe).projected_mem_bytes > plan(plain).projected_mem_bytes
    with pytest.raises(MemoryError, match="the limit is 500 kB"):
        plan(recipe, mem_limit="500kB")


def test_parameters_are_checked_before_anything_is_read(models):
    recipe = recipe_for("ties", models[1])
    for change, words in [
        ({"method": "tise"}, "did you mean 'ties'"),
        ({"parameters": {"densty": 0.5}}, "has no parameter 'densty'"),
        ({"parameters": {"density": 1.5}}, "outside 0 to 1"),
        ({"method": "nuslerp", "parameters": {}}, "takes 2 sources beside the base, got 3"),
    ]:
        with pytest.raises(OptimerError, match=words):
            plan({**recipe, **change})


def test_a_method_of_ones_own_streams_like_the_others(models, tmp_path):
    tensors, folders = models

    @methods.elementwise("half_clipped", deltas=True)
    def half_clipped(base, deltas, *, weight: list[float], limit: float = 1e-3):
        """The sum of deltas, clipped."""
        return sum(w * d for w, d in zip(weight, deltas, strict=True)).clip(-limit, limit)

    recipe = {**recipe_for("ties", folders), "method": "half_clipped"}
    recipe["parameters"] = {"limit": 0.05}
    merge(recipe, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, base in tensors[0].items():
        moved = sum(
            s["weight"] * (tensors[i + 1][name].float() - base.float())
            for i, s in enumerate(recipe["sources"])
        )
        exact = (base.float() + moved.clip(-0.05, 0.05)).bfloat16()
        assert torch.allclose(found[name].float(), exact.float(), rtol=2**-7)
