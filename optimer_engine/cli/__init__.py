"""The command line: parse, call the library, print. Each command's module loads when it is called.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 2 bad input, 3 the output
cannot be written, 4 another process is writing it; 129, 130, 143 stopped by SIGHUP, SIGINT,
SIGTERM.
"""

from __future__ import annotations

import importlib
import logging
import signal
import sys
from types import FrameType

import click

from optimer_engine import __version__
from optimer_engine.errors import OptimerError
from optimer_engine.redaction import protect_streams

_COMMANDS = {
    "bench": "Measure merging and the GPU kernels beside rivals (in a clone).",
    "convert": "Write a pickled model (pytorch_model.bin) as safetensors.",
    "demo": "Run the whole loop on real text, on a CPU, in minutes.",
    "extract": "Subtract a base from a trained checkpoint: a distribution vector.",
    "inspect": "Say what vectors and checkpoints hold, and how they relate.",
    "merge": "Merge a base and weighted sources into a new checkpoint.",
    "pack": "Store a distribution vector small: exact, bf16, int8, int4 or low rank.",
    "plan": "Say what a merge would read, write and need.",
    "pool": "Keep distribution vectors of one base: add, list, verify, push, pull.",
    "report": "Write a search as one HTML page.",
    "search": "Search the weights of a merge for an objective.",
    "train": "Continually pre-train a base: on a dataset, a mixture, or a pool of them.",
    "unpack": "Restore the trained checkpoint from its base and an exact vector.",
    "verify": "Check that an output is whole and unchanged.",
}


class _Lazy(click.Group):
    """A group that imports a command's module only to run it or to show its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        return importlib.import_module(f"optimer_engine.cli.{name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(_COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="optimer")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def optimer(ctx: click.Context, debug: bool) -> None:
    """Merge language models tile by tile, and search the weights of the merge.

    \b
    Example: a base, two fine-tuned copies of it, and their merge
      optimer merge --base org/base --add org/base-ja=0.4 --add runs/math=0.25 -o merged
    """
    ctx.obj = debug


class _Stopped(SystemExit):
    """A signal asked the program to end (a KeyboardInterrupt would become click's Abort)."""


def _stop(number: int, _: FrameType | None) -> None:
    """Unwind, so that what is whole is kept; a second signal ends the process at once."""
    for name in _SIGNALS:
        signal.signal(name, signal.SIG_DFL)
    raise _Stopped(128 + number)


_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


def main() -> None:
    """Entry point of the `optimer` program."""
    protect_streams()
    for name in _SIGNALS:
        if signal.getsignal(name) != signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(name, _stop)
    kernels = logging.getLogger("optimer_engine.kernels")
    notices = logging.StreamHandler()
    notices.setFormatter(logging.Formatter("optimer: %(message)s"))
    kernels.addHandler(notices)
    kernels.setLevel(logging.INFO)
    debug = "--debug" in sys.argv[1:]
    try:
        optimer(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except OptimerError as error:
        if debug:
            raise
        click.echo(f"optimer: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:  # of a small file that no command foresaw: a full disk, no permission
        if debug:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        click.echo(f"optimer: {where}{error.strerror or error}", err=True)
        click.echo("  check the disk and the path, then run the same command again", err=True)
        sys.exit(3)
    except MemoryError:
        if debug:
            raise
        todo = "give a lower --mem-limit or fewer --threads"
        click.echo(f"optimer: not enough memory\n  {todo}", err=True)
        sys.exit(3)
    except (_Stopped, KeyboardInterrupt, click.Abort) as error:
        click.echo("optimer: interrupted; run the same command to continue", err=True)
        sys.exit(error.code if isinstance(error, _Stopped) else 130)
