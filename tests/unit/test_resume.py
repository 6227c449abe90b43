"""An interrupted merge: absent or complete, and continued to the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zlib
from dataclasses import replace

import pytest
import torch

from optimer_engine import FolderSink, folder_sink, merge, plan
from optimer_engine.errors import BusyError, OutputError, RecipeError
from optimer_engine.journal import Claim, Journal
from tests.conftest import nearby, random_tensors


@pytest.fixture
def recipe(write_checkpoint, monkeypatch):
    monkeypatch.setattr(folder_sink, "SETTLE_BYTES", 1000)
    base = random_tensors(0) | {f"model.{n}": torch.linspace(-1, 1, 9000 + n) for n in range(3)}
    return {
        "base": str(write_checkpoint("base", base)),
        "sources": [
            {"name": "ja", "model": str(write_checkpoint("ja", nearby(base, 1))), "weight": 0.5}
        ],
        "max_shard_size": "50kB",
    }


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "report.json"}


def shards(folder):
    return {name: data for name, data in contents(folder).items() if name.endswith("safetensors")}


class StopsAfter(FolderSink):
    """Raises `error` instead of taking tile number `tiles`; settles after every tile."""

    def __init__(self, out, tiles, error):
        super().__init__(out)
        self.left, self.error = tiles, error

    def write_run(self, run, start, tile):
        if self.left == 0:
            raise self.error
        self.left -= 1
        super().write_run(run, start, tile)
        FolderSink.settle(self)

    def settle(self):
        pass


def run_until(recipe, out, tiles, error):
    made = replace(plan(recipe, threads=1), tile_bytes=4096)
    with pytest.raises(type(error)):
        made.run(StopsAfter(out, tiles, error))


@pytest.mark.parametrize("tiles", [0, 1, 2, 5, 12])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OutputError("disk full")])
def test_an_interrupted_merge_is_continued_to_the_same_bytes(recipe, tmp_path, tiles, error):
    whole = merge(recipe, tmp_path / "whole")
    out = tmp_path / "out"
    run_until(recipe, out, tiles, error)
    assert not out.exists()
    assert (tmp_path / "out.partial").exists() == (tiles > 0)
    report = replace(plan(recipe), tile_bytes=2048).run(FolderSink(out))
    assert contents(out) == contents(tmp_path / "whole")
    assert (report.bytes_read < whole.bytes_read) == (tiles > 0)
    assert not (tmp_path / "out.partial").exists()


def test_a_full_disk_on_the_second_try_keeps_what_the_first_did(recipe, tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    run_until(recipe, tmp_path / "out", 5, KeyboardInterrupt())
    kept = shards(tmp_path / "out.partial")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, -(10**9)))
    with pytest.raises(OutputError, match="are free"):
        merge(recipe, tmp_path / "out")
    assert shards(tmp_path / "out.partial") == kept


def test_an_error_in_the_input_leaves_nothing_to_continue(recipe, tmp_path):
    run_until(recipe, tmp_path / "out", 3, RecipeError("bad input"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "ja"]


@pytest.mark.parametrize("damage", ["data", "journal line", "journal tail", "journal head", "cut"])
def test_what_was_damaged_meanwhile_is_made_again(recipe, tmp_path, damage):
    merge(recipe, tmp_path / "whole")
    run_until(recipe, tmp_path / "out", 3, KeyboardInterrupt())
    partial = tmp_path / "out.partial"
    journal = partial / "merge.journal"
    shard = sorted(partial.glob("*.safetensors"))[0]
    if damage == "data":
        content = bytearray(shard.read_bytes())
        content[-3] ^= 4
        shard.write_bytes(content)
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-50])
    elif damage == "journal head":
        journal.write_bytes(b"x" + journal.read_bytes()[1:])
        (partial / "model-00009-of-00009.safetensors").write_bytes(b"of another layout")
    else:
        text = bytearray(journal.read_bytes())
        text[-20 if damage == "journal tail" else len(text) // 2] ^= 1
        journal.write_bytes(text[:-5] if damage == "journal tail" else text)
    merge(recipe, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_interrupted_merge_of_another_recipe_is_kept_unless_discarded(recipe, tmp_path):
    run_until(recipe, tmp_path / "out", 3, KeyboardInterrupt())
    before = contents(tmp_path / "out.partial")
    recipe["sources"][0]["weight"] = 0.6
    with pytest.raises(RecipeError, match="interrupted merge of other sources or weights"):
        merge(recipe, tmp_path / "out")
    assert contents(tmp_path / "out.partial") == before
    merge(recipe, tmp_path / "out", discard=True)
    merge(recipe, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_second_run_on_the_same_output_is_refused_and_harmless(recipe, tmp_path):
    first = FolderSink(tmp_path / "out")
    first.open(plan(recipe))
    with pytest.raises(BusyError, match=f"another run is writing it now: process {os.getpid()} on"):
        merge(recipe, tmp_path / "out")
    assert (tmp_path / "out.partial").exists()
    first.abort(KeyboardInterrupt())


def test_sigkill_at_many_points_then_the_same_command(recipe, tmp_path):
    merge(recipe, tmp_path / "whole")
    code = """
import json, os, signal, sys
from dataclasses import replace
from optimer_engine import FolderSink, folder_sink, plan
folder_sink.SETTLE_BYTES = 1000
recipe, out, point = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
calls = 0
def dying(name):
    real = getattr(os, name)
    def call(*arguments):
        global calls
        calls += 1
        if calls == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)
    setattr(os, name, call)
for name in ("pwrite", "write", "fdatasync", "fsync", "ftruncate", "truncate", "posix_fallocate"):
    dying(name)
replace(plan(recipe, threads=1), tile_bytes=4096).run(FolderSink(out))
"""
    out, killed = tmp_path / "out", 0
    for point in (1, 3, 7, 12, 18, 25, 31, 36):
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(recipe), str(out), str(point)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        killed += done.returncode == -signal.SIGKILL
        if done.returncode == 0:
            break
        assert not out.exists(), done.stderr
    assert killed >= 4
    if not out.exists():
        merge(recipe, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_the_journal_gives_back_its_valid_prefix(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.begin({"run": 1})
    claims = [Claim(number, 0, 8, "00") for number in range(3)]
    for claim in claims:
        journal.append(claim)
    journal.close()
    text = path.read_bytes()
    for cut in range(len(text)):
        path.write_bytes(text[:cut])
        again = Journal(path)
        whole_lines = text[:cut].count(b"\n")
        assert again.claims == claims[: max(0, whole_lines - 2)]
        assert again.head == ({"run": 1} if whole_lines else None)
        again.resume()
        again.append(claims[0])
        again.close()
        if whole_lines:
            again = Journal(path)
            assert again.claims == [*claims[: max(0, whole_lines - 2)], claims[0]]
            again.close()


@pytest.mark.parametrize("line", ["[]", "{", '{"file": "x"}', '{"file": -1}', "null", "\\xff"])
def test_a_line_of_another_kind_is_no_claim(tmp_path, line):
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.begin({"run": 1})
    journal.close()
    with path.open("ab") as file:
        file.write(b"%08x %s\n" % (zlib.crc32(line.encode()), line.encode()))
    again = Journal(path)
    assert (again.head, again.claims) == ({"run": 1}, [])
    again.close()


def test_every_byte_of_the_output_is_covered_by_a_hash(recipe, tmp_path):
    from optimer_engine.journal import hash_range

    report = merge(recipe, tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()} - {"report.json"}
    assert set(report.files) == names
    for name, ranges in report.files.items():
        with (tmp_path / "out" / name).open("rb") as file:
            at = 0
            for begin, end, digest in ranges:
                assert begin == at
                assert hash_range(file.fileno(), begin, end) == digest
                at = end
            assert at == (tmp_path / "out" / name).stat().st_size
