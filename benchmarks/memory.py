"""Case `memory`: what a merge needs against the number of sources and the size of the model.

Whole processes that merge into nothing. Inputs are *sparse* files: headers with the shapes of Gemma
3 27B and holes for the numbers, which the file system reads as zeros. They show memory, planning,
and the speed of reading from the page cache and of the arithmetic at full size; they show nothing
of a disk's speed, and nothing of writing.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from benchmarks import measure
from benchmarks.runner import Case, Contestant
from optimer_engine.layout import lay_out
from optimer_engine.types import DType, TensorInfo, format_bytes

DEFAULT_BYTES = 54_900_000_000
RIVALS = ()
SMALL_BYTES = 1_200_000_000
WIDTH, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 5376, 21504, 32, 16, 128, 262_208


def case(
    work: Path, size_bytes: int, sources: int, cold: bool, rivals: tuple[str, ...], command: str
) -> Case:
    """The full size with `sources`, and a small model with 1 to 16 sources."""
    small = min(SMALL_BYTES, size_bytes // 4)
    wanted = [(small, n, "pread") for n in (1, 2, 4, 8, 16)]
    wanted += [(size_bytes, sources, "pread"), (size_bytes, sources, "mmap")]

    def contestant(size: int, count: int, backend: str) -> Contestant:
        folders = [sparse(work / f"sparse-{size}-{number}", size) for number in range(count + 1)]
        held = (folders[0] / "model.safetensors.index.json").read_text("utf-8")
        total = json.loads(held)["metadata"]["total_size"]
        pairs = [f"{0.4 / number}={folder}" for number, folder in enumerate(folders[1:], start=1)]
        program = [sys.executable, "-m", "benchmarks.null_merge", backend, folders[0], *pairs]
        name = f"{format_bytes(total)}, {count} sources, {backend}"
        return Contestant(
            name, "ours", total * (count + 1), lambda: measure.of_process(program, work / "log.txt")
        )

    return Case(
        name="memory",
        command=command,
        parameters={"size_bytes": size_bytes, "sources": sources, "sparse": True},
        contestants=[contestant(*each) for each in dict.fromkeys(wanted)],
        before=lambda: None,
    )


def _shapes(size_bytes: int) -> dict[str, tuple[int, ...]]:
    """Gemma 3 27B's text model with as many layers, and then rows of embeddings, as fit.

    For rehearsals of a few megabytes every dimension is cut down by the same factor.
    """
    factor = 1
    while 2 * 3 * WIDTH * INNER // factor**2 > size_bytes // 4:
        factor *= 2
    width, inner, vocabulary = WIDTH // factor, INNER // factor, VOCABULARY // factor
    queries, keys = HEADS * HEAD_DIM // factor, KV_HEADS * HEAD_DIM // factor
    attention = {
        "q_proj": (queries, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, queries),
    }
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    layer: dict[str, tuple[int, ...]] = {
        **{f"self_attn.{name}.weight": shape for name, shape in attention.items()},
        "self_attn.q_norm.weight": (HEAD_DIM,),
        "self_attn.k_norm.weight": (HEAD_DIM,),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        **{f"{norm}_layernorm.weight": (width,) for norm in norms},
    }
    layer_bytes = 2 * sum(math.prod(shape) for shape in layer.values())
    layers = max(1, (size_bytes - 2 * width * vocabulary) // layer_bytes)
    rows = (size_bytes - layers * layer_bytes) // (2 * width)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (max(1, rows), width)}
    for number in range(layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return {**shapes, "model.norm.weight": (width,)}


def sparse(folder: Path, size_bytes: int) -> Path:
    """A checkpoint in 5 GB shards whose files are headers and holes."""
    if folder.exists():
        return folder
    making = folder.with_suffix(".making")
    making.mkdir(parents=True, exist_ok=True)
    (making / "config.json").write_text("{}")
    infos = [
        TensorInfo(name, DType.BF16, shape, 0, 0, 2 * math.prod(shape))
        for name, shape in _shapes(size_bytes).items()
    ]
    weight_map = {}
    shards = lay_out(infos, min(5_000_000_000, size_bytes // 2), "model", {"format": "pt"})
    for shard in shards:
        with (making / shard.name).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.size)
        weight_map |= {info.name: shard.name for info in shard.tensors}
    total = sum(info.nbytes for info in infos)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (making / "model.safetensors.index.json").write_text(json.dumps(index))
    making.rename(folder)
    return folder
