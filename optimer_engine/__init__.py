"""OptiMer Engine: merge language models tile by tile, and search the weights of the merge.

    theta = theta_base + sum_i w_i * (theta_i - theta_base)          OptiMer, arXiv 2603.28858

Three rungs, the same words on each:

    merge("recipe.yaml", out="merged")                               one call
    plan("recipe.yaml").with_weights({"ja": 0.3}).run(sink)          a plan, run into any sink
    ops.merge_tensors(base, sources, weights)                        arrays in, array out

Names are loaded on first use, so `import optimer_engine` costs nothing and never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optimer_engine import ops
    from optimer_engine.checkpoint import Checkpoint
    from optimer_engine.engine import extract, merge
    from optimer_engine.errors import OptimerError
    from optimer_engine.folder_sink import FolderSink
    from optimer_engine.planner import plan
    from optimer_engine.plans import Plan
    from optimer_engine.recipe import Recipe, Source
    from optimer_engine.report import Report
    from optimer_engine.sink import LiveModelSink, Sink
    from optimer_engine.verify import verify_output

_HOME = {
    "Checkpoint": "checkpoint",
    "FolderSink": "folder_sink",
    "LiveModelSink": "sink",
    "OptimerError": "errors",
    "Plan": "plans",
    "Recipe": "recipe",
    "Report": "report",
    "Sink": "sink",
    "Source": "recipe",
    "extract": "engine",
    "merge": "engine",
    "ops": "",
    "plan": "planner",
    "verify_output": "verify",
}

__version__ = "0.1.0"
__all__ = [
    "Checkpoint",
    "FolderSink",
    "LiveModelSink",
    "OptimerError",
    "Plan",
    "Recipe",
    "Report",
    "Sink",
    "Source",
    "extract",
    "merge",
    "ops",
    "plan",
    "verify_output",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _HOME[name]:
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
