"""A JAX function of parameters, or a model, as one function of their leaves; and how a model is put together again."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from interop._errors import LeafError, OptionError, OutputMismatchError
from interop._leaf import describe
from interop._located import dump_tree, find, load_tree, locate
from interop._marshal import StaticLeaf, Tree, flatten
from interop._signature import signature_of

MISSING: Any = object()

# --- structures -------------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """What a leaf is in JAX, where torch holds it as something else: a typed key, an unsigned integer."""

    impl: str | None  # of the key
    dtype: str | None  # unsigned, of which torch holds the bits: it has next to nothing for them

    @property
    def bits(self) -> str | None:
        """The dtype of those bits."""
        return self.dtype and self.dtype.removeprefix("u")

    def restored(self, leaf: Any) -> Any:
        """The leaf as the function knows it."""
        if self.dtype is not None:
            leaf = jax.lax.bitcast_convert_type(leaf, self.dtype)
        return leaf if self.impl is None else jax.random.wrap_key_data(leaf, impl=self.impl)

    def held(self, leaf: Any) -> Any:
        """The leaf as torch holds it."""
        if _is_key(leaf):
            leaf = jax.random.key_data(leaf)
        if self.bits is not None and leaf.dtype == self.dtype:
            leaf = jax.lax.bitcast_convert_type(leaf, self.bits)
        return leaf


_UNSIGNED = ("uint16", "uint32")


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and bool(jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


class Structure:
    """The structure of a pytree of arrays, with the names and the forms of its leaves."""

    def __init__(self, label: str, tree: Tree, forms: tuple[Form, ...]) -> None:
        self.label = label  # what the pytree is called
        self.tree = tree
        self.forms = forms
        self.routes = tuple(tuple(map(_name, route)) or ("0",) for route in tree.routes())
        self.names = tuple(map(".".join, self.routes))

    def together(self, leaves: Sequence[Any]) -> Any:
        """The pytree of these leaves, as torch holds them."""
        return self.tree.unflatten([form.restored(x) for form, x in zip(self.forms, leaves, strict=True)])

    def order_in_jax(self) -> list[int]:
        """The leaves in the order of `jax.tree.leaves`, which sorts dicts; last, those that JAX does not see."""
        every = range(len(self.names))
        try:
            leaves = jax.tree.leaves(self.tree.unflatten([np.asarray(i) for i in every]))
        except (TypeError, ValueError):  # keys that can't be sorted
            return list(every)
        seen = [int(x) for x in leaves if isinstance(x, np.ndarray)]
        return [*seen, *(i for i in every if i not in set(seen))]

    def renewed(self, old: Sequence[Any], new: Any) -> list[Any]:
        """The leaves of a new pytree in this order, as torch holds them; raises if it is not like the old one.

        They are written to buffers: no derivative goes through them.
        """
        leaves, tree = flatten(new, numbers_static=True)
        given = dict(zip((".".join(map(_name, route)) or "0" for route in tree.routes()), leaves, strict=True))
        problems = [f"{self.label}.{name}: unknown" for name in given if name not in self.names]
        values: list[Any] = []
        for name, form, before in zip(self.names, self.forms, old, strict=True):
            if name not in given:
                problems.append(f"{self.label}.{name}: missing, expected {describe(form.restored(before))}")
                continue
            value = form.held(given[name])
            if value.shape != before.shape or not _is_alike(value.dtype, before.dtype):
                got, expected = describe(given[name]), describe(form.restored(before))
                problems.append(f"{self.label}.{name}: got {got}, expected {expected}")
            values.append(jax.lax.stop_gradient(value))
        if problems:
            raise OutputMismatchError("\n    ".join([f"the new {self.label} is not like the old one:", *problems]))
        return values

    def dump(self) -> list[Any]:
        """As plain data; raises for what has no words."""
        return [self.label, dump_tree(self.tree), self.forms]

    @staticmethod
    def load(dumped: list[Any]) -> Structure:
        """The structure again."""
        label, tree, forms = dumped
        return Structure(label, load_tree(tree), tuple(Form(*form) for form in forms))


def apart(pytree: Any, label: str) -> tuple[list[Any], Structure]:
    """The arrays of a pytree, as they are, and its structure."""
    leaves, tree = flatten(pytree, numbers_static=True)
    for token in tree.tokens:
        if type(token) is StaticLeaf and isinstance(token.value, jax.ShapeDtypeStruct):
            raise LeafError("a ShapeDtypeStruct has no values", got=describe(token.value), hint="Pass arrays")
    return leaves, Structure(label, tree, tuple(map(_form, leaves)))


def _form(leaf: Any) -> Form:
    impl = str(jax.random.key_impl(leaf)) if _is_key(leaf) else None
    dtype = "uint32" if impl else str(leaf.dtype)
    return Form(impl, dtype if dtype in _UNSIGNED else None)


def _is_alike(one: Any, other: Any) -> bool:
    kinds = (jnp.complexfloating, jnp.floating, jnp.integer, jnp.bool_)
    return all(jnp.issubdtype(one, kind) == jnp.issubdtype(other, kind) for kind in kinds)


def _name(part: str) -> str:
    """A part of a path, `['w']`, `[0]` or `.field`, as a name of torch's: no dots, not empty, none that torch uses."""
    if part.startswith("["):
        try:
            part = str(ast.literal_eval(part[1:-1]))
        except (ValueError, SyntaxError):
            part = part[1:-1]
    else:
        part = part.removeprefix(".")
    part = part.replace(".", "_") or "_"
    return f"{part}_" if part in _TAKEN else part


_TAKEN = frozenset(dir(torch.nn.Module()))

# --- the function -----------------------------------------------------------------------------------------------------

# What functions call the parameter that says whether they train, and what it is when they do.
_FLAGS = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
    "inference": False,
}


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _flags_among(parameters: Sequence[inspect.Parameter]) -> dict[str, bool]:
    return {p.name: _FLAGS[p.name] for p in parameters if p.name in _FLAGS}


class Applied:
    """A JAX function of `(params, *args)` as one of the leaves of its parameters, and of its state and its keys.

    Its first argument is the list of leaves of the parameters; where training and evaluation differ, a tuple of that
    list, the leaves of the state, and seeds by the names of the keys, or None for no keys. It then returns the output
    and the leaves of the new state.

    Attributes:
        flags: keywords that say whether it trains, and what they are when it does.
        places: of those flags that a call may give by position, which position that is.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        params: Structure,
        state: Structure | None,
        *,
        has_aux: bool,
        scalar: bool,
        rngs: str | tuple[str, ...],
    ) -> None:
        self.function = function
        self.params = params
        self.state = state
        self.has_aux = has_aux
        self.scalar = scalar
        self.rngs = rngs
        self.has_modes = state is not None or bool(rngs) or isinstance(function, Model)
        self.__name__ = str(getattr(function, "__name__", type(function).__name__))
        parameters, self.flags = self._parameters()
        self.__signature__ = self._signature(parameters)
        positional = [p.name for p in self.__signature__.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        self.places = {flag: positional.index(flag) for flag in self.flags if flag in positional}

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.has_modes:
            return self._checked(self.function(self.params.together(params), *args, **kwargs))
        params, state, seeds = params
        given = [self.params.together(params)]
        if self.state is not None:
            given.append(self.state.together(state))
        out = self.function(*given, *args, **self._keys(seeds), **kwargs)
        if self.state is None:
            return self._checked(out), []
        out, new = _pair(out, "(out, new_state)")
        return self._checked(out), self.state.renewed(state, new)

    def _keys(self, seeds: dict[str, Any] | None) -> dict[str, Any]:
        """The keyword with the random keys; None in evaluation."""
        if not self.rngs:
            return {}
        keys = None if seeds is None else {name: _key(seed) for name, seed in seeds.items()}
        if isinstance(self.rngs, str):
            return {self.rngs: None if keys is None else keys[self.rngs]}
        return {"rngs": keys}

    def _checked(self, out: Any) -> Any:
        """The output, its aux without derivatives, or its value a scalar."""
        value, *aux = _pair(out, "(out, aux)") if self.has_aux else (out,)
        if self.scalar and getattr(value, "shape", None if not isinstance(value, int | float) else ()) != ():
            raise OutputMismatchError(
                "the value is no scalar", got=describe(value), expected="f32[]", hint="Use WrappedJaxFunction"
            )
        if not aux:
            return value
        leaves, tree = flatten(aux[0], numbers_static=True)
        if not self.scalar:
            leaves = [jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x for x in leaves]
        return value, tree.unflatten(leaves)

    def _parameters(self) -> tuple[list[inspect.Parameter], dict[str, bool]]:
        """The parameters of the function behind its parts, and those of them that are flags."""
        if isinstance(self.function, Model):
            return self.function.arguments, self.function.flags
        parameters = list(signature_of(self.function).parameters.values())
        for _ in range(1 if self.state is None else 2):
            if parameters and parameters[0].kind in _POSITIONAL:
                del parameters[0]
        return parameters, _flags_among(parameters) if self.has_modes else {}

    def _signature(self, parameters: Sequence[inspect.Parameter]) -> inspect.Signature:
        """As calls see it: the leaves in place of the parts; what the module gives by itself is not required."""
        of = inspect.Parameter
        keys = {self.rngs} if isinstance(self.rngs, str) else {"rngs"} if self.rngs else set[str]()
        first = of("params", of.POSITIONAL_ONLY)
        optional = [p.replace(default=None) if p.name in self.flags else p for p in parameters if p.name not in keys]
        if not any(p.name in keys and p.kind is of.POSITIONAL_OR_KEYWORD for p in parameters):
            try:
                return inspect.Signature([first, *optional])
            except ValueError:
                pass  # a parameter that is required comes after one that is not any more
        late = [p.replace(kind=of.KEYWORD_ONLY) for p in optional if p.name in self.flags]
        others = [p for p in optional if p.name not in self.flags]
        at = len(others) - any(p.kind is of.VAR_KEYWORD for p in others)
        return inspect.Signature([first, *others[:at], *late, *others[at:]])

    # How another process finds it.

    def place(self, guest_of: Callable[[Any], Any]) -> dict[str, Any]:
        """Where it is found, as plain data."""
        return {
            "function": locate(self.function, guest_of),
            "params": self.params.dump(),
            "state": None if self.state is None else self.state.dump(),
            "options": {"has_aux": self.has_aux, "scalar": self.scalar, "rngs": self.rngs},
        }

    @staticmethod
    def at(place: dict[str, Any], guest_of: Callable[[Any], Any]) -> Applied:
        """What is found there."""
        options: dict[str, Any] = place["options"]
        rngs = options["rngs"] if isinstance(options["rngs"], str) else tuple(options["rngs"])
        state = None if place["state"] is None else Structure.load(place["state"])
        options = {**options, "rngs": rngs}
        return Applied(find(place["function"], guest_of), Structure.load(place["params"]), state, **options)


def _key(seed: Any) -> Any:
    return jax.random.wrap_key_data(jax.lax.bitcast_convert_type(seed, jnp.uint32), impl="threefry2x32")


def _pair(out: Any, meaning: str) -> tuple[Any, Any]:
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise OutputMismatchError(f"the function has to return {meaning}", got=describe(out))
    first, second = out
    return first, second


# --- models -----------------------------------------------------------------------------------------------------------


def taken_apart(function: Any, params: Any, state: Any) -> tuple[Callable[..., Any], Any, Any]:
    """What to call, its parameters and its state, of what was given: a function and its parameters, or a model."""
    is_linen, is_nnx = _is_of("flax.linen", function), _is_of("flax.nnx", function)
    if not callable(function):
        raise OptionError(f"a {type(function).__name__} can't be called", expected="a function of (params, *args)")
    if not is_linen and not is_nnx and params is not MISSING:
        return function, params, state
    if state is not None:
        raise OptionError("state= beside a model, which has its own", hint="Pass a function (params, state, *args)")
    if is_linen:
        if params is MISSING:
            raise OptionError("a linen module without its variables", hint="Pass model.init(key, x) as jax_params")
        model = Linen(function, [name for name in params if name != "params"])
        return model, {k: v for k, v in params.items() if k == "params"}, {k: params[k] for k in model.others} or None
    if is_nnx:
        if params is not MISSING:
            raise OptionError("jax_params beside an nnx model, which holds its own")
        return Nnx(function), *Nnx.parts(function)
    if jax.tree_util.all_leaves([function]):
        raise OptionError("a function without parameters", hint="Pass jax_params, or a model that holds its own")
    return CallablePytree(function), function, None


def _is_of(library: str, x: Any) -> bool:
    """Whether it is a module of a library that may not be there."""
    found = sys.modules.get(library)
    return found is not None and isinstance(x, found.Module)


class Model:
    """A model as a function of its parts, and how they are put together again.

    Attributes:
        arguments: the parameters of a call, those behind the parts.
        flags: keywords that say whether it trains, and what they are when it does.
        takes_streams: whether it is given its keys by the names of streams, and not by keywords of its own.
    """

    takes_streams = False

    def __init__(self, model: Any) -> None:
        self.__name__ = type(model).__name__
        self.arguments = list(signature_of(model).parameters.values())
        self.flags = _flags_among(self.arguments)

    def switched(self) -> None:
        """Take a keyword of ours that says whether it trains."""
        at = len(self.arguments) - any(p.kind is p.VAR_KEYWORD for p in self.arguments)
        self.arguments.insert(at, inspect.Parameter("_training", inspect.Parameter.KEYWORD_ONLY))
        self.flags = {"_training": True}

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the model with these parameters; with a state, which is the first of the arguments, it is renewed."""
        raise NotImplementedError

    def together(self, params: Any, state: Any) -> Any:
        """The model, or what its library calls its variables."""
        raise NotImplementedError

    def refuse_keys(self, names: Sequence[str]) -> None:
        """Raise for a name of a key that the model would not use."""


class Linen(Model):
    """`flax.linen`: the collection "params" trains, the others are its state."""

    takes_streams = True

    def __init__(self, model: Any, others: list[str]) -> None:
        super().__init__(model)
        self.model = model
        self.others = others

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.others:
            return self.model.apply(params, *args, **kwargs)
        state, *rest = args
        return self.model.apply({**params, **state}, *rest, mutable=self.others, **kwargs)

    def together(self, params: Any, state: Any) -> Any:
        return {**params, **(state or {})}


def _nnx() -> Any:
    return sys.modules["flax.nnx"]


class Nnx(Model):
    """`flax.nnx`: its `Param`s train, its other variables are its state."""

    takes_streams = True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        nnx = _nnx()
        self.graph, *states = nnx.split(model, nnx.Param, ...)
        self.hollow = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tuple(states))
        self.streams = sorted({str(x.tag) for _, x in nnx.iter_graph(model) if isinstance(x, nnx.RngKey)})
        self.switched()

    def refuse_keys(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self.streams]
        if unknown:
            raise OptionError(
                f"rngs names {unknown[0]!r}, which is no stream of the model",
                expected=f"of {', '.join(self.streams)}" if self.streams else "none: it draws nothing",
            )

    @staticmethod
    def parts(model: Any) -> tuple[Any, Any]:
        """The parameters and the state, as dicts."""
        nnx = _nnx()
        _, params, state = nnx.split(model, nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(state) or None

    def __call__(self, params: Any, *args: Any, _training: bool, **kwargs: Any) -> Any:
        nnx = _nnx()
        has_state = bool(jax.tree.leaves(self.hollow[1]))
        state, *rest = args if has_state else (None, *args)
        model = self.together(params, state)
        if not _training:
            model.eval()
        rngs = kwargs.pop("rngs", None)
        if rngs:
            nnx.reseed(model, **rngs)
        out = model(*rest, **kwargs)
        return (out, self.parts(model)[1]) if has_state else out

    def together(self, params: Any, state: Any) -> Any:
        nnx = _nnx()
        states = jax.tree.map(lambda x: x, self.hollow)
        for hollow, values in zip(states, (params, state or {}), strict=True):
            nnx.replace_by_pure_dict(hollow, values)
        return nnx.merge(self.graph, *states)


class CallablePytree(Model):
    """A pytree that can be called, as of equinox."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.is_equinox = _is_of("equinox", model)
        self.switched()

    def __call__(self, params: Any, *args: Any, _training: bool, **kwargs: Any) -> Any:
        if self.is_equinox and not _training:
            params = sys.modules["equinox"].nn.inference_mode(params)
        return params(*args, **kwargs)

    def together(self, params: Any, state: Any) -> Any:  # noqa: ARG002 - it has none
        return params
