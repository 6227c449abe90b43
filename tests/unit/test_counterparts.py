"""Text-only sources in a multimodal base and the other way round, in a recipe, by their names."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny_models import make
from optimer_engine import extract, merge, plan
from optimer_engine.errors import MismatchError
from tests.conftest import nearby

TEXT = {
    "embed_tokens.weight": (20, 8),
    "layers.0.mlp.weight": (8, 12),
    "layers.1.mlp.weight": (8, 12),
    "norm.weight": (8,),
}
TOWER = {"vision_tower.vision_model.layers.0.weight": (4, 6), "multi_modal_projector.w": (6, 8)}
CONFIG = {
    "text": {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]},
    "multimodal": {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
                   "text_config": {"model_type": "gemma3_text"}},
}  # fmt: skip


def named(tensors, prefix, tower=""):
    return {(tower if n in TOWER else prefix) + n: t for n, t in tensors.items()}


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)
    shapes = {**TEXT, **TOWER}
    base = {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}
    return base, nearby(base, 1, 0.1)


def text_of(tensors):
    return {n: t for n, t in tensors.items() if n in TEXT}


def recipe(base, source, **more):
    return {"base": str(base), "sources": [{"name": "ja", "model": str(source), "weight": 0.5}],
            "out_dtype": "float32", **more}  # fmt: skip


@pytest.mark.parametrize(
    ("prefix", "tower"),
    [("language_model.model.", ""), ("model.language_model.", "model.")],
)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "slerp", "linear"])
def test_a_text_only_source_moves_the_text_of_a_multimodal_base(
    write_checkpoint, parts, tmp_path, prefix, tower, method
):
    base, other = parts
    whole = write_checkpoint("whole", named(base, prefix, tower), CONFIG["multimodal"])
    text = write_checkpoint("text", named(text_of(other), "model."), CONFIG["text"])
    more = {"method": method}
    if method == "slerp":
        more["parameters"] = {"t": 0.5}
    given = recipe(whole, text, **more)
    if method == "slerp":
        del given["sources"][0]["weight"]
    if method == "linear":
        given["parameters"] = {"normalize": False}
    report = merge(given, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == named(base, prefix, tower).keys()
    for name, tensor in base.items():
        merged = found[(tower if name in TOWER else prefix) + name]
        if name in TOWER:
            assert torch.equal(merged, tensor.float()), name
        elif method == "task_arithmetic":
            exact = tensor.double() + 0.5 * (other[name].double() - tensor.double())
            assert torch.allclose(merged.double(), exact, atol=1e-6), name
        else:
            assert not torch.equal(merged, tensor.float()), name
    assert any("matched without their prefix" in warning for warning in report.warnings)
    assert any("multi_modal_projector, vision_tower stay" in warning for warning in report.warnings)


def test_the_text_of_a_multimodal_source_moves_a_text_only_base(write_checkpoint, parts, tmp_path):
    base, other = parts
    text = write_checkpoint("text", named(text_of(base), "model."), CONFIG["text"])
    whole = write_checkpoint(
        "whole", named(other, "model.language_model.", "model."), CONFIG["multimodal"]
    )
    report = merge(recipe(text, whole), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == named(text_of(base), "model.").keys()
    exact = (base["norm.weight"].double() + other["norm.weight"].double()) / 2
    assert torch.allclose(found["model.norm.weight"].double(), exact, atol=1e-6)
    assert any("left out, as the base is text only" in w for w in report.warnings)


def test_layouts_of_two_versions_and_a_vector_of_the_text(write_checkpoint, parts, tmp_path):
    base, other = parts
    old = write_checkpoint("old", named(base, "language_model.model."), CONFIG["multimodal"])
    new = write_checkpoint(
        "new", named(other, "model.language_model.", "model."), CONFIG["multimodal"]
    )
    merge(recipe(old, new), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in base:
        exact = (base[name].double() + other[name].double()) / 2
        merged = found[("" if name in TOWER else "language_model.model.") + name]
        assert torch.allclose(merged.double(), exact, atol=1e-6)
    text = write_checkpoint("text", named(text_of(other), "model."), CONFIG["text"])
    extract(old, text, tmp_path / "vector")
    vector = load_file(tmp_path / "vector" / "vector.safetensors")
    assert vector.keys() == named(text_of(base), "language_model.model.").keys()
    merge(recipe(old, tmp_path / "vector"), tmp_path / "by_vector")
    merge(recipe(old, text), tmp_path / "by_model")
    files = [tmp_path / n / "model.safetensors" for n in ("by_vector", "by_model")]
    ours, theirs = map(load_file, files)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-7) for name in ours)


def test_what_could_be_meant_in_two_ways_is_refused(write_checkpoint, parts):
    base, other = parts
    twice = named(base, "language_model.model.") | {"model.norm.weight": torch.ones(8).bfloat16()}
    both = write_checkpoint("both", twice, CONFIG["multimodal"])
    moved = write_checkpoint("moved", named(other, "transformer."), CONFIG["multimodal"])
    with pytest.raises(MismatchError, match="may stand for"):
        plan(recipe(both, moved))
    whole = write_checkpoint("whole", named(base, "language_model.model."), CONFIG["multimodal"])
    source = write_checkpoint(
        "source", named(other, "language_model.model.") | {"model.norm.weight": torch.ones(8)},
        CONFIG["multimodal"],
    )  # fmt: skip
    with pytest.raises(MismatchError, match="both stand for"):
        plan(recipe(whole, source))
    stranger = {**CONFIG["text"], "model_type": "qwen3"}
    text = write_checkpoint("text", named(text_of(other), "model."), stranger)
    with pytest.raises(MismatchError, match="model_type 'qwen3', the base has 'gemma3'"):
        plan(recipe(whole, text))
    halved = write_checkpoint(
        "halved", named({"norm.weight": other["norm.weight"]}, "model."), CONFIG["text"]
    )
    with pytest.raises(MismatchError, match=r"lacks language_model\.model\.embed_tokens\.weight"):
        plan(recipe(whole, halved))


def test_an_adapter_of_the_text_alone(write_checkpoint, parts, tmp_path):
    base, _ = parts
    whole = write_checkpoint("whole", named(base, "language_model.model."), CONFIG["multimodal"])
    lora = tmp_path / "lora"
    lora.mkdir()
    a, b = torch.randn(2, 12), torch.randn(8, 2)
    key = "base_model.model.model.layers.1.mlp.lora_"
    save_file({f"{key}A.weight": a, f"{key}B.weight": b}, lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    for method, parameters in (("task_arithmetic", {}), ("slerp", {"t": 0.5})):
        given = recipe(whole, lora, method=method, parameters=parameters)
        if method == "slerp":
            del given["sources"][0]["weight"]
        merge(given, tmp_path / method)
        found = load_file(tmp_path / method / "model.safetensors")
        for name, tensor in named(base, "language_model.model.").items():
            moved = not torch.equal(found[name], tensor.float())
            assert moved == ("layers.1" in name), name
    exact = base["layers.1.mlp.weight"].double() + 0.5 * (b.double() @ a.double())
    found = load_file(tmp_path / "task_arithmetic" / "model.safetensors")
    merged = found["language_model.model.layers.1.mlp.weight"]
    assert torch.allclose(merged.double(), exact, atol=1e-5)


def test_gemma_3_as_transformers_saves_it(tmp_path):
    """The text part of a real layout, saved by itself, merged back into the whole."""
    import transformers

    whole, (tuned, _), _ = make("gemma3, vision", tmp_path / "models", 2)
    text = tmp_path / "text"
    text.mkdir()
    moved = {
        "model." + name.split("language_model.")[-1].removeprefix("model."): tensor
        for name, tensor in load_file(tuned / "model.safetensors").items()
        if "language_model" in name
    }
    save_file(moved, text / "model.safetensors", {"format": "pt"})
    inner = json.loads((whole / "config.json").read_text())["text_config"]
    said = {**inner, "architectures": ["Gemma3ForCausalLM"]}
    (text / "config.json").write_text(json.dumps(said))
    _, loading = transformers.Gemma3ForCausalLM.from_pretrained(text, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    merge(recipe(whole, text, out_dtype="bfloat16"), tmp_path / "out")
    kind = transformers.Gemma3ForConditionalGeneration
    _, loading = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    merged, base = (load_file(f / "model.safetensors") for f in (tmp_path / "out", whole))
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert changed == {name for name in base if "language_model" in name}
