"""Checkpoints as they are found: prefixes, tied heads, other parts, extra and missing tensors."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from optimer_engine.checkpoint import Checkpoint
from optimer_engine.errors import MismatchError, RecipeError
from optimer_engine.mergekit import expand, load
from optimer_engine.types import DType
from tests.unit.test_mergekit_recipes import write_llama


def expanded(recipe):
    config = load(recipe)
    checkpoints = {model: Checkpoint.open(model.path) for model in config.models()}
    try:
        return expand(config, checkpoints)
    finally:
        for checkpoint in checkpoints.values():
            checkpoint.close()


def soup(*folders, **keys):
    models = [{"model": str(f), "parameters": {"weight": 1.0}} for f in folders]
    return expanded({"merge_method": "linear", "models": models, **keys})


def rewrite(folder, change, config=None):
    """Replace a checkpoint's tensors by change(tensors), and keys of its config.json."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    if config is not None:
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**data, **config}))
    return folder


def without(*names):
    return lambda tensors: {k: v for k, v in tensors.items() if k not in names}


def with_extra(**extra):
    return lambda tensors: {**tensors, **{k.replace("__", "."): v for k, v in extra.items()}}


def names(found):
    return {row.name: row for row in found.rows}


def test_tensors_that_no_table_knows_are_merged(tmp_path):
    extra = {"model__layers__0__memory__gate": np.ones(3, np.float32),
             "model__new_part": np.ones((2, 2), np.float32)}  # fmt: skip
    folders = [rewrite(write_llama(tmp_path / n, 2), with_extra(**extra)) for n in "ab"]
    rows = names(soup(*folders))
    for name in ("model.layers.0.memory.gate", "model.new_part"):
        assert len(rows[name].sources) == 2


def test_all_missing_tensors_and_wrong_shapes_at_once(tmp_path):
    a, b, c = (write_llama(tmp_path / n, 2) for n in "abc")
    rewrite(b, without("model.norm.weight", "model.layers.1.mlp.up_proj.weight"))
    rewrite(c, lambda t: {**t, "model.norm.weight": np.ones(17, np.float32)})
    with pytest.raises(MismatchError) as caught:
        soup(a, b, c)
    for part in (f"{b} lacks model.norm.weight", f"{b} lacks model.layers.1.mlp.up_proj.weight"):
        assert part in caught.value.what
    rewrite(b, lambda t: load_file(a / "model.safetensors"))
    with pytest.raises(MismatchError, match=r"model.norm.weight has shape \[17\], \[16\] expected"):
        soup(a, b, c)


def test_a_tensor_that_only_one_has_is_named(tmp_path):
    a, b = (write_llama(tmp_path / n, 1) for n in "ab")
    rewrite(b, with_extra(model__bonus=np.ones(3, np.float32)))
    with pytest.raises(MismatchError, match=f"{a} lacks model.bonus"):
        soup(a, b)


def test_other_vocabularies_are_refused_and_the_remedy_named(tmp_path):
    a, b = write_llama(tmp_path / "a", 1), write_llama(tmp_path / "b", 1, vocab=40)
    with pytest.raises(MismatchError, match="tokenizer_source: union aligns rows"):
        soup(a, b)


def test_a_tied_head_is_written_by_none(tmp_path):
    a, b = (write_llama(tmp_path / n, 1, head=False) for n in "ab")
    found = soup(a, b)
    assert "lm_head.weight" not in names(found)
    assert found.config["tie_word_embeddings"] is True
    rewrite(b, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].copy()})
    found = soup(a, b)
    assert "lm_head.weight" not in names(found)
    assert any("lm_head.weight is not written" in warning for warning in found.warnings)


def test_a_tied_and_an_untied_head_make_an_untied_one(tmp_path):
    tied, untied = write_llama(tmp_path / "a", 1, head=False), write_llama(tmp_path / "b", 1)
    found = soup(tied, untied)
    row = names(found)["lm_head.weight"]
    assert [ref.name for ref in row.sources] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert found.config["tie_word_embeddings"] is False
    assert found.config_changes == {"tie_word_embeddings": False}
    assert soup(untied, tied).config_changes == {}
    rewrite(tied, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1})
    row = names(soup(tied, untied))["lm_head.weight"]
    assert [ref.name for ref in row.sources] == ["lm_head.weight"] * 2


def test_a_stored_head_is_kept_where_only_a_default_ties_it(tmp_path):
    folders = [write_llama(tmp_path / n, 1) for n in "ab"]
    for folder in folders:
        data = json.loads((folder / "config.json").read_text())
        del data["tie_word_embeddings"]
        (folder / "config.json").write_text(json.dumps(data))
    found = soup(*folders)
    assert "lm_head.weight" in names(found)
    assert found.config_changes == {}


def test_buffers_that_old_versions_stored_are_left_out(tmp_path):
    a, b = (write_llama(tmp_path / n, 1) for n in "ab")
    rewrite(a, with_extra(model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(4, np.float32)))
    found = soup(a, b)
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in names(found)
    assert any("buffers" in warning for warning in found.warnings)


def test_what_is_not_floating_point_must_be_equal(tmp_path):
    a, b = (write_llama(tmp_path / n, 1) for n in "ab")
    for folder in (a, b):
        rewrite(folder, with_extra(model__ids=np.arange(4)))
    row = names(soup(a, b, dtype="bfloat16"))["model.ids"]
    assert (row.method, row.dtype, row.base.name, len(row.sources)) == (
        "copy", DType.I64, "model.ids", 1)  # fmt: skip
    rewrite(b, lambda t: {**t, "model.ids": np.arange(4, dtype=np.int32)})
    with pytest.raises(MismatchError, match=r"model\.ids is I32 and I64"):
        soup(a, b)


def test_dtypes_are_promoted_where_none_is_asked_for(tmp_path):
    a, b = (write_llama(tmp_path / n, 1) for n in "ab")
    rewrite(
        a, lambda t: {k: v.astype(np.float16) for k, v in t.items()}, {"torch_dtype": "float16"}
    )
    assert {row.dtype for row in soup(a, a_copy(tmp_path, a)).rows} == {DType.F16}
    found = soup(a, b)
    assert {row.dtype for row in found.rows} == {DType.F32}
    assert found.config["torch_dtype"] == "float32"


def a_copy(tmp_path, folder):
    import shutil

    return shutil.copytree(folder, tmp_path / "copy")


# Multimodal models.


def write_multimodal(folder, seed=0, prefix="language_model.model.", vision="vision_tower."):
    write_llama(folder, 2, seed, head=False, prefix=prefix)
    tower = {
        f"{vision}vision_model.encoder.layers.{i}.mlp.fc1.weight": np.full((4, 4), i, np.float32)
        for i in range(3)
    }
    projector = {f"{vision.replace('vision_tower', 'multi_modal_projector')}mm.weight":
                 np.ones((4, 2), np.float32)}  # fmt: skip
    rewrite(folder, lambda tensors: {**tensors, **tower, **projector})
    data = json.loads((folder / "config.json").read_text())
    inner = {key: data.pop(key) for key in ("num_hidden_layers", "vocab_size")}
    layers = {"layer_types": ["sliding", "full"], "torch_dtype": "float32"}
    data |= {"model_type": "gemma3", "text_config": {**inner, **layers}}
    (folder / "config.json").write_text(json.dumps(data))
    return folder


def test_text_only_models_merge_into_a_multimodal_base(tmp_path):
    base = write_multimodal(tmp_path / "base")
    text = write_llama(tmp_path / "text", 2, 1, head=False)
    newer = write_multimodal(tmp_path / "newer", 2, "model.language_model.", "model.vision_tower.")
    found = soup(base, text, newer, base_model=str(base), dtype="bfloat16")
    rows = names(found)
    row = rows["language_model.model.layers.1.mlp.up_proj.weight"]
    assert [ref.name for ref in row.sources] == [
        "language_model.model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.language_model.layers.1.mlp.up_proj.weight",
    ]
    tower = rows["vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"]
    assert (tower.method, len(tower.sources), tower.dtype) == ("passthrough", 1, DType.BF16)
    assert any("some lack" in warning for warning in found.warnings)
    assert found.config["text_config"]["torch_dtype"] == "bfloat16"
    both = soup(base, newer)
    tower = names(both)["vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"]
    assert [ref.name for ref in tower.sources] == [
        "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight",
        "model.vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight",
    ]
    assert len(both.rows) == len(rows)


def test_a_multimodal_model_merges_into_a_text_only_base(tmp_path):
    text = write_llama(tmp_path / "text", 2, head=False)
    found = soup(text, write_multimodal(tmp_path / "vision", 1))
    assert all("vision" not in row.name and "projector" not in row.name for row in found.rows)
    assert any("left out" in warning for warning in found.warnings)


def test_gradients_follow_each_stack_of_layers(tmp_path):
    a, b = write_multimodal(tmp_path / "a"), write_multimodal(tmp_path / "b", 1)
    found = expanded({
        "merge_method": "slerp", "base_model": str(a), "parameters": {"t": [0.0, 1.0]},
        "models": [{"model": str(a)}, {"model": str(b)}],
    })  # fmt: skip
    rows = names(found)
    tower = "vision_tower.vision_model.encoder.layers.{}.mlp.fc1.weight"
    assert [rows[tower.format(i)].settings["t"] for i in range(3)] == [0.0, 0.5, 1.0]
    text = "language_model.model.layers.{}.mlp.up_proj.weight"
    assert [rows[text.format(i)].settings["t"] for i in range(2)] == [0.0, 1.0]


def modular(a, b, modules):
    return expanded({"merge_method": "slerp", "base_model": str(a), "modules": modules})


def test_modules(tmp_path):
    a, b = write_multimodal(tmp_path / "a"), write_multimodal(tmp_path / "b", 1)
    both = [{"model": str(a)}, {"model": str(b)}]
    found = modular(a, b, {
        "text_decoder": {"models": both, "parameters": {"t": 0.3}},
        "vision_tower": {"models": both, "parameters": {"t": 0.6}},
    })  # fmt: skip
    rows = names(found)
    assert rows["language_model.model.embed_tokens.weight"].settings["t"] == 0.3
    tower = rows["vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"]
    assert tower.settings["t"] == 0.6
    assert rows["multi_modal_projector.mm.weight"].method == "passthrough"
    assert any("multi_modal_projector" in warning for warning in found.warnings)
    with pytest.raises(RecipeError, match="no tensor of the models belongs") as caught:
        modular(a, b, {"audio_tower": {"models": both, "parameters": {"t": 0.3}}})
    assert caught.value.where == "modules.audio_tower"
    assert "vision_tower" in caught.value.todo


def test_slices_of_a_multimodal_model_restack_its_text_layers(tmp_path):
    a = write_multimodal(tmp_path / "a")
    parts = [{"sources": [{"model": str(a), "layer_range": r}]} for r in ([0, 2], [1, 2])]
    found = expanded({"merge_method": "passthrough", "slices": parts})
    rows = names(found)
    row = rows["language_model.model.layers.2.mlp.up_proj.weight"]
    assert row.sources[0].name == "language_model.model.layers.1.mlp.up_proj.weight"
    assert len([n for n in rows if n.startswith("vision_tower")]) == 3
    text = found.config["text_config"]
    assert (text["num_hidden_layers"], text["layer_types"]) == (3, ["sliding", "full", "full"])


# config.json.


def test_lists_by_layer_follow_the_layers(tmp_path):
    types = ["full" if index % 3 == 2 else "sliding" for index in range(6)]
    a = write_llama(tmp_path / "a", 6, config={"layer_types": types, "max_window_layers": 3})
    b = write_llama(tmp_path / "b", 8, 1, config={"layer_types": ["other"] * 8})
    parts = [{"sources": [{"model": str(f), "layer_range": r}]}
             for f, r in ((a, [1, 4]), (b, [6, 8]), (a, [5, 6]))]  # fmt: skip
    found = expanded({"merge_method": "passthrough", "slices": parts})
    assert found.config["layer_types"] == [*types[1:4], "other", "other", types[5]]
    assert found.config["num_hidden_layers"] == 6
    assert any("max_window_layers is 3" in warning for warning in found.warnings)
    assert "layer_types" in found.config_changes


def test_gpt2_counts_its_layers_as_n_layer(tmp_path):
    def renamed(tensors):
        layers = {
            name.replace("model.layers.", "transformer.h."): value
            for name, value in tensors.items()
            if "layers" in name
        }
        return layers | {"transformer.wte.weight": np.ones((32, 16), np.float32)}

    a = rewrite(write_llama(tmp_path / "a", 3, head=False), renamed, {"n_layer": 3})
    data = json.loads((a / "config.json").read_text())
    del data["num_hidden_layers"]
    (a / "config.json").write_text(json.dumps(data))
    parts = [{"sources": [{"model": str(a), "layer_range": r}]} for r in ([0, 3], [2, 3])]
    found = expanded({"merge_method": "passthrough", "slices": parts})
    assert found.config["n_layer"] == 4
    assert "num_hidden_layers" not in found.config
    assert "transformer.h.3.mlp.up_proj.weight" in names(found)


def test_the_donor_is_the_base_else_the_first_model_of_the_file(tmp_path):
    a, b = (write_llama(tmp_path / n, 1, config={"note": n}) for n in "ab")
    assert soup(b, a).config["note"] == "b"
    assert soup(b, a, base_model=str(a)).config["note"] == "a"


def test_a_vector_is_no_model(tmp_path):
    a, b = (write_llama(tmp_path / n, 1) for n in "ab")
    (b / "model.safetensors").rename(b / "vector.safetensors")
    with pytest.raises(MismatchError, match="is a vector"):
        soup(a, b)


def test_experts_are_tensors_like_others(tmp_path):
    def experts(tensors):
        tiny = np.ones(2, np.float32)
        return tensors | {
            f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight": tiny
            for layer in range(2)
            for expert in range(500)
            for name in ("up", "down")
        }

    a, b = (rewrite(write_llama(tmp_path / n, 2), experts) for n in "ab")
    rows = names(soup(a, b))
    assert len(rows) == 2 * 9 + 3 + 2000
    assert (
        rows["model.layers.1.mlp.experts.499.down.weight"]
        .sources[1]
        .name.endswith("499.down.weight")
    )
