"""The search for merge weights: SMAC asks, the engine merges into a live model, a score answers.

    report = run_search(SearchConfig(base=..., vectors=[...], objective=[...]), "runs/a")

Modules, from what a user writes to what is found: ``config`` → ``space`` → ``runner`` → ``loop``.
The loop asks ``proposals`` (known points, SMAC through ``adviser``, or ``paper``), lets a ``crew``
(this process, or the ``workers`` of a cluster) score a trial by the steps of ``evaluation`` in the
stages of ``staging``, and keeps it in ``trials``, the journal.
``cost`` makes numbers of scores and ``landscape`` a model of the numbers (``surrogate``). What is
scored is a ``subject``: ``live`` is the pool as one loaded model; ``objectives`` joins ``corpus``,
``tasks``, ``vllm`` and ``command``. ``answers`` knows what was measured before, ``report`` and
``page`` say what was found, ``heldout`` whether it holds.
"""

from __future__ import annotations

from optimer_engine.search.config import SearchConfig, Term, Vector
from optimer_engine.search.corpus import CorpusObjective, bits_per_byte
from optimer_engine.search.loop import TrialDone
from optimer_engine.search.objective import Score
from optimer_engine.search.report import SearchReport
from optimer_engine.search.runner import merge_trial, run_search, searched_in

__all__ = [
    "CorpusObjective",
    "Score",
    "SearchConfig",
    "SearchReport",
    "Term",
    "TrialDone",
    "Vector",
    "bits_per_byte",
    "merge_trial",
    "run_search",
    "searched_in",
]
