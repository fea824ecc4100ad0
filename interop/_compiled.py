"""A crossing inside `torch.compile`: Dynamo sees one opaque call of flat values, and rebuilds the result around it.

Dynamo can't trace JAX, nor our marshaller. `torch._dynamo.nonstrict_trace` runs the real entry on fake tensors instead,
where the op of `_in_torch` knows what to do. It admits tensors, numbers and strings in containers, and returns tensors:
whatever else is an argument travels as the name of an entry in a table, and the structure of the result is fetched from
one afterwards.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as torch_pytree

from interop._errors import UnsupportedError
from interop._marshal import Tree
from interop._private import torch as torch_private

_MARK = "\0interop:"  # no user's string starts so
_ENTRIES: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_tokens = itertools.count()
_passed: dict[str, Any] = {}


class _Traced(threading.local):
    structure: Any = None


_traced = _Traced()


def register(entry: Any) -> str:
    """The name by which compiled code calls this entry; it lives as long as whoever registered it."""
    name = f"entry{next(_tokens)}"
    _ENTRIES[name] = entry
    return name


def call(name: str, jittable: bool, args: Any, kwargs: Any) -> Any:
    """Called by code that Dynamo traces: everything here is traced too, but for the functions marked constant."""
    _prepare()
    if not jittable:
        return _eager(name, args, kwargs)
    args, kwargs = torch_pytree.tree_map(_encode, (args, kwargs))
    outs = _opaque(name, args, kwargs)
    return _rebuild(_structure(), outs)


def _encode(leaf: Any) -> Any:
    return leaf if isinstance(leaf, torch.Tensor | int | float | complex) else str(_intern(leaf))


def _rebuild(structure: Any, outs: Sequence[Any]) -> Any:
    """The result from its leaves, in operations that Dynamo can trace."""
    kind, rest = structure[0], structure[1:]
    if kind == "leaf":
        return outs[rest[0]]
    if kind == "static":
        return rest[0]
    if kind == "dict":
        return {key: _rebuild(value, outs) for key, value in rest}
    items = [_rebuild(value, outs) for value in rest]
    return tuple(items) if kind == "tuple" else items


# --- run by Dynamo, not traced ----------------------------------------------------------------------------------------


def _opaque_body(name: str, args: Any, kwargs: Any) -> list[torch.Tensor]:
    args, kwargs = torch_pytree.tree_map(lambda x: _passed.get(x, x) if type(x) is str else x, (args, kwargs))
    outs, tree = _ENTRIES[name].flat_call(args, kwargs)
    _traced.structure = _constant_structure(tree)
    return list(outs)


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
        _opaque = torch_private.nonstrict_trace(_opaque_body)
        _eager = torch.compiler.disable(_eager_body, reason="the crossing is not jittable: stack @jittable")


@torch_private.constant_result
def _intern(value: Any) -> str:
    name = f"{_MARK}{type(value).__qualname__}:{id(value)}"
    _passed[name] = value
    return name


@torch_private.constant_result
def _structure() -> Any:
    """Of the call just traced: Dynamo has run it once on fakes, in this thread."""
    return _traced.structure


def _constant_structure(tree: Tree | None) -> Any:
    """The structure of the outputs as nested tuples of constants."""
    if tree is None:
        return ("tuple",)
    count = len(tree.kinds)
    return _constant(tree.unflatten([_Leaf(i) for i in range(count)]))


class _Leaf:
    """Stands for an output while its structure is written down."""

    def __init__(self, index: int) -> None:
        self.index = index


def _constant(value: Any) -> Any:
    if type(value) is _Leaf:
        return ("leaf", value.index)
    if type(value) is dict:
        return ("dict", *((key, _constant(item)) for key, item in value.items()))
    if type(value) in (tuple, list):
        return (type(value).__name__, *map(_constant, value))
    if value is None or type(value) in (bool, int, float, str):
        return ("static", value)
    raise UnsupportedError(
        f"a result of type {type(value).__qualname__} can't be rebuilt inside torch.compile",
        hint="Return a tuple, list or dict there",
    )
