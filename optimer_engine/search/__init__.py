"""The search for merge weights: SMAC asks, the engine merges into a live model, a score answers.

    report = run_search(SearchConfig(base=..., vectors=[...], objective=[...]), "runs/a")

Modules, from what a user writes to what is found: ``config`` → ``space`` → ``runner`` (the loop),
which uses ``live`` (the pool as one loaded model), ``objective`` and ``tasks`` (scores),
``adviser`` and ``surrogate`` (SMAC and its model), ``trials`` (the journal) and ``report``.
"""

from __future__ import annotations

from optimer_engine.search.config import SearchConfig, Term, Vector
from optimer_engine.search.objective import CorpusObjective, Score, bits_per_byte
from optimer_engine.search.report import SearchReport
from optimer_engine.search.runner import TrialDone, run_search

__all__ = [
    "CorpusObjective",
    "Score",
    "SearchConfig",
    "SearchReport",
    "Term",
    "TrialDone",
    "Vector",
    "bits_per_byte",
    "run_search",
]
