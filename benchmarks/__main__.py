"""Command line of the benchmarks: `python -m benchmarks --help`, or `optimer bench --help`."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import click

from benchmarks.cases import CASES
from benchmarks.record import Record, summary
from benchmarks.runner import GateError
from benchmarks.runner import run as run_case

HERE = Path(__file__).parent


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main() -> None:
    """Measure merging: ours, rivals and the machine's limits, in one run."""


@main.command()
@click.argument("name", type=click.Choice(sorted(CASES)))
@click.option("--size-gb", type=float, help="Base (merge) or operand (kernel); default 1.2, 0.128.")
@click.option("--sources", default=4, help="Full checkpoints merged into the base.")
@click.option("--repeats", default=5, help="Rounds, after one that warms up and is checked.")
@click.option("--cold", is_flag=True, help="Drop the inputs from the page cache before each run.")
@click.option("--without", multiple=True, metavar="RIVAL", help="Leave a rival out; 'all' for all.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path(tempfile.gettempdir()) / "optimer-benchmarks",
    show_default="optimer-benchmarks in the temporary folder",
    help="Where files are made; remove it to be rid of them.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the record to this JSON file.")
def run(
    name: str,
    size_gb: float | None,
    sources: int,
    repeats: int,
    cold: bool,
    without: tuple[str, ...],
    work: Path,
    out: Path | None,
) -> None:
    """Run case NAME; print its table, and its record as one line of JSON.

    \b
    Example: a 1.2 GB base and four sources, against mergekit and plain torch
      python -m benchmarks run merge --out merge.json
    """
    module = CASES[name]
    unknown = set(without) - {*module.RIVALS, "all"}
    if unknown:
        raise click.BadParameter(f"rivals are {', '.join(module.RIVALS)}", param_hint="--without")
    rivals = tuple(r for r in module.RIVALS if not {r, "all"} & set(without))
    size_bytes = module.DEFAULT_BYTES if size_gb is None else int(size_gb * 1e9)
    options = [f"--size-gb {size_bytes / 1e9:g} --sources {sources} --repeats {repeats}"]
    options += ["--cold"] * cold + [f"--without {rival!r}" for rival in without]
    command = f"python -m benchmarks run {name} {' '.join(options)}"
    work.mkdir(parents=True, exist_ok=True)
    made = module.case(work.resolve(), size_bytes, sources, cold, rivals, command)
    try:
        record = run_case(made, repeats)
    except GateError as error:
        click.echo(str(error), err=True)
        sys.exit(1)
    if out is not None:
        out.write_text(record.to_json(indent=True) + "\n", "utf-8")
    click.echo(summary(record) + "\n")
    click.echo(record.to_json())


@main.command("kernels")
@click.option("--kernel", multiple=True, help="Only those whose names begin so, e.g. linear.")
@click.option("--size-mib", multiple=True, type=int, default=(64, 1024), help="Of the base.")
@click.option("--repeats", default=20, help="Rounds, after some that warm up.")
@click.option("--rivals/--no-rivals", default=True, help="Time torch and mergekit's arithmetic.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the record to this JSON file.")
def gpu_kernels(
    kernel: tuple[str, ...], size_mib: tuple[int, ...], repeats: int, rivals: bool, out: Path | None
) -> None:
    """Check and time the GPU kernels; without a GPU print what their machine code tells.

    \b
    Example: everything, and a record to keep
      optimer bench kernels --out gpu.json
    """
    import msgspec
    import torch

    from benchmarks import gpu_kernels as bench

    try:
        if torch.cuda.is_available():
            text, record = bench.run(kernel, size_mib, repeats, rivals)
        else:
            text, record = bench.without_gpu()
    except bench.GateError as error:
        click.echo(str(error), err=True)
        sys.exit(1)
    click.echo(text + "\n")
    encoded = msgspec.json.encode(record)
    if out is not None:
        out.write_bytes(msgspec.json.format(encoded, indent=1) + b"\n")
    click.echo(encoded.decode())


@main.command()
def readme() -> None:
    """Write the tables of benchmarks/README.md from results/*.json."""
    path = HERE / "README.md"
    path.write_text(with_tables(path.read_text("utf-8")), "utf-8")


def with_tables(text: str) -> str:
    """`text` with the lines between `<!-- NAME -->` and `<!-- end -->` made from the results.

    Where there is no result yet, the lines stay as they are.
    """

    def fill(match: re.Match[str]) -> str:
        path = HERE / "results" / f"{match[1]}.json"
        if not path.exists():
            return match[0]
        record = Record.load(path)
        return f"<!-- {match[1]} -->\n{summary(record)}\n<!-- end -->"

    return re.sub(r"<!-- (\w[\w.]*) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    main()
