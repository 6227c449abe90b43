"""What makes a run resumable: knowing that a folder is this run's, and which checkpoint is whole.

The Trainer takes the checkpoint with the highest number even when it is half written, and where the
optimizer's state is missing it silently starts a fresh one. So a checkpoint counts here only with a
marker that is written last, after everything is on the disk, and lists every file with its size
and its hash; the newest checkpoint that agrees with its marker is the one to continue from. Hashing
reads what was just written, mostly from memory, and again what is about to be loaded.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import msgspec

from optimer_engine.durable import replace_file, sync
from optimer_engine.errors import OutputError, RecipeError
from optimer_engine.journal import hash_range

MARKER = "checkpoint.ok"
_REQUIRED = (
    ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors",
     "pytorch_model_fsdp*", "global_step*"),
    ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    ("scheduler.pt", "global_step*"),
    ("rng_state.pth", "rng_state_*.pth"),
    ("trainer_state.json",),
)  # fmt: skip
"""Patterns, one of each group: the usual name first, then those of LoRA, FSDP and DeepSpeed."""


def mark_complete(checkpoint: Path) -> None:
    """Put a checkpoint's files on the disk, then say so in its marker.

    The Trainer's pickled arguments are removed: resuming does not read them.
    """
    (checkpoint / "training_args.bin").unlink(missing_ok=True)
    (checkpoint / MARKER).unlink(missing_ok=True)
    facts = {}
    for path in sorted(checkpoint.rglob("*")):  # FSDP and DeepSpeed write folders in it
        sync(path)
        if path.is_file():
            facts[path.relative_to(checkpoint).as_posix()] = _facts(path)
    sync(checkpoint)
    replace_file(checkpoint / MARKER, msgspec.json.format(msgspec.json.encode(facts)))
    sync(checkpoint.parent)


def defect(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, in a few words; None when it is complete."""
    try:
        text = (checkpoint / MARKER).read_bytes()
        facts = msgspec.json.decode(text, type=dict[str, tuple[int, str]])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return f"no {MARKER}: it was not saved to its end"
    for patterns in _REQUIRED:
        if not any(fnmatch(name, pattern) for name in facts for pattern in patterns):
            return f"{patterns[0]} was never saved"
    for name, (size, digest) in facts.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} expected"
        try:
            found = _facts(path)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found != (size, digest):
            return f"{name} is damaged: its hash is {found[1]}, {digest} was saved"
    return None


def _facts(path: Path) -> tuple[int, str]:
    """Size in bytes and xxh3-128 (hex) of a file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        return size, hash_range(fd, 0, size)
    finally:
        os.close(fd)


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint in `folder`, and a message for each newer one passed over.

    Those passed over are removed, since the continued run will save under the same names.
    """
    numbered = [
        (int(match[1]), path)
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    ]
    messages: list[str] = []
    for _, path in sorted(numbered, reverse=True):
        reason = defect(path)
        if reason is None:
            return path, messages
        messages.append(f"{path.name} is incomplete and was removed: {reason}")
        shutil.rmtree(path)
    return None, messages


def keep_weights(checkpoint: Path, folder: Path) -> None:
    """Keep a checkpoint's weights and configuration as `folder`, without a second copy on the disk.

    They are hard links, where the file system has them: the Trainer may remove its own names.
    """
    partial = folder.with_name(folder.name + ".partial")
    for leftover in (partial, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    for pattern in ("*.safetensors", "*.safetensors.index.json", "*config.json"):
        for path in checkpoint.glob(pattern):
            link_or_copy(path, partial / path.name)
    sync(partial)
    partial.rename(folder)
    sync(folder.parent)


def link_or_copy(path: Path, to: Path) -> None:
    """A second name for a file, or a copy where there are no hard links."""
    try:
        to.hardlink_to(path)
    except OSError:
        shutil.copyfile(path, to)
        sync(to)


def check_same_run(identity: Path, now: dict[str, Any]) -> None:
    """Refuse a run folder that belongs to another configuration, base or text.

    Raises:
        RecipeError: naming each key that differs, with both values.
        OutputError: the record cannot be read.
    """
    try:
        then = msgspec.json.decode(identity.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError) as error:
        raise OutputError(f"cannot be read: {error}", where=str(identity)) from error
    now = msgspec.json.decode(msgspec.json.encode(now))
    if changes := list(_differences(then, now)):
        raise RecipeError(
            "belongs to another run; it differs in " + "; ".join(changes),
            where=str(identity.parent),
            todo="choose another output folder, or set these back to continue that run",
        )


def _differences(then: Any, now: Any, key: str = "") -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        pairs = [(name, then.get(name), now.get(name)) for name in sorted(then.keys() | now.keys())]
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        pairs = [(str(i), *pair) for i, pair in enumerate(zip(then, now, strict=True))]
    else:
        return [] if then == now else [f"{key} ({_short(then)} then, {_short(now)} now)"]
    found = [_differences(a, b, f"{key}.{name}".lstrip(".")) for name, a, b in pairs]
    return [difference for part in found for difference in part]


def _short(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 40 else text[:37] + "..."


def fingerprint_of(*parts: object) -> str:
    """sha256 (hex) of `parts` as JSON."""
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()
