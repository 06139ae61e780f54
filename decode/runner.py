"""The device's side of the engine: programs for a few shapes, and what the device remembers.

Programs are compiled ahead: the first can serve every step, and the engine begins with it; threads
compile the rest, each of which only makes some steps cheaper. So no step, admission or copy of a
page waits for the compiler: `compiles` counts those that would have, and stays 0. Whoever moves
pages to the host (`decode.page_moves`) compiles two programs more, when it is made. A persistent
cache (JAX_COMPILATION_CACHE_DIR) makes the next start short.

Cost: the host spends one transfer and one dispatch a step. Pages, counts and biases are donated
and written in place. On NVIDIA, XLA replays a step as a CUDA graph (its command buffers) as long as
the arrays keep their addresses, which donation sees to.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decode import buckets, forward
from decode.config import EngineConfig
from decode.draft import Drafter, first_layers
from decode.packing import Layout
from decode.step import Out, State, admit, step
from decode.tensor import TP, Devices
from jaxinfra.errors import UserError
from jaxinfra.measure import compiles
from jaxinfra.model import cache as kv
from jaxinfra.model.config import ModelConfig
from pallas_kernels.paged_attention import choose, supported

STEPS = {"gpu": 8, "tpu": 8}  # tokens a row in one call, where nobody waits
PLAIN = ("gpu",)  # where steps in which no row has a wish have programs of their own
_COMPILERS = max(1, (os.cpu_count() or 1) // 4)  # programs that are compiled at once
_COPIES = 8  # pages that one program copies
_BIASES = 512
_log = logging.getLogger("jaxinfra.engine")


class Runner:
    """The weights, the pages, and the compiled programs over them."""

    def __init__(
        self, params: kv.DecodeParams, config: ModelConfig, engine: EngineConfig,
        drafter: Drafter | None = None,
    ) -> None:  # fmt: skip
        """Makes the pages and compiles the first program; `finish` waits for the rest.

        drafter: the smaller model that guesses, where `engine` names one.
        """
        self._devices = Devices(config, engine.tp) if engine.tp > 1 else None
        if engine.draft_layers is not None:
            own_part = self._devices.local if self._devices else config
            drafter = first_layers(own_part, engine.draft_layers)
        if drafter is not None and drafter.config.vocab_size != config.vocab_size:
            raise UserError(
                f"engine: the draft model has {drafter.config.vocab_size} tokens and the model "
                f"{config.vocab_size}; give one of the same vocabulary"
            )
        self.drafter, self.drafts = drafter, engine.draft
        own = drafter if drafter is not None and drafter.params is not None else None
        self._draft: tuple[Any, ...] = () if own is None else (own.params,)
        self.params, self.config = self._placed(params), config
        longest = min(c.max_seq_len for c in (config, own.config if own else config))
        self.max_len = min(engine.max_len or longest, longest)
        self.page_size = engine.page_size
        per_sequence = -(-self.max_len // engine.page_size)
        dtype = engine.kv_dtype or params.embed.dtype.name
        models = [config, own.config] if own else [config]
        self.pages = _pages(models, engine, per_sequence, dtype)
        R, V = engine.max_running, config.vocab_size
        self.words = -(-V // 32)
        self._state = State(
            pool=forward.empty(config, self.pages, engine.page_size, dtype),
            last=jnp.zeros((R,), jnp.int32),
            counts=jnp.zeros((R, V), jnp.int32),
            bias=jnp.zeros((R, V), jnp.float32),
            draft=forward.empty(own.config, self.pages, engine.page_size, dtype) if own else (),
        )
        if self._devices:
            self._state = self._devices.keep(self._state)
        self._implementation: str | None = None
        self.steps = engine.steps or STEPS.get(jax.default_backend(), 1)
        if engine.invariant:
            T = engine.budget
            self._layouts = [Layout(T, R, per_sequence, R)]
            self.steps = 1
        else:
            shape = (1, config.num_heads, config.head_dim)
            facts = shape, self._state.pool[0].k.shape, params.embed.dtype, dtype
            chosen, why = choose(*facts)
            if self._devices and supported("triton", *facts) is None:
                chosen = self._implementation = "triton"  # XLA need not partition it
            _log.info("paged attention: %s (%s)", chosen, why)
            dead = chosen == "xla" and jax.default_backend() != "cpu"
            self._layouts = buckets.layouts(
                max_running=R, budget=engine.budget, pages=per_sequence, steps=self.steps,
                drafts=engine.draft, reads_dead_pages=dead, plain=jax.default_backend() in PLAIN,
                by_model=drafter is not None, reads=own is not None,
            )  # fmt: skip
        self._invariant = engine.invariant
        self._masks: dict[int, jax.Array] = {}
        self.biased: set[int] = set()  # slots in which a bias stands
        self._programs: dict[Layout, Any] = {}
        self.compiles = 0
        where = jax.tree.map(lambda a: a.sharding, self._state) if self._devices else None
        self._admit = ahead(admit, self._state, *self._admission(0, [], 0, [], 0.0), out=where)
        self._copy = ahead(
            forward.copy, self._state.pool + self._state.draft, *_pairs([]),
            out=where and where.pool,
        )  # fmt: skip
        self._compile(self._layouts[0])
        self._closed = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._compile_rest, name="compile", daemon=True)
        self._thread.start()

    @property
    def budget(self) -> int:
        """Tokens that a step can compute by now."""
        shapes = [o for o in self.ready if o.steps == 1 and not o.everywhere and not o.plain]
        return max(one.T for one in shapes if not one.reads)

    @property
    def ready(self) -> list[Layout]:
        """Shapes that are compiled."""
        return list(self._programs)

    @property
    def programs(self) -> int:
        """Shapes that there will be."""
        return len(self._layouts)

    @property
    def complete(self) -> bool:
        """Whether all shapes are compiled."""
        return len(self._programs) == self.programs

    @property
    def pool(self) -> tuple[forward.LayerPages, ...]:
        """The pages of every layer. A step donates them; set them between two steps, in kind."""
        return self._state.pool

    @pool.setter
    def pool(self, pool: tuple[forward.LayerPages, ...]) -> None:
        self._state = replace(self._state, pool=pool)

    def finish(self) -> None:
        """Waits until every program is compiled. Raises what the compiler raised last."""
        self._thread.join()
        if self._failed is not None:
            raise self._failed

    def close(self) -> None:
        """Compiles no further program; does not wait for the one under way."""
        self._closed.set()

    def run(self, layout: Layout, packed: np.ndarray, mask: np.ndarray | None) -> Out:
        """Dispatches one step; what it gives may not be computed yet."""
        with self._counted():
            told = self._everything(layout) if mask is None else mask
            self._state, out = self._programs[layout](
                self.params, self._state, packed, told, *self._drafting(layout)
            )
        return out

    def wait(self) -> None:
        """Until all that was dispatched is computed."""
        self._state.last.block_until_ready()

    def admit(
        self, slot: int, history: list[int], prompt: int, bias: dict[int, float], others: float
    ) -> None:
        """A sequence with a history that penalties look at, or a bias, begins in `slot`."""
        (self.biased.add if bias else self.biased.discard)(slot)
        pairs = list(bias.items())
        for start in range(0, max(len(bias), 1), _BIASES):
            part = pairs[start : start + _BIASES]
            with self._counted():
                self._state = self._admit(
                    self._state, *self._admission(slot, history, prompt, part, others, start > 0)
                )

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copies whole pages, (source, target) each."""
        for start in range(0, len(pairs), _COPIES):
            with self._counted():
                pool = self._copy(
                    self._state.pool + self._state.draft, *_pairs(pairs[start : start + _COPIES])
                )
            L = len(self._state.pool)
            self._state = replace(self._state, pool=pool[:L], draft=pool[L:])

    def swap(self, params: kv.DecodeParams) -> None:
        """Other weights of the same shapes from the next step on."""
        same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype,
                            self.params, params)  # fmt: skip
        if not all(jax.tree.leaves(same)):
            raise UserError("engine: the new weights have other shapes; start another engine")
        self.params = self._placed(params)

    def _placed(self, params: kv.DecodeParams) -> kv.DecodeParams:
        return self._devices.place(params) if self._devices else params

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Adds to `compiles` what is compiled in the block."""
        with compiles() as count:
            yield
        self.compiles += count()

    def _everything(self, layout: Layout) -> jax.Array:
        """A mask that allows every token."""
        if layout.S not in self._masks:
            self._masks[layout.S] = jnp.full((layout.S, self.words), 0xFFFFFFFF, jnp.uint32)
        return self._masks[layout.S]

    def _compile(self, layout: Layout) -> None:
        start = time.perf_counter()
        packed, _ = layout.empty()
        function: Any = functools.partial(
            step, config=self._devices.local if self._devices else self.config, layout=layout,
            invariant=self._invariant, implementation=self._implementation,
            axis=TP if self._devices else None,
            drafter=self.drafter if layout.drafts or layout.reads else None,
        )  # fmt: skip
        if self._devices:
            function = self._devices.run(function, self.params, self._state)
        self._programs[layout] = ahead(
            function, self.params, self._state, packed, self._everything(layout),
            *self._drafting(layout), donate=1,
        )  # fmt: skip
        _log.info("compiled %s in %.1f s", layout, time.perf_counter() - start)

    def _drafting(self, layout: Layout) -> tuple[Any, ...]:
        """What its program takes behind the mask."""
        return self._draft if layout.drafts or layout.reads else ()

    def _admission(
        self, slot: int, history: list[int], prompt: int, bias: list[tuple[int, float]],
        others: float, more: bool = False,
    ) -> tuple:  # fmt: skip
        """What `decode.step.admit` takes behind the state."""
        tokens = np.zeros(self.max_len, np.int32)
        tokens[: len(history)] = history
        ids, values = np.full(_BIASES, -1, np.int32), np.zeros(_BIASES, np.float32)
        ids[: len(bias)] = [id for id, _ in bias]
        values[: len(bias)] = [value for _, value in bias]
        return (np.int32(slot), tokens, np.int32(prompt), np.int32(len(history)), ids, values,
                np.float32(others), np.bool_(more))  # fmt: skip

    def _compile_rest(self) -> None:
        def one(layout: Layout) -> None:
            if self._closed.is_set():
                return
            try:
                self._compile(layout)
            except Exception as error:
                _log.exception("%s could not be compiled; the engine goes on without it", layout)
                self._failed = error

        with ThreadPoolExecutor(_COMPILERS) as pool:
            list(pool.map(one, self._layouts[1:]))


def ahead(
    function: Callable, *arguments: Any, donate: int | tuple[int, ...] = 0, out: Any = None
) -> Any:
    """`function` compiled for such arguments, which it need not look up again.

    donate: arguments that are written in place, by default the first. out: where its results lie,
    if not where the compiler likes.
    """

    def typed(a: Any) -> jax.ShapeDtypeStruct:
        placed = isinstance(a, jax.Array) and a.committed
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding if placed else None)

    options = {} if out is None else {"out_shardings": out}
    jitted = jax.jit(function, donate_argnums=donate, **options)
    return jitted.lower(*jax.tree.map(typed, arguments)).compile()


def _pairs(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Sources and targets of _COPIES copies; targets below zero fill up."""
    source, target = np.asarray([*pairs, *[(0, -1)] * (_COPIES - len(pairs))], np.int32).T
    return source, target


def _pages(
    models: list[ModelConfig], engine: EngineConfig, per_sequence: int, dtype: str
) -> int:  # fmt: skip
    size = jnp.dtype(dtype).itemsize
    scale = 4 if dtype in forward.QUANTISED else 0
    token = sum(2 * c.num_layers * c.num_kv_heads * (c.head_dim * size + scale) for c in models)
    if engine.pages is not None:
        return engine.pages
    if engine.memory is not None:
        pages = engine.memory // (token * engine.page_size)
        if pages < per_sequence:
            raise UserError(
                f"engine: memory={engine.memory:,} bytes holds {pages} pages; one sequence may "
                f"need {per_sequence}: give {per_sequence * token * engine.page_size:,} or less "
                "max_len"
            )
        return pages
    return max(per_sequence, engine.max_running * per_sequence // 2)
