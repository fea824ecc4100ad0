"""A call: what is known of a crossing, and how a call of it runs, `plan -> engine -> unplan`."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
import torch.utils._pytree as torch_pytree

from interop import _compiled, _in_jax, _in_torch
from interop._abstract import Aval, Outputs, aval_of, check_promise
from interop._closed_over import find_closed_over
from interop._containers import bounded
from interop._derive import Flat, Levels, Static
from interop._errors import InteropError, OptionError
from interop._given import beside_tensors, crosses, given, in_64_bits, key_data, returned
from interop._leaf import describe, too_large, x64_enabled
from interop._located import dump_spec, find, load_spec, locate
from interop._log import is_heard, tell
from interop._marshal import SINGLE_TENSOR, Kind, Marshaller, Spec, Tree, flatten
from interop._module_in_jax import ClosedOver, ModuleFunction
from interop._notes import annotate
from interop._private import torch as torch_private
from interop._side import JAX, TORCH, Leaf, Leaves, Side
from interop._signature import signature_of, translate_signature, with_key

# What JAX raises when a trace needs the value of a number.
_NEEDS_VALUE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerBoolConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


# --- the record -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Record:
    """What is known of a crossing. `host` is None until an `as_*` decorator has come."""

    fn: Callable[..., Any]
    host: Side | None = None
    differentiable: bool = False
    jittable: bool = False
    nondiff_argnames: tuple[str, ...] = ()
    static_argnames: tuple[str, ...] = ()
    example_output: Any = None
    jit: bool = True
    vmap: str = "auto"
    rng: str | None = None
    mutable: bool = False
    gradient_at_once: bool = False  # of a scalar function in torch: computed with the value
    signature: Any = None

    @property
    def name(self) -> str:
        """What messages call the function."""
        fn: Any = self.fn
        while isinstance(fn, functools.partial):
            fn = fn.func
        return getattr(fn, "__name__", None) or type(fn).__name__

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        """The function that a call runs: a torch module is one of its parameters."""
        if self.host is JAX and isinstance(self.fn, torch.nn.Module):
            return ModuleFunction(self.fn, mutable=self.mutable)
        if self.mutable:
            error = OptionError("mutable=True: only a module has buffers", expected="an nn.Module")
            raise located(error, self.name)
        return self.fn

    @functools.cached_property
    def shown(self) -> inspect.Signature:
        """The guest's signature in the host's types. JAX asks for it several times a gradient."""
        return self.translated()

    def translated(self) -> inspect.Signature:
        """The same, made anew."""
        if self.signature is not None:
            return inspect.signature(self.signature)
        signature = signature_of(self.function)
        if self.rng is not None:
            signature = with_key(signature, self.rng)
        return translate_signature(signature, self.host) if self.host else signature

    @property
    def guest(self) -> Side:
        """The framework that the function is written in."""
        return JAX if self.host is TORCH else TORCH


# --- the entry --------------------------------------------------------------------------------------------------------


class Entry:
    """A crossing as calls see it: the function's marshaller, and its flat functions by the structure of the call."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.host: Side = record.host or TORCH
        self.marshaller = Marshaller(record.function, name=record.name, static_argnames=record.static_argnames)
        self.flatten_call, self.plain_spec = self.marshaller.flatten_call, self.marshaller.plain.get
        self.own = Kind.TENSOR if self.host is TORCH else Kind.ARRAY
        self.engine_call: Any = (_in_torch if self.host is TORCH else _in_jax).call
        # In JAX a Python number is data of the call, given as it is. In torch it is dynamic until a trace needs its
        # value.
        self.bakes_numbers = self.host is JAX
        self.rng = record.rng
        self.token = _compiled.register(self)
        _check_argnames(record, self.marshaller.signature)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the guest function on host values."""
        outs, tree = self.flat_call(args, kwargs)
        return outs[0] if tree.single else tree.unflatten(outs)

    def flat_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Tree]:
        """The same, leaving the result flat."""
        spec: Spec | None = None
        leaves: Sequence[Leaf] = args
        try:
            key = [] if self.rng is None else self.key(kwargs)
            if not kwargs:
                spec = self.plain_spec(tuple(map(type, args)))
            if spec is None:
                leaves, spec = self.flatten_call(args, kwargs)
            flat = spec.direct
            if flat is None or key:
                return self._call(leaves, spec, key)
            return self.engine_call(flat, leaves)
        except InteropError as error:
            raise located(error, self.record.name, spec) from error.__cause__
        except OverflowError as error:
            raise self._number_too_large(leaves, spec, error) from None
        except (TypeError, RuntimeError) as error:
            annotate(error, self.host.name, self.record.name)
            raise

    def key(self, kwargs: dict[str, Any]) -> list[Leaf]:
        """The data of the key among the arguments, which is taken out of them."""
        name = str(self.rng)
        if name not in kwargs:
            raise TypeError(f"{self.record.name}() missing 1 required keyword-only argument: '{name}'")
        return [key_data(kwargs.pop(name), name)]

    def _call(self, leaves: Sequence[Leaf], spec: Spec, key: list[Leaf]) -> Any:
        """A first call, or one with a key, leaves that need converting, or numbers that have to be constants."""
        kinds = set(spec.kinds)
        has_numbers = Kind.NUMBER in kinds
        if "met" not in spec.memo:
            spec.memo["met"] = True
            if is_heard():
                self._tell_copies(leaves, spec)
        if kinds <= {self.own} and not key:
            flat = spec.direct = self.flat_of(spec, ())
            return self.engine_call(flat, leaves)
        impls: tuple[str | None, ...] = ()
        if not kinds <= {self.own, Kind.NUMBER}:
            leaves, impls = self.converted(leaves, spec)
        if not has_numbers or not self.bakes_numbers:
            try:
                return self.engine_call(self.flat_of(spec, impls), [*leaves, *key])
            except (TypeError, ValueError, IndexError) as error:
                if not has_numbers or not needs_value(error):
                    raise
                tell(self.record.name, "fell back on numbers as constants (%s)", type(error).__name__)
        flat, leaves = self.baked(leaves, spec, impls)
        result = self.engine_call(flat, [*leaves, *key])
        self.bakes_numbers = True  # remembered because it helped: any other error is the user's
        return result

    def _tell_copies(self, leaves: Sequence[Leaf], spec: Spec) -> None:
        """Tell which of the leaves of a call are copied; all arguments of a torch function are."""
        if self.host is JAX:
            return
        with contextlib.suppress(InteropError):  # the call itself will raise it
            x64 = in_64_bits(self.converted(leaves, spec)[0])
            for index, (leaf, kind) in enumerate(zip(leaves, spec.kinds, strict=True)):
                how, why = crosses(self.host, leaf, kind, index, x64=x64, jit=self.record.jit)
                if how == "copied":
                    tell(self.record.name, "%s %s is copied: %s", spec.path(index), describe(leaf), why)

    def flat_of(self, spec: Spec, impls: tuple[str | None, ...]) -> Flat:
        """The function of one structure of call, with dynamic numbers."""
        found: Flat = bounded(spec.memo, ("flat", impls), lambda: self.flat(spec, impls=impls))
        return found

    def converted(self, leaves: Sequence[Leaf], spec: Spec) -> tuple[Sequence[Leaf], tuple[str | None, ...]]:
        """The leaves as the host's own (arrays of the guest, of numpy, keys), and the implementations of the keys."""
        if not set(spec.kinds) - {self.own, Kind.NUMBER}:
            return leaves, ()
        pairs = list(zip(leaves, spec.kinds, strict=True))
        impls = tuple(str(jax.random.key_impl(leaf)) if kind is Kind.KEY else None for leaf, kind in pairs)
        own = [given(self.host, leaf, kind, index) for index, (leaf, kind) in enumerate(pairs)]
        return (beside_tensors(own, pairs) if self.host is TORCH else own), impls

    def baked(self, leaves: Sequence[Leaf], spec: Spec, impls: tuple[str | None, ...]) -> tuple[Flat, list[Leaf]]:
        """The function of one structure of call with its Python numbers as constants, and the other leaves."""
        pairs = list(zip(leaves, spec.kinds, strict=True))
        numbers = tuple(torch_private.concrete(leaf) for leaf, kind in pairs if kind is Kind.NUMBER)
        rest = [leaf for leaf, kind in pairs if kind is not Kind.NUMBER]
        memo = ("baked", tuple((type(n), repr(n)) for n in numbers), impls)
        return bounded(spec.memo, memo, lambda: self.flat(spec, numbers, impls)), rest

    def _number_too_large(self, leaves: Sequence[Leaf], spec: Any, error: OverflowError) -> OverflowError:
        """JAX's refusal of a Python integer in the words of the library; any other error is the user's."""
        for index, kind in enumerate(spec.kinds):
            if kind is Kind.NUMBER and not x64_enabled() and _is_wide(leaves[index]):
                return located(too_large(leaves[index]).at(index), self.record.name, spec)  # type: ignore[return-value]
        return error

    def flat(self, spec: Spec, numbers: tuple[Any, ...] | None = None, impls: tuple[str | None, ...] = ()) -> Flat:
        """The function of one structure of call, as a flat function of its dynamic leaves."""
        record, guest, function = self.record, self.record.guest, self.record.function
        dynamic = [i for i, kind in enumerate(spec.kinds) if numbers is None or kind is not Kind.NUMBER]
        promised = None if record.example_output is None else _promise(record, spec, numbers)

        # One tensor needs no conversion, and is by far the commonest result of torch.
        single = torch.Tensor if guest is TORCH else None
        structure = Static(SINGLE_TENSOR)

        def flat_result(result: Any) -> tuple[Leaves, Static]:
            if type(result) is single:
                return (result,), structure
            outs, tree = flatten(result, numbers_static=True)
            return tuple(
                returned(guest, out, kind, tree, i) for i, (out, kind) in enumerate(zip(outs, tree.kinds, strict=True))
            ), Static(tree)

        def fn(*leaves: Leaf) -> tuple[Leaves, Static]:
            every = leaves if numbers is None else _merged(spec.kinds, leaves, numbers)
            args, kwargs = spec.unflatten(_keys_wrapped(every, impls))
            outs, tree = flat_result(function(*args, **kwargs))
            if promised is not None and guest is JAX:
                check_promise(outs, promised(tuple(map(aval_of, leaves))).avals, record.name)
            return outs, tree

        if spec.plain and promised is None and numbers is None and not any(impls):

            def fn(*leaves: Leaf) -> tuple[Leaves, Static]:  # the same, with nothing to put together
                result = function(*leaves)
                return ((result,), structure) if type(result) is single else flat_result(result)

        levels = Levels(
            record.differentiable, record.jittable, promised, record.jit, record.vmap, record.gradient_at_once
        )
        nondiff = tuple(spec.argnames[i] in record.nondiff_argnames for i in dynamic) if record.nondiff_argnames else ()
        lost = functools.partial(find_closed_over, function, _would_be_lost, spec.names)
        known = (guest, fn, record.name, levels, nondiff, lambda i: spec.path(dynamic[i]), lost)
        if guest is TORCH:
            modes = function.training if isinstance(function, ModuleFunction) else ClosedOver(function)
            flat = _in_jax.TorchFlat(*known, modes=modes)
            return flat if record.rng is None else _in_jax.keyed(flat, len(dynamic), record.rng)
        return _in_torch.JaxFlat(*known, located=functools.partial(_located_call, record, spec, numbers, impls))


def _located_call(record: Record, spec: Spec, numbers: Any, impls: Any) -> dict[str, Any]:
    """How another process finds the function of one structure of call."""
    try:
        return {
            "guest": locate(record.fn, _guest_of),
            "options": {name: getattr(record, name) for name in _EXPORTED},
            "call": dump_spec(spec),
            "numbers": numbers,
            "impls": impls,
        }
    except InteropError as error:
        raise located(error, record.name) from error.__cause__


_EXPORTED = ("differentiable", "jittable", "jit", "nondiff_argnames", "static_argnames")


def _load_call(located: dict[str, Any]) -> Any:
    """The flat function of a call that another process has located."""
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in located["options"].items()}
    entry = Entry(Record(find(located["guest"], _guest_of), TORCH, **options))
    numbers = None if located["numbers"] is None else tuple(located["numbers"])
    return entry.flat(load_spec(located["call"]), numbers, tuple(located["impls"]))


_in_torch.FLATS.load = _load_call


class Wrapper:
    """What stands for its guest function."""

    __slots__ = ()
    __wrapped__: Any


def _guest_of(x: Any) -> Any:
    """The function under what a module or a class holds."""
    if isinstance(x, staticmethod | classmethod):
        x = x.__func__
    return x.__wrapped__ if isinstance(x, Wrapper) else x


def _is_wide(number: complex) -> bool:
    return isinstance(number, int) and not -(2**31) <= number < 2**31


def needs_value(error: Exception) -> bool:
    """Whether a trace failed for the want of a number's value: a shape, a branch, a member of a set."""
    said = isinstance(error, TypeError | ValueError | IndexError)
    return isinstance(error, _NEEDS_VALUE) or (
        said and any(word in str(error) for word in ("Tracer", "concrete", "static"))
    )


def _would_be_lost(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad and torch_private.is_of_the_user(x)


def _merged(kinds: tuple[Kind, ...], leaves: Leaves, numbers: tuple[Any, ...]) -> Leaves:
    given, constants = iter(leaves), iter(numbers)
    return tuple(next(constants) if kind is Kind.NUMBER else next(given) for kind in kinds)


def _keys_wrapped(leaves: Leaves, impls: tuple[str | None, ...]) -> Leaves:
    """Typed PRNG keys cross as their data, and are typed again on the other side."""
    if not any(impls):
        return leaves
    return tuple(
        jax.random.wrap_key_data(leaf, impl=impl) if impl else leaf for leaf, impl in zip(leaves, impls, strict=True)
    )


# --- promised and refused ---------------------------------------------------------------------------------------------


def _promise(record: Record, spec: Spec, numbers: tuple[Any, ...] | None) -> Callable[[Sequence[Aval]], Outputs]:
    """What `example_output` says of the outputs, given the avals of the inputs."""

    def promised(avals: Sequence[Aval]) -> Outputs:
        example = record.example_output
        if isinstance(example, types.FunctionType | functools.partial | types.MethodType):
            structs = tuple(jax.ShapeDtypeStruct(*aval) for aval in avals)
            every = structs if numbers is None else _merged(spec.kinds, structs, numbers)
            args, kwargs = spec.unflatten(every)
            example = example(*args, **kwargs)
        leaves, tree = flatten(torch_pytree.tree_map(_struct_opened, example), numbers_static=True)
        return Outputs(tuple(aval_of(leaf) for leaf in leaves), Static(tree))

    return promised


def _struct_opened(leaf: Any) -> Any:
    """A `ShapeDtypeStruct` as an array of that shape and dtype that takes no memory."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
    return leaf


def located(error: InteropError, name: str, spec: Spec | None = None) -> InteropError:
    """The error with the function and the path of the argument filled in, once."""
    error.function = error.function or name
    if error.argument is None and error.leaf is not None and spec is not None:
        error.argument = spec.path(error.leaf)
    return error


def _check_argnames(record: Record, signature: inspect.Signature) -> None:
    """Raise `OptionError` for a name in an option that is no parameter of the function."""
    has_kwargs = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for option in ("static_argnames", "nondiff_argnames"):
        unknown = [name for name in getattr(record, option) if name not in signature.parameters and not has_kwargs]
        if unknown:
            error = OptionError(f"{option} names {unknown[0]!r}, which is no parameter", expected=_bare(signature))
            raise located(error, record.name)
    if record.rng in signature.parameters:
        error = OptionError(f"rng names {record.rng!r}, which is a parameter already", expected="a name of its own")
        raise located(error, record.name)


def _bare(signature: inspect.Signature) -> str:
    """The parameters without their annotations."""
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(parameters))
