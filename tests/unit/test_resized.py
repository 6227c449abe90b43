"""Vocabularies of other sizes: refused, or merged by the rule that was asked for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from optimer_engine import FolderSink, OptimerError, merge, plan


def tensors(rows, seed, dtype=torch.bfloat16):
    torch.manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(rows, 12).to(dtype),
        "model.norm.weight": torch.randn(12).to(dtype),
        "lm_head.weight": torch.randn(rows, 12).to(dtype),
    }


@pytest.fixture
def make(write_checkpoint):
    def recipe(sizes, dtypes=None, **more):
        dtypes = dtypes or [torch.bfloat16] * len(sizes)
        models = [tensors(n, i, d) for i, (n, d) in enumerate(zip(sizes, dtypes, strict=True))]
        config = {"vocab_size": sizes[0]}
        folders = [write_checkpoint(f"m{i}", m, config) for i, m in enumerate(models)]
        sources = [
            {"name": f"m{i}", "model": str(f), "weight": 0.25 * i}
            for i, f in enumerate(folders) if i
        ]  # fmt: skip
        return {"base": str(folders[0]), "sources": sources, **more}, models

    return recipe


def expected(models, name, rows, beyond):
    base = torch.zeros(rows, 12, dtype=torch.float64)
    own = models[0][name].double()
    base[: len(own)] = own[:rows]
    if beyond is not None:
        base[len(own) :] = models[beyond][name].double()[len(own) : rows]
    total = base.clone()
    for i, model in enumerate(models[1:], start=1):
        theta = model[name].double()[:rows]
        total[: len(theta)] += 0.25 * i * (theta - base[: len(theta)])
    return total


@pytest.mark.parametrize("tile_bytes", [30, 4096])
@pytest.mark.parametrize(
    ("rule", "sizes", "rows", "beyond"),
    [
        ("common", [20, 17, 23], 20, None),
        ("pad", [20, 17, 23], 23, 2),
        ("pad", [20, 25, 23], 25, 1),
        ("pad", [20, 17, 18], 20, None),
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_the_rule_decides_which_rows_there_are(
    make, tmp_path, tile_bytes, rule, sizes, rows, beyond, mixed
):
    dtypes = [torch.bfloat16, torch.float32, torch.float16] if mixed else None
    recipe, models = make(sizes, dtypes, rows=rule, out_dtype="float32")
    replace(plan(recipe), tile_bytes=tile_bytes).run(FolderSink(tmp_path / "out"))
    out = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.allclose(out[name].double(), expected(models, name, rows, beyond), atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == rows


def test_other_sizes_are_refused_unless_a_rule_is_given(make, tmp_path):
    recipe, _ = make([20, 17])
    with pytest.raises(OptimerError, match=r"shape \[17, 12\], the base has \[20, 12\]"):
        merge(recipe, tmp_path / "out")
    recipe["rows"] = "by_luck"
    with pytest.raises(OptimerError, match="by_luck"):
        plan(recipe)
