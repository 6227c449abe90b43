"""Machine code that is kept between runs: right, shared, and never executed unless it is ours."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from optimer_engine.kernels import image, native


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own; what is found in it afterwards."""
    monkeypatch.setenv("OPTIMER_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def fresh_adder(compilations):
    """A factory as a new process has it; it notes what it was asked to compile."""

    @native.compiled("int64(int64, int64)")
    def adder(step):
        from optimer_engine.kernels.elements import load

        compilations.append(step)

        def add(address, elems):
            total = 0
            for i in range(elems):
                total += load(address, np.int64, i) + step
            return total

        return add

    return adder


def run(adder, step=1):
    array = np.arange(1000)
    return adder(step)(array.ctypes.data, array.size)


EXPECTED = 999 * 500 + 1000


def test_it_is_compiled_once_per_constants_and_then_loaded(cache):
    compilations = []
    first = fresh_adder(compilations)
    assert run(first) == run(first) == EXPECTED
    assert run(first, 3) == EXPECTED + 2000
    assert compilations == [1, 3]
    second = fresh_adder(compilations)
    assert run(second) == EXPECTED
    assert run(second, 3) == EXPECTED + 2000
    assert compilations == [1, 3]
    assert len(list(cache.iterdir())) == 2
    assert all(path.stat().st_mode & 0o077 == 0 for path in (cache, *cache.iterdir()))


RUN = """
import sys, numpy as np
from optimer_engine.kernels import cpu
base = np.arange(10000, dtype=np.uint16)
out = np.empty_like(base)
cpu.linear(base, 0, [base], [0], [True], [1.0], out, 0)
print(out.tobytes().hex() == (base + 128).tobytes().hex(), out[300], sorted(
    {"numba", "llvmlite", "importlib.metadata"} & set(sys.modules)))
"""


def start():
    return subprocess.Popen(
        [sys.executable, "-c", RUN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output.split(maxsplit=2)


def test_a_second_process_imports_neither_numba_nor_llvm(cache):
    # Doubling a normal bf16 adds one to its exponent; the first 128 are denormals.
    first = finish(start())
    second = finish(start())
    assert first[1] == second[1] == str(300 + 128)
    assert "numba" in first[2]
    if sys.platform == "linux" and os.uname().machine == "x86_64":
        assert second[2].strip() == "[]"


def test_processes_that_start_together_share_one_cache(cache):
    running = [start() for _ in range(3)]
    assert {finish(process)[1] for process in running} == {str(300 + 128)}
    names = [path.name for path in cache.iterdir()]
    assert len(names) == 1
    assert not names[0].startswith(".")


def flip_a_bit(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip_a_bit(path, 0),
        lambda path: flip_a_bit(path, 40),
        lambda path: flip_a_bit(path, -1),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.chmod(0o666),
        lambda path: path.rename(path.with_name("other")) and path.symlink_to("other"),
    ],
    ids=["digest", "head", "code", "shortened", "empty", "writable by all", "a link"],
)
def test_what_is_damaged_or_open_to_others_is_compiled_anew(cache, damage):
    compilations = []
    run(fresh_adder(compilations))
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    damage(path)
    assert run(fresh_adder(compilations)) == EXPECTED
    assert compilations == [1, 1]
    assert path.read_bytes() == whole
    assert not path.is_symlink()
    assert run(fresh_adder(compilations)) == EXPECTED
    assert compilations == [1, 1]


def test_code_under_another_name_is_not_taken(cache):
    compilations = []
    first = fresh_adder(compilations)
    run(first, 1)
    (one,) = cache.iterdir()
    run(first, 2)
    (two,) = set(cache.iterdir()) - {one}
    two.write_bytes(one.read_bytes())
    assert run(fresh_adder(compilations), 2) == EXPECTED + 1000
    assert compilations == [1, 2, 2]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid(), reason="needs root to give away")
@pytest.mark.parametrize("what", ["the file", "the folder"])
def test_what_belongs_to_somebody_else_is_not_taken(cache, what):
    compilations = []
    run(fresh_adder(compilations))
    (path,) = cache.iterdir()
    os.chown(path if what == "the file" else cache, 12345, 12345)
    assert run(fresh_adder(compilations)) == EXPECTED
    assert compilations == [1, 1]


def test_a_folder_that_others_may_write_is_not_used(cache):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    compilations = []
    assert run(fresh_adder(compilations)) == run(fresh_adder(compilations)) == EXPECTED
    assert compilations == [1, 1]
    assert list(cache.iterdir()) == []


def test_without_a_cache_it_works_from_memory(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPTIMER_CACHE_DIR", str(tmp_path / "file"))
    compilations = []
    adder = fresh_adder(compilations)
    assert run(adder) == run(adder) == EXPECTED
    assert compilations == [1]


@pytest.mark.parametrize("xdg", ["/somewhere", "relative", ""])
def test_the_cache_is_where_the_system_keeps_caches(tmp_path, monkeypatch, xdg):
    monkeypatch.delenv("OPTIMER_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    caches = tmp_path / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    if xdg.startswith("/"):
        xdg, caches = str(tmp_path / "xdg"), tmp_path / "xdg"
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert native._folder() == caches / "optimer-engine" / "kernels"


def test_threads_that_ask_at_once_compile_once(cache):
    compilations, results = [], []
    adder = fresh_adder(compilations)
    threads = [threading.Thread(target=lambda: results.append(run(adder))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [EXPECTED] * 4
    assert compilations == [1]


SOURCE = """
from .{helper} import NUMBER
from optimer_engine.kernels import image, native

@native.compiled("int64()")
def constant():
    return lambda: NUMBER
"""


@pytest.mark.parametrize("changed", ["the module", "what it imports"])
def test_changed_source_is_compiled_anew(cache, tmp_path, changed):
    folder = tmp_path / "package"
    folder.mkdir()

    def ask():
        for name in [name for name in sys.modules if name.split(".")[0] == "package"]:
            del sys.modules[name]
        importlib.invalidate_caches()
        native._sources.cache_clear()
        return importlib.import_module("package.kernel").constant()()

    sys.path.insert(0, str(tmp_path))
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        (folder / "__init__.py").write_text("")
        (folder / "one.py").write_text("NUMBER = 1\n")
        (folder / "two.py").write_text("NUMBER = 22\n")
        (folder / "kernel.py").write_text(SOURCE.format(helper="one"))
        assert ask() == 1
        if changed == "the module":
            (folder / "kernel.py").write_text(SOURCE.format(helper="two"))
        else:
            (folder / "one.py").write_text("NUMBER = 22\n")
        assert ask() == 22
    finally:
        sys.dont_write_bytecode = before
        sys.path.remove(str(tmp_path))
    assert len(list(cache.iterdir())) == 2


def test_the_c_library_can_be_called(cache):
    @native.compiled("float64(int64, int64)")
    def sum_of_exponentials():
        from optimer_engine.kernels.elements import array

        def add(address, elems):
            values = array(address, np.float64, elems)
            total = 0.0
            for value in values:
                total += math.exp(value) + math.atan2(value, 2.0)
            values[:] = 0.0  # memset
            return total

        return add

    for _ in range(2):
        values = np.linspace(-3, 3, 1001)
        want = sum(math.exp(value) + math.atan2(value, 2.0) for value in values)
        got = sum_of_exponentials()(values.ctypes.data, values.size)
        assert got == pytest.approx(want, rel=1e-12)
        assert not values.any()


def test_every_type_of_a_signature_arrives(cache):
    arguments = [True, -(2**31), -(2**63), 2**32 - 1, 2**64 - 1, 1.5, 2.5]

    @native.compiled("void(boolean, int32, int64, uint32, uint64, float32, float64, int64)")
    def spread():
        from optimer_engine.kernels.elements import store

        def put(a, b, c, d, e, f, g, address):
            store(address, np.float64, 0, 1.0 if a else 0.0)
            store(address, np.float64, 1, np.float64(b))
            store(address, np.float64, 2, np.float64(c))
            store(address, np.float64, 3, np.float64(d))
            store(address, np.float64, 4, np.float64(e))
            store(address, np.float64, 5, np.float64(f))
            store(address, np.float64, 6, g)

        return put

    out = np.zeros(7)
    assert spread()(*arguments, out.ctypes.data) is None
    assert list(out) == [float(argument) for argument in arguments]


def test_a_function_that_may_raise_is_refused(cache):
    @native.compiled("int64(int64)")
    def careful():
        def check(number):
            if number < 0:
                raise ValueError("negative")
            return number

        return check

    with pytest.raises(TypeError, match=r"test_native.careful may raise or allocate"):
        careful()
    assert list(cache.iterdir()) == []


def test_a_jitted_function_will_do(cache):
    @native.compiled("int64(int64)")
    def doubled():
        import numba

        return numba.njit(lambda number: 2 * number)

    assert doubled()(21) == 42


def test_where_no_image_can_be_made_the_object_file_is_kept(cache, monkeypatch):
    compilations = []
    monkeypatch.setattr(native, "make_image", lambda file, entry: None)
    assert run(fresh_adder(compilations)) == EXPECTED
    (path,) = cache.iterdir()
    assert path.read_bytes()[32:33] == native.OBJECT
    monkeypatch.undo()
    os.environ["OPTIMER_CACHE_DIR"] = str(cache.parent)
    try:
        assert run(fresh_adder(compilations)) == EXPECTED
    finally:
        del os.environ["OPTIMER_CACHE_DIR"]
    assert compilations == [1]


@pytest.mark.parametrize("file", [b"", b"\x7fELF\x01\x01", b"\xcf\xfa\xed\xfe" * 20])
def test_other_object_files_are_not_linked(file):
    assert image.make_image(file, native.ENTRY) is None


def test_calls_release_the_gil(cache):
    # ctypes.PyDLL's functions hold it, ctypes.CDLL's release it.
    function = fresh_adder([])(1)
    assert isinstance(function, ctypes._CFuncPtr)
    assert not function._flags_ & 4  # FUNCFLAG_PYTHONAPI
