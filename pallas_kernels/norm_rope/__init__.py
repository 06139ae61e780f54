"""Queries and keys before attention: their norms over the head width, where a model has them, and
their rotation by position, in one pass.

`norm_rope` picks an implementation and says which in the debug log; `reference.py` is the
specification.
"""

from pallas_kernels.norm_rope.product import norm_rope, supported
from pallas_kernels.rms_norm.product import IMPLEMENTATIONS

__all__ = ["IMPLEMENTATIONS", "norm_rope", "supported"]
