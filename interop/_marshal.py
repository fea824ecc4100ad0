"""The plan of a call: `(leaves, Spec)` and back.

One pass over the arguments appends leaves to one list and tokens to another. The tokens, as a tuple, are the structure:
hashable, with the order of dicts and the types of statics in it. A structure is understood once, and
kept in a bounded cache.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.core
import numpy as np
import torch

from interop._closed_over import first, slots_of
from interop._containers import NAMES, OPENERS, Container, opener_for
from interop._errors import ContainerError
from interop._leaf import describe
from interop._private import jax as jax_private
from interop._signature import compile_binder, signature_of
from interop._symbolic import Symbolic


class Kind(enum.IntEnum):
    """What a leaf is. All but STATIC are dynamic: they are leaves of the call, and not part of its structure."""

    TENSOR = 0
    ARRAY = 1
    NUMPY = 2
    NUMBER = 3
    KEY = 4
    STATIC = 5


KINDS: dict[type, Kind | None] = {  # None: a container, or not met yet
    torch.Tensor: Kind.TENSOR,
    torch.nn.Parameter: Kind.TENSOR,
    np.ndarray: Kind.NUMPY,
    int: Kind.NUMBER,
    float: Kind.NUMBER,
    complex: Kind.NUMBER,
    torch.SymInt: Kind.NUMBER,
    torch.SymFloat: Kind.NUMBER,
    bool: Kind.STATIC,
    str: Kind.STATIC,
    bytes: Kind.STATIC,
    type(None): Kind.STATIC,
}


def _kind(x: Any) -> Kind | None:
    """The kind of a leaf, by its type; None for what may be a container."""
    t = type(x)
    if isinstance(x, torch.Tensor):  # of a subclass, which may be registered later: not remembered
        return Kind.TENSOR
    if isinstance(x, np.ndarray):
        return Kind.NUMPY
    if t is jax_private.ArrayImpl:
        kind = Kind.ARRAY
    elif isinstance(x, jax.Array):  # a tracer, or a typed key
        return Kind.KEY if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else Kind.ARRAY
    elif isinstance(x, np.generic):
        kind = Kind.NUMPY
    elif isinstance(x, torch.fx.Proxy):
        raise Symbolic(x)
    elif isinstance(x, enum.Enum | torch.dtype | torch.device | torch.Size | np.dtype | type):
        kind = Kind.STATIC
    else:
        return None
    KINDS[t] = kind
    return kind


# --- structure --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StaticLeaf:
    """A static leaf: compared by type and value, floats and complex by their bits (0.0 is not -0.0, nan is nan)."""

    type: type
    key: Any
    value: Any = dataclasses.field(compare=False)


_ARRAYS = frozenset({Kind.TENSOR, Kind.ARRAY, Kind.NUMPY})


class _Flattener:
    """One pass over a pytree."""

    def __init__(self, *, numbers_static: bool) -> None:
        self.leaves: list[Any] = []
        self.tokens: list[Any] = []
        self.numbers_static = numbers_static

    def add(self, x: Any) -> None:
        t = type(x)
        kind = KINDS.get(t)
        if kind is None:
            if t not in OPENERS:
                kind = _kind(x)
            opener = opener_for(x) if kind is None else None
            if opener is not None:
                container, children = opener(x)
                self.tokens.append(container)
                self.add_all(children)
                return
        if kind is None:
            self.tokens.append(_opaque(x))
        elif kind is Kind.STATIC or (kind is Kind.NUMBER and self.numbers_static):
            self.tokens.append(static_leaf(x))
        else:
            self.leaves.append(x)
            self.tokens.append(kind)

    def add_all(self, values: Collection[Any]) -> None:
        kinds = tuple(map(KINDS.get, map(type, values)))
        if _ARRAYS.issuperset(kinds):  # what `add` does with each of them
            self.leaves.extend(values)
            self.tokens.extend(kinds)
        else:
            for value in values:
                self.add(value)


def static_leaf(x: Any) -> StaticLeaf:
    """A value as a static leaf."""
    return StaticLeaf(type(x), _key(x), x)


def _key(x: Any) -> Any:
    """What is equal for values of one type that are the same; also in a tuple, 1 is neither 1.0 nor True."""
    if isinstance(x, float | complex):
        return repr(x)
    if isinstance(x, tuple | frozenset):
        return (tuple if isinstance(x, tuple) else frozenset)((type(item), _key(item)) for item in x)
    return x


def _opaque(x: Any) -> StaticLeaf:
    """A leaf that is neither value nor container: static, if it is hashable and hides nothing."""
    hidden = _hidden(x)
    if hidden:
        raise ContainerError(
            f"a {type(x).__qualname__} hides {hidden} and can't be opened",
            hint=_way_out(x),
        )
    try:
        hash(x)
    except TypeError:
        if isinstance(x, jax.core.Tracer):
            raise ContainerError(
                "a static argument that is traced", hint="Make it static there too: jax.jit(f, static_argnames=...)"
            ) from None
        raise ContainerError(
            f"a {type(x).__qualname__} is neither a value, a known container, nor hashable",
            hint="Register it with jax.tree_util, or pass its parts",
        ) from None
    return static_leaf(x)


def _blame(x: Any) -> tuple[str, ContainerError] | None:
    """Where in a pytree the object is that can't be flattened, and why; None if there is none."""
    opener = None if type(x) in KINDS else opener_for(x)
    try:
        if opener is None:
            flatten(x)
            return None
        container, children = opener(x)
    except ContainerError as error:
        return "", error
    for name, child in zip(container.names, children, strict=True):
        found = _blame(child)
        if found:
            return name + found[0], found[1]
    return None


def _way_out(x: Any) -> str:
    if isinstance(x, torch.nn.Module):
        return "Pass its parameters: torch.func.functional_call(module, params, args)"
    if _is_cache(x):
        return "Call the model with use_cache=False"
    return "Register it with jax.tree_util, or pass its parts"


def _hidden(x: Any) -> str | None:
    """What value an opaque object holds, looking into containers and one level of its attributes."""
    if isinstance(x, type | types.FunctionType | types.ModuleType | types.BuiltinFunctionType):
        return None
    inside = list(getattr(x, "__dict__", {}).items())
    kind: Any = type(x)
    inside += [(n, getattr(x, n, None)) for n in slots_of(kind)]
    if isinstance(x, set | frozenset | collections.abc.Mapping):
        inside += [(str(k), v) for k, v in (x.items() if isinstance(x, collections.abc.Mapping) else enumerate(x))]
    for name, value in inside:
        found = first(value, _is_value)
        if found is not None:
            return f"{describe(found[1])} in .{name}{found[0]}"
    return "the keys and values of its layers" if _is_cache(x) else None


def _is_cache(x: Any) -> bool:
    """Whether it is a cache of keys and values of transformers, which hides them two levels deep."""
    return type(x).__module__.startswith("transformers.") and type(x).__name__.endswith("Cache")


def _is_value(x: Any) -> bool:
    return isinstance(x, torch.Tensor | jax.Array | np.ndarray)


# --- trees ------------------------------------------------------------------------------------------------------------


class Tree:
    """The structure of one pytree: hashable, with its statics inside.

    Attributes:
        kinds: of the dynamic leaves, in order.
        single: whether the tree is one dynamic leaf and nothing else.
    """

    def __init__(self, tokens: tuple[Any, ...]) -> None:
        self.tokens = tokens
        self.kinds = tuple(token for token in tokens if type(token) is Kind)
        self.single = len(tokens) == 1 and len(self.kinds) == 1
        self._hash = hash(tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tree) and self.tokens == other.tokens

    def __hash__(self) -> int:
        return self._hash

    def __deepcopy__(self, memo: dict[int, Any]) -> Tree:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """By a pytree of this structure, which pickles where its containers do."""
        return _tree_of, (self.unflatten([np.zeros(0)] * len(self.kinds)), self.kinds)

    def matches(self, other: Tree) -> bool:
        """Whether the other has the same containers and statics, whatever kinds of leaves."""
        mine, theirs = ([Kind if type(token) is Kind else token for token in tree.tokens] for tree in (self, other))
        return mine == theirs

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """The pytree with these dynamic leaves."""
        return self.take(iter(leaves))

    @functools.cached_property
    def take(self) -> Callable[[Iterator[Any]], Any]:
        """The function that makes the pytree of the next leaves of an iterator."""
        return _taker(iter(self.tokens))

    def path(self, index: int) -> str:
        """Where a dynamic leaf is: `['w'][0]`, `.field`."""
        return self.paths()[index]

    def paths(self) -> list[str]:
        """Where each dynamic leaf is."""
        return ["".join(route) for route in self.routes()]

    def routes(self) -> list[tuple[str, ...]]:
        """The same in its parts, one for each container."""
        return [route for route, token in self.places() if type(token) is Kind]

    def places(self) -> list[tuple[tuple[str, ...], Kind | StaticLeaf]]:
        """Where each leaf is, static ones too, in its parts; and what it is."""
        found: list[tuple[tuple[str, ...], Kind | StaticLeaf]] = []
        _walk_places(iter(self.tokens), (), found)
        return found


def _taker(tokens: Iterator[Any]) -> Callable[[Iterator[Any]], Any]:
    token = next(tokens)
    if type(token) is Kind:
        return next
    if type(token) is StaticLeaf:
        value = token.value
        return lambda _: value
    build, children = token.build, [_taker(tokens) for _ in token.names]
    if all(child is next for child in children):
        count = len(children)
        return lambda leaves: build(list(itertools.islice(leaves, count)))
    return lambda leaves: build([child(leaves) for child in children])


def _walk_places(tokens: Iterator[Any], route: tuple[str, ...], found: list[Any]) -> None:
    token = next(tokens)
    if type(token) is Container:
        for name in token.names:
            _walk_places(tokens, (*route, name), found)
    else:
        found.append((route, token))


def flatten(tree: object, *, numbers_static: bool = False) -> tuple[list[Any], Tree]:
    """The dynamic leaves of a pytree, and its structure.

    Raises:
        ContainerError: something that can't be opened hides a value, or is not hashable.
    """
    single = _SINGLE.get(type(tree))
    if single is not None:
        return [tree], single
    flattener = _Flattener(numbers_static=numbers_static)
    flattener.add(tree)
    return flattener.leaves, Tree(tuple(flattener.tokens))


def _tree_of(hollow: Any, kinds: tuple[Kind, ...]) -> Tree:
    """The structure of a pytree whose leaves are of these kinds."""
    rest = iter(kinds)
    return Tree(tuple(next(rest) if type(t) is Kind else t for t in flatten(hollow, numbers_static=True)[1].tokens))


SINGLE_TENSOR = Tree((Kind.TENSOR,))
_SINGLE: dict[type, Tree] = {torch.Tensor: SINGLE_TENSOR, torch.nn.Parameter: SINGLE_TENSOR}


def where(tree: object) -> str:
    """The path of what `flatten` refused in this pytree."""
    found = _blame(tree)
    return found[0] if found else ""


# --- calls ------------------------------------------------------------------------------------------------------------


class Spec:
    """The structure of one call. One object for each structure, from a bounded cache; compared by identity.

    Attributes:
        positional: how many arguments are positional; the others are keywords.
        names: of the parameters, one for each argument.
        trees: the structure of each argument.
        kinds: of the dynamic leaves, in order.
        argnames: the parameter that each dynamic leaf belongs to.
        memo: free for whoever calls: what was made for this structure.
        direct: of that, what a call runs with its leaves as they are; None until it is known.
        plain: whether every argument is positional, and a leaf.
        shallow: whether all arguments may be leaves, or dicts of leaves, that their types tell.
    """

    __slots__ = ("argnames", "direct", "kinds", "memo", "names", "plain", "positional", "shallow", "trees")

    def __init__(self, positional: int, names: tuple[str, ...], trees: tuple[Tree, ...]) -> None:
        self.positional = positional
        self.names = names
        self.trees = trees
        self.kinds = tuple(kind for tree in trees for kind in tree.kinds)
        self.argnames = tuple(n.partition("[")[0] for n, tree in zip(names, trees, strict=True) for _ in tree.kinds)
        self.memo: dict[Any, Any] = {}
        self.direct: Any = None
        self.plain = positional == len(trees) and all(tree.single for tree in trees)
        self.shallow = False

    def unflatten(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments, as the function is to be called."""
        if self.plain:
            return tuple(leaves), {}
        rest = iter(leaves)
        values = [tree.take(rest) for tree in self.trees]
        keywords = dict(zip(self.names[self.positional :], values[self.positional :], strict=True))
        return tuple(values[: self.positional]), keywords

    def path(self, index: int) -> str:
        """Where a dynamic leaf is, from its parameter's name: `x['w'][0]`."""
        return [n + p for n, tree in zip(self.names, self.trees, strict=True) for p in tree.paths()][index]


class Marshaller:
    """Flattens the calls of one function."""

    def __init__(
        self, fn: Callable[..., Any], *, name: str, static_argnames: Collection[str] = (), capacity: int = 256
    ) -> None:
        self.signature: inspect.Signature = signature_of(fn)
        self.bind, self.names = compile_binder(self.signature, name)
        self.static = frozenset(static_argnames)
        self.specs: dict[tuple[Any, ...], Spec] = {}
        # The same by the types of positional arguments that are leaves, or dicts of leaves, by far the commonest: that
        # they can be bound is known then, and what the leaves are.
        self.plain: dict[tuple[type, ...], Spec] = {}
        self.shallow: dict[tuple[Any, ...], Spec] = {}
        self.capacity = capacity

    def flatten_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Spec]:
        """Bind, apply defaults, flatten; returns the dynamic leaves and the structure.

        Raises:
            TypeError: Python's own, under the function's name, for a call that does not fit its signature.
            ContainerError: an argument that can't be opened.
        """
        if self.shallow and not kwargs:
            leaves, shape = _look(args)
            spec = self.shallow.get(shape)
            if spec is not None:
                return leaves, spec
        positional, keywords = self.bind(*args, **kwargs)
        flattener = _Flattener(numbers_static=False)
        tokens = flattener.tokens
        try:
            if self.static:
                self._add_with_statics(flattener, positional, keywords)
            else:
                flattener.add_all(positional)
                for name in keywords:
                    tokens.append(name)
                    flattener.add(keywords[name])
        except ContainerError as error:
            error.argument = self._guilty(positional, keywords)
            raise
        key = tuple(tokens)
        spec = self.specs.get(key)
        if spec is None:
            spec = self._understand(key, positional, keywords)
            spec.shallow = not (kwargs or self.static)
        if spec.shallow and not kwargs:
            self._remember(args, len(flattener.leaves), spec)
        return flattener.leaves, spec

    def _remember(self, args: tuple[Any, ...], count: int, spec: Spec) -> None:
        """Remember the structure of a call whose leaves, so many, are its arguments and what is in dicts."""
        leaves, shape = _look(args)
        names = (type(key) for x in args if type(x) is dict for key in x)
        kinds = map(KINDS.get, map(type, leaves))
        # Other keys are not kept alive.
        spec.shallow = len(leaves) == count and _DYNAMIC.issuperset(kinds) and NAMES.issuperset(names)
        if spec.shallow:
            known = self.plain if spec.plain else self.shallow
            if len(known) >= self.capacity:
                known.clear()
            known[shape] = spec

    def _add_with_statics(self, flattener: _Flattener, positional: Sequence[Any], keywords: dict[str, Any]) -> None:
        for name, value in self._named(positional, keywords):
            if name in keywords:
                flattener.tokens.append(name)
            if name.partition("[")[0] in self.static:
                flattener.tokens.append(_opaque(value))
            else:
                flattener.add(value)

    def _named(self, positional: Sequence[Any], keywords: dict[str, Any]) -> list[tuple[str, Any]]:
        count = len(self.names) - 1
        names = [self.names[i] if i < count else f"{self.names[-1]}[{i - count}]" for i in range(len(positional))]
        return [*zip(names, positional, strict=True), *keywords.items()]

    def _guilty(self, positional: Sequence[Any], keywords: dict[str, Any]) -> str | None:
        """The first argument that can't be flattened, by name."""
        for name, value in self._named(positional, keywords):
            found = ("", None) if name in self.static else _blame(value)
            if found:
                return name + found[0]
        return None

    def _understand(self, key: tuple[Any, ...], positional: Sequence[Any], keywords: dict[str, Any]) -> Spec:
        named = self._named(positional, keywords)
        static = self.static
        trees = [Tree((_opaque(v),)) if n.partition("[")[0] in static else flatten(v)[1] for n, v in named]
        spec = Spec(len(positional), tuple(n for n, _ in named), tuple(trees))
        if len(self.specs) >= self.capacity:
            del self.specs[next(iter(self.specs))]
            self.plain.clear()
            self.shallow.clear()
        self.specs[key] = spec
        return spec


_DYNAMIC = frozenset(Kind) - {Kind.STATIC}


def _look(args: tuple[Any, ...]) -> tuple[list[Any], tuple[Any, ...]]:
    """The arguments, and the values of those that are dicts; and the types of all, with the keys of the dicts."""
    leaves: list[Any] = []
    shape: list[Any] = []
    for x in args:
        if type(x) is dict:
            values = x.values()
            leaves += values
            shape.append((*x, *map(type, x), *map(type, values)))
        else:
            leaves.append(x)
            shape.append(type(x))
    return leaves, tuple(shape)
