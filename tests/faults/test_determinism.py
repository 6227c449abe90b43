"""Nothing but the recipe and the sources decides the bytes."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace

import pytest
import torch

from optimer_engine import Checkpoint, FolderSink, plan
from tests.conftest import nearby, random_tensors

METHODS = {
    "task_arithmetic": {},
    "ties": {"density": 0.4},
    "dare_linear": {"density": 0.5},
    "della": {"density": 0.5},
    "slerp": {"t": 0.3},
}


@pytest.fixture
def sources(write_checkpoint):
    base = random_tensors(0) | {f"model.{n}": torch.linspace(-1, 1, 9000 + n) for n in range(2)}
    return [str(write_checkpoint("base", base, files=2))] + [
        str(write_checkpoint(name, nearby(base, seed))) for name, seed in (("a", 1), ("b", 2))
    ]


def sha256_of_tensors(folder):
    """By name: of dtype, shape and bytes, however they are spread over files."""
    found = {}
    with Checkpoint.open(folder) as opened:
        for name, info in opened.tensors.items():
            content = memoryview(bytearray(info.nbytes))
            opened.read_into(info.file, info.offset, content)
            digest = hashlib.sha256(content).hexdigest()
            found[name] = (info.dtype, info.shape, digest)
    return found


def check_matrix(sources, tmp_path, method, matrix):
    used = sources[1:2] if method == "slerp" else sources[1:]
    recipe = {
        "base": sources[0],
        "sources": [{"name": s[-1], "model": s, "weight": 0.5} for s in used],
        "method": method, "parameters": METHODS[method],
    }  # fmt: skip
    if method == "slerp":
        del recipe["sources"][0]["weight"]
    expected = None
    for number, (threads, tile_bytes, mem_limit, shard) in enumerate(matrix):
        made = plan(recipe, threads=threads, mem_limit=mem_limit, max_shard_size=shard)
        if tile_bytes:
            made = replace(made, tile_bytes=tile_bytes)
        made.run(FolderSink(tmp_path / str(number)))
        made.close()
        found = sha256_of_tensors(tmp_path / str(number))
        expected = expected or found
        assert found == expected, (threads, tile_bytes, mem_limit, shard)


THREADS, TILES = (1, 2, 5), (None, 100, 4096, 7000)
LIMITS, SHARDS = ("24MB", "512MB"), ("7kB", "30kB", "1GB")


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_of_the_matrix_of_settings(sources, tmp_path, method):
    whole = list(itertools.product(THREADS, TILES, LIMITS, SHARDS))
    check_matrix(
        sources, tmp_path, method, whole[::9] if method == "task_arithmetic" else whole[::23]
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_whole_matrix_of_settings(sources, tmp_path, method):
    check_matrix(sources, tmp_path, method, itertools.product(THREADS, TILES, LIMITS, SHARDS))
