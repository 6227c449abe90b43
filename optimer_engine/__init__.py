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

_HOME = {
    "Checkpoint": "checkpoint",
    "FolderSink": "folder_sink",
    "LiveModelSink": "sink",
    "OptimerError": "errors",
    "Plan": "planner",
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
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _HOME[name]:
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
