"""The one place that keeps secrets out of what is printed, logged and written.

Tokens come from the environment or the Hub's login store and are needed nowhere else. They leak
through text of others: a library's exception with a request in it, an address with a password, a
recipe that a token was pasted into. So text is filtered where it leaves: errors of this package as
they are made, both streams of the program, and the reports and journals that it writes.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from typing import Any

_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}"
    r"|(?<=://)[^\s/:@\"'\\]+:[^\s/@\"'\\]+(?=@)"
    r"|(?i:(?<=authorization: )|(?<=authorization\": \")|(?<=authorization': '))[^\r\n\"']+"
    r"|(?<=Bearer )[\w.~+/=-]{8,}"
)
_SECRET_KEYS = {"authorization", "api_key", "hf_token", "hub_token", "password", "wandb_api_key"}
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")


def redacted(text: str) -> str:
    """`text` with "***" in place of tokens, passwords in addresses and authorization headers."""
    for name in _VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= 8:
            text = text.replace(value, "***")
    return _SECRET.sub("***", text)


def redacted_data(value: Any) -> Any:
    """Plain data with every text in it, names too, redacted.

    For what becomes JSON or YAML: filtered afterwards, a text may lose the mark that ends it.
    """
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {
            redacted_data(name): "***"
            if isinstance(inner, str) and inner and str(name).lower() in _SECRET_KEYS
            else redacted_data(inner)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [redacted_data(inner) for inner in value]
    return value


def protect_streams() -> None:
    """Let the program's output pass through `Redacting`.

    A stream that was closed before the start becomes one that leads nowhere: else the first file
    that is opened gets its number, and is written to by whoever prints.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: PTH123, SIM115
        setattr(sys, name, Redacting(stream))


class Redacting:
    """A text stream that lets no secret through, and whose reader may go without stopping anyone.

    A terminal that was closed or a pipe that nobody reads must not end hours of work; a disk that
    is full under a redirected stream is an error like any other.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text redacted; the number of characters given."""
        try:
            self._stream.write(redacted(text))
        except OSError as error:
            self._let_go(error)
        return len(text)

    def flush(self) -> None:
        """Pass on what is buffered."""
        try:
            self._stream.flush()
        except OSError as error:
            self._let_go(error)

    def _let_go(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def writelines(self, lines: Any) -> None:
        """Write each redacted."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
