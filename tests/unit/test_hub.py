"""From a name to a folder."""

from __future__ import annotations

import pytest

from optimer_engine import plan
from optimer_engine.errors import CheckpointError
from optimer_engine.hub import locate
from tests.conftest import nearby, random_tensors


@pytest.fixture
def hub(monkeypatch, write_checkpoint):
    """A stand-in for the download: records what was asked, gives local folders."""
    import huggingface_hub

    base = random_tensors(0)
    folders = {
        "org/base": write_checkpoint("hub-base", base),
        "org/ja": write_checkpoint("hub-ja", nearby(base, 1)),
    }
    asked = []

    def snapshot_download(repo, revision=None, allow_patterns=None):
        asked.append((repo, revision))
        assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in allow_patterns)
        if repo not in folders:
            raise FileNotFoundError(f"no repository {repo}")
        return str(folders[repo])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_recipe_may_name_repositories_and_revisions(hub):
    recipe = {
        "base": "org/base@v1",
        "sources": [{"name": "ja", "model": "org/ja", "revision": "abc", "weight": 0.5}],
    }
    assert len(plan(recipe).sources) == 1
    assert hub == [("org/base", "v1"), ("org/ja", "abc")]


def test_a_local_folder_wins_over_a_repository_of_the_same_name(hub, tmp_path, monkeypatch):
    (tmp_path / "org" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(locate("org/base")) == "org/base"
    assert hub == []


def test_what_is_neither_says_what_each_look_up_found(hub, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder, and the Hub does not give it"):
        locate("org/none")
    with pytest.raises(CheckpointError, match="no such folder"):
        locate("./org/none")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file, expected a folder"):
        locate(str(tmp_path / "file"))


def test_offline_without_a_cache_is_an_error_and_not_a_traceback(tmp_path):
    with pytest.raises(CheckpointError, match="the Hub does not give it"):
        locate("org/never-downloaded")
