"""Asking the Hub: again where that helps, and in the user's words what went wrong.

huggingface_hub tries again by itself in some places (a connection that breaks in the middle of a
file is continued) and not in others (a server error). Its texts are left out of ours: they hold
addresses with signatures in them.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from optimer_engine.errors import CheckpointError, OptimerError

LOOK_UP_WAITS_S = (1.0,)
RETRY_WAITS_S = (1.0, 5.0, 20.0)
"""Seconds before each further try when the network or the Hub fails; the first look-up gives up
sooner, since nothing is lost yet."""


T = TypeVar("T")


class DownloadError(OptimerError, OSError):
    """The Hub or the network does not give what is needed now; the same command continues later."""

    exit_code = 3

    def __init__(self, what: str, *, where: str = "", todo: str = "") -> None:
        OptimerError.__init__(self, what, where=where, todo=todo)


def patiently(action: Callable[[], T], where: str, waits_s: tuple[float, ...]) -> T:
    """Do something with huggingface_hub, again after a while where that may help.

    Args:
        where: what the user calls the thing that is asked for.
        waits_s: seconds to wait before each further try.

    Raises:
        DownloadError: the network, the Hub or the disk fails now.
        CheckpointError: the Hub says no, and would say so again.
    """
    from huggingface_hub.errors import HFValidationError, HTTPError

    for wait_s in (*waits_s, None):
        try:
            return action()
        except (HTTPError, OSError, HFValidationError) as error:
            refused, may_help = _explained(error, where)
            if wait_s is None or not may_help:
                raise refused from error
        time.sleep(wait_s)
    raise AssertionError("unreachable")


def _explained(error: Exception, where: str) -> tuple[OptimerError, bool]:
    """What to tell the user about a failed request, and whether trying again may help.

    Texts of the libraries are left out: they hold addresses with signatures in them.
    """
    from huggingface_hub import errors, get_token

    cause: BaseException = error
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        cause = error.__cause__
    has_token = get_token() is not None
    login = (
        "the token that is set must belong to an account with access"
        if has_token
        else "no token is set: log in with `hf auth login` or set HF_TOKEN"
    )
    response = getattr(cause, "response", None)
    status = getattr(response, "status_code", 0)
    number = getattr(cause, "errno", None)

    def final(what: str, todo: str) -> tuple[OptimerError, bool]:
        return CheckpointError(what, where=where, todo=todo), False

    if isinstance(cause, errors.HFValidationError):
        return final("is not a repository's name", "write org/name, or check the path")
    if isinstance(cause, errors.GatedRepoError):
        return final("is gated: its owner must grant access", f"ask on its page; {login}")
    if isinstance(cause, errors.RepositoryNotFoundError):
        return final(
            "no such folder, and no such repository on the Hub (or it is private)",
            f"check the name; if it is private, {login}",
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return final("the Hub has no such revision of it", "check branch, tag or commit")
    if isinstance(cause, errors.EntryNotFoundError) and status:
        return final("the Hub does not have this file any more", "run again, or name a revision")
    if status in (401, 403):
        return final(f"the Hub refuses ({status})", login)
    if number in (errno.ENOSPC, errno.EDQUOT):
        text = "no space is left for the download"
        todo = "free some space or give a --disk-limit, then run the same command again"
        return DownloadError(text, where=where, todo=todo), False
    again = "check the network and run the same command again"
    if status:
        return DownloadError(f"the Hub answers {status}", where=where, todo=again), True
    if number is not None and not isinstance(cause, ConnectionError):
        text = f"the download cannot be stored: {errno.errorcode.get(number, number)}"
        return DownloadError(text, where=where, todo="check the cache's disk and folder"), False
    early = type(cause) is OSError
    text = (
        "the download ended early" if early else f"no answer from the Hub ({type(cause).__name__})"
    )
    return DownloadError(text, where=where, todo=again), True
