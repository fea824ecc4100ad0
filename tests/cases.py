"""One table of functions written twice, in torch and in JAX: what every matrix test runs over.

The two functions of a case are the same mathematics on the same arguments. Arguments are pytrees of numpy arrays, which
a test turns into leaves of its host; `statics` are keyword arguments that stay as they are. Floating-point leaves are
what derivatives are taken in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
import torch.utils._pytree as torch_pytree


@dataclass(frozen=True, eq=False)
class Case:
    """A function in both frameworks, with arguments.

    Attributes:
        id: its name in test reports.
        torch_fn: the torch function.
        jax_fn: the same function in JAX.
        args: positional arguments, pytrees of numpy arrays.
        statics: keyword arguments that are no arrays.
        vmap: whether a batch of calls is one call of a batch, in either framework.
        tolerance: relative and absolute, for float32; other precisions scale it.
    """

    id: str
    torch_fn: Callable[..., Any]
    jax_fn: Callable[..., Any]
    args: tuple[Any, ...]
    statics: dict[str, Any] = field(default_factory=dict)
    vmap: bool = True
    tolerance: float = 2e-5

    @property
    def leaves(self) -> list[np.ndarray[Any, Any]]:
        """The arrays of the arguments, in order."""
        return list(torch_pytree.tree_leaves(self.args))

    @property
    def active(self) -> tuple[int, ...]:
        """The positions among the leaves of those that have a derivative."""
        return tuple(i for i, leaf in enumerate(self.leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact))

    @property
    def is_complex(self) -> bool:
        """Whether complex numbers come in or go out."""
        return any(
            np.iscomplexobj(x) for x in [*self.leaves, *jax.tree.leaves(self.jax_fn(*self.args, **self.statics))]
        )

    @property
    def is_single(self) -> bool:
        """Whether all its floats are of single precision, so that there is a double-precision twin."""
        return all(self.leaves[i].dtype in (np.float32, np.complex64) for i in self.active)


class Pair(NamedTuple):
    """A container of two leaves that the frameworks know without being told."""

    first: Any
    second: Any


def _floats(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    """Values between -1 and 1, none near the kink at zero."""
    x = np.random.default_rng([seed, *shape]).uniform(0.1, 1.0, shape)
    sign = np.where(np.arange(x.size).reshape(shape) % 3 == 1, -1.0, 1.0)
    return np.asarray(x * sign).astype(dtype)


def _complexes(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return (_floats(*shape, seed=seed) + 1j * _floats(*shape, seed=seed + 100)).astype(np.complex64)


def _matrix(n: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Well conditioned and positive definite."""
    a = _floats(n, n, seed=seed)
    return (a @ a.T + n * np.eye(n)).astype(np.float32)


def _ints(*values: int, dtype: Any = np.int32) -> np.ndarray[Any, Any]:
    return np.array(values, dtype)


def _same(fn: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """One function for both, of operators and methods alone that the frameworks share."""
    return fn, fn


def _scan_in_torch(xs: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    carry, out = start, []
    for x in xs:
        carry = torch.tanh(carry * x)
        out.append(carry)
    return carry, torch.stack(out)


def _scan_in_jax(xs: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    def step(carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        carry = jnp.tanh(carry * x)
        return carry, carry

    return jax.lax.scan(step, start, xs)


def _power(sin: Callable[[Any], Any]) -> Callable[..., Any]:
    def repeat(x: Any, n: int) -> Any:
        for _ in range(n):
            x = sin(x) * 1.5
        return x

    return repeat


def _activation(relu: Callable[[Any], Any], tanh: Callable[[Any], Any]) -> Callable[..., Any]:
    def activate(x: Any, kind: str, bias: Any = None) -> Any:
        x = {"relu": relu, "tanh": tanh}[kind](x)
        return x if bias is None else x + bias

    return activate


def _network(tanh: Callable[[Any], Any]) -> Callable[..., Any]:
    def network(params: dict[str, Any], x: Any) -> Any:
        for layer in params["layers"]:
            x = tanh(x @ layer["w"] + layer["b"])
        return x * params["scale"]

    return network


_LAYERS = {
    "layers": [
        {"w": _floats(3, 4), "b": _floats(4)},
        {"w": _floats(4, 2), "b": _floats(2)},
    ],
    "scale": _floats(),
}

CASES: list[Case] = [
    # --- arity and shapes
    Case("scalar", lambda x: torch.tanh(x) * x, lambda x: jnp.tanh(x) * x, (_floats(),)),
    Case("elementwise", lambda x, y: torch.sin(x) * y**2, lambda x, y: jnp.sin(x) * y**2, (_floats(2, 3), _floats(2, 3, seed=1))),
    Case("broadcast", *_same(lambda x, y: x[:, None] * y[None, :] ** 3), (_floats(3), _floats(4))),
    Case("empty", *_same(lambda x, y: ((x * y).sum(0), x * 2)), (_floats(0, 3), _floats(3))),
    Case("one_element", *_same(lambda x: x.reshape(()) ** 3), (_floats(1, 1),)),
    Case("three_arguments", *_same(lambda x, y, z: x * y + z**2), (_floats(3), _floats(3, seed=1), _floats(3, seed=2))),
    Case("unused_argument", *_same(lambda x, unused: x**2), (_floats(3), _floats(2))),
    # --- outputs
    Case("several_outputs", lambda x: (torch.sin(x), torch.cos(x).sum(), x * x), lambda x: (jnp.sin(x), jnp.cos(x).sum(), x * x), (_floats(3),)),
    Case("constant_output", lambda x: (x**2, torch.ones(2)), lambda x: (x**2, jnp.ones(2)), (_floats(3),)),
    Case("returns_an_input", *_same(lambda x, y: (y, x * y, x)), (_floats(3), _floats(3, seed=1))),
    Case("same_output_twice", *_same(lambda x: (lambda y: (y, y))(x**2)), (_floats(3),)),
    Case("mask_output", *_same(lambda x, y: {"product": x * y, "mask": x > y}), (_floats(4), _floats(4, seed=1))),
    Case("largest", lambda x: (x.amax(1), x.argmax(1)), lambda x: (x.max(1), x.argmax(1)), (_floats(3, 4),)),
    Case("none_output", *_same(lambda x: (x**2, None)), (_floats(3),), vmap=False),
    # --- pytrees
    Case("network", _network(torch.tanh), _network(jnp.tanh), (_LAYERS, _floats(5, 3))),
    Case("nested_output", *_same(lambda x, y: {"sum": x + y, "parts": [x * 2, (y**2,)]}), (_floats(2), _floats(2, seed=1))),
    Case("named_tuples", *_same(lambda p: Pair(p.first * p.second, p.second**2)), (Pair(_floats(3), _floats(3, seed=1)),)),
    # --- dtypes
    Case("bfloat16", *_same(lambda x, y: x * y + x), (_floats(4, dtype=ml_dtypes.bfloat16), _floats(4, seed=1, dtype=ml_dtypes.bfloat16)), tolerance=2e-2),
    Case("float16", *_same(lambda x: x * x), (_floats(4, dtype=np.float16),), tolerance=2e-3),
    Case("integers_only", *_same(lambda x, y: (x * 2 + y, x > y)), (_ints(1, 5, 3), _ints(4, 2, 3))),
    Case("bytes", *_same(lambda x, y: x * y / 255), (_ints(0, 7, 255, dtype=np.uint8), _floats(3))),
    Case("select", lambda c, x, y: torch.where(c, x, y * y), lambda c, x, y: jnp.where(c, x, y * y), (np.array([True, False, True]), _floats(3), _floats(3, seed=1))),
    Case("rows_by_index", lambda t, i: t[i] ** 2, lambda t, i: t[i] ** 2, (_floats(4, 2), _ints(2, 0, 2))),
    # --- complex numbers
    Case("complex_product", lambda z, w: z * torch.conj(w) + z * z, lambda z, w: z * jnp.conj(w) + z * z, (_complexes(3), _complexes(3, seed=1))),
    Case("complex_to_real", lambda z: z.real**2 + 3 * z.imag, lambda z: z.real**2 + 3 * z.imag, (_complexes(3),)),
    Case("real_to_complex", lambda x, z: torch.exp(1j * x) * z, lambda x, z: jnp.exp(1j * x) * z, (_floats(3), _complexes(3))),
    Case("fourier", lambda x: torch.fft.fft(x), lambda x: jnp.fft.fft(x), (_floats(4),)),
    # --- reductions and layouts
    Case("reductions", lambda x: (x.mean(), x.var(0, unbiased=False), torch.logsumexp(x, 1), x.prod()), lambda x: (x.mean(), x.var(0), jax.nn.logsumexp(x, 1), x.prod()), (_floats(3, 2),)),
    Case("cumulative", lambda x: (x.cumsum(0), x.sort(0).values), lambda x: (x.cumsum(0), jnp.sort(x, 0)), (_floats(5),)),
    Case("softmax", lambda x, y: -(torch.log_softmax(x, -1) * y).sum(-1), lambda x, y: -(jax.nn.log_softmax(x, -1) * y).sum(-1), (_floats(2, 3), _floats(2, 3, seed=1))),
    Case("transposed", *_same(lambda x: (x.T, x[1:, ::2] ** 2)), (_floats(3, 4),)),
    Case("contraction", lambda a, b: torch.einsum("ijk,ik->ij", a, b), lambda a, b: jnp.einsum("ijk,ik->ij", a, b), (_floats(2, 3, 4), _floats(2, 4))),
    # --- linear algebra
    Case("solve", torch.linalg.solve, jnp.linalg.solve, (_matrix(3), _floats(3, 2)), tolerance=2e-4),
    Case("cholesky", lambda a: torch.linalg.cholesky(a + a.mT), lambda a: jnp.linalg.cholesky(a + a.mT), (_matrix(3),), tolerance=2e-4),
    Case("determinant", torch.linalg.det, jnp.linalg.det, (_matrix(3),), tolerance=5e-4),
    # --- control flow
    Case("loop", _power(torch.sin), _power(jnp.sin), (_floats(3),), {"n": 3}),
    Case("choice", _activation(torch.relu, torch.tanh), _activation(jax.nn.relu, jnp.tanh), (_floats(3),), {"kind": "tanh", "bias": None}),
    Case("scan", _scan_in_torch, _scan_in_jax, (_floats(4), _floats())),
    Case("branch", lambda x: torch.where(x.sum() > 0, x**2, torch.sin(x)), lambda x: jax.lax.cond(x.sum() > 0, lambda y: y**2, jnp.sin, x), (_floats(3),)),
    Case("counted_loop", lambda x: x**8, lambda x: jax.lax.fori_loop(0, 3, lambda _, y: y * y, x), (_floats(3),)),
]  # fmt: skip

IDS = [case.id for case in CASES]
BY_ID = dict(zip(IDS, CASES, strict=True))
