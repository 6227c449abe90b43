"""The merges that the faults are put into, and what must hold after each of them."""

from __future__ import annotations

from dataclasses import replace

import torch

from optimer_engine import FolderSink, durable, folder_sink, plan, verify_output
from optimer_engine.errors import OptimerError
from tests.conftest import nearby, random_tensors
from tests.faults.disk import Disk, Dying

TILE_BYTES = 2048
KINDS = ("single", "shards", "parts")


class Stepwise(FolderSink):
    """Settles after every tile on the same thread, so that effects come in one fixed order."""

    def write_run(self, run, start, tile):
        super().write_run(run, start, tile)
        self._settle(folder_sink.SETTLE_BYTES)

    def copy_run(self, run, start, stop, fd, offset):
        super().copy_run(run, start, stop, fd, offset)
        self._settle(folder_sink.SETTLE_BYTES)

    def settle(self):
        pass


class Case:
    """A merge of one kind: run it, and compare with the run that nothing disturbed."""

    def __init__(self, kind, folder, write_checkpoint, monkeypatch):
        self.kind, self.folder, self.monkeypatch = kind, folder, monkeypatch
        monkeypatch.setattr(folder_sink, "SETTLE_BYTES", 1500)
        base = random_tensors(0) | {f"model.{n}": torch.linspace(-1, 1, 2600) for n in range(3)}
        base["model.steps"] = torch.arange(100)  # copied
        tuned = {k: v for k, v in base.items() if v.is_floating_point()}
        self.sources = [
            write_checkpoint("base", base),
            write_checkpoint("ja", {**base, **nearby(tuned, 1)}),
        ]
        for name in ("tokenizer.json", "generation_config.json", "merges.txt")[: self._companions]:
            (self.sources[0] / name).write_text(f'{{"name": "{name}"}}')
        self.recipe = {
            "base": str(self.sources[0]),
            "sources": [{"name": "ja", "model": str(self.sources[1]), "weight": 0.5}],
            "max_shard_size": "1GB" if kind == "single" else "9kB",
        }
        self.parts = [(n, 3) for n in (1, 2, 3)] if kind == "parts" else [(1, 1)]
        (folder / "whole").mkdir()
        self.run(folder / "whole" / "out")
        self.expected = contents(folder / "whole" / "out")

    @property
    def _companions(self):
        return 0 if self.kind == "single" else 3

    def run(self, out, disk=None, *, weight=None, discard=False):
        """The whole command: every part in turn, until the output is there."""
        with self.monkeypatch.context() as patch:
            patch.setattr(durable, "os", disk or Disk())
            for part in self.parts:
                made = replace(plan(self.recipe, threads=1, part=part), tile_bytes=TILE_BYTES)
                if weight is not None:
                    made = made.with_weights({"ja": weight})
                try:
                    made.run(Stepwise(out, discard=discard))
                finally:
                    made.close()
                if out.exists():
                    return

    def effects(self):
        """How many effects an undisturbed run has."""
        disk = Dying(10**9)
        (self.folder / "counted").mkdir()
        self.run(self.folder / "counted" / "out", disk)
        return disk.count

    def check_absent_or_complete(self, out):
        """What a disturbed run left is nothing to see, or all of it."""
        if out.exists():
            verify_output(out)
            assert contents(out) == self.expected

    def check_resumes(self, out):
        """The same command ends with the same bytes, and nothing beside them."""
        self.check_absent_or_complete(out)
        self.run(out)
        assert contents(out) == self.expected
        assert [path.name for path in out.parent.iterdir()] == ["out"]


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "report.json"}


def is_ours(error):
    """A disk that fails is told as such, never as a traceback."""
    return isinstance(error, OptimerError) and error.exit_code == 3
