"""Kernels under `jax.vmap`: where one takes no mapped axis, plain mathematics takes its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def unmapped(kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, and `plain` of the same arguments and results where `jax.vmap` maps any of them."""
    either = jax.custom_batching.custom_vmap(kernel)

    @either.def_vmap
    def _(size, mapped, *arguments):
        axes = jax.tree.map(lambda x: 0 if x else None, mapped)
        out = jax.vmap(plain, in_axes=axes, axis_size=size)(*arguments)
        return out, jax.tree.map(lambda _: True, out)

    return either
