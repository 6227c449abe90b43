"""A pool to the Hub and back, against a stand-in that keeps commits as the Hub does."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError

from optimer_engine.cli.pool import command
from optimer_engine.engine import extract
from optimer_engine.errors import CheckpointError, MismatchError, OutputError, RecipeError
from optimer_engine.pool import Note, add, pull, push, read, verify
from tests.conftest import nearby, random_tensors

TOKEN = "hf_" + "s3cret" * 5


class Hub:
    """Repositories in memory: one list of commits each, a commit being its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.sent: list[str] = []
        self.fails: Exception | None = None
        self.after_looking = lambda: None

    def sha(self, repo: str) -> str:
        return f"{len(self.repos[repo]):040x}"

    # what huggingface_hub.HfApi has

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        if self.fails:
            raise self.fails
        if repo not in self.repos:
            self.repos[repo], self.private[repo] = [{}], private
        assert exist_ok

    def repo_info(self, repo: str, *, revision: str | None = None) -> SimpleNamespace:
        if self.fails:
            raise self.fails
        return SimpleNamespace(sha=revision or self.sha(repo))

    def create_commit(self, repo, operations, *, commit_message, parent_commit) -> None:
        if parent_commit != self.sha(repo):
            raise HfHubHTTPError("412: a commit has happened since", response=_response(412))
        files = dict(self.repos[repo][-1])
        for operation in operations:
            path = operation.path_in_repo
            if isinstance(operation, huggingface_hub.CommitOperationDelete):
                del files[path]
                continue
            with operation.as_file() as file:
                files[path] = file.read()
            self.sent.append(path)
        self.repos[repo].append(files)

    def download(self, repo, filename, *, revision, local_dir=None) -> str:
        files = self.repos[repo][int(revision, 16) - 1]
        if filename not in files:
            raise RemoteEntryNotFoundError(f"404: {filename}", response=_response(404))
        target = Path(local_dir or self.folder / revision) / filename
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(files[filename])
        self.after_looking()
        return str(target)


def _response(status: int):
    return SimpleNamespace(status_code=status, headers={}, request=None, text="")


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Hub:
    hub = Hub(tmp_path / "downloads")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    return hub


@pytest.fixture
def vector(write_checkpoint, tmp_path):
    bases: dict[int, Path] = {}

    def make(seed: int, base_seed: int = 0) -> tuple[Path, Path]:
        if base_seed not in bases:
            bases[base_seed] = write_checkpoint(f"base-{base_seed}", random_tensors(base_seed))
        trained = nearby(random_tensors(base_seed), seed)
        out = tmp_path / f"vector-{base_seed}-{seed}"
        extract(bases[base_seed], write_checkpoint(f"t{base_seed}-{seed}", trained), out)
        return out, bases[base_seed]

    return make


@pytest.fixture
def pool(vector, tmp_path) -> Path:
    folder = tmp_path / "pool"
    for seed, name, license in ((1, "ja", "cc-by-4.0"), (2, "math", "mit")):
        source, base = vector(seed)
        note = Note(dataset=f"{name} texts | *all*", license=license, tokens=10**6 * seed)
        add(folder, source, name, base=str(base), note=note)
    return folder


def test_a_pool_goes_up_and_comes_back_to_the_byte(hub, pool, tmp_path):
    assert push(pool, "org/vectors") == ["ja", "math"]
    assert hub.private["org/vectors"]
    stored = hub.repos["org/vectors"][-1]
    assert set(stored) == {
        "README.md", "pool.json", "ja/vector.safetensors", "math/vector.safetensors",
    }  # fmt: skip
    assert not any(str(tmp_path).encode() in content for content in stored.values())

    assert pull("org/vectors", tmp_path / "back") == ["ja", "math"]
    assert read(tmp_path / "back") == read(pool)
    assert verify(tmp_path / "back") == []
    assert {p.name for p in (tmp_path / "back").iterdir()} == {".lock", "pool.json", "ja", "math"}
    assert pull("org/vectors", tmp_path / "back") == []

    pull("org/vectors", tmp_path / "one", ["math"])
    assert [entry.name for entry in read(tmp_path / "one").vectors] == ["math"]


def test_the_card_states_base_data_and_licence(hub, pool):
    push(pool, "org/vectors")
    card = hub.repos["org/vectors"][-1]["README.md"].decode()
    _, front, text = card.split("---\n", 2)
    settings = yaml.safe_load(front)
    assert settings["license"] == "other"  # two licences
    assert "base_model" not in settings  # a local folder is no model on the Hub
    assert read(pool).base_fingerprint in text and "`base-0`" in text
    assert "| `ja` | ja texts \\| \\*all\\* | cc-by-4.0 | 1,000,000 |" in text
    assert "| mit |" in text


def test_a_second_push_sends_what_is_new(hub, pool, vector):
    push(pool, "org/vectors")
    hub.sent.clear()
    assert push(pool, "org/vectors") == []
    assert hub.sent == []
    source, _ = vector(3)
    add(pool, source, "zh", note=Note(dataset="zh", license="mit"))
    assert push(pool, "org/vectors", ["zh"]) == ["zh"]
    assert sorted(hub.sent) == ["README.md", "pool.json", "zh/vector.safetensors"]


def test_pools_of_several_people_join_and_never_overwrite(hub, pool, vector, tmp_path):
    push(pool, "org/vectors", ["ja"])
    other = tmp_path / "other"
    source, base = vector(7)
    add(other, source, "ja", base=str(base), note=Note(dataset="x", license="mit"))
    with pytest.raises(RecipeError, match="another 'ja'"):
        push(other, "org/vectors")
    add(other, vector(8)[0], "zh", note=Note(dataset="zh", license="mit"))
    push(other, "org/vectors", ["zh"])
    pull("org/vectors", tmp_path / "all")
    assert [entry.name for entry in read(tmp_path / "all").vectors] == ["ja", "zh"]
    with pytest.raises(RecipeError, match="another 'ja' in the pool"):
        pull("org/vectors", other, ["ja"])
    pull("org/vectors", other, ["ja"], replace=True)
    assert verify(other) == []
    assert read(other).find("ja").files == read(pool).find("ja").files

    def someone_else():
        hub.repos["org/vectors"].append(dict(hub.repos["org/vectors"][-1]))

    hub.after_looking = someone_else
    with pytest.raises(OutputError, match="a commit has happened since"):
        push(pool, "org/vectors", ["math"])


def test_another_base_is_refused_both_ways(hub, pool, vector, tmp_path):
    push(pool, "org/vectors")
    foreign = tmp_path / "foreign"
    source, base = vector(1, base_seed=5)
    add(foreign, source, "x", base=str(base), note=Note(dataset="x", license="mit"))
    with pytest.raises(MismatchError, match="holds vectors of base-0"):
        push(foreign, "org/vectors")
    with pytest.raises(MismatchError, match="is a pool of base-0"):
        pull("org/vectors", foreign)


def test_data_and_licence_must_be_known(hub, vector, tmp_path):
    source, base = vector(1)
    add(tmp_path / "p", source, "ja", base=str(base))
    with pytest.raises(RecipeError, match="its dataset is unknown"):
        push(tmp_path / "p", "org/vectors")
    add(tmp_path / "p", source, "ja", note=Note(dataset="ja"))
    with pytest.raises(RecipeError, match="its license is unknown"):
        push(tmp_path / "p", "org/vectors")
    assert hub.repos == {}
    push(tmp_path / "p", "org/vectors", license="cc0-1.0")
    assert read(tmp_path / "p").find("ja").license == "cc0-1.0"


def test_damage_is_found_on_both_ends(hub, pool, tmp_path):
    file = pool / "ja" / "vector.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="other content"):
        push(pool, "org/vectors")
    assert hub.repos == {}
    file.write_bytes(whole)
    push(pool, "org/vectors")
    stored = hub.repos["org/vectors"][-1]
    stored["ja/vector.safetensors"] = whole[:-1] + bytes([whole[-1] ^ 1])
    with pytest.raises(CheckpointError, match="not what the manifest says"):
        pull("org/vectors", tmp_path / "back")
    assert not (tmp_path / "back" / "pool.json").exists()


def test_a_hostile_repository_writes_nothing_outside(hub, pool, tmp_path):
    push(pool, "org/vectors")
    stored = hub.repos["org/vectors"][-1]
    evil = b"evil"
    stored["../evil.json"] = evil
    manifest = stored["pool.json"].decode()
    facts = f'"bytes": {len(evil)}, "sha256": "{hashlib.sha256(evil).hexdigest()}"'
    stored["pool.json"] = manifest.replace(
        '"files": {', f'"files": {{"../../evil.json": {{{facts}}},', 1
    ).encode()
    with pytest.raises(CheckpointError, match=r"pool\.json"):
        pull("org/vectors", tmp_path / "a" / "back")
    assert not list(tmp_path.rglob("evil.json"))


def test_a_cut_pull_goes_on(hub, pool, tmp_path, monkeypatch):
    push(pool, "org/vectors")
    real, asked = hub.download, []

    def cut(repo, filename, **options):
        asked.append(filename)
        if filename.startswith("math"):
            raise OSError("connection lost")
        return real(repo, filename, **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cut)
    with pytest.raises(CheckpointError, match="connection lost"):
        pull("org/vectors", tmp_path / "back")
    assert [entry.name for entry in read(tmp_path / "back").vectors] == ["ja"]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", real)
    assert pull("org/vectors", tmp_path / "back") == ["math"]
    assert verify(tmp_path / "back") == []


def test_a_token_never_shows(hub, pool, capsys):
    hub.fails = HfHubHTTPError(f"401 for Bearer {TOKEN}", response=_response(401))
    with pytest.raises(OutputError) as error:
        command(["push", str(pool), "org/vectors"], standalone_mode=False)
    shown = str(error.value) + "".join(capsys.readouterr())
    assert TOKEN not in shown and "Bearer ***" in shown
    assert error.value.__cause__ is None and error.value.__suppress_context__


def test_without_a_connection_nothing_is_taken_for_empty(hub, pool, monkeypatch):
    push(pool, "org/vectors", ["ja"])

    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(OutputError, match="offline"):
        push(pool, "org/vectors", ["math"])
    assert len(hub.repos["org/vectors"]) == 2


def test_no_pool_there(hub, tmp_path):
    hub.repos["org/empty"] = [{}]
    with pytest.raises(CheckpointError, match=r"it has no pool\.json"):
        pull("org/empty", tmp_path / "p")
    shutil.rmtree(tmp_path / "p", ignore_errors=True)
