"""The two hosts under one set of names, so that a test is written once and runs in both directions."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.utils._pytree as torch_pytree
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import checkpoint

import interop
from cases import Case

# Where the tests run: on the CPU, unless the environment names "cuda".
DEVICE = os.environ.get("INTEROP_DEVICE", "cpu")

Fn: TypeAlias = Callable[..., Any]
Tree: TypeAlias = Any


def numpy_of(leaf: Any) -> np.ndarray[Any, Any]:
    """The values of a leaf of either framework."""
    if isinstance(leaf, torch.Tensor):
        leaf = leaf.detach().resolve_conj().resolve_neg().cpu()
        return leaf.float().numpy() if leaf.dtype is torch.bfloat16 else leaf.numpy()
    return np.asarray(leaf, np.float32) if leaf.dtype == jnp.bfloat16 else np.asarray(leaf)


def assert_same(got: Tree, expected: Tree, tolerance: float = 2e-5) -> None:
    """The same structure, kinds and precisions of numbers, shapes and values."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert type(one) in (torch.Tensor, torch.nn.Parameter) or isinstance(one, jax.Array), type(one)
        a, b = numpy_of(one), numpy_of(other)
        assert a.shape == b.shape
        assert a.dtype.kind == b.dtype.kind
        # An integer result has the guest's width (argmax is int64 in torch, int32 in JAX); a float keeps its precision.
        assert a.dtype.kind in "iu" or _precision(one) == _precision(other)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def _precision(leaf: Any) -> str:
    return str(leaf.dtype).removeprefix("torch.")


class Host:
    """A framework as the caller's, with its transforms under names that the other host shares.

    A transform takes a function of leaves, its leaves, and the positions of those that have a derivative.
    """

    name: str

    def cross(self, case: Case) -> Fn:
        """The case's function of the other framework, as a function of this one: crossed once, under every transform."""
        raise NotImplementedError

    def native(self, case: Case) -> Fn:
        """The case's function of this framework."""
        raise NotImplementedError

    def leaf(self, value: np.ndarray[Any, Any]) -> Any:
        """A numpy array as a leaf of this framework."""
        raise NotImplementedError

    def stack(self, leaves: Sequence[Any]) -> Any:
        """Leaves as one, along a new first axis."""
        raise NotImplementedError

    def total(self, tree: Tree) -> Any:
        """A real number that every element of every inexact leaf has a different share in."""
        return sum((self.real_sum(x * self.weights(x)) for x in self.inexact(tree)), self.zero())

    def real_sum(self, x: Any) -> Any:
        """The sum of the real parts of its elements."""
        return x.real.sum()

    def plain_sum(self, tree: Tree) -> Any:
        """A real number whose cotangents have stride 0: they are one number, expanded."""
        return sum((self.real_sum(x) for x in self.inexact(tree)), self.zero())

    def total_of_transposed(self, tree: Tree) -> Any:
        """A real number whose cotangents are not contiguous: they come back through a transposition."""
        return self.total([x.mT if x.ndim > 1 else x for x in self.inexact(tree)])

    def inexact(self, tree: Tree) -> tuple[Any, ...]:
        """The leaves of a result that have a derivative."""
        return tuple(x for x in torch_pytree.tree_leaves(tree) if x is not None and self.is_inexact(x))

    def is_inexact(self, leaf: Any) -> bool:
        """Whether it is of floating-point or complex numbers."""
        raise NotImplementedError

    def flat(self, fn: Fn, case: Case) -> Fn:
        """The function of the leaves of the case's arguments."""
        structure = torch_pytree.tree_structure(case.args)  # torch's, which Dynamo can follow
        return lambda *leaves: fn(*torch_pytree.tree_unflatten(leaves, structure), **case.statics)

    def leaves(self, case: Case) -> list[Any]:
        """The leaves of the case's arguments."""
        return [self.leaf(x) for x in case.leaves]

    def batched(self, case: Case) -> list[Any]:
        """Two examples of every leaf: as it is, and scaled a little or reversed."""
        return [self.leaf(np.stack([x, other_example(x)])) for x in case.leaves]

    def zero(self) -> Any:
        """Where sums start."""
        raise NotImplementedError

    def weights(self, x: Any) -> Any:
        """A leaf of the same shape and dtype, in which no symmetry of a function cancels."""
        raise NotImplementedError

    def tangents(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """A direction for each leaf."""
        return tuple(self.weights(x) for x in leaves)

    def of_active(self, fn: Fn, leaves: Sequence[Any], active: Sequence[int]) -> Fn:
        """The inexact outputs as a function of the active leaves alone."""

        def part(*chosen: Any) -> tuple[Any, ...]:
            full = list(leaves)
            for i, x in zip(active, chosen, strict=True):
                full[i] = x
            return self.inexact(fn(*full))

        return part


def other_example(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Another value of the same shape, dtype and domain."""
    return (x * np.asarray(1.1).astype(x.dtype)).astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x[::-1]


class TorchHost(Host):
    """torch calls; the function is JAX's."""

    name = "torch"

    @functools.cache  # noqa: B019 - there is one host of each kind
    def cross(self, case: Case) -> Fn:
        return interop.jittable(interop.differentiable(interop.as_torch(case.jax_fn)))

    def native(self, case: Case) -> Fn:
        return case.torch_fn

    def leaf(self, value: np.ndarray[Any, Any]) -> torch.Tensor:
        if str(value.dtype) == "bfloat16":
            return torch.tensor(value.astype(np.float32), device=DEVICE).bfloat16()
        return torch.tensor(value, device=DEVICE)

    def stack(self, leaves: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack(list(leaves))

    def is_inexact(self, leaf: torch.Tensor) -> bool:
        return leaf.is_floating_point() or leaf.is_complex()

    def zero(self) -> torch.Tensor:
        return torch.zeros(())

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        n = torch.arange(x.numel(), dtype=torch.float64, device=x.device).reshape(x.shape) + 1
        return (torch.complex(torch.cos(n), torch.sin(2 * n)) if x.is_complex() else torch.cos(n)).to(x.dtype)

    # --- transforms

    def call(self, fn: Fn, leaves: list[Any], _active: Sequence[int]) -> Tree:
        return fn(*leaves)

    def compile(self, fn: Fn, leaves: list[Any], _active: Sequence[int]) -> Tree:
        return torch.compile(fn, fullgraph=True, backend="aot_eager")(*leaves)

    def gradient(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        return self._pull(fn, leaves, active, self.total)

    def gradient_of_sum(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        return self._pull(fn, leaves, active, self.plain_sum)

    def gradient_through_transpose(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        return self._pull(fn, leaves, active, self.total_of_transposed)

    def _pull(self, fn: Fn, leaves: list[Any], active: Sequence[int], loss: Fn) -> Tree:
        """By the tape, as `backward` does; an input that is not used has a gradient of zero."""
        xs = [x.clone().requires_grad_(i in active) for i, x in enumerate(leaves)]
        wrt = [xs[i] for i in active]
        return torch.autograd.grad(loss(fn(*xs)) + 0 * self.total(wrt), wrt)

    def functional_gradient(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        return torch.func.grad(lambda *xs: self.total(fn(*xs)), argnums=tuple(active))(*leaves)

    def second(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        xs = [x.clone().requires_grad_(i in active) for i, x in enumerate(leaves)]
        wrt = [xs[i] for i in active]
        anchor = 0 * self.total([x * x for x in wrt])  # else a linear function has no second derivative to ask for
        grads = torch.autograd.grad(self.total(fn(*xs)) + anchor, wrt, create_graph=True)
        return torch.autograd.grad(self.total(grads) + anchor, wrt)

    def jvp(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        primals = tuple(leaves[i] for i in active)
        return torch.func.jvp(self.of_active(fn, leaves, active), primals, self.tangents(primals))

    def jacrev(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        part = self.of_active(fn, leaves, active)
        return torch.func.jacrev(part, tuple(range(len(active))))(*(leaves[i] for i in active))

    def jacfwd(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        part = self.of_active(fn, leaves, active)
        return torch.func.jacfwd(part, tuple(range(len(active))))(*(leaves[i] for i in active))

    def hessian(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        part = self.of_active(fn, leaves, active)
        loss = lambda *xs: self.total(part(*xs))  # noqa: E731
        return torch.func.hessian(loss, tuple(range(len(active))))(*(leaves[i] for i in active))

    def map(self, fn: Fn, leaves: list[Any], axes: Sequence[int | None]) -> Tree:
        return torch.func.vmap(fn, in_dims=tuple(axes))(*leaves)

    def compiled_gradient(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        return self.gradient(torch.compile(fn, fullgraph=True, backend="aot_eager"), leaves, active)

    def checkpoint(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        return self.gradient(lambda *xs: checkpoint.checkpoint(fn, *xs, use_reentrant=False), leaves, active)

    # --- what torch alone has

    def third(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        xs = [x.clone().requires_grad_(i in active) for i, x in enumerate(leaves)]
        wrt = [xs[i] for i in active]
        anchor = 0 * self.total([x**3 for x in wrt])
        found = self.total(fn(*xs))
        for _ in range(3):
            found = self.total(torch.autograd.grad(found + anchor, wrt, create_graph=True))
        return found.detach()

    def batch_of_cotangents(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        """Two cotangents at once."""
        return self._pull_two(fn, leaves, active, batched=True)

    def one_cotangent_after_the_other(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        """The same in a loop."""
        return self._pull_two(fn, leaves, active, batched=False)

    def _pull_two(self, fn: Fn, leaves: list[Any], active: Sequence[int], *, batched: bool) -> Tree:
        xs = [x.clone().requires_grad_(i in active) for i, x in enumerate(leaves)]
        wrt = [xs[i] for i in active]
        outs = [out for out in self.inexact(fn(*xs)) if out.requires_grad]
        both = [torch.stack([self.weights(out), 2 - self.weights(out)]) for out in outs]
        options = {"retain_graph": True, "allow_unused": True}
        if batched:
            return torch.autograd.grad(outs, wrt, both, is_grads_batched=True, **options)
        rows = [torch.autograd.grad(outs, wrt, [b[i] for b in both], **options) for i in range(2)]
        return tuple(None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True))

    def dual(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        """Forward-mode AD, without a transform around it: values and tangents."""
        with forward_ad.dual_level():
            directions = dict(zip(active, self.tangents([leaves[i] for i in active]), strict=True))
            xs = [forward_ad.make_dual(x, directions[i]) if i in active else x for i, x in enumerate(leaves)]
            pairs = [forward_ad.unpack_dual(out) for out in self.inexact(fn(*xs))]
            return [(p.primal, torch.zeros_like(p.primal) if p.tangent is None else p.tangent) for p in pairs]

    def linearize(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        primals = tuple(leaves[i] for i in active)
        out, push = torch.func.linearize(self.of_active(fn, leaves, active), *primals)
        return out, push(*self.tangents(primals))

    def functionalize(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        return torch.func.functionalize(fn)(*leaves)

    def saved_on_cpu(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        with torch.autograd.graph.save_on_cpu():
            return self.gradient(fn, leaves, active)

    def reentrant_checkpoint(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        """It knows `backward` alone, and sees no tensor inside a container."""
        xs = [x.clone().requires_grad_(i in active) for i, x in enumerate(leaves)]
        wrt = [xs[i] for i in active]
        outs = checkpoint.checkpoint(lambda *ys: self.inexact(fn(*ys)), *xs, use_reentrant=True)
        (self.total(outs) + 0 * self.total(wrt)).backward()
        return tuple(x.grad for x in wrt)

    def inference(self, fn: Fn, leaves: list[Any], _active: Sequence[int]) -> Tree:
        with torch.inference_mode():
            return torch_pytree.tree_map_only(torch.Tensor, torch.clone, fn(*leaves))

    def autocast(self, fn: Fn, leaves: list[Any], _active: Sequence[int]) -> Tree:
        with torch.autocast(DEVICE, torch.bfloat16):
            return fn(*leaves)

    def graph(self, fn: Fn, leaves: list[Any], _active: Sequence[int]) -> Tree:
        """Recorded by `make_fx`, run on what it was not recorded on."""
        return make_fx(fn)(*[torch.ones_like(x) for x in leaves])(*leaves)

    def symbolic_graph(self, fn: Fn, leaves: list[Any], _active: Sequence[int]) -> Tree:
        return make_fx(fn, tracing_mode="symbolic")(*leaves)(*leaves)

    def graph_of_gradient(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        return make_fx(lambda *xs: self.functional_gradient(fn, list(xs), active))(*leaves)(*leaves)

    def compile_dynamic(self, fn: Fn, leaves: list[Any], _active: Sequence[int]) -> Tree:
        return torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")(*leaves)

    def compiled_gradient_dynamic(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        return self.gradient(torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager"), leaves, active)


class JaxHost(Host):
    """JAX calls; the function is torch's."""

    name = "jax"

    @functools.cache  # noqa: B019 - there is one host of each kind
    def cross(self, case: Case) -> Fn:
        return interop.jittable(interop.differentiable(interop.as_jax(case.torch_fn)))

    def native(self, case: Case) -> Fn:
        return case.jax_fn

    def leaf(self, value: np.ndarray[Any, Any]) -> jax.Array:
        return jnp.asarray(value)

    def stack(self, leaves: Sequence[jax.Array]) -> jax.Array:
        return jnp.stack(leaves)

    def is_inexact(self, leaf: jax.Array) -> bool:
        return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))

    def zero(self) -> jax.Array:
        return jnp.zeros(())

    def real_sum(self, x: jax.Array) -> jax.Array:
        x = jax.lax.real(x) if jnp.iscomplexobj(x) else x  # `x.real` is jitted, and compiled again for every gradient
        return jax.lax.reduce_sum(x, range(x.ndim))

    def weights(self, x: jax.Array) -> jax.Array:
        n = np.arange(x.size, dtype=np.float64).reshape(x.shape) + 1
        waves = np.cos(n) + 1j * np.sin(2 * n) if jnp.iscomplexobj(x) else np.cos(n)
        return jnp.asarray(np.asarray(waves).astype(x.dtype))

    # --- transforms

    def call(self, fn: Fn, leaves: list[Any], _active: Sequence[int]) -> Tree:
        return fn(*leaves)

    def compile(self, fn: Fn, leaves: list[Any], _active: Sequence[int]) -> Tree:
        return jax.jit(fn)(*leaves)

    def gradient(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        return jax.grad(lambda *xs: self.total(fn(*xs)), argnums=tuple(active))(*leaves)

    def gradient_of_sum(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        return jax.grad(lambda *xs: self.plain_sum(fn(*xs)), argnums=tuple(active))(*leaves)

    def gradient_through_transpose(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        return jax.grad(lambda *xs: self.total_of_transposed(fn(*xs)), argnums=tuple(active))(*leaves)

    def functional_gradient(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        """With the pull-back in hand, and a cotangent that JAX did not make."""
        part = self.of_active(fn, leaves, active)
        outs, pull = jax.vjp(part, *(leaves[i] for i in active))
        return pull(self.tangents(outs))

    def second(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        once = lambda *xs: self.gradient(fn, list(xs), active)  # noqa: E731
        return self.gradient(once, leaves, active)

    def jvp(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        primals = tuple(leaves[i] for i in active)
        return jax.jvp(self.of_active(fn, leaves, active), primals, self.tangents(primals))

    def jacrev(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        part = self.of_active(fn, leaves, active)
        return jax.jacrev(part, tuple(range(len(active))))(*(leaves[i] for i in active))

    def jacfwd(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        part = self.of_active(fn, leaves, active)
        return jax.jacfwd(part, tuple(range(len(active))))(*(leaves[i] for i in active))

    def hessian(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        part = self.of_active(fn, leaves, active)
        loss = lambda *xs: self.total(part(*xs))  # noqa: E731
        return jax.hessian(loss, tuple(range(len(active))))(*(leaves[i] for i in active))

    def map(self, fn: Fn, leaves: list[Any], axes: Sequence[int | None]) -> Tree:
        return jax.vmap(fn, in_axes=tuple(axes))(*leaves)

    def compiled_gradient(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        return jax.jit(lambda *xs: self.gradient(fn, list(xs), active))(*leaves)

    def checkpoint(self, fn: Fn, leaves: list[Any], active: Sequence[int]) -> Tree:
        return self.gradient(jax.checkpoint(fn), leaves, active)

    # --- control flow, which torch has no counterpart of

    def scan(self, fn: Fn, leaves: list[Any], _active: Sequence[int]) -> Tree:
        """Over a batch of examples."""
        return jax.lax.scan(lambda carry, xs: (carry, fn(*xs)), 0, leaves)[1]

    def cond(self, fn: Fn, leaves: list[Any], _active: Sequence[int]) -> Tree:
        """Behind a branch that is taken."""
        other = lambda *xs: jax.tree.map(jnp.zeros_like, fn(*xs))  # noqa: E731
        return jax.lax.cond(jnp.asarray(True), fn, other, *leaves)


HOSTS: dict[str, Host] = {"torch": TorchHost(), "jax": JaxHost()}
