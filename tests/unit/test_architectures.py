"""Whole models of real architectures: biases, q/k norms, experts, tied heads, a vision tower."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.tiny_models import FAMILIES, make
from optimer_engine import merge


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_merged_and_transformers_loads_all_of_it(family, tmp_path):
    import transformers

    base, (one, two), _ = make(family, tmp_path / "models", 2)
    weights = {"one": (one, 0.4), "two": (two, -0.3)}
    native = {
        "base": str(base),
        "sources": [
            {"name": n, "model": str(folder), "weight": w} for n, (folder, w) in weights.items()
        ],
    }
    mergekit = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [
            {"model": str(folder), "parameters": {"weight": w}} for folder, w in weights.values()
        ],
    }
    merge(native, tmp_path / "native")
    merge(mergekit, tmp_path / "mergekit")
    found = load_file(tmp_path / "native" / "model.safetensors")
    inputs = [load_file(folder / "model.safetensors") for folder in (base, one, two)]
    assert found.keys() == inputs[0].keys()
    for name, tensor in found.items():
        start, first, second = (tensors[name].double() for tensors in inputs)
        exact = start + 0.4 * (first - start) - 0.3 * (second - start)
        assert torch.allclose(tensor.double(), exact, rtol=2**-8, atol=1e-7), name
    theirs = load_file(tmp_path / "mergekit" / "model.safetensors")
    assert theirs.keys() == found.keys()
    assert all(torch.equal(theirs[name], found[name]) for name in found)

    said = json.loads((tmp_path / "native" / "config.json").read_text())["architectures"][0]
    model, loading = getattr(transformers, said).from_pretrained(
        tmp_path / "native", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
    with torch.no_grad():
        logits = model(input_ids=torch.arange(8)[None]).logits
    assert logits.isfinite().all()
