"""A function with effects as two: a recording that has them, and a replay, which is pure.

An effect (a print, a callback that the world answers) happens once a call. A derivative that ran the function again
would have it twice, and would be that of another value. So where a derivative is asked, the effects are run first, on
their own; the rest of the function, given what they answered, is a function like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from interop._derive import NOTHING, FlatFn, Static
from interop._errors import UnsupportedError
from interop._private import jax as jax_private
from interop._side import Leaf, Leaves


class Effectful(Exception):
    """Raised in a trace of a function that turns out to have effects, where it must have none."""


def program_of(fn: FlatFn, leaves: Leaves) -> tuple[Any, Static]:
    """The jaxpr of a flat function on these leaves, and the structure of its outputs."""
    found: list[Static] = []

    def outputs(*every: Leaf) -> Leaves:
        outs, structure = fn(*every)
        found[:] = [structure]
        return outs

    program = jax.make_jaxpr(outputs)(*leaves)
    return program, found[0]


def record(fn: FlatFn) -> FlatFn:
    """The effects alone: leaves to what was answered."""

    def recording(*leaves: Leaf) -> tuple[Leaves, Static]:
        program, _ = program_of(fn, leaves)
        answers: list[Any] = []

        def run(equation: Any, evaluate: Callable[[Any], Any]) -> Any:
            outs = evaluate(equation)
            if not jax_private.inner_programs(equation):
                answers.extend(outs)
            return outs

        jax_private.inlined(program, leaves, run)
        return tuple(answers), NOTHING

    return recording


def replay(fn: FlatFn, count: int) -> FlatFn:
    """The function of `count` leaves without its effects: leaves and answers to outputs."""

    def replaying(*given: Leaf) -> tuple[Leaves, Static]:
        leaves, answers = given[:count], iter(given[count:])
        program, structure = program_of(fn, leaves)

        def run(equation: Any, evaluate: Callable[[Any], Any]) -> Any:
            if not jax_private.inner_programs(equation):
                return [next(answers) for _ in equation.outvars]
            silent = jax_private.silenced(equation)
            if silent is None:
                raise UnsupportedError(
                    f"a derivative through an effect that answers inside a {equation.primitive.name}",
                    hint="Call it outside the loop, and pass in what it answers",
                )
            return evaluate(silent)

        return tuple(jax_private.inlined(program, leaves, run)), structure

    return replaying
