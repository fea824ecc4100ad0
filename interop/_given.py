"""A leaf that is given to a function, as the host's own, and one that it returns, as the guest's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import numpy as np
import torch

from interop import _in_torch
from interop._errors import InteropError, LeafError
from interop._leaf import (
    array_of_numpy,
    array_to_tensor,
    describe,
    device_of,
    refuse_foreign,
    tensor_of_numpy,
    tensor_to_array,
    torch_dtype,
    why_copied,
    x64_enabled,
)
from interop._marshal import Kind, Tree
from interop._private import torch as torch_private
from interop._side import JAX, TORCH, Leaf, Side


def in_64_bits(leaves: Sequence[Leaf]) -> bool:
    """Whether a JAX function of these leaves, as torch has them, runs in 64 bits."""
    return _in_torch.in_64_bits([x for x in leaves if isinstance(x, torch.Tensor)])


def crosses(host: Side, leaf: Leaf, kind: Kind, index: int, *, x64: bool, jit: bool) -> tuple[str, str]:
    """How a leaf of a call crosses ("shared", "copied", "converted", "traced"), and why; what is refused, raises."""
    own = given(host, leaf, kind, index)
    if kind is Kind.NUMBER:
        return ("converted", "a traced number") if host is TORCH else ("static", "a number, given as it is")
    if isinstance(leaf, jax.core.Tracer) or (kind is Kind.TENSOR and torch_private.is_traced(leaf)):
        return "traced", "it has no values yet"
    if host is JAX:
        array_to_tensor(own)  # it raises
        return "copied", _spread(leaf) or _FOREIGN.get(kind, "the function may write to it")
    if kind is Kind.NUMPY:
        return "copied", "numpy's memory is the user's to write"
    if kind is Kind.KEY:
        return "converted", "to its data, and typed again"
    why = _spread(leaf) or why_copied(refuse_foreign(own), x64=x64)
    if why is None and not jit:
        why = "a function that is not traced may keep it"
    return ("copied", why) if why else ("shared", "an array already" if kind is Kind.ARRAY else "")


def _spread(leaf: Leaf) -> str | None:
    """Why an array on several devices is copied."""
    count = len(leaf.sharding.device_set) if isinstance(leaf, jax.Array) else 1
    return f"it is gathered from {count} devices" if count > 1 else None


_FOREIGN = {Kind.TENSOR: "a tensor, of which the value crosses", Kind.NUMPY: "numpy's memory is the user's to write"}


def given(host: Side, leaf: Leaf, kind: Kind, index: int) -> Leaf:
    """A leaf of a call as a leaf of the host."""
    try:
        if kind is Kind.NUMBER:
            return leaf
        return _tensor_given(leaf, kind) if host is TORCH else _array_given(leaf, kind)
    except InteropError as error:
        raise error.at(index)  # noqa: B904 - the same error, located


def beside_tensors(leaves: list[Leaf], pairs: Sequence[tuple[Leaf, Kind]]) -> list[Leaf]:
    """As in JAX, what was put nowhere goes where the others are."""
    tensors = [leaf for leaf, kind in pairs if kind is Kind.TENSOR]
    if not tensors:
        return leaves
    device = device_of(tensors)
    is_free = [kind is Kind.NUMPY or (kind in (Kind.ARRAY, Kind.KEY) and not leaf.committed) for leaf, kind in pairs]
    return [t.to(device) if free else t for t, free in zip(leaves, is_free, strict=True)]


def _tensor_given(leaf: Leaf, kind: Kind) -> torch.Tensor:
    if kind is Kind.TENSOR:
        return leaf
    if kind is Kind.NUMPY:
        return tensor_of_numpy(leaf)
    return array_to_tensor(jax.random.key_data(leaf) if kind is Kind.KEY else leaf)


def _array_given(leaf: Leaf, kind: Kind) -> Any:
    if kind is Kind.ARRAY:
        return leaf
    if kind is Kind.NUMPY:
        return array_of_numpy(leaf)
    if kind is Kind.KEY:
        raise LeafError("a typed PRNG key can't cross", got=describe(leaf), hint="Pass jax.random.key_data(key)")
    if leaf.requires_grad and torch.is_grad_enabled():
        raise LeafError(
            "a tensor that requires grad would lose its gradient in a function that JAX calls",
            got=describe(leaf),
            hint="Pass x.detach(), or call the torch function itself",
        )
    return tensor_to_array(leaf.detach().clone(), x64=x64_enabled())


def key_data(key: Any, name: str) -> Any:
    """The data of a key of JAX, typed or raw."""
    if isinstance(key, jax.Array | np.ndarray):
        if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.key_data(key)
        if key.dtype == np.uint32 and key.shape in ((2,), (4,)):  # of threefry, of rbg
            return jax.numpy.asarray(key)
    error = LeafError("it is no key of JAX", got=describe(key), hint="Pass jax.random.key(seed), or its data")
    error.argument = name
    raise error


def returned(guest: Side, out: Leaf, kind: Kind, tree: Tree, index: int) -> Leaf:
    """A leaf of a result as a leaf of the guest, of a dtype that can cross."""
    try:
        return _returned(guest, out, kind)
    except InteropError as error:
        error.result = error.result or tree.path(index)
        raise


def _returned(guest: Side, out: Leaf, kind: Kind) -> Leaf:
    own = Kind.ARRAY if guest is JAX else Kind.TENSOR
    if kind is Kind.NUMPY:
        return array_of_numpy(out) if guest is JAX else tensor_of_numpy(out)
    if kind is not own and not (guest is TORCH and kind is Kind.ARRAY):
        if kind is Kind.KEY:
            raise LeafError(f"a typed PRNG key ({out.dtype}) can't cross", hint="Return jax.random.key_data(key)")
        raise LeafError(f"a {type(out).__name__} can't cross", got=describe(out))
    if guest is JAX:
        torch_dtype(out.dtype)
        return out
    return out if kind is own else array_to_tensor(out)
