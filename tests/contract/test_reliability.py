"""The documents that promise reliability name tests that exist, and long forms that can be run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("docs/reliability.md", "tests/faults/README.md", "CONTRIBUTING.md")


def known():
    """Names of test modules and of all test functions."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        yield path.stem
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield node.name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_test_that_is_named_exists(document):
    text = (ROOT / document).read_text()
    named = re.findall(r"`(?:[\w/]+/)?(test_\w+)(?:\.py)?`", text)
    assert len(named) >= 10
    assert sorted(set(named) - set(known())) == []


@pytest.mark.parametrize("document", DOCUMENTS[:2])
def test_every_row_of_promises_and_faults_names_a_test(document):
    rows = [line for line in (ROOT / document).read_text().splitlines() if line.startswith("| ")]
    tables = [row for row in rows if not re.match(r"\| [\d, ]+ \||\| (long form|exit code)", row)]
    held = [row for row in tables if "`pytest" not in row and "`python" not in row]
    headings = {row for row in held if re.match(r"\| (promise|input|fault) \|", row)}
    assert len(held) - len(headings) >= 15
    assert [row for row in held if row not in headings and "`test_" not in row] == []


def test_long_forms_exist():
    commands = re.findall(r"`((?:pytest|python) [^`]+)`", (ROOT / DOCUMENTS[0]).read_text())
    assert len(commands) >= 5
    for command in commands:
        for word in command.split():
            if word.endswith(".py"):
                assert "pytest.mark.slow" in (ROOT / word).read_text(), word
    from tests.faults.fuzz import TARGETS

    (fuzzed,) = (c for c in commands if "fuzz" in c)
    assert fuzzed.split()[3] in TARGETS
