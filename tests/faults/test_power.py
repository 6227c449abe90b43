"""A power cut at any moment: synced bytes are there, others may be lost or torn; so are names."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys

import pytest
import xxhash

from optimer_engine import durable, journal, merge, verify_output
from optimer_engine.errors import OptimerError, RecipeError
from optimer_engine.shard_file import ShardFile
from tests.faults.disk import Dying, Killed, Recording, replay, survivors
from tests.faults.recipes import Case, contents


def recorded(case):
    root = case.folder / "recorded"
    root.mkdir()
    disk = Recording(root)
    case.run(root / "out", disk)
    return disk.log


def check_power_cuts(case, chances=((0.0, 0), (0.5, 1), (0.5, 2))):
    """After every prefix of the effects: absent or complete, and finished by the same command."""
    log = recorded(case)
    for count in reversed(range(len(log) + 1)):
        for chance, seed in chances:
            root = case.folder / f"cut{count}-{chance}-{seed}"
            root.mkdir()
            survivors(log[:count], root, chance, seed)
            if count == len(log):
                assert (root / "out").exists(), "reported as done, and lost"
            case.check_resumes(root / "out")
            shutil.rmtree(root)
    return len(log)


def check_claims(case):
    """When a claim is written, the bytes it vouches for are on the disk already."""
    log = recorded(case)
    names = {entry[3]: entry[2] for entry in log if entry[0] == "name"}
    order = sorted(number for number, name in names.items() if name.endswith(".safetensors"))
    claims = 0
    for count, (kind, number, *rest) in enumerate(log):
        if kind != "write" or not names[number].endswith(".journal"):
            continue
        line = json.loads(rest[1].partition(b" ")[2])
        if "xxh3_128" in line:
            claims += 1
            node = replay(log[:count])[order[line["file"]]]
            stored = bytes(node.content[line["begin"] : line["end"]])
            assert xxhash.xxh3_128_hexdigest(stored) == line["xxh3_128"]
    assert claims > 5


def check_damage(case):
    """A bit that flipped in what an interrupted run had finished is found and made again."""
    for at in range(60, case.effects() - 20, 7):
        out = case.folder / f"flip{at}" / "out"
        out.parent.mkdir()
        with pytest.raises(Killed):
            case.run(out, Dying(at))
        for shard in out.with_name("out.partial").glob("*.safetensors"):
            content = bytearray(shard.read_bytes())
            for place in range(len(content) // 2, len(content), 97):
                content[place] ^= 1 << place % 8
            shard.write_bytes(content)
        case.check_resumes(out)


def check_other_recipe(case):
    """What another merge left is not continued."""
    out = case.folder / "other" / "out"
    out.parent.mkdir()
    with pytest.raises(Killed):
        case.run(out, Dying(80))
    with pytest.raises(RecipeError, match="interrupted merge of other sources or weights"):
        case.run(out, weight=0.25)
    case.check_resumes(out)


def test_power_cut_after_every_effect(case):
    chances = ((0.0, 0), (0.5, 1), (0.5, 2)) if case.kind == "single" else ((0.5, 1),)
    assert check_power_cuts(case, chances) > 80


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_power_cut_after_every_effect_in_many_ways(case, seed):
    check_power_cuts(case, [(chance, seed) for chance in (0.1, 0.5, 0.9)])


def test_claims_are_written_after_the_bytes_they_vouch_for(make_case):
    check_claims(make_case("shards"))


def test_damage_to_finished_stretches_is_found(make_case):
    check_damage(make_case("single"))


def test_another_recipe_does_not_continue(make_case):
    check_other_recipe(make_case("single"))


def _no_fsync(monkeypatch):
    monkeypatch.setattr(durable, "sync_data", lambda fd: None)
    real = durable.sync
    monkeypatch.setattr(durable, "sync", lambda what: None if _is_file(what) else real(what))


def _is_file(what):
    return stat.S_ISREG(os.fstat(what).st_mode) if isinstance(what, int) else what.is_file()


def _no_folder_sync(monkeypatch):
    real = durable.sync
    monkeypatch.setattr(durable, "sync", lambda what: real(what) if _is_file(what) else None)


def _no_verification(monkeypatch):
    monkeypatch.setattr(ShardFile, "_holds", lambda self, claim: True)


def _journal_before_data(monkeypatch):
    settle, sync_data = ShardFile.settle, durable.sync_data

    def early(self, at_least):
        with monkeypatch.context() as patch:
            patch.setattr(durable, "sync_data", lambda fd: fd == self._fd or sync_data(fd))
            settle(self, at_least)
        sync_data(self._fd)

    monkeypatch.setattr(ShardFile, "settle", early)


def _no_head_check(monkeypatch):
    class Anything(dict):
        def __eq__(self, other):
            return True

        __hash__ = None

    real = journal.Journal.__init__

    def careless(self, path):
        real(self, path)
        self.head = Anything(self.head) if self.head else None

    monkeypatch.setattr(journal.Journal, "__init__", careless)


def _mapped_output(monkeypatch):
    import mmap

    def write(self, begin, data):
        with mmap.mmap(self._fd, self.size) as mapped:
            mapped[begin : begin + len(data)] = bytes(data)
        self._wrote(begin, begin + len(data))

    monkeypatch.setattr(ShardFile, "write", write)


MUTANTS = [
    (_no_fsync, check_power_cuts),
    (_no_folder_sync, check_power_cuts),
    (_no_verification, check_damage),
    (_journal_before_data, check_claims),
    (_no_head_check, check_other_recipe),
    (_mapped_output, check_power_cuts),
]


@pytest.mark.parametrize(("mutate", "check"), MUTANTS, ids=[m.__name__[1:] for m, _ in MUTANTS])
def test_a_program_without_one_precaution_is_caught(make_case, monkeypatch, mutate, check):
    case = make_case("single")
    mutate(monkeypatch)
    with pytest.raises((AssertionError, OptimerError, pytest.fail.Exception)):
        check(case)


SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2
"""ioctl of ext4 and xfs: stop at once, losing all that is not on the disk."""


class Ext4:
    """A file system in a file, of which the power can be cut."""

    def __init__(self, folder):
        self.image, self.folder = folder / "image", folder / "ext4"
        self.folder.mkdir()
        with self.image.open("wb") as file:
            file.truncate(24 << 20)
        self._run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,nodiscard", str(self.image))
        self.mount()

    def _run(self, *command):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{command[0]} is not possible here: {done.stderr.strip()}")

    def mount(self):
        self._run("mount", "-o", "loop,commit=300", str(self.image), str(self.folder))

    def cut(self):
        fd = os.open(self.folder, os.O_RDONLY)
        fcntl.ioctl(fd, SHUTDOWN, NO_LOG_FLUSH.to_bytes(4, sys.byteorder))
        os.close(fd)

    def unmount(self):
        subprocess.run(["umount", str(self.folder)], check=True)


@pytest.fixture
def ext4(tmp_path):
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4")
    disk = Ext4(tmp_path)
    yield disk
    disk.unmount()


class CutsPower(Dying):
    """Syncs for real, and cuts the power before effect `at`."""

    def __init__(self, at, cut):
        super().__init__(at)
        self.cut = cut

    def _do(self, name, real, arguments):
        real = getattr(os, name, real)
        with self.lock:
            if self.count == self.at:
                self.cut()
            return self.act(name, real, arguments)


def cut_real_power(case: Case, ext4, points):
    for at in points:
        out = ext4.folder / "out"
        with pytest.raises(Killed):
            case.run(out, CutsPower(at, ext4.cut))
        ext4.unmount()
        ext4.mount()
        case.check_absent_or_complete(out)
        case.run(out)
        assert contents(out) == case.expected
        assert not out.with_name("out.partial").exists()
        shutil.rmtree(out)


def test_the_power_of_a_real_file_system_is_cut(make_case, ext4):
    case = make_case("shards")
    cut_real_power(case, ext4, range(0, case.effects(), 9))


@pytest.mark.slow
def test_the_power_of_a_real_file_system_is_cut_at_every_effect(case, ext4):
    cut_real_power(case, ext4, range(case.effects()))


def test_what_was_reported_as_done_survives_a_real_power_cut(make_case, ext4):
    case = make_case("shards")
    out = ext4.folder / "new" / "folders" / "out"
    merge(case.recipe, out)
    ext4.cut()
    ext4.unmount()
    ext4.mount()
    assert contents(out) == case.expected
    verify_output(out, full=True)
