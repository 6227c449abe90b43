"""Machine code of numba functions, kept between runs and loaded without importing numba.

Importing numba and restoring a function from its own cache cost more than merging a gigabyte. So a
function is compiled once for this processor, its machine code is kept in the user's cache folder,
and later runs map it into memory and call it through ctypes, which releases the GIL. Neither numba
nor LLVM is loaded then.

Two forms are kept. On Linux with x86-64 it is an *image* (`kernels.image`), which is mapped in a
millisecond. Everywhere else it is the *object* file that LLVM made; loading it takes LLVM's
run-time linker, of llvmlite: 70 ms and 50 MB.

The cache is `$OPTIMER_CACHE_DIR/kernels`, by default in `$XDG_CACHE_HOME/optimer-engine` or what
the system has for it. It may be deleted at any time. Nothing in it is executed unless the folder
and the file belong to this user, nobody else may write them, and the file's digest fits this very
source, processor and compiler; otherwise the function is compiled anew. Where nothing can be
written, it is compiled once per process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import struct
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .image import load_image, make_image

IMAGE, OBJECT = b"I", b"O"
ENTRY = "optimer_kernel"
"""The symbol by which a function is found in an object file."""

_C_TYPES: dict[str, Any] = {
    "void": None,
    "boolean": ctypes.c_bool,
    "int32": ctypes.c_int32,
    "int64": ctypes.c_int64,
    "uint32": ctypes.c_uint32,
    "uint64": ctypes.c_uint64,
    "float32": ctypes.c_float,
    "float64": ctypes.c_double,
}

_lock = threading.RLock()
_log = logging.getLogger(__name__)


def compiled(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Callable[..., Any]]]:
    """Make a factory of numba functions into a factory of machine code.

    The factory imports numba (or a module that does) in its body and returns the function, plain or
    jitted, that is to be compiled; it runs only when there is no machine code yet. Its arguments
    are constants of the code: each set of them is a variant, loaded or compiled when it is first
    asked for.

        @compiled("boolean(int64, float64)")
        def scaled(code):
            from .elements import reader
            read = reader(code)
            def function(address, weight): ...
            return function

        scaled(BF16)(array.ctypes.data, 0.5)

    Args:
        signature: result and arguments: int32, int64, uint32, uint64, float32, float64, boolean;
            void. Memory is passed by address, as int64.

    The code must depend on nothing but the constants (numbers, strings, tuples of them) and on the
    source of the factory's module and of what that imports by `from .name import`. The function
    must not raise or allocate; numba's checks are off (division by zero gives infinity, indices are
    not checked).
    """

    def decorate(factory: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
        ready: dict[tuple, Callable[..., Any]] = {}

        @functools.wraps(factory)
        def variant(*constants: Any) -> Callable[..., Any]:
            if constants not in ready:
                with _lock:
                    if constants not in ready:
                        ready[constants] = _obtain(factory, constants, signature)
            return ready[constants]

        return variant

    return decorate


def _obtain(factory: Callable[..., Any], constants: tuple, signature: str) -> Callable[..., Any]:
    """The machine code from the cache, or compiled and kept for the next run."""
    name = f"{factory.__module__.rpartition('.')[2]}.{factory.__name__}"
    key = hashlib.sha256(
        b"\0".join(
            [
                _sources(factory.__code__.co_filename),
                _compiler(),
                _processor(),
                repr((name, factory.__qualname__, signature, constants)).encode(),
            ]
        )
    ).digest()
    folder = _folder()
    path = folder / f"{name}-{key.hex()[:24]}" if folder else None
    code = _read(path, key) if path else None
    if code is None:
        _say_once()
        code = _compile(factory(*constants), signature, name)
        if path:
            _write(path, key, code)
    result, *arguments = (_C_TYPES[word] for word in re.findall(r"\w+", signature))
    address, memory = (load_image if code[:1] == IMAGE else _load_object)(code[1:])
    function = ctypes.CFUNCTYPE(result, *arguments)(address)
    function.memory = memory  # type: ignore[attr-defined]  # the code lives as long as the function
    return function


@functools.cache
def _say_once() -> None:
    """Compiling takes seconds: tell whoever asked logging for INFO, as the program does."""
    _log.info("compiling kernels for this processor, once; this takes some seconds")


# What the code depends on.


@functools.cache
def _sources(filename: str) -> bytes:
    """Digest of this module, of the factory's, and of all that it imports from its own folder."""
    seen: dict[Path, bytes] = {}
    todo = [Path(__file__), Path(filename)]
    while todo:
        path = todo.pop()
        if path not in seen and path.exists():
            seen[path] = path.read_bytes()
            imported = re.findall(rb"^\s*from \.(\w+) import", seen[path], re.MULTILINE)
            todo += [path.with_name(f"{name.decode()}.py") for name in imported]
    digest = hashlib.sha256()
    for path in sorted(seen):
        digest.update(hashlib.sha256(seen[path]).digest())
    return digest.digest()


@functools.cache
def _compiler() -> bytes:
    """The versions of numba and llvmlite, without importing them (or importlib.metadata, 30 ms)."""
    versions = []
    for package in ("numba", "llvmlite"):
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{package} is not installed", name=package)
        file = Path(spec.origin).with_name("_version.py")
        if file.exists():
            versions.append(file.read_bytes())
        else:
            from importlib.metadata import version

            versions.append(version(package).encode())
    return b"\0".join(versions)


@functools.cache
def _processor() -> bytes:
    """The machine and the instructions that its processor has."""
    machine = [sys.platform, platform.machine(), str(struct.calcsize("P"))]
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            first = file.read(8192).split("\n\n")[0]
        wanted = r"^((?:vendor_id|cpu family|model|model name|flags|Features|CPU \w+)\s*:.*)$"
        described = re.findall(wanted, first, re.MULTILINE)
    except OSError:
        described = []
    if not described:
        import llvmlite.binding as llvm

        described = [llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    return "\n".join(machine + described).encode()


# The cache.


def _folder() -> Path | None:
    """The cache folder, made if need be; None where there is none to be trusted."""
    chosen = os.environ.get("OPTIMER_CACHE_DIR")
    try:
        if chosen:
            folder = Path(chosen).absolute() / "kernels"
        else:
            caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
            if not caches.is_absolute():
                caches = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
            folder = caches / "optimer-engine" / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder if _own(folder.lstat()) else None
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None


def _own(status: os.stat_result) -> bool:
    """Whether this user owns it and nobody else may write it."""
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _read(path: Path, key: bytes) -> bytes | None:
    """The code kept under `key`; None where it is missing, damaged or somebody else's."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(descriptor, "rb") as file:
            if not _own(os.fstat(descriptor)):
                return None
            digest, code = file.read(32), file.read()
    except OSError:
        return None
    return code if digest == hashlib.sha256(key + code).digest() else None


def _write(path: Path, key: bytes, code: bytes) -> None:
    """Keep `code`, whole or not at all, however many processes do so at once."""
    import tempfile

    with contextlib.suppress(OSError):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(key + code).digest() + code)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink()
            raise


# Compiling.


def _compile(function: Any, signature: str, name: str) -> bytes:
    """The code of a Python or jitted function: IMAGE and an image, or OBJECT and an object file.

    Raises:
        TypeError: for a function that needs Python or numba at run time.
    """
    import llvmlite.binding as llvm
    import numba

    native = numba.cfunc(signature, error_model="numpy")(getattr(function, "py_func", function))
    module = llvm.parse_assembly(native.inspect_llvm())
    machine = _target_machine(llvm)
    # numba's wrapper passes exceptions on to Python. Once all else is internal, LLVM sees that
    # there are none and drops that part.
    for value in (*module.functions, *module.global_variables):
        if not value.is_declaration:
            value.linkage = "external" if value.name == native.native_name else "internal"
    passes = llvm.create_new_module_pass_manager()
    passes.add_ipsccp_pass()
    passes.add_simplify_cfg_pass()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
    called = [f.name for f in module.functions if f.is_declaration and f.name[:5] != "llvm."]
    refused = [n for n in called if n.startswith("Py") or not hasattr(ctypes.pythonapi, n)]
    if refused:
        raise TypeError(f"{name} may raise or allocate, or is no plain loop: it calls {refused}")
    module.get_function(native.native_name).name = ENTRY
    file = machine.emit_object(module)
    image = make_image(file, ENTRY)
    return OBJECT + file if image is None else IMAGE + image


def _target_machine(llvm: Any) -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="pic",
        codemodel="jitdefault" if sys.platform == "win32" else "default",
    )


# Loading.


def _load_object(file: bytes) -> tuple[int, Any]:
    """The entry's address, and the linker to keep."""
    import llvmlite.binding as llvm

    linker = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine(llvm))
    linker.add_object_file(llvm.ObjectFileRef.from_data(file))
    linker.finalize_object()
    return linker.get_function_address(ENTRY), linker
