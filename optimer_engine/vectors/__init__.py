"""Distribution vectors on disk: what they look like, and reading any range of any of them.

A vector is a folder of safetensors files. `open` gives its tensors as operands that the engine
reads tile by tile, whatever the mode they are stored in; `packing` writes them. The format is
described in docs/vector-format.md.
"""

from optimer_engine.vectors.format import MODES, VERSION
from optimer_engine.vectors.reading import open
from optimer_engine.vectors.tensors import ExactTensor, Packed

__all__ = ["MODES", "VERSION", "ExactTensor", "Packed", "open"]
