"""Agreement with mergekit: every deterministic method that both have, on models, by the same file.

    python -m benchmarks.agreement [--work FOLDER] [--out FILE]

For each architecture and method one YAML file is run by mergekit (its `dtype: float32`, which is
the best it recommends) and by ours with `compat: mergekit`, once written as bfloat16 and once as
float32. The difference of two bf16 numbers is counted in steps: 1 is two neighbouring numbers.
mergekit is installed into a virtual environment of its own; all files of an architecture are run
in one process, by the function that its program calls.

mergekit run in `dtype: float64` is the judge: it is its own formula, without its rounding. An
element is *correctly rounded* if it is that result rounded once; where the result lies halfway but
for fp64's own noise, either neighbour is. float32 outputs are measured in fp32 steps from it. What
differs by more than one bf16 step is put down to a cause:

    cancels    the two are within one step of the inputs' size: the result is next to nothing
    undecided  magnitudes are equal at the end of a mask, and mergekit's unstable sort keeps others
               than ours; or a vote on a sign comes to zero but for rounding
    theirs     ours is within one step of the fp64 result, mergekit's fp32 is not
    ours       the other way round
    both       neither is

Methods that keep elements by magnitude are run on float32 sources, whose magnitudes hardly ever are
equal, and once more on bf16 sources, where many are. Undecided elements count as differing, and not
in the columns on rounding.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import mergekit, tiny_models
from optimer_engine import merge
from optimer_engine.kernels import reference
from optimer_engine.kernels.reference import BF16

WEIGHTS = (0.5, 0.3, 0.4)
DENSITIES = (0.5, 0.7, 0.3)
DTYPES = ("bfloat16", "float32", "float64")
FP64_NOISE = 1e-13
VOTE_NOISE = 1e-6
"""Relative to the largest of what is summed up; the second is of sums in fp32."""
MOST_NAMED = 5


@dataclass(frozen=True)
class Job:
    """One method as it is compared.

    Attributes:
        sources: how many; with `base` also the base is given, for slerp as an input.
        columns: parameters that each source has a value of its own for.
        exact: sources are float32, no two magnitudes of a delta are equal.
        linear: a weighted sum with weights known before, whose rounding is promised.
    """

    method: str
    sources: int = 3
    base: bool = True
    shared: dict[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] = ("weight",)
    exact: bool = False
    linear: bool = False


_DENSE = ("weight", "density")
JOBS: dict[str, Job] = {
    "linear": Job("linear", base=False, linear=True),
    "linear, not normalised": Job("linear", base=False, shared={"normalize": False}, linear=True),
    "task_arithmetic": Job("task_arithmetic", shared={"lambda": 0.9}, linear=True),
    "task_arithmetic, normalised": Job(
        "task_arithmetic", shared={"normalize": True}, linear=True
    ),
    "passthrough, scaled": Job(
        "passthrough", 1, False, {"scale": 0.9}, columns=(), linear=True
    ),
    "ties": Job("ties", shared={"lambda": 0.9}, columns=_DENSE, exact=True),
    "ties, bf16 sources": Job("ties", shared={"lambda": 0.9}, columns=_DENSE),
    "breadcrumbs": Job("breadcrumbs", columns=_DENSE, exact=True),
    "breadcrumbs_ties": Job("breadcrumbs_ties", columns=_DENSE, exact=True),
    "sce": Job("sce", shared={"select_topk": 0.6}, columns=(), exact=True),
    "dare_linear, density 1": Job("dare_linear"),
    "dare_ties, density 1": Job("dare_ties"),
    "della, density 1": Job("della"),
    "slerp": Job("slerp", 1, shared={"t": 0.3}, columns=()),
    "nuslerp": Job("nuslerp", 2),
    "nuslerp, no base": Job("nuslerp", 2, base=False),
    "nuslerp, rows": Job("nuslerp", 2, shared={"nuslerp_flatten": False}),
    "nuslerp, columns": Job(
        "nuslerp", 2, shared={"nuslerp_flatten": False, "nuslerp_row_wise": True}
    ),
    "multislerp": Job("multislerp"),
    "multislerp, no base": Job("multislerp", base=False),
    "karcher": Job("karcher", base=False, columns=()),
    "model_stock": Job("model_stock", columns=()),
    "model_stock, rows": Job("model_stock", shared={"filter_wise": True}, columns=()),
    "arcee_fusion": Job("arcee_fusion", 1, columns=()),
    "nearswap": Job("nearswap", 1, shared={"t": 2e-4}, columns=()),
}  # fmt: skip

THEIRS = """
import json, sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
for path, out in json.load(sys.stdin):
    text = open(path).read()
    try:
        config = MergeConfiguration.model_validate(yaml.safe_load(text))
        run_merge(config, out, options=options, config_source=text)
    except Exception as error:
        print(path, type(error).__name__, error, flush=True)
"""


@dataclass
class Row:
    """What one method on one architecture came to.

    Attributes:
        only_ours, only_theirs: tensors that one of the two wrote.
        differ: elements whose bf16 outputs are not equal. beyond: that are not neighbours either.
        worst: the largest difference, in bf16 steps at the size of the largest of inputs and
            result.
        causes: of those beyond, see the module's text; where: in which tensors.
        undecided: elements that are.
        misrounded, theirs_misrounded: decided elements that are not correctly rounded to bf16.
        error, theirs_error: largest distance of the float32 outputs from the fp64 result, in fp32
            steps at the same size.
        defaults_beyond: elements beyond one step without `compat: mergekit`.
    """

    family: str
    label: str
    elems: int = 0
    differ: int = 0
    beyond: int = 0
    worst: float = 0.0
    undecided: int = 0
    misrounded: int = 0
    theirs_misrounded: int = 0
    error: float = 0.0
    theirs_error: float = 0.0
    defaults_beyond: int = 0
    causes: dict[str, int] = field(default_factory=dict)
    where: dict[str, int] = field(default_factory=dict)
    only_ours: list[str] = field(default_factory=list)
    only_theirs: list[str] = field(default_factory=list)


def recipe(job: Job, base: Path, sources: list[Path], dtype: str) -> dict[str, Any]:
    """The mergekit file of a job, written as `dtype`; computed in fp32, or in fp64 for fp64."""
    values = {"weight": WEIGHTS, "density": DENSITIES}
    models: list[dict[str, Any]] = []
    for number, source in enumerate(sources):
        own = {key: values[key][number] for key in job.columns}
        models.append({"model": str(source), **({"parameters": own} if own else {})})
    if job.method == "slerp":
        models.insert(0, {"model": str(base)})
    made: dict[str, Any] = {"merge_method": job.method, "models": models}
    if job.base:
        made["base_model"] = str(base)
    if job.shared:
        made["parameters"] = job.shared
    made["dtype"] = "float64" if dtype == "float64" else "float32"
    return {**made, "out_dtype": dtype}


def steps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How many bf16 numbers lie from one to the other; both as stored bits."""

    def order(bits: np.ndarray) -> np.ndarray:
        signed = bits.astype(np.int64)
        return np.where(signed & 0x8000, -(signed & 0x7FFF), signed)

    return np.abs(order(first) - order(second))


def compare(row: Row, outputs: dict[str, Path], given: list[Path], job: Job) -> None:
    """Fill in a row from the outputs, by "ours bfloat16" and so on."""
    made = {label: _tensors(folder) for label, folder in outputs.items()}
    inputs = [_tensors(folder) for folder in given]
    ours, theirs = made["ours bfloat16"], made["theirs bfloat16"]
    row.only_ours = sorted(ours.keys() - theirs.keys())
    row.only_theirs = sorted(theirs.keys() - ours.keys())
    for name in sorted(ours.keys() & theirs.keys()):
        values = [_numbers(tensors[name]) for tensors in inputs]
        exact = made["theirs float64"][name]
        size = np.maximum.reduce([np.abs(array) for array in (exact, *values)])
        step = np.spacing(size.astype(np.float32)).astype(np.float64)  # of fp32
        open_ = _undecided(values, job)
        apart = steps(ours[name], theirs[name])
        distance = np.abs(_numbers(ours[name]) - _numbers(theirs[name])) / (step * 2**16)
        row.elems += apart.size
        row.undecided += int(np.count_nonzero(open_))
        row.differ += int(np.count_nonzero(apart))
        row.worst = max(row.worst, float(distance.max(initial=0.0)))
        plain = steps(made["defaults bfloat16"][name], theirs[name])
        row.defaults_beyond += int(np.count_nonzero(plain > 1))
        row.misrounded += int(np.count_nonzero(~(_right(ours[name], exact, size) | open_)))
        row.theirs_misrounded += int(np.count_nonzero(~(_right(theirs[name], exact, size) | open_)))
        for who, attribute in (("ours", "error"), ("theirs", "theirs_error")):
            error = np.abs(_numbers(made[f"{who} float32"][name]) - exact) / step
            worst = float(error[~open_].max(initial=0.0))
            setattr(row, attribute, max(getattr(row, attribute), worst))
        far = np.flatnonzero(apart > 1)
        if far.size:
            row.beyond += int(far.size)
            row.where[name] = int(far.size)
            rounded = reference.round_to(exact, BF16)
            good, bad = steps(ours[name], rounded) <= 1, steps(theirs[name], rounded) <= 1
            blamed = {(True, False): "theirs", (False, True): "ours"}
            for at in far:
                cause = blamed.get((bool(good[at]), bool(bad[at])), "both")
                cause = "cancels" if distance[at] <= 1 else cause
                cause = "undecided" if open_[at] else cause
                row.causes[cause] = row.causes.get(cause, 0) + 1
    row.where = dict(sorted(row.where.items(), key=lambda item: -item[1])[:MOST_NAMED])


def _right(bits: np.ndarray, exact: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Whether stored bf16 numbers are the nearest; on either side of a tie, up to fp64's noise."""
    noise = size * FP64_NOISE
    candidates = [reference.round_to(exact + shift, BF16) for shift in (0, noise, -noise)]
    zeros = (bits & 0x7FFF == 0) & (np.abs(exact) <= noise)  # of either sign
    return np.logical_or.reduce([bits == rounded for rounded in candidates] + [zeros])


def _undecided(values: list[np.ndarray], job: Job) -> np.ndarray:
    """Elements whose mask or sign rests on an equality, which rounding or a sort decides."""
    base = values[0]
    found = np.zeros(base.size, bool)
    if job.method not in ("ties", "breadcrumbs", "breadcrumbs_ties", "dare_ties", "della"):
        return found
    terms = []
    for number, source in enumerate(values[1:]):
        delta = source - base
        keep = np.ones(base.size, bool)
        if "density" in job.columns:
            magnitude = np.abs(delta.astype(np.float32))
            order = np.sort(magnitude)[::-1]
            kept, first = int(DENSITIES[number] * order.size), 0
            if job.method == "ties":
                kept = max(1, kept)
            else:
                first = min(order.size - kept, int(0.01 * order.size))
            for end in (first, first + kept):
                if 0 < end < order.size and order[end - 1] == order[end]:
                    found |= magnitude == order[end]
            lowest, highest = order[max(0, first + kept - 1)], order[first]
            keep = (magnitude >= lowest) & (magnitude <= highest) & (kept > 0)
        terms.append(WEIGHTS[number] * delta * keep)
    if job.method != "breadcrumbs":
        found |= np.abs(sum(terms)) <= VOTE_NOISE * sum(np.abs(term) for term in terms)
    return found


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, flat; bf16 as bits."""
    import torch
    from safetensors.torch import load_file

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            flat = tensor.flatten()
            bits = flat.dtype == torch.bfloat16
            found[name] = flat.view(torch.int16).numpy().view(np.uint16) if bits else flat.numpy()
    return found


def _numbers(flat: np.ndarray) -> np.ndarray:
    return (
        reference.upcast(flat, BF16, np.float64)
        if flat.dtype == np.uint16
        else flat.astype(np.float64)
    )


def family_rows(family: str, labels: list[str], work: Path, python: Path) -> list[Row]:
    """Run every job on one architecture."""
    folder = work / "agreement" / family.replace(", ", "-")
    base, rounded, exact = tiny_models.make(family, folder, 3)
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    calls = []
    for number, label in enumerate(labels):
        job = JOBS[label]
        sources = (exact if job.exact else rounded)[: job.sources]
        for dtype in DTYPES:
            config = out / f"{number}-{dtype}.yaml"
            config.write_text(json.dumps(recipe(job, base, sources, dtype), indent=1), "utf-8")
            calls.append([str(config), str(out / f"{number}-theirs-{dtype}")])
    subprocess.run(
        [python, "-c", THEIRS], input=json.dumps(calls), text=True, check=True, stdout=sys.stderr
    )
    rows = []
    for number, label in enumerate(labels):
        job = JOBS[label]
        row = Row(family, label)
        rows.append(row)
        outputs = {f"theirs {d}": out / f"{number}-theirs-{d}" for d in DTYPES}
        if not all((path / "config.json").exists() for path in outputs.values()):
            row.causes = {"mergekit fails": 1}
            continue
        for who, compat, dtype in (
            ("ours", "mergekit", "bfloat16"), ("ours", "mergekit", "float32"),
            ("defaults", "paper", "bfloat16"),
        ):  # fmt: skip
            outputs[f"{who} {dtype}"] = out / f"{number}-{who}-{dtype}"
            merge(out / f"{number}-{dtype}.yaml", outputs[f"{who} {dtype}"], compat=compat)
        sources = (exact if job.exact else rounded)[: job.sources]
        compare(row, outputs, [base, *sources] if job.base else sources, job)
        for path in outputs.values():
            shutil.rmtree(path)
    return rows


HEADER = (
    f"{'architecture':14} {'method':27} {'elements':>8} {'differ':>7} {'> 1':>5} {'worst':>6}"
    f" {'misrounded':>10} {'theirs':>8} {'fp32':>5} {'theirs':>8} {'defaults':>8}  > 1 because"
)


def line(row: Row) -> str:
    """A row of the table."""
    count, decided = max(1, row.elems), max(1, row.elems - row.undecided)
    causes = ", ".join(f"{number} {cause}" for cause, number in sorted(row.causes.items()))
    for what, names in (("only ours", row.only_ours), ("only theirs", row.only_theirs)):
        causes += f" {what}: {len(names)} tensors, {names[0]} first" if names else ""
    return (
        f"{row.family:14} {row.label:27} {row.elems:8d} {row.differ / count:7.3%} {row.beyond:5d}"
        f" {row.worst:6.2f} {row.misrounded / decided:10.4%} {row.theirs_misrounded / decided:8.3%}"
        f" {row.error:5.2f} {row.theirs_error:8.1f} {row.defaults_beyond / count:8.2%}  {causes}"
    ).rstrip()


def by_method(rows: list[Row]) -> str:
    """A Markdown table of the methods, over all architectures; docs/methods.md shows it."""
    lines = [
        "| method | differ | > 1 step | of which | misrounded | mergekit's | fp32 | mergekit's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label in dict.fromkeys(row.label for row in rows):
        group = [row for row in rows if row.label == label]
        elems = sum(row.elems for row in group)
        decided = elems - sum(row.undecided for row in group)
        beyond = sum(row.beyond for row in group)
        causes: dict[str, int] = {}
        for row in group:
            for cause, count in row.causes.items():
                causes[cause] = causes.get(cause, 0) + count
        named = ", ".join(f"{count} {cause}" for cause, count in sorted(causes.items()))
        misrounded = [
            sum(getattr(row, attribute) for row in group) / decided
            for attribute in ("misrounded", "theirs_misrounded")
        ]
        errors = [
            max(getattr(row, attribute) for row in group) for attribute in ("error", "theirs_error")
        ]
        lines.append(
            f"| {label} | {sum(row.differ for row in group) / elems:.4%} | {beyond} | {named}"
            f" | {misrounded[0]:.5%} | {misrounded[1]:.5%} | {errors[0]:.2f} | {errors[1]:.3g} |"
        )
    return "\n".join(lines)


def read(path: Path) -> list[Row]:
    """Rows that `--out` wrote."""
    return [Row(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


def main() -> None:
    """Print the table, and the rows as one line of JSON."""
    parser = argparse.ArgumentParser(description="Agreement with mergekit on models.")
    parser.add_argument("--work", type=Path, default=Path("bench"), help="for mergekit and models")
    parser.add_argument("--out", type=Path, help="write the rows to this file, one JSON line each")
    parser.add_argument("--family", choices=tiny_models.FAMILIES, action="append")
    parser.add_argument("--method", choices=JOBS, action="append")
    chosen = parser.parse_args()
    python = mergekit.install(chosen.work).with_name("python")
    rows: list[Row] = []
    print(HEADER)
    for family in chosen.family or tiny_models.FAMILIES:
        for row in family_rows(family, chosen.method or list(JOBS), chosen.work, python):
            rows.append(row)
            print(line(row), flush=True)
    print(f"\n{by_method(rows)}\n")
    linear = [row for row in rows if JOBS[row.label].linear]
    for name, group in (("linear family", linear), ("all methods", rows)):
        elems = max(1, sum(row.elems - row.undecided for row in group))
        ours, theirs = (
            1 - sum(getattr(row, attribute) for row in group) / elems
            for attribute in ("misrounded", "theirs_misrounded")
        )
        print(f"{name}: {ours:.5%} of {elems} elements correctly rounded; mergekit {theirs:.5%}")
    if chosen.out:
        chosen.out.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), "utf-8")
    print(json.dumps({"case": "agreement", "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
