"""Kernels: they know arrays and nothing of models.

Each family has a `reference.py`, the plain mathematics that every implementation is held to.
"""

from pallas_kernels.cross_entropy import linear_cross_entropy, token_logps
from pallas_kernels.flash_attention import attention
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.matmul import Epilogue, matmul
from pallas_kernels.norm_rope import norm_rope
from pallas_kernels.quantised_matmul import fp8_matmul, weight_matmul
from pallas_kernels.rms_norm import add_rms_norm, rms_norm

__all__ = [
    "Epilogue",
    "add_rms_norm",
    "attention",
    "fp8_matmul",
    "grouped_matmul",
    "linear_cross_entropy",
    "matmul",
    "norm_rope",
    "rms_norm",
    "token_logps",
    "weight_matmul",
]
