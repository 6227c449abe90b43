"""mergekit's YAML: what each key comes to for each tensor, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from optimer_engine.checkpoint import Checkpoint
from optimer_engine.errors import MismatchError, RecipeError
from optimer_engine.mergekit import ModelRef, expand, explain, lines, load
from optimer_engine.mergekit.settings import SIGNATURES
from optimer_engine.methods import registry
from optimer_engine.methods.protocol import Method, Parameter
from optimer_engine.types import DType
from tests import recipes_in_use

LAYERS = {"base": 8, "a": 8, "b": 8, "c": 8, "long": 12}

RECIPES = {
    "linear": """
        models:
          - model: M/a
            parameters: {weight: 0.6}
          - model: M/b
            parameters: {weight: 0.4}
        merge_method: linear
        dtype: float16
        """,
    "linear_with_base": """
        models:
          - model: M/base
            parameters: {weight: 1.0}
          - model: M/a
            parameters: {weight: [0.0, 1.0]}
        base_model: M/base
        merge_method: linear
        parameters: {normalize: false}
        dtype: float32
        out_dtype: bfloat16
        """,
    "task_arithmetic": """
        models:
          - model: M/a
            parameters:
              weight:
                - {filter: self_attn, value: 0.7}
                - {filter: mlp, value: [0.1, 0.9, 0.2]}
                - {value: 0.25}
          - model: M/b
            parameters: {weight: 0.3}
        merge_method: task_arithmetic
        base_model: M/base
        parameters: {lambda: 0.8}
        dtype: bfloat16
        """,
    "ties": recipes_in_use.RECIPES["ties, gradients and filters"],
    "slerp": """
        slices:
          - sources:
              - model: M/a
                layer_range: [0, 8]
              - model: M/b
                layer_range: [0, 8]
        merge_method: slerp
        base_model: M/a
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 0.3, 0.7, 1]
            - filter: mlp
              value: [1, 0.5, 0.7, 0.3, 0]
            - value: 0.5
        dtype: bfloat16
        """,
    "frankenmerge": """
        slices:
          - sources:
            - {model: M/a, layer_range: [0, 6]}
          - sources:
            - {model: M/b, layer_range: [2, 8]}
          - sources:
            - {model: M/long, layer_range: [9, 12]}
        merge_method: passthrough
        dtype: float16
        """,
    "upscaled": """
        slices:
          - sources:
            - {model: M/a, layer_range: [0, 4]}
          - sources:
            - model: M/a
              layer_range: [3, 4]
              parameters:
                scale:
                  - {filter: o_proj, value: 0.0}
                  - {filter: down_proj, value: 0.0}
                  - {value: 1.0}
          - sources:
            - {model: M/a, layer_range: [4, 8]}
        merge_method: passthrough
        """,
    "dare_ties": """
        models:
          - model: M/base
          - model: M/a
            parameters: {density: 0.53, weight: 0.4}
          - model: M/b
            parameters: {density: 0.53, weight: 0.3}
        merge_method: dare_ties
        base_model: M/base
        parameters: {int8_mask: true}
        dtype: bfloat16
        """,
    "dare_linear": """
        models: [{model: M/a}, {model: M/b}]
        merge_method: dare_linear
        base_model: M/base
        parameters: {weight: 0.5, density: [0.4, 0.6], rescale: false, normalize: true}
        """,
    "della": """
        models:
          - model: M/a
            parameters: {weight: 0.5, density: 0.6, epsilon: [0.05, 0.2]}
          - model: M/b
            parameters: {weight: 0.5, density: 0.6}
        merge_method: della
        base_model: M/base
        parameters: {lambda: 1.1}
        """,
    "breadcrumbs_ties": """
        models:
          - {model: M/a, parameters: {weight: 0.5, density: 0.9, gamma: 0.02}}
          - {model: M/b, parameters: {weight: 0.5}}
        merge_method: breadcrumbs_ties
        base_model: M/base
        """,
    "model_stock": """
        models: [{model: M/a}, {model: M/b}, {model: M/c}]
        merge_method: model_stock
        base_model: M/base
        parameters: {filter_wise: true}
        """,
    "sce": """
        models: [{model: M/a}, {model: M/b}]
        merge_method: sce
        base_model: M/base
        parameters: {select_topk: [0.5, 1.0]}
        """,
    "nuslerp": """
        models:
          - {model: M/a, parameters: {weight: [0.5, 0.8]}}
          - {model: M/b, parameters: {weight: 0.5}}
        merge_method: nuslerp
        parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
        """,
    "multislerp": """
        models:
          - {model: M/a, parameters: {weight: 0.3}}
          - {model: M/b, parameters: {weight: 0.5}}
          - {model: M/c, parameters: {weight: 0.2}}
        base_model: M/base
        merge_method: multislerp
        """,
    "karcher": """
        models: [{model: M/a}, {model: M/b}]
        merge_method: karcher
        parameters: {max_iter: 5, tol: 1.0e-6}
        """,
    "nearswap": """
        models: [{model: M/a}, {model: M/b}]
        merge_method: nearswap
        base_model: M/a
        parameters: {t: [0.0001, 0.0002]}
        """,
    "arcee_fusion": """
        models: [{model: M/b}]
        merge_method: arcee_fusion
        base_model: M/a
        """,
    "precedence": """
        slices:
          - sources:
              - model: M/a
                layer_range: [0, 4]
                parameters: {weight: [{filter: q_proj, value: 0.9}]}
              - {model: M/base, layer_range: [0, 4]}
              - {model: M/b, layer_range: [2, 6]}
            parameters: {weight: [{filter: mlp, value: [0.1, 0.2]}], normalize: true}
          - sources:
              - {model: M/b, layer_range: [4, 8]}
              - {model: M/base, layer_range: [4, 8]}
        parameters: {weight: 0.33, lambda: [0.5, 1.5]}
        merge_method: task_arithmetic
        base_model: M/base
        """,
    "base_of_a_slice": """
        slices:
          - sources:
              - {model: M/a, layer_range: [0, 4]}
              - {model: M/b, layer_range: [0, 4]}
            base_model: M/b
          - sources:
              - {model: M/a, layer_range: [4, 5]}
              - {model: M/b, layer_range: [4, 5]}
        base_model: M/a
        merge_method: slerp
        parameters: {t: [0.1, 0.9]}
        """,
    "modules": """
        modules:
          default:
            parameters: {t: 0.25}
            models: [{model: M/a}, {model: M/b}]
        base_model: M/a
        merge_method: slerp
        parameters: {t: 0.5}
        """,
    "single_condition": """
        models:
          - {model: M/a, parameters: {weight: {filter: "*", value: "0.6"}}}
          - {model: M/b, parameters: {weight: 4e-1}}
        merge_method: linear
        """,
}
"""Recipes as people write them; each is also held against mergekit's own planner in tests/slow."""


def write_llama(folder, layers=8, seed=0, vocab=32, head=True, prefix="model.", config=None):
    """A Llama-like checkpoint in fp32, d = 16."""
    random = np.random.default_rng(seed)
    shapes = {f"{prefix}embed_tokens.weight": (vocab, 16), f"{prefix}norm.weight": (16,)}
    for index in range(layers):
        at = f"{prefix}layers.{index}."
        shapes |= {f"{at}self_attn.{name}_proj.weight": (16, 16) for name in "qo"}
        shapes |= {f"{at}self_attn.{name}_proj.weight": (8, 16) for name in "kv"}
        shapes |= {f"{at}mlp.{name}_proj.weight": (24, 16) for name in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (16, 24)
        shapes |= {f"{at}{n}_layernorm.weight": (16,) for n in ("input", "post_attention")}
    if head:
        shapes["lm_head.weight"] = (vocab, 16)
    folder.mkdir(parents=True)
    tensors = {n: (random.standard_normal(s) * 0.1).astype(np.float32) for n, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    written = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "vocab_size": vocab,
        "tie_word_embeddings": not head, "torch_dtype": "float32", "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**written, **(config or {})}))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for seed, (name, layers) in enumerate(LAYERS.items()):
        write_llama(root / name, layers, seed)
    return root


@pytest.fixture
def run(models, tmp_path):
    """Expand a recipe in which M/ stands for the folder of models."""

    def run(text):
        path = tmp_path / "recipe.yml"
        path.write_text(text.replace("M/", f"{models}/"))
        config = load(path)
        checkpoints = {model: Checkpoint.open(model.path) for model in config.models()}
        found = expand(config, checkpoints)
        run.groups = explain(found, checkpoints)
        for checkpoint in checkpoints.values():
            checkpoint.close()
        return found

    return run


def rows_of(expansion):
    """Output name to (method, base model, [source models], shared, [per source])."""
    short = [model.path.rpartition("/")[2] for model in expansion.models]
    return {
        row.name: (
            row.method,
            None if row.base is None else short[row.base.checkpoint],
            [short[ref.checkpoint] for ref in row.sources],
            dict(row.settings.shared),
            [dict(pairs) for pairs in row.settings.per_source],
        )
        for row in expansion.rows
    }


def L(index, name="self_attn.q_proj"):
    return f"model.layers.{index}.{name}.weight"


def gradient(values, index, count=8):
    return pytest.approx(np.interp(index / (count - 1) * (len(values) - 1),
                                   range(len(values)), values))  # fmt: skip


def test_linear(run):
    found = run(RECIPES["linear"])
    row = rows_of(found)["lm_head.weight"]
    assert row == ("linear", None, ["a", "b"], {"normalize": True}, [{"weight": 0.6},
                                                                      {"weight": 0.4}])  # fmt: skip
    assert {row.dtype for row in found.rows} == {DType.F16}
    assert found.config["torch_dtype"] == "float16"
    assert len(found.rows) == 75
    assert found.donor == 0


def test_a_base_is_one_more_input_of_linear_and_out_dtype_wins(run):
    rows = rows_of(run(RECIPES["linear_with_base"]))
    assert rows[L(7)][2:] == (["base", "a"], {"normalize": False}, [{"weight": 1.0},
                                                                     {"weight": 1.0}])  # fmt: skip
    assert rows["lm_head.weight"][4][1] == {"weight": 0.0}  # t = 0, though it comes last
    assert {row.dtype for row in run(RECIPES["linear_with_base"]).rows} == {DType.BF16}


def test_filters_and_gradients(run):
    rows = rows_of(run(RECIPES["task_arithmetic"]))
    assert rows[L(3)] == ("task_arithmetic", "base", ["a", "b"], {"normalize": False,
        "lambda": 0.8}, [{"weight": 0.7}, {"weight": 0.3}])  # fmt: skip
    for index in range(8):
        weight = rows[L(index, "mlp.up_proj")][4][0]["weight"]
        assert weight == gradient([0.1, 0.9, 0.2], index)
    assert rows["model.norm.weight"][4][0] == {"weight": 0.25}


def test_ties_with_densities_by_layer(run):
    found = run(RECIPES["ties"])
    rows = rows_of(found)
    method, base, sources, shared, per_source = rows[L(3, "mlp.down_proj")]
    assert (method, base, sources) == ("ties", "base", ["a", "b", "c"])
    assert shared == {"normalize": True, "rescale": False, "lambda": 1.0}
    assert per_source[0] == {"weight": 1.0, "density": gradient([1, 0.7, 0.1], 3)}
    assert per_source[1] == {"weight": gradient([0, 0.3, 0.7, 1], 3), "density": 0.5}
    assert per_source[2] == {"weight": 0.5, "density": 0.33}
    assert rows[L(3)][4][2]["weight"] == 0
    assert found.donor == found.models.index(load_base(found))
    assert any("int8_mask changes nothing" in warning for warning in found.warnings)


def load_base(found):
    return next(model for model in found.models if model.path.endswith("/base"))


def test_slerp_with_a_curve_for_attention_and_one_for_the_mlp(run):
    rows = rows_of(run(RECIPES["slerp"]))
    for index in range(8):
        method, base, sources, shared, per_source = rows[L(index)]
        assert (method, base, sources, per_source) == ("slerp", "a", ["b"], [{}])
        assert shared["t"] == gradient([0, 0.5, 0.3, 0.7, 1], index)
        assert rows[L(index, "mlp.up_proj")][3]["t"] == gradient([1, 0.5, 0.7, 0.3, 0], index)
        assert rows[L(index, "input_layernorm")][3]["t"] == 0.5
    assert rows["model.embed_tokens.weight"][3]["t"] == 0.5


def test_stacked_layers_are_renumbered_and_config_json_counts_them(run):
    found = run(RECIPES["frankenmerge"])
    by_name = {row.name: row for row in found.rows}
    order = [("a", i) for i in range(6)] + [("b", i) for i in range(2, 8)]
    order += [("long", i) for i in range(9, 12)]
    for out, (model, index) in enumerate(order):
        row = by_name[L(out)]
        assert row.method == "passthrough"
        assert found.models[row.sources[0].checkpoint].path.endswith(f"/{model}")
        assert row.sources[0].name == L(index)
    # What stands before the layers is the first slice's, what stands after them the last one's.
    assert found.models[by_name["model.embed_tokens.weight"].sources[0].checkpoint].path[-1] == "a"
    for name in ("model.norm.weight", "lm_head.weight"):
        assert found.models[by_name[name].sources[0].checkpoint].path.endswith("/long")
    assert found.config["num_hidden_layers"] == 15
    assert found.config_changes["num_hidden_layers"] == 15
    assert len(found.rows) == 15 * 9 + 3


def test_scale_by_filter_in_a_repeated_layer(run):
    rows = rows_of(run(RECIPES["upscaled"]))
    assert rows[L(4, "self_attn.o_proj")][4] == [{"scale": 0.0}]
    assert rows[L(4, "mlp.down_proj")][4] == [{"scale": 0.0}]
    assert rows[L(4)][4] == [{"scale": 1.0}]
    assert rows[L(3, "self_attn.o_proj")][4] == [{"scale": 1.0}]


@pytest.mark.parametrize(
    ("name", "tensor", "shared", "per_source"),
    [
        ("dare_ties", L(2), {"normalize": False, "rescale": True, "lambda": 1.0},
         [{"weight": 0.4, "density": 0.53}, {"weight": 0.3, "density": 0.53}]),
        ("dare_linear", L(7), {"normalize": True, "rescale": False, "lambda": 1.0},
         [{"weight": 0.5, "density": 0.6}] * 2),
        ("della", L(7), {"normalize": True, "rescale": True, "lambda": 1.1},
         [{"weight": 0.5, "density": 0.6, "epsilon": 0.2},
          {"weight": 0.5, "density": 0.6, "epsilon": 0.15}]),
        ("breadcrumbs_ties", L(0), {"normalize": False, "rescale": False, "lambda": 1.0},
         [{"weight": 0.5, "density": 0.9, "gamma": 0.02},
          {"weight": 0.5, "density": 1.0, "gamma": 0.01}]),
        ("model_stock", L(0), {"filter_wise": True}, [{}] * 3),
        ("sce", L(7), {"select_topk": 1.0}, [{}] * 2),
        ("nuslerp", L(7), {"nuslerp_row_wise": True, "nuslerp_flatten": False},
         [{"weight": 0.8}, {"weight": 0.5}]),
        ("multislerp", L(7), {"normalize_weights": True, "eps": 1e-8},
         [{"weight": 0.3}, {"weight": 0.5}, {"weight": 0.2}]),
        ("karcher", L(7), {"max_iter": 5, "tol": 1e-6}, [{}] * 2),
        ("nearswap", L(7), {"t": 0.0002}, [{}]),
        ("arcee_fusion", L(7), {}, [{}]),
        ("single_condition", L(1), {"normalize": True}, [{"weight": 0.6}, {"weight": 0.4}]),
        ("modules", L(1), {"t": 0.25}, [{}]),
    ],
)  # fmt: skip
def test_parameters_and_defaults_of_every_method(run, name, tensor, shared, per_source):
    found = rows_of(run(RECIPES[name]))[tensor]
    assert found[3:] == (shared, per_source)
    based = SIGNATURES[found[0]].base == "required" or name == "multislerp"
    assert (found[1] is not None) == based


def test_every_method_of_the_table_has_a_recipe_or_a_sibling():
    tried = {load(_mapping(text)).method for text in RECIPES.values()}
    siblings = {"breadcrumbs", "della_linear"}
    assert tried | siblings == set(SIGNATURES)


def test_our_methods_know_the_parameters_that_mergekit_gives_them():
    for name in set(registry.names()) & set(SIGNATURES):
        method, signature = registry.get(name), SIGNATURES[name]
        for given, per_source in ((signature.shared, False), (signature.per_source, True)):
            for key in given:
                assert key in method.parameters, f"{name} has no {key}"
                assert method.parameters[key].per_source == per_source, f"{name}: {key}"


def test_a_method_that_a_user_registered(run, monkeypatch):
    parameters = {
        "share": Parameter(float, per_source=True),
        "power": Parameter(int, 2),
        "label": Parameter(str, "x"),
    }
    method = Method("my_soup", "", "", parameters, base="optional", min_sources=2)
    monkeypatch.setitem(registry._METHODS, "my_soup", method)
    rows = rows_of(run("""
        models:
          - {model: M/a, parameters: {share: [0, 1]}}
          - {model: M/b, parameters: {share: 0.5}}
        merge_method: my_soup
        """))  # fmt: skip
    assert rows[L(7)] == ("my_soup", None, ["a", "b"], {"power": 2}, [{"share": 1.0},
                                                                     {"share": 0.5}])  # fmt: skip
    with pytest.raises(RecipeError, match="takes: power, share"):
        load({"merge_method": "my_soup", "models": [{"model": "a", "parameters": {"zzz": 1}}]})


def _mapping(text):
    import yaml

    return yaml.safe_load(text)


def test_precedence_source_then_slice_then_file(run):
    rows = rows_of(run(RECIPES["precedence"]))
    first = rows[L(3)]  # sources a (q_proj by its own filter) and b (at its layer 5)
    assert first[2] == ["a", "b"]
    assert first[4] == [{"weight": 0.9}, {"weight": 0.33}]
    assert first[3] == {"normalize": True, "lambda": 1.5}
    assert rows[L(0, "mlp.up_proj")][4] == [{"weight": 0.1}] * 2
    assert rows[L(3, "mlp.up_proj")][4] == [{"weight": 0.2}] * 2
    assert rows[L(4)][3] == {"normalize": False, "lambda": 0.5}  # t starts afresh in each slice
    by_name = {row.name: row for row in run(RECIPES["precedence"]).rows}
    assert [ref.name for ref in by_name[L(1)].sources] == [L(1), L(3)]


def test_the_base_of_a_slice_and_a_slice_of_one_layer(run):
    rows = rows_of(run(RECIPES["base_of_a_slice"]))
    assert rows[L(0)][1:4] == ("b", ["a"], {"t": 0.1})
    assert rows[L(4)][1:4] == ("a", ["b"], {"t": 0.9})  # one layer: t = 1


def test_what_people_write_but_has_no_effect_is_reported(run):
    found = run("""
        models:
          - {model: M/a, parameters: {weight: 1.0, normalize: false, density: 0.5}}
          - {model: M/base, parameters: {weight: 0.2}}
        merge_method: task_arithmetic
        base_model: M/base
        parameters: {t: 0.5, lambda: [{filter: q_porj, value: 0.5}, {value: 1}]}
        """)
    text = "\n".join(found.warnings)
    for part in ("models[0].parameters.normalize", "models[0].parameters.density",
                 "models[1].parameters.weight", "parameters.t ", "filter 'q_porj'"):  # fmt: skip
        assert part in text
    assert rows_of(found)[L(0)][3] == {"normalize": False, "lambda": 1.0}


def test_explained_with_numbers(run):
    run(RECIPES["task_arithmetic"])
    text = "\n".join(lines(run.groups))
    assert "base + 0.8 (0.7 (a - base) + 0.3 (b - base))" in text
    assert sum(len(group.tensors) for group in run.groups) == 75
    run(RECIPES["ties"])
    assert "c {density 0.33, weight 0.5}" in "\n".join(lines(run.groups))
    run(RECIPES["upscaled"])
    assert {group.formula for group in run.groups} == {"a", "0 a"}
    attention = next(g for g in run.groups if g.formula == "0 a")
    assert attention.read_bytes == attention.write_bytes == 4 * (16 * 16 + 16 * 24)


# References.


@pytest.mark.parametrize(
    ("written", "want"),
    [
        ("org/m", ModelRef("org/m")),
        ("org/m@main", ModelRef("org/m", "main")),
        ("org/m+org/lora", ModelRef("org/m", None, "org/lora")),
        ("org/m@v1+org/lora@v2", ModelRef("org/m", "v1", "org/lora", "v2")),
        ({"model": "a+b", "lora": "c"}, ModelRef("a+b", None, "c")),
        ({"model": {"path": "a@b", "revision": "r"}}, ModelRef("a@b", "r")),
    ],
)
def test_references(written, want):
    recipe = {"merge_method": "passthrough", "models": [{"model": written}]}
    assert load(recipe).models() == (want,)
    if isinstance(written, str):
        assert str(want) == written


def test_a_model_with_and_without_an_adapter_are_two_models():
    config = load({
        "merge_method": "ties", "base_model": "org/m", "parameters": {"weight": 1, "density": 0.5},
        "models": [{"model": "org/m+org/ja"}, {"model": "org/m+org/zh"}],
    })  # fmt: skip
    assert [str(model) for model in config.models()] == ["org/m+org/ja", "org/m+org/zh", "org/m"]


# Refusals.

GOOD = {
    "merge_method": "ties",
    "base_model": "m/base",
    "models": [{"model": "m/a", "parameters": {"weight": 0.5}}],
}


def changed(**keys):
    return {key: value for key, value in {**GOOD, **keys}.items() if value is not None}


@pytest.mark.parametrize(
    ("recipe", "where", "says"),
    [
        (changed(modles=[]), "", "modules"),
        (changed(parameters={"dtype": "bfloat16"}), "parameters.dtype", "at the top of the file"),
        (changed(merge_method="tie"), "merge_method", "'ties'"),
        (changed(merge_method="ramplus_tl"), "merge_method", "only to mergekit"),
        (changed(merge_method=None), "", "merge_method"),
        (changed(models=None), "models, slices, modules", "none"),
        (changed(slices=[{"sources": []}]), "models, slices, modules", "models and slices"),
        (changed(models=[{"model": "a", "layer_range": [0, 4]}]), "", "layer_range"),
        (changed(models=[{"model": "a", "parameters": {"wieght": 1}}]),
         "models[0].parameters.wieght", "'weight'"),
        (changed(parameters={"densty": 1}), "parameters.densty", "'density'"),
        (changed(parameters={"density": "high"}), "parameters.density", "finite number"),
        (changed(parameters={"density": True}), "parameters.density", "finite number"),
        (changed(parameters={"normalize": 0.5}), "parameters.normalize", "true or false"),
        (changed(parameters={"density": []}), "parameters.density", "empty list"),
        (changed(parameters={"density": None}), "parameters.density", "None"),
        (changed(parameters={"density": [{"filtr": "mlp", "value": 1}]}),
         "parameters.density[0]", "filtr"),
        (changed(parameters={"density": [{"filter": "mlp"}]}), "parameters.density[0]", "value"),
        (changed(parameters={"density": [0.5, {"filter": "mlp", "value": 1}]}),
         "parameters.density[0]", "among conditions"),
        (changed(parameters={"density": [{"filter": 3, "value": 1}]}),
         "parameters.density[0].filter", "a part of a tensor's name"),
        (changed(parameters={"density": {"value": [{"value": 1}]}}), "parameters.density.value",
         "expected a number"),
        (changed(dtype="float12"), "dtype", "float12"),
        (changed(out_dtype="int64"), "out_dtype", "int64"),
        (changed(base_model=None), "base_model", "needs a base"),
        (changed(models=[{"model": "a"}, {"model": "a"}]), "models", "twice"),
        (changed(models=[{"model": "a+b+c"}]), "models[0].model", "MODEL+ADAPTER"),
        (changed(models=[{"model": "a@b@c"}]), "models[0].model", "not a model"),
        (changed(models=[{"model": {"model": "a", "override_architecture": "X"}}]),
         "models[0].model", "override_architecture"),
        (changed(merge_method="slerp", models=[{"model": c} for c in "abc"]), "models",
         "1 models beside the base, found 3"),
        (changed(merge_method="model_stock"), "models", "at least 2"),
        (changed(merge_method="passthrough"), "models", "found 2"),
        (changed(merge_method="nuslerp", base_model=None), "models", "takes 2 models, found 1"),
        (changed(merge_method="karcher", parameters={"max_iter": 2.5}), "parameters.max_iter",
         "a whole number"),
        (changed(merge_method="karcher", parameters={"max_iter": [1, 5]}), "parameters.max_iter",
         "cannot vary"),
        (changed(tokenizer_source="union", tokenizer={"source": "base"}),
         "tokenizer, tokenizer_source", "both"),
        (changed(tokenizer={"sauce": "base"}), "", "source"),
        (changed(tokenizer={"pad_to_multiple_of": 0}), "tokenizer.pad_to_multiple_of", "1 or more"),
        (changed(tokenizer={"tokens": {"<x>": {"force": True}}}), "tokenizer.tokens.<x>", "source"),
        (changed(tokenizer={"tokens": {"<x>": {"source": {"kind": "ones"}}}}),
         "tokenizer.tokens.<x>.source.kind", "zero or model_token"),
        (changed(tokenizer={"tokens": {"<x>": {"source": {"kind": "model_token", "model": "a"}}}}),
         "tokenizer.tokens.<x>.source", "token_id"),
        (changed(modules={"default": {}}, models=None), "modules.default", "models or slices"),
        (changed(models=None, slices=[{"sources": [{"model": "a", "layer_range": [4, 2]}]}]),
         "slices[0].sources[0].layer_range", "[4, 2]"),
        (changed(models=None, slices=[{"sources": [{"model": "a", "layer_range": [0, 2]}]}]),
         "slices[0]", "not among the sources"),
        (changed(models=None, slices=[{"sources": [{"model": "a", "layer_range": [0, 2]},
                                                   {"model": "m/base", "layer_range": [0, 3]}]}]),
         "slices[0]", "2 and 3 layers"),
        (changed(models=None, slices=[{"sources": [], "residual_weight": 0.5}]), "",
         "residual_weight"),
    ],
)  # fmt: skip
def test_refused_with_its_path(recipe, where, says):
    with pytest.raises(RecipeError) as caught:
        load(recipe)
    assert where in caught.value.where
    assert caught.value.where.startswith("recipe")
    assert says in str(caught.value)


def test_several_documents_are_a_multi_merge(tmp_path):
    path = tmp_path / "multi.yml"
    path.write_text("name: one\nmerge_method: linear\n---\nname: two\nmerge_method: linear\n")
    with pytest.raises(RecipeError, match="multi-merge") as caught:
        load(path)
    assert caught.value.where == str(path)


def test_no_such_file(tmp_path):
    with pytest.raises(RecipeError, match="no such file"):
        load(tmp_path / "absent.yml")


def test_a_required_parameter_is_missed_for_all_models_at_once(run):
    with pytest.raises(RecipeError) as caught:
        run("""
            models:
              - {model: M/a, parameters: {weight: [{filter: mlp, value: 1}]}}
              - {model: M/b}
            merge_method: linear
            """)
    assert "weight of" in caught.value.what
    assert "/a for lm_head.weight" in caught.value.what
    assert "/b for lm_head.weight" in caught.value.what


def test_layers_that_a_model_does_not_have(run):
    with pytest.raises(MismatchError, match=r"slices\[0\].sources\[0\].layer_range .* 8 layers"):
        run("""
            slices: [{sources: [{model: M/a, layer_range: [0, 9]}]}]
            merge_method: passthrough
            """)
