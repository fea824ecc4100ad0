"""What a framework offers, under one set of names.

`_derive` and the engines speak of sides, so that a rule is written once: `JAX.vjp` and `TORCH.vjp` take the same
arguments and give the same results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import torch

from interop._twice import refuse_scripted, twice

Leaf: TypeAlias = Any
Leaves: TypeAlias = tuple[Any, ...]
LeavesFn: TypeAlias = Callable[..., Leaves]


@dataclass(frozen=True)
class Side:
    """The operations of one framework on its own leaves. Flat functions take leaves and return a tuple of leaves."""

    name: str
    leaf_name: str
    decorator: str
    is_leaf: Callable[[object], bool]
    is_inexact: Callable[[Leaf], bool]
    is_complex: Callable[[Leaf], bool]
    conj: Callable[[Leaf], Leaf]
    copy: Callable[[Leaf], Leaf]
    zeros_like: Callable[[Leaf], Leaf]
    jvp: Callable[[LeavesFn, Leaves, Leaves], tuple[Leaves, Leaves]]
    vjp: Callable[..., tuple[Leaves, Callable[[Leaves], Leaves]]]
    vmap: Callable[[LeavesFn, tuple[int | None, ...]], LeavesFn]

    def conjugated(self, x: Leaf) -> Leaf:
        """The conjugate of a complex leaf, any other leaf itself: a gradient of torch is the conjugate of JAX's."""
        return self.conj(x) if self.is_complex(x) else x

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> str:
        return self.name.upper()  # there are two: pickled by name


_func: Any = torch.func  # its results are typed as tuples of two or of three


def _torch_vjp(fn: LeavesFn, *primals: Leaf, reads: Leaves = ()) -> tuple[Leaves, Callable[[Leaves], Leaves]]:
    recorded: list[Leaves] = []

    def recording(*active: Leaf) -> Leaves:
        recorded[:] = [fn(*active)]
        return recorded[0]

    outs, pull = _func.vjp(recording, *primals)
    refuse_scripted(reads, recorded[0])
    pull_twice = twice(lambda cotangents: pull(tuple(cotangents)), reads, recorded[0])

    def pull_with_graph(cotangents: Leaves) -> Leaves:
        # Pulled under no_grad and then differentiated forward, det, solve and their kin give wrong numbers.
        with torch.enable_grad():
            return tuple(pull_twice(cotangents))

    return outs, pull_with_graph


def _torch_jvp(fn: LeavesFn, primals: Leaves, tangents: Leaves) -> tuple[Leaves, Leaves]:
    outs, moved = _func.jvp(fn, primals, tangents)
    # A number of Python beside a tensor without axes makes torch's tangent wider than its value.
    return outs, tuple(t.to(out.dtype) for t, out in zip(moved, outs, strict=True))


def _torch_vmap(fn: LeavesFn, in_axes: tuple[int | None, ...]) -> LeavesFn:
    return torch.func.vmap(fn, in_dims=in_axes, randomness="different")


TORCH = Side(
    name="torch",
    leaf_name="tensor",
    decorator="as_torch",
    is_leaf=lambda x: isinstance(x, torch.Tensor),
    is_inexact=lambda x: x.is_floating_point() or x.is_complex(),
    is_complex=torch.is_complex,
    conj=lambda x: x.conj().resolve_conj(),  # `conj_physical` has no rule for batches
    copy=torch.clone,
    zeros_like=torch.zeros_like,
    jvp=_torch_jvp,
    vjp=_torch_vjp,
    vmap=_torch_vmap,
)


def _jax_vjp(fn: LeavesFn, *primals: Leaf, reads: Leaves = ()) -> tuple[Leaves, Callable[[Leaves], Leaves]]:
    del reads  # no rule of JAX's is opaque to a second derivative
    return jax.vjp(fn, *primals)


JAX = Side(
    name="JAX",
    leaf_name="array",
    decorator="as_jax",
    is_leaf=lambda x: isinstance(x, jax.Array),
    is_inexact=lambda x: jnp.issubdtype(x.dtype, jnp.inexact),
    is_complex=jnp.iscomplexobj,
    conj=jnp.conj,
    copy=lambda x: x,  # nobody writes to an array
    zeros_like=jnp.zeros_like,
    jvp=jax.jvp,
    vjp=_jax_vjp,
    vmap=lambda fn, in_axes: jax.vmap(fn, in_axes=in_axes),
)
