"""A crossing inside `torch.compile`: Dynamo sees one opaque call of flat values, and rebuilds the result around it.

Dynamo can't trace JAX, nor our marshaller. So the arguments are taken apart in operations that it can trace, and a
function that it puts into its graph as it is runs the real entry, on fake tensors, where the op of `_in_torch` knows
what to do. That function takes tensors, numbers and the structure around them as nested tuples of constants, and
returns tensors; whatever else is an argument travels as the name of an entry in a table, and the structure of the
result is fetched from one afterwards.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from interop._errors import ContainerError, UnsupportedError
from interop._marshal import Kind, flatten
from interop._private import jax as jax_private
from interop._private import torch as torch_private
from interop._registered import LEAVES, Unwrapped, unwrapped

_ENTRIES: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_tokens = itertools.count()


class _Traced(threading.local):
    structure: Any = None


_traced = _Traced()


def register(entry: Any) -> str:
    """The name by which compiled code calls this entry; it lives as long as whoever registered it."""
    name = f"entry{next(_tokens)}"
    _ENTRIES[name] = entry
    return name


# --- traced by Dynamo -------------------------------------------------------------------------------------------------


def call(name: str, jittable: bool, args: Any, kwargs: Any) -> Any:
    """Called by code that Dynamo traces: everything here is traced too, but for the functions marked constant."""
    _prepare()
    if not jittable:
        return _eager(name, args, kwargs)
    leaves: list[Any] = []
    structure = _take_apart((args, kwargs), leaves)
    outs = _opaque(name, structure, *leaves)
    return _put_together(_structure(), outs)


def _take_apart(x: Any, leaves: list[Any]) -> Any:
    """The structure of a value, in nested tuples of constants; its tensors and numbers go to the leaves."""
    names = _functions_of_leaf(type(x))
    if names:
        return _opened(x, names, leaves)
    if isinstance(x, torch.Tensor) or (isinstance(x, int | float | complex) and not isinstance(x, bool)):
        leaves.append(x)
        return ("leaf", len(leaves) - 1)
    if isinstance(x, np.ndarray):
        leaves.append(torch.from_numpy(x))
        return ("leaf", len(leaves) - 1)
    if x is None or isinstance(x, bool | str):
        return ("static", x)
    if type(x) is dict:
        return ("dict", *[(key, _take_apart(value, leaves)) for key, value in x.items()])
    if type(x) is list:
        return ("list", *[_take_apart(value, leaves) for value in x])
    if type(x) is tuple:
        return ("tuple", *[_take_apart(value, leaves) for value in x])
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return ("named", str(_intern(type(x))), *[_take_apart(value, leaves) for value in x])
    if hasattr(type(x), "__dataclass_fields__") and _is_plain_dataclass(type(x)):
        fields = [(field, _take_apart(getattr(x, field), leaves)) for field in _fields(type(x))]
        return ("dataclass", str(_intern(type(x))), *fields)
    names = _functions_of_container(type(x))
    return _opened(x, names, leaves) if names else ("passed", str(_intern(x)))


def _opened(x: Any, names: Any, leaves: list[Any]) -> Any:
    """The structure of an object of a registered type, by the functions that it was registered with."""
    children, static = getattr(_Interned, names[0])(x)
    parts = [_take_apart(child, leaves) for child in children]
    return ("registered", names[1], _take_static(static), *parts)


def _take_static(x: Any) -> Any:
    """The structure of what holds no leaf."""
    if type(x) is tuple:
        return ("tuple", *[_take_static(item) for item in x])
    return ("static", x) if isinstance(x, bool | int | float | str) or x is None else ("passed", str(_intern(x)))


def _put_together(structure: Any, leaves: Sequence[Any]) -> Any:
    """The value of a structure."""
    kind = structure[0]
    if kind == "leaf":
        return leaves[structure[1]]
    if kind == "static":
        return structure[1]
    if kind == "passed":
        return getattr(_Interned, structure[1])
    if kind == "dict":
        return {key: _put_together(value, leaves) for key, value in structure[1:]}
    if kind == "dataclass":
        return getattr(_Interned, structure[1])(
            **{field: _put_together(value, leaves) for field, value in structure[2:]}
        )
    if kind == "named":
        return getattr(_Interned, structure[1])(*[_put_together(value, leaves) for value in structure[2:]])
    if kind == "registered":
        static, *children = [_put_together(value, leaves) for value in structure[2:]]
        return getattr(_Interned, structure[1])(children, static)
    items = [_put_together(value, leaves) for value in structure[1:]]
    return tuple(items) if kind == "tuple" else items


# --- run by Dynamo, not traced ----------------------------------------------------------------------------------------


def _opaque_body(name: str, structure: Any, *leaves: Any) -> tuple[torch.Tensor, ...]:
    args, kwargs = _put_together(_fixed(structure), leaves)
    with torch_private.constants_allowed():  # an array of JAX or numpy among the arguments
        outs, tree = _ENTRIES[name].flat_call(args, kwargs)
    _traced.structure = _constant(unwrapped(tree, [_Leaf(i) for i in range(len(tree.kinds))]) if tree else ())
    return tuple(outs)


def _fixed(x: Any) -> Any:
    """The structure with its numbers fixed for this graph."""
    if isinstance(x, tuple):
        return tuple(map(_fixed, x))
    return torch_private.concrete(x)


def _eager_body(name: str, args: Any, kwargs: Any) -> Any:
    outs, tree = _ENTRIES[name].flat_call(args, kwargs)
    return tree.unflatten(outs)


_opaque: Callable[..., Any] = _opaque_body
_eager: Callable[..., Any] = _eager_body


@torch_private.constant_result
def _prepare() -> None:
    """Make the bodies known to Dynamo, when there is a Dynamo: importing it earlier would cost every user a second."""
    global _opaque, _eager  # noqa: PLW0603 - once in a process
    if _opaque is _opaque_body:
        _opaque = torch.compiler.allow_in_graph(_opaque_body)
        _eager = torch.compiler.disable(_eager_body, reason="the crossing is not jittable: stack @jittable")


@torch_private.constant_result
def _structure() -> Any:
    """Of the call just traced: Dynamo has run it once on fakes, in this thread."""
    return _traced.structure


@torch_private.constant_result
def _fields(kind: type) -> tuple[str, ...]:
    return tuple(kind.__dataclass_fields__)  # type: ignore[attr-defined]


@torch_private.constant_result
def _is_plain_dataclass(kind: type) -> bool:
    """Whether its instances are made of its fields, by an `__init__` that Python wrote."""
    return bool(kind.__dataclass_params__.init) and not hasattr(kind, "tree_flatten")  # type: ignore[attr-defined]


@torch_private.constant_result
def _functions_of_leaf(kind: type) -> tuple[str, str] | None:
    """The names of what opens an object of a registered leaf, and of what stands for it on its way."""
    found = LEAVES.get(kind)
    return found and (_intern(found.take_apart), _intern(found.stand_for))


@torch_private.constant_result
def _functions_of_container(kind: type) -> tuple[str, str] | None:
    """The same of a container that is registered with either framework: what opens it, and what makes it again."""
    found = _registered(kind)
    return found and (_intern(found[0]), _intern(found[1]))


def _registered(kind: type) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    return torch_private.pytree_functions(kind) or jax_private.pytree_functions(kind)


# --- what can't be a constant of a graph ------------------------------------------------------------------------------

_CAPACITY = 4096
_names: OrderedDict[Any, str] = OrderedDict()


class _Interned:
    """The values by their names: attributes, which Dynamo can look up and guard one by one."""


@torch_private.constant_result
def _intern(value: Any) -> str:
    """The name of a value that passes by a graph; the last of them are kept, for the graphs that name them."""
    leaves, tree = flatten(value, numbers_static=True)
    if Kind.TENSOR in tree.kinds:
        raise ContainerError(
            f"a {type(value).__qualname__} that holds a tensor can't be opened inside torch.compile",
            hint="Pass a tuple, list, dict, named tuple or dataclass there",
        )
    key = (type(value), value) if not leaves and _is_hashable(value) else (type(value), id(value))
    name = _names.get(key)
    if name is None:
        name = _names[key] = f"value{next(_tokens)}"
        setattr(_Interned, name, value)
        if len(_names) > _CAPACITY:
            delattr(_Interned, _names.popitem(last=False)[1])
    return name


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


class _Leaf:
    """Stands for an output while its structure is written down."""

    def __init__(self, index: int) -> None:
        self.index = index


def _constant(value: Any) -> Any:
    """The structure of a result in nested tuples of constants."""
    kind = type(value)
    if kind is _Leaf:
        return ("leaf", value.index)
    if kind is Unwrapped:
        build = _intern(LEAVES[value.type].put_together)
        return ("registered", build, _take_static(value.static), _constant(value.value))
    if kind is dict:
        return ("dict", *((key, _constant(item)) for key, item in value.items()))
    if kind in (tuple, list):
        return (kind.__name__, *map(_constant, value))
    if value is None or kind in (bool, int, float, str):
        return ("static", value)
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return ("named", _intern(kind), *map(_constant, value))
    if hasattr(kind, "__dataclass_fields__") and _is_plain_dataclass(kind):
        return ("dataclass", _intern(kind), *((field, _constant(getattr(value, field))) for field in _fields(kind)))
    found = _registered(kind)
    if found:
        children, static = found[0](value)
        return ("registered", _intern(found[1]), _take_static(static), *map(_constant, children))
    raise UnsupportedError(
        f"a result of type {kind.__qualname__} can't be rebuilt inside torch.compile",
        hint="Return a tuple, list, dict, named tuple or dataclass there",
    )
