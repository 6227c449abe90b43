"""Merging from a Hub on loopback: shard by shard, within a limit of disk, pinned, resumable."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import optimer_engine
from optimer_engine import extract, merge, plan, verify_output
from optimer_engine.checkpoint import Checkpoint
from optimer_engine.downloads import MARK, Downloads, check_limit, needs
from optimer_engine.errors import CheckpointError, MismatchError, OutputError, RecipeError
from optimer_engine.network import DownloadError
from optimer_engine.remote import HubCheckpoint, open_checkpoint
from tests.conftest import nearby
from tests.hub_server import serving

LAYERS, SHARDS = 8, 4
TOKEN = "hf_" + "planted" * 6


def tensors(seed):
    """Two layers to a shard, 8 kB to a layer; nothing is tied."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{n}.mlp.weight" for n in range(LAYERS)]
    return {n: torch.randn((61, 67), generator=generator).to(torch.bfloat16) * 0.1 for n in names}


def write(folder, values, shards=SHARDS):
    """A checkpoint whose shards hold consecutive layers."""
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    names, weight_map = list(values), {}
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        shard = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: values[name] for name in part}, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    yield from serving(monkeypatch, tmp_path / "home")


@pytest.fixture
def folders(hub, tmp_path):
    """org/base and three sources of it, on the hub and as folders."""
    base = tensors(0)
    made = {"base": write(tmp_path / "base", base)}
    for seed, name in enumerate(("ja", "zh", "math"), start=1):
        made[name] = write(tmp_path / name, nearby(base, seed))
    for name, folder in made.items():
        hub.add(f"org/{name}", folder)
    return made


WEIGHTS = {"ja": 0.4, "zh": 0.3, "math": -0.2}
SHARD_BYTES = 16_600
"""A little more than each shard has; the output gets the same shards."""


def recipe(where="org", weights=WEIGHTS, **more):
    sources = [{"name": n, "model": f"{where}/{n}", "weight": w} for n, w in weights.items()]
    return {"base": f"{where}/base", "sources": sources, "max_shard_size": SHARD_BYTES, **more}


@pytest.fixture
def expected(folders, tmp_path):
    """The merge of the folders: name of each file to its bytes, and the report."""
    report = merge(recipe(str(tmp_path)), tmp_path / "expected")
    return read(tmp_path / "expected"), report


def read(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "report.json"}


def weights_in(folder):
    """Bytes of whole tensor files below a folder, blobs of the cache included."""
    return sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and path.stat().st_size > 8000
    )


def home(tmp_path):
    return tmp_path / "home" / "hub"


def test_a_merge_from_the_hub_equals_one_from_folders_and_says_what_it_read(
    hub, folders, expected, tmp_path
):
    report = merge(recipe(), tmp_path / "out")
    files, local = expected
    assert read(tmp_path / "out") == files
    assert "tokenizer.json" in files
    assert report.fingerprints == local.fingerprints
    assert report.origins.keys() == {"base", *WEIGHTS}
    for name, origin in report.origins.items():
        assert origin["repo"] == f"org/{name}"
        assert origin["commit"] == hub.repos[f"org/{name}"].refs["main"]
        assert len(origin["files"]) == SHARDS
    assert sorted(hub.fetched()) == sorted(set(hub.fetched()))
    assert len(hub.fetched()) == 4 * SHARDS
    # Beside whole files only their headers: what identifies a file came with it or with its name.
    assert len([r for r in hub.requests if r.ranged and "/storage/" in r.path]) == 4 * SHARDS
    before = len(hub.requests)
    merge(recipe(), tmp_path / "again")
    assert [r.path.count("/resolve/") for r in hub.requests[before:]] == [0] * 4
    assert read(tmp_path / "again") == files


def test_a_plan_is_complete_before_any_weight_moves(hub, folders, tmp_path):
    made = plan(recipe(), whole=False)
    total, least = needs([run.reads for run in made.runs()])
    shards = [p.stat().st_size for f in folders.values() for p in f.glob("*.safetensors")]
    assert total == sum(shards)
    assert least == 4 * max(shards)
    assert hub.fetched() == []
    made.close()
    wrong = tensors(5)
    wrong["model.layers.7.mlp.weight"] = torch.zeros(3, 5, dtype=torch.bfloat16)
    hub.add("org/zh", write(tmp_path / "wrong", wrong))
    with pytest.raises(MismatchError, match=r"zh: model.layers.7.mlp.weight has shape \[3, 5\]"):
        merge(recipe(), tmp_path / "out")
    assert hub.fetched() == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("room", [0, 20_000, 10**9])
def test_under_a_limit_no_more_is_on_the_disk_and_nothing_stays(
    hub, folders, expected, tmp_path, room
):
    made = plan(recipe(), whole=False)
    limit = needs([run.reads for run in made.runs()])[1] + room
    made.close()
    private, high = tmp_path / "out.downloads", [0]

    def measure(name):
        found = [
            path for end in ("safetensors", "incomplete") for path in private.rglob(f"*.{end}")
        ]
        with contextlib.suppress(FileNotFoundError):  # moved or removed since it was listed
            high[0] = max(high[0], sum(path.stat().st_size for path in found))

    class Lingering(optimer_engine.FolderSink):
        """Slower than the network, once: time for downloads to run too far ahead."""

        def write_run(self, run, start, tile):
            if not lingered.is_set():
                lingered.wait(0.3)
                lingered.set()
            super().write_run(run, start, tile)

    lingered = threading.Event()
    hub.sending = measure
    made = plan(recipe(), whole=False, disk_limit=limit)
    report = made.run(Lingering(tmp_path / "out"))
    made.close()
    assert read(tmp_path / "out") == expected[0]
    assert report.fingerprints == expected[1].fingerprints
    assert 16_000 < high[0] <= limit
    assert len(hub.fetched()) == 4 * SHARDS
    assert not private.exists()
    assert weights_in(home(tmp_path)) == 0


def test_sources_cut_otherwise_than_the_base_need_more_at_once(hub, folders, expected, tmp_path):
    hub.add("org/zh", write(tmp_path / "zh3", nearby(tensors(0), 2), shards=3))
    made = plan(recipe(), whole=False)
    limit = needs([run.reads for run in made.runs()])[1]
    made.close()
    merge(recipe(), tmp_path / "out", disk_limit=limit)
    assert read(tmp_path / "out") == expected[0]
    with pytest.raises(RecipeError, match=f"{limit} bytes .* are needed at the same time"):
        merge(recipe(), tmp_path / "out2", disk_limit=limit - 1)


def test_too_small_a_limit_is_refused_with_the_one_that_would_do(hub, folders, tmp_path):
    with pytest.raises(RecipeError) as caught:
        merge(recipe(), tmp_path / "out", disk_limit="40kB")
    assert hub.fetched() == []
    text = str(caught.value)
    assert "disk limit: 40 kB is too small: 4 files" in text
    assert "org/base@" in text and "model-00001-of-00004.safetensors" in text
    least = int(text.rpartition("give at least ")[2].partition(",")[0])
    merge(recipe(), tmp_path / "out", disk_limit=least)


def test_sources_of_weight_0_are_not_downloaded(hub, folders, tmp_path):
    report = merge(recipe(weights={"ja": 0.4, "zh": 0.0}), tmp_path / "out")
    assert not [name for name in hub.fetched() if "org/zh" in name]
    assert report.origins.keys() == {"base", "ja"}


def test_what_the_cache_has_is_used_and_kept_even_under_a_limit(hub, folders, tmp_path):
    merge(recipe(weights={"ja": 0.4}), tmp_path / "first")
    cached = weights_in(home(tmp_path))
    before = len(hub.fetched())
    merge(recipe(), tmp_path / "out", disk_limit="70kB")
    assert {name.split("/")[1] for name in hub.fetched()[before:]} == {"zh", "math"}
    assert weights_in(home(tmp_path)) == cached > 0


def test_a_second_run_offline_asks_nobody(hub, folders, expected, tmp_path, monkeypatch):
    from huggingface_hub import constants

    merge(recipe(), tmp_path / "first")
    before = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    report = merge(recipe(), tmp_path / "out")
    assert len(hub.requests) == before
    assert read(tmp_path / "out") == expected[0]
    assert report.origins["ja"]["commit"] == hub.repos["org/ja"].refs["main"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_a_damaged_file_in_the_cache_is_found_before_it_is_merged(
    hub, folders, expected, tmp_path, monkeypatch
):
    """As other programs leave it: of the right size, at the right place, with other bytes."""
    from huggingface_hub import constants

    from optimer_engine import snapshot

    merge(recipe(), tmp_path / "first")
    link = next(home(tmp_path).rglob("models--org--ja/snapshots/*/model-00002*"))
    good = link.resolve().read_bytes()
    link.resolve().write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match=r"model-00002.*its hash is .*the Hub says"):
            merge(recipe(), tmp_path / "out")
    with pytest.raises(DownloadError, match="the copy in the cache was damaged; it was downloaded"):
        merge(recipe(), tmp_path / "out")
    assert link.resolve().read_bytes() == good
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "_digest", lambda path, like: pytest.fail("hashed again"))
        merge(recipe(), tmp_path / "out")
    assert read(tmp_path / "out") == expected[0]
    small = next(home(tmp_path).rglob("models--org--base/snapshots/*/tokenizer.json"))
    small.resolve().write_bytes(b"[]")
    merge(recipe(), tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == b"{}"


def test_a_branch_that_moves_meanwhile_changes_nothing(hub, folders, expected, tmp_path):
    moved = write(tmp_path / "moved", nearby(tensors(0), 9))
    started = hub.repos["org/ja"].refs["main"]

    once = threading.Lock()

    def move(name):
        if "org/ja" in name and once.acquire(blocking=False):
            hub.add("org/ja", moved)

    hub.sending = move
    report = merge(recipe(), tmp_path / "out")
    assert len(hub.repos["org/ja"].commits) == 2
    assert read(tmp_path / "out") == expected[0]
    assert report.origins["ja"]["commit"] == started


@pytest.mark.parametrize("fault", ["500", "429", "short", "stall", "other"])
@pytest.mark.parametrize("limit", [None, "70kB"])
def test_a_fault_is_tried_again(hub, folders, tmp_path, fault, limit):
    weights = {"zh": 0.3}
    made = plan(recipe(weights=weights), disk_limit=limit, whole=False)
    hub.faults.append(("org/zh/model-00003", fault))
    made.run(optimer_engine.FolderSink(tmp_path / "out"))
    made.close()
    assert hub.faults == []
    merge(recipe(str(tmp_path), weights), tmp_path / "expected")
    assert read(tmp_path / "out") == read(tmp_path / "expected")


def test_a_download_with_other_bytes_than_announced_is_refused(hub, folders, tmp_path):
    made = plan(recipe(), whole=False)
    hub.faults += [("org/zh/model-00003", "other")] * 2
    with pytest.raises(CheckpointError, match=r"org/zh@.*/model-00003.*hash is [0-9a-f]{64}, the"):
        made.run(optimer_engine.FolderSink(tmp_path / "out"))
    made.close()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("out")) == []


def test_a_hub_that_goes_away_leaves_what_the_same_command_continues(
    hub, folders, expected, tmp_path
):
    made = plan(recipe(), threads=1, whole=False)
    hub.faults += [("org/base/model-00003", "500")] * 20
    with pytest.raises(DownloadError, match=r"org/base@.*model-00003.*: the Hub answers 500"):
        made.run(optimer_engine.FolderSink(tmp_path / "out"))
    made.close()
    assert (tmp_path / "out.partial").is_dir()
    assert not (tmp_path / "out.downloads").exists()
    hub.faults.clear()
    merge(recipe(), tmp_path / "out")
    assert read(tmp_path / "out") == expected[0]


def test_no_space_for_the_download_is_found_before_it_starts(hub, folders, tmp_path, monkeypatch):
    from optimer_engine import downloads

    full = type("Usage", (), {"free": 100_000})
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: full)
    with pytest.raises(OutputError, match=r"are to be downloaded, 100 kB are free") as caught:
        merge(recipe(), tmp_path / "out")
    assert "give --disk-limit (at least" in str(caught.value)
    assert hub.fetched() == []
    merge(recipe(), tmp_path / "out", disk_limit="80kB")


def test_no_space_in_the_middle_is_an_error_that_names_the_way_out(
    hub, folders, tmp_path, monkeypatch
):
    import huggingface_hub

    real = huggingface_hub.hf_hub_download

    def fails(repo, name, **how):
        if "model-00002" in name:
            raise OSError(28, "No space left on device")
        return real(repo, name, **how)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    with pytest.raises(DownloadError, match="no space is left") as caught:
        merge(recipe(), tmp_path / "out")
    assert caught.value.exit_code == 3
    assert "--disk-limit" in str(caught.value)


def test_a_folder_of_somebody_else_is_not_removed(hub, folders, tmp_path):
    other = tmp_path / "out.downloads"
    other.mkdir()
    (other / "diary.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists, and downloads would go there"):
        merge(recipe(), tmp_path / "out", disk_limit="80kB")
    assert (other / "diary.txt").read_text() == "mine"


def test_an_interrupt_ends_downloads_and_leaves_nothing_of_them(hub, folders, tmp_path):
    def interrupt(event):
        if type(event).__name__ == "Advanced":
            raise KeyboardInterrupt

    made = plan(recipe(), whole=False, disk_limit="100kB")
    with pytest.raises(KeyboardInterrupt):
        made.run(optimer_engine.FolderSink(tmp_path / "out"), callbacks=[interrupt])
    assert not (tmp_path / "out.downloads").exists()
    files = [file for checkpoint in made.checkpoints for file in checkpoint.files]
    assert all(file.path.exists() for file in files)  # no descriptor keeps a removed one alive
    made.close()
    names = {thread.name for thread in threading.enumerate()}
    assert not {name for name in names if name.startswith("download-")}


@pytest.mark.parametrize("limit", [None, "70kB"])
def test_mapped_inputs_and_parts_make_the_same_bytes(hub, folders, expected, tmp_path, limit):
    for number in (1, 2):
        merge(
            recipe(),
            tmp_path / "out",
            part=(number, 2),
            backend="mmap",
            disk_limit=limit,
            threads=1,
        )
    assert read(tmp_path / "out") == expected[0]
    assert len(hub.fetched()) == 4 * SHARDS
    assert not list(tmp_path.glob("*.downloads"))


def ties(where):
    sources = [
        {"name": n, "model": f"{where}/{n}", "weight": w, "parameters": {"density": 0.5}}
        for n, w in WEIGHTS.items()
    ]
    return {"base": f"{where}/base", "sources": sources, "method": "ties"}


def mergekit(where):
    models = [{"model": f"{where}/{n}", "parameters": {"weight": w}} for n, w in WEIGHTS.items()]
    return {
        "merge_method": "task_arithmetic",
        "base_model": f"{where}/base",
        "models": models,
        "dtype": "bfloat16",
    }


@pytest.mark.parametrize("written", [ties, mergekit])
def test_methods_of_many_passes_and_mergekits_files_stream_as_well(hub, folders, tmp_path, written):
    options = {"max_shard_size": SHARD_BYTES}
    merge(written("org"), tmp_path / "out", disk_limit="70kB", **options)
    merge(written(str(tmp_path)), tmp_path / "expected", **options)
    assert read(tmp_path / "out") == read(tmp_path / "expected")
    assert len(hub.fetched()) == 4 * SHARDS


def test_an_output_is_proved_against_the_commits_it_was_made_of(hub, folders, tmp_path):
    merge(recipe(weights={"ja": 0.4}), tmp_path / "out")
    extract("org/base", "org/ja", tmp_path / "vector")
    hub.add("org/ja", write(tmp_path / "moved", nearby(tensors(0), 9)))
    for made in ("out", "vector"):
        assert verify_output(tmp_path / made, full=True)["recomputed"] > 0


def test_a_plan_of_whole_checkpoints_has_folders_that_others_can_load(hub, folders):
    made = plan(recipe(weights={"ja": 0.4}))
    for checkpoint, name in ((made.base, "base"), (made.sources[0], "ja")):
        assert checkpoint.origin["repo"] == f"org/{name}"
        for path in folders[name].iterdir():
            assert (checkpoint.folder / path.name).read_bytes() == path.read_bytes()
    made.close()


def test_what_is_read_before_it_was_downloaded_is_right_all_the_same(hub, tmp_path):
    big = write(tmp_path / "big", {"model.w": torch.randn(300_000).to(torch.bfloat16)}, shards=1)
    hub.add("org/big", big)
    remote = open_checkpoint("org/big", whole=False)
    with Checkpoint.open(big) as local:
        found, right = bytearray(100), bytearray(100)
        remote.read_into(0, 500_000, memoryview(found))
        local.read_into(0, 500_000, memoryview(right))
        assert found == right != bytearray(100)
        assert hub.fetched() == []
        assert (remote.view("model.w") == local.view("model.w")).all()
        assert len(hub.fetched()) == 1
    remote.close()


def test_an_adapter_is_a_source_like_any_other(hub, folders, tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "lora"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["mlp"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    module = "base_model.model.model.layers.3.mlp"
    factors = {"A": torch.randn(2, 67), "B": torch.randn(61, 2)}
    named = {f"{module}.lora_{key}.weight": value for key, value in factors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    hub.add("org/lora", folder)
    merge(recipe(weights={"lora": 0.5}), tmp_path / "out", disk_limit="70kB")
    merge(recipe(str(tmp_path), {"lora": 0.5}), tmp_path / "expected")
    assert read(tmp_path / "out") == read(tmp_path / "expected")


class TestVectors:
    @pytest.fixture
    def vector(self, hub, folders, tmp_path):
        extract(str(folders["base"]), str(folders["ja"]), tmp_path / "vector")
        return tmp_path / "vector"

    def wanted(self, vector):
        sources = [{"name": "ja", "model": str(vector), "weight": 0.5}]
        return {"base": "org/base", "sources": sources}

    def test_a_vector_of_this_base_is_recognised_without_its_weights(self, hub, vector, folders):
        before = hub.sent_bytes()
        made = plan(self.wanted(vector), whole=False)
        assert hub.fetched() == []
        total = sum(p.stat().st_size for p in folders["base"].glob("*.safetensors"))
        assert hub.sent_bytes() - before < 2 * total  # headers come with 128 KiB behind them
        made.close()

    def test_a_vector_of_another_base_is_refused_before_any_weight(
        self, hub, vector, folders, tmp_path
    ):
        hub.add("org/base", write(tmp_path / "other", tensors(8)))
        with pytest.raises(MismatchError, match="is a vector of another base"):
            plan(self.wanted(vector), whole=False)
        assert hub.fetched() == []

    def test_a_vector_taken_from_the_hub_is_the_one_taken_from_folders(self, hub, vector, tmp_path):
        extract("org/base", "org/ja", tmp_path / "remote")
        assert read(tmp_path / "remote") == read(vector)


def test_samples_come_by_few_requests_and_only_once(hub, tmp_path, monkeypatch):
    big = {f"model.w{n}": torch.randn(300_000).to(torch.bfloat16) for n in range(3)}
    folder = write(tmp_path / "big", big, shards=1)
    hub.add("org/big", folder)
    checkpoint = open_checkpoint("org/big", whole=False)
    before, sent = len(hub.requests), hub.sent_bytes()
    with Checkpoint.open(folder) as local:
        assert checkpoint.fingerprint == local.fingerprint
    # 600 kB apart in eight pieces, three times, less those next to each other; hub and storage.
    assert len(hub.requests) - before <= 2 * 22
    assert hub.sent_bytes() - sent <= 3 * 8 * 512 + 2 * 64 * 1024
    checkpoint.close()


def start(folder, hub, tmp_path, *more):
    environment = {**os.environ, **hub.env(tmp_path / "home"), "HF_TOKEN": TOKEN}
    named = [f"--add=org/{name}={weight}" for name, weight in WEIGHTS.items()]
    optimer = [sys.executable, "-c", "from optimer_engine.cli import main; main()"]
    more = (f"--out={folder}", f"--max-shard-size={SHARD_BYTES}", "--threads=1", *more)
    return subprocess.Popen(
        [*optimer, "merge", "--base=org/base", *named, *more],
        env=environment,
        cwd=Path(optimer_engine.__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_merge_downloads_only_what_is_left(hub, folders, expected, tmp_path):
    out, journal = tmp_path / "out", tmp_path / "out.partial" / "merge.journal"

    def kill_at_the_last_shard(name):
        settled = journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0
        if "model-00004" in name and settled >= 2:
            child.send_signal(signal.SIGKILL)

    hub.sending = kill_at_the_last_shard
    child = start(out, hub, tmp_path, "--disk-limit=67kB")
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert (tmp_path / "out.downloads" / MARK).exists()
    hub.sending = lambda name: None
    before = len(hub.fetched())
    child = start(out, hub, tmp_path, "--disk-limit=67kB", "--json")
    stdout, stderr = child.communicate(timeout=60)
    assert child.returncode == 0, stderr
    assert read(out) == expected[0]
    again = hub.fetched()[before:]
    assert again and not [name for name in again if "model-00001" in name or "model-00002" in name]
    found = json.loads(stdout)["fingerprints"]
    assert sorted(found.values()) == sorted(expected[1].fingerprints.values())
    assert not (tmp_path / "out.downloads").exists()
    assert TOKEN not in stdout + stderr + (out / "report.json").read_text()


def test_the_token_is_in_no_output_of_a_failing_run(hub, folders, tmp_path):
    hub.repos["org/zh"].gated = True
    hub.repos["org/math"].private = True
    del hub.repos["org/ja"]
    child = start(tmp_path / "out", hub, tmp_path)
    stdout, stderr = child.communicate(timeout=60)
    assert child.returncode == 2
    assert "optimer: org/ja: no such folder, and no such repository on the Hub" in stderr
    assert "the token that is set must belong to an account with access" in stderr
    everything = stdout + stderr
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.stat().st_size < 10**6:
            everything += path.read_bytes().decode(errors="replace")
    assert TOKEN not in everything
    assert {r.authorised for r in hub.requests if r.path.startswith("/api/")} == {True}


class Fake(HubCheckpoint):
    """Files that are only sizes; fetching takes no time."""

    def __init__(self, sizes):
        self.blanks, self.held, self.high = dict(enumerate(sizes)), {}, 0
        self.files, self.snapshot = [], "fake"
        self.lock = threading.Lock()

    def name_of(self, file):
        return str(file)

    def fetch(self, file, folder, arrived):
        with self.lock:
            self.held[file] = self.blanks[file]
            self.high = max(self.high, sum(self.held.values()))
        return Path("nowhere")

    def place(self, file, path):
        assert file in self.held

    def drop(self, file):
        with self.lock:
            del self.held[file]


def test_a_download_that_ends_after_the_merge_is_put_nowhere(tmp_path):
    class Slow(Fake):
        placed, ended = False, None

        def fetch(self, file, folder, arrived):
            started.set()
            release.wait(20)
            try:
                arrived(1)
            except Exception as error:
                self.ended = type(error).__name__
            return Path("nowhere")

        def place(self, file, path):
            self.placed = True

    started, release, checkpoint = threading.Event(), threading.Event(), Slow([5])
    with Downloads([[(checkpoint, 0)]], limit_bytes=None, folder=tmp_path / "none") as downloads:
        assert started.wait(20)
        downloads.stop()
        assert downloads.need(0) is False
        release.set()
    assert (checkpoint.ended, checkpoint.placed) == ("_Stopped", False)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_limit_that_is_enough_never_locks_up(tmp_path_factory, data):
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=8))
    files = st.lists(st.integers(0, len(sizes) - 1), max_size=3)
    reads = data.draw(st.lists(files, min_size=1, max_size=12))
    checkpoint = Fake(sizes)
    steps = [[(checkpoint, file) for file in step] for step in reads]
    total, least = needs(steps)
    assert total == sum(sizes[file] for file in {file for step in reads for file in step})
    limit = least + data.draw(st.integers(0, 60))
    if least > 1:
        with pytest.raises(RecipeError):
            check_limit(steps, least - 1)
    check_limit(steps, limit)
    todo, lock = iter(range(len(steps))), threading.Lock()
    folder = tmp_path_factory.mktemp("downloads")
    (folder / MARK).touch()

    def work():
        while True:
            with lock:
                step = next(todo, None)
            if step is None:
                return
            assert downloads.need(step)
            assert {file for _, file in steps[step]} <= checkpoint.held.keys()
            downloads.done(step)

    with Downloads(steps, limit_bytes=max(limit, 1), folder=folder) as downloads:
        workers = [threading.Thread(target=work, daemon=True) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(20)
        assert not any(worker.is_alive() for worker in workers)
        assert checkpoint.held == {}
    assert checkpoint.high <= max(limit, 1)
