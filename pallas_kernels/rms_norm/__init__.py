"""Root-mean-square norms of rows, alone or behind the sum that they are norms of.

`rms_norm` and `add_rms_norm` pick an implementation and say which in the debug log; `reference.py`
is the specification.
"""

from pallas_kernels.rms_norm.product import IMPLEMENTATIONS, add_rms_norm, rms_norm, supported

__all__ = ["IMPLEMENTATIONS", "add_rms_norm", "rms_norm", "supported"]
