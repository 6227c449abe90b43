"""Sources are only read, and one that changes meanwhile is noticed or makes no difference."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from optimer_engine import FolderSink, merge, plan
from optimer_engine.errors import CheckpointError, OutputError, RecipeError
from tests.conftest import nearby, random_tensors
from tests.faults.recipes import contents

PROGRAM = [sys.executable, "-c", "from optimer_engine.cli import main; main()"]


@pytest.fixture
def recipe(write_checkpoint):
    base = random_tensors(0) | {f"model.{n}": torch.linspace(-1, 1, 9000) for n in range(3)}
    base["model.steps"] = torch.arange(40_000)  # copied from file to file
    tuned = {name: tensor for name, tensor in base.items() if tensor.is_floating_point()}
    folders = write_checkpoint("base", base), write_checkpoint("ja", {**base, **nearby(tuned, 1)})
    return {
        "base": str(folders[0]),
        "sources": [{"name": "ja", "model": str(folders[1]), "weight": 0.5}],
    }


def cut(path):
    os.truncate(path, path.stat().st_size // 3)


def grow(path):
    os.truncate(path, path.stat().st_size + 1)


def cut_and_grow(path):
    size = path.stat().st_size
    os.truncate(path, size // 3)
    os.truncate(path, size)


def overwrite(path):
    with path.open("r+b") as file:
        file.seek(-9000, os.SEEK_END)
        file.write(bytes(9000))


def replace_by_another(path):
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)


def remove(path):
    path.unlink()


def run_disturbed(recipe, out, backend, disturb, path):
    """A merge during whose third tile something is done to a source."""

    class Disturbed(FolderSink):
        tiles = 0

        def _count(self):
            self.tiles += 1
            if self.tiles == 3:
                disturb(path)

        def write_run(self, run, start, tile):
            self._count()
            super().write_run(run, start, tile)

        def copy_run(self, run, start, stop, fd, offset):
            self._count()
            super().copy_run(run, start, stop, fd, offset)

    made = replace(plan(recipe, threads=1, backend=backend), tile_bytes=4096)
    try:
        made.run(Disturbed(out))
    finally:
        made.close()


@pytest.mark.parametrize("source", [0, 1])
@pytest.mark.parametrize("backend", ["pread", "mmap"])
@pytest.mark.parametrize(
    "disturb", [cut, grow, cut_and_grow, overwrite, replace_by_another, remove]
)
def test_a_source_that_changes_while_it_is_read(recipe, tmp_path, disturb, backend, source):
    if backend == "mmap" and disturb is cut:
        pytest.skip("ends the process, as is documented")
    merge(recipe, tmp_path / "whole")
    folder = Path(recipe["base"] if source == 0 else recipe["sources"][0]["model"])
    kept = shutil.copytree(folder, tmp_path / "kept")
    out = tmp_path / "out"
    if disturb in (replace_by_another, remove):  # the open file is still the old one
        run_disturbed(recipe, out, backend, disturb, folder / "model.safetensors")
    else:
        with pytest.raises(CheckpointError, match=r"model\.safetensors: (was changed|ended at)"):
            run_disturbed(recipe, out, backend, disturb, folder / "model.safetensors")
        assert not out.exists()
        shutil.rmtree(folder)
        kept.rename(folder)
        merge(recipe, out, discard=True)
    assert contents(out) == contents(tmp_path / "whole")


WATCH = """
import os, sys
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.truncate", "os.utime", "os.chmod", "os.link",
           "os.symlink", "os.mkdir", "os.chown", "shutil.rmtree", "shutil.move")
inputs = [os.path.realpath(path) for path in sys.argv.pop(1).split(os.pathsep)]
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        wrong = bool((arguments[2] or 0) & WRITES) or any(c in (arguments[1] or "") for c in "wax+")
    else:
        wrong = event in CHANGES
    if wrong:
        named = arguments[0]
        named = f"/proc/self/fd/{named}" if isinstance(named, int) else os.fsdecode(named)
        path = os.path.realpath(named)
        if any(path == i or path.startswith(i + os.sep) for i in inputs):
            print("CHANGED", event, path, flush=True)
            os._exit(99)
sys.addaudithook(watch)
from optimer_engine.cli import main
main()
"""


def test_no_command_opens_a_source_for_writing(recipe, tmp_path):
    base, ja = recipe["base"], recipe["sources"][0]["model"]
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    watched = [sys.executable, "-c", WATCH, os.pathsep.join((base, ja))]
    for command in (
        ["merge", "recipe.yaml", "-o", "out", "--read-backend", "mmap"],
        ["verify", "out", "--full"],
        ["extract", base, ja, "-o", "vector"],
        ["pack", base, ja, "-o", "packed", "--mode", "exact"],
        ["inspect", "vector", "--base", base],
        ["plan", "recipe.yaml"],
        ["merge", "recipe.yaml", "-o", ja],
        ["merge", "recipe.yaml", "-o", f"{base}/inside", "--discard"],
    ):
        done = subprocess.run([*watched, *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == (2 if command[-1] == "--discard" or command[3:] == [ja] else 0), (
            command, done.stdout, done.stderr,
        )  # fmt: skip
    seen = subprocess.run([*watched[:-1], str(tmp_path), "merge", "recipe.yaml", "-o", "seen"],
                          cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert seen.returncode == 99, "the watch sees nothing"


@pytest.fixture
def mounted(tmp_path):
    """mounted(folder, *options): a second place of a folder, as a mount."""
    places = []

    def mount(folder, *options):
        place = tmp_path / f"mount{len(places)}"
        place.mkdir()
        for how in (["--bind", str(folder)], *(["-o", f"remount,bind,{o}"] for o in options)):
            done = subprocess.run(
                ["mount", *how, str(place)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")
            if how[0] == "--bind":
                places.append(place)
        return place

    yield mount
    for place in reversed(places):
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_read_only_sources_merge_and_a_read_only_place_is_named(recipe, tmp_path, mounted):
    merge(recipe, tmp_path / "whole")
    frozen = mounted(Path(recipe["base"]), "ro")
    merge({**recipe, "base": str(frozen)}, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    (tmp_path / "place").mkdir()
    place = mounted(tmp_path / "place", "ro")
    with pytest.raises(OutputError, match="cannot be written: Read-only file system") as caught:
        merge(recipe, place / "out")
    assert caught.value.exit_code == 3
    assert not list(place.iterdir())


def test_an_input_is_known_under_the_name_of_a_mount(recipe, mounted):
    elsewhere = mounted(Path(recipe["base"]))
    before = sorted(Path(recipe["base"]).iterdir())
    with pytest.raises(RecipeError, match="in or around the input"):
        merge(recipe, elsewhere / "out", discard=True)
    with pytest.raises(RecipeError, match="is a mount point"):
        merge(recipe, elsewhere, discard=True)
    assert sorted(Path(recipe["base"]).iterdir()) == before


def test_a_place_that_is_a_mount_is_refused_at_the_start(recipe, tmp_path, mounted):
    """Even of the same file system, where only the list of mounts tells."""
    (tmp_path / "empty place").mkdir()
    place = mounted(tmp_path / "empty place")
    with pytest.raises(RecipeError, match="is a mount point"):
        merge(recipe, place)
    merge(recipe, place / "out")


def test_names_that_no_disk_can_have_are_refused(recipe, tmp_path):
    before = sorted(tmp_path.iterdir())
    for name in ("x" * 300, "x" * 250):  # the second one only with .partial behind it
        with pytest.raises(OutputError, match="cannot be written: File name too long"):
            merge(recipe, tmp_path / name)
    for name in ("a\0b", os.fsdecode(b"\xff")):
        with pytest.raises(RecipeError, match="is not the name of a folder"):
            merge(recipe, tmp_path / name)
    with pytest.raises(RecipeError, match="is a path that no recipe or report can hold"):
        merge({**recipe, "base": os.fsdecode(b"\xff")}, tmp_path / "out")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot be written: Not a directory"):
        merge(recipe, tmp_path / "file" / "out")
    (tmp_path / "file").unlink()
    assert sorted(tmp_path.iterdir()) == before
