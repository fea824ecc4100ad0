"""How another process finds a function: by the module and the qualified name of what a program can import.

Everything here is plain data that JSON can hold. A lambda, a closure or an object that no module holds can't be found,
and is refused by name.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

from interop._errors import UnsupportedError

_CONSTANTS = (type(None), bool, int, float, str)


def locate(fn: Any, guest_of: Callable[[Any], Any]) -> Any:
    """Where a function is found. `guest_of` gives the function under what a module holds: a crossing's own."""
    if isinstance(fn, functools.partial):
        arguments = [*fn.args, *fn.keywords.values()]
        if not all(isinstance(a, _CONSTANTS) for a in arguments):
            raise _refusal(fn, "a partial of values that are not constants")
        return {"partial": locate(fn.func, guest_of), "args": list(fn.args), "keywords": fn.keywords}
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
    name = getattr(x, "__qualname__", None) or repr(x)
    return UnsupportedError(
        f"{name} can't be found by another process: {why}", hint="Export a function that a module defines by name"
    )
