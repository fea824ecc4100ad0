"""A JAX function of its parameters as a torch module. Mirror of `_module_in_jax`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Generic, overload

import jax
import torch
from jax import Array
from torch import Tensor
from typing_extensions import ParamSpec, TypeVar, Unpack

from interop._crossing import no_script, refine
from interop._errors import LeafError, OptionError, UnsupportedError, blaming
from interop._leaf import array_to_tensor, copy_to_keep, describe, tensor_of_numpy, traced_device
from interop._models import MISSING, Applied, Form, Model, Structure, apart, taken_apart
from interop._private import torch as torch_private
from interop._side import TORCH
from interop._types import Crossed, Names, OfParams, OfParamsAndState, SupportsTorch, Untyped, WrapperOptions

P = ParamSpec("P", default=...)
R_co = TypeVar("R_co", covariant=True, default=Any)
Q = ParamSpec("Q")
T = TypeVar("T")
K = TypeVar("K")


class WrappedJaxFunction(torch.nn.Module, Generic[P, R_co]):
    """A JAX function of `(params, *args)` as a module whose parameters are `params`.

        module = WrappedJaxFunction(apply, params)
        loss = module(x).square().mean()
        loss.backward()

    The module calls `jax_function(params, *args, **kwargs)`, on tensors, with every level on: derivatives of any order,
    `torch.func`, `torch.compile`, `torch.export` of a function that a module defines by name.

    Each float or complex array in `jax_params` is a parameter, named by its path below `params`:
    `{"params": {"Dense_0": {"kernel": …}}}` has `params.params.Dense_0.kernel`, a list `params.0`, `params.1`, an array
    on its own `params.0`. They are in the order of `jax.tree.leaves`, but for arrays beside a container, which come
    before it; a name that torch itself uses (`training`) gets an underscore. Integer and bool arrays, and keys of JAX,
    are buffers under such names, unsigned ones as their bits. Anything else (a number of Python, a string, a function,
    None) stays in the structure. Arrays of numpy keep their dtype. A checkpoint whose names are positions (`params.0`,
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
        OutputMismatchError: at the call, a new state that is not of the structure, shapes and kinds of the old one;
            a call also raises what `as_torch`, `differentiable` and `jittable` do.
    """

    _scalar = False
    __call__: Crossed[P, R_co]  # pyright: ignore[reportIncompatibleMethodOverride] - torch's takes anything

    # The overloads are written by tests/typing/overloads.py
    @overload
    def __init__(
        self: WrappedJaxFunction[Q, Any],
        jax_function: OfParams[Q, Untyped],
        jax_params: Any,
        **options: Unpack[WrapperOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxFunction[Q, Tensor],
        jax_function: OfParams[Q, Array],
        jax_params: Any,
        **options: Unpack[WrapperOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxFunction[Q, T],
        jax_function: OfParams[Q, SupportsTorch[T]],
        jax_params: Any,
        **options: Unpack[WrapperOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxFunction[Q, tuple[Tensor, Tensor]],
        jax_function: OfParams[Q, tuple[Array, Array]],
        jax_params: Any,
        **options: Unpack[WrapperOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxFunction[Q, tuple[Tensor, dict[K, Tensor]]],
        jax_function: OfParams[Q, tuple[Array, dict[K, Array]]],
        jax_params: Any,
        **options: Unpack[WrapperOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxFunction[Q, tuple[Tensor, Any]],
        jax_function: OfParams[Q, tuple[Array, Any]],
        jax_params: Any,
        **options: Unpack[WrapperOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxFunction[Q, Any],
        jax_function: OfParamsAndState[Q, tuple[Untyped, Any]],
        jax_params: Any,
        *,
        state: Any,
        **options: Unpack[WrapperOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxFunction[Q, Tensor],
        jax_function: OfParamsAndState[Q, tuple[Array, Any]],
        jax_params: Any,
        *,
        state: Any,
        **options: Unpack[WrapperOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxFunction[Q, tuple[Tensor, Any]],
        jax_function: OfParamsAndState[Q, tuple[tuple[Array, Any], Any]],
        jax_params: Any,
        *,
        state: Any,
        **options: Unpack[WrapperOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxFunction[Q, Any], jax_function: Callable[Q, Untyped], **options: Unpack[WrapperOptions]
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxFunction[Q, Tensor], jax_function: Callable[Q, Array], **options: Unpack[WrapperOptions]
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxFunction[Q, tuple[Tensor, Any]],
        jax_function: Callable[Q, tuple[Array, Any]],
        **options: Unpack[WrapperOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxFunction[..., Any],
        jax_function: Any,
        jax_params: Any = ...,
        has_aux: bool = ...,
        clone_params: bool = ...,
        *,
        state: Any = ...,
        rngs: Names = ...,
    ) -> None: ...
    # end of the overloads
    def __init__(
        self,
        jax_function: Any,
        jax_params: Any = MISSING,
        has_aux: bool = False,
        clone_params: bool = True,
        *,
        state: Any = None,
        rngs: Names = (),
    ) -> None:
        super().__init__()
        function, jax_params, state = taken_apart(jax_function, jax_params, state)
        self.jax_function = jax_function
        self.has_aux = has_aux
        self.rngs = _named_keys(rngs, function)
        leaves, params = apart(jax_params, "params")
        self.params = _held(params, leaves, trains=True, clone=clone_params)
        leaves, renewed = ([], None) if state is None else apart(state, "state")
        self.state = renewed and _held(renewed, leaves, trains=False, clone=True)
        self._moves: bool | None = None  # whether a call in training leaves other random state; seen in the first
        self._function = Applied(function, params, renewed, has_aux=has_aux, scalar=self._scalar, rngs=self.rngs)
        self._crossed = refine(
            self._function, host=TORCH, differentiable=True, jittable=True, gradient_at_once=self._scalar
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The function of the parameters and these arguments."""
        own, kwargs = self._own(len(args), kwargs)
        if not self._function.has_modes:
            return self._crossed(own, *args, **kwargs)
        out, new = self._crossed(own, *args, **kwargs)
        if self.training:
            self._renew(new)
        return out

    def __prepare_scriptable__(self) -> Any:
        raise no_script(type(self).__name__)

    def _renew(self, new: Sequence[torch.Tensor]) -> None:
        """Write the state of after the call to the buffers."""
        pairs = list(zip(self._state(), new, strict=True))
        is_plain = not torch.compiler.is_compiling() and not torch_private.functorch_active()
        if self._moves is None and is_plain:  # keys and counts are the integers of a state
            self._moves = any(not buffer.is_floating_point() and not buffer.equal(value) for buffer, value in pairs)
        with torch.no_grad():
            for buffer, value in pairs:
                buffer.copy_(value)

    def _own(self, count: int, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """What the module gives its function, and the keywords of a call with `count` arguments, its modes in them."""
        params = _read(self.params, self._function.params)
        if not self._function.has_modes:
            return params, kwargs
        for flag, in_training in self._function.flags.items():
            if flag not in kwargs and count <= self._function.places.get(flag, count):
                kwargs[flag] = self.training is in_training
        state = self._state()
        if self.training:
            if self._moves and not torch.compiler.is_compiling() and torch_private.is_in_backward():
                raise UnsupportedError(
                    "a checkpoint runs it again with the random state that its first run has left: another mask",
                    hint="Call it outside of torch.utils.checkpoint, or draw from keys that it is given: rngs=...",
                ).of(self._function.__name__)
            state = [x.clone() for x in state]  # the buffers are written to before a backward reads what it keeps
        return (params, state, self._seeds(params)), kwargs

    def _own_named(self, count: int, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[int, str]]:
        """The same, with the names of what the module gives, by identity."""
        own, kwargs = self._own(count, kwargs)
        params, state, seeds = own if self._function.has_modes else (own, [], None)
        names = {id(seed): f"rngs[{name!r}]" for name, seed in (seeds or {}).items()}
        for structure, leaves in ((self._function.params, params), (self._function.state, state)):
            if structure is not None:
                names |= {id(t): f"{structure.label}.{n}" for n, t in zip(structure.names, leaves, strict=True)}
        return own, kwargs, names

    def _state(self) -> list[torch.Tensor]:
        structure = self._function.state
        return [] if structure is None else _read(self.state, structure)

    def _seeds(self, params: Sequence[torch.Tensor]) -> dict[str, torch.Tensor] | None:
        """What the random keys of a call are made of, drawn from torch's generator, beside the parameters."""
        if not self.training or not self.rngs:
            return None
        names = (self.rngs,) if isinstance(self.rngs, str) else self.rngs
        device = next((t.device for t in params), None)
        return {name: torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32, device=device) for name in names}

    def to_jax(self) -> Any:
        """What the module is now, in JAX: copies of its parameters in the structure of `jax_params`.

        For a model this is the trained model: of linen its `variables`, of nnx and equinox the module. With `state`, it
        is `(params, state)`.
        """
        applied = self._function
        params = _to_jax(_read(self.params, applied.params), applied.params)
        state = None if applied.state is None else _to_jax(self._state(), applied.state)
        if isinstance(applied.function, Model):
            return applied.function.together(params, state)
        return params if applied.state is None else (params, state)

    def extra_repr(self) -> str:
        """The name of the function."""
        return self._function.__name__

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The compiled function is shared: the parameters are its arguments."""
        for shared in (self.jax_function, self._function, self._crossed):
            memo[id(shared)] = shared
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        _name_by_path(state_dict, f"{prefix}params.", self._function.params)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class WrappedJaxScalarFunction(WrappedJaxFunction[P, R_co]):
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
        OutputMismatchError: at the call, a value that is no scalar; else what `WrappedJaxFunction` raises.
    """

    _scalar = True

    # The overloads are written by tests/typing/overloads.py
    @overload
    def __init__(
        self: WrappedJaxScalarFunction[Q, Any],
        jax_function: OfParams[Q, Untyped],
        jax_params: Any,
        **options: Unpack[WrapperOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxScalarFunction[Q, Tensor],
        jax_function: OfParams[Q, Array],
        jax_params: Any,
        **options: Unpack[WrapperOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxScalarFunction[Q, T],
        jax_function: OfParams[Q, SupportsTorch[T]],
        jax_params: Any,
        **options: Unpack[WrapperOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxScalarFunction[Q, tuple[Tensor, Tensor]],
        jax_function: OfParams[Q, tuple[Array, Array]],
        jax_params: Any,
        **options: Unpack[WrapperOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxScalarFunction[Q, tuple[Tensor, dict[K, Tensor]]],
        jax_function: OfParams[Q, tuple[Array, dict[K, Array]]],
        jax_params: Any,
        **options: Unpack[WrapperOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxScalarFunction[Q, tuple[Tensor, Any]],
        jax_function: OfParams[Q, tuple[Array, Any]],
        jax_params: Any,
        **options: Unpack[WrapperOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxScalarFunction[Q, Any],
        jax_function: OfParamsAndState[Q, tuple[Untyped, Any]],
        jax_params: Any,
        *,
        state: Any,
        **options: Unpack[WrapperOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxScalarFunction[Q, Tensor],
        jax_function: OfParamsAndState[Q, tuple[Array, Any]],
        jax_params: Any,
        *,
        state: Any,
        **options: Unpack[WrapperOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxScalarFunction[Q, tuple[Tensor, Any]],
        jax_function: OfParamsAndState[Q, tuple[tuple[Array, Any], Any]],
        jax_params: Any,
        *,
        state: Any,
        **options: Unpack[WrapperOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxScalarFunction[Q, Any], jax_function: Callable[Q, Untyped], **options: Unpack[WrapperOptions]
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxScalarFunction[Q, Tensor], jax_function: Callable[Q, Array], **options: Unpack[WrapperOptions]
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxScalarFunction[Q, tuple[Tensor, Any]],
        jax_function: Callable[Q, tuple[Array, Any]],
        **options: Unpack[WrapperOptions],
    ) -> None: ...
    @overload
    def __init__(
        self: WrappedJaxScalarFunction[..., Any],
        jax_function: Any,
        jax_params: Any = ...,
        has_aux: bool = ...,
        clone_params: bool = ...,
        *,
        state: Any = ...,
        rngs: Names = ...,
    ) -> None: ...
    # end of the overloads
    def __init__(
        self,
        jax_function: Any,
        jax_params: Any = MISSING,
        has_aux: bool = True,
        clone_params: bool = True,
        *,
        state: Any = None,
        rngs: Names = (),
    ) -> None:
        super().__init__(jax_function, jax_params, has_aux, clone_params, state=state, rngs=rngs)


def _named_keys(rngs: Names, function: Any) -> str | tuple[str, ...]:
    """One key by a keyword of its own name, or the names of streams."""
    names = (rngs,) if isinstance(rngs, str) else tuple(rngs)
    if isinstance(function, Model):
        function.refuse_keys(names)
    by_keyword = isinstance(rngs, str) and not (isinstance(function, Model) and function.takes_streams)
    return rngs if isinstance(rngs, str) and by_keyword else names


# --- arrays as parameters and buffers ---------------------------------------------------------------------------------


class _Node(torch.nn.Module):
    """What holds the arrays of one container of a pytree."""

    def _get_name(self) -> str:
        return ""

    def extra_repr(self) -> str:
        held = {**self._parameters, **self._buffers}
        return ", ".join(f"{name}: {describe(t)}" for name, t in held.items())


def _held(structure: Structure, leaves: Sequence[Any], *, trains: bool, clone: bool) -> _Node:
    """A module that holds these leaves under their names; in the order of JAX, which an optimizer counts them in."""
    root = _Node()
    shared: set[int] = set()
    for index in structure.order_in_jax():
        leaf, name = leaves[index], f"{structure.label}.{structure.names[index]}"
        with blaming("WrappedJaxFunction", name):
            tensor = _tensor(leaf, structure.forms[index], clone=clone or id(leaf) in shared)
        shared.add(id(leaf))
        trained = trains and (tensor.is_floating_point() or tensor.is_complex())
        if not _put(tensor, root, structure.routes[index], trained=trained):
            raise OptionError(f"two leaves would be named {name}", hint="Rename a key of the pytree")
    return root


def _put(tensor: torch.Tensor, root: _Node, route: tuple[str, ...], *, trained: bool) -> bool:
    """Put a tensor where its path leads; whether nothing else was there."""
    node = root
    *parts, name = route
    for part in parts:
        child = node._modules.get(part)
        if child is None and not hasattr(node, part):
            child = node._modules[part] = _Node()
        if not isinstance(child, _Node):
            return False
        node = child
    if hasattr(node, name):
        return False
    if trained:
        node.register_parameter(name, torch.nn.Parameter(tensor))
    else:
        node.register_buffer(name, tensor)
    return True


def _tensor(leaf: Any, form: Form, *, clone: bool) -> torch.Tensor:
    """The value of a leaf as torch holds it, in memory of its own if it is to be cloned."""
    if isinstance(leaf, torch.Tensor):
        raise LeafError("a tensor among the arrays of a JAX function", got=describe(leaf), hint="Pass an array")
    if isinstance(leaf, jax.Array):
        found = array_to_tensor(jax.random.key_data(leaf) if form.impl else leaf)
    else:
        found = tensor_of_numpy(leaf).to(traced_device())
    if form.bits:
        found = found.view(getattr(torch, form.bits))
    return found.clone() if clone else found


def _read(root: Any, structure: Structure) -> list[torch.Tensor]:
    """The tensors as they are now; of one that is parametrized, what it is computed to be.

    They are looked up by their names: whatever stands for a module of torch has the same tables.
    """
    found: list[torch.Tensor] = []
    for *parts, name in structure.routes:
        node = root
        for part in parts:
            node = node._modules[part]
        table = node._parameters if name in node._parameters else node._buffers
        found.append(table[name] if name in table else getattr(node, name))
    return found


def _to_jax(tensors: Sequence[torch.Tensor], structure: Structure) -> Any:
    """The pytree, with copies of the tensors as arrays."""
    arrays: list[Any] = []
    for tensor, name in zip(tensors, structure.names, strict=True):
        with blaming("to_jax", f"{structure.label}.{name}"):
            arrays.append(copy_to_keep(tensor))
    return structure.together(arrays)


def _name_by_path(state_dict: dict[str, Any], prefix: str, structure: Structure) -> None:
    """Rename the entries of a state dict whose names are positions."""
    names = structure.names
    positional = [f"{prefix}{i}" for i in range(len(names))]
    if set(positional) == {key for key in state_dict if key.startswith(prefix)}:
        values = [state_dict.pop(key) for key in positional]
        order = structure.order_in_jax()
        state_dict.update({f"{prefix}{names[i]}": value for i, value in zip(order, values, strict=True)})
