"""Packing may be killed, fail and lose power at any moment, as a merge may."""

from __future__ import annotations

import errno
import os
import random
import shutil

import numpy as np
import pytest
import torch

from optimer_engine import durable, verify_output
from optimer_engine.errors import CheckpointError, OutputError, RecipeError
from optimer_engine.packing import encode, pack, run, store, unpack
from tests.conftest import nearby
from tests.faults.disk import Disk, Dying, Failing, Killed, Recording, survivors
from tests.faults.recipes import contents

MODES = ("exact", "int8", "float32")


class PackCase:
    """Two checkpoints and what packing them gives when nothing disturbs it."""

    def __init__(self, mode, folder, write_checkpoint, monkeypatch):
        self.mode, self.folder, self.monkeypatch = mode, folder, monkeypatch
        monkeypatch.setattr(encode, "TILE_ELEMS", 32768)
        for module in (store, run):
            monkeypatch.setattr(module, "SETTLE_BYTES", 20_000)
        generator = torch.Generator().manual_seed(0)
        base = {
            f"model.{name}": torch.randn(shape, generator=generator).bfloat16()
            for name, shape in {"a": (300, 300), "b": (7,), "c": (80, 500), "d": (0, 3)}.items()
        }
        steps = {"model.steps": torch.arange(9)}
        self.base = write_checkpoint("base", {**base, **steps})
        self.trained = write_checkpoint("ja", {**nearby(base, 1, 0.01), **steps})
        (folder / "whole").mkdir()
        self.run(folder / "whole" / "out")
        self.expected = contents(folder / "whole" / "out")

    def run(self, out, disk=None, threads=1, **more):
        with self.monkeypatch.context() as patch:
            patch.setattr(durable, "os", disk or Disk())
            settings = {"max_shard_size": 200_000, "metadata": {"dataset": "ja"}, **more}
            return pack(self.base, self.trained, out, mode=self.mode, threads=threads, **settings)

    def effects(self):
        disk = Dying(10**9)
        (self.folder / "counted").mkdir()
        self.run(self.folder / "counted" / "out", disk)
        return disk.count

    def fresh(self, number):
        folder = self.folder / f"at{number}"
        folder.mkdir()
        return folder / "out"

    def check_resumes(self, out):
        if out.exists():
            assert contents(out) == self.expected
        self.run(out)
        verify_output(out)
        assert contents(out) == self.expected
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        shutil.rmtree(out.parent)


@pytest.fixture
def make_case(in_memory, write_checkpoint, monkeypatch):
    return lambda mode: PackCase(mode, in_memory, write_checkpoint, monkeypatch)


@pytest.fixture(params=MODES)
def case(request, make_case):
    return make_case(request.param)


def test_killed_before_every_effect(case):
    count = case.effects()
    assert count > 40
    for at in range(count):
        out = case.fresh(at)
        with pytest.raises(Killed):
            case.run(out, Dying(at))
        case.check_resumes(out)


@pytest.mark.parametrize(("number", "forever"), [(errno.EIO, False), (errno.ENOSPC, True)])
def test_every_call_may_fail(make_case, number, forever):
    case = make_case("exact")
    for at in range(case.effects()):
        out = case.fresh(at)
        with pytest.raises(OutputError, match=os.strerror(number)) as caught:
            case.run(out, Failing(at, number, forever))
        assert caught.value.exit_code == 3
        assert "run the same command again" in str(caught.value)
        case.check_resumes(out)


@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_power_cut_after_any_effect(make_case, chance):
    case = make_case("exact")
    (case.folder / "logged").mkdir()
    disk = Recording(case.folder / "logged")
    case.run(case.folder / "logged" / "out", disk)
    for at in range(0, len(disk.log), 3):
        out = case.fresh(at)
        survivors(disk.log[:at], out.parent, chance, seed=at)
        case.check_resumes(out)


def test_what_is_settled_is_not_packed_again(case):
    """Killed near its end, the next run packs the last stretch only, with any number of threads."""
    encoded = []
    for encoder in (encode.Exact, encode.Quantised, encode.Plain):

        def noted(self, start, stop, hands, real=encoder.encode):
            encoded.append((self.pair.name, start))
            return real(self, start, stop, hands)

        case.monkeypatch.setattr(encoder, "encode", noted)
    out = case.fresh(0)
    count = case.effects()
    whole = len(encoded)
    with pytest.raises(Killed):
        case.run(out, Dying(count - 12))
    encoded.clear()
    case.run(out, threads=3)
    assert contents(out) == case.expected
    assert len(encoded) < whole / 2


def test_damage_to_what_was_settled_is_found_and_packed_again(case):
    rng = random.Random(0)
    count = case.effects()
    for number in range(12):
        out = case.fresh(number)
        with pytest.raises(Killed):
            case.run(out, Dying(count - 12))
        files = sorted(out.with_name("out.partial").glob("*.safetensors"))
        path = rng.choice(files)
        content = bytearray(path.read_bytes())
        for _ in range(3):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        case.check_resumes(out)


def test_an_interrupted_run_is_no_other_s(make_case):
    case = make_case("exact")
    out = case.fresh(0)
    with pytest.raises(Killed):
        case.run(out, Dying(case.effects() - 12))
    with pytest.raises(RecipeError, match=r"differs in header, options"):
        pack(case.base, case.trained, out, mode="bf16")
    pack(case.base, case.trained, out, mode="bf16", discard=True)
    assert verify_output(out, full=True)["recomputed"]


def test_a_vector_that_is_there_is_left_as_it_is(make_case):
    case = make_case("exact")
    out = case.folder / "whole" / "out"
    before = (out / "report.json").read_bytes()
    assert "complete already" in case.run(out).warnings[-1]
    assert (out / "report.json").read_bytes() == before
    with pytest.raises(RecipeError, match="not an empty folder"):
        case.run(out, metadata={"dataset": "other"})


@pytest.mark.parametrize("mode", [*MODES, "int4", "bf16"])
def test_full_verification_packs_again_and_compares(make_case, write_checkpoint, mode):
    case = make_case(mode)
    out = case.folder / "whole" / "out"
    found = verify_output(out, full=True)
    assert found["recomputed"] == sum(
        file.stat().st_size - int.from_bytes(file.read_bytes()[:8], "little") - 8
        for file in out.glob("*.safetensors")
    )
    path = case.trained / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-70_000] ^= 3  # where the fingerprint does not look
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="from what base and source give now"):
        verify_output(out, full=True)


def test_unpacking_is_verified_from_base_and_vector(make_case):
    case = make_case("exact")
    out, vector = case.folder / "model", case.folder / "whole" / "out"
    unpack(case.base, vector, out)
    assert verify_output(out, full=True)["recomputed"] > 250_000
    other = case.fresh(1)
    pack(case.trained, case.base, other)
    with np.errstate(all="ignore"), pytest.raises(CheckpointError):
        shutil.rmtree(vector)
        other.rename(vector)
        report = (out / "report.json").read_text()
        (out / "report.json").write_text(report.replace(str(case.base), str(case.trained)))
        verify_output(out, full=True)
