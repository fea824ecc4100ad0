"""Leaves that a user has registered: types that neither framework opens, by what they are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax

from interop._closed_over import first
from interop._containers import OPENERS, Container, Opened
from interop._errors import ContainerError, OptionError
from interop._leaf import describe
from interop._marshal import KINDS, Tree, flatten

_T = TypeVar("_T")
_BUILT_IN = frozenset(KINDS)


def register_leaf(
    leaf_type: type[_T], /, unwrap: Callable[[_T], tuple[Any, Any]], wrap: Callable[[Any, Any], Any]
) -> None:
    """Say what a type of leaf is made of, so that it can cross.

    For what neither framework opens: a subclass of `torch.Tensor`, an object that wraps an array. A container crosses
    when it is registered with `jax.tree_util`, and needs this only to arrive as an object of another type.

        class Length(torch.Tensor):
            unit: str

        @jax.tree_util.register_dataclass
        @dataclass
        class JaxLength:  # its twin
            value: jax.Array
            unit: str = field(metadata={"static": True})

        def wrap(value, unit):
            if not isinstance(value, torch.Tensor):
                return JaxLength(value, unit)
            length = value.as_subclass(Length)
            length.unit = unit
            return length

        register_leaf(Length, lambda x: (x.as_subclass(torch.Tensor), x.unit), wrap)
        register_leaf(JaxLength, lambda x: (x.value, x.unit), wrap)

    A function that is called with a `Length` now gets a `JaxLength`, and what it returns arrives as a `Length`. Values
    cross as ever: what is copied, differentiated and batched are the tensors that `unwrap` returns.

    Args:
        leaf_type: the type; its subclasses are other types.
        unwrap: from an object of it, `(value, static)`. `value` is a plain tensor or array, or a pytree of them, and
            `static` whatever else it takes to make the object again: numbers, strings and hashables, in any container.
            Another `static` is another trace. It is called at every call, more than once, also on tracers: without side
            effects, and by what torch can differentiate, so not by `.data` or `.detach()`.
        wrap: from `value` and `static`, what stands for the object on the side where the value now is: on the side of
            the object's own framework usually the object again, on the other one its twin, or the bare value.

    Call it where the type is defined, once; from then on it holds in every thread. What neither framework lets through
    its own transforms is opened inside of them: an argument or a result of `jax.jit` and its kin has to be registered
    with `jax.tree_util` besides, and `torch.func` takes a subclass for a plain tensor. `torch.compile` traces both
    functions, where it can trace the type at all; a torch function that makes a subclass by `as_subclass` needs
    `jittable(example_output=...)` under `jax.jit`, because torch has no such fake tensor.

    Raises:
        OptionError: the type is registered already, or crosses anyway.
        At the call, ContainerError: `unwrap` returned no pair, the object again, or a static with a value in it.
    """
    known: Any = leaf_type
    if not isinstance(known, type):
        raise OptionError("register_leaf of no type", got=describe(known), expected="a class")
    if known in OPENERS or known in _BUILT_IN or issubclass(known, jax.Array):
        raise OptionError(f"{known.__qualname__} can't be registered", hint="It crosses already")
    KINDS.pop(known, None)
    LEAVES[leaf_type] = _Functions.of(leaf_type, unwrap, wrap)
    OPENERS[leaf_type] = _open_leaf


class _Functions(NamedTuple):
    """What a type was registered with, and the same as what a container is registered with."""

    unwrap: Callable[[Any], Any]
    wrap: Callable[[Any, Any], Any]
    take_apart: Callable[[Any], Any]
    stand_for: Callable[[Any, Any], Any]  # an `Unwrapped`, in the place of the object
    put_together: Callable[[Any, Any], Any]

    @classmethod
    def of(cls, t: type, unwrap: Callable[[Any], Any], wrap: Callable[[Any, Any], Any]) -> _Functions:
        def take_apart(x: Any) -> Any:
            value, static = unwrap(x)
            return (value,), static

        return cls(unwrap, wrap, take_apart, lambda c, s: Unwrapped(t, c[0], s), lambda c, s: wrap(c[0], s))


LEAVES: dict[type, _Functions] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class Unwrapped:
    """A registered leaf in its parts: stands for it where it can't be made."""

    type: type
    value: Any
    static: Any


def _open_leaf(x: Any) -> Opened:
    t = type(x)
    made = LEAVES[t].unwrap(x)
    if type(made) is not tuple or len(made) != 2:
        raise ContainerError(f"unwrap of {t.__name__} returned no pair", got=describe(made), expected=_PAIR)
    return _open_unwrapped(Unwrapped(t, *made))


def _open_unwrapped(x: Unwrapped) -> Opened:
    t, wrap = x.type, LEAVES[x.type].wrap
    if first(x.value, lambda y: type(y) is t):
        raise ContainerError(f"unwrap of {t.__name__} returned a {t.__name__} again", expected=_PAIR)
    leaves, static = flatten(x.static, numbers_static=True)
    if leaves:
        raise ContainerError(f"unwrap of {t.__name__} returned a static that holds a value",
                             got=describe(leaves[0]), expected=_PAIR)  # fmt: skip
    return Container(t, static, ("",), lambda c: wrap(c[0], static.unflatten(()))), (x.value,)


_PAIR = "(value, static)"
OPENERS[Unwrapped] = _open_unwrapped


def unwrapped(tree: Tree, leaves: Sequence[Any]) -> Any:
    """The pytree with these leaves, and what is registered in its parts."""

    def left_open(token: Any) -> Any:
        if type(token) is not Container or token.type not in LEAVES:
            return token
        return dataclasses.replace(token, build=lambda c: Unwrapped(token.type, c[0], token.aux.unflatten(())))

    return Tree(tuple(map(left_open, tree.tokens))).unflatten(leaves)
