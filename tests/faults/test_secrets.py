"""A planted token is found in no output, log, traceback or file."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from optimer_engine import merge, verify_output
from optimer_engine.errors import CheckpointError, RecipeError
from optimer_engine.redaction import redacted
from tests.conftest import nearby, random_tensors

TOKEN = "hf_" + "SeCrEt0123456789abcdefGHIJ"
ODD_TOKEN = "an-older-kind-of-token"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"token {TOKEN} refused", "token *** refused"),
        (f"'authorization': 'Bearer {TOKEN}x', 'a'", "'authorization': '***', 'a'"),
        ("Authorization: Basic dXNlcjpwYXNz\nnext", "Authorization: ***\nnext"),
        ("https://user:password@host/x", "https://***@host/x"),
        (f"git clone https://user:{TOKEN}@host", "git clone https://***@host"),
        (f"set to {ODD_TOKEN}", "set to ***"),
        ("hf_hub_download, hf_transfer and a@b.c:d", "hf_hub_download, hf_transfer and a@b.c:d"),
        ("C:/x:y z@w and http://host:80/a@b", "C:/x:y z@w and http://host:80/a@b"),
    ],
)
def test_what_is_secret_is_replaced_and_nothing_else(monkeypatch, text, kept):
    monkeypatch.setenv("HF_TOKEN", ODD_TOKEN)
    assert redacted(text) == kept
    assert str(CheckpointError(text, where=text, todo=text)).count("***") == 3 * kept.count("***")


def test_what_is_hidden_leaves_json_that_can_be_read(tmp_path, write_checkpoint):
    """A header's value ends at a quote: in JSON that quote may have been escaped."""
    header = 'Authorization: Bearer abc"def'
    settings = {
        "hub_token": "0123",
        "Authorization": "Basic eDp5",
        "note": header,
        "deep": [{"key": f"x {TOKEN}", TOKEN: 1}],
        "same": "\u00e9 \u2028",
    }
    base = write_checkpoint("base", random_tensors(0), settings)
    (base / "tokenizer_config.json").write_text('{"a": "[' * 1)  # not JSON: copied as it is
    (base / "special_tokens_map.json").write_text("[" * 100_000)
    (base / "chat_template.jinja").write_text(f"{{{{ '{TOKEN}' }}}}")
    (base / "added_tokens.json").write_text(f'{{"a": "{TOKEN}", "a": "b"}}')
    (base / "generation_config.json").write_text('{"temperature":  0.5, "odd": NaN}')
    ja = write_checkpoint("ja", nearby(random_tensors(0), 1))
    recipe = {"base": str(base), "sources": [{"name": header, "model": str(ja), "weight": 0.5}]}
    merge(recipe, tmp_path / "out")
    verify_output(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["hub_token"] == written["Authorization"] == "***"
    assert written["note"].startswith("Authorization: ***")
    assert written["deep"] == [{"key": "x ***", "***": 1}]
    assert written["same"] == settings["same"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recipe"]["sources"][0]["name"].startswith("Authorization: ***")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert json.loads((tmp_path / "out" / "added_tokens.json").read_text()) == {"a": "b"}
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ '***' }}"


@pytest.mark.parametrize("crashes", [False, True])
def test_a_search_writes_no_token_down(tmp_path, monkeypatch, caplog, crashes):
    pytest.importorskip("smac")
    from optimer_engine.search import SearchConfig, Vector, run_search
    from optimer_engine.search.page import write_page

    def objective(weights):
        if crashes and weights["x"] > 0.4:
            header = {"authorization": f"Bearer {ODD_TOKEN}"}
            raise RuntimeError(f"GET https://user:{TOKEN}@host with {header}")
        return weights["x"]

    monkeypatch.setenv("HF_TOKEN", ODD_TOKEN)
    vectors = [Vector("x", f"runs/{ODD_TOKEN}")]
    config = SearchConfig(base=f"base-{TOKEN}", vectors=vectors, trials=4, patience=0)
    run_search(config, tmp_path, evaluate=objective)
    write_page(tmp_path)
    assert ("RuntimeError" in (tmp_path / "trials.jsonl").read_text()) == crashes
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= 3
    for secret in (TOKEN, ODD_TOKEN):
        assert secret not in caplog.text
        for path in written:
            assert secret.encode() not in path.read_bytes(), path


def test_names_that_are_written_down_are_no_tokens():
    from optimer_engine.search import Term, Vector

    for make in (lambda: Term(TOKEN), lambda: Vector(f"a {TOKEN}", "runs/x")):
        with pytest.raises(RecipeError, match="looks like a token"):
            make()


def test_no_command_gives_a_token_away(tmp_path, write_checkpoint):
    base = write_checkpoint("base", random_tensors(0), {"hub_token": TOKEN})
    ja = write_checkpoint(f"ja-{TOKEN}", nearby(random_tensors(0), 1))
    environment = {**os.environ, "HF_TOKEN": ODD_TOKEN, "HF_HUB_OFFLINE": "1"}
    good = {"base": str(base), "sources": [{"name": TOKEN, "model": str(ja), "weight": 0.5}]}
    (tmp_path / "good.yaml").write_text(json.dumps(good))
    (tmp_path / "unknown.yaml").write_text(json.dumps({**good, TOKEN: 1}))
    (tmp_path / "absent.yaml").write_text(json.dumps({**good, "base": f"org/{TOKEN}"}))
    commands = [
        ["merge", "good.yaml", "-o", "out"],
        ["merge", "good.yaml", "-o", "out2", "--json"],
        ["plan", "good.yaml"],
        ["verify", "out"],
        ["merge", "unknown.yaml", "-o", "no"],
        ["--debug", "merge", "unknown.yaml", "-o", "no"],
        ["--debug", "merge", "absent.yaml", "-o", "no"],
        ["merge", "--base", str(base), "--add", f"{ODD_TOKEN}=x", "-o", "no"],
        ["merge", f"{TOKEN}.yaml", "-o", "no"],
        ["convert", f"https://user:{TOKEN}@host/model", "-o", "no"],
    ]
    wanted = [0, 0, 0, 0, 2, 1, 1, 2, 2, 2]
    for arguments, code in zip(commands, wanted, strict=True):
        done = subprocess.run(
            [sys.executable, "-c", "from optimer_engine.cli import main; main()", *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, (arguments, done.stderr)
        for secret in (TOKEN, ODD_TOKEN):
            assert secret not in done.stdout + done.stderr, arguments
    for folder in ("out", "out2"):
        written = b"".join(p.read_bytes() for p in (tmp_path / folder).iterdir())
        assert TOKEN.encode() not in written
        assert ODD_TOKEN.encode() not in written
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "config.json held what looks like a token, and *** replaced it" in report["warnings"]
