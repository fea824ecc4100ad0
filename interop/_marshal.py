"""The plan of a call: `(leaves, Spec)` and back.

One pass over the arguments appends leaves to one list and tokens to another. The tokens, as a tuple, are the structure:
hashable, with the order of dicts and the types of statics in it. A structure is understood once (`_Node`s that rebuild
it) and kept in a bounded cache.
"""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import dis
import enum
import functools
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.core
import numpy as np
import torch

from interop._errors import ContainerError, OptionError
from interop._leaf import describe
from interop._private import jax as jax_private
from interop._private import torch as torch_private
from interop._signature import compile_binder, signature_of


class Kind(enum.IntEnum):
    """What a leaf is. All but STATIC are dynamic: they are leaves of the call, and not part of its structure."""

    TENSOR = 0
    ARRAY = 1
    NUMPY = 2
    NUMBER = 3
    KEY = 4
    STATIC = 5


_STATIC = Kind.STATIC
_KINDS: dict[type, Kind | None] = {  # None: a container, or not met yet
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
    elif isinstance(x, enum.Enum | torch.dtype | torch.device | torch.Size | np.dtype | type):
        kind = Kind.STATIC
    else:
        return None
    _KINDS[t] = kind
    return kind


# --- structure --------------------------------------------------------------------------------------------------------


def bounded(memo: dict[Any, Any], key: Any, make: Callable[[], Any], capacity: int = 64) -> Any:
    """What was made for this key; the oldest goes when there are too many."""
    found = memo.get(key)
    if found is None:
        if len(memo) > capacity:
            memo.pop(next(k for k in list(memo) if isinstance(k, tuple)), None)  # another thread may have been here
        found = memo[key] = make()
    return found


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
        kind = _KINDS.get(t)
        if kind is None:
            opener = _OPENERS.get(t)
            if opener is None:
                kind = _kind(x)
                opener = _opener_for(x) if kind is None else None
            if opener is not None:
                self.open(*opener(x))
                return
        if kind is None:
            self.tokens.append(_opaque(x))
        elif kind is Kind.STATIC or (kind is Kind.NUMBER and self.numbers_static):
            self.tokens.append(static_leaf(x))
        else:
            self.leaves.append(x)
            self.tokens.append(kind)

    def open(self, container: Container, children: Collection[Any]) -> None:
        self.tokens.append(container)
        kinds = tuple(map(_KINDS.get, map(type, children)))
        if _ARRAYS.issuperset(kinds):  # what `add` does with each of them
            self.leaves.extend(children)
            self.tokens.extend(kinds)
        else:
            for child in children:
                self.add(child)


def static_leaf(x: Any) -> StaticLeaf:
    """A value as a static leaf."""
    key = repr(x) if isinstance(x, float | complex) else x
    return StaticLeaf(type(x), key, x)


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
    opener = None if type(x) in _KINDS else _OPENERS.get(type(x)) or _opener_for(x)
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


@functools.lru_cache(maxsize=1024)
def slots_of(t: Any) -> list[str]:
    """The names of the attributes that objects of a type keep outside `__dict__`."""
    slots = [(base, getattr(base, "__slots__", ())) for base in t.__mro__]
    names = [(base, n) for base, ns in slots for n in ((ns,) if isinstance(ns, str) else ns)]
    private = lambda n: n.startswith("__") and not n.endswith("__")  # noqa: E731 - Python puts the class before it
    return [f"_{b.__name__.lstrip('_')}{n}" if private(n) else n for b, n in names if private(n) or n[:2] != "__"]


def first(x: Any, wanted: Callable[[Any], bool], depth: int = 0) -> tuple[str, Any] | None:
    """The first value in a container that is wanted, and where it is."""
    if wanted(x):
        return "", x
    if depth < _DEPTH and isinstance(x, dict | list | tuple | set | frozenset | collections.deque):
        for key, item in x.items() if isinstance(x, dict) else enumerate(x):
            found = first(item, wanted, depth + 1)
            if found:
                return f"[{key!r}]{found[0]}", found[1]
    return None


_DEPTH = 8  # deeper is the user's


def find_closed_over(
    fn: Any, wanted: Callable[[Any], bool], given: Collection[str] = (), *, follow: bool = False
) -> str | None:
    """The name of a value that a function reads and is not given: of its closure, globals, defaults, its `self`.

    Also of functions that it reads, if these are to be followed: not into libraries.
    """
    return _closed_over(fn, wanted, given, set() if follow else None)


def _closed_over(
    fn: Any, wanted: Callable[[Any], bool], given: Collection[str], followed: set[int] | None
) -> str | None:
    while isinstance(fn, functools.partial):
        found = first([*fn.args, {k: v for k, v in fn.keywords.items() if k not in given}], wanted)
        if found:
            return f"argument{found[0]} of the partial"
        fn = fn.func
    if hasattr(fn, "find_held"):  # a module, which knows what is its own
        return fn.find_held(wanted)
    owner = getattr(fn, "__self__", None) if isinstance(fn, types.MethodType) else fn
    for name, value in _attributes(owner):
        found = first(value, wanted)
        if found:
            return f"self.{name}{found[0]}"
    fn = getattr(fn, "__func__", fn)
    if not isinstance(fn, types.FunctionType):
        return None
    cells = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
    read = {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}
    read |= {name: fn.__globals__[name] for name in _globals_of(fn.__code__) if name in fn.__globals__}
    positional = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    defaults = dict(zip(reversed(positional), reversed(fn.__defaults__ or ()), strict=False))
    defaults |= fn.__kwdefaults__ or {}
    read |= {name: value for name, value in defaults.items() if name not in given}
    for name, value in read.items():
        found = first(value, wanted)
        if found:
            return f"{name}{found[0]}"
        if followed is not None and isinstance(value, types.FunctionType) and id(value) not in followed:
            followed.add(id(value))
            inner = None if _is_of_library(value) else _closed_over(value, wanted, (), followed)
            if inner:
                return f"{inner} of {name}"
    return None


def _is_of_library(fn: types.FunctionType) -> bool:
    return (fn.__module__ or "").partition(".")[0] in _KNOWN


_KNOWN = sys.stdlib_module_names | {"flax", "interop", "jax", "numpy", "torch", "torchvision", "transformers"}


@functools.lru_cache(maxsize=1024)
def _globals_of(code: types.CodeType) -> tuple[str, ...]:
    return tuple({i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"})


def _attributes(x: Any) -> list[tuple[str, Any]]:
    """The attributes of a plain object; the parameters of a module are constants of the function."""
    if x is None or isinstance(x, torch.nn.Module | type | types.FunctionType):
        return []
    kind: Any = type(x)
    return [*getattr(x, "__dict__", {}).items(), *((n, getattr(x, n, None)) for n in slots_of(kind))]


# --- containers -------------------------------------------------------------------------------------------------------

_Opened = tuple[Container, Collection[Any]]

# What the containers of one shape have in common is made once.
_once: Any = functools.partial(functools.lru_cache, maxsize=1024)


def _open_mapping(x: Any) -> _Opened:
    return _mapping(type(x), *x), x.values()


@_once(typed=True)  # 1 is not True
def _mapping(t: Any, *keys: Any) -> Container:
    build = lambda children: t(zip(keys, children, strict=True))  # noqa: E731
    return Container(t, _typed(keys), _names_of(keys), build)


def _open_defaultdict(x: Any) -> _Opened:
    keys, factory = tuple(x), x.default_factory
    build = lambda children: collections.defaultdict(factory, zip(keys, children, strict=True))  # noqa: E731
    return Container(collections.defaultdict, (factory, _typed(keys)), _names_of(keys), build), x.values()


def _typed(keys: tuple[Any, ...]) -> tuple[tuple[type, Any], ...]:
    return tuple([(type(k), k) for k in keys])


def _names_of(keys: Iterable[Any]) -> tuple[str, ...]:
    return tuple([f"[{k!r}]" for k in keys])


def _open_sequence(x: Any) -> _Opened:
    return _sequence(type(x), len(x)), x


@_once()
def _sequence(t: Any, count: int) -> Container:
    return Container(t, None, _names_of(range(count)), t)


def _open_deque(x: Any) -> _Opened:
    maxlen = x.maxlen
    return Container(collections.deque, maxlen, _names_of(range(len(x))), lambda c: collections.deque(c, maxlen)), x


def _open_slice(x: slice) -> _Opened:
    parts = (x.start, x.stop, x.step)
    if all(p is None or isinstance(p, int) for p in parts):
        return Container(slice, parts, (), lambda _: slice(*parts)), ()
    return Container(slice, None, (".start", ".stop", ".step"), lambda c: slice(*c)), parts


def _open_named(x: Any) -> _Opened:
    return _named(type(x)), tuple(x)


@_once()
def _named(t: Any) -> Container:
    return Container(t, None, tuple(f".{n}" for n in t._fields), lambda c: t(*c))


def _open_struct(x: Any) -> _Opened:
    """A result of torch with named fields (`torch.return_types`)."""
    t = type(x)
    return Container(t, None, _names_of(range(len(x))), t), tuple(x)


def _open_registered(x: Any) -> _Opened:
    """One level of a pytree that JAX knows."""
    is_child: Callable[[Any], bool] = lambda y: y is not x  # noqa: E731
    treedef: Any
    children, treedef = jax.tree.flatten(x, is_leaf=is_child)

    def container() -> Container:
        paths, _ = jax.tree_util.tree_flatten_with_path(x, is_leaf=is_child)
        names = tuple(jax.tree_util.keystr(path) for path, _ in paths)
        return Container(type(x), treedef, names, treedef.unflatten)

    return bounded(_REGISTERED, (type(x), treedef), container, 1024), children


_REGISTERED: dict[Any, Container] = {}


def _open_dataclass(x: Any) -> _Opened:
    """A dataclass that is not registered, by its fields; its `__init__` may be its own, so that is not called."""
    t: Any = type(x)
    fields = tuple(f.name for f in dataclasses.fields(x) if hasattr(x, f.name))

    def build(children: list[Any]) -> Any:
        new = t.__new__(t)
        for name, child in zip(fields, children, strict=True):
            object.__setattr__(new, name, child)
        return new

    return Container(t, None, tuple(f".{n}" for n in fields), build), [getattr(x, n) for n in fields]


def _open_torch_registered(take_apart: Callable[..., Any], put_together: Callable[..., Any], x: Any) -> _Opened:
    """One level of a pytree that torch knows (ModelOutput, TensorDict, a user's own)."""
    children, context = take_apart(x)
    names = _names_of(x.keys() if isinstance(x, dict) else range(len(children)))
    return Container(type(x), _hashable(context), names, lambda c: put_together(c, context)), children


def _open_batch_encoding(x: Any) -> _Opened:
    t, keys = type(x), tuple(x.data)
    return Container(t, keys, _names_of(keys), lambda c: t(dict(zip(keys, c, strict=True)))), list(x.data.values())


def _hashable(context: Any) -> Any:
    try:
        hash(context)
    except TypeError:
        return repr(context)
    return context


_OPENERS: dict[type, Callable[[Any], _Opened]] = {
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
    return type(x) in _OPENERS or jax.tree_util.all_leaves([x]) is False


def open_container(x: Any) -> Any:
    """How this container is rebuilt from its children."""
    opener: Any = _OPENERS.get(type(x)) or _opener_for(x)
    return opener(x)[0]


def _opener_for(x: Any) -> Callable[[Any], _Opened] | None:
    """How to open a container of a type not in the table.

    JAX's registry comes before dataclasses: an equinox module is one, with an `__init__` of its own.
    """
    t = type(x)
    if isinstance(x, tuple) and hasattr(t, "_fields"):
        return _open_named
    if isinstance(x, tuple) and hasattr(t, "n_sequence_fields"):
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


def _register(t: type, opener: Callable[[Any], _Opened]) -> None:
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


# --- registered leaves ------------------------------------------------------------------------------------------------

_T = TypeVar("_T")
_BUILT_IN = frozenset(_KINDS)


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
    if known in _OPENERS or known in _BUILT_IN or issubclass(known, jax.Array):
        raise OptionError(f"{known.__qualname__} can't be registered", hint="It crosses already")
    _KINDS.pop(known, None)
    LEAVES[leaf_type] = _Functions.of(leaf_type, unwrap, wrap)
    _OPENERS[leaf_type] = _open_leaf


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


def _open_leaf(x: Any) -> _Opened:
    t = type(x)
    made = LEAVES[t].unwrap(x)
    if type(made) is not tuple or len(made) != 2:
        raise ContainerError(f"unwrap of {t.__name__} returned no pair", got=describe(made), expected=_PAIR)
    return _open_unwrapped(Unwrapped(t, *made))


def _open_unwrapped(x: Unwrapped) -> _Opened:
    t, wrap = x.type, LEAVES[x.type].wrap
    if first(x.value, lambda y: type(y) is t):
        raise ContainerError(f"unwrap of {t.__name__} returned a {t.__name__} again", expected=_PAIR)
    leaves, static = flatten(x.static, numbers_static=True)
    if leaves:
        raise ContainerError(f"unwrap of {t.__name__} returned a static that holds a value",
                             got=describe(leaves[0]), expected=_PAIR)  # fmt: skip
    return Container(t, static, ("",), lambda c: wrap(c[0], static.unflatten(()))), (x.value,)


_PAIR = "(value, static)"
_OPENERS[Unwrapped] = _open_unwrapped


def unwrapped(tree: Tree, leaves: Sequence[Any]) -> Any:
    """The pytree with these leaves, and what is registered in its parts."""

    def left_open(token: Any) -> Any:
        if type(token) is not Container or token.type not in LEAVES:
            return token
        return dataclasses.replace(token, build=lambda c: Unwrapped(token.type, c[0], token.aux.unflatten(())))

    return Tree(tuple(map(left_open, tree.tokens))).unflatten(leaves)


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
    """

    __slots__ = ("argnames", "direct", "kinds", "memo", "names", "plain", "positional", "trees")

    def __init__(self, positional: int, names: tuple[str, ...], trees: tuple[Tree, ...]) -> None:
        self.positional = positional
        self.names = names
        self.trees = trees
        self.kinds = tuple(kind for tree in trees for kind in tree.kinds)
        self.argnames = tuple(n.partition("[")[0] for n, tree in zip(names, trees, strict=True) for _ in tree.kinds)
        self.memo: dict[Any, Any] = {}
        self.direct: Any = None
        self.plain = positional == len(trees) and all(tree.single for tree in trees)

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
        # The same by the types of positional arguments that are leaves, by far the commonest: that they can be bound is
        # known then, and they are the leaves.
        self.plain: dict[tuple[type, ...], Spec] = {}
        self.capacity = capacity

    def flatten_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Spec]:
        """Bind, apply defaults, flatten; returns the dynamic leaves and the structure.

        Raises:
            TypeError: Python's own, under the function's name, for a call that does not fit its signature.
            ContainerError: an argument that can't be opened.
        """
        positional, keywords = self.bind(*args, **kwargs)
        flattener = _Flattener(numbers_static=False)
        add, leaves, tokens = flattener.add, flattener.leaves, flattener.tokens
        try:
            if self.static:
                self._add_with_statics(flattener, positional, keywords)
            else:
                for value in positional:
                    kind = _KINDS.get(type(value))
                    if kind is None or kind is _STATIC:
                        add(value)
                    else:  # what `add` does with a leaf, without its frame
                        leaves.append(value)
                        tokens.append(kind)
                for name in keywords:
                    tokens.append(name)
                    add(keywords[name])
        except ContainerError as error:
            error.argument = self._guilty(positional, keywords)
            raise
        key = tuple(tokens)
        spec = self.specs.get(key)
        if spec is None:
            spec = self._understand(key, positional, keywords)
            if spec.plain and all(_KINDS.get(type(value)) in tokens for value in positional):
                self.plain[tuple(map(type, positional))] = spec
        return leaves, spec

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
        self.specs[key] = spec
        return spec


__all__ = ["Kind", "Marshaller", "OptionError", "Spec", "Tree", "flatten"]
