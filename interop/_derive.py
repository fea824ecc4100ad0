"""From a flat function its jvp, vjp and vmap, as flat functions of the same kind, written once over a side.

A *flat function* takes leaves of its side and returns `(leaves, Static(structure))`. A `Flat` caches what is derived
from it, and what is derived is a `Flat` again: that is why a crossing is closed under every transform, in any order.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeAlias, TypeVar

import jax

from interop._errors import InteropError
from interop._log import tell_time
from interop._side import Leaf, Leaves, Side

FlatFn: TypeAlias = "Callable[..., tuple[Leaves, Static]]"
Mask: TypeAlias = tuple[bool, ...]
Axes: TypeAlias = "tuple[int | None, ...]"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Static:
    """A value that rides through a trace unseen: a pytree node without children. Compared and hashed by the value."""

    value: Any = None


jax.tree_util.register_pytree_node(Static, lambda s: ((), s), lambda s, _: s)

NOTHING = Static()


@dataclass(frozen=True)
class Levels:
    """What was declared of a crossing, and the options that go with it."""

    differentiable: bool = False
    jittable: bool = False
    example_output: Any = None  # a callable of the inputs' avals, or None where shapes are inferred
    jit: bool = True  # as_torch: whether the JAX function may be traced
    vmap: str = "auto"  # as_jax: "auto" or "sequential"
    at_once: bool = False  # as_torch: whether the gradient of the first output, a number, comes with it


@dataclass(eq=False, repr=False)
class Flat:
    """A flat function of one side, with what has been derived from it.

    Attributes:
        side: the framework the function is written in.
        fn: leaves of that side to `(leaves, Static(structure))`.
        name: what messages call it.
        levels: what was declared of it.
        nondiff: for each leaf, whether a derivative in it is refused.
        path: for each leaf, its argument path; computed when a message needs it.
        lost: names a value that the function closes over and whose gradient would be lost, if there is one.
    """

    side: Side
    fn: FlatFn
    name: str
    levels: Levels = Levels()
    nondiff: Mask = ()
    path: Callable[[int], str] | None = None
    lost: Callable[[], str | None] | None = None
    memos: dict[Hashable, Any] = field(default_factory=dict[Hashable, Any], repr=False)
    lock: Any = field(default_factory=threading.RLock, repr=False)

    def __repr__(self) -> str:
        return self.name  # in a program of JAX, which shows it

    def leaves(self, *leaves: Leaf) -> Leaves:
        """The outputs alone."""
        return self.fn(*leaves)[0]

    def memo(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """What was made for this key, once, also when several threads ask at a time."""
        found: _T | None = self.memos.get(key)
        if found is None:
            with self.lock:
                found = self.memos.get(key)
                if found is None:
                    found = self.memos[key] = make()
        return found

    def jvp(self, nonzero: Mask) -> Self:
        """`(*primals, *tangents)` to the tangents of the inexact outputs; tangents only where `nonzero`."""
        return self.memo(("jvp", nonzero), lambda: self.derived("jvp", derive_jvp(self, nonzero)))

    def vjp(self, nonzero: Mask, present: Mask) -> Self:
        """`(*primals, *cotangents)` to the cotangents of the `nonzero` primals, in the host's complex convention.

        Cotangents come only for the outputs that are `present`; the others count as zero.
        """
        return self.memo(("vjp", nonzero, present), lambda: self.derived("vjp", derive_vjp(self, nonzero, present)))

    def vmap(self, in_axes: Axes) -> Self:
        """The function over a batch: every output has the batch as its first axis."""
        return self.memo(("vmap", in_axes), lambda: self.derived("vmap", derive_vmap(self, in_axes)))

    def put_back(self) -> contextlib.AbstractContextManager[Any]:
        """Undoes what a trace of the function leaves behind."""
        return contextlib.nullcontext()

    def locate(self, error: InteropError) -> InteropError:
        """The error with the function and the path of the leaf in it, where no frame above will fill them in."""
        error.function = error.function or self.name.partition(".")[0]  # of the function, not of what is derived
        if error.argument is None and error.leaf is not None and self.path is not None:
            with contextlib.suppress(IndexError):  # a cotangent or a residual is no argument
                error.argument = self.path(error.leaf)
        return error

    def blamed(self) -> contextlib.AbstractContextManager[None]:
        """Where errors are of this function, and no frame above will say so: in a backward, in a graph."""
        return _Blamed(self)

    def tell_time(self, what: Callable[[], str], seconds: float) -> None:
        """Tell how long something took that is done once for each set of shapes; a long time aloud, but once."""
        if tell_time(self.name, what, seconds, loudly="took long" not in self.memos):
            self.memos["took long"] = True

    def derived(self, kind: str, fn: FlatFn) -> Self:
        """A function derived from this one."""
        # Of the same class and options: an engine's own subclass stays closed under derivation. The primals stay in
        # front, so what is known of a leaf by its index stays true. What was promised of the outputs does not.
        levels = replace(self.levels, example_output=None)
        return replace(self, fn=fn, name=f"{self.name}.{kind}", levels=levels, memos={}, lock=threading.RLock())


class _Blamed:
    """Completes an error that passes; the error goes on."""

    def __init__(self, flat: Flat) -> None:
        self.flat = flat

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, InteropError):
            self.flat.locate(error)


def fill(leaves: Leaves, mask: Mask, values: Leaves) -> Leaves:
    """The leaves, with those under the mask replaced in order."""
    new = iter(values)
    return tuple(next(new) if chosen else leaf for leaf, chosen in zip(leaves, mask, strict=True))


def pick(leaves: Leaves, mask: Mask) -> Leaves:
    """The leaves under the mask."""
    return tuple(leaf for leaf, chosen in zip(leaves, mask, strict=True) if chosen)


def join(mask: Mask, chosen: Leaves, others: Leaves) -> Leaves:
    """The leaves again, from those under the mask and the others: what `pick` has parted."""
    parts = iter(chosen), iter(others)
    return tuple(next(parts[0] if under else parts[1]) for under in mask)


def inexact_part(flat: Flat, primals: Leaves, nonzero: Mask) -> Callable[..., Leaves]:
    """The function of the `nonzero` primals alone, and of its inexact outputs alone: what has a derivative.

    It is given copies: what it writes to is not what the derivative is taken in.
    """

    def part(*active: Leaf) -> Leaves:
        outs = flat.leaves(*map(flat.side.copy, fill(primals, nonzero, active)))
        return tuple(out for out in outs if flat.side.is_inexact(out))

    return part


def derive_jvp(flat: Flat, nonzero: Mask) -> FlatFn:
    """The derivative along the tangents of the `nonzero` primals."""
    count = len(nonzero)

    def jvp(*leaves: Leaf) -> tuple[Leaves, Static]:
        primals, tangents = leaves[:count], leaves[count:]
        part = inexact_part(flat, primals, nonzero)
        return tuple(flat.side.jvp(part, pick(primals, nonzero), tangents)[1]), NOTHING

    return jvp


def derive_vjp(flat: Flat, nonzero: Mask, present: Mask) -> FlatFn:
    """The transpose of that derivative.

    A gradient of torch is the conjugate of JAX's, for any function whatever. Conjugating on the way in and on the way
    out therefore gives the host's convention on both sides, and at every order.
    """
    count, side = len(nonzero), flat.side

    def vjp(*leaves: Leaf) -> tuple[Leaves, Static]:
        primals, given = leaves[:count], iter(leaves[count:])
        inexact: list[bool] = []

        def part(*active: Leaf) -> Leaves:
            outs = flat.leaves(*map(side.copy, fill(primals, nonzero, active)))
            inexact[:] = [side.is_inexact(out) for out in outs]
            return pick(outs, tuple(inexact))

        outs, pull = side.vjp(part, *pick(primals, nonzero), reads=primals)
        here = pick(present, tuple(inexact))
        cotangents = tuple(
            side.conjugated(next(given)) if p else side.zeros_like(o) for p, o in zip(here, outs, strict=True)
        )
        return tuple(map(side.conjugated, pull(cotangents))), NOTHING

    return vjp


def derive_vmap(flat: Flat, in_axes: Axes, vmap: Callable[..., Any] | None = None) -> FlatFn:
    """The function over a batch. Its structure is that of one example: the batch is in the leaves alone."""

    def vmapped(*leaves: Leaf) -> tuple[Leaves, Static]:
        structure: list[Static] = []

        def one(*example: Leaf) -> Leaves:
            outs, static = flat.fn(*example)
            structure[:] = [static]
            return outs

        return tuple((vmap or flat.side.vmap)(one, in_axes)(*leaves)), structure[0]

    return vmapped
