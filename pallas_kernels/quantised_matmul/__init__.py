"""Products of matrices in 8 and 4 bits, with several implementations behind each function.

`fp8_matmul` multiplies float8_e4m3fn with float8_e4m3fn, `weight_matmul` floats with integer
weights. Each picks an implementation and says which in the debug log; `supported(...)` gives the
reason why one refuses. `formats.py` makes the operands, `reference.py` is the specification.
"""

from pallas_kernels.quantised_matmul.formats import fp8_blocks, fp8_rows, fp8_tensor, integers
from pallas_kernels.quantised_matmul.product import (
    IMPLEMENTATIONS,
    fp8_matmul,
    supported,
    weight_matmul,
)

__all__ = [
    "IMPLEMENTATIONS",
    "fp8_blocks",
    "fp8_matmul",
    "fp8_rows",
    "fp8_tensor",
    "integers",
    "supported",
    "weight_matmul",
]
