"""Weights by group of layers, in a recipe: each group of tensors is merged with its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from optimer_engine import merge, plan
from optimer_engine.errors import RecipeError
from optimer_engine.recipe import Recipe

NAMES = {
    "model.embed_tokens.weight": 0,
    "model.layers.0.mlp.weight": 0,
    "model.layers.1.mlp.weight": 0,
    "model.layers.2.mlp.weight": 1,
    "model.norm.weight": 1,
    "lm_head.weight": 1,
}
"""Of three layers in two groups, the first gets two."""


@pytest.fixture
def recipe(write_checkpoint: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    models = [{n: torch.randn(4, 3) for n in NAMES} for _ in range(3)]
    folders = [
        str(write_checkpoint(f"m{i}", tensors, config={"vocab_size": 5}))
        for i, tensors in enumerate(models)
    ]
    return {
        "base": folders[0],
        "sources": [
            {"name": "a", "model": folders[1], "weight": 0.5, "by_layer": [1.0, 0.4]},
            {"name": "b", "model": folders[2], "weight": 0.3},
        ],
    }


def tensors(folder: Path | str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {k: v for p in Path(folder).glob("*.safetensors") for k, v in load_file(p).items()}


def test_each_group_of_layers_gets_its_weight(recipe: dict[str, Any], tmp_path: Path) -> None:
    merge(recipe, tmp_path / "out")
    base, a, b = (tensors(m) for m in (recipe["base"], *(s["model"] for s in recipe["sources"])))
    found = tensors(tmp_path / "out")
    for name, group in NAMES.items():
        w = 0.5 * [1.0, 0.4][group]
        wanted = base[name] + w * (a[name] - base[name]) + 0.3 * (b[name] - base[name])
        assert torch.allclose(found[name], wanted, atol=1e-6), name


def test_a_recipe_with_factors_by_layer_is_written_and_read_back(recipe: dict[str, Any]) -> None:
    loaded = Recipe.load(recipe)
    assert loaded.layer_groups == 2
    text = loaded.to_yaml()
    assert "by_layer:\n  - 1.0\n  - 0.4\n" in text.replace("    -", "  -").replace("    by", "by")
    assert text.count("by_layer") == 1


def test_a_plan_takes_other_factors(recipe: dict[str, Any], tmp_path: Path) -> None:
    from optimer_engine.folder_sink import FolderSink

    made = plan(recipe)
    other = dict(recipe, sources=[dict(s) for s in recipe["sources"]])
    other["sources"][0] |= {"weight": 1.0, "by_layer": [0.0, 0.7]}
    made.with_settings(Recipe.load(other)).run(FolderSink(tmp_path / "live"))
    merge(other, tmp_path / "fresh")
    live, fresh = tensors(tmp_path / "live"), tensors(tmp_path / "fresh")
    assert all(torch.equal(live[n], fresh[n]) for n in NAMES)
    other["sources"][0]["by_layer"] = [1.0, 1.0, 1.0]
    with pytest.raises(RecipeError, match="layer groups are 3, the plan was made for 2"):
        made.with_settings(Recipe.load(other))


def test_groups_that_cannot_be_are_refused(recipe: dict[str, Any]) -> None:
    recipe["sources"][1]["by_layer"] = [1.0] * 3
    with pytest.raises(RecipeError, match="other lengths for other sources"):
        plan(recipe)
    recipe["sources"][0]["by_layer"] = recipe["sources"][1]["by_layer"] = [1.0] * 4
    with pytest.raises(RecipeError, match="4 groups of layers, and the base has 3 layers"):
        plan(recipe)
    recipe["sources"][0]["by_layer"] = [float("nan")]
    with pytest.raises(RecipeError, match="finite"):
        plan(recipe)
