"""Which of the settings in a recipe holds for a tensor: slice source, slice, module, file.

The first level that has the key, and a condition that fits the tensor's name, decides. A parameter
of one model looks at the name that the tensor has in that model, a parameter of the whole merge at
its name in the output (layers are renumbered when slices are stacked).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from optimer_engine.mergekit.config import MergekitConfig
from optimer_engine.mergekit.settings import evaluate
from optimer_engine.mergekit.slices import Module, Settings, Slice
from optimer_engine.tensor_recipe import Settings as TensorSettings


def base_place(config: MergekitConfig, part: Slice) -> int | None:
    """Which source of a slice is the base; None where it is an input like the others, or absent."""
    models = [source.model for source in part.sources]
    if config.signature.base == "ordinary" or part.base not in models:
        return None
    return models.index(part.base)


def tensor_settings(
    config: MergekitConfig,
    module: Module,
    part: Slice,
    t: float,
    out_name: str,
    names: Sequence[str],
    missing: dict[tuple[str, str], str],
) -> TensorSettings:
    """The method's parameters for one tensor.

    Args:
        t: its position along the layers, 0 to 1.
        out_name: its name in the output; `names`: in each source of the slice.
        missing: takes (parameter, model) and the first tensor for which it is not given.

    Returns:
        Shared parameters, and per-source ones for every source but the base.
    """
    outer = (part.parameters, module.parameters, config.parameters)

    def value(key: str, tensor: str, scopes: tuple[Settings, ...], model: object) -> Any:
        for scope in scopes:
            if key in scope and (found := evaluate(scope[key], tensor, t)) is not None:
                return found
        parameter = config.signature.shared.get(key) or config.signature.per_source[key]
        if parameter.required:
            missing.setdefault((key, str(model)), tensor)
        return parameter.default

    base = base_place(config, part)
    shared = {key: value(key, out_name, outer, "") for key in config.signature.shared}
    per_source = [
        {
            key: value(key, names[place], (source.parameters, *outer), source.model)
            for key in config.signature.per_source
        }
        for place, source in enumerate(part.sources)
        if place != base
    ]
    return TensorSettings.of(shared, per_source)


def filters(config: MergekitConfig) -> Iterator[str]:
    """Every filter that stands in the recipe."""
    levels = [config.parameters]
    for module in config.modules.values():
        levels.append(module.parameters)
        for part in module.slices:
            levels.append(part.parameters)
            levels += [source.parameters for source in part.sources]
    for level in levels:
        for setting in level.values():
            yield from (choice.filter for choice in setting if choice.filter is not None)
