"""`plan.iter_tensors()`: the folder's tensors, one by one, for code that loads them piecewise."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from optimer_engine import OptimerError, iteration, merge, plan
from tests.conftest import nearby, random_tensors


@pytest.fixture
def recipe(write_checkpoint):
    base = random_tensors(0)
    ja = write_checkpoint("ja", nearby(base, 1))
    sources = [{"name": "ja", "model": str(ja), "weight": 0.5}]
    return {"base": str(write_checkpoint("base", base)), "sources": sources}


@pytest.mark.parametrize("ahead", [1, 3000, 64 << 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_tensor_once_in_the_outputs_order(recipe, tmp_path, monkeypatch, ahead, threads):
    monkeypatch.setattr(iteration, "AHEAD_BYTES", ahead)
    merge(recipe, tmp_path / "out")
    expected = load_file(tmp_path / "out" / "model.safetensors")
    made = list(plan(recipe, threads=threads, mem_limit="400kB").iter_tensors())
    assert [name for name, _ in made] == [row.out.name for row in plan(recipe).rows]
    assert {name for name, _ in made} == expected.keys()
    for name, tensor in made:
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name])


def test_a_consumer_may_stop_early_and_errors_reach_it(recipe, write_checkpoint):
    for name, _ in plan(recipe).iter_tensors():
        assert name == "lm_head.weight"
        break
    poisoned = random_tensors(0)
    poisoned["model.norm.weight"][3] = float("nan")
    recipe["sources"][0]["model"] = str(write_checkpoint("bad", poisoned))
    with pytest.raises(OptimerError, match=r"model\.norm\.weight holds NaN"):
        list(plan(recipe).iter_tensors())


def test_a_model_is_loaded_piecewise(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(tmp_path / str(seed))
        folders.append(str(tmp_path / str(seed)))
    model = LlamaForCausalLM(config)
    recipe = {"base": folders[0], "sources": [{"name": "one", "model": folders[1]}]}
    for name, tensor in plan(recipe).iter_tensors():
        assert not model.load_state_dict({name: tensor}, strict=False).unexpected_keys
    other = LlamaForCausalLM.from_pretrained(folders[1])
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
