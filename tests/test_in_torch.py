"""What a torch user does with a JAX function, beyond one transform of it: the rest of autograd, `torch.func`, modes.

Each is compared with the same mathematics written in torch, or with the rule that the JAX function was given.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fwad
from jax.experimental import io_callback
from torch.autograd import grad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint as checkpoints
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode

import interop
from interop import as_torch, differentiable, jittable

Fn = Callable[..., Any]


def levels(fn: Fn) -> Fn:
    """The JAX function as a torch function, with every level on."""
    return differentiable(jittable(as_torch(fn)))


def leaf(*values: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that a derivative is asked of."""
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def error_of(call: Callable[[], Any]) -> tuple[type, str]:
    """The error that a call raises: its type and text."""
    with pytest.raises(Exception) as caught:
        call()
    return caught.type, str(caught.value)


def compiled(fn: Fn) -> Fn:
    """The function in one graph."""
    return torch.compile(fn, fullgraph=True, backend="aot_eager")


def close(got: Any, expected: Any, **tolerance: float) -> None:
    """The same structure, dtypes and numbers."""
    torch.testing.assert_close(got, expected, **tolerance)


# One function of two tensors, with a residual of every kind: an input, an output, a new value.
def in_jax(x: Any, y: Any) -> Any:
    """In JAX."""
    return jnp.sin(x) * y**2 + jnp.exp(y) * x.sum()


def in_torch(x: Any, y: Any) -> Any:
    """The same in torch."""
    return torch.sin(x) * y**2 + torch.exp(y) * x.sum()


ours = levels(in_jax)


def point(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Fresh arguments of it."""
    return leaf(0.3, -0.7, 1.1, dtype=dtype), leaf(0.5, 0.2, -0.4, dtype=dtype)


# --- higher orders ----------------------------------------------------------------------------------------------------


def test_a_third_derivative() -> None:
    def derivative(f: Fn) -> torch.Tensor:
        x, y = point()
        out = f(x, y)
        for _ in range(3):
            (out,) = grad(out.pow(2).sum(), x, create_graph=True)
        return out

    close(derivative(ours), derivative(in_torch))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_mixed_derivatives_by_backward() -> None:
    """They accumulate in `.grad` as torch's do, graph and all."""

    def gradients(f: Fn) -> list[torch.Tensor]:
        x, y = point()
        (f(x, y).sum()).backward(create_graph=True)
        first = (x.grad, y.grad)
        x.grad = y.grad = None
        (first[0] * first[1]).sum().backward()
        found = [*first, x.grad, y.grad]
        x.grad = y.grad = None  # else the graph and its leaf hold each other
        return [g.detach() for g in found]

    close(gradients(ours), gradients(in_torch))


# --- a batch of cotangents --------------------------------------------------------------------------------------------


def _under(mode: Any, f: Fn, *xs: Any) -> Any:
    with mode:
        return f(*xs)


GRAPHS: dict[str, Callable[[Fn, Any, Any], Any]] = {
    "eagerly": lambda f, x, y: f(x, y),
    "compiled": lambda f, x, y: compiled(f)(x, y) if f is ours else f(x, y),
    "hooks": lambda f, x, y: _under(torch.autograd.graph.save_on_cpu(), f, x, y),
    "vmap": lambda f, x, y: torch.func.vmap(f, (None, 0))(x, y[None])[0],
}


@pytest.mark.parametrize("run", GRAPHS.values(), ids=GRAPHS)
def test_a_batch_of_cotangents(run: Callable[[Fn, Any, Any], Any]) -> None:
    """Through a graph that was made in any way."""

    def jacobian(f: Fn) -> Any:
        x, y = point()
        return grad(run(f, x, y), (x, y), torch.eye(3, dtype=torch.float64), is_grads_batched=True)

    close(jacobian(ours), jacobian(in_torch))


def test_a_batch_of_cotangents_by_vmap_with_a_graph_of_its_own() -> None:
    """The gradient of a Jacobian, by the newer vmap around a backward."""

    def second(f: Fn) -> Any:
        x, y = point()
        out = f(x, y)
        pull = lambda v: grad(out, (x, y), v, retain_graph=True, create_graph=True)  # noqa: E731
        rows = torch.func.vmap(pull)(torch.eye(3, dtype=torch.float64))
        return [r.detach() for r in rows], grad(sum((r**2).sum() for r in rows), (x, y))

    close(second(ours), second(in_torch))


def test_a_batch_of_cotangents_with_a_graph_of_its_own() -> None:
    """The gradient of a Jacobian."""

    def second(f: Fn) -> Any:
        x, y = point()
        eye = torch.eye(3, dtype=torch.float64)
        rows = grad(f(x, y), (x, y), eye, is_grads_batched=True, create_graph=True)
        return [r.detach() for r in rows], grad(sum((r**2).sum() for r in rows), (x, y))

    close(second(ours), second(in_torch))


def test_a_batch_of_cotangents_of_a_gradient() -> None:
    """A Hessian, by rows at a time; and once more from its own graph."""

    def hessian(f: Fn) -> Any:
        x, y = point()
        (first,) = grad(f(x, y).sum(), x, create_graph=True)
        eye = torch.eye(3, dtype=torch.float64)
        (rows,) = grad(first, x, eye, is_grads_batched=True, create_graph=True)
        return rows.detach(), grad(rows.pow(2).sum(), (x, y))

    close(hessian(ours), hessian(in_torch))


@pytest.mark.parametrize("vectorize", [False, True])
def test_the_older_functional_interface(vectorize: bool) -> None:
    """`torch.autograd.functional`."""
    x, y = (t.detach() for t in point())
    of = torch.autograd.functional
    for reduce in (of.jacobian, lambda f, xs, **k: of.hessian(lambda *a: f(*a).sum(), xs, **k)):
        close(reduce(ours, (x, y), vectorize=vectorize), reduce(in_torch, (x, y), vectorize=vectorize))
    close(
        of.jacobian(ours, (x, y), vectorize=True, strategy="forward-mode"),
        of.jacobian(in_torch, (x, y), vectorize=True, strategy="forward-mode"),
    )


# --- the life of a graph ----------------------------------------------------------------------------------------------


def test_a_retained_graph_is_walked_again() -> None:
    x, y = point()
    out = ours(x, y).sum()
    first = grad(out, (x, y), retain_graph=True)
    close(grad(out, (x, y), retain_graph=True), first)
    close(grad(out, (x, y)), first)


def test_a_gradient_that_is_written_to_is_not_that_of_the_next_walk() -> None:
    """The gradients of a cheap loss are computed with it: each walk of a retained graph has its own."""
    x, y = point()
    loss = differentiable(as_torch(lambda x, y: (jnp.sin(x) * y).sum()))(x, y)
    expected = grad((torch.sin(x) * y).sum(), (x, y))
    for retain_graph in (True, True, False):
        found = grad(loss, (x, y), retain_graph=retain_graph)
        close(found, expected)
        for gradient in found:
            gradient.zero_()


NEEDS: dict[str, tuple[Fn, Fn]] = {
    "an input": (lambda x: x * x, lambda x: x * x),
    "an output": (jnp.exp, torch.exp),
    "a new value": (lambda x: jnp.sin(x), torch.sin),
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(("fn", "native"), NEEDS.values(), ids=NEEDS)
def test_a_graph_that_was_freed_is_refused_in_torchs_words(fn: Fn, native: Fn, create_graph: bool) -> None:
    def again(f: Fn) -> Any:
        x = leaf(1.0, 2.0)
        out = f(x).sum()
        grad(out, x)
        return error_of(lambda: grad(out, x, create_graph=create_graph))

    kind, text = again(levels(fn))
    expected, words = again(native)
    assert kind is expected
    start = "Trying to backward through the graph a second time"
    assert words.startswith(start)
    assert text.startswith(start)
    assert "retain_graph=True" in text


def test_a_graph_without_residuals_is_never_freed() -> None:
    """A linear function keeps nothing that could be."""

    def twice(f: Fn) -> list[float]:
        x = leaf(1.0, 2.0)
        out = f(x).sum()
        grad(out, x)
        return grad(out, x)[0].tolist()

    assert twice(lambda x: x + x) == [2, 2]
    assert twice(levels(lambda x: x + x)) == [2, 2]


# --- what takes part --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("create_graph", [False, True])
def test_only_what_requires_grad_has_one(create_graph: bool) -> None:
    def gradients(f: Fn) -> Any:
        x, y = point()
        x.requires_grad_(False)
        out = f(x, y).sum()
        refusal = error_of(lambda: grad(out, (x, y), retain_graph=True))
        return grad(out, y, create_graph=create_graph)[0].detach(), refusal

    got, expected = gradients(ours), gradients(in_torch)
    close(got[0], expected[0])
    assert got[1] == expected[1]


def test_some_leaves_of_a_pytree_require_grad() -> None:
    def fn(p: Any) -> Any:
        return (p["w"] @ p["x"] + p["b"]).sum() + p["s"] ** 2

    def gradients(f: Fn) -> Any:
        p = {"w": torch.ones(2, 3), "x": leaf(1.0, 2.0, 3.0), "b": torch.ones(2), "s": torch.tensor(2.0)}
        p["s"].requires_grad_()
        f(p).backward()
        return {k: v.grad for k, v in p.items()}

    got, expected = gradients(levels(fn)), gradients(fn)
    assert [k for k, g in got.items() if g is None] == ["w", "b"]
    close(got, expected)


@pytest.mark.parametrize("create_graph", [False, True])
def test_an_input_that_is_not_used_has_no_gradient(create_graph: bool) -> None:
    """None where torch is told to allow it, an error where it is not."""

    def gradients(f: Fn) -> Any:
        x, y = leaf(1.0, 2.0), leaf(3.0)
        out = f(x, y).sum()
        refusal = error_of(lambda: grad(out, (x, y), create_graph=create_graph, retain_graph=True))
        found = grad(out, (x, y), create_graph=create_graph, allow_unused=True)
        return [None if g is None else g.detach() for g in found], refusal

    got, expected = gradients(levels(lambda x, y: x**2)), gradients(lambda x, y: x**2)
    assert expected[0][1] is None
    assert got[0][1] is None
    close(got[0][0], expected[0][0])
    assert got[1] == expected[1]


def test_an_input_that_no_asked_output_uses_has_no_gradient() -> None:
    def gradients(f: Fn) -> Any:
        x, y = leaf(1.0, 2.0), leaf(3.0)
        one, other = f(x, y)
        return grad(one.sum(), (x, y), allow_unused=True, retain_graph=True)

    assert gradients(lambda x, y: (x * 2, y * 3))[1] is None
    assert gradients(levels(lambda x, y: (x * 2, y * 3)))[1] is None


OUTPUTS: dict[str, tuple[Fn, Fn]] = {
    "a constant": (lambda x, y: (x * y, jnp.ones(2)), lambda x, y: (x * y, torch.ones(2))),
    "stopped": (lambda x, y: (x * y, jax.lax.stop_gradient(x)), lambda x, y: (x * y, x.detach())),
    "of an input that asks for none": (lambda x, y: (x * y, y * 2), lambda x, y: (x * y, y * 2)),
}


@pytest.mark.parametrize(("fn", "native"), OUTPUTS.values(), ids=OUTPUTS)
def test_an_output_without_a_derivative_requires_no_grad(fn: Fn, native: Fn) -> None:
    x, y = leaf(1.0, 2.0), torch.tensor([3.0, 4.0])
    assert [out.requires_grad for out in native(x, y)] == [True, False]
    assert [out.requires_grad for out in levels(fn)(x, y)] == [True, False]


def branches(sin: Fn, cos: Fn) -> Fn:
    """Several outputs in a pytree, one of them of integers."""

    def fn(x: Any, y: Any) -> Any:
        return {"a": sin(x) * y, "b": (cos(x), (x**2).sum() * y, [x > 0])}

    return fn


REACHED: dict[str, Fn] = {
    "the first": lambda out: out["a"].sum(),
    "the last": lambda out: out["b"][1].pow(2).sum(),
    "one of two": lambda out: (out["a"] * out["b"][0]).sum(),
    "masked": lambda out: (out["b"][0] * out["b"][2][0]).sum(),
    "every one": lambda out: (out["a"] * out["b"][0] + out["b"][1]).pow(2).sum(),
}


@pytest.mark.parametrize("loss", REACHED.values(), ids=REACHED)
def test_some_outputs_reach_the_loss(loss: Fn) -> None:
    """At first order and at second."""

    def gradients(f: Fn) -> Any:
        x, y = point()
        first = grad(loss(f(x, y)), (x, y), create_graph=True, materialize_grads=True)
        second = grad(sum((g**2).sum() for g in first), (x, y), materialize_grads=True)
        return [g.detach() for g in first], second

    close(gradients(levels(branches(jnp.sin, jnp.cos))), gradients(branches(torch.sin, torch.cos)))


def test_outputs_are_walked_one_after_the_other() -> None:
    def gradients(f: Fn) -> Any:
        x, y = point()
        out = f(x, y)
        out["a"].sum().backward(retain_graph=True)
        out["b"][1].sum().backward()
        return x.grad, y.grad

    close(gradients(levels(branches(jnp.sin, jnp.cos))), gradients(branches(torch.sin, torch.cos)))


def test_one_tensor_given_twice() -> None:
    def gradients(f: Fn) -> Any:
        x, _ = point()
        (first,) = grad(f(x, x).sum(), x, create_graph=True)
        return first.detach(), grad(first.sum(), x)[0]

    close(gradients(ours), gradients(in_torch))


LOSSES: dict[str, tuple[Fn, Fn]] = {
    "smooth": (lambda x, y: (jnp.sin(x) * y).sum(), lambda x, y: (torch.sin(x) * y).sum()),
    "one input unused": (lambda x, y: (x**3).sum(), lambda x, y: (x**3).sum()),
    "beside a mask": (lambda x, y: ((x * x * y).sum(), x > y), lambda x, y: ((x * x * y).sum(), x > y)),
    "in 16 bits inside": (
        lambda x, y: ((x.astype(jnp.bfloat16) * 2).astype(x.dtype) * x * y).sum(),
        lambda x, y: ((x.bfloat16() * 2).to(x.dtype) * x * y).sum(),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("fn", "native"), LOSSES.values(), ids=LOSSES)
def test_a_small_function_of_one_number(fn: Fn, native: Fn, dtype: torch.dtype) -> None:
    """Whose gradient comes with the value: for any cotangent, some inputs or all, and one order more."""

    def asked(f: Fn) -> list[Any]:
        x, y = point(dtype)
        loss = lambda x, y: out[0] if isinstance(out := f(x, y), tuple) else out  # noqa: E731
        first = grad(loss(x, y), x, create_graph=True)[0]
        return [
            grad(loss(x, y), (x, y), allow_unused=True),
            grad(loss(x, y) * -2.5, x),
            grad(loss(x, y), y, allow_unused=True),
            grad(loss(x, y), x, torch.tensor([1.0, 0.0, 3.0], dtype=dtype), is_grads_batched=True),
            first.detach(),
            grad(first.sum(), x) if first.requires_grad else None,
        ]

    close(asked(levels(fn)), asked(native))


def test_a_rule_that_is_not_linear_sees_the_cotangent() -> None:
    """A gradient that is clipped is no multiple of another."""

    @jax.custom_vjp
    def clipped(x: Any) -> Any:
        return x

    clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1, 1),))
    x = leaf(1.0, 2.0)
    assert grad(levels(lambda x: clipped(x).sum())(x), x, torch.tensor(5.0))[0].tolist() == [1, 1]


# --- writes between forward and backward ------------------------------------------------------------------------------


def changed(t: torch.Tensor) -> None:
    """Write into it, behind the back of autograd."""
    with torch.no_grad():
        t.add_(100)


MODIFIED = "has been modified by an inplace operation"


def test_a_write_to_an_input_that_is_needed_raises_as_torch_does() -> None:
    for f in (levels(lambda x: x * x), lambda x: x * x):
        x = leaf(1.0, 2.0)
        out = f(x).sum()
        changed(x)
        with pytest.raises(RuntimeError, match=MODIFIED):
            out.backward()


def test_a_write_to_an_output_that_is_needed_raises_as_torch_does() -> None:
    for f in (levels(jnp.exp), torch.exp):
        x = leaf(1.0, 2.0)
        out = f(x)
        total = out.sum()
        changed(out)
        with pytest.raises(RuntimeError, match=MODIFIED):
            total.backward()


@pytest.mark.parametrize("write", ["input", "output"])
def test_a_write_to_what_is_not_needed_changes_nothing(write: str) -> None:
    x = leaf(1.0, 2.0)
    out = levels(lambda x: x * 3)(x)
    total = out.sum()
    changed(x if write == "input" else out)
    total.backward()
    assert x.grad.tolist() == [3, 3]


FEW, MANY = 4, 1 << 16  # elements: what is recomputed from the input, and what is kept


@pytest.mark.parametrize("size", [FEW, MANY])
@pytest.mark.parametrize("write", ["input", "output"])
@pytest.mark.parametrize("fn", [jnp.sin, jnp.exp, jax.nn.softplus, lambda x: jnp.sin(x) * jnp.cos(x)])
def test_a_write_never_changes_a_gradient(fn: Fn, write: str, size: int) -> None:
    """Whatever is kept for the backward, it is guarded."""
    x = torch.linspace(-1, 1, size).requires_grad_()
    expected = grad(levels(fn)(x).sum(), x)[0]
    out = levels(fn)(x)
    total = out.sum()
    changed(x if write == "input" else out)
    try:
        total.backward()
    except RuntimeError as error:
        assert MODIFIED in str(error)
    else:
        close(x.grad, expected)


def test_a_write_to_one_of_two_inputs() -> None:
    """The one that only the other's gradient needs."""
    for f in (levels(lambda x, y: x * y), lambda x, y: x * y):
        x, y = leaf(1.0, 2.0), torch.tensor([3.0, 4.0])
        out = f(x, y).sum()
        changed(x)
        assert grad(out, x)[0].tolist() == [3, 4]
        out = f(x, y).sum()
        changed(y)
        with pytest.raises(RuntimeError, match=MODIFIED):
            grad(out, x)


def test_a_write_to_an_input_that_a_second_derivative_needs_raises() -> None:
    """A graph is derived from the inputs as they were."""
    x = leaf(1.0, 2.0)
    out = levels(jnp.sin)(x).sum()
    changed(x)
    with pytest.raises(RuntimeError, match=MODIFIED):
        grad(out, x, create_graph=True)


def test_an_output_that_autograd_itself_writes_to() -> None:
    """The write is part of the graph."""

    def gradients(f: Fn) -> Any:
        x, y = point()
        out = f(x, y)
        out["a"].mul_(y)
        out["b"][0][1:] = 5 * x[:2]
        return grad((out["a"] * out["b"][0]).sum(), (x, y))

    def split(x: Any, y: Any) -> Any:
        return {"a": x + y, "b": (x * 2,)}

    close(gradients(levels(split)), gradients(split))


def test_an_input_that_autograd_itself_has_written_to() -> None:
    def gradients(f: Fn) -> Any:
        x, y = point()
        z = x * 1
        z.mul_(y)
        out = f(z, y)
        z.add_(1)
        return grad(out.sum() + z.sum(), (x, y))

    close(gradients(levels(lambda x, y: x + y * 2)), gradients(lambda x, y: x + y * 2))


# --- hooks ------------------------------------------------------------------------------------------------------------


def test_hooks_on_tensors_see_and_change_gradients() -> None:
    def gradients(f: Fn) -> Any:
        x, y = point()
        seen = []
        out = f(x, y)
        out.retain_grad()
        out.register_hook(lambda g: g * 2)
        x.register_hook(lambda g: seen.append(g.clone()))
        y.register_hook(lambda g: g.neg())
        out.sum().backward()
        return seen, x.grad, y.grad, out.grad

    close(gradients(ours), gradients(in_torch))


def test_hooks_after_a_gradient_was_accumulated() -> None:
    """What an optimiser inside the backward uses: the gradient is freed as soon as it is there."""

    def steps(f: Fn) -> Any:
        x, y = point()

        def step(p: torch.Tensor) -> None:
            with torch.no_grad():
                p.sub_(p.grad, alpha=0.1)
            p.grad = None

        for p in (x, y):
            p.register_post_accumulate_grad_hook(step)
        for _ in range(3):
            f(x, y).sum().backward()
        return x.detach(), y.detach()

    close(steps(ours), steps(in_torch))


def test_hooks_on_the_node() -> None:
    x, y = point()
    expected = grad(in_torch(x, y).sum(), (x, y))
    out, seen = ours(x, y), []
    out.grad_fn.register_prehook(lambda gs: tuple(g * 2 for g in gs))
    out.grad_fn.register_hook(lambda gin, gout: seen.append((len([g for g in gin if g is not None]), len(gout))))
    got = grad(out.sum(), (x, y))
    close(got, tuple(2 * g for g in expected))
    assert seen == [(2, 1)]


# --- saved tensors ----------------------------------------------------------------------------------------------------


def gradients_of(f: Fn, *, order: int = 1) -> Any:
    """Both gradients, or gradients of gradients."""
    x, y = point()
    found = grad(f(x, y).sum(), (x, y), create_graph=order > 1)
    return found if order == 1 else grad(sum((g**2).sum() for g in found), (x, y))


@pytest.mark.parametrize("order", [1, 2])
def test_what_is_saved_is_shown_to_hooks(order: int) -> None:
    """They may keep it elsewhere, as another object: every residual goes through them, and is asked for once."""
    packed: list[Any] = []
    unpacked: list[int] = []

    def pack(t: torch.Tensor) -> int:
        assert isinstance(t, torch.Tensor)
        packed.append(t.detach().numpy().copy())
        return len(packed) - 1

    def unpack(i: int) -> torch.Tensor:
        unpacked.append(i)
        return torch.tensor(packed[i])

    with saved_tensors_hooks(pack, unpack):
        x, y = point()
        out = ours(x, y)
        count = len(packed)
        assert count
        got = grad(out, (x, y), torch.ones_like(out))
        assert unpacked == list(range(count))
        got = gradients_of(ours, order=order) if order == 2 else got
    close(got, gradients_of(in_torch, order=order))


def test_a_hook_that_returns_another_value_is_believed() -> None:
    """A residual kept in half precision comes back as it was kept."""
    with saved_tensors_hooks(lambda t: t.half(), lambda t: t.float()):
        x = leaf(1 / 3)
        out = levels(lambda x: x * x)(x)
    assert grad(out, x)[0].item() == 2 * torch.tensor(1 / 3).half().float().item()


@pytest.mark.parametrize("order", [1, 2])
def test_saved_on_the_cpu(order: int) -> None:
    with torch.autograd.graph.save_on_cpu():
        got = gradients_of(ours, order=order)
    close(got, gradients_of(in_torch, order=order))


def test_hooks_that_are_forbidden() -> None:
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        close(gradients_of(ours), gradients_of(in_torch))


def test_writes_that_are_allowed_on_what_is_saved() -> None:
    def gradient(f: Fn) -> Any:
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            x = leaf(1.0, 2.0)
            z = x.clone()
            out = f(z)
            changed(z)
            return grad(out.sum(), x)[0].tolist()

    assert gradient(lambda x: x * x) == [2, 4]
    assert gradient(levels(lambda x: x * x)) == [2, 4]


# --- checkpoints ------------------------------------------------------------------------------------------------------

CHECKPOINTS: dict[str, Fn] = {
    "reentrant": functools.partial(checkpoints.checkpoint, use_reentrant=True),
    "not reentrant": functools.partial(checkpoints.checkpoint, use_reentrant=False),
    "random state dropped": functools.partial(
        checkpoints.checkpoint, use_reentrant=False, preserve_rng_state=False, determinism_check="default"
    ),
    "reentrant, random state dropped": functools.partial(
        checkpoints.checkpoint, use_reentrant=True, preserve_rng_state=False
    ),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_between_operations_of_torch(checkpoint: Fn, nested: bool) -> None:
    def network(f: Fn) -> Fn:
        return lambda x, y: torch.tanh(f(x * 2, y)) * x

    x, y = point()
    inner = functools.partial(checkpoint, ours) if nested else ours
    checkpoint(network(inner), x, y).sum().backward()
    close((x.grad, y.grad), gradients_of(network(in_torch)))


def test_a_checkpoint_is_run_again_with_the_same_random_numbers() -> None:
    """Those of torch around the function; the second time gives the same gradient."""

    def gradient(f: Fn, checkpoint: Fn) -> Any:
        torch.manual_seed(1)
        x, y = point()
        dropped = lambda x, y: f(torch.nn.functional.dropout(x, 0.5), y) * torch.rand(3)  # noqa: E731
        checkpoint(dropped, x, y).sum().backward()
        return x.grad, y.grad

    expected = gradient(in_torch, lambda f, *xs: f(*xs))
    for name in ("reentrant", "not reentrant"):
        close(gradient(ours, CHECKPOINTS[name]), expected)


def test_a_checkpoint_of_second_order() -> None:
    checkpoint = CHECKPOINTS["not reentrant"]
    close(gradients_of(lambda x, y: checkpoint(ours, x, y), order=2), gradients_of(in_torch, order=2))


def test_a_sequence_of_checkpoints() -> None:
    def gradient(f: Fn, run: Fn) -> Any:
        x, y = point()
        return grad(run([functools.partial(f, y)] * 3, x).sum(), (x, y))

    def plain(fns: list[Fn], x: Any) -> Any:
        return functools.reduce(lambda value, f: f(value), fns, x)

    run = lambda fns, x: checkpoints.checkpoint_sequential(fns, 3, x, use_reentrant=False)  # noqa: E731
    close(gradient(ours, run), gradient(in_torch, plain))


def test_a_selective_checkpoint() -> None:
    """A policy that keeps what the JAX function returned, or nothing."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    op = torch.ops.interop.jax_call.default
    for choice in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE):

        def policy(_context: Any, op_: Any, *_: Any, choice: Any = choice, **__: Any) -> Any:
            return choice if op_ is op else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        checkpoint = functools.partial(checkpoints.checkpoint, use_reentrant=False, context_fn=contexts)
        got = gradients_of(lambda x, y: torch.tanh(checkpoint(ours, x * 2, y)))  # noqa: B023
        close(got, gradients_of(lambda x, y: torch.tanh(in_torch(x * 2, y))))


# --- anomaly mode and the checks of torch -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled", "ignore:Error detected in")
def test_anomaly_mode() -> None:
    """Changes no gradient, and names the function whose gradient is not a number."""
    with torch.autograd.detect_anomaly():
        close(gradients_of(ours), gradients_of(in_torch))
        close(gradients_of(ours, order=2), gradients_of(in_torch, order=2))
        for f in (levels(jnp.sqrt), torch.sqrt):
            x = leaf(0.0)
            with pytest.raises(RuntimeError, match=r"returned nan values in its \d+th output"):
                (f(x) * 0).sum().backward()


CHECKED: dict[str, tuple[Fn, list[torch.Tensor]]] = {
    "real": (in_jax, list(point())),
    "several outputs": (lambda x, y: (x * y, jnp.tanh(x).sum(), y**3), list(point())),
    "linear": (lambda x, y: x @ y, [torch.ones(2, 2, dtype=torch.float64, requires_grad=True), leaf(1, 2, dtype=torch.float64)]),
    "complex": (lambda z, w: z * jnp.conj(w) + jnp.sin(z) * w, [leaf(1 + 2j, 0.3j, dtype=torch.complex128), leaf(0.5 - 1j, 2, dtype=torch.complex128)]),
    "complex to real": (lambda z: jnp.abs(z) ** 3 + z.imag, [leaf(1 + 2j, 0.3j, dtype=torch.complex128)]),
    "real to complex": (lambda x, z: jnp.exp(1j * x) * z, [leaf(0.4, 1.2, dtype=torch.float64), leaf(1j, 1 + 1j, dtype=torch.complex128)]),
}  # fmt: skip


@pytest.mark.parametrize(("fn", "inputs"), CHECKED.values(), ids=CHECKED)
def test_torchs_own_check_of_a_gradient(fn: Fn, inputs: list[torch.Tensor]) -> None:
    """Against differences: backward, forward mode, and batches of both."""
    assert torch.autograd.gradcheck(
        levels(fn), inputs, check_batched_grad=True, check_forward_ad=True, check_batched_forward_grad=True
    )


TWICE = ["real", "complex"]


@pytest.mark.parametrize(("fn", "inputs"), [CHECKED[name] for name in TWICE], ids=TWICE)
def test_torchs_own_check_of_a_second_gradient(fn: Fn, inputs: list[torch.Tensor]) -> None:
    """Backward of backward, and forward mode of backward."""
    assert torch.autograd.gradgradcheck(
        levels(fn), inputs, check_batched_grad=True, check_fwd_over_rev=True, check_rev_over_rev=True
    )


def test_torchs_fast_checks() -> None:
    inputs = list(point())
    assert torch.autograd.gradcheck(ours, inputs, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ours, inputs, fast_mode=True)


# --- torch.func -------------------------------------------------------------------------------------------------------


def weights(x: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape in which no symmetry cancels."""
    return torch.cos(torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape) + 1)


def bumps(sin: Fn) -> Fn:
    """A function of a tensor of any shape, of the same shape, with every mixed derivative."""
    return lambda x: sin(x) * (x**2).sum()


COMPOSED: dict[str, Callable[[Fn], Fn]] = {
    "grad": lambda f: torch.func.grad(lambda x: (f(x) * weights(f(x))).sum()),
    "vjp": lambda f: lambda x: (lambda out, pull: pull(weights(out))[0])(*torch.func.vjp(f, x)),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (weights(x),))[1],
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": torch.func.hessian,
    "vmap": torch.func.vmap,
}


@pytest.mark.parametrize("inner", COMPOSED)
@pytest.mark.parametrize("outer", COMPOSED)
def test_every_transform_of_every_transform(outer: str, inner: str) -> None:
    x = torch.tensor([[0.3, -0.7], [1.1, 0.4]], dtype=torch.float64)
    close(COMPOSED[outer](COMPOSED[inner](bump))(x), COMPOSED[outer](COMPOSED[inner](bumps(torch.sin)))(x))


bump = levels(bumps(jnp.sin))


@pytest.mark.parametrize("inner", COMPOSED)
def test_every_transform_below_the_tape(inner: str) -> None:
    """What a transform returns is differentiated by `backward`."""

    def gradient(f: Fn) -> Any:
        x = torch.tensor([[0.3, -0.7], [1.1, 0.4]], dtype=torch.float64, requires_grad=True)
        out = COMPOSED[inner](f)(x)
        return grad(out, x, weights(out))

    close(gradient(bump), gradient(bumps(torch.sin)))


@pytest.mark.parametrize("inner", ["vjp", "jvp", "jacfwd"])
def test_a_transform_compiled(inner: str) -> None:
    x = torch.tensor([[0.3, -0.7], [1.1, 0.4]], dtype=torch.float64)
    close(compiled(COMPOSED[inner](bump))(x), COMPOSED[inner](bumps(torch.sin))(x))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
def test_linearize() -> None:
    x, y = (t.detach() for t in point())
    tangents = (weights(x), weights(y).flip(0))
    (out, push), (expected, native) = torch.func.linearize(ours, x, y), torch.func.linearize(in_torch, x, y)
    close(out, expected)
    close(push(*tangents), native(*tangents))
    close(push(*(2 * t for t in tangents)), 2 * native(*tangents))


def test_a_transform_with_an_auxiliary_result() -> None:
    def pieces(f: Fn) -> Any:
        x, y = (t.detach() for t in point())
        both = lambda x, y: (f(x, y).sum(), f(x, y) * 2)  # noqa: E731
        value = torch.func.grad_and_value(both, argnums=(0, 1), has_aux=True)(x, y)
        jacobian = torch.func.jacrev(both, has_aux=True, chunk_size=2)(x, y)
        _, tangent, aux = torch.func.jvp(both, (x, y), (weights(x), weights(y)), has_aux=True)
        return value, jacobian, tangent, aux, torch.func.jacfwd(f, randomness="same")(x, y)

    close(pieces(ours), pieces(in_torch))


def dense(p: Any, x: Any) -> Any:
    """A layer of a pytree of parameters."""
    return {"y": x @ p["w"] + p["b"], "norm": (x * x).sum()}


layer = levels(dense)


@pytest.mark.parametrize(
    "axes",
    [
        {"in_dims": (None, 0)},
        {"in_dims": ({"w": -1, "b": None}, None)},
        {"in_dims": ({"w": 1, "b": 0}, -1)},
        {"in_dims": (0, -2), "out_dims": {"y": -1, "norm": 0}},
        {"in_dims": (None, 1), "out_dims": {"y": 1, "norm": -1}},
    ],
    ids=str,
)
def test_any_axes_of_a_batch(axes: dict[str, Any]) -> None:
    shared, x_axis = axes["in_dims"]
    sizes = {"w": (2, 4), "b": (4,)}
    spec = shared if isinstance(shared, dict) else dict.fromkeys(sizes, shared)
    p = {name: _batched(size, spec[name]) for name, size in sizes.items()}
    x = _batched((2,), x_axis)
    close(torch.func.vmap(layer, **axes)(p, x), torch.func.vmap(dense, **axes)(p, x))


def _batched(shape: tuple[int, ...], axis: int | None) -> torch.Tensor:
    full = list(shape)
    if axis is not None:
        full.insert(axis if axis >= 0 else axis + len(full) + 1, 3)
    return torch.randn(full)


def test_batches_of_batches() -> None:
    def scaled(a: Any, b: Any) -> Any:
        return (a * b.sum()) ** 2

    vmap, f = torch.func.vmap, levels(scaled)
    x, y, z = torch.randn(2, 3, 4), torch.randn(4, 3), torch.randn(5, 2)

    def nested(g: Fn) -> list[Any]:
        return [
            vmap(vmap(g, in_dims=(0, None)), in_dims=(1, -1))(x, y),
            vmap(vmap(vmap(g), in_dims=(-1, 0)), in_dims=(0, None), out_dims=-1)(x, y),
            vmap(vmap(g, in_dims=(None, 0), out_dims=-1), in_dims=(2, None), out_dims=1, chunk_size=3)(x, z),
            vmap(lambda a, b: g(a, b).sum() * vmap(g, in_dims=(-1, None))(a, b), in_dims=(1, 1))(x, y),
        ]

    close(nested(f), nested(scaled))


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_a_batch_in_chunks(chunk_size: int | None, randomness: str) -> None:
    """What torch says of its own random numbers does not concern JAX."""
    p, x = {"w": torch.randn(2, 4), "b": torch.randn(4)}, torch.randn(5, 2)
    options = {"in_dims": (None, 0), "chunk_size": chunk_size, "randomness": randomness}
    close(torch.func.vmap(layer, **options)(p, x), torch.func.vmap(dense, **options)(p, x))


def test_a_batch_is_one_call() -> None:
    """Of the function in JAX, which sees one example while it is traced and all of them when it runs."""
    seen: list[tuple[int, ...]] = []
    traced: list[tuple[int, ...]] = []

    def double(x: np.ndarray) -> np.ndarray:
        seen.append(x.shape)
        return x * 2

    def f(x: Any) -> Any:
        traced.append(x.shape)
        return jax.pure_callback(double, jax.ShapeDtypeStruct((), x.dtype), x.sum(), vmap_method="expand_dims")

    g = torch.func.vmap(levels(f))
    assert g(torch.ones(7, 3)).tolist() == [6] * 7
    assert seen == [(7,)]
    assert set(traced) == {(3,)}
    count = len(traced)
    assert g(torch.ones(7, 3)).tolist() == [6] * 7
    assert len(traced) == count < 7
    assert seen == [(7,)] * 2


def test_an_ensemble_of_per_sample_gradients() -> None:
    """Models by rows, samples by columns."""

    def gradients(f: Fn) -> Any:
        torch.manual_seed(3)
        p, x = {"w": torch.randn(3, 2, 4), "b": torch.randn(3, 4)}, torch.randn(5, 2)
        loss = lambda p, x: (f(p, x)["y"] ** 2).sum()  # noqa: E731
        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))
        return torch.func.vmap(per_sample, (0, None))(p, x)

    close(gradients(layer), gradients(dense))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's, of its own views
@pytest.mark.parametrize("remove", ["mutations", "mutations_and_views"])
def test_functionalized(remove: str) -> None:
    """Where a transform has turned writes into values, and where another transform is above or below."""
    functionalize = functools.partial(torch.func.functionalize, remove=remove)

    def writes(f: Fn) -> Fn:
        def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            z = x.clone()
            z[:2].mul_(2)
            out = f(z, y)
            out.add_(z)
            return out[1:]

        return fn

    def asked(f: Fn) -> list[Any]:
        x, y = (t.detach() for t in point())
        g = functionalize(writes(f))
        return [
            functionalize(f)(x, y),
            g(x, y),
            torch.func.grad(lambda x: g(x, y).sum())(x),
            functionalize(torch.func.grad(lambda x: writes(f)(x, y).sum()))(x),
            torch.func.vmap(g)(torch.stack([x, y]), torch.stack([y, x])),
            gradients_of(g),
        ]

    close(asked(ours), asked(in_torch))


# --- dual numbers -----------------------------------------------------------------------------------------------------


def tangent_of(f: Fn, x: torch.Tensor, dx: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The tangent of a result along one of two inputs."""
    with fwad.dual_level():
        out = f(fwad.make_dual(x, dx), y)
        return fwad.unpack_dual(out).tangent


def test_a_tangent_has_a_gradient() -> None:
    """Backward through forward mode, in the primals and in the tangent."""

    def gradients(f: Fn) -> Any:
        x, y = point()
        dx = weights(x).requires_grad_()
        first = grad(tangent_of(f, x, dx, y).sum(), (x, y, dx), create_graph=True)
        return [g.detach() for g in first], grad(sum((g**2).sum() for g in first), (x, y, dx))

    close(gradients(ours), gradients(in_torch))


def test_a_gradient_inside_a_dual_level_has_a_tangent() -> None:
    """Forward mode through backward: a product with a Hessian."""

    def product(f: Fn) -> Any:
        x, y = point()
        with fwad.dual_level():
            dual = fwad.make_dual(x, weights(x))
            found = grad(f(dual, y).sum(), (x, y), create_graph=True)
            return [fwad.unpack_dual(g).tangent.detach() for g in found]

    close(product(ours), product(in_torch))


def test_what_has_no_tangent() -> None:
    """Neither a result of plain inputs, nor a mask."""
    x, y = (t.detach() for t in point())
    f = levels(lambda x, y: (x * y, x > y))
    with fwad.dual_level():
        assert fwad.unpack_dual(f(x, y)[0]).tangent is None
        product, mask = f(x, fwad.make_dual(y, weights(y)))
        close(fwad.unpack_dual(product).tangent, x * weights(y))
        assert mask.tolist() == (x > y).tolist()
        with fwad._set_fwd_grad_enabled(False):
            assert fwad.unpack_dual(f(fwad.make_dual(x, y), y)[0]).tangent is None


# --- grad mode and inference mode -------------------------------------------------------------------------------------


def test_grad_modes_nest() -> None:
    x, y = point()
    with torch.no_grad():
        assert not ours(x, y).requires_grad
        with torch.enable_grad():
            out = ours(x, y)
    assert out.requires_grad
    close(grad(out.sum(), (x, y)), gradients_of(in_torch))
    with torch.set_grad_enabled(False):
        assert ours(x, y).grad_fn is None
    assert not torch.no_grad()(ours)(x, y).requires_grad


def test_a_backward_works_whatever_the_grad_mode() -> None:
    """The mode of a backward is its own."""
    x, y = point()
    out = ours(x, y).sum()
    expected = gradients_of(in_torch)
    with torch.no_grad():
        close(grad(out, (x, y)), expected)


INFERENCE: dict[str, Callable[[Fn], Any]] = {
    "backward of a result": lambda f: _inferred(f).sum().backward(),
    "a result under autograd": lambda f: (_inferred(f) * leaf(1.0, 2.0)).sum(),
    "a result written to": lambda f: _inferred(f).add_(1),
    "an input that a gradient needs": lambda f: f(_made_in_inference(), leaf(1.0, 2.0)),
    "an input told to require grad": lambda f: f(_made_in_inference().requires_grad_(), leaf(1.0, 2.0)),
}


def _made_in_inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.tensor([1.0, 2.0])


def _inferred(f: Fn) -> torch.Tensor:
    with torch.inference_mode():
        return f(leaf(1.0, 2.0), torch.tensor([3.0, 4.0]))


@pytest.mark.parametrize("ask", INFERENCE.values(), ids=INFERENCE)
def test_what_inference_mode_forbids_is_refused_in_torchs_words(ask: Callable[[Fn], Any]) -> None:
    product = lambda x, y: x * y  # noqa: E731
    assert error_of(lambda: ask(levels(product))) == error_of(lambda: ask(product))


def test_inference_mode() -> None:
    """Inputs from inside and outside, and the numbers that come out."""
    product = levels(lambda x, y: x * y)
    inside, outside = _made_in_inference(), leaf(3.0, 4.0)
    with torch.inference_mode():
        for x, y in itertools.product((inside, outside), repeat=2):
            out = product(x, y)
            assert out.is_inference()
            assert not out.requires_grad
            assert out.tolist() == (x * y).tolist()
        with torch.inference_mode(mode=False):
            assert grad(product(outside, outside).sum(), outside)[0].tolist() == [6, 8]
        assert torch.func.grad(lambda x: product(x, x).sum())(inside).tolist() == [2, 4]
        assert torch.func.vmap(product)(inside, inside).tolist() == [1, 4]
    out = product(inside, outside.detach())
    assert not out.is_inference()
    assert out.tolist() == [3, 8]


# --- other modes ------------------------------------------------------------------------------------------------------


def test_autocast_does_not_reach_into_jax() -> None:
    """A result has the dtype that JAX gives it from the inputs as they are, and a gradient that of its input."""
    f = levels(lambda a, b: a @ b)
    a, b = torch.randn(2, 3, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ b).dtype is torch.bfloat16
        out = f(a, b)
        assert out.dtype is torch.float32
        assert f(a.detach().bfloat16(), b.detach().bfloat16()).dtype is torch.bfloat16
        assert torch.func.vmap(f)(a.detach()[None], b.detach()[None]).dtype is torch.float32
        after = f(a @ b, a.bfloat16())
        assert after.dtype is torch.bfloat16
        assert [g.dtype for g in grad(after.sum(), (a, b))] == [torch.float32] * 2
        assert compiled(f)(a.detach(), b.detach()).dtype is torch.float32
        close(grad(out.sum(), a)[0], b.detach().sum(1).expand(2, 3))
    close(out, a @ b)


@contextlib.contextmanager
def _set(switch: Callable[[Any], None], value: Any, before: Any) -> Iterator[None]:
    switch(value)
    try:
        yield
    finally:
        switch(before)


class _Passed(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


MODES: dict[str, Callable[[], Any]] = {
    "default device cpu": lambda: _set(torch.set_default_device, "cpu", None),
    "default device meta": lambda: _set(torch.set_default_device, "meta", None),
    "device context meta": lambda: DeviceContext(torch.device("meta")),
    "default dtype float64": lambda: _set(torch.set_default_dtype, torch.float64, torch.float32),
    "deterministic debug mode": lambda: _set(torch.set_deterministic_debug_mode, "error", "default"),
    # New memory is then filled with what is not a number.
    "deterministic algorithms": lambda: _set(torch.use_deterministic_algorithms, True, False),
    "a fork of the random state": torch.random.fork_rng,
    "a mode of functions": _Passed,
    "a mode of operations": _Dispatched,
    "denormals flushed": lambda: _set(torch.set_flush_denormal, True, False),
}

ASKED: dict[str, Callable[[Fn, torch.Tensor], Any]] = {
    "call": lambda f, x: f(x, 2.0),
    "call with numpy": lambda f, x: f(x, np.float32(2)),
    "backward": lambda f, x: grad(f(x, 2.0), x)[0],
    "second backward": lambda f, x: grad(grad(f(x, 2.0), x, create_graph=True)[0].sum(), x)[0],
    "backward with hooks": lambda f, x: grad(_under(torch.autograd.graph.save_on_cpu(), f, x, 2.0), x)[0],
    "func.grad": lambda f, x: torch.func.grad(f)(x.detach(), 2.0),
    "vmap": lambda f, x: torch.func.vmap(f, (0, None))(x.detach()[None], 2.0),
    "jvp": lambda f, x: torch.func.jvp(lambda x: f(x, 2.0), (x.detach(),), (torch.ones_like(x),)),
    "compiled": lambda f, x: compiled(f)(x, 2.0).detach(),
}


def modes() -> Iterator[Any]:
    """What is asked in which mode; compiling, which is slow, in few."""
    for mode, asked in itertools.product(MODES, ASKED):
        if asked == "compiled" and mode not in {"device context meta", "default dtype float64"}:
            continue
        yield pytest.param(MODES[mode], ASKED[asked], id=f"{mode}-{asked}")


def cubes(x: Any, k: Any) -> Any:
    """With a Python number beside a tensor; exact, and the same in both frameworks."""
    return (x * x * x * k).sum()


@pytest.mark.parametrize(("mode", "asked"), list(modes()))
def test_a_mode_of_torch_changes_no_result(mode: Callable[[], Any], asked: Callable[..., Any]) -> None:
    """Neither its values, nor its dtype, nor its device."""
    x = leaf(1.0, 2.0, 3.0)
    expected = asked(cubes, x) if asked is not ASKED["compiled"] else cubes(x, 2.0).detach()
    with mode():
        if asked is not ASKED["compiled"]:
            close(asked(cubes, x), expected, rtol=0, atol=0)
        got = asked(levels(cubes), x)
    close(got, expected, rtol=0, atol=0)


BESIDE: dict[str, Callable[[Fn, torch.Tensor, torch.Tensor], Any]] = {
    "call": lambda f, x, y: f(x, y),
    "vmap": lambda f, x, y: torch.func.vmap(f)(x, y),
    "jvp": lambda f, x, y: torch.func.jvp(lambda x: f(x, y), (x,), (x,)),
    "func.grad": lambda f, x, y: torch.func.grad(lambda x: f(x, y).sum())(x),
    "a mode of operations": lambda f, x, y: _under(_Dispatched(), f, x, y),
}


@pytest.mark.parametrize("ask", BESIDE.values(), ids=BESIDE)
def test_a_tensor_without_values_beside_one_with_values_is_refused(ask: Callable[..., Any]) -> None:
    """Never numbers from nowhere."""
    product, x, y = lambda x, y: x * y, torch.ones(2, 3), torch.ones(2, 3, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        ask(product, x, y)
    with pytest.raises((RuntimeError, TypeError), match="meta"):
        ask(levels(product), x, y)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_function_without_arguments_under_a_default_device(device: str) -> None:
    with torch.device(device):
        out = as_torch(lambda n=2.0: jnp.ones(2) * n)()
    assert (out.device.type, out.tolist()) == ("cpu", [2, 2])


def test_the_generator_of_torch_is_left_alone() -> None:
    before = torch.get_rng_state()
    f = levels(lambda x, seed: x * jax.random.normal(jax.random.key(seed), x.shape))
    x = leaf(1.0, 2.0)
    grad(f(x, torch.tensor(3)).sum(), x)
    torch.func.vmap(f, (0, None))(x.detach()[None], torch.tensor(3))
    assert torch.equal(torch.get_rng_state(), before)


# --- JAX functions of every kind --------------------------------------------------------------------------------------


def power(x: Any, n: int, scale: Any = 1.0) -> Any:
    """Of a static exponent."""
    return scale * x ** int(n)


STATIC: dict[str, tuple[Fn, dict[str, Any]]] = {
    "jit": (differentiable(jittable(as_torch(jax.jit(power, static_argnames="n"), static_argnames="n"))), {"n": 3}),
    "partial of jit": (levels(functools.partial(jax.jit(power, static_argnums=1), scale=2.0)), {"n": 3}),
    "jit of partial": (levels(jax.jit(functools.partial(power, n=3), static_argnames="n")), {}),
    "partial": (levels(functools.partial(power, n=3)), {}),
    "closure": (levels(jax.jit(lambda x, scale=1.0: power(x, 3, scale), inline=True)), {}),
}


@pytest.mark.parametrize(("f", "statics"), STATIC.values(), ids=STATIC)
def test_a_jitted_function_of_a_static_number(f: Fn, statics: dict[str, Any]) -> None:
    """It becomes static by itself, or was declared."""
    x = leaf(2.0, 3.0)
    options = {} if "scale" in getattr(f.__wrapped__, "keywords", {}) else {"scale": 2.0}
    assert grad(f(x, **statics, **options).sum(), x)[0].tolist() == [24, 54]


def test_a_number_that_bounds_a_slice() -> None:
    f, x = levels(lambda x, n: x[:n] * 2), leaf(2.0, 3.0, 4.0)
    assert f(x, 2).tolist() == [4, 6]
    assert grad(f(x, 1).sum(), x)[0].tolist() == [2, 0, 0]


@jax.custom_vjp
def tenfold(x: Any) -> Any:
    """The sine, whose gradient is ten times what was given."""
    return jnp.sin(x)


tenfold.defvjp(lambda x: (jnp.sin(x), x), lambda _x, g: (10 * g,))


@jax.custom_jvp
def sevenfold(x: Any) -> Any:
    """The sine, whose tangent is seven times what was given."""
    return jnp.sin(x)


sevenfold.defjvps(lambda t, _out, _x: 7 * t)


@pytest.mark.parametrize(("fn", "slope"), [(tenfold, 10), (sevenfold, 7)], ids=["vjp", "jvp"])
def test_a_rule_of_the_users_is_the_gradient(fn: Fn, slope: int) -> None:
    f, x = levels(fn), leaf(0.5, 1.0)
    expected = [slope, slope]
    close(f(x).detach(), torch.sin(x.detach()))
    assert grad(f(x).sum(), x)[0].tolist() == expected
    assert grad(f(x).sum(), x, create_graph=True)[0].tolist() == expected
    assert torch.func.grad(lambda x: f(x).sum())(x.detach()).tolist() == expected
    assert torch.func.vmap(torch.func.grad(f))(x.detach()).tolist() == expected
    assert torch.func.jacrev(f)(x.detach()).tolist() == [[slope, 0], [0, slope]]
    assert grad(compiled(f)(x).sum(), x)[0].tolist() == expected


def test_a_rule_for_tangents_is_the_tangent() -> None:
    x = torch.tensor([0.5, 1.0])
    assert torch.func.jvp(levels(sevenfold), (x,), (torch.ones(2),))[1].tolist() == [7, 7]


def test_a_rule_without_tangents_is_refused_in_jaxs_words() -> None:
    x = torch.tensor([0.5, 1.0])
    f = levels(tenfold)
    native = error_of(lambda: jax.jvp(tenfold, (jnp.ones(2),), (jnp.ones(2),)))
    kind, text = error_of(lambda: torch.func.jvp(f, (x,), (x,)))
    assert kind is native[0] is TypeError
    assert text.splitlines()[0] == native[1].splitlines()[0]
    close(f(x), torch.sin(x))


def test_a_rule_with_arguments_that_have_no_derivative() -> None:
    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def scaled(x: Any, k: Any) -> Any:
        return x * k

    scaled.defvjp(lambda x, k: (x * k, x.shape), lambda k, shape, g: (g * 100 * k,))
    x = leaf(1.0, 2.0)
    assert grad(levels(lambda x: scaled(x, 3))(x).sum(), x)[0].tolist() == [300, 300]


def test_a_loop_of_unknown_length() -> None:
    """Forward, in forward mode and in batches; backward is JAX's own refusal."""

    def doubled(x: Any) -> Any:
        return jax.lax.while_loop(lambda v: (v < 100).all(), lambda v: v * 2, x)

    f = levels(doubled)
    x = torch.tensor([3.0, 5.0])
    assert f(x).tolist() == [96, 160]
    assert compiled(f)(x).tolist() == [96, 160]
    assert torch.func.jvp(f, (x,), (torch.ones(2),))[1].tolist() == [32, 32]
    assert torch.func.vmap(f)(torch.tensor([[3.0], [50.0]])).tolist() == [[192], [100]]
    native = error_of(lambda: jax.grad(lambda x: doubled(x).sum())(jnp.ones(2)))
    for ask in (
        lambda: _backward(f, x),
        lambda: torch.func.grad(lambda x: f(x).sum())(x),
    ):
        assert error_of(ask) == native
    assert f(x).tolist() == [96, 160]


REMATERIALISED: dict[str, Fn] = {
    "checkpoint": jax.checkpoint,
    "checkpoint with a policy": functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable),
    "vmap inside": lambda f: jax.vmap(f, in_axes=(0, None)),
    "grad inside": lambda f: lambda x, y: jax.grad(lambda y: f(x, y).sum())(y),
    "cond inside": lambda f: lambda x, y: jax.lax.cond(x.sum() > 0, f, lambda x, y: jnp.zeros_like(f(x, y)), x, y),
}


def for_transforms(module: Any) -> Fn:
    """Of shapes that allow a batch along the first."""
    return lambda x, y: module.sin(x) * y**2 + module.exp(y)


@pytest.mark.parametrize("wrap", REMATERIALISED.values(), ids=REMATERIALISED)
def test_transforms_of_jax_inside(wrap: Callable[[Fn], Fn]) -> None:
    """Two orders, eagerly; the first compiled. Against JAX."""
    fn = wrap(for_transforms(jnp))
    f = levels(fn)
    x, y = leaf(0.3, -0.7, 1.1), leaf(0.5, 0.2, -0.4)
    total = lambda x, y: (fn(x, y) ** 2).sum()  # noqa: E731
    a, b = (jnp.asarray(t.detach().numpy()) for t in (x, y))
    first = grad((f(x, y) ** 2).sum(), (x, y), create_graph=True)
    close([g.detach() for g in first], [torch.tensor(np.asarray(g)) for g in jax.grad(total, (0, 1))(a, b)])
    second = jax.grad(lambda x, y: sum((g**2).sum() for g in jax.grad(total, (0, 1))(x, y)), (0, 1))(a, b)
    close(list(grad(sum((g**2).sum() for g in first), (x, y))), [torch.tensor(np.asarray(g)) for g in second])
    close(grad((compiled(f)(x, y) ** 2).sum(), (x, y)), tuple(g.detach() for g in first))


# --- random numbers of JAX --------------------------------------------------------------------------------------------


def noisy(x: Any, seed: Any) -> Any:
    """Noise from a key made of a seed."""
    return x * jax.random.normal(jax.random.key(seed), x.shape)


def of_key(key: Any, x: Any) -> Any:
    """Noise from a key that is given."""
    return x * jax.random.normal(key["key"], x.shape)


def expected_noise(seed: int, shape: tuple[int, ...] = (3,)) -> torch.Tensor:
    """The noise."""
    return torch.tensor(np.asarray(jax.random.normal(jax.random.key(seed), shape)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint32])
def test_a_key_from_a_seed(dtype: torch.dtype) -> None:
    f, x = levels(noisy), leaf(1.0, 2.0, 3.0)
    seed = torch.tensor(5, dtype=dtype)
    close(f(x, seed).detach(), x.detach() * expected_noise(5))
    close(grad(f(x, seed).sum(), x)[0], expected_noise(5))
    close(compiled(f)(x.detach(), seed), x.detach() * expected_noise(5))


def test_a_batch_of_seeds() -> None:
    f = levels(noisy)
    expected = torch.stack([expected_noise(s) for s in (4, 5)])
    close(torch.func.vmap(f, (None, 0))(torch.ones(3), torch.tensor([4, 5])), expected)
    each = torch.func.vmap(torch.func.grad(lambda x, seed: f(x, seed).sum()), (None, 0))
    close(each(torch.ones(3), torch.tensor([4, 5])), expected)


def test_a_typed_key_as_an_argument() -> None:
    """Passed on by a torch program that has one from JAX."""
    key = jax.random.key(5, impl="rbg")
    expected = torch.tensor(np.asarray(jax.random.normal(key, (3,))))
    f, x = levels(of_key), leaf(1.0, 2.0, 3.0)
    close(f({"key": key}, x.detach()), x.detach() * expected)
    close(grad(f({"key": key}, x).sum(), x)[0], expected)
    (first,) = grad((f({"key": key}, x) ** 2).sum(), x, create_graph=True)
    close(grad(first.sum(), x)[0], 2 * expected**2)
    close(torch.func.vmap(lambda x: f({"key": key}, x))(torch.ones(2, 3)), expected.expand(2, 3))
    close(torch.func.grad(lambda x: f({"key": key}, x).sum())(torch.ones(3)), expected)


def test_a_typed_key_in_a_compiled_graph() -> None:
    key, f = jax.random.key(5), levels(of_key)
    close(compiled(lambda x: f({"key": key}, x))(torch.ones(3)), expected_noise(5))


def test_a_batch_of_typed_keys_as_an_argument() -> None:
    keys = jax.random.split(jax.random.key(5), 2)
    f = levels(lambda keys, x: jax.vmap(lambda key: x * jax.random.normal(key, x.shape))(keys))
    expected = torch.tensor(np.stack([np.asarray(jax.random.normal(key, (3,))) for key in keys]))
    close(f(keys, torch.ones(3)), expected)


def test_numpy_beside_what_is_differentiated() -> None:
    f, x, n = (
        levels(lambda x, n: x * n["a"] + n["b"]),
        leaf(1.0, 2.0),
        {"a": np.array([3, 4], np.float32), "b": np.int32(1)},
    )
    assert f(x, n).tolist() == [4, 9]
    assert grad(f(x, n).sum(), x)[0].tolist() == [3, 4]
    assert torch.func.grad(lambda x: f(x, n).sum())(x.detach()).tolist() == [3, 4]
    assert torch.func.vmap(lambda x: f(x, n))(torch.ones(2, 2)).tolist() == [[4, 5]] * 2
    n["a"][:] = 0
    assert f(x, n).tolist() == [1, 1]


# --- effects ----------------------------------------------------------------------------------------------------------


class Log:
    """What callbacks were told, in order."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.lock = threading.Lock()

    def __call__(self, *xs: Any) -> None:
        """Tell."""
        with self.lock:
            self.seen.append([np.asarray(x).tolist() for x in xs])

    def taken(self) -> list[Any]:
        """What was told since the last time."""
        jax.effects_barrier()
        seen, self.seen = self.seen, []
        return seen


def test_a_print_is_printed_once_a_call(capfd: pytest.CaptureFixture[str]) -> None:
    def f(x: Any) -> Any:
        jax.debug.print("x is {}", x.sum())
        return x * 2

    def printed() -> int:
        jax.effects_barrier()
        return capfd.readouterr().out.count("x is")

    g, x = levels(f), leaf(1.0, 2.0)
    printed()
    for _ in range(2):
        g(x.detach())
        assert printed() == 1
    out = g(x)
    assert printed() == 1
    out.sum().backward()
    assert printed() == 0
    torch.func.vmap(g)(torch.ones(3, 2))
    assert printed() == 3
    compiled(g)(x.detach())
    assert printed() == 1


@pytest.mark.parametrize("ordered", [False, True])
def test_a_callback_is_called_once_a_call(ordered: bool) -> None:
    """Eagerly, with its gradient, and in a graph."""
    log = Log()

    def f(x: Any) -> Any:
        y = jnp.sin(x)
        io_callback(log, None, jax.lax.stop_gradient(x), ordered=ordered)
        return y

    g, x = levels(f), leaf(1.0, 2.0)
    for _ in range(2):
        g(x.detach())
        assert log.taken() == [[[1, 2]]]
    out = g(x)
    assert log.taken() == [[[1, 2]]]
    close(grad(out.sum(), x)[0], torch.cos(x.detach()))
    assert log.taken() == []
    graph = compiled(g)
    graph(x.detach())
    assert log.taken() == [[[1, 2]]]
    close(grad(graph(x).sum(), x)[0], torch.cos(x.detach()))
    assert log.taken() == [[[1, 2]]]


def test_a_callback_whose_result_is_used() -> None:
    count = itertools.count()
    f = levels(
        lambda x: x + io_callback(lambda: np.float32(next(count)), jax.ShapeDtypeStruct((), np.float32), ordered=True)
    )
    x = leaf(10.0)
    assert [f(x).item() for _ in range(3)] == [10, 11, 12]
    assert grad(f(x).sum(), x)[0].tolist() == [1]
    assert f(x.detach()).item() == 14


ONCE: dict[str, Callable[[Fn, torch.Tensor], tuple[Any, Any]]] = {
    "create_graph": lambda f, x: (lambda out: (out, grad(out, x, create_graph=True)[0]))(f(x)),
    "hooks": lambda f, x: (lambda out: (out, grad(out, x)[0]))(_under(torch.autograd.graph.save_on_cpu(), f, x)),
    "grad_and_value": lambda f, x: torch.func.grad_and_value(f)(x)[::-1],
    "vjp": lambda f, x: (lambda out, pull: (out, pull(torch.ones(()))[0]))(*torch.func.vjp(f, x)),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones(()),)),
    "compiled": lambda f, x: (lambda out: (out, grad(out, x)[0]))(compiled(f)(x)),
}


@pytest.mark.parametrize("ask", ONCE.values(), ids=ONCE)
def test_a_derivative_is_that_of_the_value(ask: Callable[[Fn, torch.Tensor], tuple[Any, Any]]) -> None:
    """A callback that answers otherwise each time is asked once: its answer is the factor in both."""
    count = itertools.count(1)
    answer = lambda: np.float32(next(count))  # noqa: E731
    shape = jax.ShapeDtypeStruct((), np.float32)
    f = levels(lambda x: x * jax.lax.stop_gradient(io_callback(answer, shape, ordered=True)))
    value, derivative = ask(f, torch.tensor(1.0, requires_grad=True))
    jax.effects_barrier()
    assert value.item() == derivative.item() == 1
    assert next(count) == 2


def test_callbacks_in_order() -> None:
    log = Log()

    def f(x: Any) -> Any:
        for k in range(5):
            io_callback(log, None, x + k, ordered=True)
        return x

    g = levels(f)
    for start in (0, 10):
        g(torch.tensor(start))
    assert log.taken() == [[k] for k in (*range(5), *range(10, 15))]


@pytest.mark.parametrize("ordered", [False, True])
def test_a_callback_in_the_backward(ordered: bool) -> None:
    log = Log()

    @jax.custom_vjp
    def f(x: Any) -> Any:
        return x * 1

    def bwd(_: Any, g: Any) -> Any:
        io_callback(log, None, g, ordered=ordered)
        return (g * 3,)

    f.defvjp(lambda x: (x * 1, None), bwd)
    g, x = levels(f), leaf(1.0, 2.0)
    out = g(x).sum()
    assert log.taken() == []
    for _ in range(2):
        assert grad(out, x, retain_graph=True)[0].tolist() == [3, 3]
        assert log.taken() == [[[1, 1]]]
    assert torch.func.grad(lambda x: g(x).sum())(x.detach()).tolist() == [3, 3]
    assert log.taken() == [[[1, 1]]]
    out = compiled(g)(x).sum()
    assert log.taken() == []
    assert grad(out, x)[0].tolist() == [3, 3]
    assert log.taken() == [[[1, 1]]]


@pytest.mark.parametrize("result", [None, (), {}, [None]], ids=str)
def test_a_function_that_returns_nothing_still_runs(result: Any) -> None:
    log = Log()

    def f(x: Any) -> Any:
        io_callback(log, None, jax.lax.stop_gradient(x), ordered=True)
        return result

    g = levels(f)
    assert as_torch(f)(torch.ones(2)) == result
    assert log.taken() == [[[1, 1]]]
    assert g(leaf(1.0, 2.0)) == result
    assert log.taken() == [[[1, 2]]]


def test_a_function_that_returns_nothing_runs_in_a_graph() -> None:
    log = Log()

    def f(x: Any) -> None:
        io_callback(log, None, x, ordered=True)

    g = levels(f)

    def program(x: torch.Tensor) -> torch.Tensor:
        assert g(x) is None
        return x + 1

    assert compiled(program)(torch.ones(2)).tolist() == [2, 2]
    assert log.taken() == [[[1, 1]]]


def test_an_effect_in_a_graph_that_drops_the_result() -> None:
    """A print whose function's value is not used."""
    log = Log()

    def f(x: Any) -> Any:
        io_callback(log, None, x, ordered=True)
        return x * 2

    g = levels(f)

    def program(x: torch.Tensor) -> torch.Tensor:
        g(x)
        return x + 1

    assert compiled(program)(torch.ones(2)).tolist() == [2, 2]
    assert log.taken() == [[[1, 1]]]


IN_LOOPS: dict[str, Fn] = {
    "scan": lambda step, x: jax.lax.scan(lambda c, _: (step(c), None), x, None, length=2)[0],
    "cond": lambda step, x: jax.lax.cond(x.sum() > 0, lambda c: step(step(c)), lambda c: c, x),
    "jit": lambda step, x: jax.jit(lambda c: step(step(c)))(x),
}


@pytest.mark.parametrize("loop", IN_LOOPS.values(), ids=IN_LOOPS)
def test_a_print_in_a_loop_is_printed_once_a_step(loop: Fn, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever derivative is asked for."""

    def step(c: Any) -> Any:
        jax.debug.print("step {}", c.sum())
        return jnp.sin(c) * 2

    def printed(ask: Callable[[], Any]) -> Any:
        found = ask()
        jax.effects_barrier()
        assert capfd.readouterr().out.count("step") == 2
        return found

    f, native = levels(lambda x: loop(step, x).sum()), lambda x: (torch.sin(torch.sin(x) * 2) * 2).sum()
    capfd.readouterr()
    x = leaf(0.3, 0.7)
    (first,) = printed(lambda: grad(f(x), x, create_graph=True))
    (expected,) = grad(native(x), x, create_graph=True)
    close(first.detach(), expected.detach())
    close(grad(first.sum(), x), grad(expected.sum(), x))
    capfd.readouterr()
    close(printed(lambda: torch.func.grad(f)(x.detach())), expected.detach())
    close(printed(lambda: torch.func.jvp(f, (x.detach(),), (torch.ones(2),))[1]), expected.detach().sum())
    close(printed(lambda: grad(compiled(f)(x), x)[0]), expected.detach())


def test_an_answer_inside_a_loop_is_refused_where_a_derivative_is_asked() -> None:
    """It would have to be kept step by step. The value is there."""
    shape = jax.ShapeDtypeStruct((), np.float32)

    def step(c: Any, _: Any) -> Any:
        return c * jax.lax.stop_gradient(io_callback(lambda: np.float32(2), shape, ordered=True)), None

    f, x = levels(lambda x: jax.lax.scan(step, x, None, length=3)[0]), leaf(1.0)
    assert f(x.detach()).tolist() == [8]
    for ask in (lambda: f(x), lambda: torch.func.grad(lambda x: f(x).sum())(x.detach())):
        kind, text = error_of(ask)
        assert kind is interop.UnsupportedError
        assert "inside a scan" in text


# --- functions that can't be traced -----------------------------------------------------------------------------------


def by_value(x: Any, k: float = 2.0) -> Any:
    """A function that looks at its argument."""
    return (jnp.sin(x) * k if x.sum() > 0 else x**2 * k), x > 0


def by_value_in_torch(x: Any, k: float = 2.0) -> Any:
    """The same in torch."""
    return (torch.sin(x) * k if x.sum() > 0 else x**2 * k), x > 0


untraced = differentiable(as_torch(jit=False)(by_value))

UNTRACED: dict[str, Callable[[Fn, torch.Tensor], Any]] = {
    "call": lambda f, x: f(x.detach()),
    "a number": lambda f, x: f(x.detach(), 3.5),
    "backward": lambda f, x: grad(f(x)[0].sum(), x),
    "second backward": lambda f, x: grad(grad(f(x)[0].sum(), x, create_graph=True)[0].sum(), x),
    "hooks": lambda f, x: grad(_under(torch.autograd.graph.save_on_cpu(), f, x)[0].sum(), x),
    "checkpoint": lambda f, x: grad(checkpoints.checkpoint(f, x, use_reentrant=False)[0].sum(), x),
    "func.grad": lambda f, x: torch.func.grad(lambda x: f(x)[0].sum())(x.detach()),
    "jvp": lambda f, x: torch.func.jvp(lambda x: f(x)[0], (x.detach(),), (torch.ones_like(x),)),
    "hessian": lambda f, x: torch.autograd.functional.hessian(lambda x: f(x)[0].sum(), x.detach()),
}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ask", UNTRACED.values(), ids=UNTRACED)
def test_a_function_that_looks_at_values(ask: Callable[[Fn, torch.Tensor], Any], dtype: torch.dtype, sign: int) -> None:
    """Both branches, in either width."""
    x = torch.tensor([0.5, 1.0], dtype=dtype).mul(sign).requires_grad_()
    close(ask(untraced, x), ask(by_value_in_torch, x))


def test_a_function_that_is_not_traced_may_leave_jax() -> None:
    """It gets values, and Python numbers as they are."""
    seen: list[Any] = []

    def f(x: Any, n: int) -> Any:
        seen.append((type(n), isinstance(x, jax.core.Tracer)))
        return jnp.asarray(np.sort(np.asarray(x))[:n]) * float(x[0])

    assert as_torch(jit=False)(f)(torch.tensor([3.0, 1.0, 2.0]), 2).tolist() == [3, 6]
    assert seen == [(int, False)]


def test_what_is_not_traced_shares_no_memory() -> None:
    """With its arguments, with what it keeps, or with its results."""
    kept: list[Any] = []
    table = jnp.ones(1000)
    f = as_torch(jit=False)(lambda x: (kept.append(x), x, table)[1:])
    x = torch.ones(1000)
    same, of_table = f(x)
    x.zero_()
    same.add_(1)
    of_table.add_(5)
    assert (kept[0].sum(), same.sum().item(), table.sum()) == (1000, 2000, 1000)


def test_complex_gradients_of_what_is_not_traced() -> None:
    def pull(f: Fn) -> Any:
        z = leaf(1 + 2j, 0.5j, dtype=torch.complex64)
        return grad(f(z), z, torch.tensor([1j, 2 - 1j]))

    close(pull(differentiable(as_torch(jit=False)(lambda z: z * z.conj() * z))), pull(lambda z: z * z.conj() * z))


def test_what_is_not_traced_in_a_compiled_graph() -> None:
    """With the shapes declared; without them the message says so."""
    f = as_torch(jit=False)(lambda x: x * 2 if x.sum() > 0 else x)
    declared = jittable(example_output=lambda x: x)(f)
    assert compiled(declared)(torch.ones(2)).tolist() == [2, 2]
    assert compiled(declared)(-torch.ones(2)).tolist() == [-1, -1]
    _, text = error_of(lambda: compiled(jittable(f))(torch.ones(2)))
    assert "example_output" in text


# --- results that are no computation ----------------------------------------------------------------------------------


def test_a_constant() -> None:
    """New at every call: writing to one reaches no other."""
    table = jnp.arange(3.0)
    f = levels(lambda x: (table, jnp.ones(2), 2.5 * x.sum()))
    x = leaf(1.0, 2.0)
    for x in (leaf(1.0, 2.0), torch.ones(2)):
        first, second = f(x), f(x)
        with torch.no_grad():
            first[0].add_(10)
            first[1].zero_()
        assert second[0].tolist() == f(x)[0].tolist() == [0, 1, 2]
        assert second[1].tolist() == [1, 1]
    assert table.tolist() == [0, 1, 2]
    assert [o.shape for o in torch.func.vmap(f)(torch.ones(4, 2))] == [(4, 3), (4, 2), (4,)]
    assert compiled(f)(torch.ones(2))[0].tolist() == [0, 1, 2]


ALIASING: dict[str, Callable[[Fn, torch.Tensor], Any]] = {
    "under autograd": lambda f, x: f(x.requires_grad_()),
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.clone(),))[0],
    "vjp": lambda f, x: torch.func.vjp(f, x)[0],
    "compiled": lambda f, x: compiled(f)(x),
    "compiled under autograd": lambda f, x: compiled(f)(x.requires_grad_()),
    "hooks": lambda f, x: _under(torch.autograd.graph.save_on_cpu(), f, x.requires_grad_()),
}


@pytest.mark.parametrize("ask", ALIASING.values(), ids=ALIASING)
def test_an_input_that_is_returned_is_a_new_tensor(ask: Callable[[Fn, torch.Tensor], Any]) -> None:
    x = torch.zeros(64)
    one, other = ask(levels(lambda x: (x, x)), x)
    with torch.no_grad():
        one.add_(1)
    assert one.min() == 1
    assert x.detach().abs().sum() == 0
    assert other.detach().abs().sum() == 0


def test_the_gradient_of_an_input_that_is_returned() -> None:
    """It is added to the input's other gradients, and shares no memory with the cotangent."""
    x = leaf(1.0, 2.0)
    cotangent = torch.tensor([3.0, 4.0])
    out = levels(lambda x: x)(x)
    (got,) = grad(out, x, cotangent)
    got.add_(1)
    assert cotangent.tolist() == [3, 4]
    same, twice = levels(lambda x: (x, x * 2))(x)
    (same + twice + x).sum().backward()
    assert x.grad.tolist() == [4, 4]


# --- functions that raise ---------------------------------------------------------------------------------------------


class Custom(Exception):
    """Of the user's program."""


class Fuse:
    """Raises while it is lit."""

    def __init__(self) -> None:
        self.lit = True

    def __call__(self) -> None:
        """Burn."""
        if self.lit:
            raise Custom("mine")


RAISING: dict[str, Callable[[Fn, torch.Tensor], Any]] = {
    "call": lambda f, x: f(x),
    "backward": lambda f, x: _backward(f, x),
    "second backward": lambda f, x: _backward(lambda x: _gradient(f, x), x),
    "func.grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "checkpoint": lambda f, x: _backward(lambda x: checkpoints.checkpoint(f, x, use_reentrant=False), x),
    "dual": lambda f, x: tangent_of(lambda x, _: f(x), x, torch.ones_like(x), x),
    "inference": lambda f, x: torch.inference_mode()(f)(x),
}


def _gradient(f: Fn, x: torch.Tensor) -> torch.Tensor:
    return grad(f(x).sum(), x, create_graph=True)[0]


def _backward(f: Fn, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    return grad(f(x).sum(), x)[0]


@pytest.mark.parametrize("ask", RAISING.values(), ids=RAISING)
def test_an_error_is_the_users_and_the_next_call_works(ask: Callable[[Fn, torch.Tensor], Any]) -> None:
    fuse = Fuse()

    def f(x: Any) -> Any:
        fuse()
        return x**3

    g, x = levels(f), torch.tensor([1.0, 2.0])
    for _ in range(2):
        with pytest.raises(Custom, match="mine"):
            ask(g, x)
    fuse.lit = False
    close(ask(g, x), ask(lambda x: x**3, x))


def raising_backward(fuse: Fuse) -> Fn:
    """A function whose rule raises while it is traced."""

    @jax.custom_vjp
    def f(x: Any) -> Any:
        return x**3

    def bwd(x: Any, g: Any) -> Any:
        fuse()
        return (3 * x**2 * g,)

    f.defvjp(lambda x: (x**3, x), bwd)
    return f


@pytest.mark.parametrize("ask", [RAISING[n] for n in ("backward", "second backward", "func.grad", "checkpoint")])
def test_an_error_of_a_rule_is_the_users_and_the_next_call_works(ask: Callable[[Fn, torch.Tensor], Any]) -> None:
    fuse = Fuse()
    g, x = levels(raising_backward(fuse)), torch.tensor([1.0, 2.0])
    assert g(x).tolist() == [1, 8]
    for _ in range(2):
        with pytest.raises(Custom, match="mine"):
            ask(g, x)
    fuse.lit = False
    close(ask(g, x), ask(lambda x: x**3, x))


def test_an_error_of_a_rule_in_the_middle_of_a_backward() -> None:
    """The graph stays as it was, and is walked when the rule works."""
    fuse = Fuse()
    x = leaf(1.0, 2.0)
    out = levels(raising_backward(fuse))(x).sum()
    with pytest.raises(Custom, match="mine"):
        grad(out, x, retain_graph=True)
    fuse.lit = False
    assert grad(out, x)[0].tolist() == [3, 12]


@pytest.mark.parametrize("make", [lambda fuse: lambda x: (fuse(), x**3)[1], raising_backward], ids=["call", "rule"])
def test_an_error_in_a_graph_is_told_and_the_next_call_works(make: Callable[[Fuse], Fn]) -> None:
    """Dynamo has error types of its own."""
    fuse = Fuse()
    g, x = levels(make(fuse)), torch.tensor([1.0, 2.0])
    graph = compiled(g)
    for _ in range(2):
        kind, text = error_of(lambda: _backward(graph, x))
        assert kind is Custom or "Custom" in text
        assert "mine" in text
    fuse.lit = False
    assert _backward(graph, x).tolist() == [3, 12]


def test_an_error_at_run_time_is_told_and_the_next_call_works() -> None:
    """JAX allows its own type alone there: the user's type and message are in the text."""
    fuse = Fuse()

    def check(x: np.ndarray) -> np.ndarray:
        fuse()
        return x

    f = levels(lambda x: jax.pure_callback(check, jax.ShapeDtypeStruct(x.shape, x.dtype), x) * 2)
    for _ in range(2):
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"Custom(.|\n)*mine"):
            f(torch.ones(2))
    fuse.lit = False
    assert f(torch.ones(2)).tolist() == [2, 2]


def test_an_interrupt_in_a_backward_passes() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    x = leaf(1.0)
    with pytest.raises(KeyboardInterrupt):
        levels(raising_backward(interrupted))(x).sum().backward()
    assert not torch.is_inference_mode_enabled()
    assert not jax.config.jax_enable_x64


def test_an_error_in_double_precision_leaves_jax_as_it_was() -> None:
    """The width that a thread has is put back."""
    fuse = Fuse()
    g, x = levels(raising_backward(fuse)), leaf(1.0, dtype=torch.float64)
    out = g(x).sum()
    with pytest.raises(Custom):
        grad(out, x, retain_graph=True)
    assert jnp.ones(()).dtype == jnp.float32
    fuse.lit = False
    assert grad(out, x)[0].dtype is torch.float64


def test_no_tracer_is_left_of_a_trace() -> None:
    """`jax.checking_leaks` finds none."""
    for fn in (jnp.sin, lambda x: (jnp.sin(x) * x).sum(), lambda x: jnp.linalg.inv(jnp.outer(x, x) + jnp.eye(2)).sum()):
        x = leaf(0.5, 1.0)
        with jax.checking_leaks():
            found = grad(levels(fn)(x).sum(), x)[0]
        assert torch.equal(found, grad(levels(fn)(x).sum(), x)[0])


def test_a_gradient_that_came_with_its_value_is_exact_where_its_multiple_is_not() -> None:
    """Of 1 it may be infinite, and an infinite cotangent times a gradient of zero is no number."""
    steep, kinked = levels(lambda x: jnp.exp(2 * x).sum()), levels(lambda x: jnp.where(x > 0, x, 0).sum())
    x = leaf(44.25)
    for scale in (1e-3, 0.5, 0.0):
        native = torch.func.grad(lambda x, scale=scale: steep(x) * scale)(x.detach())
        assert torch.equal(grad(steep(x) * scale, x)[0], native)
        out = steep(x) * scale
        assert torch.equal(grad(out, x, retain_graph=True)[0], grad(out, x)[0])
    y = leaf(1.0, -1.0)
    assert grad(kinked(y), y, torch.tensor(torch.inf))[0].tolist() == [torch.inf, 0]


@pytest.mark.parametrize("wide", [False, True])
def test_a_function_and_its_derivatives_are_one_program(wide: bool) -> None:
    """What it reads beside its arguments was read when it was traced, as in `jax.jit`: by all of them at once."""
    factor, entered = 1.0, []

    def scaled(x: jax.Array) -> jax.Array:
        entered.append(x.shape)
        return (jnp.sin(x) * factor).sum()

    f, x = levels(scaled), leaf(0.5, 1.0, dtype=torch.float64 if wide else torch.float32)
    native, detached = x.sin().sum(), x.detach()
    first = f(detached)
    factor = 2.0
    once = grad(f(x), x, create_graph=True)[0]
    assert torch.equal(f(x), first)
    torch.testing.assert_close(first, native.detach())
    torch.testing.assert_close(once, x.cos())
    torch.testing.assert_close(grad(f(x), x)[0], x.cos().detach())
    torch.testing.assert_close(grad(once.sum(), x)[0], -x.sin().detach())
    torch.testing.assert_close(torch.func.grad(f)(detached), detached.cos())
    torch.testing.assert_close(torch.func.jvp(f, (detached,), (detached,))[1], (detached.cos() * detached).sum())
    torch.testing.assert_close(torch.func.vmap(f)(detached[None])[0], first)
    torch.testing.assert_close(torch.func.hessian(f)(detached), torch.diag(-detached.sin()))
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(grad(f(x), x)[0], x.cos().detach())
    assert entered == [(2,)]


def test_an_error_of_jax_is_jaxs() -> None:
    """Shapes that do not go together."""
    native = error_of(lambda: jnp.ones(2) @ jnp.ones(3))
    f = levels(lambda a, b: a @ b)
    for ask in (
        lambda: f(torch.ones(2), torch.ones(3)),
        lambda: f(leaf(1.0, 2.0), torch.ones(3)),
        lambda: torch.func.grad(f)(torch.ones(2), torch.ones(3)),
    ):
        assert error_of(ask) == native
    assert f(torch.ones(2), torch.ones(2)).item() == 2
