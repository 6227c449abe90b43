"""Agreement with mergekit on tensors of odd shapes, which no model of `agreement` has.

    python -m benchmarks.agreement_shapes [--work FOLDER]

Inputs are bf16, as models are: a matrix, a matrix with one column, a vector and a 3-D tensor, whose
sources differ from their base by 3 % of its standard deviation. mergekit computes in fp32 (its
`dtype: float32`), through its own library call; its result is rounded to bf16 once. Ours runs
twice, with `compat: mergekit` and with its own defaults. The difference of two bf16 numbers is
counted in steps: 1 is two neighbouring numbers. mergekit is installed into a virtual environment of
its own.

TIES and its kin keep k elements by magnitude; among equal magnitudes mergekit's sort picks some k
and ours the first, so fp32 noise is added to the inputs of those methods' deltas: all magnitudes
then differ. Arcee Fusion appears once more with mergekit in fp64: the divergences it takes are of
the size of fp32's noise.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import mergekit
from optimer_engine import methods

SHAPES = ((257, 384), (513, 1), (1000,), (48, 5, 16))
SOURCES = 3
WEIGHTS = (0.5, 0.3, 0.4)

SHARED: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {"lambda": 0.9},
    "ties": {"lambda": 0.9},
    "breadcrumbs": {},
    "breadcrumbs_ties": {},
    "sce": {"select_topk": 0.6},
    "slerp": {"t": 0.3},
    "nuslerp": {},
    "nuslerp (rows)": {"nuslerp_flatten": False},
    "nuslerp (columns)": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    "multislerp": {},
    "karcher": {},
    "model_stock": {},
    "model_stock (rows)": {"filter_wise": True},
    "arcee_fusion": {},
    "arcee_fusion (fp64)": {},
    "nearswap": {"t": 2e-4},
    "passthrough": {},
}
TWO_MODELS = ("slerp", "arcee_fusion", "nearswap")
WITHOUT_BASE = ("linear", "karcher", "passthrough")
BY_MAGNITUDE = ("ties", "breadcrumbs", "breadcrumbs_ties", "sce")

THEIRS = """
import json, sys
import numpy as np, torch
from mergekit.merge_methods import merge_tensors
folder = sys.argv[1]
for number, job in enumerate(json.load(open(folder + "/jobs.json"))):
    given = np.load(f"{folder}/{number}.npz")
    tensors = [torch.from_numpy(given[f"t{i}"]) for i in range(len(given.files))]
    # Values for each input are given by its position, which JSON makes a string.
    parameters = {
        key: {int(i): v for i, v in value.items()} if isinstance(value, dict) else value
        for key, value in job["parameters"].items()
    }
    try:
        merged = merge_tensors(
            tensors, job["method"], parameters=parameters,
            base_index=0 if job["base"] else None, dtype=getattr(torch, job["dtype"]),
        )
        np.save(f"{folder}/{number}.npy", merged.float().numpy())
    except Exception as error:
        print(job["method"], job["shape"], type(error).__name__, error)
"""


def bf16(values: np.ndarray) -> np.ndarray:
    """fp32 values on the bf16 grid, to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def steps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How many bf16 numbers lie from one to the other."""

    def order(values: np.ndarray) -> np.ndarray:
        bits = values.view(np.int32).astype(np.int64) >> 16
        return np.where(bits < 0, -(bits & 0x7FFF), bits)

    return np.abs(order(first) - order(second))


def inputs(method: str, shape: tuple[int, ...]) -> list[np.ndarray]:
    """A base, where the method has one, and sources, fp32 values."""
    random = np.random.default_rng(len(shape))
    base = bf16(random.normal(0, 0.02, shape).astype(np.float32))
    count = 1 if method in (*TWO_MODELS, "passthrough") else SOURCES
    count = 2 if method == "nuslerp" else count
    sources = []
    for _ in range(count):
        source = bf16(base + random.normal(0, 6e-4, shape).astype(np.float32))
        if method in BY_MAGNITUDE:
            source = (source + random.normal(0, 1e-6, shape)).astype(np.float32)
        sources.append(source)
    return sources if method in WITHOUT_BASE else [base, *sources]


def jobs() -> list[dict[str, Any]]:
    """One for each method and shape."""
    made = []
    for label, shared in SHARED.items():
        method = label.split()[0]
        for shape in SHAPES:
            tensors = inputs(method, shape)
            base = method not in WITHOUT_BASE
            count = len(tensors) - base
            columns: dict[str, list[float]] = {}
            known = methods.get(method).parameters
            if "weight" in known:
                columns["weight"] = list(WEIGHTS[:count])
            if "density" in known:
                columns["density"] = [0.5, 0.7, 0.3][:count]
            made.append(
                {
                    "label": label, "method": method, "shape": shape, "base": base,
                    "shared": shared, "columns": columns, "tensors": tensors,
                }
            )  # fmt: skip
    return made


def ours(job: dict[str, Any], compat: str) -> np.ndarray:
    """Our result, rounded once to the bf16 grid."""
    tensors = job["tensors"]
    sources = tensors[1:] if job["base"] else tensors
    per_source = [
        {key: values[number] for key, values in job["columns"].items()}
        for number in range(len(sources))
    ]
    merged = methods.merge_arrays(
        job["method"],
        tensors[0] if job["base"] else None,
        sources,
        {**job["shared"], "compat": compat},
        per_source,
        out_dtype="bfloat16",
    )
    return merged.float().numpy()


def main() -> None:
    """Print the table."""
    import json

    parser = argparse.ArgumentParser(description="Agreement with mergekit, method by method.")
    parser.add_argument("--work", type=Path, default=Path("bench"), help="for mergekit and inputs")
    work = parser.parse_args().work
    python = mergekit.install(work).with_name("python")
    folder = work / "agreement"
    folder.mkdir(parents=True, exist_ok=True)
    made = jobs()
    described = []
    for number, job in enumerate(made):
        np.savez(folder / f"{number}.npz", **{f"t{i}": t for i, t in enumerate(job["tensors"])})
        per_input = {
            key: {str(i + job["base"]): value for i, value in enumerate(values)}
            for key, values in job["columns"].items()
        }
        described.append(
            {
                "method": job["method"], "base": job["base"], "shape": job["shape"],
                "dtype": "float64" if "fp64" in job["label"] else "float32",
                "parameters": {**job["shared"], **per_input},
            }
        )  # fmt: skip
        (folder / f"{number}.npy").unlink(missing_ok=True)
    (folder / "jobs.json").write_text(json.dumps(described))
    subprocess.run([python, "-c", THEIRS, str(folder)], check=True, stdout=sys.stderr)
    print(f"{'method':20} {'shape':12} {'compat: max steps':>18} {'> 1':>8}", end="")
    print(f" {'differ':>8} {'default: max':>13} {'> 1':>8}")
    for number, job in enumerate(made):
        path = folder / f"{number}.npy"
        shape = "x".join(map(str, job["shape"]))
        if not path.exists():
            print(f"{job['label']:20} {shape:12} mergekit fails")
            continue
        theirs = bf16(np.load(path))
        apart, plain = (steps(ours(job, compat), theirs) for compat in ("mergekit", "paper"))
        print(
            f"{job['label']:20} {shape:12} {apart.max():18d} {np.mean(apart > 1):8.2%}"
            f" {np.mean(apart > 0):8.2%} {plain.max():13d} {np.mean(plain > 1):8.2%}"
        )


if __name__ == "__main__":
    main()
