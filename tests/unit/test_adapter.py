"""LoRA adapters as sources: PEFT's own merge is the oracle, and bits do not depend on tiling."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from optimer_engine import Checkpoint, FolderSink, OptimerError, merge, plan

PREFIX = "base_model.model."


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(50, 24),
        "model.layers.0.q.weight": torch.randn(33, 24),
        "model.layers.0.c.weight": torch.randn(24, 40),
        "model.norm.weight": torch.randn(24),
    }
    folder = tmp_path / "base"
    folder.mkdir()
    save_file({k: v.bfloat16() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"tie_word_embeddings": true}')
    return folder


def adapter(folder, tensors, **config):
    folder.mkdir()
    save_file({PREFIX + k: v for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def factors(module, out, in_, rank=4, dtype=torch.float32, seed=1):
    torch.manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, in_).to(dtype),
        f"{module}.lora_B.weight": torch.randn(out, rank).to(dtype),
    }


def merged(base, out, *adapters, **options):
    sources = [{"name": str(i), "model": str(a), "weight": w} for i, (a, w) in enumerate(adapters)]
    recipe = {"base": str(base), "sources": sources, "out_dtype": "float32"}
    made = replace(plan(recipe), **options) if options else plan(recipe)
    made.run(FolderSink(out))
    return load_file(out / "model.safetensors")


def test_the_delta_is_scale_times_b_a_for_every_way_to_state_scale(base, tmp_path):
    before = load_file(base / "model.safetensors")
    q = factors("model.layers.0.q", 33, 24)
    a, b = (
        q["model.layers.0.q.lora_A.weight"].double(),
        q["model.layers.0.q.lora_B.weight"].double(),
    )
    for number, (config, scale) in enumerate(
        [
            ({}, 2.0),
            ({"use_rslora": True}, 4.0),
            ({"alpha_pattern": {"q": 3}}, 0.75),
            ({"alpha_pattern": {"layers.1.q": 3}}, 2.0),
            ({"r": 9, "rank_pattern": {"layers.0.q": 4}}, 2.0),
        ]
    ):
        folder = adapter(tmp_path / f"a{number}", q, **config)
        after = merged(base, tmp_path / f"out{number}", (folder, 0.3))
        name = "model.layers.0.q.weight"
        exact = before[name].double() + 0.3 * scale * (b @ a)
        assert (after[name].double() - exact).abs().max() < 1e-5
        for other in before.keys() - {name}:
            assert torch.equal(after[other], before[other].float())


def test_embeddings_conv1d_and_tensors_trained_whole(base, tmp_path):
    before = load_file(base / "model.safetensors")
    torch.manual_seed(3)
    tensors = {
        "model.embed_tokens.lora_embedding_A": torch.randn(4, 50),
        "model.embed_tokens.lora_embedding_B": torch.randn(24, 4),
        "model.norm.weight": torch.randn(24),
    }
    after = merged(base, tmp_path / "out", (adapter(tmp_path / "a", tensors), 0.5))
    delta = (tensors["model.embed_tokens.lora_embedding_B"].double()
             @ tensors["model.embed_tokens.lora_embedding_A"].double()).T  # fmt: skip
    exact = before["model.embed_tokens.weight"].double() + 0.5 * 2 * delta
    assert (after["model.embed_tokens.weight"].double() - exact).abs().max() < 1e-5
    norm = before["model.norm.weight"].double()
    exact = norm + 0.5 * (tensors["model.norm.weight"].double() - norm)
    assert (after["model.norm.weight"].double() - exact).abs().max() < 1e-6

    conv = factors("model.layers.0.c", 40, 24)  # Conv1D keeps its weight as [in, out]
    folder = adapter(tmp_path / "conv", conv, fan_in_fan_out=True)
    after = merged(base, tmp_path / "out2", (folder, 1.0))
    a, b = (conv[f"model.layers.0.c.lora_{x}.weight"].double() for x in "AB")
    exact = before["model.layers.0.c.weight"].double() + 2 * (b @ a).T
    assert (after["model.layers.0.c.weight"].double() - exact).abs().max() < 1e-5


@pytest.mark.parametrize("tile_bytes", [64, 100, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_do_not_depend_on_tiles_or_threads(base, tmp_path, tile_bytes, dtype):
    one = adapter(tmp_path / "one", factors("model.layers.0.q", 33, 24, dtype=dtype))
    two = adapter(tmp_path / "two", factors("model.layers.0.q", 33, 24, dtype=dtype, seed=2))
    whole = merged(base, tmp_path / "whole", (one, 0.4), (two, -0.7))
    cut = merged(base, tmp_path / "cut", (one, 0.4), (two, -0.7), tile_bytes=tile_bytes, threads=3)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert len(report["fingerprints"]) == 3


def test_adapters_that_are_no_sum_of_low_rank_deltas_are_refused(base, tmp_path):
    q = factors("model.layers.0.q", 33, 24)
    lone = {k: v for k, v in q.items() if "lora_A" in k}
    cases = [
        (q, {"use_dora": True}, "DoRA"),
        (q, {"peft_type": "IA3"}, "LORA expected"),
        (q, {"r": 8}, "rank 4, adapter_config.json says 8"),
        (lone, {}, "has factor A alone"),
        (factors("model.layers.0.q", 32, 24), {}, r"shape \[32, 24\], the base has \[33, 24\]"),
        (factors("model.layers.7.q", 33, 24), {}, "model.layers.7.q.weight, which the base lacks"),
    ]
    for number, (tensors, config, words) in enumerate(cases):
        folder = adapter(tmp_path / f"bad{number}", tensors, **config)
        with pytest.raises(OptimerError, match=words):
            plan({"base": str(base), "sources": [{"name": "x", "model": str(folder)}]})
    with pytest.raises(OptimerError, match="is a LoRA adapter, not a model"):
        plan({"base": str(folder), "sources": [{"name": "x", "model": str(folder)}]})


# PEFT still asks Transformers by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_it_is_what_peft_merges(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    lora = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj", "embed_tokens"],
        modules_to_save=["lm_head"], init_lora_weights=False, use_rslora=True,
    )  # fmt: skip
    wrapped = get_peft_model(model, lora)
    with torch.no_grad():
        wrapped.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    expected = wrapped.merge_and_unload().state_dict()
    sources = [{"name": "lora", "model": str(tmp_path / "adapter")}]
    merge({"base": str(tmp_path / "base"), "sources": sources}, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name
    assert not np.array_equal(
        found["lm_head.weight"],
        load_file(tmp_path / "base" / "model.safetensors")["lm_head.weight"],
    )


def test_the_adapter_kind_is_seen(base, tmp_path):
    folder = adapter(tmp_path / "a", factors("model.layers.0.q", 33, 24))
    with Checkpoint.open(folder) as opened:
        assert opened.kind == "adapter_model"
        assert opened.config["r"] == 4
