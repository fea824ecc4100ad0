"""The wrapper: a function with a frozen record of what was declared of it, calling `plan -> engine -> unplan`.

A stack of decorators is one flat wrapper. Each decorator returns a refined copy of the record, so that their order
can't matter.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import types
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import torch
import wrapt

from interop import _compiled
from interop._call import Entry, Record, Wrapper
from interop._containers import is_container
from interop._errors import InteropError, OptionError, UnsupportedError
from interop._located import look_up
from interop._marshal import Tree
from interop._notes import annotate
from interop._symbolic import Symbolic

is_dynamo_compiling = torch.compiler.is_dynamo_compiling

# --- the wrapper ------------------------------------------------------------------------------------------------------


class _Identity(Wrapper):
    """Compare, hash and present as itself, never as the wrapped function.

    A stock wrapt proxy equals what it wraps: `jax.jit` then takes both for one cache entry, and Dynamo inlines the
    wrapped function in its place.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __hash__(self) -> int:
        return object.__hash__(self)

    __class__ = property(type)  # type: ignore[assignment]


class _Signed(_Identity):
    """Shows the guest's signature in the host's types."""

    __slots__ = ()
    _self_record: Record

    @property
    def __signature__(self) -> inspect.Signature:
        record = _record_of(self)
        return record.translated() if is_dynamo_compiling() else record.shown  # Dynamo takes no lock of a cache

    @property
    def __annotations__(self) -> dict[str, Any]:  # type: ignore[override]
        signature = self.__signature__
        shown = {n: p.annotation for n, p in signature.parameters.items() if p.annotation is not p.empty}
        if signature.return_annotation is not signature.empty:
            shown["return"] = signature.return_annotation
        return shown


class BoundCrossing(_Signed, wrapt.BoundFunctionWrapper):  # type: ignore[misc, type-arg]
    """A crossing looked up on an instance: `self` belongs to the function, as a closure does."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        instance = self._self_instance
        if instance is None and args:
            instance, args = args[0], args[1:]
        if torch.compiler.is_dynamo_compiling():
            return self._self_parent._self_method(instance, *args, **kwargs)
        bound = self._self_parent._self_bound(instance)
        try:
            return self.__wrapped__(*args, **kwargs) if bound is None else bound.call(args, kwargs)
        except Symbolic as argument:
            return argument.written(self, args, kwargs)


class Crossing(_Signed, wrapt.FunctionWrapper):  # type: ignore[misc, type-arg]
    """A function of one framework that is a native function of the other."""

    __bound_function_wrapper__ = BoundCrossing  # pyright: ignore[reportIncompatibleVariableOverride] - as wrapt has it

    def __init__(self, record: Record) -> None:
        super().__init__(record.fn, _unused)
        self._self_record = record
        self._self_entry = Entry(record) if record.host else None
        self._self_token = self._self_entry.token if self._self_entry else ""
        self._self_instances: dict[int, tuple[object, Entry]] = {}
        self._self_method = _Method(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return _compiled.call(self._self_token, self._self_record.jittable, args, kwargs)
        entry = self._self_entry
        try:
            return self._self_uncrossed(args, kwargs) if entry is None else entry.call(args, kwargs)
        except Symbolic as argument:
            return argument.written(self, args, kwargs)

    def _self_uncrossed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function itself, while no `as_*` decorator has come."""
        try:
            return self.__wrapped__(*args, **kwargs)
        except TypeError as error:
            annotate(error, "", self._self_record.name)
            raise

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        # Dynamo can't bind through wrapt; a partial of a plain object it can follow.
        if torch.compiler.is_dynamo_compiling():
            return self if instance is None else functools.partial(self._self_method, instance)
        return super().__get__(instance, owner)

    def _self_bound(self, instance: Any) -> Any:
        """The entry of the function bound to this instance; the oldest is forgotten when there are many."""
        record = self._self_record
        if record.host is None:
            return None
        if _is_argument(instance):
            return _Opened(self._self_entry, instance)
        found = self._self_instances.get(id(instance))
        if found is None or found[0] is not instance:
            if len(self._self_instances) >= _MAX_INSTANCES:
                del self._self_instances[next(iter(self._self_instances))]
            found = (instance, Entry(replace(record, fn=types.MethodType(record.fn, instance))))
            self._self_instances[id(instance)] = found
        return found[1]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(self)

    def __reduce__(self) -> Any:
        return _reduced(self)

    def __prepare_scriptable__(self) -> Any:
        raise no_script(self._self_record.name)

    def __copy__(self) -> Crossing:
        return Crossing(self._self_record)

    def __deepcopy__(self, memo: dict[int, Any]) -> Crossing:
        fn = self._self_record.fn
        return Crossing(replace(self._self_record, fn=copy.deepcopy(fn, memo)))

    def __repr__(self) -> str:
        record = self._self_record
        levels = [name for name in ("differentiable", "jittable") if getattr(record, name)]
        crossed = [record.host.decorator] if record.host else []
        return f"<{' '.join([*reversed(levels), *crossed])} {record.name}>"

    def __str__(self) -> str:
        return repr(self)  # wrapt would show the module's own


# wrapt keeps these two in a dictionary that Dynamo guards and does not read; of a property it does neither.
_named: Any = Crossing
_named.__module__ = property(lambda self: self._self_record.fn.__module__)
_named.__doc__ = property(lambda self: self._self_record.fn.__doc__)

_MAX_INSTANCES = 64


class _Opened:
    """The entry of a method whose `self` is an argument like any other."""

    def __init__(self, entry: Any, instance: Any) -> None:
        self.entry = entry
        self.instance = instance

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the guest function on host values."""
        return self.entry.call((self.instance, *args), kwargs)

    def flat_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Tree]:
        """The same, leaving the result flat."""
        return self.entry.flat_call((self.instance, *args), kwargs)


class _Method:
    """A crossing as Dynamo sees it when it is looked up on an instance."""

    def __init__(self, crossing: Crossing) -> None:
        self.crossing = crossing

        self.jittable = crossing._self_record.jittable
        self.token = _compiled.register(self)

    def __call__(self, instance: Any, *args: Any, **kwargs: Any) -> Any:
        return _compiled.call(self.token, self.jittable, (instance, *args), kwargs)

    def flat_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Tree]:
        """Call the function bound to the first argument."""
        instance, *rest = args
        return self.crossing._self_bound(instance).flat_call(tuple(rest), kwargs)


def entry_of(crossing: Any, args: tuple[Any, ...]) -> tuple[Entry | None, tuple[Any, ...]]:
    """The entry that a call of a crossing runs, and its arguments there; None for what was never crossed."""
    entry: Any = None
    if isinstance(crossing, BoundCrossing):
        instance = crossing._self_instance
        if instance is None and args:
            instance, args = args[0], args[1:]
        entry = crossing._self_parent._self_bound(instance)
    elif isinstance(crossing, Crossing):
        entry = crossing._self_entry
    return (entry.entry, (entry.instance, *args)) if isinstance(entry, _Opened) else (entry, args)


def no_script(name: str) -> InteropError:
    """What `torch.jit.script` is told."""
    return UnsupportedError("torch.jit.script has no words for a JAX function", hint="Use torch.export").of(name)


def _unused(*_: Any) -> Any:
    """What wrapt wants to call; `__call__` is ours."""
    raise AssertionError


def _record_of(crossing: Any) -> Record:
    if isinstance(crossing, BoundCrossing):
        parent: Record = crossing._self_parent._self_record
        return replace(parent, fn=crossing.__wrapped__)
    record: Record = crossing._self_record
    return record


def _is_argument(instance: Any) -> bool:
    """Whether a `self` is opened like any argument: a leaf, or what is registered."""
    if isinstance(instance, torch.Tensor | jax.Array | np.ndarray):
        return True
    return not isinstance(instance, type) and is_container(instance)


def _reduced(crossing: Crossing) -> Any:
    """By qualified name where the module's attribute is the crossing itself, else by what it was made of."""
    fn = crossing._self_record.fn
    module, name = getattr(fn, "__module__", None), getattr(fn, "__qualname__", None)
    if module and name and look_up(module, name) is crossing:
        return _find, (module, name)
    return _make, (crossing._self_record,)


def _make(record: Record) -> Crossing:
    return Crossing(record)


def _find(module: str, name: str) -> Any:
    importlib.import_module(module)
    return look_up(module, name)


# --- refining ---------------------------------------------------------------------------------------------------------


def refine(fn: Any, **changes: Any) -> Any:
    """The crossing of `fn` with these changes of its record; `fn` may be a function, a crossing, or a method object."""
    if isinstance(fn, staticmethod | classmethod):
        return type(fn)(refine(fn.__func__, **changes))
    if not callable(fn):
        raise OptionError(
            f"a {type(fn).__name__} can't be decorated", expected="a callable", hint="Options are keyword-only"
        )
    record = _record_of(fn) if isinstance(fn, Crossing | BoundCrossing) else Record(fn)
    host = changes.get("host")
    if host is not None and record.host is not None and host is not record.host:
        return record.fn  # crossed and crossed back: the function itself, with no framework in between
    return Crossing(replace(record, **changes))
