"""What a language model's head is asked for, without its logits in memory.

`linear_cross_entropy` is the loss of training, `token_logps` the log-probabilities and entropies of
reinforcement learning. Each picks an implementation, as `choose` tells; `reference.py` is the
specification.
"""

from pallas_kernels.cross_entropy.product import (
    IMPLEMENTATIONS,
    choose,
    linear_cross_entropy,
    supported,
    token_logps,
)

__all__ = ["IMPLEMENTATIONS", "choose", "linear_cross_entropy", "supported", "token_logps"]
