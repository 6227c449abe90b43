"""Making distribution vectors small, and trained checkpoints again out of exact ones.

`pack` streams a trained checkpoint, a vector or a LoRA adapter into a vector of any mode, `unpack`
restores the trained checkpoint from its base and an exact vector. What the modes are is said in
docs/vector-format.md; `vectors` reads them.
"""

from optimer_engine.packing.pipeline import compare, pack
from optimer_engine.packing.restore import plan_unpack, unpack

__all__ = ["compare", "pack", "plan_unpack", "unpack"]
