"""The quick part: what headers and configuration say of one folder. No element is read, but for the
few KiB per tensor of the fingerprint."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from optimer_engine.checkpoint import VECTOR, Checkpoint
from optimer_engine.safetensors_format import read_header
from optimer_engine.types import DType, TensorInfo
from optimer_engine.vectors.format import PARTS, TENSOR, Description, parse, part_name

_KINDS = {"model": "model", "vector": "vector", "adapter_model": "LoRA adapter"}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)(?:\.|$)")


def summarise(checkpoint: Checkpoint) -> dict[str, Any]:
    """Facts of an opened folder, as plain data.

    Returns:
        folder; kind; mode (of a vector); files; bytes; tensors; parameters; layers; dtypes: {code:
        {tensors, parameters}} of what is stored (a packed tensor counts as its mode); largest:
        [name, shape] of the largest tensors; fingerprint; base_fingerprint, metadata (of a vector);
        config: the few entries that tell architectures apart.
    """
    described, plain = _tensors(checkpoint)
    shapes = {name: said.shape for name, said in described.items()}
    shapes |= {info.name: info.shape for info in plain}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    dtypes: dict[str, dict[str, int]] = {}
    labels = {name: _label(said) for name, said in described.items()}
    for name, code in (labels | {info.name: info.dtype.code for info in plain}).items():
        counted = dtypes.setdefault(code, {"tensors": 0, "parameters": 0})
        counted["tensors"] += 1
        counted["parameters"] += sizes[name]
    layers = {match[1] for match in map(_LAYER.search, shapes) if match}
    largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:3]
    facts: dict[str, Any] = {
        "folder": str(checkpoint.folder),
        "kind": _KINDS[checkpoint.kind],
        "files": len(checkpoint.files),
        "bytes": sum(info.nbytes for info in checkpoint.tensors.values()),
        "tensors": len(shapes),
        "parameters": sum(sizes.values()),
        "layers": len(layers),
        "dtypes": dtypes,
        "largest": [[name, list(shapes[name])] for name in largest],
        "fingerprint": checkpoint.fingerprint,
    }
    if checkpoint.kind == VECTOR:
        kept = {k: v for k, v in checkpoint.metadata.items() if not k.startswith(TENSOR)}
        facts["mode"] = kept.get("vector_mode", "plain")
        facts["base_fingerprint"] = checkpoint.base_fingerprint
        facts["metadata"] = kept
    keys = ("model_type", "architectures", "peft_type", "r", "lora_alpha")
    facts["config"] = {key: checkpoint.config[key] for key in keys if key in checkpoint.config}
    return facts


def _label(said: Description) -> str:
    return f"{said.mode} {said.dtype.code}" if said.mode == "exact" else said.mode


def _tensors(checkpoint: Checkpoint) -> tuple[dict[str, Description], list[TensorInfo]]:
    """Packed tensors as their files describe them, and the entries that are none of their parts."""
    entries = dict(checkpoint.tensors)
    described: dict[str, Description] = {}
    if checkpoint.kind == VECTOR:
        for number, file in enumerate(checkpoint.files):
            metadata = checkpoint.metadata
            if number:
                metadata = read_header(file.fd, file.path, number)[1]
            for key, text in metadata.items():
                said = parse(text) if key.startswith(TENSOR) else None
                if isinstance(said, Description):
                    name = key.removeprefix(TENSOR)
                    described[name] = said
                    for part in PARTS[said.mode]:
                        entries.pop(part_name(name, part), None)
    return described, list(entries.values())


def layer_of(name: str) -> str:
    """The number of the layer that a tensor belongs to, or "-" for those outside of all layers."""
    match = _LAYER.search(name)
    return match[1] if match else "-"


_TYPES = (
    ("norm", r"norm|(^|[._])ln(_\w+|\d)?($|\.)"),
    ("embedding", r"embed|(^|\.)w[tp]e\.|lm_head"),
    ("attention", r"attn|attention|(^|\.)[qkvo]_proj|query_key_value"),
    ("mlp", r"mlp|ffn|feed_forward|expert|(gate|up|down)_proj|(^|\.)fc\d"),
)


def module_type(name: str) -> str:
    """attention, mlp, norm, embedding or other, by the names that model families use."""
    return next((kind for kind, words in _TYPES if re.search(words, name.lower())), "other")


def small_name(path: Path | str) -> str:
    """A short name for a folder: its own, with its parent's where that says nothing."""
    parts = Path(path).resolve().parts
    if len(parts) > 2 and parts[-1] in ("vector", "model", "best"):
        return "/".join(parts[-2:])
    return parts[-1]


def is_float(dtype: DType) -> bool:
    """Whether elements of this dtype are numbers that training moves."""
    return dtype.mergeable
