"""Every error a user can meet, as one tree.

    OptimerError
    ├── RecipeError        ValueError       what the user wrote: recipe, configuration, flag
    ├── CheckpointError    ValueError       a folder, index, header or tensor that cannot be read
    ├── MismatchError      ValueError       checkpoints that do not fit each other
    ├── NonFiniteError     ArithmeticError  NaN or infinity where a number is needed
    ├── MemoryLimitError   MemoryError      a plan that does not fit the memory limit
    ├── MissingExtraError  ImportError      an optional library that is not installed
    └── OutputError        OSError          the output cannot be written (exit code 3)
        └── BusyError                       another run is writing it (exit code 4)

Each class inherits its standard-library cousin too, so `except ValueError` keeps working in code
that knows nothing of this project. An error says where it happened, what was found against what was
expected, and one thing to do next; `str()` is those lines, ready to print.
"""

from __future__ import annotations

from optimer_engine.redaction import redacted


class OptimerError(Exception):
    """Base of the tree.

    Args:
        what: what is wrong, with the value found and the value expected.
        where: the file, tensor, key or option concerned; printed first.
        todo: one thing the user can do next; printed on a line of its own.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", todo: str = "") -> None:
        self.what, self.where, self.todo = redacted(what), redacted(where), redacted(todo)
        super().__init__(self.what)

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        return f"{line}\n  {self.todo}" if self.todo else line


class RecipeError(OptimerError, ValueError):
    """A recipe, configuration file or command-line value is not usable."""


class CheckpointError(OptimerError, ValueError):
    """A checkpoint's folder, index, header or data cannot be read as it claims to be."""


class MismatchError(OptimerError, ValueError):
    """Checkpoints that should fit together do not."""


class NonFiniteError(OptimerError, ArithmeticError):
    """NaN or infinity in a source, or produced by a merge or a training step."""


class MemoryLimitError(OptimerError, MemoryError):
    """The projected memory of a plan exceeds the limit given."""


class MissingExtraError(OptimerError, ImportError):
    """A library that only some commands need is not installed."""


class OutputError(OptimerError, OSError):
    """The output cannot be written: it exists, or the disk refuses."""

    exit_code = 3

    def __init__(self, what: str, *, where: str = "", todo: str = "") -> None:
        OptimerError.__init__(self, what, where=where, todo=todo)


class BusyError(OutputError):
    """Another process holds the output."""

    exit_code = 4


def is_text(name: str) -> bool:
    """Whether a path can be written down: bytes that are no UTF-8 cannot, nor can a NUL."""
    return not any("\ud800" <= char <= "\udfff" or char == "\0" for char in name)


def quoted(text: object) -> str:
    """`text` with control, bidirectional and non-ASCII characters escaped, safe to print."""
    return ascii(str(text))[1:-1]
