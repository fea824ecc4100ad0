"""A JAX function of its parameters as a torch module. Mirror of `_module_in_jax`."""

from __future__ import annotations

import ast
import copy
import inspect
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from interop._crossing import refine
from interop._errors import InteropError, LeafError, OptionError, OutputMismatchError
from interop._leaf import array_of_numpy, array_to_tensor, copy_to_keep, describe
from interop._located import dump_tree, find, load_tree, locate
from interop._marshal import Kind, Tree, flatten
from interop._side import TORCH
from interop._signature import signature_of

_MISSING: Any = object()


class WrappedJaxFunction(torch.nn.Module):
    """A JAX function of `(params, *args)` as a module whose parameters are `params`.

        module = WrappedJaxFunction(apply, params)
        loss = module(x).square().mean()
        loss.backward()

    The module calls `jax_function(params, *args, **kwargs)`, on tensors, with every level on: derivatives of any order,
    `torch.func`, `torch.compile`, `torch.export` of a function that a module defines by name.

    Each float or complex array in `jax_params` is a parameter, named by its path below `params`:
    `{"params": {"Dense_0": {"kernel": …}}}` has `params.params.Dense_0.kernel`, a list `params.0`, `params.1`, an array
    on its own `params.0`. They are in the order of `jax.tree.leaves`, but for arrays beside a container, which come
    before it. Integer and bool arrays, and keys of JAX, are buffers under such names. Anything else (a number of
    Python, a string, a function, None) stays in the structure. A checkpoint whose names are positions (`params.0`,
    `params.1`, …, in the order of `jax.tree.leaves`) loads too.

    A model stands for its function, and says itself what it trains:

        WrappedJaxFunction(linen_module, variables)  # "params" trains, the other collections are state
        WrappedJaxFunction(nnx_module)               # its Params train, its other variables are state
        WrappedJaxFunction(equinox_module)           # its float arrays train; so of any callable pytree

    In `eval()`, an nnx model runs in its own `eval()`, an equinox model under `eqx.nn.inference_mode`; in `train()`, as
    they were built.

    With `state`, the function is called `jax_function(params, state, *args)` and returns `(out, new_state)`. The arrays
    of the state are buffers named below `state`; what is new is written to them in `train()`, and dropped in `eval()`.

    With `rngs`, it is given random keys, drawn from torch's generator at each call: `torch.manual_seed` reproduces
    them. `rngs="key"` is a keyword `key`, `rngs=("dropout", "noise")` a keyword `rngs` with a dict of keys; in `eval()`
    they are None. With either, a parameter `train`, `training` or `is_training` of the function is given
    `module.training`, and `deterministic`, `use_running_average` or `inference` its opposite, unless a call says it.

    Args:
        jax_function: the function, or a model.
        jax_params: a pytree of arrays; of a linen module, its `variables`; of an nnx or equinox model, nothing.
        has_aux: the function returns `(out, aux)` (with `state`, `((out, aux), new_state)`). Tensors in `aux` are plain
            values: they carry no gradient.
        clone_params: False shares memory with the arrays of `jax_params` where it can be (on one device, each array
            once): a step of an optimizer then changes them, which JAX takes for immutable. True copies.
        state: a pytree of arrays that the function renews.
        rngs: names of random keys.

    Raises:
        OptionError: no parameters, two leaves of one name, `state` beside a model that has its own.
        LeafError: an array that can't cross, by its name.
        At the call, what `as_torch`, `differentiable` and `jittable` raise, and OutputMismatchError for a new state
        that is not of the structure, shapes and kinds of the old one.
    """

    _scalar = False

    def __init__(
        self,
        jax_function: Any,
        jax_params: Any = _MISSING,
        has_aux: bool = False,
        clone_params: bool = True,
        *,
        state: Any = None,
        rngs: str | Collection[str] = (),
    ) -> None:
        super().__init__()
        function, jax_params, state = _taken_apart(jax_function, jax_params, state)
        self.jax_function = jax_function
        self.has_aux = has_aux
        # flax takes keys by the names of its own streams.
        by_stream = isinstance(function, _Linen | _Nnx)
        self.rngs: str | tuple[str, ...] = rngs if isinstance(rngs, str) and not by_stream else _as_tuple(rngs)
        self.params = _Arrays("params", jax_params, trains=True, clone=clone_params)
        self.state = None if state is None else _Arrays("state", state, trains=False, clone=True)
        self._function = _Applied(
            function,
            self.params.tree,
            None if self.state is None else self.state.tree,
            has_aux=has_aux,
            scalar=self._scalar,
            rngs=self.rngs,
        )
        self._crossed = refine(
            self._function, host=TORCH, differentiable=True, jittable=True, gradient_at_once=self._scalar
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The function of the parameters and these arguments."""
        if not self._function.has_modes:
            return self._crossed(self.params.read(), *args, **kwargs)
        for flag, in_training in self._function.flags.items():
            kwargs.setdefault(flag, self.training is in_training)
        state = [] if self.state is None else self.state.read()
        if self.training:
            state = [x.clone() for x in state]  # the buffers are written to before a backward reads what it keeps
        out, new = self._crossed(self.params.read(), state, self._seeds(), *args, **kwargs)
        if self.training and self.state is not None:
            self.state.write(new)
        return out

    def _seeds(self) -> dict[str, torch.Tensor] | None:
        """What the random keys of a call are made of, drawn from torch's generator."""
        if not self.training or not self.rngs:
            return None
        device = self.params.device
        names = (self.rngs,) if isinstance(self.rngs, str) else self.rngs
        return {name: torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32, device=device) for name in names}

    def to_jax(self) -> Any:
        """What the module is now, in JAX: copies of its parameters in the structure of `jax_params`.

        For a model this is the trained model: of linen its `variables`, of nnx and equinox the module. With `state`, it
        is `(params, state)`.
        """
        params = self.params.to_jax()
        state = None if self.state is None else self.state.to_jax()
        function = self._function.function
        if isinstance(function, _Model):
            return function.together(params, state)
        return params if self.state is None else (params, state)

    def extra_repr(self) -> str:
        """The name of the function."""
        return self._function.__name__

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The compiled function is shared: it is one of its parameters."""
        for shared in (self.jax_function, self._function, self._crossed):
            memo[id(shared)] = shared
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.params.name_by_path(state_dict, f"{prefix}params.")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class WrappedJaxScalarFunction(WrappedJaxFunction):
    """The same for a function whose value is one number, a loss; it returns `(value, aux)`.

    The gradient is computed with the value, in one call of JAX, and multiplied by the upstream gradient in the
    backward. Float tensors in `aux` carry their own gradients: a backward that reaches them runs the function again.

    Args:
        jax_function: as of `WrappedJaxFunction`.
        jax_params: the same.
        has_aux: the function returns `(value, aux)`; False for the value alone.
        clone_params: the same.
        state: the same.
        rngs: the same.

    Raises:
        As `WrappedJaxFunction`, and OutputMismatchError for a value that is no scalar.
    """

    _scalar = True

    def __init__(
        self,
        jax_function: Any,
        jax_params: Any = _MISSING,
        has_aux: bool = True,
        clone_params: bool = True,
        *,
        state: Any = None,
        rngs: str | Collection[str] = (),
    ) -> None:
        super().__init__(jax_function, jax_params, has_aux, clone_params, state=state, rngs=rngs)


def _as_tuple(names: str | Collection[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


# --- arrays as parameters and buffers ---------------------------------------------------------------------------------


class _Node(torch.nn.Module):
    """What holds the arrays of one container of a pytree, under any names."""

    def _get_name(self) -> str:
        return ""

    def extra_repr(self) -> str:
        held = {**self._parameters, **self._buffers}
        return ", ".join(f"{name}: {describe(t)}" for name, t in held.items())


class _Arrays(_Node):
    """The arrays of a pytree as parameters and buffers, named by their paths in it."""

    def __init__(self, name: str, pytree: Any, *, trains: bool, clone: bool) -> None:
        super().__init__()
        self.name = name
        leaves, self.tree = flatten(pytree, numbers_static=True)
        every = list(zip(leaves, self.tree.kinds, _routes(self.tree), strict=True))
        self.impls = tuple(_impl(leaf) if kind is Kind.KEY else None for leaf, kind, _ in every)
        self.names = tuple(".".join(route) for *_, route in every)
        places: dict[int, tuple[_Node, str]] = {}
        shared: set[int] = set()
        self.order = _order_in_jax(self.tree)
        for index in self.order:
            leaf, kind, route = every[index]
            try:
                tensor = _tensor(leaf, kind, clone=clone or id(leaf) in shared)
            except InteropError as error:
                error.function, error.argument = type(self).__name__, f"{name}.{self.names[index]}"
                raise
            shared.add(id(leaf))
            trained = trains and (tensor.is_floating_point() or tensor.is_complex())
            places[index] = self._hold(route, tensor, trained=trained)
        self.places = [places[index] for index in range(len(every))]

    def _hold(self, route: tuple[str, ...], tensor: torch.Tensor, *, trained: bool) -> tuple[_Node, str]:
        """Put a tensor where its path leads. Into the tables themselves: a name may be that of an attribute."""
        node: _Node = self
        for part in route[:-1]:
            child = node._modules.get(part)
            if child is None and part not in node._parameters and part not in node._buffers:
                child = node._modules[part] = _Node()
            if not isinstance(child, _Node):
                raise _twice(self.name, route)
            node = child
        name = route[-1]
        if name in node._modules or name in node._parameters or name in node._buffers:
            raise _twice(self.name, route)
        if trained:
            node._parameters[name] = torch.nn.Parameter(tensor)
        else:
            node._buffers[name] = tensor
        return node, name

    def read(self) -> list[torch.Tensor]:
        """The tensors as they are now."""
        return [_held(node, name) for node, name in self.places]

    def write(self, new: Sequence[torch.Tensor]) -> None:
        """New values for the buffers."""
        with torch.no_grad():
            for (node, name), value in zip(self.places, new, strict=True):
                _held(node, name).copy_(value)

    @property
    def device(self) -> torch.device | None:
        """Where they are; None if there are none."""
        return next((_held(node, name).device for node, name in self.places), None)

    def to_jax(self) -> Any:
        """The pytree, with copies of the tensors as arrays."""
        arrays = []
        for tensor, name, impl in zip(self.read(), self.names, self.impls, strict=True):
            try:
                array = copy_to_keep(tensor)
            except InteropError as error:
                error.function, error.argument = "to_jax", f"{self.name}.{name}"
                raise
            arrays.append(array if impl is None else jax.random.wrap_key_data(array, impl=impl))
        return self.tree.unflatten(arrays)

    def name_by_path(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Rename the entries of a state dict whose names are positions."""
        positional = [f"{prefix}{i}" for i in range(len(self.names))]
        if set(positional) != {key for key in state_dict if key.startswith(prefix)}:
            return
        values = [state_dict.pop(key) for key in positional]
        state_dict.update({f"{prefix}{self.names[i]}": value for i, value in zip(self.order, values, strict=True)})


def _held(node: _Node, name: str) -> Any:
    """The tensor of this name; of one that is parametrized, what it is computed to be."""
    table: dict[str, Any] = node._parameters if name in node._parameters else node._buffers
    return table[name] if name in table else getattr(node, name)


def _impl(key: Any) -> str:
    return str(jax.random.key_impl(key))


def _tensor(leaf: Any, kind: Kind, *, clone: bool) -> torch.Tensor:
    """The value of a leaf, in memory of its own if it is to be cloned."""
    if kind is Kind.TENSOR:
        raise LeafError("a tensor among the parameters of a JAX function", got=describe(leaf), hint="Pass an array")
    if kind is Kind.NUMPY:
        leaf = array_of_numpy(leaf)
    found = array_to_tensor(jax.random.key_data(leaf) if kind is Kind.KEY else leaf)
    return found.clone() if clone else found


def _order_in_jax(tree: Tree) -> list[int]:
    """The leaves in the order of `jax.tree.leaves`, which sorts dicts; last, those that JAX does not see."""
    numbered = tree.unflatten([np.asarray(i) for i in range(len(tree.kinds))])
    seen = [int(x) for x in jax.tree.leaves(numbered) if isinstance(x, np.ndarray)]
    return [*seen, *(i for i in range(len(tree.kinds)) if i not in set(seen))]


def _routes(tree: Tree) -> list[tuple[str, ...]]:
    """The names that lead to each leaf; of one on its own, its position."""
    return [tuple(map(_name, route)) or ("0",) for route in tree.routes()]


def _name(part: str) -> str:
    """A part of a path, `['w']`, `[0]` or `.field`, as a name of torch's: it has no dots, and is not empty."""
    if part.startswith("["):
        try:
            part = str(ast.literal_eval(part[1:-1]))
        except (ValueError, SyntaxError):
            part = part[1:-1]
    else:
        part = part.removeprefix(".")
    return part.replace(".", "_") or "_"


def _twice(name: str, route: tuple[str, ...]) -> OptionError:
    return OptionError(f"two leaves would be named {name}.{'.'.join(route)}", hint="Rename a key of the pytree")


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


def _flags_among(parameters: Sequence[inspect.Parameter]) -> dict[str, bool]:
    return {p.name: _FLAGS[p.name] for p in parameters if p.name in _FLAGS}


class _Applied:
    """A JAX function of `(params, *args)` as one of the leaves of its parameters, of its state, and of seeds."""

    def __init__(
        self,
        function: Callable[..., Any],
        params: Tree,
        state: Tree | None,
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
        self.__name__ = str(getattr(function, "__name__", type(function).__name__))
        self.__signature__, self.flags = self._signature()

    @property
    def has_modes(self) -> bool:
        """Whether training and evaluation differ."""
        return self.state is not None or bool(self.rngs) or isinstance(self.function, _Model)

    def __call__(self, params: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        given = [self.params.unflatten(params)]
        if not self.has_modes:
            return self._checked(self.function(*given, *args, **kwargs))
        state, seeds, *rest = args
        if self.state is not None:
            given.append(self.state.unflatten(state))
        out = self.function(*given, *rest, **self._keys(seeds), **kwargs)
        if self.state is None:
            return self._checked(out), []
        out, new = _pair(out, "(out, new_state)")
        return self._checked(out), _renewed(state, self.state, new)

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
        if self.scalar and jnp.shape(value) != ():
            raise OutputMismatchError(
                "the value is no scalar", got=describe(value), expected="f32[]", hint="Use WrappedJaxFunction"
            )
        if not aux:
            return value
        leaves, tree = flatten(aux[0], numbers_static=True)
        if not self.scalar:
            leaves = [jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x for x in leaves]
        return value, tree.unflatten(leaves)

    def _signature(self) -> tuple[inspect.Signature, dict[str, bool]]:
        """As calls see it: the leaves first; what the module gives by itself last, by keyword, and not required."""
        of = inspect.Parameter
        function = self.function
        if isinstance(function, _Model):
            parameters, flags = function.arguments, function.flags
        else:
            parameters = list(signature_of(function).parameters.values())
            for _ in range(1 if self.state is None else 2):
                if parameters and parameters[0].kind in (of.POSITIONAL_ONLY, of.POSITIONAL_OR_KEYWORD):
                    del parameters[0]
            flags = _flags_among(parameters) if self.has_modes else {}
        leading = ("params", "state", "seeds") if self.has_modes else ("params",)
        keys = {self.rngs} if isinstance(self.rngs, str) else {"rngs"} if self.rngs else set[str]()
        others = [p for p in parameters if p.name not in flags and p.name not in keys]
        at = len(others) - any(p.kind is of.VAR_KEYWORD for p in others)
        others[at:at] = [of(name, of.KEYWORD_ONLY, default=None) for name in flags]
        return inspect.Signature([*(of(name, of.POSITIONAL_ONLY) for name in leading), *others]), flags

    # How another process finds it.

    def place(self, guest_of: Callable[[Any], Any]) -> dict[str, Any]:
        """Where it is found, as plain data."""
        return {
            "function": locate(self.function, guest_of),
            "params": dump_tree(self.params),
            "state": None if self.state is None else dump_tree(self.state),
            "options": {"has_aux": self.has_aux, "scalar": self.scalar, "rngs": self.rngs},
        }

    @staticmethod
    def at(place: dict[str, Any], guest_of: Callable[[Any], Any]) -> _Applied:
        """What is found there."""
        options: dict[str, Any] = place["options"]
        rngs = options["rngs"] if isinstance(options["rngs"], str) else tuple(options["rngs"])
        state = None if place["state"] is None else load_tree(place["state"])
        function = find(place["function"], guest_of)
        options = {**options, "rngs": rngs}
        return _Applied(function, load_tree(place["params"]), state, **options)


def _key(seed: Any) -> Any:
    return jax.random.wrap_key_data(jax.lax.bitcast_convert_type(seed, jnp.uint32), impl="threefry2x32")


def _pair(out: Any, meaning: str) -> tuple[Any, Any]:
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise OutputMismatchError(f"the function has to return {meaning}", got=describe(out))
    first, second = out
    return first, second


def _renewed(old: Sequence[Any], tree: Tree, new: Any) -> list[Any]:
    """The leaves of the new state in the order of the old one; raises if it is another."""
    leaves, found = flatten(new, numbers_static=True)
    values = dict(zip(_routes(found), leaves, strict=True))
    names = _routes(tree)
    problems = [f"state.{'.'.join(r)}: unknown" for r in values if r not in names]
    for before, route in zip(old, names, strict=True):
        value = values.get(route)
        if value is None:
            problems.append(f"state.{'.'.join(route)}: missing, expected {describe(before)}")
            continue
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = values[route] = jax.random.key_data(value)
        kinds = (jnp.complexfloating, jnp.floating, jnp.integer, jnp.bool_)
        alike = all(jnp.issubdtype(value.dtype, kind) == jnp.issubdtype(before.dtype, kind) for kind in kinds)
        if value.shape != before.shape or not alike:
            problems.append(f"state.{'.'.join(route)}: got {describe(value)}, expected {describe(before)}")
    if problems:
        raise OutputMismatchError("\n    ".join(["the new state is not like the old one:", *problems]))
    return [values[route] for route in names]


# --- models -----------------------------------------------------------------------------------------------------------


def _taken_apart(function: Any, params: Any, state: Any) -> tuple[Callable[..., Any], Any, Any]:
    """What to call, its parameters and its state, of what was given: a function and its parameters, or a model."""
    is_linen, is_nnx = _is_of("flax.linen", function), _is_of("flax.nnx", function)
    if not callable(function):
        raise OptionError(f"a {type(function).__name__} can't be called", expected="a function of (params, *args)")
    if not is_linen and not is_nnx and params is not _MISSING:
        return function, params, state
    if state is not None:
        raise OptionError("state= beside a model, which has its own", hint="Pass a function (params, state, *args)")
    if is_linen:
        if params is _MISSING:
            raise OptionError("a linen module without its variables", hint="Pass model.init(key, x) as jax_params")
        model = _Linen(function, [name for name in params if name != "params"])
        return model, {k: v for k, v in params.items() if k == "params"}, {k: params[k] for k in model.others} or None
    if is_nnx:
        if params is not _MISSING:
            raise OptionError("jax_params beside an nnx model, which holds its own")
        return _Nnx(function), *_Nnx.parts(function)
    if jax.tree_util.all_leaves([function]):
        raise OptionError("a function without parameters", hint="Pass jax_params, or a model that holds its own")
    return _Callable(function), function, None


def _is_of(library: str, x: Any) -> bool:
    """Whether it is a module of a library that may not be there."""
    found = sys.modules.get(library)
    return found is not None and isinstance(x, found.Module)


class _Model:
    """A model as a function of its parts, and how they are put together again.

    Attributes:
        arguments: the parameters of a call, those behind the parts.
        flags: keywords that say whether it trains, and what they are when it does.
    """

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


class _Linen(_Model):
    """`flax.linen`: the collection "params" trains, the others are its state."""

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


class _Nnx(_Model):
    """`flax.nnx`: its `Param`s train, its other variables are its state."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        nnx: Any = sys.modules["flax.nnx"]
        self.graph, *states = nnx.split(model, nnx.Param, ...)
        self.hollow = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tuple(states))
        self.switched()

    @staticmethod
    def parts(model: Any) -> tuple[Any, Any]:
        """The parameters and the state, as dicts."""
        nnx: Any = sys.modules["flax.nnx"]
        _, params, state = nnx.split(model, nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(state) or None

    def __call__(self, params: Any, *args: Any, _training: bool, **kwargs: Any) -> Any:
        nnx: Any = sys.modules["flax.nnx"]
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
        nnx: Any = sys.modules["flax.nnx"]
        states = jax.tree.map(lambda x: x, self.hollow)
        for hollow, values in zip(states, (params, state or {}), strict=True):
            nnx.replace_by_pure_dict(hollow, values)
        return nnx.merge(self.graph, *states)


class _Callable(_Model):
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
