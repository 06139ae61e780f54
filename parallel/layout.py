"""Where every array of a model and its optimiser lies on a mesh: letters, rules, specs.

One table gives each parameter its dimensions as letters, `RULES` gives each letter its mesh axes.
Rows of a batch are cut over dp, fsdp and ep, their positions over cp.

Memory of a device, of the bytes of a parameter: 1 over the product of its axes; an optimiser's two
moments the same, and under ZeRO-1 and 2 once more over dp (`cut_further`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import optax
from jax.sharding import Mesh, PartitionSpec

from jaxinfra.errors import UserError
from jaxinfra.model import params as P
from jaxinfra.model.config import ModelConfig
from jaxinfra.model.params import Params
from jaxinfra.train.step import TrainState
from parallel.mesh import ROWS, Axis, Rules, axes_of, shardings, varying

RULES = Rules(
    {
        "L": (Axis.PP,), "D": (Axis.FSDP,), "N": (Axis.TP,), "K": (Axis.TP,), "F": (Axis.TP,),
        "V": (Axis.TP,), "E": (Axis.EP,), "B": ROWS, "T": (Axis.CP,),
    }
)  # fmt: skip

_LETTERS = {
    "embed": "V D", "unembed": "D V", "final_norm": "D",
    "attn_norm": "L D", "mlp_norm": "L D", "post_attn_norm": "L D", "post_mlp_norm": "L D",
    "q": "L D N H", "k": "L D K H", "v": "L D K H", "o": "L N H D",
    "q_bias": "L N H", "k_bias": "L K H", "v_bias": "L K H", "q_norm": "L H", "k_norm": "L H",
    "gate": "L D F", "up": "L D F", "down": "L F D",
    "router": "L D E'",  # small, and whole where experts are cut
    "experts.gate": "L E D F", "experts.up": "L E D F", "experts.down": "L E F D",
}  # fmt: skip


def letters(params: Params) -> Any:
    """A tree like `params`: each leaf's dimensions, as "L D N H"."""

    def one(path: tuple, leaf: Any) -> str:
        name = path[-1].name
        return _LETTERS[f"experts.{name}" if len(leaf.shape) == 4 and name in _MLP else name]

    return jax.tree.map_with_path(one, params)


_MLP = ("gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model on a mesh: the PartitionSpec of every array."""

    config: ModelConfig
    mesh: Mesh

    def __post_init__(self) -> None:
        if self.config.windows is not None:
            raise UserError("parallel: models with sliding windows are not laid out over a mesh")
        params = P.abstract(self.config)
        jax.tree.map_with_path(
            lambda path, leaf, dims: RULES.check(dims, leaf.shape, self.mesh, path[-1].name),
            params,
            letters(params),
        )

    @functools.cached_property
    def specs(self) -> Any:
        """Of the parameters."""
        tree = letters(P.abstract(self.config))
        return jax.tree.map(lambda dims: RULES.spec(dims, self.mesh), tree)

    @functools.cached_property
    def rows(self) -> PartitionSpec:
        """Of a batch's arrays [B, T]."""
        return RULES.spec("B T", self.mesh)

    def cut_further(self, axis: Axis) -> Any:
        """The parameters' specs with one more dimension of each cut over `axis`.

        It is the largest that is whole so far and divides; a leaf that has none stays as it is.
        """
        n = self.mesh.shape.get(axis, 1)

        def one(spec: PartitionSpec, leaf: Any) -> PartitionSpec:
            free = [d for d, e in enumerate(spec) if e is None and leaf.shape[d] % n == 0]
            if not free or n == 1:
                return spec
            best = max(free, key=lambda d: leaf.shape[d])
            return PartitionSpec(*(axis.value if d == best else e for d, e in enumerate(spec)))

        return jax.tree.map(one, self.specs, P.abstract(self.config), is_leaf=_is_spec)

    def state_specs(
        self, optimizer: optax.GradientTransformation, moments: Any = None
    ) -> TrainState:
        """Specs of a TrainState: parameters as `specs`, moments too or as given, counters whole."""
        moments = self.specs if moments is None else moments
        state = jax.eval_shape(optimizer.init, P.abstract(self.config))
        placed = optax.tree_map_params(
            optimizer,
            lambda _, spec: spec,
            state,
            moments,
            transform_non_params=lambda _: PartitionSpec(),
        )
        whole: Any = PartitionSpec()
        return TrainState(self.specs, placed, whole, whole)

    def place(self, tree: Any, specs: Any) -> Any:
        """`tree` put on the mesh."""
        return jax.device_put(tree, shardings(self.mesh, specs))


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def summed(grads: Any, specs: Any, *, but: Iterable[str] = ()) -> Any:
    """Inside `shard_map`: each gradient summed over the axes along which its parameter is whole.

    Which those are is read from the type: the axes along which the gradient varies and that do not
    cut its parameter. Leaves with the same axes go into one reduction. `but` are left for later.
    """
    leaves, treedef = jax.tree.flatten(grads)
    spec_leaves = jax.tree.leaves(specs, is_leaf=_is_spec)
    over = [
        tuple(sorted(varying(leaf) - set(axes_of(spec)) - set(but)))
        for leaf, spec in zip(leaves, spec_leaves, strict=True)
    ]
    for axes in sorted(set(over) - {()}):
        places = [i for i, a in enumerate(over) if a == axes]
        for i, leaf in zip(places, jax.lax.psum([leaves[i] for i in places], axes), strict=True):
            leaves[i] = leaf
    return jax.tree.unflatten(treedef, leaves)


def gathered(tree: Any, dims: Any, axis: str = Axis.FSDP) -> Any:
    """Parameters cut over fsdp made whole again; their gradients come back cut.

    Inside `shard_map` by an all-gather, whose transpose is a reduce-scatter: this one line is
    ZeRO-3. Where the compiler cuts arrays, by annotations that say the same. Leaves of `dims` are
    letters; only arrays with a D are cut.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def one(leaf: Any, names: str) -> Any:
        if axis not in mesh.shape or "D" not in names.split():
            return leaf
        if axis in mesh.manual_axes:
            return jax.lax.all_gather(leaf, axis, axis=names.split().index("D"), tiled=True)
        return _annotated_whole(leaf, RULES.spec(names, mesh))

    return jax.tree.map(one, tree, dims)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _annotated_whole(leaf: Any, spec: PartitionSpec) -> Any:
    """The leaf whole on every device, and its gradient cut as `spec` says."""
    return jax.lax.with_sharding_constraint(leaf, PartitionSpec())


_annotated_whole.defvjp(
    lambda leaf, spec: (_annotated_whole(leaf, spec), None),
    lambda spec, _, g: (jax.lax.with_sharding_constraint(g, spec),),
)


def bytes_on_a_device(tree: Any, specs: Any, mesh: Mesh) -> int:
    """Bytes of a tree of arrays (or shapes) on one device of a mesh."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(specs, is_leaf=_is_spec), strict=True)
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        // math.prod(mesh.shape[axis] for axis in axes_of(spec))
        for leaf, spec in leaves
    )  # fmt: skip
