"""One output made by several runs: the bytes of a single run, and nothing before all are done."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from optimer_engine import FolderSink, OptimerError, durable, merge, plan, verify_output
from optimer_engine.errors import OutputError
from optimer_engine.recipe import Recipe
from tests.conftest import nearby, random_tensors


@pytest.fixture
def recipe(write_checkpoint):
    base = random_tensors(0) | {f"model.{n}": torch.linspace(-1, 1, 9000 + n) for n in range(4)}
    return {
        "base": str(write_checkpoint("base", base)),
        "sources": [
            {"name": "ja", "model": str(write_checkpoint("ja", nearby(base, 1))), "weight": 0.5}
        ],
        "max_shard_size": "40kB",
    }


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "report.json"}


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_parts_in_any_order_make_the_bytes_of_a_single_run(recipe, tmp_path, count):
    whole = merge(recipe, tmp_path / "whole")
    assert len(whole.files) > 5
    out = tmp_path / "out"
    for number in range(count, 1, -1):
        report = merge(recipe, out, part=(number, count))
        assert report.part == f"{number}/{count}"
        assert not out.exists()
    last = merge(recipe, out, part=(1, count))
    assert last.part is None
    assert contents(out) == contents(tmp_path / "whole")
    assert (last.bytes_read, last.bytes_written) == (whole.bytes_read, whole.bytes_written)
    assert not (tmp_path / "out.partial").exists()
    assert verify_output(out, full=True)["recomputed"] == whole.bytes_written


def test_parts_at_the_same_time(recipe, tmp_path):
    merge(recipe, tmp_path / "whole")
    out, reports = tmp_path / "out", []
    threads = [
        threading.Thread(target=lambda n=n: reports.append(merge(recipe, out, part=(n, 4))))
        for n in range(1, 5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reports) == 4
    if not out.exists():  # each saw another still at work: the same command publishes
        merge(recipe, out, part=(1, 4))
    assert contents(out) == contents(tmp_path / "whole")


def test_a_folder_that_another_part_made_a_moment_ago_is_used(tmp_path, monkeypatch):
    made = os.mkdir

    def made_by_both(path):
        made(path)
        made(path)

    monkeypatch.setattr(os, "mkdir", made_by_both)
    durable.make_folder(tmp_path / "out" / "partial")
    assert (tmp_path / "out" / "partial").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        durable.make_folder(tmp_path / "file")


def test_a_part_that_failed_is_done_again_and_leaves_the_others_alone(recipe, tmp_path):
    merge(recipe, tmp_path / "whole")
    out = tmp_path / "out"
    merge(recipe, out, part=(1, 2))

    class Fails(FolderSink):
        def write_run(self, run, start, tile):
            raise OutputError("disk full")

    with pytest.raises(OutputError):
        plan(recipe, part=(2, 2)).run(Fails(out))
    assert not out.exists()
    merge(recipe, out, part=(2, 2))
    assert contents(out) == contents(tmp_path / "whole")


def test_other_parts_and_impossible_parts_are_refused(recipe, tmp_path):
    out = tmp_path / "out"
    merge(recipe, out, part=(1, 3))
    for part in ((1, 2), (1, 1)):
        with pytest.raises(OptimerError, match="begun in other parts"):
            merge(recipe, out, part=part)
    other = Recipe.load(recipe)
    other.sources[0].weight = 0.25
    with pytest.raises(OptimerError, match="other sources or weights"):
        merge(other, out, part=(1, 3))
    for part in ((0, 2), (3, 2)):
        with pytest.raises(OptimerError, match="is no part"):
            merge(recipe, out, part=part)


def test_dask_workers_make_the_bytes_of_a_single_run(recipe, tmp_path):
    distributed = pytest.importorskip("distributed", reason="Dask is an optional library")
    from optimer_engine.spread import merge_on_dask

    merge(recipe, tmp_path / "whole")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
    ) as cluster:
        address = cluster.scheduler_address
        report = merge_on_dask(Recipe.load(recipe), tmp_path / "out", address, threads=1)
    assert report.out == str(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    with pytest.raises(OptimerError, match="no Dask scheduler answers"):
        merge_on_dask(Recipe.load(recipe), tmp_path / "x", "tcp://127.0.0.1:1")
