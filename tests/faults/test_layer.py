"""What an output goes through is one layer: else the other tests here would not see all of it."""

from __future__ import annotations

import ast
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import optimer_engine
from optimer_engine import merge
from tests.faults.disk import EFFECTS

PACKAGE = Path(optimer_engine.__file__).parent
WRITERS = ("journal", "shard_file", "work_folder", "folder_sink", "convert", "search/trials")
FORBIDDEN = {
    *EFFECTS, "write", "writev", "pwritev", "rename", "remove", "truncate", "makedirs", "sendfile",
    "link", "symlink", "write_bytes", "write_text", "touch", "hardlink_to", "symlink_to", "mmap",
    "rmtree", "copyfile", "move",
}  # fmt: skip
PATH_METHODS = ("write_bytes", "write_text", "touch", "mkdir", "unlink", "rmdir")


def effects(tree):
    """Calls by which a module would change the disk itself."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        of, name = ast.unparse(node.func.value), node.func.attr
        text = " ".join(ast.unparse(argument) for argument in node.args)
        opens = name == "open" and any(flag in text for flag in ("O_CREAT", "O_WRONLY", "O_RDWR"))
        # `shard.write` and `durable.rename` are calls of ours.
        of_os = name in FORBIDDEN and of in ("os", "shutil", "mmap", "path", "file")
        if opens or of_os or name in PATH_METHODS:
            yield f"{of}.{name}"


@pytest.mark.parametrize("name", WRITERS)
def test_nothing_writes_past_the_layer(name):
    assert list(effects(ast.parse((PACKAGE / f"{name}.py").read_text()))) == []


def test_the_check_itself_sees_writes():
    text = "os.pwrite(1, b'', 0); path.unlink(); os.open(p, os.O_CREAT); os.mkdir(p); a.touch()"
    assert len(list(effects(ast.parse(text)))) == 5


@pytest.mark.parametrize("number", range(4))
def test_a_signal_while_threads_are_started_leaves_none_behind(make_case, monkeypatch, number):
    case = make_case("single")
    submit, calls = ThreadPoolExecutor.submit, iter(range(100))

    def interrupted(pool, function):
        future = submit(pool, function)
        if next(calls) == number:
            raise KeyboardInterrupt
        return future

    before = threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr(ThreadPoolExecutor, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge(case.recipe, case.folder / "out", threads=4)
    assert threading.active_count() == before
    merge(case.recipe, case.folder / "out")
    assert (case.folder / "out" / "report.json").exists()
