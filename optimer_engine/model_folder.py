"""What a checkpoint's folder says of itself, index and configuration, read strictly.

Loaders differ in what they make of a contradictory folder: a tensor listed twice, a file beside its
index, a path that leads out of the folder. A merge of what one loader reads may be evaluated as
what another one reads, so whatever can be taken in two ways is refused, and what is merely odd is
noted. Nothing here is executed: a configuration that names code is data like any other.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NoReturn

from optimer_engine.errors import CheckpointError, quoted

MODEL, VECTOR, ADAPTER = "model", "vector", "adapter_model"
"""What a folder holds, which is also the stem of its file names; an adapter is PEFT's."""

MAX_JSON_BYTES = 32_000_000
MAX_JSON_ENTRIES = 400_000

_LAYER = re.compile(r"^(|.*\.)layers\.(\d+)\.")


def kind_of(folder: Path) -> str:
    """MODEL, VECTOR or ADAPTER, by the files in the folder.

    Raises:
        CheckpointError: there is none of them, or both a single file and an index.
    """
    for kind in (MODEL, VECTOR, ADAPTER):
        single, index = folder / f"{kind}.safetensors", folder / f"{kind}.safetensors.index.json"
        if os.path.lexists(single) and os.path.lexists(index):
            raise CheckpointError(
                f"holds both {single.name} and {index.name}, and loaders differ in which they read",
                where=str(folder),
                todo="remove the stale one",
            )
        if os.path.lexists(single) or os.path.lexists(index):
            return kind
    pickles = [*sorted(folder.glob("*.bin")), *sorted(folder.glob("*.pt"))]
    if pickles:
        raise CheckpointError(
            f"holds {quoted(pickles[0].name)}, a pickle, and no safetensors file",
            where=str(folder),
            todo="run `optimer convert` on the folder and merge what it writes",
        )
    raise CheckpointError(
        "no model.safetensors, no model.safetensors.index.json and no vector in this folder",
        where=str(folder),
        todo="name a folder written by save_pretrained or `optimer extract`",
    )


def read_config(folder: Path, kind: str) -> dict[str, Any]:
    """config.json, or adapter_config.json; {} for a vector without one."""
    path = folder / ("adapter_config.json" if kind == ADAPTER else "config.json")
    if os.path.lexists(path):
        return read_json(path)
    if kind != VECTOR:
        raise CheckpointError(
            f"{path.name} is missing", where=str(folder), todo="copy it from the original model"
        )
    return {}


def read_weight_map(index: Path) -> tuple[dict[str, str], list[str]]:
    """Tensor name to file name, of files that are there; and notes.

    Raises:
        CheckpointError: the index is not one, or names anything but a file of its folder.
    """
    data = read_json(index)
    weight_map = data.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _bad(index, "no weight_map from tensor names to file names")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not is_plain(shard):
            _bad(
                index, f"{quoted(name)} is said to lie in {quoted(shard)!r}, not a plain file name"
            )
    for shard in sorted(set(weight_map.values())):
        path = index.parent / shard
        if not path.exists():
            link = f" (a link to {quoted(path.readlink())})" if path.is_symlink() else ""
            raise CheckpointError(
                f"shard {quoted(shard)} is missing{link}",
                where=str(index.parent),
                todo="download or copy the missing file",
            )
    return weight_map, _notes_on_index(index, data, set(weight_map.values()))


def is_plain(name: str) -> bool:
    """Whether it can only be the name of a file in the folder itself."""
    return (
        Path(name).name == name
        and name not in ("", ".", "..")
        and len(name.encode(errors="replace")) < 256
        and name.isprintable()
        and "\\" not in name
    )


def _notes_on_index(index: Path, data: dict[str, Any], shards: Collection[str]) -> list[str]:
    folder = index.parent
    stem = index.name.removesuffix(".safetensors.index.json")
    extra = sorted(p.name for p in folder.glob(f"{stem}-*.safetensors") if p.name not in shards)
    notes = [f"{folder}: {quoted(name)} is not in {index.name}, and is not read" for name in extra]
    metadata = data.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None:
        # Headers are not part of the total; tied tensors may be counted twice.
        size = sum((folder / name).stat().st_size for name in shards)
        if not isinstance(total, int | float) or not size / 2 <= total <= size * 2:
            notes.append(
                f"{index}: total_size is {quoted(total)[:40]}, its files have {size} bytes"
            )
    return notes


def check_config(folder: Path, config: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Notes on a model's config.json, compared with the names of its tensors.

    Raises:
        CheckpointError: it promises layers that no file holds, which a loader would fill at random.
    """
    notes = []
    if "auto_map" in config:
        notes.append(f"{folder}: config.json names code (auto_map); a merge runs none")
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else config
    wanted = inner.get("num_hidden_layers")
    counts: dict[str, int] = {}
    for found in filter(None, map(_LAYER.match, names)):
        counts[found[1]] = max(counts.get(found[1], 0), int(found[2]) + 1)
    if type(wanted) is not int or not counts:
        return notes
    held = max(counts.values())
    if held < wanted:
        raise CheckpointError(
            f"config.json has num_hidden_layers {wanted}, the files hold {held} layers",
            where=str(folder),
            todo="restore the missing layers, or correct config.json",
        )
    predicted = inner.get("num_nextn_predict_layers")
    if wanted not in counts.values() and not predicted:
        notes.append(
            f"{folder}: config.json has num_hidden_layers {wanted}, the files hold {held} layers"
        )
    return notes


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object: one meaning, bounded size.

    Raises:
        CheckpointError: naming the file.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                _bad(path, f"key {quoted(name)!r} stands twice")
            found[name] = value
        return found

    def no_constant(constant: str) -> NoReturn:
        _bad(path, f"is not readable JSON: {constant} is no number")

    try:
        text = _read_regular(path).decode("utf-8")
        data = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        _bad(path, f"is not readable JSON: {error}")
    except RecursionError:
        _bad(path, "is not readable JSON: nested too deep")
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        _bad(path, f"is not readable JSON: {error}")
    if not isinstance(data, dict):
        _bad(path, "is not a JSON object")
    return data


def _read_regular(path: Path) -> bytes:
    # O_NONBLOCK: a FIFO must be refused, not waited for.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            _bad(path, "is not a regular file")
        if found.st_size > MAX_JSON_BYTES:
            _bad(path, f"{found.st_size} bytes, at most {MAX_JSON_BYTES} expected")
        content = os.pread(fd, found.st_size, 0)
    finally:
        os.close(fd)
    if content.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            "this is a Git LFS pointer, not the file", where=str(path), todo="run `git lfs pull`"
        )
    for mark in (b":", b",", b"["):
        count = content.count(mark)
        if count > MAX_JSON_ENTRIES:
            _bad(path, f"{count} times {mark.decode()!r}, at most {MAX_JSON_ENTRIES} expected")
    return content


def _bad(path: Path, what: str) -> NoReturn:
    raise CheckpointError(what, where=str(path), todo="download or save the checkpoint again")
