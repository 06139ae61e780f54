"""Actor, critic and reference on one mesh or each on its own, with the update of one device.

Where each model's arrays lie is `parallel.layout`'s word; a batch's rows are cut over dp and fsdp.
XLA puts the collectives in. What goes between meshes passes through the host: answers, [B, T]
log-probabilities and values, and one number, the norm of each model's gradient, so that clipping
and the guard against what is not finite see both models, as in one program.

A reward model has its place too, `align.array_rewards.ModelReward(mesh=...)`, and those who draw
answers, `JitRollouts(places=...)`. Attention is the backend's own: XLA does not cut Pallas kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from align.config import RLConfig
from align.experience import Experience, judge
from align.host_loop import HostLoop, JitRollouts
from align.objective import critic_objective, logps_of, policy_objective, values_of
from align.rewards import Scorer
from align.rollout import Rollout
from align.step import Problems, RLState, Trained, orders, over_updates, updates_of
from align.value_model import ValueModel
from jaxinfra.model.config import ModelConfig
from jaxinfra.train.optimizer import make_optimizer
from parallel.layout import Layout
from parallel.mesh import shardings

_NO_CLIP = 1e30  # the norm of both models' gradients is known to neither alone


@dataclasses.dataclass(frozen=True)
class Placement:
    """A layout for each model; those that are not given share the actor's."""

    actor: Layout
    critic: Layout | None = None
    reference: Layout | None = None

    def of_actor(self) -> Any:
        """Shardings of the policy's parameters."""
        return shardings(self.actor.mesh, self.actor.specs)

    def of_critic(self) -> Any:
        """Shardings of the critic's."""
        layout = self.critic or self.actor
        whole: Any = PartitionSpec()
        return shardings(layout.mesh, ValueModel(layout.specs, whole, whole))

    def of_reference(self) -> Any:
        """Shardings of the reference's."""
        layout = self.reference or self.actor
        return shardings(layout.mesh, layout.specs)


class PlacedLoop(HostLoop):
    """The host's loop with models where `placement` says; begin with `place(create(...))`."""

    def __init__(
        self, config: RLConfig, model: ModelConfig, problems: Problems, scorers: Sequence[Scorer],
        placement: Placement, *, steps: int, dtype: Any = jnp.float32, **options: Any,
    ) -> None:  # fmt: skip
        options.setdefault("rollouts", JitRollouts(config, model, dtype=dtype))
        super().__init__(config, model, problems, scorers, steps=steps, dtype=dtype, **options)
        self._at = placement
        unclipped = dataclasses.replace(config.optimizer, clip_norm=_NO_CLIP)
        self._tx = make_optimizer(unclipped, updates_of(config, steps))
        self._logps = jax.jit(lambda p, r: logps_of(config, model, p, r, dtype)[0])
        self._values = jax.jit(lambda c, r: values_of(config, model, c, r, dtype))
        self._judge = jax.jit(
            lambda r, rewards, old, ref, values, coef: judge(
                config, r, rewards, old, ref, values, coef
            )
        )
        self._gradients = {
            "policy": jax.jit(_gradient(lambda p, e: policy_objective(config, model, p, e, dtype))),
            "critic": jax.jit(_gradient(lambda c, e: critic_objective(config, model, c, e, dtype))),
        }
        self._apply = jax.jit(self._applied)

    def place(self, state: RLState) -> RLState:
        """The state before the first step, each model and its moments where they belong."""
        t = state.trained
        policy = jax.device_put(t.policy, self._at.of_actor())
        critic = t.critic and jax.device_put(t.critic, self._at.of_critic())
        reference = state.reference
        if reference is not None:
            reference = jax.device_put(reference, self._at.of_reference())
        models: list[Any] = [m for m in (policy, critic) if m is not None]
        moments = tuple(map(self._moments, models))
        return dataclasses.replace(
            state, trained=Trained(policy, critic), opt_state=moments, reference=reference
        )

    def _moments(self, model: Any) -> Any:
        """The optimiser's state, cut as the model is."""
        places = jax.tree.map(lambda leaf: leaf.sharding, model)
        whole = NamedSharding(jax.tree.leaves(places)[0].mesh, PartitionSpec())
        out = optax.tree_map_params(
            self._tx, lambda _, place: place, jax.eval_shape(self._tx.init, model), places,
            transform_non_params=lambda _: whole,
        )  # fmt: skip
        return jax.jit(self._tx.init, out_shardings=out)(model)

    def learn(
        self, state: RLState, r: Rollout, rewards: np.ndarray, weights: np.ndarray | None = None
    ) -> tuple[RLState, dict[str, float], Experience | None]:
        """See `HostLoop.learn`."""
        if np.all(np.isnan(rewards)):
            return dataclasses.replace(state, step=state.step + 1), {"passed_over": 1.0}, None
        experience, metrics = self._experience(state, jax.device_get(r), rewards)
        e: Any = experience
        if weights is not None:
            own = 1.0 if e.weights is None else e.weights
            e = e.replace(weights=np.broadcast_to(weights[:, None], e.mask.shape) * own)
        config = self.config
        for_minibatches: Any = e.replace(kl=None)
        rows = jax.device_get(orders(config, state.seed, state.step)).reshape(
            config.epochs * config.minibatches, -1
        )
        if len(rows) == 1:
            rows = np.arange(config.answers)[None]
        models, moments, told = self._models(state), list(state.opt_state), []
        skipped = int(state.skipped)
        for order in rows:
            part = jax.tree.map(lambda a, order=order: a[order], for_minibatches)
            models, moments, row, finite = self._one_update(models, moments, part)
            skipped += not finite
            told.append(row)
        mean = {k: float(over_updates(k)(jnp.asarray([row[k] for row in told]))) for k in told[0]}
        controller = state.kl if e.kl is None else state.kl.update(e.kl, config.answers)
        state = dataclasses.replace(
            state, trained=Trained(*models), opt_state=tuple(moments), kl=controller,
            step=state.step + 1, skipped=jnp.int32(skipped),
        )  # fmt: skip
        metrics = {k: float(v) for k, v in metrics.items()}
        return state, metrics | mean | {"skipped": float(skipped), "passed_over": 0.0}, e

    def _experience(self, state: RLState, r: Rollout, rewards: np.ndarray) -> Any:
        """On the host, from each model's word where it lies."""
        config, t = self.config, state.trained
        old = ref = values = None
        if config.epochs * config.minibatches > 1 or config.importance:
            old = self._logps(t.policy, self._rows(r, self._at.actor))
        if state.reference is not None:
            ref = self._logps(state.reference, self._rows(r, self._at.reference))
        if t.critic is not None:
            values = self._values(t.critic, self._rows(r, self._at.critic))
        old, ref, values = jax.device_get((old, ref, values))
        values = None if values is None else values * r.mask
        return jax.device_get(
            self._judge(r, rewards, old, ref, values, jax.device_get(state.kl.coef))
        )

    def _models(self, state: RLState) -> list[Any]:
        t = state.trained
        return [t.policy] if t.critic is None else [t.policy, t.critic]

    def _one_update(
        self, models: list[Any], moments: list[Any], part: Experience
    ) -> tuple[list[Any], list[Any], dict[str, float], bool]:
        places = (self._at.actor, self._at.critic)
        found = [
            self._gradients[name](model, self._rows(part, layout))
            for name, model, layout in zip(("policy", "critic"), models, places, strict=False)
        ]
        numbers = jax.device_get([(loss, aux, square) for loss, aux, square, _ in found])
        loss = float(np.sum([n[0] for n in numbers], dtype=np.float32))
        norm = float(np.sqrt(np.sum([n[2] for n in numbers], dtype=np.float32)))
        metrics = {k: float(v) for n in numbers for k, v in n[1].items()}
        finite = bool(np.isfinite(loss) and np.isfinite(norm))
        if finite:
            most = self.config.optimizer.clip_norm
            scale = np.float32(1.0 if norm < most else most / norm)
            new = [
                self._apply(model, moment, gradient, scale)
                for model, moment, (*_, gradient) in zip(models, moments, found, strict=True)
            ]
            models, moments = [n[0] for n in new], [n[1] for n in new]
        return models, moments, metrics | {"loss": loss, "grad_norm": norm}, finite

    def _applied(self, model: Any, moments: Any, gradient: Any, scale: Any) -> tuple[Any, Any]:
        gradient = jax.tree.map(lambda g: g * scale, gradient)
        updates, moments = self._tx.update(gradient, moments, model)
        return optax.apply_updates(model, updates), moments

    def _rows(self, tree: Any, layout: Layout | None) -> Any:
        """Arrays [B, ...] of the host cut over a mesh's rows, whole where they do not divide."""
        layout = layout or self._at.actor
        rows = PartitionSpec(layout.rows[0])
        parts = np.prod([layout.mesh.shape[a] for a in _axes(layout.rows[0])], dtype=int)

        def put(leaf: Any) -> Any:
            spec = rows if leaf.ndim and leaf.shape[0] % parts == 0 else PartitionSpec()
            return jax.device_put(leaf, NamedSharding(layout.mesh, spec))

        return jax.tree.map(put, tree)


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _gradient(objective: Callable[[Any, Experience], tuple[Any, dict]]) -> Callable:
    """(loss, metrics, squared norm, gradient) of an objective."""

    def gradient(model: Any, e: Experience) -> tuple[Any, dict, Any, Any]:
        (loss, metrics), found = jax.value_and_grad(objective, has_aux=True)(model, e)
        return loss, metrics, jnp.square(optax.tree.norm(found)), found

    return gradient
