"""mergekit's recipes, read as they are: text to rows (see `expansion`), and what they mean."""

from optimer_engine.mergekit.config import MergekitConfig, load
from optimer_engine.mergekit.expansion import Expansion, expand
from optimer_engine.mergekit.explain import Group, explain, lines
from optimer_engine.mergekit.reference import ModelRef
from optimer_engine.mergekit.rowmap import GatheredRows, RowMap

__all__ = [
    "Expansion",
    "GatheredRows",
    "Group",
    "MergekitConfig",
    "ModelRef",
    "RowMap",
    "expand",
    "explain",
    "lines",
    "load",
]
