"""The tables that results of `search_quality` make."""

from __future__ import annotations

from typing import Any

import numpy as np

Curve = list[tuple[int, float]]
"""Example-evaluations so far, and the regret of what would be recommended then."""
GOOD = 0.05
"""Regret that is as good as any: below it, on the pool, the gap from dev to test text decides."""


def median_at(curves: list[Curve], examples: float) -> float:
    """Median regret when every run has spent ``examples``; infinite before its first score."""
    return float(
        np.median([next((r for e, r in reversed(c) if e <= examples), np.inf) for c in curves])
    )


def reached(curves: list[Curve], regret: float) -> float:
    """The least number of examples at which, and after which, the median is at most ``regret``."""
    spent = sorted({e for curve in curves for e, _ in curve}, reverse=True)
    least = np.inf
    for examples in spent:
        if median_at(curves, examples) > regret:
            break
        least = examples
    return least


def tables(rows: list[dict[str, Any]]) -> str:
    """Final regrets, what share of the rivals' examples reaches their quality, and re-use.

    Medians are over the seeds that every method has been run with.
    """
    worlds = list(dict.fromkeys(r["world"] for r in rows))

    def curves(world: str, method: str, seeds: set[int] | None = None) -> list[Curve]:
        chosen = [r for r in rows if (r["world"], r["method"]) == (world, method)]
        chosen = [r for r in chosen if seeds is None or r["seed"] in seeds]
        return [[(e, g) for e, g in r["curve"]] for r in chosen]

    needed = ("optimer", "paper", "multivariate")
    searched = [w for w in worlds if all(curves(w, m) for m in needed)]
    shown = [m for m in _methods(rows) if all(curves(w, m) for w in searched)]
    lines = [
        "| world | runs | " + " | ".join(shown) + " | examples, optimer |"
        " optimer to paper's | optimer to multivariate's |",
        "|" + "---|" * (len(shown) + 5),
    ]
    for world in searched:
        ran = [{r["seed"] for r in rows if (r["world"], r["method"]) == (world, m)} for m in shown]
        common = set.intersection(*ran)
        all_of = {m: curves(world, m, common) for m in shown}
        final = {m: median_at(c, np.inf) for m, c in all_of.items()}
        spent, full = (np.median([c[-1][0] for c in all_of[m]]) for m in ("optimer", "paper"))
        shares = [reached(all_of["optimer"], final[m]) / full for m in ("paper", "multivariate")]
        runs = min(len(c) for c in all_of.values())
        lines.append(
            f"| {world} | {runs} | "
            + " | ".join(f"{final[m]:.3f}" for m in shown)
            + f" | {spent:,.0f} of {full:,.0f} | "
            + " | ".join(f"{s:.1%}" if np.isfinite(s) else "not reached" for s in shares)
            + " |"
        )
    own = [r for r in rows if r["method"] in ("optimer", "fresh", "reuse")]
    worse = [r for r in own if r["curve"][-1][1] > r["known"]]
    lines += [
        "",
        f"{len(worse)} of {len(own)} runs of optimer ended worse than the best of base, uniform"
        " average and single vectors.",
    ]
    lines += [
        "",
        "| second objective | runs | fresh | with the trials of the first | examples, fresh |"
        " until as good, fresh | with the trials | share |",
        "|" + "---|" * 8,
    ]
    for world in (w for w in worlds if curves(w, "reuse")):
        fresh, again = curves(world, "fresh"), curves(world, "reuse")
        final = median_at(fresh, np.inf)
        target = max(final, GOOD)
        first, second = reached(fresh, target), reached(again, target)
        lines.append(
            f"| {world} | {min(len(fresh), len(again))} | {final:.3f} |"
            f" {median_at(again, np.inf):.3f} | {np.median([c[-1][0] for c in fresh]):,.0f} |"
            f" {first:,.0f} | {second:,.0f} | {second / first:.1%} |"
        )
    return "\n".join(lines)


def exact_table(rows: list[dict[str, Any]]) -> str:
    """Median regret of the real merges at the points that searches of the pool ended with."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in (r for r in rows if "exact" in r):
        found.setdefault((row["world"], row["method"]), []).append(row["exact"])
    shown = [m for m in _methods(rows) if any(m == method for _, method in found)]
    lines = ["| merged and scored | " + " | ".join(shown) + " |", "|" + "---|" * (len(shown) + 1)]
    for world in dict.fromkeys(w for w, _ in found):
        cells = [f"{np.median(found[world, m]):.3f}" for m in shown]
        lines.append(f"| {world} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _methods(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(r["method"] for r in rows if r["method"] not in ("fresh", "reuse")))
