"""Weights in 8 and 4 bits: to nearest, by GPTQ or by AWQ; the command `jaxinfra quantize`."""

from decode.quantize.calibrate import windows
from decode.quantize.model import METHODS, quantize
from decode.quantize.quality import Quality, compare
from decode.quantize.weights import Scheme, round_to_nearest

__all__ = ["METHODS", "Quality", "Scheme", "compare", "quantize", "round_to_nearest", "windows"]
