"""`optimer search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optimer_engine.cli.output import emit, json_option
from optimer_engine.errors import RecipeError

if TYPE_CHECKING:
    from optimer_engine.search import SearchConfig, SearchReport


@click.command(name="search")
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--base", metavar="MODEL", help="Base checkpoint: a folder, or org/name.")
@click.option(
    "--vector",
    "vectors",
    multiple=True,
    metavar="NAME=MODEL",
    help="A vector or full checkpoint whose weight is searched. Repeat for each.",
)
@click.option(
    "--range",
    "ranges",
    multiple=True,
    metavar="NAME=LOW:HIGH",
    help="Range of a vector's weight; default 0:1.",
)
@click.option(
    "--corpus",
    "corpora",
    multiple=True,
    metavar="NAME=FILE",
    help="Held-out text (txt or jsonl) scored in bits per byte.",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME=TASK:METRIC",
    help="An lm-eval task and its metric, e.g. sums=sums:acc.",
)
@click.option("--tasks-dir", metavar="DIR", help="Folder of local lm-eval task files.")
@click.option("--limit", type=click.IntRange(min=1), help="Blocks or examples per term.")
@click.option(
    "--weight", "weights", multiple=True, metavar="NAME=NUMBER", help="Of a term; default 1."
)
@click.option(
    "--max-loss",
    "max_losses",
    multiple=True,
    metavar="NAME=SHARE",
    help="A limit: 0.01 lets a term become 1 % worse than the base, no more.",
)
@click.option(
    "--heldout",
    "heldout",
    multiple=True,
    metavar="NAME=FILE",
    help="Text that the search never sees, scored at the end for the base and the best.",
)
@click.option(
    "--aggregate",
    type=click.Choice(["mean", "worst", "pareto"]),
    help="How terms become one cost; default mean. pareto shows all best compromises.",
)
@click.option(
    "--merge",
    "number",
    type=click.IntRange(min=0),
    help="Search nothing: merge trial NUMBER of the run in --out to OUT/trial-NUMBER.",
)
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    help="Merges tried at most; default 60, or more.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Default: 0.")
@click.option("--dtype", help="Of the live model; default float32.")
@click.option("--device", help="Of the live model, e.g. cuda; default cpu.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=1,
    help="Trials scored at once by processes on this machine, one GPU each; default 1.",
)
@click.option(
    "--dask-scheduler",
    "scheduler",
    metavar="ADDRESS",
    help="Let the workers of a Dask cluster score the trials, e.g. tcp://host:8786.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Run folder; default runs/NAME for NAME.yaml, or NAME beside the run that is reused.",
)
@click.option(
    "--reuse",
    type=click.Path(path_type=Path),
    help="An earlier run over the same vectors: score its trials anew, without evaluating.",
)
@click.option(
    "--objective",
    "objective_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="With --reuse: search what that run searched, for the objective (and other keys) in FILE.",
)
@json_option
def command(
    config: Path | None,
    base: str | None,
    vectors: tuple[str, ...],
    ranges: tuple[str, ...],
    corpora: tuple[str, ...],
    tasks: tuple[str, ...],
    tasks_dir: str | None,
    limit: int | None,
    weights: tuple[str, ...],
    max_losses: tuple[str, ...],
    heldout: tuple[str, ...],
    aggregate: str | None,
    number: int | None,
    trials: int | None,
    seed: int | None,
    dtype: str | None,
    device: str | None,
    workers: int,
    scheduler: str | None,
    out: Path | None,
    reuse: Path | None,
    objective_file: Path | None,
    as_json: bool,
) -> None:
    """Search the weights of a merge for an objective, and merge the best.

    Each trial merges into one loaded model in memory and scores it, hopeless ones on few examples;
    OUT/trials.jsonl keeps every score at once. The same command again continues where it was
    stopped. The winner is OUT/best, its recipe OUT/best.yaml, the numbers OUT/search_report.json.

    \b
    Examples:
      optimer search search.yaml -o runs/all
      optimer search --base base --vector ja=vectors/ja --vector math=vectors/math \\
          --corpus ja=ja.dev.txt --corpus math=math.dev.jsonl --trials 40 -o runs/all
      optimer search --objective math.yaml --reuse runs/all --trials 10
      optimer search search.yaml --workers 4 --device cuda -o runs/all
      optimer search --merge 17 -o runs/all

    \b
    search.yaml:
      base: base
      vectors:
        - {name: ja, model: vectors/ja}
        - {name: math, model: vectors/math, range: [-0.5, 1]}
      objective:
        - {name: ja, corpus: ja.dev.txt}
        - {name: sums, task: sums, metric: acc, tasks_dir: tasks, weight: 0.5}
      trials: 40
    """
    import msgspec

    from optimer_engine.recipe import decode, read_config, read_yaml
    from optimer_engine.search import SearchConfig, merge_trial, run_search, searched_in
    from optimer_engine.search.config import with_objective
    from optimer_engine.search.progress import bar

    described = (
        base,
        vectors,
        ranges,
        corpora,
        tasks,
        tasks_dir,
        limit,
        weights,
        max_losses,
        heldout,
    )
    if number is not None:
        if config is not None or any(described) or out is None:
            raise RecipeError("--merge takes --out and nothing else", where="search")
        folder = merge_trial(out, number)
        emit({"trial": number, "out": str(folder)}, str(folder), as_json)
        return
    if (objective_file is not None) + (config is not None) + any(described) != 1:
        raise RecipeError(
            "give a file, or --base with --vector and --corpus or --task, or --objective with"
            " --reuse, and not both",
            where="search",
            todo="optimer search --help shows an example of each",
        )
    if objective_file is not None:
        if reuse is None:
            raise RecipeError("needs the run to --reuse", where="--objective")
        found = read_yaml(objective_file)
        changes = found if isinstance(found, dict) else {}
        wanted = with_objective(searched_in(reuse), changes, str(objective_file))
        out = out or reuse.resolve().parent / objective_file.stem
    elif config is not None:
        wanted = read_config(config, SearchConfig)
        out = out or Path("runs") / config.stem
    else:
        data = _described(*described)
        wanted = decode(data, SearchConfig, "search")
    if out is None:
        raise RecipeError("is needed where no file gives the run a name", where="--out")
    given = {
        "trials": trials, "seed": seed, "dtype": dtype, "device": device, "aggregate": aggregate
    }  # fmt: skip
    given = {k: v for k, v in given.items() if v is not None}
    wanted = decode(msgspec.to_builtins(wanted) | given, SearchConfig, "search")
    report = run_search(
        wanted, out, reuse=reuse, workers=workers, scheduler=scheduler, callbacks=[bar("search")]
    )
    emit(report.to_dict(), f"{table(report, wanted)}\n{out}", as_json)


def table(report: SearchReport, config: SearchConfig) -> str:
    """The report as text: one row per known point and the best, the ratios, the seconds."""
    from optimer_engine.search.space import Space

    terms = list(report.higher_is_better)
    arrows = [f"{t} {'↑' if report.higher_is_better[t] else '↓'}" for t in terms]
    space = Space.of(config)
    names = space.names
    rows = [["", *(f"w {n}" for n in names), *arrows, "cost ↓"]]
    for row in [*report.front, *report.table]:
        scores = [f"{row.scores[t]:.4f}" for t in terms]
        cells = [f"{row.weights[n]:.3f}" for n in names]
        rows.append([row.name, *cells, *scores, f"{row.cost:+.4f}"])
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    seconds, total = report.seconds, sum(report.seconds.values()) or 1.0
    ratios = ", ".join(f"{n} {r:.1%}" for n, r in report.ratios.items())
    tight = [
        x.name
        for x in space.dimensions
        if not x.parameter and _on_bound(report.best_weights[x.name], (x.low, x.high))
    ]
    if report.heldout:
        lines += ["", "held-out, cost against the base (95 %), and how much worse than searched:"]
        for held in report.heldout:
            around = "" if held.low is None else f" ({held.low:+.4f} to {held.high:+.4f})"
            lines.append(f"  {held.name}: {held.cost:+.4f}{around}, gap {held.gap:+.4f}")
    if (last := report.final) is not None:
        around = "" if last.low is None else f" (95 %: {last.low:+.5f} to {last.high:+.5f})"
        shown = [f"{n} {last.searched[n]:.4f} to {last.final[n]:.4f}" for n in last.final]
        lines += [
            "",
            f"merged from the final form of {', '.join(last.vectors)}, not from what was searched:"
            f" cost {last.cost:+.5f}{around}",
            *(f"  {line}" for line in shown),
        ]
    if tight:
        lines += ["", f"at the end of its range, so a wider one may be better: {', '.join(tight)}"]
    return "\n".join(
        [
            *lines,
            "",
            f"best: trial {report.best_number}; surrogate {report.predicted_cost:+.4f}"
            f" ± {report.predicted_sd:.4f}; {report.trials} trials made, {report.reused} reused,"
            f" {report.failed} failed; {report.examples:,} examples scored",
            f"ended: {report.ended}",
            "cost rises by, when a weight moves 0.1: "
            + ", ".join(f"{n} {rise:.4f}" for n, rise in report.sensitivity.items()),
            f"sum of weights {report.sum_of_weights:.3f}; as ratios {ratios}",
            f"  ({report.ratios_note})",
            "seconds: " + ", ".join(f"{k} {s:.1f} ({s / total:.0%})" for k, s in seconds.items()),
        ]
    )


def _on_bound(weight: float, bounds: tuple[float, float]) -> bool:
    """Whether a wider range might have served; a weight of 0 is an answer, not a limit."""
    return weight != 0 and weight in bounds


def _described(
    base: str | None,
    vectors: tuple[str, ...],
    ranges: tuple[str, ...],
    corpora: tuple[str, ...],
    tasks: tuple[str, ...],
    tasks_dir: str | None,
    limit: int | None,
    weights: tuple[str, ...],
    max_losses: tuple[str, ...],
    heldout: tuple[str, ...],
) -> dict[str, Any]:
    """The flags as what a configuration file would hold."""
    pool = {name: {"name": name, "model": m} for name, m in _pairs("--vector", vectors).items()}
    for name, text in _pairs("--range", ranges).items():
        low, _, high = text.partition(":")
        _known("--range", name, pool)["range"] = [_number("--range", low), _number("--range", high)]
    terms: dict[str, dict[str, Any]] = {
        name: {"name": name, "corpus": file} for name, file in _pairs("--corpus", corpora).items()
    }
    for name, text in _pairs("--task", tasks).items():
        task, _, metric = text.partition(":")
        found: dict[str, Any] = {"name": name, "task": task, "metric": metric or None}
        if name in terms:
            raise RecipeError(f"the term {name!r} is given twice", where="--task")
        terms[name] = found | ({"tasks_dir": tasks_dir} if tasks_dir else {})
    for name, text in _pairs("--max-loss", max_losses).items():
        _known("--max-loss", name, terms)["max_loss"] = _number("--max-loss", text)
    for name, text in _pairs("--weight", weights).items():
        _known("--weight", name, terms)["weight"] = _number("--weight", text)
    limits = {"limit": limit} if limit else {}
    return {
        "base": base,
        "vectors": list(pool.values()),
        "objective": [term | limits for term in terms.values()],
        "heldout": [
            {"name": name, "corpus": file} for name, file in _pairs("--heldout", heldout).items()
        ],
    }


def _pairs(flag: str, texts: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise RecipeError(f"{text!r} is not NAME=VALUE", where=flag)
        if name in found:
            raise RecipeError(f"the name {name!r} is given twice", where=flag)
        found[name] = value
    return found


def _known(flag: str, name: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if name not in found:
        raise RecipeError(f"no {name!r}; there are {', '.join(found) or 'none'}", where=flag)
    return found[name]


def _number(flag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RecipeError(f"{text!r} is not a number", where=flag) from None
