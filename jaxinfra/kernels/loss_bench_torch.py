"""What torch, where it has a GPU, makes of a head's log-probabilities: by blocks of rows, eagerly.

Each block's logits are made, told from and dropped; for the gradient they are made again, as in
TRL's selective log-softmax under checkpointing. A peer of `loss_bench`, no product.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import jax


def contestant(given: Any, gradients: bool, rows: int) -> dict[str, Callable[[], Any]]:
    """A call that waits for its result, by name; nothing, and a line, where it cannot be had."""
    name = "torch, by rows"
    if importlib.util.find_spec("torch") is None:
        return {}
    try:
        import torch  # pyright: ignore[reportMissingImports]

        x, w, targets, of_logp, of_entropy = (
            torch.from_dlpack(a).clone()
            for a in (given.x, given.w, given.targets, given.of_logp, given.of_entropy)
        )
        call = _call(torch, x, w, targets.long(), of_logp, of_entropy, gradients, rows)
        found = call()
    except Exception as error:
        print(f"{name} fails: {str(error).partition(chr(10))[0]:.200}")
        return {}
    wanted = jax.device_get(_first_logps(given))
    off = abs(found[: len(wanted)].float().cpu().numpy() - wanted).max()
    if not off < 0.05:
        print(f"{name} is wrong: off by {off:.2g}")
        return {}
    return {name: call}


def _first_logps(given: Any, count: int = 64) -> jax.Array:
    from pallas_kernels.cross_entropy import reference

    return reference.token_logps(given.x[:count], given.w, given.targets[:count])[0]


def _call(torch: Any, x, w, targets, of_logp, of_entropy, gradients: bool, rows: int) -> Any:
    from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportMissingImports]

    def part(x, w, targets):
        logits = (x @ w).float()
        lse = torch.logsumexp(logits, dim=-1)
        hit = logits.gather(1, targets[:, None])[:, 0]
        mean = (torch.softmax(logits, dim=-1) * logits).sum(-1)
        return hit - lse, lse - mean

    def call():
        parts = []
        with torch.set_grad_enabled(gradients):
            x_in, w_in = (a.detach().requires_grad_(gradients) for a in (x, w))
            for at in range(0, x.shape[0], rows):
                here = slice(at, at + rows)
                arguments = x_in[here], w_in, targets[here]
                if gradients:
                    logp, entropy = checkpoint(part, *arguments, use_reentrant=False)
                    (logp * of_logp[here] + entropy * of_entropy[here]).sum().backward()
                else:
                    logp, entropy = part(*arguments)
                parts.append(logp.detach())
        torch.cuda.synchronize()
        return torch.cat(parts)

    return call
