"""Pickled weights (`pytorch_model.bin`) as safetensors, without trusting them.

A pickle is a program. PyTorch's `weights_only` interpreter runs only what builds tensors, and was
broken out of twice, so it runs in a process of its own: no tokens in its environment, bounded CPU
time, memory and file size, and a result that is read back as strictly as any other file. Nothing
else in this package opens a pickle.

The child maps a file and copies tensor by tensor, so memory holds one tensor of a zipped file
(PyTorch 1.6 and later) and the whole of an older one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from optimer_engine import durable
from optimer_engine.companions import companions, read, without_secrets
from optimer_engine.errors import CheckpointError, OutputError, quoted
from optimer_engine.folder_sink import NUMERICS_VERSION
from optimer_engine.journal import hash_range
from optimer_engine.model_folder import is_plain, read_json
from optimer_engine.report import Report, versions
from optimer_engine.safetensors_format import place, read_header
from optimer_engine.types import DType, TensorInfo
from optimer_engine.work_folder import WorkFolder, check_place

OPERATION = "converted from pickles"
_STEMS = {"pytorch_model": "model", "adapter_model": "adapter_model"}
_SECONDS, _SECONDS_PER_GB = 120, 120
_SPARE_BYTES = 16 << 30
"""Address space beside the file's own: what PyTorch maps before it does anything."""


def convert(folder: str | Path, out: str | Path, *, discard: bool = False) -> Report:
    """Write the pickled model or adapter in `folder` into `out` as safetensors.

    Tensors keep their names, dtypes, shapes and bytes; tensors that share memory are written each.
    Configuration and tokenizer files are copied.

    Raises:
        CheckpointError: there is no pickle, it holds anything but tensors by name, or reading it
            failed, took too long or too much memory.
        RecipeError, OutputError: as `merge` does for `out`.
    """
    folder, out = Path(folder), Path(out)
    pickles = _find(folder)
    check_place(out, [folder])
    if out.exists() and any(out.iterdir()):
        raise OutputError(
            "exists and is not an empty folder",
            where=str(out),
            todo="choose another output or remove it first",
        )
    names = {path.name: _new_name(path.name) for path in pickles}
    head = {
        "numerics_version": NUMERICS_VERSION,
        "part": [1, 1],
        "recipe": OPERATION,
        "files": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in pickles],
    }
    try:
        work = WorkFolder(out, (1, 1), [*names.values()], head, "", discard)
        try:
            report = _convert(folder, pickles, names, work)
        except CheckpointError:
            work.abandon()
            raise
        finally:
            work.close()
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot be written: {error.strerror}",
            where=str(out),
            todo="check the disk and the folder, then run the same command again",
        ) from error
    return report


def _convert(folder: Path, pickles: list[Path], names: dict[str, str], work: WorkFolder) -> Report:
    report = Report(
        operation=OPERATION, recipe={}, recipe_fingerprint="", fingerprints={}, out=str(work.out),
        versions=versions("torch"),
    )  # fmt: skip
    weight_map: dict[str, str] = {}
    found = companions(folder, "adapter_config.json")
    small = {path.name: without_secrets(read(path)) for path in found}
    for path in pickles:
        made = work.path / names[path.name]
        durable.remove(made)
        _run_child(path, made)
        fd = os.open(made, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            tensors, _ = read_header(fd, made, 0)
            size = os.fstat(fd).st_size
            durable.sync(fd)
            report.files[made.name] = [(0, size, hash_range(fd, 0, size))]
        finally:
            os.close(fd)
        twice = sorted(tensors.keys() & weight_map.keys())
        if twice:
            raise CheckpointError(
                f"{quoted(twice[0])} lies here and in another file",
                where=str(path),
                todo="download or save the checkpoint again",
            )
        weight_map.update(dict.fromkeys(tensors, made.name))
        report.bytes_written += size
    report.tensors = len(weight_map)
    if len(pickles) > 1:
        index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
        small["model.safetensors.index.json"] = json.dumps(index, indent=2).encode()
    for name, content in small.items():
        durable.write_file(work.path / name, content)
        report.files[name] = [(0, len(content), xxhash.xxh3_128_hexdigest(content))]
    work.publish(report)
    return report


def _find(folder: Path) -> list[Path]:
    """The pickles of a folder, in order."""
    if not folder.is_dir():
        raise CheckpointError("no such folder", where=str(folder), todo="check the path")
    for stem in _STEMS:
        index = folder / f"{stem}.bin.index.json"
        if index.exists():
            shards = read_json(index).get("weight_map")
            named = list(shards.values()) if isinstance(shards, dict) else []
            for name in named or [""]:
                if not isinstance(name, str) or not is_plain(name) or not name.endswith(".bin"):
                    raise CheckpointError(
                        f"names {quoted(name)!r}, not a plain file name that ends in .bin",
                        where=str(index),
                        todo="download or save the checkpoint again",
                    )
            found = [folder / name for name in sorted(set(named))]
        else:
            found = [folder / f"{stem}.bin"]
        if all(path.is_file() for path in found):
            return found
        if index.exists():
            gone = next(path.name for path in found if not path.is_file())
            raise CheckpointError(
                f"{gone} is missing", where=str(folder), todo="download or copy the missing file"
            )
    raise CheckpointError(
        "no pytorch_model.bin, no pytorch_model.bin.index.json and no adapter_model.bin",
        where=str(folder),
        todo="name the folder of a model that was saved as a pickle",
    )


def _new_name(name: str) -> str:
    stem = name.removesuffix(".bin")
    for old, new in _STEMS.items():
        if stem == old or stem.startswith(f"{old}-"):
            return f"{new}{stem.removeprefix(old)}.safetensors"
    return f"{stem}.safetensors"


def _run_child(source: Path, target: Path) -> None:
    """Convert one file in a process that can do little else."""
    size = source.stat().st_size
    seconds = _SECONDS + _SECONDS_PER_GB * (size >> 30)
    kept = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR")
    environment = {key: os.environ[key] for key in kept if key in os.environ}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = [sys.executable, "-m", "optimer_engine.convert", str(source), str(target), str(seconds)]
    try:
        done = subprocess.run(
            child, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=4 * seconds, check=False, cwd=target.parent,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        _refuse(source, f"reading it took more than {4 * seconds} s")
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        _refuse(source, f"reading it ended by {name}: too much memory, CPU time or output")
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        _refuse(source, quoted(lines[-1])[:300] if lines else "it could not be read")


def _refuse(source: Path, what: str) -> Any:
    raise CheckpointError(
        what,
        where=str(source),
        todo="load it with the program that wrote it and save it as safetensors",
    )


def _child(source: Path, target: Path, seconds: int) -> None:
    """In the child: read the pickle and write the file; raises SystemExit with one line."""
    import resource

    size = source.stat().st_size
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: 4 * size + _SPARE_BYTES,
        resource.RLIMIT_FSIZE: 2 * size + (64 << 20),
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))
    import torch

    try:
        try:
            loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError):  # not a zip: the format before PyTorch 1.6
            loaded = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        text = " ".join(str(error).split()).partition("WeightsUnpickler error:")
        raise SystemExit(
            f"not loadable as weights only: {(text[2] or text[0]).strip()[:250]}"
        ) from None
    if not isinstance(loaded, dict):
        raise SystemExit(f"holds a {type(loaded).__name__}, a map from names to tensors expected")
    dtypes = {getattr(torch, d.torch_name): d for d in DType if hasattr(torch, d.torch_name)}
    infos = []
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise SystemExit(f"{quoted(name)} is a {type(tensor).__name__}, a tensor expected")
        if tensor.layout != torch.strided or tensor.dtype not in dtypes or tensor.is_quantized:
            raise SystemExit(f"{quoted(name)} is {tensor.dtype}, {tensor.layout}; plain expected")
        dtype = dtypes[tensor.dtype]
        infos.append(
            TensorInfo(name, dtype, tuple(tensor.shape), 0, 0, tensor.numel() * dtype.itemsize)
        )
    header, placed = place(infos, {"format": "pt"}, 0)
    fd = durable.create(target)
    durable.write_at(fd, header, 0)
    for info in placed:
        flat = loaded.pop(info.name).detach().contiguous().reshape(-1)
        content = flat.view(torch.uint8).numpy() if info.nbytes else np.empty(0, np.uint8)
        durable.write_at(fd, content.data, info.offset)
    os.close(fd)


if __name__ == "__main__":
    _child(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
