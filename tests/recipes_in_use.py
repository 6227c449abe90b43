"""mergekit recipes in the forms in which people publish them, over tiny models; M/ is their folder.

`models` writes them: Llamas that Transformers loads, with tokenizers and LoRA adapters. Each recipe
runs through the program in tests/unit/test_mergekit_in_use.py, and through mergekit's as well in
tests/slow/test_recipes_in_use.py.
"""

from __future__ import annotations

import json
from pathlib import Path

RECIPES = {
    "linear": """
        models:
          - model: M/a
            parameters: {weight: 1.0}
          - model: M/b
            parameters: {weight: 0.3}
          - model: M/c
            parameters: {weight: 0.5}
        merge_method: linear
        dtype: float16
        """,
    "linear, one weight for all": """
        models: [{model: M/a}, {model: M/b}, {model: M/c}]
        merge_method: linear
        parameters: {weight: 1.0, normalize: 1.0}
        dtype: float32
        out_dtype: bfloat16
        """,
    "linear, a difference": """
        models:
          - {model: M/base, parameters: {weight: 1.0}}
          - {model: M/a, parameters: {weight: 0.8}}
          - {model: M/b, parameters: {weight: -0.8}}
        merge_method: linear
        parameters: {normalize: false}
        """,
    "task arithmetic, slices as mergekit writes them": """
        base_model: M/base
        dtype: bfloat16
        merge_method: task_arithmetic
        parameters: {int8_mask: 1.0, lambda: 0.57, normalize: 0.0}
        slices:
        - sources:
          - layer_range: [0, 4]
            model: M/base
          - layer_range: [0, 4]
            model: M/a
            parameters: {weight: 0.5}
          - layer_range: [0, 4]
            model: M/b
            parameters: {weight: -0.5}
        """,
    "task arithmetic, models as mappings": """
        base_model:
          model: {path: M/base, revision: null}
          lora: null
          override_architecture: null
        merge_method: task_arithmetic
        models:
          - model: {model: {path: M/a, revision: null}, lora: null}
            parameters: {weight: "0.4"}
        """,
    "ties": """
        models:
          - model: M/base
            # no parameters necessary for base model
          - model: M/a
            parameters: {density: 0.5, weight: 0.5}
          - model: M/b
            parameters: {density: 0.5, weight: 0.3}
        merge_method: ties
        base_model: M/base
        parameters: {normalize: true, int8_mask: true}
        dtype: float16
        """,
    "ties, gradients and filters": """
        models:
          - model: M/base
            # no parameters necessary for base model
          - model: M/a
            parameters:
              density: [1, 0.7, 0.1]
              weight: 1.0
          - model: M/b
            parameters:
              density: 0.5
              weight: [0, 0.3, 0.7, 1]
          - model: M/c
            parameters:
              density: 0.33
              weight:
                - filter: mlp
                  value: 0.5
                - value: 0
        merge_method: ties
        base_model: M/base
        parameters: {normalize: true, int8_mask: true}
        dtype: float16
        """,
    "dare_ties": """
        models:
          - model: M/base
          - model: M/a
            parameters: {density: 0.53, weight: 0.4}
          - model: M/b
            parameters: {density: 0.53, weight: 0.3}
          - model: M/c
            parameters: {density: 0.53, weight: 0.3}
        merge_method: dare_ties
        base_model: M/base
        parameters: {int8_mask: true}
        dtype: bfloat16
        """,
    "dare_ties, a weight for the base": """
        merge_method: dare_ties
        base_model: M/base
        models:
          - {model: M/base, parameters: {weight: 0.2}}
          - {model: M/a, parameters: {weight: 0.2}}
          - {model: M/b, parameters: {weight: 0.2}}
        parameters: {density: 0.35}
        tokenizer: {source: base}
        chat_template: auto
        dtype: float32
        out_dtype: bfloat16
        """,
    "dare_linear": """
        merge_method: dare_linear
        base_model: M/base
        models:
          - {model: M/a, parameters: {weight: 0.6, density: 0.6}}
          - {model: M/b, parameters: {weight: 0.4, density: 0.6}}
        parameters: {normalize: true, rescale: true}
        dtype: bfloat16
        """,
    "della": """
        base_model: M/base
        merge_method: della
        models:
          - {model: M/a, parameters: {weight: 0.5}}
          - {model: M/b, parameters: {weight: 0.5}}
        parameters: {density: 0.5, normalize: true, epsilon: 0.4, lambda: 1}
        tokenizer_source: union
        chat_template: "llama3"
        """,
    "della_linear, a module and an empty tokenizer": """
        base_model: M/base
        dtype: bfloat16
        merge_method: della_linear
        modules:
          default:
            slices:
            - sources:
              - layer_range: [0, 4]
                model: M/a
                parameters: {density: 0.5, epsilon: 0.4, weight: [0.9, 0.2, 0.2, 0.95, 0.8]}
              - layer_range: [0, 4]
                model: M/b
                parameters: {density: 0.5, epsilon: 0.4, weight: [0.1, 0.9, 1.0, 0.4]}
              - layer_range: [0, 4]
                model: M/base
        parameters: {lambda: 1.0, normalize: 1.0}
        tokenizer: {}
        """,
    "breadcrumbs": """
        models:
          - {model: M/a, parameters: {weight: 1.0}}
          - {model: M/b, parameters: {weight: 1.0}}
          - {model: M/c, parameters: {weight: 0.5}}
        merge_method: breadcrumbs
        base_model: M/base
        parameters:
            density: 0.9
            gamma: 0.01
        dtype: float16
        chat_template: "alpaca"
        """,
    "breadcrumbs_ties": """
        models:
          - model: M/a
            parameters: {gamma: 0.01, density: 0.9, weight: [0.0825, 0.0825, 0.0825, 0.33]}
          - model: M/b
            parameters: {gamma: 0.01, density: 0.9, weight: [0.33, 0.0825, 0.0825, 0.0825]}
        merge_method: breadcrumbs_ties
        base_model: M/base
        parameters: {normalize: false, int8_mask: true}
        dtype: bfloat16
        """,
    "sce": """
        models: [{model: M/a}, {model: M/b}, {model: M/c}]
        merge_method: sce
        base_model: M/base
        parameters: {select_topk: 0.1}
        tokenizer: {source: M/base}
        dtype: float32
        out_dtype: bfloat16
        """,
    "slerp, slices": """
        slices:
          - sources:
              - {model: M/a, layer_range: [0, 4]}
              - {model: M/b, layer_range: [0, 4]}
        merge_method: slerp
        base_model: M/a
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 0.3, 0.7, 1]
            - filter: mlp
              value: [1, 0.5, 0.7, 0.3, 0]
            - value: 0.5 # fallback for rest of tensors
        tokenizer_source: union
        dtype: float16
        """,
    "slerp, one model beside the base": """
        merge_method: slerp
        dtype: bfloat16
        base_model: M/base
        models:
          - model: M/a
        parameters: {t: 0.45}
        """,
    "slerp, embeddings": """
        merge_method: slerp
        base_model: M/a
        models: [{model: M/a}, {model: M/b}]
        parameters:
          t:
            - {filter: embed_tokens, value: 0.7}
            - {filter: lm_head, value: 0.7}
            - value: [0.2, 0.8, 0.5]
        dtype: bfloat16
        """,
    "nuslerp": """
        models:
          - model: M/a
            parameters: {weight: [0.1, 0.3, 0.1]}
          - model: M/b # this one weighs more
            parameters: {weight: [0.9, 0.7, 0.9]}
        merge_method: nuslerp
        dtype: float32
        out_dtype: bfloat16
        tokenizer: {source: M/b}
        """,
    "nuslerp, task vectors by row": """
        models:
          - {model: M/a, parameters: {weight: 0.5}}
          - {model: M/b, parameters: {weight: 0.5}}
        merge_method: nuslerp
        base_model: M/base
        parameters: {nuslerp_flatten: false, nuslerp_row_wise: false}
        dtype: float32
        """,
    "multislerp": """
        models:
          - {model: M/a, parameters: {weight: 0.5}}
          - {model: M/b, parameters: {weight: 0.3}}
          - {model: M/c, parameters: {weight: 0.2}}
        merge_method: multislerp
        base_model: M/base
        dtype: float32
        """,
    "karcher": """
        name: First
        models: [{model: M/a}, {model: M/b}]
        merge_method: karcher
        dtype: float32
        parameters: {tol: 1e-10, max_iter: 1200}
        tokenizer: {source: union}
        """,
    "model_stock": """
        models:
          - model: M/a
          - model: M/b
          - model: M/base
        merge_method: model_stock
        base_model: M/base
        dtype: float32
        """,
    "model_stock, weights that it does not have": """
        dtype: float32
        out_dtype: bfloat16
        merge_method: model_stock
        base_model: M/base
        models:
          - model: M/a
            parameters:
              weight: [{filter: mlp, value: [2, 1]}, {value: 1}]
          - model: M/b
            parameters: {weight: 1}
        """,
    "model_stock of adapters": """
        models:
          - model: M/base+M/lora
          - model: M/base+M/lora2
        merge_method: model_stock
        base_model: M/base
        dtype: float32
        """,
    "task arithmetic of adapters": """
        merge_method: task_arithmetic
        base_model: M/base
        models:
          - {model: M/base+M/lora, parameters: {weight: 1.0}}
          - {model: M/base+M/lora2, parameters: {weight: -0.5}}
        tokenizer_source: union
        dtype: float32
        """,
    "an adapter put in": """
        models: [{model: M/base+M/lora}]
        merge_method: passthrough
        dtype: float32
        """,
    "an adapter under the base as well": """
        base_model: M/base+M/lora
        models:
          - {model: M/base+M/lora2, parameters: {weight: 0.5}}
          - {model: M/a, parameters: {weight: 0.5}}
        merge_method: linear
        parameters: {weight: 1.0}
        dtype: float32
        """,
    "arcee_fusion": """
        models: [{model: M/a}]
        merge_method: arcee_fusion
        base_model: M/base
        dtype: float32
        """,
    "nearswap": """
        models: [{model: M/a}, {model: M/b}]
        merge_method: nearswap
        base_model: M/a
        parameters: {t: 0.0001}
        dtype: float32
        """,
    "frankenmerge": """
        slices:
          - sources:
            - model: M/a
              layer_range: [0, 3]
          - sources:
            - model: M/b
              layer_range: [1, 4]
          - sources:
            - {model: M/long, layer_range: [4, 6]}
        merge_method: passthrough
        dtype: float16
        """,
    "a model put upon itself": """
        merge_method: passthrough
        slices:
        - sources: [{model: M/a, layer_range: [0, 4]}]
        - sources: [{model: M/a, layer_range: [2, 4]}]
        """,
    "blocks that begin as nothing": """
        slices:
          - sources: [{model: M/base, layer_range: [0, 2]}]
          - sources:
            - model: M/base
              layer_range: [1, 2]
              parameters:
                scale:
                  - {filter: o_proj, value: 0.0}
                  - {filter: down_proj, value: 0.0}
                  - value: 1.0
          - sources: [{model: M/base, layer_range: [2, 4]}]
        merge_method: passthrough
        dtype: bfloat16
        """,
    "a slice that is merged between slices that are not": """
        slices:
          - sources: [{model: M/base, layer_range: [0, 1]}]
          - sources:
            - {model: M/base, layer_range: [1, 3]}
            - {model: M/a, layer_range: [1, 3], parameters: {weight: 0.6}}
            - {model: M/b, layer_range: [2, 4], parameters: {weight: 0.3}}
          - sources: [{model: M/base, layer_range: [3, 4]}]
        merge_method: task_arithmetic
        base_model: M/base
        dtype: float32
        """,
    "a union of tokens": """
        models:
          - {model: M/base, parameters: {weight: 1.0}}
          - {model: M/words, parameters: {weight: 1.0}}
        merge_method: linear
        tokenizer_source: union
        chat_template: chatml
        dtype: float32
        """,
    "tokens one by one": """
        models:
          - {model: M/base, parameters: {weight: 0.5}}
          - {model: M/words, parameters: {weight: 0.5}}
        merge_method: linear
        tokenizer:
          source: union
          pad_to_multiple_of: 8
          tokens:
            <|im_start|>: {source: M/words}
            <|im_end|>:
              source: {kind: model_token, model: M/words, token: "cd"}
              force: true
            cd: {source: {kind: zero}}
        dtype: float32
        """,
    "the tokens of one": """
        models:
          - {model: M/words, parameters: {weight: 0.7, density: 0.6}}
        merge_method: ties
        base_model: M/base
        tokenizer_source: M/words
        dtype: float32
        """,
}

CHANCE = ("dare_ties", "dare_ties, a weight for the base", "dare_linear", "della",
          "della_linear, a module and an empty tokenizer")  # fmt: skip
"""Recipes whose masks are drawn."""

REFUSED = {
    "a method of others": ("merge_method: cabs", "models: [{model: M/a}]", "merge_method"),
    "a revision beside the model": (
        "merge_method: linear",
        "models: [{model: M/a, revision: dpo-v0, parameters: {weight: 1}}]",
        "models[0]",
    ),
    "parameters beside the model": (
        "merge_method: linear",
        "models: [{model: M/a, weight: 0.5}, {model: M/b, weight: 0.5}]",
        "models[0]",
    ),
    "a dtype among the parameters": (
        "merge_method: linear",
        "models: [{model: M/a, parameters: {weight: 1}}]\nparameters: {dtype: bfloat16}",
        "parameters.dtype",
    ),
    "a parameter that nobody has": (
        "merge_method: dare_ties",
        "base_model: M/base\nmodels: [{model: M/a, parameters: {weight: 1}}]\n"
        "parameters: {dare_pruning_rate: 0.2}",
        "parameters.dare_pruning_rate",
    ),
    "a base that is no source": (
        "merge_method: slerp",
        "base_model: M/base\nparameters: {t: 0.5}\nslices: [{sources: [{model: M/a, layer_range:"
        " [0, 4]}, {model: M/b, layer_range: [0, 4]}]}]",
        "slices[0]",
    ),
    "experts": (
        "gate_mode: hidden",
        "base_model: M/a\nexperts: [{source_model: M/a, positive_prompts: [code]}]",
        "gate_mode",
    ),
    "a weight that is missing": (
        "merge_method: ties",
        "base_model: M/base\nmodels: [{model: M/a, parameters: {density: 0.5}}]",
        "weight of M/a",
    ),
    "another width": (
        "merge_method: linear",
        "models: [{model: M/a}, {model: M/wide}]\nparameters: {weight: 1}",
        "has shape",
    ),
    "other vocabularies": (
        "merge_method: linear",
        "models: [{model: M/a}, {model: M/words}]\nparameters: {weight: 1}",
        "tokenizer_source: union",
    ),
}
"""What is refused: method, the rest of the file, and what the message names."""


def models(folder: Path) -> Path:
    """Write the models that the recipes name."""
    from tests.unit.test_mergekit_recipes import write_llama

    for seed, name in enumerate(("base", "a", "b", "c", "long", "words", "wide")):
        tokens = ["cd"] if name == "words" else []
        added = ["<|im_start|>", "<|im_end|>"] if name == "words" else []
        _write_tokenizer(folder / "tokenizer" / name, tokens, added)
        vocab = 7 + len(tokens) + len(added)
        layers = 6 if name == "long" else 4
        write_llama(folder / name, layers, 10, vocab=vocab)
        _change(folder / name, seed, 24 if name == "wide" else None)
        for file in (folder / "tokenizer" / name).iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    for seed, name in enumerate(("lora", "lora2")):
        _write_adapter(folder / name, seed)
    return folder


def text(name: str, folder: Path) -> str:
    """A recipe's YAML over the models in `folder`."""
    import textwrap

    return textwrap.dedent(RECIPES[name]).replace("M/", f"{folder}/")


def _change(folder: Path, seed: int, width: int | None) -> None:
    """Weights that differ by what training changes; wider feed-forward layers."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    random = np.random.default_rng(seed)
    moved = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        shape = list(tensor.shape)
        if width is not None and "mlp" in name:
            shape[1 if "down" in name else 0] = width + 8
            tensor = np.zeros(shape, np.float32)
        noise = random.standard_normal(shape).astype(np.float32)
        moved[name] = tensor + (0.01 * noise if seed else 0)
    save_file(moved, folder / "model.safetensors", {"format": "pt"})


def _write_tokenizer(folder: Path, words: list[str], added: list[str]) -> None:
    from tokenizers import AddedToken, Tokenizer, pre_tokenizers
    from tokenizers import models as kinds

    tokens = ["<s>", "</s>", *"abcd", "ab", *words]
    merges = [(word[:-1], word[-1]) for word in ("ab", *words)]
    built = Tokenizer(kinds.BPE({t: n for n, t in enumerate(tokens)}, merges))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>")])
    built.add_tokens([AddedToken(t, special=True, normalized=False) for t in added])
    folder.mkdir(parents=True)
    built.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _write_adapter(folder: Path, seed: int) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(4):
        for module, rows, columns in (("self_attn.q_proj", 16, 16), ("mlp.up_proj", 24, 16)):
            at = f"base_model.model.model.layers.{layer}.{module}.lora_"
            tensors[f"{at}A.weight"] = random.standard_normal((2, columns)).astype(np.float32)
            tensors[f"{at}B.weight"] = 0.01 * random.standard_normal((rows, 2)).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0,
        "target_modules": ["q_proj", "up_proj"], "bias": "none", "fan_in_fan_out": False,
        "base_model_name_or_path": "base", "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
