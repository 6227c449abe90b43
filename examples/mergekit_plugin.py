"""mergekit's own program with this engine's arithmetic.

    python examples/mergekit_plugin.py CONFIG OUT [options of mergekit-yaml]

runs a mergekit file whose `merge_method` is `optimer_task_arithmetic`, `optimer_ties`, or
`optimer_` and the name of any other method here that needs a base. mergekit plans, reads and
writes; each tensor is merged by `optimer_engine.methods`, with the parameters, defaults and exact
thresholds that docs/methods.md describes. Without `dtype` in the file a tensor is rounded once.

It runs in an environment that has both mergekit 0.1.5 and optimer-engine. mergekit has no entry
points for methods, so they are registered here before its program starts. To have the whole merge
in bounded memory and many times as fast, run the file with `optimer merge` instead.
"""

from __future__ import annotations

from typing import Any

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import (
    MISSING,
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from mergekit.scripts.run_yaml import main

from optimer_engine import methods
from optimer_engine.methods.protocol import REQUIRED


class OptimerMethod(GroupMergeMethod):
    """One of this engine's methods, as mergekit calls it."""

    def __init__(self, name: str) -> None:
        self.method = methods.get(name)
        parameters = [
            ParameterSpec(
                key,
                parameter.kind if parameter.default is not None else Any,
                ParameterScope.NON_BASE if parameter.per_source else ParameterScope.SHARED,
                default=MISSING if parameter.default is REQUIRED else parameter.default,
            )
            for key, parameter in self.method.parameters.items()
        ]
        self.spec = MergeMethodSpec(
            name=f"optimer_{name}",
            parameters=tuple(parameters),
            pretty_name=f"{name} by OptiMer Engine",
            contract=InputContract(
                base=BasePolicy.REQUIRED,
                min_non_base=self.method.min_sources,
                max_non_base=self.method.max_sources,
            ),
        )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """Merge the tensors of one group, in their own dtype."""
        assert group.base is not None
        known = self.method.parameters
        merged = methods.merge_arrays(
            self.method.name,
            group.base.tensor,
            [entry.tensor for entry in group.non_base],
            {key: value for key, value in parameters.items() if not known[key].per_source},
            [
                {key: parameters[key][entry.id] for key in known if known[key].per_source}
                for entry in group.non_base
            ],
            name=group.metadata.name or "tensor",
        )
        return merged.to(group.base.tensor.device)


for name in methods.names():
    if methods.get(name).base == "required":
        registry.register(OptimerMethod(name))

if __name__ == "__main__":
    main()
