"""What a JAX user does with a torch function, beyond one transform of it: the rest of JAX, and functions that can't be traced.

Each is compared with the same mathematics written in JAX. The mirror of `test_in_torch`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax import export as _export  # noqa: F401 - makes jax.export there
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import sequential_vmap
from jax.experimental import checkify
from jax.experimental.jet import jet
from jax.scipy.optimize import minimize
from jax.scipy.sparse.linalg import cg, gmres

import interop
from cases import BY_ID, Case
from hosts import HOSTS, Fn, Tree, assert_same
from interop import as_jax, differentiable, jittable
from tables import rows

HOST = HOSTS["jax"]


def levels(fn: Fn) -> Fn:
    """The torch function as a JAX function, with every level on."""
    return differentiable(jittable(as_jax(fn)))


# --- transforms -------------------------------------------------------------------------------------------------------


class Program(NamedTuple):
    """A case as a program of JAX, whoever computes it.

    Attributes:
        xs: the inexact leaves of its arguments.
        outputs: they alone to all outputs.
        part: they alone to the inexact outputs.
    """

    xs: tuple[jax.Array, ...]
    outputs: Fn
    part: Fn

    @property
    def every(self) -> tuple[int, ...]:
        """The positions of the arguments."""
        return tuple(range(len(self.xs)))

    def loss(self, *xs: Any) -> Any:
        """A number that every element of every output has a different share in."""
        return HOST.total(self.part(*xs))

    def gradient(self, *xs: Any) -> Tree:
        """Of the loss, in every argument."""
        return jax.grad(self.loss, self.every)(*xs)

    def slope(self, *xs: Any) -> Any:
        """A number that every element of the gradient has a different share in."""
        return HOST.total(self.gradient(*xs))

    def step(self, xs: Tree) -> Tree:
        """Arguments to other arguments nearby: the body of a loop."""
        return tuple(x + (0.01 * self.loss(*xs)).astype(x.dtype) for x in xs)

    def along(self, fn: Fn) -> Tree:
        """A function of the arguments and its derivative in forward mode."""
        return jax.jvp(fn, self.xs, HOST.tangents(self.xs))

    def several(self, n: int = 3) -> tuple[jax.Array, ...]:
        """A batch of arguments along a new first axis."""
        return tuple(jnp.stack([x * (1 + 0.05 * k) for k in range(n)]).astype(x.dtype) for x in self.xs)


def program(fn: Fn, case: Case) -> Program:
    """The case by this function."""
    leaves, flat = HOST.leaves(case), HOST.flat(fn, case)
    xs = tuple(leaves[i] for i in case.active)

    def outputs(*chosen: Any) -> Tree:
        full = list(leaves)
        for i, x in zip(case.active, chosen, strict=True):
            full[i] = x
        return flat(*full)

    return Program(xs, outputs, lambda *chosen: HOST.inexact(outputs(*chosen)))


def tangents(tree: Tree) -> Tree:
    return HOST.tangents(tree)


def vjp_of(p: Program) -> Any:
    return jax.vjp(p.part, *p.xs)


def pulled(pair: Any) -> Tree:
    outs, pull = pair
    return outs, pull(tangents(outs))


def by_custom_vjp(p: Program) -> Fn:
    """The function with a rule around it that scales its gradient."""

    @jax.custom_vjp
    def f(*xs: Any) -> Any:
        return p.part(*xs)

    def bwd(pull: Any, cotangents: Any) -> Any:
        return tuple(2 * g for g in pull(cotangents))

    f.defvjp(lambda *xs: jax.vjp(p.part, *xs), bwd)
    return f


def by_custom_jvp(p: Program) -> Fn:
    """The function with a rule around it that scales its derivative."""

    @jax.custom_jvp
    def f(*xs: Any) -> Any:
        return p.part(*xs)

    @f.defjvp
    def rule(primals: Any, moved: Any) -> Any:
        outs, derivative = jax.jvp(p.part, primals, moved)
        return outs, tuple(3 * d for d in derivative)

    return f


def scanned(step: Fn, xs: Tree, n: int = 3) -> Tree:
    return jax.lax.scan(lambda carry, _: (step(carry), HOST.total(carry)), xs, None, length=n)


def by_while(step: Fn, xs: Tree, n: int = 3) -> Tree:
    return jax.lax.while_loop(lambda state: state[0] < n, lambda state: (state[0] + 1, step(state[1])), (0, xs))[1]


def switched(p: Program, index: Any, xs: Tree) -> Tree:
    branches = [
        p.part,
        lambda *ys: jax.tree.map(jnp.sin, p.part(*ys)),
        lambda *ys: jax.tree.map(lambda o: 2 * o, p.part(*ys)),
    ]
    return jax.lax.switch(index, branches, *xs)


def half_stopped(p: Program) -> Fn:
    """What depends on the first argument counts as a constant."""
    return lambda first, *others: (
        p.loss(jax.lax.stop_gradient(first), *others) * jax.lax.stop_gradient(p.loss(first, *others))
    )


def donated(p: Program) -> Tree:
    """The arguments are given away, copies are not."""
    kept = tuple(x + 0 for x in p.xs)
    given = tuple(x + 0 for x in p.xs)
    out = jax.jit(p.step, donate_argnums=0)(given)
    return out, kept


def descended(p: Program) -> Tree:
    """Three steps of an optimiser."""
    optimiser = optax.adam(1e-2)

    def step(state: Any, _: Any) -> Any:
        xs, moments = state
        loss, grads = jax.value_and_grad(p.loss, p.every)(*xs)
        updates, moments = optimiser.update(grads, moments, xs)
        return (optax.apply_updates(xs, updates), moments), loss

    (xs, _), losses = jax.jit(lambda xs: jax.lax.scan(step, (xs, optimiser.init(xs)), None, length=3))(p.xs)
    return xs, losses


def raveled(p: Program) -> Tree:
    vector, unravel = jax.flatten_util.ravel_pytree(p.xs)
    return jax.grad(lambda v: p.loss(*unravel(v)))(vector)


def without_jit(p: Program) -> Tree:
    with jax.disable_jit():
        return jax.jit(p.part)(*p.xs), jax.jit(p.gradient)(*p.xs), scanned(p.step, p.xs)


def at_trace_time(p: Program) -> Tree:
    """What is known while a program is traced is computed there and then."""

    def traced(x: Any) -> Any:
        with jax.ensure_compile_time_eval():
            loss, grads = jax.value_and_grad(p.loss, p.every)(*p.xs)
            assert not isinstance(loss, jax.core.Tracer)
        return x * loss, grads

    return jax.jit(traced)(2.0)


def jaxpr(fn: Fn, xs: Tree) -> Tree:
    """Traced to a program, which is then run."""
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*xs)
    return jax.tree.unflatten(jax.tree.structure(shape), jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *xs))


def shapes(tree: Tree) -> Tree:
    """Zeros of those shapes and dtypes."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), tree)


def converted(p: Program) -> Tree:
    """What a function closes over is made an argument."""
    scale = jnp.asarray(2.0)

    def outer(scale: Any) -> Any:
        closed, consts = jax.closure_convert(lambda *xs: p.loss(*xs) * scale, *p.xs)
        return closed(*p.xs, *consts)

    return jax.value_and_grad(outer)(scale)


def named(p: Program) -> Tree:
    with jax.named_scope("outer"):
        return jax.jit(jax.named_call(p.gradient, name="inner"))(*p.xs)


def transposed(p: Program) -> Tree:
    """The transpose of the derivative, taken of the derivative itself."""
    outs, push = jax.linearize(p.part, *p.xs)
    return jax.linear_transpose(push, *p.xs)(tangents(outs))


def partial_argument(p: Program) -> Tree:
    """The function itself goes into a compiled program, with the arguments that it closes over."""
    apply = jax.jit(lambda f, scale: jax.tree.map(lambda out: out * scale, f()))
    return apply(jax.tree_util.Partial(p.part, *p.xs), 2.0)


def static_argument(p: Program) -> Tree:
    power = jax.jit(lambda n, *xs: functools.reduce(lambda ys, _: p.step(ys), range(n), xs), static_argnums=0)
    return power(2, *p.xs), power(1, *p.xs)


# Derivatives of one example: first and higher orders, and what is linear.
DERIVATIVES: dict[str, Callable[[Program], Tree]] = {
    # --- reverse mode
    "value and grad with aux": lambda p: jax.value_and_grad(lambda *xs: (p.loss(*xs), p.outputs(*xs)), p.every, has_aux=True)(*p.xs),
    "value and grad with aux, compiled": lambda p: jax.jit(jax.value_and_grad(lambda *xs: (p.loss(*xs), p.outputs(*xs)), p.every, has_aux=True))(*p.xs),
    "grad with aux": lambda p: jax.grad(lambda *xs: (p.loss(*xs), p.outputs(*xs)), p.every, has_aux=True)(*p.xs),
    "vjp with aux": lambda p: (lambda outs, pull, aux: (pull(tangents(outs)), aux))(*jax.vjp(lambda *xs: (p.part(*xs), p.outputs(*xs)), *p.xs, has_aux=True)),
    "grad of a compiled function": lambda p: jax.grad(jax.jit(p.loss), p.every)(*p.xs),
    "compiled pull": lambda p: (lambda outs, pull: jax.jit(pull)(tangents(outs)))(*vjp_of(p)),
    "pull out of a compiled function": lambda p: pulled(jax.jit(lambda *xs: jax.vjp(p.part, *xs))(*p.xs)),
    "pulled twice": lambda p: (lambda outs, pull: (pull(tangents(outs)), pull(jax.tree.map(jnp.ones_like, outs))))(*vjp_of(p)),
    "batch of cotangents": lambda p: (lambda outs, pull: jax.vmap(pull)(jax.tree.map(lambda o: jnp.stack([o, 2 * o]), tangents(outs))))(*vjp_of(p)),
    # --- higher orders
    "forward over reverse": lambda p: p.along(p.gradient),
    "forward over reverse, compiled": lambda p: jax.jit(lambda: p.along(p.gradient))(),
    "reverse over forward": lambda p: jax.grad(lambda *xs: HOST.total(jax.jvp(p.part, xs, tangents(xs))[1]), p.every)(*p.xs),
    "forward over forward": lambda p: p.along(lambda *xs: jax.jvp(p.part, xs, tangents(p.xs))[1]),
    "reverse over reverse, compiled": lambda p: jax.jit(jax.grad(p.slope, p.every))(*p.xs),
    "third order": lambda p: jax.grad(lambda *xs: HOST.total(jax.grad(p.slope, p.every)(*xs)), p.every)(*p.xs),
    "third order, compiled": lambda p: jax.jit(jax.grad(lambda *xs: HOST.total(jax.grad(p.slope, p.every)(*xs)), p.every))(*p.xs),
    "forward over reverse over reverse": lambda p: p.along(jax.grad(p.slope, p.every)),
    # --- linearisation
    "linearize": lambda p: (lambda outs, push: (outs, push(*tangents(p.xs)), push(*p.xs)))(*jax.linearize(p.part, *p.xs)),
    "linearize, compiled": lambda p: (lambda outs, push: (outs, jax.jit(push)(*tangents(p.xs))))(*jax.linearize(jax.jit(p.part), *p.xs)),
    "linearize of a gradient": lambda p: (lambda outs, push: (outs, push(*tangents(p.xs))))(*jax.linearize(p.gradient, *p.xs)),
    "transpose of a linearisation": transposed,
}  # fmt: skip

# Batches of examples.
BATCHES: dict[str, Callable[[Program], Tree]] = {
    "nested vmap": lambda p: jax.vmap(jax.vmap(p.part))(*(jnp.stack([x, x]) for x in p.several())),
    "vmap along the last axes": lambda p: jax.vmap(p.part, in_axes=-1, out_axes=-1)(*(jnp.moveaxis(x, 0, -1) for x in p.several())),
    "vmap of a Hessian": lambda p: jax.vmap(jax.hessian(p.loss, p.every))(*p.several(2)),
    "vmap of a gradient, compiled": lambda p: jax.jit(jax.vmap(p.gradient))(*p.several()),
    "gradient of nested vmap": lambda p: jax.grad(lambda *xs: HOST.total(jax.vmap(jax.vmap(p.part))(*xs)), p.every)(*(jnp.stack([x, x]) for x in p.several())),
    "second gradient of vmap": lambda p: jax.grad(lambda *xs: HOST.total(jax.grad(lambda *ys: HOST.total(jax.vmap(p.part)(*ys)), p.every)(*xs)), p.every)(*p.several()),
    "vmap of jvp": lambda p: jax.vmap(lambda *xs: jax.jvp(p.part, xs, tangents(xs)))(*p.several()),
    "vmap with a named axis": lambda p: jax.vmap(lambda *xs: jax.lax.psum(p.part(*xs), "i"), axis_name="i")(*p.several()),
    "gradient through psum": lambda p: jax.grad(lambda *xs: HOST.total(jax.vmap(lambda *ys: jax.lax.pmean(jax.tree.map(jnp.sin, p.part(*jax.lax.psum(ys, "i"))), "i"), axis_name="i")(*xs)), p.every)(*p.several()),
    "vmap over an axis of a mesh": lambda p: jax.vmap(p.gradient, spmd_axis_name="i")(*p.several()),
    "map": lambda p: jax.lax.map(lambda xs: p.part(*xs), p.several()),
    "map in batches": lambda p: jax.lax.map(lambda xs: p.part(*xs), p.several(), batch_size=2),
    "gradient of map in batches": lambda p: jax.grad(lambda *xs: HOST.total(jax.lax.map(lambda ys: p.part(*ys), xs, batch_size=2)), p.every)(*p.several()),
}  # fmt: skip

# Control flow, rules of the user's own, traces, and libraries that are programs of JAX.
PROGRAMS: dict[str, Callable[[Program], Tree]] = {
    # --- control flow
    "gradient of scan": lambda p: jax.grad(lambda *xs: HOST.total(scanned(p.step, xs)), p.every)(*p.xs),
    "gradient of scan, compiled": lambda p: jax.jit(jax.grad(lambda *xs: HOST.total(scanned(p.step, xs)), p.every))(*p.xs),
    "scan of a gradient": lambda p: scanned(lambda xs: jax.tree.map(lambda x, g: x - 0.01 * g, xs, p.gradient(*xs)), p.xs),
    "vmap of scan": lambda p: jax.vmap(lambda *xs: scanned(p.step, xs))(*p.several()),
    "while loop": lambda p: by_while(p.step, p.xs),
    "forward through a while loop": lambda p: p.along(lambda *xs: by_while(p.step, xs)),
    "vmap of while loop": lambda p: jax.vmap(lambda n, *xs: by_while(p.step, xs, n))(jnp.arange(3), *p.several()),
    "counted loop": lambda p: jax.lax.fori_loop(0, 3, lambda _, xs: p.step(xs), p.xs),
    "gradient of a counted loop": lambda p: jax.grad(lambda *xs: HOST.total(jax.lax.fori_loop(0, 3, lambda _, ys: p.step(ys), xs)), p.every)(*p.xs),
    "switch": lambda p: jax.jit(lambda i, *xs: switched(p, i, xs))(1, *p.xs),
    "gradient of switch": lambda p: jax.grad(lambda *xs: HOST.total(switched(p, jnp.asarray(2), xs)), p.every)(*p.xs),
    "vmap of switch": lambda p: jax.vmap(lambda i, *xs: switched(p, i, xs))(jnp.arange(3), *p.several()),
    "gradient of cond, compiled": lambda p: jax.jit(jax.grad(lambda *xs: jax.lax.cond(p.loss(*xs) > 1e3, lambda *ys: 2 * p.loss(*ys), p.loss, *xs), p.every))(*p.xs),
    "checkpointed scan": lambda p: jax.grad(lambda *xs: HOST.total(scanned(jax.checkpoint(p.step), xs)), p.every)(*p.xs),
    # --- rules around it
    "custom_vjp": lambda p: pulled(jax.vjp(by_custom_vjp(p), *p.xs)),
    "custom_vjp, compiled": lambda p: jax.jit(lambda *xs: pulled(jax.vjp(by_custom_vjp(p), *xs)))(*p.xs),
    "custom_vjp in scan": lambda p: jax.grad(lambda *xs: HOST.total(scanned(lambda ys: tuple(y + (0.01 * HOST.total(by_custom_vjp(p)(*ys))).astype(y.dtype) for y in ys), xs)), p.every)(*p.xs),
    "custom_jvp": lambda p: (p.along(by_custom_jvp(p)), pulled(jax.vjp(by_custom_jvp(p), *p.xs))),
    "custom_jvp in scan": lambda p: jax.grad(lambda *xs: HOST.total(scanned(lambda ys: tuple(y + (0.01 * HOST.total(by_custom_jvp(p)(*ys))).astype(y.dtype) for y in ys), xs)), p.every)(*p.xs),
    "custom_vjp under vmap": lambda p: jax.vmap(lambda *xs: pulled(jax.vjp(by_custom_vjp(p), *xs)))(*p.several()),
    "custom_gradient": lambda p: jax.grad(lambda *xs: jax.custom_gradient(lambda *ys: (p.loss(*ys), lambda c: tuple(c * y for y in p.gradient(*ys))))(*xs), p.every)(*p.xs),
    "stopped gradient": lambda p: jax.grad(half_stopped(p), p.every)(*p.xs),
    # --- traces
    "eval_shape": lambda p: shapes(jax.eval_shape(p.outputs, *p.xs)),
    "eval_shape of a gradient": lambda p: shapes(jax.eval_shape(p.gradient, *p.xs)),
    "jaxpr": lambda p: jaxpr(p.outputs, p.xs),
    "jaxpr of a gradient": lambda p: jaxpr(p.gradient, p.xs),
    "ahead of time": lambda p: jax.jit(p.outputs).lower(*p.xs).compile()(*p.xs),
    "gradient ahead of time": lambda p: jax.jit(p.gradient).lower(*p.xs).compile()(*p.xs),
    "traced, lowered, compiled from shapes": lambda p: jax.jit(p.gradient).trace(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in p.xs)).lower().compile()(*p.xs),
    "ahead of time with donation": lambda p: jax.jit(p.step, donate_argnums=0).lower(p.xs).compile()(tuple(x + 0 for x in p.xs)),
    "donation": donated,
    "closure_convert": converted,
    "compile time": at_trace_time,
    "disable_jit": without_jit,
    "names": named,
    "a partial argument": partial_argument,
    "a static argument": static_argument,
    # --- libraries
    "ravel_pytree": raveled,
    "optax": descended,
}  # fmt: skip

TRANSFORMS = DERIVATIVES | BATCHES | PROGRAMS

# Several results of which one has no derivative; linear algebra; complex numbers.
SETS = {"mask_output": TRANSFORMS, "solve": DERIVATIVES, "real_to_complex": DERIVATIVES}

CELLS = {f"{name}-{case}": (fn, BY_ID[case]) for case, transforms in SETS.items() for name, fn in transforms.items()}


@pytest.mark.parametrize(("transform", "case"), rows(CELLS))
def test_a_transform(transform: Callable[[Program], Tree], case: Case) -> None:
    """The crossing under it is JAX's own function under it."""
    got = transform(program(HOST.cross(case), case))
    assert_same(got, transform(program(case.jax_fn, case)), case.tolerance)


# --- derivatives that torch has wrong ---------------------------------------------------------------------------------


def standardised(x: Any, axis: int) -> Any:
    return (x - x.mean(axis, keepdims=True)) / jnp.sqrt(x.var(axis, keepdims=True) + 1e-5)


# A rule of torch for one of these keeps a statistic, or a factor, and takes it for a constant when it is differentiated.
KEEPING: dict[str, tuple[Fn, Fn]] = {
    "layer norm": (lambda x: torch.nn.functional.layer_norm(x, (3,)), lambda x: standardised(x, -1)),
    "batch norm": (lambda x: torch.nn.functional.batch_norm(x, None, None, training=True), lambda x: standardised(x, 0)),
    "determinant": (torch.linalg.det, jnp.linalg.det),
}  # fmt: skip


def along(f: Fn) -> Fn:
    return lambda x: jax.jvp(f, (x,), (jnp.cos(x),))[1]


def sloped(f: Fn) -> Fn:
    return jax.grad(lambda x: HOST.total(f(x)))


ORDERS: dict[str, Callable[[Fn], Fn]] = {
    "forward over forward": lambda f: along(along(f)),
    "reverse over forward": lambda f: sloped(along(f)),
    "reverse over forward over reverse": lambda f: jax.jit(sloped(along(sloped(f)))),
    "reverse over reverse over reverse": lambda f: jax.jit(sloped(sloped(sloped(f)))),
    "forward over reverse over reverse, batched": lambda f: lambda x: jax.vmap(along(sloped(sloped(f))))(x[None])[0],
}
HIGHER = {f"{name}: {order}": (*fns, ask) for name, fns in KEEPING.items() for order, ask in ORDERS.items()}


@pytest.mark.parametrize(("fn", "native", "ask"), rows(HIGHER))
def test_a_higher_derivative(fn: Fn, native: Fn, ask: Callable[[Fn], Fn]) -> None:
    """In any mode and to the third order, it is the derivative of the function."""
    x = jnp.array([[2.0, 0.3, -0.5], [0.1, 1.5, 0.7], [-0.4, 0.2, 1.0]])
    got, expected = ask(levels(fn))(x), jax.jit(ask(native))(x)
    scale = 1 + jnp.abs(expected).max()
    assert_same(got / scale, expected / scale, 2e-4)


# --- axes of a batch --------------------------------------------------------------------------------------------------

# Of a leaf, of a whole container, or none.
AXES: dict[str, tuple[Any, Any]] = {
    "the first": (0, 0),
    "another in, another out": ((1, 0), 1),
    "from the end": ((-1, 2), -1),
    "one argument alone": ((0, None), 0),
    "a container alone": ((None, 1), {"outer": 1, "sum": 0}),
    "a leaf of a container alone": ((None, {"b": None, "c": 2}), {"outer": 2, "sum": -1}),
}


def in_either(x: Any, y: Any) -> Any:
    """A function of containers, in the operators that the frameworks share."""
    return {"outer": x * y["b"].sum() + y["c"].sum(0) * y["b"].mean(0), "sum": (x**2 * y["c"].mean(0)).sum(0)}


@pytest.mark.parametrize(("in_axes", "out_axes"), rows(AXES))
def test_any_axes(in_axes: Any, out_axes: Any) -> None:
    """The value, and the gradient through it."""
    x, y = jnp.arange(8.0).reshape(2, 2, 2) / 8, {"b": jnp.arange(8.0).reshape(2, 2, 2) / 9, "c": jnp.ones((2, 2, 2))}
    batch = lambda f: jax.vmap(f, in_axes, out_axes)
    for ask in (batch, lambda f: jax.jit(jax.grad(lambda x, y: HOST.total(batch(f)(x, y)), (0, 1)))):
        assert_same(ask(levels(in_either))(x, y), ask(in_either)(x, y))


# --- checkpoint -------------------------------------------------------------------------------------------------------

policies = jax.checkpoint_policies
POLICIES: dict[str, Any] = {
    "everything_saveable": policies.everything_saveable,
    "nothing_saveable": policies.nothing_saveable,
    "dots_saveable": policies.dots_saveable,
    "checkpoint_dots": policies.checkpoint_dots,
    "dots_with_no_batch_dims_saveable": policies.dots_with_no_batch_dims_saveable,
    "checkpoint_dots_with_no_batch_dims": policies.checkpoint_dots_with_no_batch_dims,
    "offload_dot_with_no_batch_dims": policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "save_only_these_names": policies.save_only_these_names("kept"),
    "save_any_names_but_these": policies.save_any_names_but_these("kept"),
    "save_anything_except_these_names": policies.save_anything_except_these_names("kept"),
    "save_and_offload_only_these_names": policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["kept"], names_which_can_be_offloaded=[], offload_src="device", offload_dst="pinned_host"
    ),
    "save_from_both_policies": policies.save_from_both_policies(policies.dots_saveable, policies.save_only_these_names("kept")),
}  # fmt: skip


def layered(layer: Fn, policy: Any = None) -> Fn:
    """Two layers, of which the output of the first has a name, and a product of JAX's between them."""

    def loss(x: Any) -> Any:
        hidden = checkpoint_name(layer(x), "kept")
        return (layer(hidden @ hidden.T) ** 2).sum()

    return jax.checkpoint(loss, policy=policy)


def test_there_is_no_other_policy() -> None:
    theirs = {name: policy for name, policy in vars(policies).items() if not name.startswith("_")}
    assert set(POLICIES) == {name for name, policy in theirs.items() if not isinstance(policy, type)}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_changes_no_gradient(policy: str) -> None:
    """Eagerly, compiled, and one order higher."""
    x = jnp.arange(4.0).reshape(2, 2) / 4
    ours, theirs = layered(levels(torch.tanh), POLICIES[policy]), layered(jnp.tanh)
    orders = [jax.grad, lambda f: jax.jit(jax.value_and_grad(f)), lambda f: jax.grad(lambda x: jax.grad(f)(x).sum())]
    for ask in orders[:2] if policy.startswith("offload") else orders:  # what is offloaded has one derivative in JAX
        assert_same(ask(ours)(x), ask(theirs)(x))


# --- how often torch computes -----------------------------------------------------------------------------------------


class Counted:
    """A torch function of one tensor that counts how often Python enters it."""

    def __init__(self) -> None:
        self.entered = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Enter."""
        self.entered += 1
        return torch.sin(x) * x


def looped(f: Fn) -> Fn:
    return lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=4)[0].sum()


def slope(f: Fn) -> Fn:
    return jax.grad(lambda x: f(x).sum())


# A gradient -> how often Python enters the function when it is taken once more.
ENTERED: dict[str, tuple[Callable[[Fn], Fn], int]] = {
    "eager": (slope, 1),
    "eager, pulled twice": (lambda f: lambda x: (lambda out, pull: pull(pull(out)[0]))(*jax.vjp(f, x)), 1),
    "of an eager batch": (lambda f: slope(jax.vmap(f)), 1),
    "of a compiled function": (lambda f: slope(jax.jit(f)), 0),
    "compiled, of a batch": (lambda f: jax.jit(slope(jax.vmap(f))), 0),
    "batched": (lambda f: jax.vmap(slope(f)), 0),
    "batched, compiled": (lambda f: jax.jit(jax.vmap(slope(f))), 0),
    "all rows of a Jacobian, compiled": (lambda f: jax.jit(jax.vmap(jax.jacrev(f))), 0),
    "of a loop": (lambda f: slope(looped(f)), 0),
    "of a loop, compiled": (lambda f: jax.jit(slope(looped(f))), 0),
    "in a loop": (lambda f: looped(slope(f)), 0),
    "checkpointed": (lambda f: slope(jax.checkpoint(f)), 0),
    "checkpointed in a loop, compiled": (lambda f: jax.jit(slope(looped(jax.checkpoint(f)))), 0),
    "of a branch, compiled": (lambda f: jax.jit(slope(lambda x: jax.lax.cond(x.sum() > 0, f, jnp.cos, x))), 0),
    "pull-back, made and taken compiled": (lambda f: lambda x: jax.jit(lambda pull, c: pull(c))(*jax.jit(lambda x: jax.vjp(f, x)[::-1])(x)), 0),
    "ahead of time": (lambda f: jax.jit(slope(f)).lower(jnp.ones((2, 3))).compile(), 0),
}  # fmt: skip


@pytest.mark.parametrize(("gradient", "times"), rows(ENTERED))
def test_a_gradient_does_not_enter_the_forward_again(gradient: Callable[[Fn], Fn], times: int) -> None:
    """Once, for the value, where it is eager; in a trace never: both graphs were captured when it was traced."""
    f, x = Counted(), jnp.ones((2, 3))
    ask = gradient(levels(f))
    jax.block_until_ready(ask(x))
    before = f.entered
    jax.block_until_ready([ask(x * k) for k in range(2)])
    assert f.entered - before == 2 * times


@torch.library.custom_op("test_in_jax::counted_sine", mutates_args=())
def counted_sine(x: torch.Tensor) -> torch.Tensor:
    """An operation that counts how often it computes, also in a graph that was captured."""
    counted_sine.times += 1
    return torch.sin(x)


counted_sine.times = 0
counted_sine.register_fake(torch.empty_like)
counted_sine.register_autograd(
    lambda ctx, g: g * torch.cos(ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.mark.parametrize(
    ("make", "times"),
    [
        (lambda f: jax.value_and_grad(lambda x: f(f(x)).sum()), 2),
        (lambda f: jax.jit(jax.value_and_grad(lambda x: f(f(x)).sum())), 2),
        (lambda f: jax.grad(jax.checkpoint(lambda x: f(f(x)).sum(), policy=policies.everything_saveable)), 2),
        (lambda f: jax.grad(jax.checkpoint(lambda x: f(f(x)).sum())), 4),
        (lambda f: jax.jit(jax.value_and_grad(looped(f))), 4),
        (lambda f: jax.jit(jax.value_and_grad(looped(jax.checkpoint(f)))), 8),
    ],
    ids=["eager", "compiled", "everything kept", "nothing kept", "loop", "checkpointed loop"],
)
def test_torch_computes_as_often_as_it_must(make: Callable[[Fn], Fn], times: int) -> None:
    """Once for each use, and once more where a checkpoint asks for it."""
    ask, x = make(levels(lambda t: counted_sine(t) * t)), jnp.ones(3)
    jax.block_until_ready(ask(x))
    counted_sine.times = 0
    jax.block_until_ready(ask(x))
    assert counted_sine.times == times


@pytest.mark.parametrize("trace", [jax.eval_shape, lambda f, x: jax.make_jaxpr(f)(x), lambda f, x: jax.jit(f).lower(x)])
def test_a_trace_computes_nothing(trace: Callable[..., Any]) -> None:
    f = levels(counted_sine)
    counted_sine.times = 0
    for fn in (f, slope(f), jax.vmap(f), looped(f), slope(looped(f))):
        trace(fn, jnp.ones((2, 3)))
    assert counted_sine.times == 0


# --- what a program keeps for the backward ----------------------------------------------------------------------------

KEPT: dict[str, tuple[Fn, list[tuple[int, ...]]]] = {
    "nothing but arguments": (lambda x: (x * x).sum(), []),
    "a view of an argument": (lambda x: (x[2:5].exp() * x.view(2, 4)[0, :3]).sum(), [(3,)]),
    "an output": (lambda x: x.sum().tanh(), []),
    "a value": (lambda x: x.tanh().sum(), [(8,)]),
    "what comes from nothing": (lambda x: (x * torch.arange(8.0).square()).sum(), [(8,)]),
    "what comes from nothing at once": (lambda x: (x * torch.arange(8.0)).sum(), []),
    "a value in both halves": (lambda x: torch.mul(*x.sin().chunk(2)).sum(), [(8,)]),
    "a value in three rows": (lambda x: (lambda a, b, c: a * b * c)(*x.sin()[:6].view(3, 2)).sum(), [(2,), (6,)]),
    "a small part of a value": (lambda x: x.sin()[:2].square().sum(), [(2,)]),
    "a cast of an argument": (lambda x: x.double().square().sum().float(), []),
}


@pytest.mark.parametrize(("fn", "shapes"), KEPT.values(), ids=KEPT)
def test_a_program_keeps_no_more_than_it_must(fn: Fn, shapes: list[tuple[int, ...]]) -> None:
    """What the backward has, or makes quickly of what it has, does not leave the forward."""
    x = jnp.arange(1.0, 9.0)
    program = jax.make_jaxpr(jax.grad(levels(fn)))(x)
    (forward,) = [equation for equation in program.eqns if equation.primitive.name == "torch_forward"]
    assert sorted(v.aval.shape for v in forward.outvars[1:]) == shapes
    native = torch.arange(1.0, 9.0).requires_grad_()
    fn(native).backward()
    assert_same(jax.jit(jax.grad(levels(fn)))(x), np.asarray(native.grad))


def test_a_result_that_does_not_fit_is_found_in_every_run() -> None:
    run = jax.jit(jax.value_and_grad(levels(lambda x, n: (x.square().sum(), n.long() * 2**20)), has_aux=True))
    assert run(jnp.ones(2), jnp.array(3))[0][1] == 3 * 2**20
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="does not fit into int32"):
        jax.block_until_ready(run(jnp.ones(2), jnp.array(2**20)))


# --- linear functions -------------------------------------------------------------------------------------------------

matrix = np.arange(12, dtype=np.float32).reshape(3, 4) / 12
in_torch = torch.from_numpy(matrix)

LINEAR: dict[str, tuple[Fn, Fn]] = {
    "product": (lambda x: in_torch @ x, lambda x: matrix @ x),
    "several results": (lambda x: {"a": in_torch @ x, "b": [x.sum() * 2]}, lambda x: {"a": matrix @ x, "b": [x.sum() * 2]}),
    "complex": (lambda x: torch.fft.fft(x * 1j), lambda x: jnp.fft.fft(x * 1j)),
    "selection": (lambda x: x[1:3], lambda x: x[1:3]),
}  # fmt: skip
TRANSPOSED: dict[str, Callable[[Fn, Any], Any]] = {
    "of values": lambda f, x: jax.linear_transpose(f, x)(cotangents_of(f, x)),
    "of shapes": lambda f, x: jax.linear_transpose(f, jax.ShapeDtypeStruct(x.shape, x.dtype))(cotangents_of(f, x)),
    "compiled": lambda f, x: jax.jit(lambda c: jax.linear_transpose(f, x)(c))(cotangents_of(f, x)),
    "batched": lambda f, x: jax.vmap(jax.linear_transpose(f, x))(jax.tree.map(lambda c: jnp.stack([c, 2 * c]), cotangents_of(f, x))),
    "twice": lambda f, x: jax.linear_transpose(jax.linear_transpose(f, x), cotangents_of(f, x))((x,)),
    "gradient of it": lambda f, x: jax.grad(lambda c: HOST.total(jax.linear_transpose(f, x)(c)))(cotangents_of(f, x)),
}  # fmt: skip


def cotangents_of(f: Fn, x: Any) -> Any:
    return jax.tree.map(HOST.weights, jax.eval_shape(f, x))


@pytest.mark.parametrize("transpose", rows(TRANSPOSED))
@pytest.mark.parametrize(("fn", "native"), rows(LINEAR))
def test_the_transpose_of_a_linear_function(fn: Fn, native: Fn, transpose: Callable[[Fn, Any], Any]) -> None:
    x = jnp.arange(4.0) + (1j if native is LINEAR["complex"][1] else 0)
    assert_same(transpose(levels(fn), x), transpose(native, x))


def test_a_function_is_transposed_in_one_of_its_arguments() -> None:
    a, x = jnp.asarray(matrix), jnp.arange(4.0)
    f = levels(torch.matmul)
    cotangent = jnp.arange(1.0, 4.0)
    for transpose in (
        lambda f: jax.linear_transpose(lambda x: f(a, x), x)(cotangent),
        lambda f: jax.linear_transpose(lambda a: f(a, x), a)(cotangent),
    ):
        assert_same(transpose(f), transpose(jnp.matmul))


@pytest.mark.parametrize("fn", [lambda x: x**2, torch.sin, lambda x: x * x.sum()], ids=["square", "sine", "product"])
def test_a_function_that_is_not_linear_has_no_transpose(fn: Fn) -> None:
    """As in JAX; a derivative somewhere would be a wrong number."""
    with pytest.raises((NotImplementedError, TypeError)):
        jax.linear_transpose(levels(fn), jnp.ones(3))(jnp.ones(3) if fn is not torch.sum else 1.0)


# --- solvers of JAX ---------------------------------------------------------------------------------------------------

symmetric = jnp.asarray(matrix @ matrix.T + np.eye(3, dtype=np.float32))


def rosenbrock(x: Any) -> Any:
    """The same in both frameworks."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def rooted(f: Fn) -> Fn:
    """A root of `f` in its first argument, by Newton, as a function of the second."""

    def newton(g: Fn, start: Any) -> Any:
        return jax.lax.while_loop(lambda x: jnp.abs(g(x)) > 1e-5, lambda x: x - g(x) / jax.grad(g)(x), start)

    return lambda a: jax.lax.custom_root(lambda x: f(x, a), jnp.float32(1), newton, lambda g, y: y / g(jnp.float32(1)))


# solver -> the torch function, the same in JAX, and a use of it
SOLVERS: dict[str, tuple[Fn, Fn, Callable[[Fn], Any]]] = {
    "associative scan": (torch.matmul, jnp.matmul, lambda f: jax.lax.associative_scan(f, jnp.stack([symmetric / k for k in range(1, 6)]))),
    "gradient of an associative scan": (torch.matmul, jnp.matmul, lambda f: jax.jit(jax.grad(lambda a: HOST.total(jax.lax.associative_scan(f, a, reverse=True))))(jnp.stack([symmetric / k for k in range(1, 6)]))),
    "conjugate gradients": (torch.mv, jnp.matmul, lambda f: jax.grad(lambda m, b: (cg(lambda v: f(m, v), b)[0] ** 2).sum(), (0, 1))(symmetric, jnp.ones(3))),
    "gmres": (torch.mv, jnp.matmul, lambda f: jax.grad(lambda b: (gmres(lambda v: f(symmetric, v), b)[0] ** 2).sum())(jnp.ones(3))),
    "BFGS": (rosenbrock, rosenbrock, lambda f: jnp.round(minimize(f, jnp.zeros(2), method="BFGS", tol=1e-3).x, 2)),
    "a root": (lambda x, a: torch.tanh(x) * a - x + 1, lambda x, a: jnp.tanh(x) * a - x + 1, lambda f: jax.value_and_grad(rooted(f))(jnp.float32(0.5))),
    "vectorize": (lambda a, b: (a * b).sum(), lambda a, b: (a * b).sum(), lambda f: jnp.vectorize(f, signature="(n),(n)->()")(jnp.ones((2, 1, 3)), symmetric)),
    "custom_vmap": (lambda a: a.sum(), lambda a: a.sum(), lambda f: jax.vmap(sequential_vmap(f))(symmetric)),
}  # fmt: skip


@pytest.mark.parametrize(("fn", "native", "use"), rows(SOLVERS))
def test_a_solver(fn: Fn, native: Fn, use: Callable[[Fn], Any]) -> None:
    """A loop, an iteration to a fixed point, an adjoint equation: with torch's function inside."""
    assert_same(use(levels(fn)), use(native), 1e-4)


HOLOMORPHIC: dict[str, Callable[[Fn, Any], Any]] = {
    "grad": lambda f, z: jax.grad(lambda z: f(z).sum(), holomorphic=True)(z),
    "jacfwd": lambda f, z: jax.jacfwd(f, holomorphic=True)(z),
    "jacrev": lambda f, z: jax.jacrev(f, holomorphic=True)(z),
    "hessian": lambda f, z: jax.jit(jax.hessian(lambda z: f(z).sum(), holomorphic=True))(z),
}


@pytest.mark.parametrize("ask", rows(HOLOMORPHIC))
def test_a_complex_derivative(ask: Callable[[Fn, Any], Any]) -> None:
    """Of a holomorphic function, which is a complex number and not the gradient of a real one."""
    z = jnp.array([1 + 2j, 0.5j], jnp.complex64)
    assert_same(ask(levels(lambda z: z**3 * 2j), z), ask(lambda z: z**3 * 2j, z))


# --- integers beside what is differentiated ---------------------------------------------------------------------------

INTEGERS: dict[str, Callable[[Fn, Any, Any], Any]] = {
    "vjp": lambda f, x, i: jax.vjp(f, x, i)[1]((x, float0(3), float0(3))),
    "jvp": lambda f, x, i: jax.jvp(f, (x, i), (x, float0(3)))[1],
    "linearize": lambda f, x, i: jax.linearize(f, x, i)[1](x, float0(3)),
    "allow_int": lambda f, x, i: jax.grad(lambda x, i: f(x, i)[0].sum(), (0, 1), allow_int=True)(x, i),
    "allow_int, compiled": lambda f, x, i: jax.jit(jax.grad(lambda x, i: f(x, i)[0].sum(), (0, 1), allow_int=True))(x, i),
}  # fmt: skip


def float0(n: int) -> Any:
    return np.zeros(n, jax.dtypes.float0)


@pytest.mark.parametrize("ask", rows(INTEGERS))
def test_an_integer_has_a_derivative_of_no_kind(ask: Callable[[Fn, Any, Any], Any]) -> None:
    """Whether it comes in or goes out, JAX's own dtype for nothing."""
    fn = lambda x, i: (x * i, i + 1, x > 0)
    x, i = jnp.array([0.5, 1.0, 2.0]), jnp.arange(3)
    got, expected = jax.tree.leaves(ask(levels(fn), x, i)), jax.tree.leaves(ask(fn, x, i))
    assert [(g.shape, g.dtype) for g in got] == [(e.shape, e.dtype) for e in expected]
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == jax.dtypes.float0 or np.allclose(g, e)


# --- a compiled program and its arguments -----------------------------------------------------------------------------


def test_static_arguments_of_a_compiled_crossing() -> None:
    """By position and by name: the torch function gets them as they are."""
    seen: list[Any] = []

    def repeat(x: torch.Tensor, n: int, *, kind: str) -> torch.Tensor:
        seen.append((type(n), kind))
        return x.repeat(n)

    f = jax.jit(levels(repeat), static_argnums=1, static_argnames="kind")
    assert f(jnp.ones(2), 3, kind="a").shape == (6,)
    assert f(jnp.ones(2), 2, kind="b").shape == (4,)
    assert set(seen) == {(int, "a"), (int, "b")}


def test_a_donated_argument_is_given_away_and_no_other_changes() -> None:
    """To a function that writes to it: the caller's copy and the program's other arguments stay."""
    f = levels(lambda t: t.mul_(2))
    a, b = jnp.arange(4.0), jnp.arange(4.0)
    copy = a + 0
    doubled, also, same = jax.jit(lambda a, b: (f(a), f(b), b), donate_argnums=0)(a, b)
    assert a.is_deleted()
    assert doubled.tolist() == also.tolist() == [0, 2, 4, 6]
    assert copy.tolist() == b.tolist() == same.tolist() == [0, 1, 2, 3]


def test_results_and_gradients_can_be_donated() -> None:
    """Their memory was torch's; nothing of torch reads it again."""
    f, x = levels(lambda t: torch.exp(t)), jnp.ones(1000)
    out, pull = jax.vjp(f, x)
    (gradient,) = pull(jnp.ones(1000))
    for array in (out, gradient):
        jax.block_until_ready(jax.jit(lambda a: a * 0 - 7, donate_argnums=0)(array))
    assert np.allclose(pull(jnp.ones(1000))[0], np.e)


def test_an_argument_donated_before_its_gradient_is_taken() -> None:
    """Torch's graph holds values of its own."""
    x = jnp.full(1000, 2.0)
    _, pull = jax.vjp(levels(lambda t: (t**3).sum()), x)
    jax.block_until_ready(jax.jit(lambda a: a * 0 - 7, donate_argnums=0)(x))
    junk = [jnp.full(1000, 9.0) + k for k in range(10)]
    assert (pull(jnp.ones(()))[0] == 12).all()
    del junk


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [lambda f: f, slope, lambda f: jax.vmap(f), lambda f: looped(f), lambda f: slope(looped(f))],
    ids=["value", "gradient", "vmap", "scan", "gradient of scan"],
)
def test_export_is_refused(program: Callable[[Fn], Fn]) -> None:
    """A callback into this process means nothing in another; the message says of which function, and why."""

    def wave(t: torch.Tensor) -> torch.Tensor:
        return torch.sin(t) * t

    with pytest.raises(interop.UnsupportedError, match=r"wave.*export.*callback can't be serialised"):
        jax.export.export(jax.jit(program(levels(wave))))(jax.ShapeDtypeStruct((2, 3), jnp.float32))


def test_shapes_that_are_open_are_refused() -> None:
    (n,) = jax.export.symbolic_shape("n")
    with pytest.raises(interop.InteropError, match=r"<lambda>.*shape"):
        jax.export.export(jax.jit(levels(lambda t: t * 2)))(jax.ShapeDtypeStruct((n,), jnp.float32))


# --- numbers that are none --------------------------------------------------------------------------------------------

NANS: dict[str, Callable[[], Any]] = {
    "call": lambda: levels(torch.log)(-jnp.ones(2)),
    "jvp": lambda: jax.jvp(levels(torch.log), (-jnp.ones(2),), (jnp.ones(2),)),
    "vmap": lambda: jax.vmap(levels(torch.log))(-jnp.ones(2)),
    "compiled": lambda: jax.jit(levels(torch.log))(-jnp.ones(2)),
    "scan": lambda: looped(levels(torch.log))(-jnp.ones(2)),
    "gradient": lambda: slope(levels(lambda t: torch.sqrt(t) * 0))(jnp.zeros(2)),
    "gradient, compiled": lambda: jax.jit(slope(levels(lambda t: torch.sqrt(t) * 0)))(jnp.zeros(2)),
    "second gradient, compiled": lambda: jax.jit(slope(slope(levels(lambda t: t.abs() ** 1.5 * 0))))(jnp.zeros(2)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Invalid nan value")
@pytest.mark.parametrize("make", rows(NANS))
def test_a_nan_made_in_torch_is_reported(make: Callable[[], Any]) -> None:
    """Where JAX is told to look for them."""
    assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(make()))
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        jax.block_until_ready(make())


@pytest.mark.parametrize("make", rows(NANS))
def test_a_nan_made_in_torch_is_found_by_checkify(make: Callable[[], Any]) -> None:
    """The check is part of the program; the value is what it was."""
    error, _ = checkify.checkify(make, errors=checkify.float_checks)()
    with pytest.raises(checkify.JaxRuntimeError, match="nan generated by primitive: torch_"):
        error.throw()


NUMBERS: dict[str, Callable[[], Any]] = {
    "infinity": lambda: levels(torch.log)(jnp.zeros(2)),
    "a nan that is masked inside": lambda: jax.jit(levels(lambda t: torch.where(t > 0, torch.log(t), t)))(-jnp.ones(2)),
    "integers and masks": lambda: levels(lambda t: (t > 0, t.argmax()))(jnp.ones(2)),
    "an empty result": lambda: jax.jit(levels(lambda t: t[:0]))(jnp.ones(2)),
    "a loop and its gradient": lambda: jax.jit(slope(looped(levels(torch.sin))))(jnp.ones(2)),
    "a gradient": lambda: jax.grad(lambda x: HOST.total(levels(lambda t: (t > 0, t * 2))(x)))(jnp.ones(2)),
}  # fmt: skip


@pytest.mark.parametrize("make", rows(NUMBERS))
def test_nothing_else_is_reported(make: Callable[[], Any]) -> None:
    with jax.debug_nans(True):
        jax.block_until_ready(make())
    checkify.checkify(make, errors=checkify.float_checks)()[0].throw()


TAYLOR: dict[str, tuple[Callable[[Any], Any], Fn]] = {
    "of several results": (
        lambda x: (torch.sin(x) * x**2, x.sum(), x.argmax()),
        lambda x: (jnp.sin(x) * x**2, x.sum()),
    ),
    "of a matrix": (
        lambda x: torch.linalg.inv(torch.diag(x) + 1.0),
        lambda x: jnp.diag(1 / x) - jnp.outer(1 / x, 1 / x) / (1 + (1 / x).sum()),
    ),
    "of a kernel that is fused": (
        lambda x: torch.nn.functional.layer_norm(x, (3,)),
        lambda x: (x - x.mean()) / jnp.sqrt(x.var() + 1e-5),
    ),
}


def assert_same_curve(of: Callable[[Fn], Fn], fn: Fn, native: Fn, order: int, wrap: Callable[..., Any]) -> None:
    """The value and the terms along a curve; an integer among the results has none in JAX's own."""
    terms = jnp.ones(3), jnp.array([0.5, 0.1, 0.3]), jnp.array([0.2, 0.3, 0.1])
    at, curve = jnp.array([0.9, 0.4, 1.7]), terms[:order]
    found, expected = wrap(lambda: jet(of(levels(fn)), (at,), (curve,)))(), jet(of(native), (at,), (curve,))
    for got, same in zip(found, expected, strict=True):
        same_leaves = jax.tree.leaves(same)
        assert_same(jax.tree.leaves(got)[: len(same_leaves)], same_leaves, 1e-4)


@pytest.mark.parametrize(("fn", "native"), rows(TAYLOR))
def test_taylor_mode(fn: Fn, native: Fn) -> None:
    """`jax.experimental.jet`, to the third order."""
    assert_same_curve(lambda f: f, fn, native, 3, lambda f: f)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_taylor_mode_of_a_gradient(wrap: Callable[..., Any]) -> None:
    fn, native = TAYLOR["of several results"]
    assert_same_curve(lambda f: jax.grad(lambda x: HOST.total(f(x))), fn, native, 2, wrap)


def test_taylor_mode_moves_arguments_together_and_refuses_what_is_random() -> None:
    f, at, other = levels(lambda x, y: x**2 * y), jnp.array([2.0, 3.0]), jnp.array([1.0, 5.0])
    curves = ((at, at), (other, other * 2))
    expected = jet(lambda x, y: x**2 * y, (at, other), curves)
    assert_same(jax.tree.leaves(jet(f, (at, other), curves)), jax.tree.leaves(expected), 1e-5)
    with pytest.raises(interop.UnsupportedError, match="random"):
        jet(levels(lambda x: x * torch.rand_like(x)), (at,), ((at, at),))


def test_an_infinity_made_in_torch_is_reported() -> None:
    with jax.debug_infs(True), pytest.raises(FloatingPointError):
        levels(torch.log)(jnp.zeros(2))


# --- functions that can't be captured ---------------------------------------------------------------------------------


class Scaled(torch.autograd.Function):
    """The sine with seven times its derivative; of the old style, by another library."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """The value."""
        ctx.save_for_backward(x)
        return torch.from_numpy(np.sin(x.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> torch.Tensor:
        """The rule."""
        (x,) = ctx.saved_tensors
        return cotangent * torch.cos(x) * 7


@jax.custom_jvp
def scaled(x: jax.Array) -> jax.Array:
    """The same in JAX."""
    return jnp.sin(x)


scaled.defjvp(lambda primals, tangents: (scaled(*primals), tangents[0] * jnp.cos(primals[0]) * 7))


def chosen(x: torch.Tensor) -> torch.Tensor:
    """By its value."""
    return (torch.sin(x) if x.sum() > 0 else x**2).sum()


def weighted(x: torch.Tensor) -> torch.Tensor:
    """By a number that numpy computes, which counts as a constant."""
    return (x**2).sum() * float(x.detach().numpy().max())


number = jax.ShapeDtypeStruct((), jnp.float32)
UNCAPTURED: dict[str, tuple[Fn, Fn]] = {
    "control flow": (chosen, lambda x: jnp.where(x.sum() > 0, jnp.sin(x), x**2).sum()),
    "numpy": (weighted, lambda x: (x**2).sum() * jax.lax.stop_gradient(x.max())),
    "an old autograd.Function": (lambda x: (Scaled.apply(x) ** 2).sum(), lambda x: (scaled(x) ** 2).sum()),
}
DERIVED: dict[str, Callable[[Fn, Any], Any]] = {
    "gradient": lambda f, x: jax.value_and_grad(f)(x[0]),
    "gradient, compiled": lambda f, x: jax.jit(jax.value_and_grad(f))(x[0]),
    "gradients of a batch": lambda f, x: jax.vmap(jax.value_and_grad(f))(x),
    "gradients of a batch, compiled": lambda f, x: jax.jit(jax.vmap(jax.value_and_grad(f)))(x),
    "gradient of a batch": lambda f, x: jax.grad(lambda x: jax.vmap(f)(x).sum())(x),
    "gradient of a loop": lambda f, x: jax.jit(jax.grad(lambda x: jax.lax.scan(lambda c, row: (c + f(row) * row, None), x[0], x)[0].sum()))(x),
    "checkpointed": lambda f, x: jax.grad(jax.checkpoint(f))(x[0]),
    "pulled, compiled": lambda f, x: (lambda out, pull: jax.jit(pull)(out))(*jax.vjp(f, x[0])),
    "jvp": lambda f, x: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(x[0]),
    "linearised": lambda f, x: jax.linearize(f, x[0])[1](x[1]),
    "second gradient": lambda f, x: jax.grad(lambda x: jax.grad(f)(x).sum())(x[0]),
    "Hessian, compiled": lambda f, x: jax.jit(jax.hessian(f))(x[0]),
}  # fmt: skip
examples = jnp.array([[0.5, 1.0, 1.5], [-0.5, -1.0, -1.7]])


def uncaptured(fn: Fn) -> Fn:
    """The function with every level on, and the shape of its result declared."""
    return differentiable(jittable(example_output=number)(as_jax(fn)))


AGAIN = {f"{name}: {asked}": (*fns, ask) for name, fns in UNCAPTURED.items() for asked, ask in DERIVED.items()}


@pytest.mark.parametrize(("fn", "native", "ask"), rows(AGAIN))
def test_a_function_that_can_not_be_captured(fn: Fn, native: Fn, ask: Callable[[Fn, Any], Any]) -> None:
    """Its derivatives are those of the function, run again: each example by its own branch."""
    assert_same(ask(uncaptured(fn), examples), ask(native, examples))


LEFT: dict[str, Fn] = {
    "a number": lambda x: torch.tensor([float(v.detach()) ** 2 for v in x]).sum(),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy() ** 2).sum(),
    "an array of numpy": lambda x: (x.detach().numpy() ** 2).sum(),
}


@pytest.mark.parametrize(
    "ask", [ask for name, ask in DERIVED.items() if "batch" not in name and name != "pulled, compiled"]
)
@pytest.mark.parametrize("fn", rows(LEFT))
def test_a_result_that_autograd_has_lost_sight_of_has_no_gradient(fn: Fn, ask: Callable[[Fn, Any], Any]) -> None:
    """It would be zero."""
    with pytest.raises((interop.NotDifferentiableError, jax.errors.JaxRuntimeError), match="autograd does not follow"):
        jax.block_until_ready(ask(uncaptured(fn), examples))


class Scale:
    """With an attribute, and one of its class."""

    offset = 1.0

    def __init__(self) -> None:
        self.factor = 2.0
        self.options = {"power": [2]}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (self.factor * x ** self.options["power"][0]).sum() + self.offset * x.sum()


class Leaky(torch.nn.Module):
    """With options in its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.factor = torch.nn.LeakyReLU(0.5), 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * (self.act(x) * x).sum()


FACTOR = 2.0


def by_a_global(x: torch.Tensor) -> torch.Tensor:
    """Which it reads in a function of its own."""
    return (lambda y: (FACTOR * y**2).sum())(x)


def changing(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Fn, list[Callable[[], None]]]:
    """A function, and what changes what it reads, one thing after the other."""
    scale, module, weight = Scale(), Leaky(), [torch.ones(3)]

    def of_a_closure(x: torch.Tensor) -> torch.Tensor:
        return (tensor * x**2).sum()

    tensor = torch.ones(3)

    def rebind() -> None:
        nonlocal tensor
        tensor = torch.full((3,), 7.0)

    return {
        "an object": (
            scale,
            [
                lambda: setattr(scale, "factor", 5.0),
                lambda: monkeypatch.setattr(Scale, "offset", 3.0),
                lambda: scale.options["power"].__setitem__(0, 3),
            ],
        ),
        "a global": (by_a_global, [lambda: monkeypatch.setitem(globals(), "FACTOR", 5.0)]),
        "a tensor": (of_a_closure, [rebind, lambda: tensor.fill_(2.0)]),
        "a tensor in a list": (
            lambda x: (weight[0] * x**2).sum(),
            [lambda: weight.__setitem__(0, torch.full((3,), 7.0))],
        ),
        "a module": (
            module,
            [lambda: setattr(module, "factor", 3.0), lambda: setattr(module.act, "negative_slope", 0.1)],
        ),
        "a shape": (
            lambda x: (x.repeat(len(weight)) ** 2).sum(),
            [lambda: weight.append(torch.ones(1))],
        ),
    }[name]


@pytest.mark.parametrize("ask", [ask for name, ask in DERIVED.items() if name != "gradient of a loop"])
@pytest.mark.parametrize("name", ["an object", "a global", "a tensor", "a tensor in a list", "a module", "a shape"])
def test_a_new_trace_reads_what_there_is_now(
    name: str, ask: Callable[[Fn, Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its value and its gradient are of one function, as in JAX: none is left over from an earlier trace."""
    fn, changes = changing(name, monkeypatch)
    whole = levels(fn)
    crossed = functools.partial(whole, {}) if isinstance(fn, torch.nn.Module) else whole
    for change in (lambda: None, *changes):
        change()
        fresh = levels(fn)  # which has traced nothing
        anew = functools.partial(fresh, {}) if isinstance(fn, torch.nn.Module) else fresh
        assert_same(ask(lambda x: crossed(x), examples), ask(lambda x: anew(x), examples))


def test_what_a_call_has_kept_is_nobodys_gradient() -> None:
    """An activation in a dict or a list, of a call that is over: of autograd, of a batch, of a trace."""
    kept: dict[str, Any] = {"all": []}

    def fn(x: torch.Tensor) -> torch.Tensor:
        kept["last"] = x.sin()
        kept["all"].append(kept["last"])
        return (kept["last"] * 2).sum()

    f, x = levels(fn), examples[0]
    for _ in range(2):
        assert_same(jax.grad(f)(x), 2 * jnp.cos(x))
        assert_same(jax.vmap(f)(examples), 2 * jnp.sin(examples).sum(1))
        assert_same(jax.jvp(f, (x,), (x,))[1], (2 * jnp.cos(x) * x).sum())
        assert_same(jax.jit(jax.grad(lambda x: f(x)))(x), 2 * jnp.cos(x))
        assert_same(jax.hessian(f)(x), jnp.diag(-2 * jnp.sin(x)))
    weight = torch.ones(3, requires_grad=True)
    doubled = weight * 2
    for lost in (lambda x: (x * weight).sum(), lambda x: (x * doubled).sum()):
        with pytest.raises(interop.NotDifferentiableError, match="its gradient would be lost"):
            jax.grad(levels(lost))(x)


def test_a_constant_has_the_gradient_zero() -> None:
    for fn in (lambda x: torch.ones(()), lambda x: x.detach().sum(), lambda x: (x > 1).float().sum()):
        for wrap in (lambda f: f, jax.jit):
            assert wrap(jax.grad(levels(fn)))(examples[0]).tolist() == [0, 0, 0]


def energy_and_forces(x: torch.Tensor, how: str) -> tuple[torch.Tensor, torch.Tensor]:
    """As a force field in torch computes them."""
    x = x.detach().requires_grad_() if how == "backward" else x.requires_grad_()
    energy = (x**3).sum()
    if how == "backward":
        energy.backward(retain_graph=True)
        return energy, -x.grad
    return energy, -torch.autograd.grad(energy, x, retain_graph=True, create_graph=how == "graph")[0]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_gradient_that_is_taken_inside_has_a_derivative_or_says_that_it_has_none(wrap: Callable[..., Any]) -> None:
    """One without a graph is no constant, of which the derivative would be zero; nobody may ask for it, though."""
    x = examples[0]

    def of(how: str) -> Fn:
        return levels(functools.partial(energy_and_forces, how=how))

    def on_forces(f: Fn) -> Fn:
        return lambda x: (f(x)[1] ** 2).sum()

    for how in ("graph", "no graph", "backward"):
        assert_same(wrap(of(how))(x), ((x**3).sum(), -3 * x**2))
    assert_same(wrap(jax.grad(on_forces(of("graph"))))(x), 36 * x**3)
    assert_same(wrap(jax.grad(lambda x: of("no graph")(x), has_aux=True))(x), (3 * x**2, -3 * x**2))
    for how in ("no graph", "backward"):
        lossy = on_forces(of(how))
        asked: list[tuple[Fn, Any]] = [
            (jax.grad(lossy), x),
            (lambda x, f=lossy: jax.jvp(f, (x,), (x,)), x),
            (jax.vmap(jax.grad(lossy)), examples),
            (jax.grad(lambda xs, f=lossy: jax.vmap(f)(xs).sum()), examples),
        ]
        for ask, at in asked:
            with pytest.raises((interop.NotDifferentiableError, jax.errors.JaxRuntimeError), match="create_graph=True"):
                jax.block_until_ready(wrap(ask)(at))


def test_asking_whether_it_has_one_leaves_nothing_in_a_module() -> None:
    """What was traced for that is taken back; what the run itself has assigned stays."""
    keeper = torch.nn.Module()
    keeper.register_buffer("kept", torch.zeros(3))

    def force(x: torch.Tensor) -> torch.Tensor:
        keeper.kept = x.requires_grad_() ** 2
        return torch.autograd.grad(keeper.kept.sum(), x)[0]

    with pytest.raises(interop.NotDifferentiableError, match="create_graph=True"):
        jax.grad(lambda x: levels(force)(x).sum())(examples[0])
    assert_same(keeper.kept.detach(), torch.tensor((examples[0] ** 2).tolist()))


def test_a_result_that_is_no_array_is_not_what_was_promised() -> None:
    f = uncaptured(lambda x: (x.sum(), float(x.detach().sum())))
    with pytest.raises(jax.errors.JaxRuntimeError, match="another pytree than was promised"):
        jax.block_until_ready(jax.jit(jax.grad(lambda x: f(x)))(examples[0]))


def half_followed(x: torch.Tensor) -> torch.Tensor:
    """A product of which autograd follows one factor."""
    with torch.no_grad():
        factor = 2 * x
    return (x * factor).sum()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_forward_mode_is_of_what_backward_is(wrap: Callable[..., Any]) -> None:
    """Torch's own follows what is computed under no_grad, and has another derivative than backward."""
    f, x = levels(half_followed), examples[0]
    expected = 2 * x
    assert_same(wrap(jax.grad(f))(x), expected)
    assert_same(wrap(jax.jacfwd(f))(x), expected)
    assert_same(wrap(lambda x: jax.jvp(f, (x,), (x,))[1])(x), expected @ x)
    assert_same(wrap(jax.vmap(jax.jacfwd(f)))(examples), 2 * examples)
    assert_same(wrap(jax.hessian(f))(x), jnp.zeros((3, 3)))
    own = torch.func.jvp(half_followed, (torch.ones(3),), (torch.ones(3),))[1]
    assert own == 12, "torch's forward mode knows no_grad now: leave jvp_by_forward_mode to it"


def test_a_generator_that_is_closed_in_a_derivative_sees_no_error() -> None:
    """It closes under no_grad, which forward mode looks for; the collector may do that at any time."""

    @torch.no_grad()
    def numbers() -> Iterator[int]:
        yield from range(3)

    def closing(x: torch.Tensor) -> torch.Tensor:
        left.pop()
        return (x * x).sum()

    left = [numbers() for _ in range(9)]  # one for each time that it runs
    for generator in left:
        next(generator)
    del generator
    x = examples[0]
    assert_same(jax.jvp(levels(closing), (x,), (x,))[1], 2 * x @ x)  # an error there is a warning, and one here


def bent(x: torch.Tensor) -> torch.Tensor:
    """What TorchScript compiles."""
    return torch.tanh(x * x) * x


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_the_second_derivative_of_a_scripted_function_that_has_been_trained(wrap: Callable[..., Any]) -> None:
    """TorchScript then has a backward of its own, which torch.func takes for a constant."""
    scripted = torch.jit.script(bent)
    for _ in range(3):
        scripted(torch.ones(3, requires_grad=True)).sum().backward()
    double = torch.func.jvp(torch.func.grad(lambda x: scripted(x).sum()), (torch.ones(3),), (torch.ones(3),))[1]
    assert not double.any(), "torch.func differentiates what TorchScript has written: leave refuse_scripted to it"
    f, native, x = levels(lambda x: scripted(x).sum()), lambda x: (jnp.tanh(x * x) * x).sum(), examples[0]
    for ask in TWICE.values():
        assert_same(wrap(lambda x, ask=ask: ask(f, x))(x), ask(native, x), 1e-4)


def test_what_acts_on_gradients_alone_is_not_in_forward_mode() -> None:
    """As in torch: the row of the padding has no gradient, and its tangent counts."""
    apply, params = interop.make_functional(torch.nn.Embedding(3, 2, padding_idx=0))
    total = lambda p: apply(p, jnp.array([0, 1])).sum()  # noqa: E731 - asked twice
    assert jax.grad(total)(params)["weight"].tolist() == [[0, 0], [1, 1], [0, 0]]
    ones = jax.tree.map(jnp.ones_like, params)
    assert jax.jvp(total, (params,), (ones,))[1] == 4


class Cubed(torch.autograd.Function):
    """With a backward that says nothing of its own derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """The value."""
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: torch.Tensor) -> torch.Tensor:
        """The rule."""
        return 3 * cotangent * ctx.saved_tensors[0] ** 2


class CubedByParts(torch.autograd.Function):
    """The same, written in the way that `torch.func` takes."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        """The value."""
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        """What the rule reads."""
        del output
        ctx.save_for_backward(*inputs)

    backward = Cubed.backward


def summed_gradient(f: Fn) -> Fn:
    """The sum of its gradient."""
    return lambda x: jax.grad(f)(x).sum()


TWICE: dict[str, Callable[[Fn, Any], Any]] = {
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: jax.jacfwd(f)(x),
    "hessian": lambda f, x: jax.hessian(f)(x),
    "reverse over reverse": lambda f, x: jax.grad(summed_gradient(f))(x),
    "Jacobian of the gradient": lambda f, x: jax.jacrev(jax.grad(f))(x),
    "a batch of them": lambda f, x: jax.vmap(jax.grad(summed_gradient(f)))(jnp.stack([x, x])),
    "third order": lambda f, x: jax.grad(summed_gradient(summed_gradient(f)))(x),
}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("ask", rows(TWICE))
@pytest.mark.parametrize("function", [Cubed, CubedByParts])
def test_a_backward_that_is_once_differentiable_is_not_differentiated(
    function: type[torch.autograd.Function], ask: Callable[[Fn, Any], Any], wrap: Callable[..., Any]
) -> None:
    """The transpose of the transpose would lose what goes through it, and a second derivative would be zero."""
    for fn in (lambda x: function.apply(x).sum(), lambda x: (function.apply(x) * x).sum()):
        f, at = levels(fn), examples[0]
        x = torch.tensor(at.tolist(), requires_grad=True)
        assert_same(jax.grad(f)(at), torch.autograd.grad(fn(x), x)[0])
        with pytest.raises((interop.NotDifferentiableError, jax.errors.JaxRuntimeError), match="once_differentiable"):
            jax.block_until_ready(wrap(lambda x: ask(f, x))(at))  # noqa: B023 - called at once


def test_a_mixed_derivative_through_once_differentiable_is_refused_too() -> None:
    """Also where what is differentiated again was a constant of the gradient; what does not pass there is there."""
    f = levels(lambda w, x: (Cubed.apply(w * x) + w**2 * x).sum())
    at, w = examples[0], jnp.float32(2.0)
    with pytest.raises(interop.NotDifferentiableError, match="once_differentiable"):
        jax.grad(lambda w: jax.grad(f, argnums=1)(w, at).sum())(w)
    beside = levels(lambda w, x: Cubed.apply(x).sum() + w**3)
    assert jax.grad(jax.grad(beside))(w, at) == 12


def test_a_shape_that_is_not_declared_is_asked_for() -> None:
    for name, (fn, _) in UNCAPTURED.items():
        if name == "control flow":  # every way through it has one shape
            assert jax.eval_shape(levels(fn), examples[0]).shape == ()
            continue
        with pytest.raises(interop.AbstractEvalError, match="example_output"):
            jax.jit(jax.grad(levels(fn)))(examples[0])


@pytest.mark.parametrize(("fn", "native"), rows(UNCAPTURED))
def test_running_again_is_said_once(fn: Fn, native: Fn, caplog: pytest.LogCaptureFixture) -> None:
    """In one line of the library's logger, at the level of debugging; an ordinary function says nothing."""
    f, ordinary = uncaptured(fn), levels(lambda x: torch.sin(x).sum())
    with caplog.at_level(logging.DEBUG, logger="interop"):
        for _ in range(2):
            jax.jit(jax.grad(lambda x: f(x) * 2))(examples[0])
            jax.jit(jax.grad(lambda x: ordinary(x) * 2))(examples[0])
    (said,) = [record for record in caplog.records if record.name == "interop" and "recomputed" in record.getMessage()]
    assert said.levelno == logging.DEBUG
    assert fn.__name__ in said.getMessage()
    assert "\n" not in said.getMessage()


def masked(x: torch.Tensor) -> torch.Tensor:
    """Random, and by its value."""
    return (x * torch.rand_like(x)).sum() if x.sum() > 0 else x.sum()


def test_a_random_function_that_can_not_be_captured_has_an_eager_gradient() -> None:
    """The mask of the gradient is that of the value: it comes from the same run."""
    value, mask = jax.value_and_grad(uncaptured(masked))(examples[0])
    assert np.isclose(value, (examples[0] * mask).sum())
    assert len(set(mask.tolist())) == 3


RUN_AGAIN = {name: ask for name, ask in DERIVED.items() if name not in ("gradient", "gradient of a batch")}


@pytest.mark.parametrize("ask", rows(RUN_AGAIN))
def test_a_random_function_that_would_be_run_again_is_refused(ask: Callable[[Fn, Any], Any]) -> None:
    """It would draw other numbers than the value did. Afterwards everything works."""
    f, fine = uncaptured(masked), uncaptured(chosen)
    with pytest.raises((interop.UnsupportedError, jax.errors.JaxRuntimeError), match=r"(?s)masked.*random.*rng="):
        jax.block_until_ready(ask(f, jnp.abs(examples)))
    assert_same(ask(fine, examples), ask(UNCAPTURED["control flow"][1], examples))
