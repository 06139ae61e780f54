"""Cross-entropy of a linear layer (a language model's head) without its logits in memory."""

from pallas_kernels.cross_entropy.chunked import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
