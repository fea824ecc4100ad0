"""What a crossing can't be cheaper than: the same calls by hand, with no checks, no pytrees and no autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch
from jax.experimental.buffer_callback import buffer_callback
from jaxlib import _jax

_CPU = jax.devices("cpu")[0]


def to_jax(t: torch.Tensor) -> jax.Array:
    """A tensor's memory as an array."""
    return _jax.dlpack_managed_tensor_to_buffer(torch._C._to_dlpack(t), _CPU, None)


def to_torch(a: jax.Array) -> torch.Tensor:
    """An array's memory as a tensor."""
    return torch._C._from_dlpack(_jax.buffer_to_dlpack_managed_tensor(a, None))


def jax_call(fn: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """A JAX function on tensors: import, the compiled function, export."""
    jitted = jax.jit(fn)
    return lambda *tensors: to_torch(jitted(*[to_jax(t) for t in tensors]))


def jax_gradient(fn: Callable[..., Any]) -> Callable[..., list[torch.Tensor]]:
    """Forward and backward of a JAX function of a flat list of tensors, the residuals staying in JAX between them."""
    treedef: list[Any] = []

    @jax.jit
    def forward(*arrays: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        out, pull = jax.vjp(fn, *arrays)
        residuals, tree = jax.tree.flatten(pull)
        treedef[:] = [tree]
        return out, residuals

    @jax.jit
    def backward(residuals: list[jax.Array], cotangent: jax.Array) -> Sequence[jax.Array]:
        return jax.tree.unflatten(treedef[0], residuals)(cotangent)

    def both(*tensors: torch.Tensor) -> list[torch.Tensor]:
        out, residuals = forward(*[to_jax(t) for t in tensors])
        cotangent = torch.ones_like(to_torch(out))
        return [to_torch(g) for g in backward(residuals, to_jax(cotangent))]

    return both


def torch_call(fn: Callable[..., torch.Tensor]) -> Callable[..., jax.Array]:
    """A torch function on arrays: export, the function, import."""

    def call(*arrays: jax.Array) -> jax.Array:
        with torch.no_grad():
            return to_jax(fn(*[to_torch(a) for a in arrays]))

    return call


def torch_callback(fn: Callable[..., torch.Tensor], out: jax.ShapeDtypeStruct) -> Callable[..., jax.Array]:
    """A torch function in a compiled program: one callback, whose result is written where JAX wants it."""

    def callback(_context: Any, result: Any, *buffers: Any) -> None:
        with torch.no_grad():
            computed = fn(*[torch._C._from_dlpack(b.__dlpack__()) for b in buffers])
            torch._C._from_dlpack(result.__dlpack__()).copy_(computed)

    return jax.jit(buffer_callback(callback, out))
