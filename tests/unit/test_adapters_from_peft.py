"""Adapters as PEFT trains and saves them: in a search, and with a vocabulary that has grown."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from optimer_engine import OptimerError, merge, plan
from optimer_engine.search import SearchConfig, Vector, run_search

# PEFT still asks Transformers by an old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture
def base(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trained(base, out, seed, rows=None, **lora):
    """Train an adapter for three steps and save it; PEFT's own merge, by tensor."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], **lora))
    optimiser = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        wrapped(input_ids=IDS + seed, labels=IDS + seed).loss.backward()
        optimiser.step()
    wrapped.save_pretrained(out)
    return wrapped.merge_and_unload().state_dict()


def test_a_search_over_adapters(base, tmp_path):
    target = trained(base, tmp_path / "one", 1)
    trained(base, tmp_path / "two", 2)
    name = "model.layers.0.self_attn.q_proj.weight"
    seen = []

    def distance(model):
        seen.append(dict(model.state_dict())[name].clone())
        return float((seen[-1] - target[name]).abs().sum())

    vectors = [Vector(n, str(tmp_path / n)) for n in ("one", "two")]
    config = SearchConfig(base=str(base), vectors=vectors, trials=4)
    run_search(config, tmp_path / "run", objective=distance)
    lines = (tmp_path / "run" / "trials.jsonl").read_text().splitlines()
    weights = [json.loads(line).get("weights") for line in lines]
    assert {"one": 1.0, "two": 0.0} in weights
    best = load_file(tmp_path / "run" / "best" / "model.safetensors")
    assert torch.allclose(best[name], target[name], atol=1e-6)
    assert not torch.allclose(seen[0], seen[1])


def test_an_adapter_with_a_vocabulary_that_has_grown(base, tmp_path):
    expected = trained(
        base, tmp_path / "grown", 3, rows=48, modules_to_save=["embed_tokens", "lm_head"]
    )
    recipe = {"base": str(base), "sources": [{"name": "a", "model": str(tmp_path / "grown")}]}
    with pytest.raises(OptimerError, match=r"shape \[48, 16\], the base has \[40, 16\]"):
        plan(recipe)
    for rows, count in (("pad", 48), ("common", 40)):
        merge({**recipe, "rows": rows, "out_dtype": "float32"}, tmp_path / rows)
        found = load_file(tmp_path / rows / "model.safetensors")
        assert found["model.embed_tokens.weight"].shape == (count, 16)
        for name, tensor in found.items():
            cut = expected[name][: tensor.shape[0]]
            assert torch.allclose(tensor, cut, atol=1e-5), (rows, name)
        config = json.loads((tmp_path / rows / "config.json").read_text())
        assert config["vocab_size"] == count


def test_dora_is_refused_by_name(base, tmp_path):
    trained(base, tmp_path / "dora", 4, use_dora=True)
    with pytest.raises(OptimerError, match="DoRA"):
        plan({"base": str(base), "sources": [{"name": "a", "model": str(tmp_path / "dora")}]})
