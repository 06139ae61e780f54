"""A backward pass in two: gradients of inputs now, gradients of weights later.

Zero-bubble schedules need both apart. The transposed program of a body is a list of operations:
what the input's gradient depends on is the first part, the rest is the second, and what the second
reads of the first (inputs of matrix products, gradients of their outputs) is kept between them.
Nothing is computed twice: B and W apart cost what they cost together. This takes any body; a loop
is one operation and is not parted, so the body unrolls its layers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import Array

Tree = Any
Name = int


@dataclasses.dataclass(frozen=True)
class Split:
    """The parts of one body's passes; `operands` are examples of what W needs."""

    operands: list[Array]
    forward: Callable[[Tree, Array, Tree], tuple[Array, list[Array]]]  # -> (y, residuals)
    backward: Callable[[list[Array], Array], tuple[Array, list[Array]]]  # -> (dx, operands)
    weights: Callable[[Sequence[Array]], Tree]  # operands -> gradients of the weights

    @classmethod
    def of(cls, body: Callable[[Tree, Array, Tree], Array], weights: Tree, x: Array, rows: Tree):
        """Parts the backward pass of `y = body(weights, x, rows)`, traced with these examples."""
        form: list[Any] = []

        def differentiated(weights: Tree, x: Array, rows: Tree) -> list[Array]:
            y, transpose = jax.vjp(lambda w, x: body(w, x, rows), weights, x)
            residuals, form[:] = jax.tree.leaves(transpose), [jax.tree.structure(transpose)]
            return [y, *residuals]

        def transposed(residuals: list[Array], dy: Array) -> list[Array]:
            d_weights, dx = jax.tree.unflatten(form[0], residuals)(dy)
            return [dx, *jax.tree.leaves(d_weights)]

        # Traced once: what another trace keeps may differ.
        ahead = _Program.of(jax.make_jaxpr(differentiated)(weights, x, rows))

        def forward(weights: Tree, x: Array, rows: Tree) -> tuple[Array, list[Array]]:
            arguments = jax.tree.leaves((weights, x, rows))
            values = ahead.run(ahead.operations, dict(zip(ahead.ins, arguments, strict=True)))
            y, *residuals = (values[name] for name in ahead.outs)
            return y, residuals

        y, residuals = forward(weights, x, rows)
        program = _Program.of(jax.make_jaxpr(transposed)(residuals, y))
        early = program.needed(program.outs[:1])
        late = [o for o in program.needed(program.outs[1:]) if o not in early]
        made = {name for o in late for name in o.results} | program.constants.keys()
        reads = [name for o in late for name in o.operands] + program.outs[1:]
        kept = [name for name in dict.fromkeys(reads) if name not in made]

        def backward(residuals: list[Array], dy: Array) -> tuple[Array, list[Array]]:
            values = program.run(early, dict(zip(program.ins, [*residuals, dy], strict=True)))
            return values[program.outs[0]], [values[name] for name in kept]

        def later(operands: Sequence[Array]) -> Tree:
            values = program.run(late, dict(zip(kept, operands, strict=True)))
            return jax.tree.unflatten(
                jax.tree.structure(weights), [values[name] for name in program.outs[1:]]
            )

        return cls(backward(residuals, y)[1], forward, backward, later)


@dataclasses.dataclass(frozen=True, eq=False)
class _Operation:
    """One equation of a program, its values by name."""

    equation: Any
    operands: tuple[Name, ...]
    results: tuple[Name, ...]


@dataclasses.dataclass(frozen=True)
class _Program:
    """A jaxpr as a flat list: the calls of jitted functions inside it are written out."""

    operations: list[_Operation]
    constants: dict[Name, Any]
    ins: list[Name]
    outs: list[Name]

    @classmethod
    def of(cls, program: ClosedJaxpr) -> _Program:
        names, operations, constants = itertools.count(), [], {}

        def constant(value: Any) -> Name:
            constants[name := next(names)] = value
            return name

        def walk(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Name]) -> list[Name]:
            env: dict[Any, Name] = dict(zip(jaxpr.invars, args, strict=True))
            env |= {v: constant(c) for v, c in zip(jaxpr.constvars, consts, strict=True)}

            def read(atom: Any) -> Name:
                return constant(atom.val) if isinstance(atom, Literal) else env[atom]

            for equation in jaxpr.eqns:
                operands = tuple(read(atom) for atom in equation.invars)
                if equation.primitive.name in ("jit", "pjit"):
                    inner = equation.params["jaxpr"]
                    results = tuple(walk(inner.jaxpr, inner.consts, operands))
                else:
                    results = tuple(next(names) for _ in equation.outvars)
                    operations.append(_Operation(equation, operands, results))
                env |= zip(equation.outvars, results, strict=True)
            return [read(atom) for atom in jaxpr.outvars]

        ins = [next(names) for _ in program.jaxpr.invars]
        return cls(operations, constants, ins, walk(program.jaxpr, program.consts, ins))

    def needed(self, outs: Sequence[Name]) -> list[_Operation]:
        """The operations that `outs` depend on, in order."""
        wanted, found = set(outs), []
        for operation in reversed(self.operations):
            if wanted.intersection(operation.results):
                found.append(operation)
                wanted.update(operation.operands)
        return found[::-1]

    def run(self, operations: Sequence[_Operation], values: dict[Name, Any]) -> dict[Name, Any]:
        """The values by name after `operations`."""
        values = self.constants | values
        for operation in operations:
            equation = operation.equation
            params = equation.primitive.get_bind_params(equation.params)
            with equation.ctx.manager:
                operands = (values[name] for name in operation.operands)
                results = equation.primitive.bind(*operands, **params)
            several = equation.primitive.multiple_results
            values |= zip(operation.results, results if several else [results], strict=True)
        return values
