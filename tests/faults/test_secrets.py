"""A planted token is found in no output, log, traceback or file."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from optimer_engine.errors import CheckpointError
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
