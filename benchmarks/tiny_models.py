"""Tiny checkpoints in the layouts of real architectures, for comparisons model by model.

Transformers makes and saves a model, so that names, shapes and config.json are the real ones; its
weights are then replaced by noise of a usual size, and every source is the base plus noise of 3 %
of each tensor's size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = {
    "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 56, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
DELTA_SHARE = 0.03


def _llama(**more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, **more))


def _tied() -> Any:
    return _llama(tie_word_embeddings=True)


def _qwen() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**SIZES))


def _experts() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, head_dim=32, num_experts=4, num_experts_per_tok=2,
                       moe_intermediate_size=96)
    )  # fmt: skip


def _gemma() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=32))


def _gemma_with_vision() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**SIZES, "head_dim": 32}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    )


FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": _llama,
    "llama, tied": _tied,
    "qwen2, biases": _qwen,
    "qwen3, experts": _experts,
    "gemma3, tied": _gemma,
    "gemma3, vision": _gemma_with_vision,
}


def make(family: str, folder: Path, sources: int) -> tuple[Path, list[Path], list[Path]]:
    """Write a base and its sources into `folder`, unless they are there.

    Returns:
        the base (bf16), the sources (bf16), and the same in float32 with noise below bf16's
        resolution, so that no two magnitudes of a delta are equal.
    """
    import torch
    from safetensors.torch import load_file, save_file

    base = folder / "base"
    rounded = [folder / f"source-{number}" for number in range(sources)]
    exact = [folder / f"source-{number}-float32" for number in range(sources)]
    if (folder / "done").exists():
        return base, rounded, exact
    torch.manual_seed(0)
    FAMILIES[family]().bfloat16().save_pretrained(base)
    generator = torch.Generator().manual_seed(1)
    made = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        # Transformers drops a level of the vision tower's names that published checkpoints have.
        hub = name.replace("vision_tower.", "vision_tower.vision_model.")
        noise = torch.randn(tensor.shape, generator=generator)
        made[hub] = (tensor.float() + noise * (0.1 if tensor.ndim == 1 else 0.02)).bfloat16()
    save_file(made, base / "model.safetensors", {"format": "pt"})
    config = (base / "config.json").read_text("utf-8")
    for number in range(sources):
        moved = {}
        for name, tensor in made.items():
            size = DELTA_SHARE * float(tensor.float().std())
            noise = torch.randn(tensor.shape, generator=generator)
            moved[name] = tensor.float() + noise * size
        for path, dtype in ((rounded[number], torch.bfloat16), (exact[number], torch.float32)):
            path.mkdir(exist_ok=True)
            stored = {name: tensor.to(dtype) for name, tensor in moved.items()}
            save_file(stored, path / "model.safetensors", {"format": "pt"})
            said = {**json.loads(config), "dtype": str(dtype).removeprefix("torch.")}
            (path / "config.json").write_text(json.dumps(said, indent=2), "utf-8")
    (folder / "done").touch()
    return base, rounded, exact
