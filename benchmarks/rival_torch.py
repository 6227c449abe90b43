"""A merge as one would write it in an evening with torch.

    python rival_torch.py FORM OUT BASE WEIGHT=SOURCE ...

FORM `per-tensor` opens every file lazily and merges one tensor after the other; `whole` loads every
checkpoint with `load_file` and adds. Both upcast to float32, use the delta form and round once, so
they are as accurate as ours; a file is saved when its last tensor is merged. Neither syncs to disk.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def main(form: str, out: Path, base: Path, sources: list[tuple[float, Path]]) -> None:
    """Merge the folders; all of them have the same file names."""
    out.mkdir(parents=True)
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    if form == "whole":
        loaded = [
            ({k: v for s in shards for k, v in load_file(folder / s).items()}, weight)
            for weight, folder in [(0.0, base), *sources]
        ]
    for shard in shards:
        merged = {}
        with ExitStack() as stack:
            if form == "whole":
                with safe_open(base / shard, "pt") as header:
                    names = list(header.keys())
                reads = [(tensors.__getitem__, weight) for tensors, weight in loaded]
            else:
                opened = [
                    (stack.enter_context(safe_open(folder / shard, "pt")), weight)
                    for weight, folder in [(0.0, base), *sources]
                ]
                names = list(opened[0][0].keys())
                reads = [(file.get_tensor, weight) for file, weight in opened]
            for name in names:
                start = reads[0][0](name).float()
                total = torch.zeros_like(start)
                for read, weight in reads[1:]:
                    total += weight * (read(name).float() - start)
                merged[name] = (start + total).bfloat16()
        save_file(merged, out / shard, metadata={"format": "pt"})
    for companion in base.glob("*.json"):
        shutil.copy(companion, out)


if __name__ == "__main__":
    pairs = [argument.split("=", 1) for argument in sys.argv[4:]]
    main(
        sys.argv[1],
        Path(sys.argv[2]),
        Path(sys.argv[3]),
        [(float(weight), Path(folder)) for weight, folder in pairs],
    )
