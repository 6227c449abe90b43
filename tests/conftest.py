"""Small checkpoints for every test."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

# One thread and no hub: set before any test imports torch or a Hugging Face library.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from safetensors.torch import save_file

Tensors = Mapping[str, torch.Tensor]
WriteCheckpoint = Callable[..., Path]


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> WriteCheckpoint:
    """write(name, tensors, config={}, files=1) -> a folder as save_pretrained leaves it."""

    def write(name: str, tensors: Tensors, config: Mapping | None = None, files: int = 1) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **(config or {})}))
        if files == 1:
            save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
            return folder
        names = list(tensors)
        weight_map = {}
        for number in range(files):
            shard = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
            part = {key: tensors[key] for key in names[number::files]}
            save_file(part, folder / shard, {"format": "pt"})
            weight_map |= dict.fromkeys(part, shard)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return write


def random_tensors(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Names of a decoder, with odd sizes, a scalar and an empty tensor."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (37, 24),
        "model.layers.0.mlp.weight": (24, 53),
        "model.layers.0.norm.weight": (24,),
        "model.layers.1.mlp.weight": (24, 53),
        "model.layers.1.norm.weight": (24,),
        "model.norm.weight": (24,),
        "model.scale": (),
        "model.unused": (0, 3),
        "lm_head.weight": (37, 24),
    }
    return {
        name: (torch.randn(shape, generator=generator) * 0.1).to(dtype)
        for name, shape in shapes.items()
    }


def nearby(tensors: Tensors, seed: int, scale: float = 0.02) -> dict[str, torch.Tensor]:
    """The same tensors after some training."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (t.double() + torch.randn(t.shape, generator=generator).double() * scale).to(t.dtype)
        for name, t in tensors.items()
    }
