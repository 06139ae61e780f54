"""The product of experts: rows in groups, each group with a matrix of its own.

`grouped_matmul(...)` picks an implementation and says which in the debug log; `supported(...)`
gives the reason why one refuses. `reference.py` is the specification.
"""

from pallas_kernels.grouped_matmul.ping_pong import Config
from pallas_kernels.grouped_matmul.product import IMPLEMENTATIONS, grouped_matmul, supported

__all__ = ["IMPLEMENTATIONS", "Config", "grouped_matmul", "supported"]
