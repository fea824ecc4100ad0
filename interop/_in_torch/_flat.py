"""A flat JAX function, jitted, and the names by which graphs of torch know such functions."""

from __future__ import annotations

import itertools
import json
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import jax

from interop._abstract import Aval, Outputs, infer_jax
from interop._derive import Axes, Flat, FlatFn, Mask, Static, fill, pick
from interop._errors import UnsupportedError
from interop._in_torch._residuals import residual_forward
from interop._private import jax as jax_private
from interop._side import Leaf, Leaves


class Names:
    """Flat functions by the names that the op calls them by.

    A name is weak: whoever made a function keeps it alive. But a graph holds nothing else, and may outlive them all, so
    the last functions that were traced into one are kept. A name in an exported program says how the function is found
    in another process: its module, its qualified name, and what was derived from it.
    """

    CAPACITY = 4096

    def __init__(self) -> None:
        self.flats: weakref.WeakValueDictionary[str, JaxFlat] = weakref.WeakValueDictionary()
        self.traced: OrderedDict[str, JaxFlat] = OrderedDict()
        self.load: Callable[[Any], JaxFlat] | None = None
        self.numbers = itertools.count()

    def add(self, flat: JaxFlat) -> str:
        """A new name, for this process."""
        name = f"#{next(self.numbers)}"
        self.flats[name] = flat
        return name

    def keep(self, name: str, flat: JaxFlat) -> None:
        """Remember a function that a graph names now."""
        self.flats[name] = self.traced[name] = flat
        self.traced.move_to_end(name)
        if len(self.traced) > self.CAPACITY:
            self.traced.popitem(last=False)

    def __getitem__(self, name: str) -> JaxFlat:
        found = self.flats.get(name)
        if found is not None:
            return found
        if name.startswith("#") or self.load is None:
            raise UnsupportedError(
                "a graph calls a function that is gone", hint="Keep the crossing as long as its graphs"
            )
        recipe = json.loads(name)
        found = self.load(recipe["function"])
        for method, *arguments in recipe["derived"]:
            found = getattr(found, method)(*map(tuple, arguments))
        self.keep(name, found)
        return found


FLATS = Names()


@dataclass(eq=False)
class JaxFlat(Flat):
    """A flat JAX function, jitted, in 32 or 64 bits.

    Attributes:
        x64: whether it runs under `jax.enable_x64`, whatever the calling thread has set.
        located: how another process finds the function that this one is derived from; raises where it can't.
        derived_by: the methods, with their arguments, that lead here from that function; None for a step between
            forward and backward, which belongs to one trace.
        name_of_op: the name that the op calls it by in this process.
        jitted: the compiled function; `jax.jit` keeps one program per shapes and dtypes.
    """

    x64: bool = False
    located: Callable[[], Any] | None = None
    derived_by: tuple[tuple[Any, ...], ...] | None = ()
    name_of_op: str = field(init=False)
    jitted: Callable[..., tuple[Leaves, Static]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.jitted = jax.jit(self.fn)
        self.name_of_op = FLATS.add(self)

    def name_for(self, *, exported: bool) -> str:
        """The name that the op calls it by, in a graph that stays in this process or in one that leaves it."""
        if not exported:
            return self.name_of_op
        if self.located is None or self.derived_by is None:
            raise UnsupportedError("a gradient that was captured can't be exported", hint="Export the function itself")
        name = json.dumps({"function": self.located(), "derived": self.derived_by})
        FLATS.keep(name, self)
        return name

    def jvp(self, nonzero: Mask) -> Self:
        """The derivative along tangents."""
        return self._named_after(super().jvp(nonzero), "jvp", nonzero)

    def vjp(self, nonzero: Mask, present: Mask) -> Self:
        """The transpose of the derivative."""
        return self._named_after(super().vjp(nonzero, present), "vjp", nonzero, present)

    def vmap(self, in_axes: Axes) -> Self:
        """The function over a batch."""
        return self._named_after(super().vmap(in_axes), "vmap", in_axes)

    def wide(self) -> JaxFlat:
        """The same function in 64 bits."""
        if self.x64:
            return self
        return self._named_after(self.memo("wide", lambda: self.variant(self.fn, x64=True)), "wide")

    def lifted(self, is_number: Mask) -> JaxFlat:
        """The same function with its Python numbers given as 0-d tensors: the op takes nothing else."""
        if not any(is_number):
            return self

        def fn(*leaves: Leaf) -> tuple[Leaves, Static]:
            numbers = map(jax_private.weaken, pick(leaves, is_number))
            return self.fn(*fill(leaves, is_number, tuple(numbers)))

        lifted = self.memo(("lifted", is_number), lambda: self.variant(fn, x64=self.x64))
        return self._named_after(lifted, "lifted", is_number)

    def residual(self, nonzero: Mask) -> JaxFlat:
        """The forward that returns its residuals behind its outputs, and as structure the `Plan` of the backward."""
        return self.memo(("residual", nonzero), lambda: self.variant(residual_forward(self, nonzero), x64=self.x64))

    def outputs(self, avals: tuple[Aval, ...]) -> Outputs:
        """What is known of the outputs for inputs of these avals."""
        return self.memo(("outputs", avals), lambda: infer_jax(self, avals, x64=self.x64))

    def variant(self, fn: FlatFn, *, x64: bool) -> JaxFlat:
        """Another function over the same leaves, with what is known of them."""
        return JaxFlat(
            self.side, fn, self.name, self.levels, self.nondiff, self.path, self.lost,
            x64=x64, located=self.located, derived_by=None,
        )  # fmt: skip

    def _named_after(self, made: Any, *step: Any) -> Any:
        if self.derived_by is not None:
            made.derived_by = (*self.derived_by, step)
        return made
