"""Text from a model: sampling, the device loop, completion and chat in the terminal."""

from jaxinfra.generate.loop import Generation, Stream, Timings, generate
from jaxinfra.generate.sampling import Sampling

__all__ = ["Generation", "Sampling", "Stream", "Timings", "generate"]
