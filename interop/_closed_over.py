"""What an object holds, and what a function reads beside its arguments."""

from __future__ import annotations

import collections
import dis
import enum
import functools
import sys
import types
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any

import torch


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
    for name, value in _read_by(fn, given).items():
        found = first(value, wanted)
        if found:
            return f"{name}{found[0]}"
        if followed is not None and isinstance(value, types.FunctionType) and id(value) not in followed:
            followed.add(id(value))
            inner = None if _is_of_library(value) else _closed_over(value, wanted, (), followed)
            if inner:
                return f"{inner} of {name}"
    return None


def _read_by(fn: types.FunctionType, given: Collection[str]) -> dict[str, Any]:
    """What a function reads of its closure, its globals, and its defaults that are not given."""
    cells = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
    read = {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}
    read |= {name: fn.__globals__[name] for name in _names_of(fn.__code__, "LOAD_GLOBAL") if name in fn.__globals__}
    positional = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    defaults = dict(zip(reversed(positional), reversed(fn.__defaults__ or ()), strict=False))
    defaults |= fn.__kwdefaults__ or {}
    return read | {name: value for name, value in defaults.items() if name not in given}


def _is_of_library(x: types.FunctionType | type) -> bool:
    return (x.__module__ or "").partition(".")[0] in _KNOWN


_KNOWN = sys.stdlib_module_names | {"flax", "interop", "jax", "numpy", "torch", "torchvision", "transformers"}


@functools.lru_cache(maxsize=1024)
def _names_of(code: types.CodeType, opname: str) -> tuple[str, ...]:
    inside = [name for part in code.co_consts if isinstance(part, types.CodeType) for name in _names_of(part, opname)]
    return tuple({i.argval for i in dis.get_instructions(code) if i.opname == opname}.union(inside))


def _attributes(x: Any) -> list[tuple[str, Any]]:
    """The attributes of a plain object; the parameters of a module are constants of the function."""
    if x is None or isinstance(x, torch.nn.Module | type | types.FunctionType):
        return []
    kind: Any = type(x)
    return [*getattr(x, "__dict__", {}).items(), *((n, getattr(x, n, None)) for n in slots_of(kind))]


# --- constants --------------------------------------------------------------------------------------------------------

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)


def constants_of(fn: Any) -> Hashable:
    """What a trace of a function has read beside its arguments, to tell whether it is still so.

    Numbers and options by their values, tensors by their identity (what is written to them is seen), objects by their
    plain attributes, modules by those of their parts. What the function itself writes to is left out.
    """
    return _constants(fn, set())


def _constants(fn: Any, seen: set[int]) -> Hashable:
    found: list[Hashable] = []
    while isinstance(fn, functools.partial):
        found.append(constant([fn.args, fn.keywords]))
        fn = fn.func
    if isinstance(fn, torch.nn.Module):
        return constant(fn)
    owner = fn.__self__ if isinstance(fn, types.MethodType) else fn
    fn = getattr(fn, "__func__", fn)
    if not isinstance(fn, types.FunctionType):
        fn = next((vars(kind)["__call__"] for kind in type(fn).__mro__ if "__call__" in vars(kind)), None)
    if not isinstance(fn, types.FunctionType):
        return tuple(found)
    if not isinstance(owner, types.FunctionType):
        stored = _names_of(fn.__code__, "STORE_ATTR")
        found.append(constant(owner) if isinstance(owner, torch.nn.Module) else _plain_attributes(owner, stored))
    stored = (*_names_of(fn.__code__, "STORE_GLOBAL"), *_names_of(fn.__code__, "STORE_DEREF"))
    for name, value in _read_by(fn, ()).items():
        if isinstance(value, types.FunctionType) and id(value) not in seen and not _is_of_library(value):
            seen.add(id(value))
            found.append((name, _constants(value, seen)))
        elif name not in stored:
            found.append((name, constant(value)))
    return tuple(found)


def constant(x: Any, depth: int = 0) -> Hashable:
    """What tells a value from another, as a function reads it."""
    if isinstance(x, _PLAIN):
        return type(x), repr(x) if isinstance(x, float | complex) else x  # not every nan equals itself
    if isinstance(x, torch.nn.Module):
        return tuple((type(part), _plain(vars(part))) for part in x.modules())
    if depth < _DEPTH and isinstance(x, dict):
        return dict, tuple((id(key), constant(item, depth + 1)) for key, item in x.items())
    if depth < _DEPTH and isinstance(x, list | tuple | set | frozenset | collections.deque):
        return type(x), tuple(constant(item, depth + 1) for item in x)
    if isinstance(x, types.FunctionType | types.ModuleType | type | torch.Tensor) or not hasattr(x, "__dict__"):
        return id(x)
    return id(x), _plain(vars(x))


def _plain_attributes(x: Any, stored: Collection[str]) -> Hashable:
    """The attributes of an object, and those of its class."""
    own = {name: value for name, value in _attributes(x) if name not in stored}
    kinds = [kind for kind in type(x).__mro__ if not _is_of_library(kind) and kind.__module__ != "builtins"]
    return tuple((n, constant(v)) for n, v in own.items()), tuple(_plain(vars(kind)) for kind in kinds)


def _plain(attributes: Mapping[str, Any]) -> Hashable:
    return tuple((name, constant(value)) for name, value in attributes.items() if isinstance(value, _PLAIN))
