"""Stand-ins for the disk: some die or fail at a chosen effect, one remembers every effect.

All take the place of `os` inside `optimer_engine.durable`, through which all output goes. An
effect is a call that changes what a later process can see.

*Dying.* At the chosen effect `Killed` is raised, and again at every effect from then on, so
whatever the program does while it unwinds (closing files apart) changes nothing: the disk holds
exactly the effects before the chosen one, as after SIGKILL at that point. `Killed` is no Exception,
so no handler takes it for an error, and closing the files releases their locks as the end of a
process does. `test_kill` also kills real processes, to check that the picture is right.

*Remembering.* From the log of effects, `survivors` builds a folder as a power cut may leave it
after any prefix of the log: bytes not synced may be lost or torn, names of a folder that was not
synced may be lost, each independently of the others.
"""

from __future__ import annotations

import os
import random
import threading
from dataclasses import dataclass, field
from pathlib import Path

EFFECTS = (
    "pwrite", "ftruncate", "posix_fallocate", "copy_file_range", "fdatasync", "fsync", "replace",
    "unlink", "mkdir", "rmdir",
)  # fmt: skip


class Killed(BaseException):
    """The process is no more."""


class Disk:
    """`os`, with `act(effect, call, arguments)` around every effect."""

    def __init__(self):
        self.lock = threading.RLock()

    def act(self, name, real, arguments):
        return real(*arguments)

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in EFFECTS:
            return real
        if name in ("fdatasync", "fsync"):  # the machine that runs the tests stays on
            real = _synced
        return lambda *arguments: self._do(name, real, arguments)

    def open(self, path, flags, mode=0o777):
        if flags & os.O_CREAT and not os.path.lexists(path):
            return self._do("create", os.open, (path, flags, mode))
        return os.open(path, flags, mode)

    def _do(self, name, real, arguments):
        with self.lock:
            return self.act(name, real, arguments)


def _synced(fd):
    os.fstat(fd)


class Dying(Disk):
    """Ends at effect number `at`, counted from 0; `count` effects were asked for."""

    def __init__(self, at):
        super().__init__()
        self.at, self.count = at, 0

    def act(self, name, real, arguments):
        self.count += 1
        if self.count > self.at:
            raise Killed
        return real(*arguments)


class Failing(Disk):
    """Effect number `at` fails with `errno`, and, if `forever`, every one after it."""

    def __init__(self, at, errno, forever=False):
        super().__init__()
        self.at, self.errno, self.forever, self.count = at, errno, forever, 0
        self.failed = []

    def act(self, name, real, arguments):
        self.count += 1
        if self.count - 1 == self.at or (self.forever and self.count > self.at):
            self.failed.append(name)
            raise OSError(self.errno, os.strerror(self.errno))
        return real(*arguments)


class Short(Disk):
    """Write number `at` and every `every`th one write less than asked, down to one byte."""

    def __init__(self, at):
        super().__init__()
        self.at, self.count, self.shortened = at, 0, 0

    def act(self, name, real, arguments):
        self.count += 1
        size = {"pwrite": 1, "copy_file_range": 2}.get(name)
        if self.count - 1 == self.at and size is not None:
            arguments = list(arguments)
            if name == "pwrite":
                arguments[1] = arguments[1][: max(1, len(arguments[1]) // 3)]
            else:
                arguments[2] = max(1, arguments[2] // 3)
            self.shortened += 1
        return real(*arguments)


@dataclass
class Node:
    """A file's bytes or a folder's names: what the disk has, and what it was told since."""

    folder: bool
    content: bytearray = field(default_factory=bytearray)
    names: dict[str, int] = field(default_factory=dict)
    pending: list = field(default_factory=list)


class Recording(Disk):
    """Carries every effect out below `root` and logs it."""

    def __init__(self, root: Path):
        super().__init__()
        self.root, self.log = root, []
        self.numbers = {self._inode(root): 0}  # inode to number: inodes are used again
        self.made = 1

    @staticmethod
    def _inode(what):
        found = os.fstat(what) if isinstance(what, int) else Path(what).stat()
        return found.st_dev, found.st_ino

    def _number(self, what):
        return self.numbers[self._inode(what)]

    def _new(self, what):
        self.numbers[self._inode(what)] = self.made
        self.made += 1
        return self.made - 1

    def act(self, name, real, arguments):
        if name in ("replace", "unlink", "rmdir"):
            path = Path(arguments[0])
            folder = self._number(path.parent)
            result = real(*arguments)
            if name == "replace":
                new = Path(arguments[1])
                assert new.parent == path.parent
                self.log.append(("rename", folder, path.name, new.name))
            else:
                self.log.append(("unlink", folder, path.name))
            return result
        result = real(*arguments)
        if name == "create":
            path = Path(arguments[0])
            self.log.append(
                ("name", self._number(path.parent), path.name, self._new(result), False)
            )
        elif name == "mkdir":
            path = Path(arguments[0])
            self.log.append(("name", self._number(path.parent), path.name, self._new(path), True))
        elif name == "pwrite":
            fd, data, offset = arguments
            self.log.append(("write", self._number(fd), offset, bytes(data[:result])))
        elif name == "copy_file_range":
            _, fd, _, _, offset = arguments
            self.log.append(("write", self._number(fd), offset, os.pread(fd, result, offset)))
        elif name in ("ftruncate", "posix_fallocate"):
            size = arguments[1] if name == "ftruncate" else os.fstat(arguments[0]).st_size
            self.log.append(("resize", self._number(arguments[0]), size))
        elif name in ("fdatasync", "fsync"):
            self.log.append(("sync", self._number(arguments[0])))
        return result


def replay(log) -> dict[int, Node]:
    """What the disk has for sure after these effects, and what is pending."""
    nodes = {0: Node(folder=True)}
    for kind, number, *rest in log:
        node = nodes[number]
        if kind == "sync":
            for effect in node.pending:
                _apply(node, effect)
            node.pending = []
            continue
        if kind == "name":
            nodes[rest[1]] = Node(folder=rest[2])
        node.pending.append((kind, *rest))
    return nodes


def _apply(node, effect, kept=None):
    kind, *rest = effect
    if kind == "write":
        offset, data = rest[0], rest[1][:kept]
        if len(node.content) < offset + len(data):
            node.content.extend(bytes(offset + len(data) - len(node.content)))
        node.content[offset : offset + len(data)] = data
    elif kind == "resize":
        del node.content[rest[0] :]
        node.content.extend(bytes(rest[0] - len(node.content)))
    elif kind == "name":
        node.names[rest[0]] = rest[1]
    elif kind == "unlink":
        node.names.pop(rest[0], None)
    elif rest[0] in node.names:
        node.names[rest[1]] = node.names.pop(rest[0])


def survivors(log, into: Path, chance: float, seed: int = 0) -> None:
    """Write what a power cut after `log` leaves, each pending effect surviving with `chance`."""
    rng = random.Random(seed)
    nodes = replay(log)
    for node in nodes.values():
        for effect in node.pending:
            if rng.random() < chance:
                torn = effect[0] == "write" and 0 < chance < 1 and rng.random() < 0.3
                _apply(node, effect, rng.randrange(len(effect[2]) + 1) if torn else None)

    def write(node, path):
        if not node.folder:
            path.write_bytes(node.content)
            return
        path.mkdir(exist_ok=True)
        for name, number in node.names.items():
            write(nodes[number], path / name)

    write(nodes[0], into)
