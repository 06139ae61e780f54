"""The product of two matrices with several implementations behind one function.

`matmul(...)` picks an implementation and says which in the debug log; `supported(...)` gives the
reason why one refuses. `reference.py` is the specification, `ladder/` the lesson.
"""

from pallas_kernels.matmul.epilogue import ACTIVATIONS, Epilogue, interleave
from pallas_kernels.matmul.product import IMPLEMENTATIONS, matmul, supported

__all__ = ["ACTIVATIONS", "IMPLEMENTATIONS", "Epilogue", "interleave", "matmul", "supported"]
