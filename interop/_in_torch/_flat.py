"""A flat JAX function, jitted."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import jax

from interop._abstract import Aval, Outputs, infer_jax
from interop._derive import Flat, FlatFn, Mask, Static, fill, pick
from interop._in_torch._residuals import residual_forward
from interop._private import jax as jax_private
from interop._side import Leaf, Leaves

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
        return self.memo(("residual", nonzero), lambda: self.variant(residual_forward(self, nonzero), x64=self.x64))

    def outputs(self, avals: tuple[Aval, ...]) -> Outputs:
        """What is known of the outputs for inputs of these avals."""
        return self.memo(("outputs", avals), lambda: infer_jax(self, avals, x64=self.x64))

    def variant(self, fn: FlatFn, *, x64: bool) -> JaxFlat:
        """Another function over the same leaves, with what is known of them."""
        return JaxFlat(self.side, fn, self.name, self.levels, self.nondiff, self.path, self.lost, x64=x64)
