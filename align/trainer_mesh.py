"""A trainer on a mesh: parameters cut as `parallel.layout` says, rows over dp, fsdp and ep.

The step is the one of a single device; the compiler puts in the collectives (GSPMD). Frozen
parameters are cut like trained ones; adapters and their moments, which are small, are whole on
every device. A device's memory: its share of the parameters and moments, and of a batch's rows.

    python -m jaxinfra align dpo --mesh dp=2,tp=2 --emulate 4 --lora.rank 8
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from align.trainer_config import TrainerConfig
from align.trainer_step import Trained
from jaxinfra.errors import UserError
from jaxinfra.model.config import ModelConfig
from jaxinfra.train.step import TrainState
from parallel import mesh as M
from parallel.layout import Layout

_WHOLE = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the arrays of a trainer lie."""

    layout: Layout

    @property
    def rows(self) -> NamedSharding:
        """Of a batch's arrays: the leading axis is cut."""
        return NamedSharding(self.layout.mesh, PartitionSpec(self.layout.rows[0]))

    @property
    def frozen(self) -> Any:
        """Of a model's parameters."""
        return M.shardings(self.layout.mesh, self.layout.specs)

    def state(self, like: TrainState, optimizer: optax.GradientTransformation) -> Any:
        """Of a state like `like` (shapes suffice): moments lie as what they are of."""
        trained: Trained = like.params
        whole = jax.tree.map(lambda _: _WHOLE, trained)
        if trained.params is not None:
            whole = whole.replace(params=self.layout.specs)
        moments = optax.tree_map_params(
            optimizer,
            lambda _, spec: spec,
            like.opt_state,
            whole,
            transform_non_params=lambda _: _WHOLE,
        )
        return M.shardings(self.layout.mesh, TrainState(whole, moments, _WHOLE, _WHOLE))  # pyright: ignore


def place(config: TrainerConfig, model: ModelConfig, devices: Any = None) -> Placement | None:
    """The placement that `config.mesh` names; None where it names none.

    Raises UserError where the mesh has an axis that trainers do not use, the model does not divide,
    or a part of a batch does not.
    """
    if config.mesh is None:
        return None
    sizes = M.parse(config.mesh)
    for axis in (M.Axis.PP, M.Axis.CP):
        if sizes.get(axis, 1) > 1:
            raise UserError(
                f"{config.method}: mesh={config.mesh}: trainers cut rows and parameters; leave "
                f"{axis.value} out"
            )
    found = Placement(Layout(model, M.make(sizes, devices)))
    part, over = config.batch_size // config.accumulate, 1
    for axis in M.ROWS:
        over *= sizes.get(axis, 1)
    if part % over:
        raise UserError(
            f"{config.method}: parts of {part} rows do not divide over {over} devices; change "
            "batch_size or accumulate"
        )
    return found
