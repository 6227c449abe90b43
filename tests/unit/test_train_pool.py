"""Training a pool and what it costs to compare with it: killed and continued, skipped, shared."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import TrainerCallback  # noqa: E402

from optimer_engine import pool as pools  # noqa: E402
from optimer_engine.cli import optimer  # noqa: E402
from optimer_engine.errors import NonFiniteError, OutputError, RecipeError  # noqa: E402
from optimer_engine.lock import locked  # noqa: E402
from optimer_engine.train import (  # noqa: E402
    DatasetConfig,
    TrainConfig,
    mixture_config,
    ratios_of,
    run_cpt,
    train_pool,
    with_ratios_from,
)
from tests.unit.train_support import TOKENS_PER_STEP, make_base, write_rhymes  # noqa: E402

ROOT = Path(__file__).parents[2]
NAMES = ["ja", "zh", "code"]
TEXTS = ["the cat sat on the mat. ", "a dog lay by the log. ", "fish swim in the deep sea. "]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Iterator[Path]:
    folder = make_base(tmp_path_factory.mktemp("pool") / "base")
    gc.freeze()
    yield folder
    gc.unfreeze()


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> list[DatasetConfig]:
    folder = tmp_path_factory.mktemp("text")
    return [
        DatasetConfig(
            name=name, data=str(write_rhymes(folder / f"{name}.jsonl", text)), license="mit"
        )
        for name, text in zip(NAMES, TEXTS, strict=True)
    ]


@pytest.fixture(scope="module")
def config(base, datasets) -> TrainConfig:
    return TrainConfig(
        base=str(base),
        datasets=datasets,
        tokens=6 * TOKENS_PER_STEP,
        block_size=32,
        batch_size=4,
        learning_rate=3e-3,
        save_every=2,
        keep_model=False,
    )


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory) -> Path:
    """A pool trained without a break; returns the folder that holds `runs` and `pool`."""
    folder = tmp_path_factory.mktemp("straight")
    train_pool(pooled(config, folder), folder / "runs")
    return folder


def pooled(config: TrainConfig, folder: Path, **changes) -> TrainConfig:
    return msgspec.structs.replace(config, pool=str(folder / "pool"), **changes)


def vectors(pool: Path) -> dict[str, bytes]:
    return {
        entry.name: (pool / entry.name / "vector.safetensors").read_bytes()
        for entry in pools.read(pool).vectors
    }


class Steps(TrainerCallback):
    """Counts the steps that are really trained."""

    count = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1


def test_each_dataset_ends_in_its_vector(straight, config, tmp_path):
    pool = straight / "pool"
    manifest = pools.read(pool)
    assert [entry.name for entry in manifest.vectors] == NAMES
    assert pools.verify(pool) == []
    entry = manifest.vectors[0]
    assert (entry.dataset, entry.license, entry.tokens, entry.seed, entry.training) == (
        "ja", "mit", 6 * TOKENS_PER_STEP, 0, "full",
    )  # fmt: skip
    assert not (straight / "runs" / "ja" / "model").exists()  # keep_model: false
    assert len(list((straight / "runs" / "tokens").glob("*.npy"))) == 3

    # A dataset of a pool is trained as it would be alone.
    alone = msgspec.structs.replace(config, datasets=config.datasets[:1])
    run_cpt(alone, tmp_path / "alone")
    vector = (tmp_path / "alone" / "vector" / "vector.safetensors").read_bytes()
    assert vector == vectors(pool)["ja"]


def test_what_is_done_is_skipped_even_without_its_run_folder(straight, config, tmp_path):
    folder = tmp_path / "copy"
    (folder / "pool").mkdir(parents=True)
    for entry in pools.read(straight / "pool").vectors:
        pools.add(folder / "pool", straight / "runs" / entry.name, entry.name)
    steps = Steps()
    done = train_pool(pooled(config, folder), folder / "runs", callbacks=[steps])
    assert [run.report for run in done] == [None] * 3
    assert steps.count == 0

    other = pooled(config, folder, learning_rate=1e-3)
    with pytest.raises(RecipeError, match="there is a vector 'ja' of another run"):
        train_pool(other, folder / "other")
    assert not (folder / "other" / "ja").exists()


KILLED = """
import os, signal, sys, msgspec
from transformers import TrainerCallback
from optimer_engine.train import TrainConfig, train_pool

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if "zh" in args.output_dir and state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

config = msgspec.json.decode(sys.argv[1], type=TrainConfig)
train_pool(config, sys.argv[2], callbacks=[Kill()])
"""


def test_a_pool_killed_in_its_second_dataset_is_continued_to_the_same_bytes(
    straight, config, tmp_path
):
    chosen = pooled(config, tmp_path)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, msgspec.json.encode(chosen), str(tmp_path / "runs")],
        cwd=ROOT, capture_output=True, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert list(vectors(tmp_path / "pool")) == ["ja"]

    steps = Steps()
    done = train_pool(chosen, tmp_path / "runs", callbacks=[steps])
    assert [run.name for run in done] == NAMES
    assert done[0].report is None
    assert done[1].report is not None and done[1].report.resumed_from == 4
    assert steps.count == 2 + 6
    assert vectors(tmp_path / "pool") == vectors(straight / "pool")
    assert pools.verify(tmp_path / "pool") == []


def test_jobs_share_the_datasets_and_only_names_them(straight, config, tmp_path):
    chosen = pooled(config, tmp_path)
    for job, names in (("2/2", ["zh"]), ("1/2", ["ja", "code"])):
        done = train_pool(chosen, tmp_path / "runs", job=job)
        assert [run.name for run in done] == names
    assert vectors(tmp_path / "pool") == {
        name: vectors(straight / "pool")[name] for name in ("zh", "ja", "code")
    }
    for wrong, message in ((["x"], "no dataset is called 'x'"), ([], "no job")):
        with pytest.raises(RecipeError, match=message):
            train_pool(chosen, tmp_path / "runs", only=wrong, job="3/2")


def test_a_dataset_that_diverges_does_not_stop_the_others(config, tmp_path):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if "ja" in args.output_dir:
                model.model.norm.weight.data[0] = float("nan")

    with pytest.raises(NonFiniteError, match=r"^ja: training: the loss became nan at step 2"):
        train_pool(
            pooled(config, tmp_path, datasets=config.datasets[:2]), tmp_path / "runs",
            callbacks=[Poison()],
        )  # fmt: skip
    assert list(vectors(tmp_path / "pool")) == ["zh"]


def test_every_dataset_is_looked_at_before_the_first_is_trained(config, datasets, tmp_path):
    broken = DatasetConfig(name="broken", data=str(tmp_path / "none.jsonl"))
    chosen = pooled(config, tmp_path, datasets=[datasets[0], broken])
    with pytest.raises(RecipeError, match=r"none\.jsonl"):
        train_pool(chosen, tmp_path / "runs")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "pool").exists()


def test_two_processes_never_train_in_one_folder(config, tmp_path):
    chosen = msgspec.structs.replace(config, datasets=config.datasets[:1], keep_model=True)
    code = (
        "import sys; from pathlib import Path; from optimer_engine.lock import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match="another process is training here"):
            run_cpt(chosen, tmp_path / "run")
        assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}
        os.kill(holder.pid, signal.SIGKILL)  # a dead holder holds nothing
    assert run_cpt(chosen, tmp_path / "run").steps == 6


def test_who_waited_for_a_lock_that_was_removed_holds_the_new_one(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    asked, holds, done = threading.Event(), threading.Event(), threading.Event()
    real = fcntl.flock

    def flock(descriptor, how):
        asked.set()
        real(descriptor, how)

    def wait() -> None:
        with locked(folder, wait=True):
            holds.set()
            done.wait()

    waiter = threading.Thread(target=wait)
    with locked(folder):
        monkeypatch.setattr(fcntl, "flock", flock)
        waiter.start()
        asked.wait()  # it has opened the file that goes now
        (folder / ".lock").unlink()
        (folder / ".lock").touch()
    holds.wait()
    try:
        with pytest.raises(OutputError, match="another process"), locked(folder):
            pass
    finally:
        done.set()
        waiter.join()


# the mixture


def search_folder(folder: Path, weights: dict[str, float]) -> Path:
    folder.mkdir()
    (folder / "search_report.json").write_text(json.dumps({"best_weights": weights, "more": 1}))
    return folder


weight_lists = st.lists(st.floats(-1, 1).filter(lambda w: abs(w) > 1e-6), min_size=1, max_size=6)


@given(weight_lists, st.floats(-2, 2))
def test_ratios_are_clipped_normalised_and_leave_the_instruct_vector_out(weights, instruct):
    names = [f"d{i}" for i in range(len(weights))]
    found = dict(zip(names, weights, strict=True)) | {"it": instruct}
    if max(weights) <= 0:
        with pytest.raises(RecipeError, match="no positive, finite sum"):
            ratios_of(found, names)
        return
    ratios = ratios_of(found, names)
    assert list(ratios) == names
    assert sum(ratios.values()) == pytest.approx(1)
    for name, weight in zip(names, weights, strict=True):
        if weight <= 0:
            assert ratios[name] == 0
        else:
            assert ratios[name] / max(ratios.values()) == pytest.approx(weight / max(weights))


def test_published_weights_as_ratios():
    found = {"it": 0.569, "ja": 0.055, "zh": 0.006, "math": 0.489, "code": -0.2}
    ratios = ratios_of(found, ["ja", "zh", "math", "code"])
    assert ratios == pytest.approx({"ja": 0.1, "zh": 6 / 550, "math": 489 / 550, "code": 0})


def test_a_dataset_that_the_search_does_not_know_is_refused(tmp_path, config):
    with pytest.raises(RecipeError, match="no vector 'zh', 'code'; it has ja"):
        with_ratios_from(config, search_folder(tmp_path / "s", {"ja": 0.4}))
    with pytest.raises(RecipeError, match=r"search_report\.json"):
        with_ratios_from(config, tmp_path / "none")


def test_the_found_ratios_are_trained_by_one_command_at_equal_cost(
    base, datasets, straight, tmp_path, capfd
):
    lines = "\n".join(f"  - {{name: {d.name}, data: {d.data}}}" for d in datasets)
    (tmp_path / "pool.yaml").write_text(
        f"base: {base}\npool: {tmp_path}/pool\ntokens: {6 * TOKENS_PER_STEP}\nblock_size: 32\n"
        f"batch_size: 4\nlearning_rate: 3e-3\nkeep_model: false\ndatasets:\n{lines}\n"
    )
    search = search_folder(tmp_path / "search", {"it": 0.9, "ja": 0.3, "zh": 0.1, "code": -0.5})
    train = ["train", str(tmp_path / "pool.yaml")]
    optimer(
        [*train, "--ratios-from", str(search), "-o", str(tmp_path / "r")], standalone_mode=False
    )
    report = json.loads((tmp_path / "r" / "train_report.json").read_text())
    assert report["tokens"] == 3 * 6 * TOKENS_PER_STEP  # as all runs of the pool together
    assert {part["name"]: part["blocks"] for part in report["datasets"]} == {"ja": 54, "zh": 18}
    assert report["config"]["ratios_from"]["left_out"] == ["it"]
    assert "assumption" in report["config"]["ratios_from"]["rule"]
    assert "assumption of this project" in capfd.readouterr().out
    assert report["vector"] is None and Path(report["model"]).is_dir()

    optimer([*train, "--only", "zh", "-o", str(tmp_path / "runs")], standalone_mode=False)
    assert f"zh: {6 * TOKENS_PER_STEP} tokens" in capfd.readouterr().out
    assert list(pools.read(tmp_path / "pool").vectors[0].files) == ["vector.safetensors"]
    with pytest.raises(RecipeError, match="--only, --job"):
        optimer(
            [*train, "--mixture", "--only", "zh", "-o", str(tmp_path / "x")],
            standalone_mode=False,
        )


def test_a_uniform_mixture_costs_what_the_pool_costs(config, tmp_path):
    mixture = mixture_config(pooled(config, tmp_path))
    assert mixture.tokens == 3 * config.tokens and mixture.pool is None
    assert mixture.ratios == [1 / 3] * 3
    assert mixture_config(config).tokens == config.tokens  # no pool: tokens of the run
