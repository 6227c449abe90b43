"""Every malformed file is refused for what it is: at once, in little memory, without a trace."""

from __future__ import annotations

import json
import os
import time
import tracemalloc

import pytest
import safetensors

from optimer_engine import Checkpoint, merge
from optimer_engine.errors import CheckpointError
from optimer_engine.safetensors_format import read_header
from tests.conftest import random_tensors
from tests.faults import malformed

REFUSED = list(malformed.refused())
ACCEPTED = list(malformed.accepted())
FOLDERS = list(malformed.folders())


def read(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_header(fd, path, 0)
    finally:
        os.close(fd)


def cost(call):
    """(CPU seconds, most bytes of memory at once, the error) of a call."""
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(CheckpointError) as caught:
            call()
        return time.process_time() - started, tracemalloc.get_traced_memory()[1], caught.value
    finally:
        tracemalloc.stop()


def check_message(error, path, words):
    message = str(error)
    assert words in message
    assert message.startswith(str(path))
    assert message.count("\n") == 1  # one line, and one thing to do
    assert message.isascii()
    assert "\x1b" not in message
    assert error.exit_code == 2


def test_the_zoo_is_as_large_as_promised():
    assert len(REFUSED) >= 140
    assert len(ACCEPTED) >= 46
    assert len(FOLDERS) >= 50
    for animals in (REFUSED, ACCEPTED, FOLDERS):
        assert len({name for name, *_ in animals}) == len(animals)


def test_every_malformed_file_is_refused_with_its_own_message(tmp_path):
    for name, content, words in REFUSED:
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        cpu_s, peak_bytes, error = cost(lambda path=path: read(path))
        try:
            check_message(error, path, words)
        except AssertionError as wrong:
            raise AssertionError(f"{name}: {error}") from wrong
        assert cpu_s < 1, name
        assert peak_bytes < 64 << 20, name


def test_what_is_accepted_means_the_same_to_the_library(tmp_path):
    for name, content in ACCEPTED:
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        tensors, _ = read(path)
        library = dict(safetensors.deserialize(content))
        ours = {n: (i.dtype.code, i.shape, i.nbytes) for n, i in tensors.items()}
        theirs = {n: (e["dtype"], tuple(e["shape"]), len(e["data"])) for n, e in library.items()}
        assert ours == theirs, name


@pytest.mark.parametrize(
    ("header", "words"), [b[1:] for b in malformed.bombs()], ids=[b[0] for b in malformed.bombs()]
)
def test_header_bombs_do_not_go_off(tmp_path, header, words):
    path = tmp_path / "x.safetensors"
    path.write_bytes(malformed.file_of(header, 0))
    assert path.stat().st_size < 16_000_008, "judged by its size alone"
    _, peak_bytes, error = cost(lambda: read(path))
    check_message(error, path, words)
    assert peak_bytes < 50 << 20
    took_s = []
    for _ in range(3):
        started = time.process_time()
        with pytest.raises(CheckpointError):
            read(path)
        took_s.append(time.process_time() - started)
    assert min(took_s) < 0.3  # 0.1 on a quiet core


@pytest.mark.parametrize("number", range(len(FOLDERS)), ids=[name for name, *_ in FOLDERS])
def test_every_broken_folder_is_refused(tmp_path, number):
    _, files, words = FOLDERS[number]
    folder = malformed.build(tmp_path / "model", files)
    cpu_s, peak_bytes, error = cost(lambda: Checkpoint.open(folder))
    check_message(error, folder, words)
    assert cpu_s < 1
    assert peak_bytes < 64 << 20


def test_a_merge_with_a_broken_source_leaves_nothing(tmp_path, write_checkpoint):
    base = write_checkpoint("base", random_tensors(0))
    for _, files, words in FOLDERS[::9]:
        broken = malformed.build(tmp_path / "broken", files)
        recipe = {"base": str(base), "sources": [{"name": "x", "model": str(broken)}]}
        with pytest.raises(CheckpointError) as caught:
            merge(recipe, tmp_path / "out")
        assert words in str(caught.value)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "broken"]
        for path in broken.iterdir():
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        broken.rmdir()


def test_a_file_that_may_not_be_read_is_said_to_be_that(tmp_path, monkeypatch):
    folder = malformed.build(tmp_path / "m", {"model.safetensors": malformed.file_of({})})
    real = os.open

    def closed(path, *arguments, **named):
        if str(path).endswith("model.safetensors"):
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "open", closed)  # root may read everything
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be opened: Permission"):
        Checkpoint.open(folder)


def test_what_is_odd_but_harmless_is_noted(tmp_path):
    shard = {"model-1.safetensors": malformed.file_of({"model.layers.1.w": malformed.F32}, 8)}
    index = (
        b'{"metadata": {"total_size": 99999},'
        b' "weight_map": {"model.layers.1.w": "model-1.safetensors"}}'
    )
    files = {
        **shard, "model-2.safetensors": shard["model-1.safetensors"], malformed.INDEX: index,
        "config.json": b'{"auto_map": {"AutoModel": "code.Model"}, "num_hidden_layers": 1}',
    }  # fmt: skip
    with Checkpoint.open(malformed.build(tmp_path / "m", files)) as opened:
        notes = "\n".join(opened.notes)
    for words in (
        "model-2.safetensors is not in model.safetensors.index.json, and is not read",
        "total_size is 99999, its files have", "names code (auto_map); a merge runs none",
        "num_hidden_layers 1, the files hold 2 layers",
    ):  # fmt: skip
        assert words in notes


def test_a_large_header_in_any_usual_spelling_is_read(tmp_path):
    """As of a model with very many experts; metadata may hold JSON in a text."""
    one = {"dtype": "U8", "shape": [1]}
    tensors = {
        f"model.layers.0.mlp.experts.{n}.down_proj.weight": {**one, "data_offsets": [n, n + 1]}
        for n in range(50_000)
    }
    metadata = {"format": "pt", "note": '{"a": [1, "{"]}'}
    path = tmp_path / "x.safetensors"
    for separators in ((",", ":"), (", ", ": ")):
        header = json.dumps({"__metadata__": metadata, **tensors}, separators=separators)
        assert len(header) > 4_000_000
        path.write_bytes(malformed.file_of(header.encode(), len(tensors)))
        found, read_metadata = read(path)
        assert found.keys() == tensors.keys()
        assert read_metadata == metadata


def test_a_linked_file_is_read_as_the_hubs_cache_has_it(tmp_path):
    (tmp_path / "blob").write_bytes(malformed.file_of(malformed.GOOD))
    files = {"model.safetensors": tmp_path / "blob"}
    with Checkpoint.open(malformed.build(tmp_path / "m", files)) as opened:
        assert set(opened.tensors) == {"a", "b"}
