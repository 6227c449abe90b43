"""Checkpoints to merge: the shapes and names of a Llama, the values of a generator.

A merge costs what its bytes cost, whatever they mean, so a checkpoint of real architecture with
random values stands for a trained one of its size, and anyone can make the same one. Sources are
the base plus noise of 3 % of its spread, as continual pre-training leaves them. Made once, block by
block, in a folder that appears only when it is complete.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from optimer_engine.safetensors_format import place
from optimer_engine.types import DType, TensorInfo

LAYERS, HEADS, SHARDS = 24, 16, 4
PARAMETERS_PER_HIDDEN2 = 128 + LAYERS * 15
"""Vocabulary 128 hidden, tied; a layer has 3 for attention with 8 key heads and 12 for the MLP."""
BLOCK_ELEMS = 1 << 20
WEIGHTS = (0.4, 0.3, 0.25, 0.2)


@dataclass(frozen=True)
class Inputs:
    """What is merged: folders, and a weight per source."""

    base: Path
    sources: tuple[Path, ...]
    weights: tuple[float, ...]

    @property
    def files(self) -> list[Path]:
        """Every weight file of base and sources."""
        return [f for folder in (self.base, *self.sources) for f in weight_files(folder)]

    @property
    def base_bytes(self) -> int:
        """Size of the base's weight files."""
        return sum(file.stat().st_size for file in weight_files(self.base))

    @property
    def read_bytes(self) -> int:
        """Size of all weight files."""
        return sum(file.stat().st_size for file in self.files)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in name order."""
    return sorted(folder.glob("*.safetensors"))


def make(work: Path, size_bytes: int, sources: int) -> Inputs:
    """A bf16 base of about `size_bytes` in four shards and `sources` full sources, under `work`."""
    hidden = max(32, round(math.sqrt(size_bytes / 2 / PARAMETERS_PER_HIDDEN2) / 32) * 32)
    folder = work / f"llama-{hidden}x{LAYERS}-{sources}-sources"
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        _write(partial, hidden, sources)
        partial.rename(folder)
    return Inputs(
        folder / "base",
        tuple(folder / f"source-{i}" for i in range(sources)),
        tuple(WEIGHTS[i % len(WEIGHTS)] for i in range(sources)),
    )


def _write(folder: Path, hidden: int, sources: int) -> None:
    from tqdm import tqdm

    config = _config(hidden)
    tensors = list(_tensors(config))
    shards: list[list[TensorInfo]] = [[] for _ in range(SHARDS)]
    total, placed_bytes = sum(t.nbytes for t in tensors), 0
    for info in tensors:
        shards[placed_bytes * SHARDS // total].append(info)
        placed_bytes += info.nbytes
    names = [f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors" for i in range(SHARDS)]
    folders = [folder / "base", *(folder / f"source-{i}" for i in range(sources))]
    index = {
        "metadata": {"total_size": total},
        "weight_map": {t.name: n for n, s in zip(names, shards, strict=True) for t in s},
    }
    for checkpoint in folders:
        checkpoint.mkdir(parents=True)
        for name, content in {
            "config.json": config,
            "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
            "model.safetensors.index.json": index,
            **_tokenizer(),
        }.items():
            (checkpoint / name).write_text(json.dumps(content, indent=2) + "\n")
    progress = tqdm(
        desc="make checkpoints", total=total * len(folders), unit="B", unit_scale=True, delay=2
    )
    for number, (name, shard) in enumerate(zip(names, shards, strict=True)):
        header, ordered = place(shard, {"format": "pt"}, number)
        with ExitStack() as stack:
            files = [stack.enter_context((c / name).open("wb")) for c in folders]
            for file in files:
                file.write(header)
            for info in ordered:
                _write_values(info, files)
                progress.update(info.nbytes * len(folders))
    progress.close()


def _write_values(info: TensorInfo, files: Sequence[IO[bytes]]) -> None:
    """One tensor into the base's file and every source's, block by block."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(info.name.encode()))
    mean = 1.0 if len(info.shape) == 1 else 0.0
    for start in range(0, info.elems, BLOCK_ELEMS):
        count = min(BLOCK_ELEMS, info.elems - start)
        base = torch.randn(count, generator=generator).mul_(0.02).add_(mean).bfloat16()
        for number, file in enumerate(files):
            values = base
            if number:
                values = (torch.randn(count, generator=generator) * 0.0006 + base).bfloat16()
            file.write(values.view(torch.int16).numpy().data)


def _tensors(config: dict[str, Any]) -> Iterator[TensorInfo]:
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    keys = hidden // HEADS * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for layer in range(LAYERS):
        for name, shape in {
            "input_layernorm": (hidden,),
            "mlp.down_proj": (hidden, mlp),
            "mlp.gate_proj": (mlp, hidden),
            "mlp.up_proj": (mlp, hidden),
            "post_attention_layernorm": (hidden,),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.v_proj": (keys, hidden),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    shapes["model.norm.weight"] = (hidden,)
    for name, shape in shapes.items():
        yield TensorInfo(name, DType.BF16, shape, 0, 0, 2 * math.prod(shape))


def _config(hidden: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "head_dim": hidden // HEADS,
        "vocab_size": 128 * hidden,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def _tokenizer() -> dict[str, Any]:
    """The smallest tokenizer that loads; some programs refuse a model without one."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [],
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
        },
    }
