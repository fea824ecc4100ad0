"""Bare values across: leaves, pytrees, devices and dtypes, for the user to keep."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from interop._crossing import Crossing, refine
from interop._errors import ContainerError, InteropError
from interop._leaf import NUMPY_OF, share_array, share_tensor, torch_device, torch_dtype
from interop._leaf import jax_device as jax_device_of
from interop._marshal import Kind, flatten, where
from interop._side import JAX, TORCH


def torch_to_jax(x: Any, /, *, copy: bool = False) -> Any:
    """The value in JAX, for the user to keep.

    A tensor becomes an array, a pytree is converted leaf by leaf, a `torch.device` or `torch.dtype` becomes JAX's, a
    torch function a JAX function with every level on. Anything else comes back as itself.

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
    if _is_function(x):
        return refine(x, host=JAX, differentiable=True, jittable=True)
    return _map("torch_to_jax", x, (Kind.TENSOR,), functools.partial(share_tensor, copy=copy))


def jax_to_torch(x: Any, /, *, copy: bool = False) -> Any:
    """The value in torch, for the user to keep.

    An array becomes a tensor, a pytree is converted leaf by leaf, a `jax.Device` or numpy dtype becomes torch's, a JAX
    function a torch function with every level on. Anything else comes back as itself.

    The tensor shares its memory with the array, which JAX takes for immutable: write to it only after `copy=True`. A
    sharded array is gathered first. This waits until the array's value is there.

    Raises:
        LeafError: an array that has no counterpart (a typed PRNG key, a sub-byte integer, a deleted array, a tracer).
    """
    if isinstance(x, jax.Device):
        return torch_device(x)
    if isinstance(x, np.dtype):
        return torch_dtype(x)
    if _is_function(x):
        return refine(x, host=TORCH, differentiable=True, jittable=True)
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
