"""Containers: how one level of each type is opened, and rebuilt from its children.

A table of openers by type, which grows as types are met: what JAX knows, what torch knows, dataclasses, in this order.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax

from interop._private import torch as torch_private


@dataclasses.dataclass(frozen=True)
class Container:
    """How one type of container is rebuilt from its children; equal when it would be rebuilt alike."""

    type: type
    aux: Any
    names: tuple[str, ...]  # of the children, as they read in an argument path
    build: Callable[[list[Any]], Any] = dataclasses.field(compare=False)

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.type, self.aux, self.names))

    def __hash__(self) -> int:
        return self._hash

    @property
    def count(self) -> int:
        return len(self.names)


def bounded(memo: dict[Any, Any], key: Any, make: Callable[[], Any], capacity: int = 64) -> Any:
    """What was made for this key; the oldest goes when there are too many."""
    found = memo.get(key)
    if found is None:
        if len(memo) > capacity:
            memo.pop(next(k for k in list(memo) if isinstance(k, tuple)), None)  # another thread may have been here
        found = memo[key] = make()
    return found


Opened = tuple[Container, Collection[Any]]

# What the containers of one shape have in common is made once.
_once: Any = functools.partial(functools.lru_cache, maxsize=1024)


def _open_mapping(x: Any) -> Opened:
    container = _mapping if NAMES.issuperset(map(type, x)) else _mapping.__wrapped__  # other keys are not kept alive
    return container(type(x), *x), x.values()


NAMES = frozenset({str, int})


@_once()
def _mapping(t: Any, *keys: Any) -> Container:
    return Container(t, _typed(keys), _names_of(keys), lambda c: t(zip(keys, c, strict=True)))


def _open_defaultdict(x: Any) -> Opened:
    keys, factory = tuple(x), x.default_factory
    t, aux = collections.defaultdict, (factory, _typed(keys))
    return Container(t, aux, _names_of(keys), lambda c: t(factory, zip(keys, c, strict=True))), x.values()


def _typed(keys: tuple[Any, ...]) -> tuple[tuple[type, Any], ...]:
    return tuple([(type(k), k) for k in keys])


def _names_of(keys: Iterable[Any]) -> tuple[str, ...]:
    return tuple([f"[{k!r}]" for k in keys])


def _open_sequence(x: Any) -> Opened:
    return _sequence(type(x), len(x)), x


@_once()
def _sequence(t: Any, count: int) -> Container:
    return Container(t, None, _names_of(range(count)), t)


def _open_deque(x: Any) -> Opened:
    maxlen = x.maxlen
    return Container(collections.deque, maxlen, _names_of(range(len(x))), lambda c: collections.deque(c, maxlen)), x


def _open_slice(x: slice) -> Opened:
    parts = (x.start, x.stop, x.step)
    if all(p is None or isinstance(p, int) for p in parts):
        return Container(slice, parts, (), lambda _: slice(*parts)), ()
    return Container(slice, None, (".start", ".stop", ".step"), lambda c: slice(*c)), parts


def _open_named(x: Any) -> Opened:
    return _named(type(x)), tuple(x)


@_once()
def _named(t: Any) -> Container:
    return Container(t, None, tuple(f".{n}" for n in t._fields), lambda c: t(*c))


def _open_struct(x: Any) -> Opened:
    """A result of torch with named fields (`torch.return_types`)."""
    return _struct(type(x)), tuple(x)


@_once()
def _struct(t: Any) -> Container:
    return Container(t, None, tuple(f".{n}" for n in t.__match_args__), t)


def _open_registered(x: Any) -> Opened:
    """One level of a pytree that JAX knows."""

    def is_child(y: Any) -> bool:
        return y is not x

    treedef: Any
    children, treedef = jax.tree.flatten(x, is_leaf=is_child)

    def container() -> Container:
        paths, _ = jax.tree_util.tree_flatten_with_path(x, is_leaf=is_child)
        names = tuple(jax.tree_util.keystr(path) for path, _ in paths)
        return Container(type(x), treedef, names, treedef.unflatten)

    return bounded(_REGISTERED, (type(x), treedef), container, 128), children


_REGISTERED: dict[Any, Container] = {}


def _open_dataclass(x: Any) -> Opened:
    """A dataclass that is not registered, by its fields; its `__init__` may be its own, so that is not called."""
    t: Any = type(x)
    fields = tuple(f.name for f in dataclasses.fields(x) if hasattr(x, f.name))

    def build(children: list[Any]) -> Any:
        new = t.__new__(t)
        for name, child in zip(fields, children, strict=True):
            object.__setattr__(new, name, child)
        return new

    return Container(t, None, tuple(f".{n}" for n in fields), build), [getattr(x, n) for n in fields]


def _open_torch_registered(take_apart: Callable[..., Any], put_together: Callable[..., Any], x: Any) -> Opened:
    """One level of a pytree that torch knows (ModelOutput, TensorDict, a user's own)."""
    children, context = take_apart(x)
    names = _names_of(x.keys() if isinstance(x, dict) else range(len(children)))
    return Container(type(x), _hashable(context), names, lambda c: put_together(c, context)), children


def _open_batch_encoding(x: Any) -> Opened:
    t, keys = type(x), tuple(x.data)
    return Container(t, keys, _names_of(keys), lambda c: t(dict(zip(keys, c, strict=True)))), list(x.data.values())


def _hashable(context: Any) -> Any:
    try:
        hash(context)
    except TypeError:
        return repr(context)
    return context


OPENERS: dict[type, Callable[[Any], Opened]] = {
    dict: _open_mapping,
    tuple: _open_sequence,
    list: _open_sequence,
    collections.OrderedDict: _open_mapping,
    collections.defaultdict: _open_defaultdict,
    collections.deque: _open_deque,
    slice: _open_slice,
}


def is_container(x: Any) -> bool:
    """Whether it is a container of JAX, or registered here."""
    return type(x) in OPENERS or jax.tree_util.all_leaves([x]) is False


def open_container(x: Any) -> Any:
    """How this container is rebuilt from its children."""
    opener: Any = opener_for(x)
    return opener(x)[0]


def opener_for(x: Any) -> Callable[[Any], Opened] | None:
    """How to open a container; None for what is none.

    JAX's registry comes before dataclasses: an equinox module is one, with an `__init__` of its own.
    """
    t = type(x)
    if t in OPENERS:
        return OPENERS[t]
    if isinstance(x, tuple) and hasattr(t, "_fields"):
        return _open_named
    if isinstance(x, tuple) and t.__module__ == "torch.return_types":
        if jax.tree_util.all_leaves([x]):
            _register(t, _open_struct)
        OPENERS[t] = _open_struct
        return _open_struct
    if jax.tree_util.all_leaves([x]) is False:
        return _open_registered
    transformers = sys.modules.get("transformers")
    is_encoding = transformers is not None and isinstance(x, transformers.BatchEncoding)
    functions = torch_private.pytree_functions(t)
    if functions or is_encoding:
        of_torch = functools.partial(_open_torch_registered, *(functions or ()))
        opener = _open_batch_encoding if is_encoding else of_torch
        if t.__module__.partition(".")[0] in _LIBRARIES:
            _register(t, opener)
            return _open_registered
        return opener
    return _open_dataclass if dataclasses.is_dataclass(x) else None


# What they made to be containers JAX learns of when it is first met, so that it can leave a `jax.jit`.
_LIBRARIES = ("transformers", "tensordict")


def _register(t: type, opener: Callable[[Any], Opened]) -> None:
    def flatten_with_keys(x: Any) -> Any:
        container, children = opener(x)
        return [(_Key(name), child) for name, child in zip(container.names, children, strict=True)], container

    jax.tree_util.register_pytree_with_keys(t, flatten_with_keys, lambda container, new: container.build(list(new)))


@dataclasses.dataclass(frozen=True)
class _Key:
    """A key of a path in a pytree, that reads as it does in our own."""

    name: str

    def __str__(self) -> str:
        return self.name
