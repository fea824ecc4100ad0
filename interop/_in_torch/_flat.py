"""A flat JAX function, jitted, with its residual forward and the backward that goes with it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from interop._abstract import Aval, Outputs, infer_jax
from interop._derive import NOTHING, Flat, FlatFn, Mask, Static, fill, pick
from interop._private import jax as jax_private
from interop._side import Leaf, Leaves

# --- the flat function ------------------------------------------------------------------------------------------------

# The op names a flat function by number. Whoever made the function keeps it alive; what is derived lives with it.
FLATS: weakref.WeakValueDictionary[int, JaxFlat] = weakref.WeakValueDictionary()
_numbers = itertools.count()


@dataclass(eq=False)
class JaxFlat(Flat):
    """A flat JAX function, jitted, in 32 or 64 bits.

    Attributes:
        x64: whether it runs under `jax.enable_x64`, whatever the calling thread has set.
        number: its name in the op.
        jitted: the compiled function; `jax.jit` keeps one program per shapes and dtypes.
    """

    x64: bool = False
    number: int = field(default_factory=lambda: next(_numbers), init=False)
    jitted: Callable[..., tuple[Leaves, Static]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.jitted = jax.jit(self.fn)
        FLATS[self.number] = self

    def wide(self) -> JaxFlat:
        """The same function in 64 bits."""
        return self if self.x64 else self.memo("wide", lambda: self.variant(self.fn, x64=True))

    def lifted(self, is_number: Mask) -> JaxFlat:
        """The same function with its Python numbers given as 0-d tensors: the op takes nothing else."""
        if not any(is_number):
            return self

        def fn(*leaves: Leaf) -> tuple[Leaves, Static]:
            numbers = map(jax_private.weaken, pick(leaves, is_number))
            return self.fn(*fill(leaves, is_number, tuple(numbers)))

        return self.memo(("lifted", is_number), lambda: self.variant(fn, x64=self.x64))

    def residual(self, nonzero: Mask) -> JaxFlat:
        """The forward that returns its residuals behind its outputs, and as structure the `Plan` of the backward."""
        return self.memo(("residual", nonzero), lambda: self.variant(_residual_forward(self, nonzero), x64=self.x64))

    def outputs(self, avals: tuple[Aval, ...]) -> Outputs:
        """What is known of the outputs for inputs of these avals."""
        return self.memo(("outputs", avals), lambda: infer_jax(self, avals, x64=self.x64))

    def variant(self, fn: FlatFn, *, x64: bool) -> JaxFlat:
        """Another function over the same leaves, with what is known of them."""
        return JaxFlat(self.side, fn, self.name, self.levels, self.nondiff, self.path, self.lost, x64=x64)


# --- residuals --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Plan:
    """What one trace of a residual forward found out about its backward.

    Attributes:
        count: the number of outputs; the residuals follow them.
        structure: of the outputs, as the function itself returned it.
        saved: where each residual is found: ("input", i), ("output", i) or ("residual", i). One that *is* an input is
            saved as the torch input, so that torch's version counter guards it and nothing is kept twice.
        pull: `(saved, cotangents)` to the cotangents of the active primals, under a trace.
    """

    count: int
    structure: Static
    saved: tuple[tuple[str, int], ...]
    inexact: Mask
    pull: Callable[[Leaves, Leaves], Leaves]
    forward: JaxFlat
    active: Mask
    backwards: dict[tuple[Mask, Mask], JaxFlat] = field(default_factory=dict[tuple[Mask, Mask], "JaxFlat"], repr=False)

    @property
    def smooth(self) -> bool:
        """Whether every output has a derivative."""
        return all(self.inexact)

    def backward(self, need: Mask, present: Mask) -> JaxFlat:
        """`(*saved, *cotangents)` to the cotangents of the primals under `need`."""
        found = self.backwards.get((need, present))
        return found or self.backwards.setdefault((need, present), self._backward(need, present))

    def _backward(self, need: Mask, present: Mask) -> JaxFlat:
        def fn(*leaves: Leaf) -> tuple[Leaves, Static]:
            given = iter(leaves[len(self.saved) :])
            cotangents = tuple(next(given) if p else None for p in pick(present, self.inexact))
            pulled = self.pull(leaves[: len(self.saved)], cotangents)
            return pick(pulled, pick(need, self.active)), NOTHING

        return self.forward.variant(fn, x64=self.forward.x64)


def _residual_forward(flat: JaxFlat, active: Mask) -> FlatFn:
    def forward(*leaves: Leaf) -> tuple[Leaves, Static]:
        found: list[tuple[Leaves, Static]] = []

        def inexact_part(*primals: Leaf) -> tuple[Leaves, Leaves]:
            outs, structure = flat.fn(*fill(leaves, active, primals))
            mask = tuple(flat.side.is_inexact(out) for out in outs)
            found[:] = [(mask, structure)]
            # What has no derivative leaves as aux: no float0 anywhere.
            return pick(outs, mask), pick(outs, tuple(not m for m in mask))

        some, pull, others = jax.vjp(inexact_part, *pick(leaves, active), has_aux=True)
        ((inexact, structure),) = found
        outs = fill(fill((None,) * len(inexact), inexact, some), tuple(not m for m in inexact), others)
        residuals, saved, unpack = _describe_residuals(pull, leaves, outs)
        plan = Plan(len(outs), structure, saved, inexact, _pull(unpack, some), flat.residual(active), active)
        return (*outs, *residuals), Static(plan)

    return forward


def _describe_residuals(
    pull: Any, inputs: Leaves, outs: Leaves
) -> tuple[Leaves, tuple[tuple[str, int], ...], Callable[[Leaves], Any]]:
    """What of the residuals has to be returned, where each is found later, and how the pull-back is put together again.

    Told apart by the identity of tracers: on the outside, a jitted function copies a residual that is an input.
    """
    values, treedef = jax.tree.flatten(pull)
    origin = {id(x): ("input", i) for i, x in enumerate(inputs)} | {id(x): ("output", i) for i, x in enumerate(outs)}
    returned: list[Any] = []
    constants: dict[int, Any] = {}
    keys: set[int] = set()
    saved: dict[tuple[str, int], int] = {}
    slots: list[int] = []  # for each value, its place in `saved`
    for position, value in enumerate(values):
        if not isinstance(value, jax.core.Tracer):
            constants[position] = value
            slots.append(-1)
            continue
        if id(value) not in origin:
            origin[id(value)] = ("residual", len(returned))
            is_key = jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
            returned.append(jax.random.key_data(value) if is_key else value)
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            keys.add(position)
        slots.append(saved.setdefault(origin[id(value)], len(saved)))
    impls = {position: jax.random.key_impl(values[position]) for position in keys}

    def unpack(leaves: Leaves) -> Any:
        again = [constants[i] if slot < 0 else leaves[slot] for i, slot in enumerate(slots)]
        for position, impl in impls.items():
            again[position] = jax.random.wrap_key_data(again[position], impl=impl)
        return jax.tree.unflatten(treedef, again)

    return tuple(returned), tuple(saved), unpack


def _pull(unpack: Callable[[Leaves], Any], outs: Leaves) -> Callable[[Leaves, Leaves], Leaves]:
    """The pull-back in torch's complex convention; an absent cotangent is zero."""
    shapes = [(out.shape, out.dtype) for out in outs]

    def conj(x: Any) -> Any:
        return jnp.conj(x) if jnp.iscomplexobj(x) else x

    def pull(saved: Leaves, cotangents: Leaves) -> Leaves:
        dense = tuple(jnp.zeros(*s) if c is None else conj(c) for c, s in zip(cotangents, shapes, strict=True))
        return tuple(conj(x) for x in unpack(saved)(dense))

    return pull
