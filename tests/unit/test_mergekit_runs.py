"""mergekit's files through `merge` and the program: outputs against formulas, adapters, options."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from optimer_engine import OptimerError, merge, plan, verify_output
from optimer_engine.cli import optimer
from tests.conftest import nearby

SHAPES = {
    "model.embed_tokens.weight": (40, 16),
    **{f"model.layers.{n}.self_attn.q_proj.weight": (16, 16) for n in range(3)},
    **{f"model.layers.{n}.mlp.up_proj.weight": (48, 16) for n in range(3)},
    "model.norm.weight": (16,),
    "lm_head.weight": (40, 16),
}


@pytest.fixture
def models(write_checkpoint):
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=generator).bfloat16() for n, s in SHAPES.items()}
    every = {"base": base, "a": nearby(base, 1, 0.1), "b": nearby(base, 2, 0.1)}
    config = {"num_hidden_layers": 3, "tie_word_embeddings": False}
    return every, {n: str(write_checkpoint(n, m, config)) for n, m in every.items()}


def test_a_file_with_filters_and_gradients(models, tmp_path):
    tensors, folders = models
    (tmp_path / "merge.yaml").write_text(f"""
merge_method: task_arithmetic
base_model: {folders["base"]}
models:
  - model: {folders["a"]}
    parameters:
      weight:
        - filter: self_attn
          value: [0.0, 1.0]
        - value: 0.25
  - model: {folders["b"]}
    parameters: {{weight: -0.5}}
dtype: float32
""")
    arguments = ["merge", str(tmp_path / "merge.yaml"), "-o", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(optimer, arguments)
    assert done.exit_code == 0, done.output
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, base in tensors["base"].items():
        weight = 0.25
        if "self_attn" in name:
            weight = int(name.split(".")[2]) / 2
        deltas = [tensors[m][name].double() - base.double() for m in "ab"]
        exact = base.double() + weight * deltas[0] - 0.5 * deltas[1]
        assert found[name].dtype == torch.float32
        assert torch.allclose(found[name].double(), exact, atol=1e-6), name
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["torch_dtype"] == "float32"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recipe"]["merge_method"] == "task_arithmetic"
    assert verify_output(tmp_path / "out", full=True)["recomputed"] == report["bytes_written"]
    dry = CliRunner().invoke(optimer, [*arguments[:2], "-o", str(tmp_path / "x"), "--dry-run"])
    assert "groups of tensors" in dry.output
    assert "base + 0.5*(a - base) - 0.5*(b - base)" in dry.output
    assert f"a = {folders['a']}" in dry.output


def test_layers_are_stacked(models, tmp_path):
    tensors, folders = models
    slices = [
        {"sources": [{"model": folders["a"], "layer_range": [0, 2]}]},
        {"sources": [{"model": folders["b"], "layer_range": [1, 3]}]},
    ]
    report = merge(
        {"merge_method": "passthrough", "slices": slices, "dtype": "bfloat16"}, tmp_path / "out"
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    for number, (model, layer) in enumerate([("a", 0), ("a", 1), ("b", 1), ("b", 2)]):
        for part in ("self_attn.q_proj", "mlp.up_proj"):
            ours = found[f"model.layers.{number}.{part}.weight"]
            assert torch.equal(ours, tensors[model][f"model.layers.{layer}.{part}.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4
    assert report.bytes_read == report.bytes_written


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "model_stock"])
def test_methods_agree_with_the_same_in_a_recipe(models, tmp_path, method):
    _, folders = models
    parameters = {"slerp": {"t": 0.25}, "ties": {"density": 0.5}}.get(method, {})
    weighted = {"parameters": {"weight": 0.5}} if method in ("linear", "ties") else {}
    names = ["b"] if method == "slerp" else ["a", "b"]
    config = {
        "merge_method": method,
        "base_model": folders["base"],
        "models": [{"model": folders[n], **weighted} for n in names],
        "parameters": parameters,
        "dtype": "float32",
    }
    if method == "slerp":
        config["models"].insert(0, {"model": folders["base"]})
    if method == "linear":
        del config["base_model"]
    merge(config, tmp_path / "theirs")
    weights = {"weight": 0.5} if weighted else {}
    sources = [{"name": n, "model": folders[n], **weights} for n in names]
    ours = {"base": folders["base"], "method": method, "sources": sources,
            "parameters": parameters, "out_dtype": "float32"}  # fmt: skip
    merge(ours, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / n / "model.safetensors") for n in ("theirs", "ours"))
    for name in SHAPES:
        assert torch.allclose(theirs[name], ours[name], atol=1e-6), name


def test_adapters_by_plus(models, tmp_path):
    tensors, folders = models
    torch.manual_seed(5)
    name = "model.layers.1.mlp.up_proj"
    a, b = torch.randn(4, 16), torch.randn(48, 4)
    lora = tmp_path / "lora"
    lora.mkdir()
    key = f"base_model.model.{name}.lora_"
    save_file({f"{key}A.weight": a, f"{key}B.weight": b}, lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 2}')
    delta = 0.5 * (b.double() @ a.double())
    weight = f"{name}.weight"
    for host, method in [("base", "task_arithmetic"), ("a", "task_arithmetic"), ("base", "ties")]:
        config = {
            "merge_method": method,
            "base_model": folders["base"],
            "models": [{"model": f"{folders[host]}+{lora}", "parameters": {"weight": 0.5}}],
            "parameters": {"normalize": False},
            "dtype": "float32",
        }
        merge(config, tmp_path / f"{host}-{method}")
        found = load_file(tmp_path / f"{host}-{method}" / "model.safetensors")
        for key, base in tensors["base"].items():
            moved = tensors[host][key].double() - base.double()
            moved = moved + delta if key == weight else moved
            exact = base.double() + 0.5 * moved
            assert torch.allclose(found[key].double(), exact, atol=1e-5), (host, key)
    config["models"][0]["model"] = f"{folders['base']}+{folders['a']}"
    with pytest.raises(OptimerError, match="is a model, not a LoRA adapter"):
        plan(config)


def test_compat_and_seed_are_asked_for_beside_the_file(models, tmp_path):
    _, folders = models
    config = {
        "merge_method": "dare_linear",
        "base_model": folders["base"],
        "models": [{"model": folders["a"], "parameters": {"weight": 1.0, "density": 0.5}}],
        "dtype": "float32",
    }
    outputs = {}
    asked = {"": {}, "seed": {"seed": 1}, "compat": {"compat": "mergekit"},
             "rounding": {"rounding": "stochastic"},
             "both": {"rounding": "stochastic", "seed": 1}}  # fmt: skip
    config["dtype"] = "bfloat16"
    for label, options in asked.items():
        merge(config, tmp_path / f"out{label}", **options)
        outputs[label] = (tmp_path / f"out{label}" / "model.safetensors").read_bytes()
        verify_output(tmp_path / f"out{label}", full=True)
    assert len(set(outputs.values())) == len(asked)


def test_stages_and_misspelt_keys_are_refused_by_their_name(models, tmp_path):
    _, folders = models
    (tmp_path / "multi.yaml").write_text("merge_method: linear\n---\nmerge_method: ties\n")
    with pytest.raises(OptimerError, match="multi"):
        merge(tmp_path / "multi.yaml", tmp_path / "out")
    with pytest.raises(OptimerError, match="base_modle"):
        merge({"merge_method": "ties", "base_modle": folders["base"]}, tmp_path / "out")
    made = plan({"merge_method": "passthrough", "models": [{"model": folders["a"]}]})
    with pytest.raises(OptimerError, match="a mergekit file has weights for each tensor"):
        made.with_weights({"a": 1})
