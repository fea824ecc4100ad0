"""Bare values across, for the user to keep: leaves, pytrees, devices and dtypes; functions; modules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import torch

from interop._crossing import Crossing, refine
from interop._errors import ContainerError, DeviceError, InteropError, LeafError, OptionError, blaming
from interop._leaf import (
    NUMPY_OF,
    copy_to_keep,
    share_array,
    share_tensor,
    torch_device,
    torch_dtype,
)
from interop._leaf import jax_device as jax_device_of
from interop._marshal import Kind, flatten, where
from interop._module_in_jax import refuse_lazy
from interop._module_in_torch import WrappedJaxFunction
from interop._private import torch as torch_private
from interop._side import JAX, TORCH
from interop._types import typed

if TYPE_CHECKING:
    from interop._overloads import JaxToTorch, MakeFunctional, TorchModuleToJax, TorchToJax


@typed(lambda: TorchToJax)
@torch_private.never_traced
def torch_to_jax(x: Any, /, *, copy: bool = False) -> Any:
    """The value in JAX, for the user to keep.

    A tensor becomes an array, a pytree is converted leaf by leaf, a `torch.device` or `torch.dtype` becomes JAX's, a
    torch function a JAX function with every level on, a module `make_functional` of it. Anything else comes back as
    itself.

    A dense CPU tensor shares its memory with the array, in any order of its axes: a later write to the tensor shows in
    the array. A copy is made with `copy=True`, for memory that is not dense or not aligned to 64 bytes, for a lazily
    conjugated or negated tensor, and where 64 bits are narrowed. A tensor that requires grad is converted without its
    graph.

    While `jax_enable_x64` is off, `float64` and `complex128` are narrowed with a warning, and 64-bit integers become
    32-bit if they fit.

    Raises:
        LeafError: a tensor that has no counterpart (sparse, quantised, meta, an unknown subclass).
        NarrowingError: a 64-bit integer that does not fit.
    """
    if isinstance(x, torch.device):
        return jax_device_of(x)
    if isinstance(x, torch.dtype):
        return NUMPY_OF.get(x, x)
    if isinstance(x, torch.nn.Module):
        return make_functional(x)
    if _is_function(x):
        return refine(x, host=JAX, differentiable=True, jittable=True)
    return _map("torch_to_jax", x, (Kind.TENSOR,), functools.partial(share_tensor, copy=copy))


@typed(lambda: JaxToTorch)
@torch_private.never_traced
def jax_to_torch(x: Any, /, *, copy: bool = False) -> Any:
    """The value in torch, for the user to keep.

    An array becomes a tensor, a pytree is converted leaf by leaf, a `jax.Device` or dtype becomes torch's, a JAX
    function a torch function with every level on, a pytree that can be called (a model of equinox or nnx)
    `WrappedJaxFunction` of it. Anything else comes back as itself.

    The tensor shares its memory with the array, which JAX takes for immutable: write to it only after `copy=True`. A
    sharded array is gathered first. This waits until the array's value is there.

    Raises:
        LeafError: an array that has no counterpart (a typed PRNG key, a sub-byte integer, a deleted array, a tracer).
    """
    if isinstance(x, jax.Device):
        return torch_device(x)
    if isinstance(x, np.dtype) or (isinstance(x, type) and isinstance(getattr(x, "dtype", None), np.dtype)):
        return torch_dtype(x)  # jnp.float32 is a class that has one
    if isinstance(x, torch.nn.Module):
        return x
    if _is_function(x):
        return refine(x, host=TORCH, differentiable=True, jittable=True)
    if callable(x) and not isinstance(x, type):
        return WrappedJaxFunction(x)
    return _map("jax_to_torch", x, (Kind.ARRAY, Kind.KEY), functools.partial(share_array, copy=copy))


def _map(name: str, x: Any, kinds: tuple[Kind, ...], convert: Callable[[Any], Any]) -> Any:
    """The pytree with its leaves of these kinds converted."""
    path = "x"
    try:
        leaves, tree = flatten(x)
        for index, kind in enumerate(tree.kinds):
            if kind in kinds:
                path = f"x{tree.path(index)}" if len(leaves) > 1 or not tree.single else "x"
                leaves[index] = convert(leaves[index])
    except InteropError as error:
        error.function, error.argument = name, path + where(x) if isinstance(error, ContainerError) else path
        raise
    return tree.unflatten(leaves)


def _is_function(x: Any) -> bool:
    """A callable that is no class, and no pytree of values that happens to be callable."""
    return callable(x) and not isinstance(x, type) and (isinstance(x, Crossing) or jax.tree_util.all_leaves([x]))


# --- modules ----------------------------------------------------------------------------------------------------------


@typed(lambda: MakeFunctional)
@torch_private.never_traced
def make_functional(
    module: torch.nn.Module, /, *, rng: str | None = None, mutable: bool = False, example_output: Any = None
) -> tuple[Any, dict[str, jax.Array]]:
    """A module as a function of JAX and its parameters.

        apply, params = make_functional(net)
        gradients = jax.grad(lambda params, x: apply(params, x).sum())(params, x)

    `apply(params, *args, **kwargs)` is `jittable(differentiable(as_jax(module)))`: the module's `forward` with any
    arguments, on these parameters. The module itself is never touched. Its buffers are constants, read at each call,
    unless they are given in `params` under their names. Trained parameters, and buffers that are persistent, go back by
    `module.load_state_dict(jax_to_torch(params), strict=False)`; of a compiled module, into `module._orig_mod`.

    Args:
        module: any module; a compiled one is unwrapped.
        rng: the name of a keyword of `apply`, a key of JAX, for a module that draws random numbers. See `as_jax`.
        mutable: `apply` returns `(out, buffers)`, with the buffers as the module left them. See `as_jax`.
        example_output: for a module whose output shapes can't be inferred. See `jittable`.

    Returns:
        `apply` and `params`, a dict by name in the order of `module.named_parameters()`: copies, in the dtypes of the
        module and on its device. A tied parameter is there once, under its first name, and its gradient is the sum. A
        frozen one (`requires_grad=False`) is a parameter like the others: what is trained, JAX decides, as by
        `optax.multi_transform({"train": optax.adam(1e-3), "freeze": optax.set_to_zero()}, labels)`.

    Raises:
        UnsupportedError: a wrapper for several devices (`module.module` is to be crossed), a scripted or a quantised
            module, a lazy one that is not initialised.
        LeafError: a parameter that can't cross, by its name: on the meta device, sparse, of an unknown subclass.
        PrecisionError: a 64-bit float parameter while `jax_enable_x64` is off.
        DeviceError: parameters on several devices.
        At the call, LeafError: parameters that are missing, unknown, or of another shape or kind, all of them by name.
    """
    if not isinstance(module, torch.nn.Module):
        raise OptionError(f"make_functional of a {type(module).__name__}", expected="an nn.Module", hint=_NO_MODULE)
    apply = refine(
        module,
        host=JAX,
        differentiable=True,
        jittable=True,
        rng=rng,
        mutable=mutable,
        example_output=example_output,
    )
    return apply, _parameters_of(getattr(module, "_orig_mod", module))


_NO_MODULE = "A function needs no parameters: torch_to_jax(function)"


@typed(lambda: TorchModuleToJax)
@torch_private.never_traced
def torch_module_to_jax(model: torch.nn.Module, example_output: Any = None) -> tuple[Any, tuple[jax.Array, ...]]:
    """The same with the parameters as a tuple, in the order of `model.parameters()`.

    Args:
        model: any module.
        example_output: as of `make_functional`; shapes that can be inferred need none.

    Returns:
        `apply(params, *args, **kwargs)` and `params`.

    It raises what `make_functional` does.
    """
    apply, params = make_functional(model, example_output=example_output)
    positional = functools.update_wrapper(functools.partial(by_position, apply, tuple(params)), apply)
    return positional, tuple(params.values())


def by_position(apply: Any, names: tuple[str, ...], params: Sequence[Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call a function of parameters by name with parameters in their order."""
    return apply(by_name(names, params), *args, **kwargs)


def by_name(names: tuple[str, ...], params: Sequence[Any]) -> dict[str, Any]:
    """The parameters that were given by their position; what is missing has a name where they arrive."""
    if len(params) > len(names):
        raise LeafError(f"the module has {len(names)} parameters", got=f"{len(params)}")
    return dict(zip(names, params, strict=False))


def _parameters_of(module: torch.nn.Module) -> dict[str, jax.Array]:
    """Copies of the parameters, by name."""
    refuse_lazy(module)
    named = dict(module.named_parameters())
    homes: dict[torch.device, str] = {}
    for name, t in (*named.items(), *module.named_buffers()):
        homes.setdefault(t.device, name)
    if len(homes) > 1:
        where = " and ".join(f"{name} is on {device}" for device, name in homes.items())
        error = DeviceError(f"the module is on several devices: {where}", hint="Move it to one")
        error.function = "make_functional"
        raise error
    meta = [name for name, t in module.named_buffers() if t.is_meta]
    if meta and not named:
        raise LeafError(f"{meta[0]} is on the 'meta' device, and has no values")
    arrays: dict[str, jax.Array] = {}
    for name, tensor in named.items():
        with blaming("make_functional", f"module.{name}"):
            leaves, tree = flatten(tensor)
            arrays[name] = tree.unflatten(list(map(copy_to_keep, leaves)))
    return arrays
