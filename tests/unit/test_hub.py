"""From a name to a folder, or to a repository on a Hub that speaks on loopback."""

from __future__ import annotations

import shutil

import pytest

from optimer_engine import plan
from optimer_engine.errors import CheckpointError
from optimer_engine.hub import find, locate
from optimer_engine.network import DownloadError
from optimer_engine.remote import open_checkpoint
from optimer_engine.snapshot import Snapshot
from tests.conftest import nearby, random_tensors
from tests.hub_server import serving

BASE = random_tensors(0)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    yield from serving(monkeypatch, tmp_path / "home")


@pytest.fixture
def base(hub, write_checkpoint):
    """Folder and commit of org/base: a model, and what must never be fetched."""
    folder = write_checkpoint("base", BASE, files=3)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    for name in ("modeling.py", "pytorch_model.bin", "consolidated.safetensors", "README.md"):
        (folder / name).write_text("not for us")
    (folder / "original").mkdir()
    (folder / "original" / "tokenizer.model").write_text("not for us")
    return folder, hub.add("org/base", folder)


def opened(model):
    """A checkpoint whose weights are not here."""
    return open_checkpoint(model, whole=False)


NEEDED = ["config.json", "tokenizer.json", "model.safetensors.index.json"] + [
    f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)
]


def test_a_recipe_may_name_repositories_branches_tags_and_commits(hub, base, write_checkpoint):
    folder, commit = base
    hub.add("org/base", folder, branch="v1")
    hub.add("org/ja", write_checkpoint("ja", nearby(BASE, 1)), branch="run/7")
    recipe = {
        "base": "org/base@v1",
        "sources": [{"name": "ja", "model": "org/ja", "revision": "run/7", "weight": 0.5}],
    }
    made = plan(recipe, whole=False)
    assert made.base.origin["commit"] == hub.repos["org/base"].refs["v1"]
    assert made.sources[0].origin["commit"] == hub.repos["org/ja"].refs["run/7"]
    made.close()
    for revision in (commit, "main", None):
        assert find("org/base@v1" if revision else "org/base", revision).commit == commit


def test_locating_fetches_exactly_what_a_checkpoint_needs(hub, base):
    folder, commit = base
    found = locate("org/base")
    assert found.name == commit
    assert sorted(path.name for path in found.iterdir()) == sorted(NEEDED)
    for name in NEEDED:
        assert (found / name).read_bytes() == (folder / name).read_bytes()
    assert not [r.path for r in hub.requests if r.path.endswith((".py", ".bin", "README.md"))]


def test_a_local_folder_wins_over_a_repository_of_the_same_name(hub, base, tmp_path, monkeypatch):
    (tmp_path / "org" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(locate("org/base")) == "org/base"
    assert hub.requests == []


@pytest.mark.parametrize("token", ["", "hf_" + "a" * 34])
@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("org/none", r"org/none: no such folder, and no such repository on the Hub"),
        ("org/private", r"no such repository on the Hub \(or it is private\)"),
        ("org/gated", r"org/gated@.*/.* is gated: its owner must grant access"),
        ("org/base@v9", r"org/base@v9: the Hub has no such revision"),
        ("org/a--b", r"org/a--b: is not a repository's name"),
        ("./org/none", r"\./org/none: no such folder"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_state_of_the_token(
    hub, base, monkeypatch, model, says, token
):
    monkeypatch.setenv("HF_TOKEN", token)
    for name, setting in (("org/gated", "gated"), ("org/private", "private")):
        hub.add(name, base[0])
        setattr(hub.repos[name], setting, True)
    if token and model in ("org/gated", "org/private"):
        opened(model).close()
        return
    with pytest.raises(CheckpointError, match=says.replace(" is gated", ": is gated")) as caught:
        opened(model)
    assert "aaaa" not in str(caught.value)
    if "gated" in model or "private" in model:
        assert "no token is set: log in with `hf auth login` or set HF_TOKEN" in str(caught.value)


def test_a_file_is_not_a_checkpoint(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file, expected a folder"):
        locate(str(tmp_path / "file"))


def test_the_token_goes_to_the_hub_and_not_to_its_storage(hub, base, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    locate("org/base")
    opened("org/base").close()
    to_storage = {r.authorised for r in hub.requests if r.path.startswith("/storage/")}
    to_hub = {r.authorised for r in hub.requests if "org/base" in r.path}
    assert (to_storage, to_hub) == ({False}, {True})


def test_a_renamed_repository_is_followed_and_said(hub, base):
    hub.renamed["old/name"] = "org/base"
    checkpoint = opened("old/name")
    assert checkpoint.notes == ("old/name is now called org/base",)
    assert checkpoint.origin["repo"] == "org/base"
    checkpoint.close()


@pytest.mark.parametrize("fault", ["500", "429", "short", "stall", "full"])
@pytest.mark.parametrize("file", ["config.json", "model-00002"])
def test_a_fault_while_opening_is_tried_again(hub, base, file, fault):
    hub.faults.append((file, fault))
    checkpoint = opened("org/base")
    assert checkpoint.tensors.keys() == BASE.keys()
    assert hub.faults == []
    checkpoint.close()


def test_a_hub_that_keeps_failing_is_an_error_that_the_same_command_may_cure(hub, base):
    hub.faults += [("api", "500")] * 9
    with pytest.raises(DownloadError, match="org/base: the Hub answers 500") as caught:
        find("org/base")
    assert caught.value.exit_code == 3
    assert "run the same command again" in str(caught.value)


def test_without_a_network_the_cache_is_used_and_said_so(hub, base):
    from huggingface_hub.utils import close_session

    folder = locate("org/base")
    hub.close()
    close_session()
    with pytest.raises(DownloadError, match="no answer from the Hub"):
        find("org/never-downloaded")
    found = find("org/base")
    assert isinstance(found, Snapshot)
    assert found.commit == folder.name
    assert found.notes == (f"no answer from the Hub (ConnectError); using {found} from the cache",)
    assert locate("org/base") == folder


def test_offline_asks_nobody_and_says_what_the_cache_lacks(hub, base, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        find("org/base")
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = locate("org/base")
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate("org/base") == folder
    assert locate(f"org/base@{folder.name}") == folder
    (folder / "model-00002-of-00003.safetensors").unlink()
    for call in (locate, opened):
        with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors is missing"):
            call("org/base")
        with pytest.raises(CheckpointError, match="run once without HF_HUB_OFFLINE"):
            call("org/base")
    assert len(hub.requests) == asked


def test_a_damaged_download_is_fetched_again_once_and_then_refused(hub, base):
    hub.faults.append(("model-00002", "other"))
    folder = locate("org/base")
    source = base[0] / "model-00002-of-00003.safetensors"
    assert (folder / source.name).read_bytes() == source.read_bytes()
    hub.add("org/other", base[0])
    shutil.rmtree(folder.parents[1])
    hub.faults += [("model-00002", "other")] * 2
    with pytest.raises(CheckpointError, match=r"org/other@.*model-00002.*its hash is .*Hub says"):
        locate("org/other")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["pytorch_model.bin"], "a pickle, and no safetensors file"),
        (["adapter_config.json", "adapter_model.bin"], "a pickle, and no safetensors file"),
        (["README.md"], "no model.safetensors, no model.safetensors.index.json"),
    ],
)
def test_repositories_without_a_checkpoint_are_refused_in_the_words_of_a_folder(
    hub, tmp_path, names, says
):
    folder = tmp_path / "repo"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")
    hub.add("org/odd", folder)
    with pytest.raises(CheckpointError, match=f"^org/odd@[0-9a-f]+: .*{says}"):
        opened("org/odd")


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "a\\b", "absent"])
def test_an_index_cannot_lead_out_of_its_repository(hub, base, tmp_path, shard):
    folder, _ = base
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of-00003.safetensors", shard, 1))
    hub.add("org/odd", folder)
    before = len(hub.requests)
    with pytest.raises(CheckpointError, match=r"^org/odd@"):
        opened("org/odd")
    assert not [r for r in hub.requests[before:] if "outside" in r.path or "passwd" in r.path]
