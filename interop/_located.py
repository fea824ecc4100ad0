"""How another process finds a call: its function, by the module and the qualified name of what a program can import.

Everything here is plain data that JSON can hold. A lambda, a closure or an object that no module holds can't be found,
and is refused by name.
"""

from __future__ import annotations

import collections
import functools
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

from interop._containers import Container, open_container
from interop._errors import UnsupportedError
from interop._marshal import Kind, Spec, StaticLeaf, Tree, static_leaf

_CONSTANTS = (type(None), bool, int, float, str)

# --- functions --------------------------------------------------------------------------------------------------------


def locate(fn: Any, guest_of: Callable[[Any], Any]) -> Any:
    """Where a function is found. `guest_of` gives the function under what a module holds: a crossing's own."""
    if isinstance(fn, functools.partial):
        arguments = [*fn.args, *fn.keywords.values()]
        if not all(isinstance(a, _CONSTANTS) for a in arguments):
            raise _refusal(fn, "a partial of values that are not constants")
        return {"partial": locate(fn.func, guest_of), "args": list(fn.args), "keywords": fn.keywords}
    if hasattr(type(fn), "place"):  # one of ours, which knows what it is made of
        return {"made": [type(fn).__module__, type(fn).__qualname__], "of": fn.place(guest_of)}
    if isinstance(fn, types.MethodType):
        return {"method": fn.__name__, "of": _place(fn.__self__)}
    module, name = getattr(fn, "__module__", None), getattr(fn, "__qualname__", None)
    if module and name:
        found = look_up(module, name)
        if found is not None and fn in (found, guest_of(found), getattr(found, "__wrapped__", None)):
            return [module, name]
        if "<" in name:
            raise _refusal(fn, "it is a lambda or a closure")
    return _place(fn)


def find(place: Any, guest_of: Callable[[Any], Any]) -> Any:
    """The function at that place, in this process."""
    if isinstance(place, list):
        module, name = place
        importlib.import_module(module)
        return guest_of(look_up(module, name))
    if "partial" in place:
        return functools.partial(find(place["partial"], guest_of), *place["args"], **place["keywords"])
    if "made" in place:
        module, name = place["made"]
        importlib.import_module(module)
        return look_up(module, name).at(place["of"], guest_of)
    owner = find(place["of"], guest_of)
    return types.MethodType(guest_of(type(owner).__dict__[place["method"]]), owner)


def look_up(module: str, name: str) -> Any:
    """What a loaded module holds under a qualified name; a class's own entries, without binding them."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, "__dict__", {}).get(part) if isinstance(found, type) else getattr(found, part, None)
    return found


def _place(x: Any) -> list[str]:
    """The module, and the name in it, of an object that some module holds."""
    home = sys.modules.get(type(x).__module__)
    for module in [home, *sys.modules.values()]:
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is x:
                return [module.__name__, name]  # type: ignore[union-attr]
    raise _refusal(x, "no module holds it")


def _refusal(x: Any, why: str) -> UnsupportedError:
    name = getattr(x, "__qualname__", None) or getattr(x, "__name__", None) or repr(x)
    return UnsupportedError(
        f"{name} can't be found by another process: {why}", hint="Export a function that a module defines by name"
    )


# --- structures -------------------------------------------------------------------------------------------------------


def dump_spec(spec: Spec) -> dict[str, Any]:
    """The structure of a call; raises for a container or a static that has no words."""
    return {"positional": spec.positional, "names": spec.names, "trees": list(map(dump_tree, spec.trees))}


def load_spec(dumped: dict[str, Any]) -> Spec:
    """The structure again."""
    return Spec(dumped["positional"], tuple(dumped["names"]), tuple(map(load_tree, dumped["trees"])))


def dump_tree(tree: Tree) -> list[Any]:
    """The structure of a pytree; raises for a container or a static that has no words."""
    return list(map(_dump_token, tree.tokens))


def load_tree(dumped: list[Any]) -> Tree:
    """The structure again."""
    return Tree(tuple(map(_load_token, dumped)))


_MAKE: dict[Any, Callable[[Any], Any]] = {
    dict: dict.fromkeys,
    collections.OrderedDict: collections.OrderedDict.fromkeys,
    list: lambda n: [None] * n,
    tuple: lambda n: (None,) * n,
}


def _dump_token(token: Any) -> Any:
    if type(token) is Kind:
        return token.name
    if type(token) is StaticLeaf and isinstance(token.value, _CONSTANTS):
        return {"static": token.value}
    if type(token) is Container and token.type in _MAKE:
        keyed = issubclass(token.type, dict)
        return {token.type.__name__: [key for _, key in token.aux] if keyed else token.count}
    if type(token) is Container and hasattr(token.type, "_fields"):
        return {"named": [token.type.__module__, token.type.__qualname__]}
    raise UnsupportedError(
        f"a {token.type.__qualname__} can't be told to another process",
        hint="Pass tuples, lists, dicts, named tuples, numbers and strings to what is exported",
    )


def _load_token(dumped: Any) -> Any:
    if isinstance(dumped, str):
        return Kind[dumped]
    ((kind, of),) = dumped.items()
    if kind == "static":
        return static_leaf(of)
    if kind == "named":
        importlib.import_module(of[0])
        named = look_up(*of)
        return open_container(named(*[None] * len(named._fields)))
    return open_container(next(make for known, make in _MAKE.items() if known.__name__ == kind)(of))
