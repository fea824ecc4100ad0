"""What was not declared raises, and names the decorator, at the first moment that the host lets us know."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import interop
from interop import as_jax, as_torch, differentiable, jittable


def square(x: Any) -> Any:
    """Of either framework."""
    return (x * x).sum()


x = torch.ones(3)
a = jnp.ones(3)


def needs_grad() -> torch.Tensor:
    """A tensor that a derivative is asked of."""
    return torch.ones(3, requires_grad=True)


# --- differentiable ---------------------------------------------------------------------------------------------------

TORCH_DERIVATIVES: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "requires_grad": lambda f: f(needs_grad()),
    "requires_grad of an intermediate": lambda f: f(needs_grad() * 2),
    "func.grad": lambda f: torch.func.grad(f)(x),
    "func.vjp": lambda f: torch.func.vjp(f, x),
    "func.jvp": lambda f: torch.func.jvp(f, (x,), (x,)),
    "func.jacrev": lambda f: torch.func.jacrev(f)(x),
    "func.jacfwd": lambda f: torch.func.jacfwd(f)(x),
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(f))(torch.ones(2, 3)),
    "checkpoint": lambda f: torch.utils.checkpoint.checkpoint(f, needs_grad(), use_reentrant=False),
}


@pytest.mark.parametrize("crossing", [as_torch(square), jittable(as_torch(square))], ids=["plain", "jittable"])
@pytest.mark.parametrize("ask", TORCH_DERIVATIVES.values(), ids=TORCH_DERIVATIVES)
def test_a_derivative_in_torch_names_the_decorator(ask: Callable[..., Any], crossing: Callable[..., Any]) -> None:
    with pytest.raises(interop.NotDifferentiableError, match=r"square.*@differentiable"):
        ask(crossing)


def test_the_way_out_by_detaching_works() -> None:
    with pytest.raises(interop.NotDifferentiableError, match=r"\.detach\(\)"):
        as_torch(square)(needs_grad())
    assert as_torch(square)(needs_grad().detach()) == 3


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_derivative_is_asked_without_grad(context: Callable[[], Any]) -> None:
    with context():
        assert as_torch(square)(needs_grad()) == 3


def test_an_integer_never_asks() -> None:
    assert as_torch(square)(torch.ones(3, dtype=torch.int32)) == 3


JAX_DERIVATIVES: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "grad": lambda f: jax.grad(f)(a),
    "value_and_grad": lambda f: jax.value_and_grad(f)(a),
    "vjp": lambda f: jax.vjp(f, a),
    "jvp": lambda f: jax.jvp(f, (a,), (a,)),
    "linearize": lambda f: jax.linearize(f, a),
    "jacfwd": lambda f: jax.jacfwd(f)(a),
    "jacrev": lambda f: jax.jacrev(f)(a),
    "hessian": lambda f: jax.hessian(f)(a),
    "vmap of grad": lambda f: jax.vmap(jax.grad(f))(jnp.ones((2, 3))),
    "grad of vmap": lambda f: jax.grad(lambda b: jax.vmap(f)(b).sum())(jnp.ones((2, 3))),
}


@pytest.mark.parametrize("crossing", [as_jax(square), jittable(as_jax(square))], ids=["plain", "jittable"])
@pytest.mark.parametrize("ask", JAX_DERIVATIVES.values(), ids=JAX_DERIVATIVES)
def test_a_derivative_in_jax_names_the_decorator(ask: Callable[..., Any], crossing: Callable[..., Any]) -> None:
    with pytest.raises(interop.NotDifferentiableError, match=r"square.*@differentiable"):
        ask(crossing)


def test_a_derivative_under_jit_names_the_decorator() -> None:
    with pytest.raises(interop.NotDifferentiableError, match=r"square.*@differentiable"):
        jax.jit(jax.grad(jittable(as_jax(square))))(a)


def test_a_stopped_gradient_asks_nothing() -> None:
    f = as_jax(square)
    assert jax.grad(lambda b: f(jax.lax.stop_gradient(b)) * b.sum())(a).tolist() == [3, 3, 3]


SHARED = torch.ones(3, requires_grad=True)


class Holder:
    """An object with a weight, and a method that reads it."""

    def __init__(self) -> None:
        self.weights = {"w": [torch.ones(3, requires_grad=True)]}

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weights["w"][0]).sum()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.energy(x)


def _closing_over(weight: Any) -> Callable[..., Any]:
    return lambda x: (x * weight).sum()


CLOSED_OVER: dict[str, tuple[Callable[..., Any], str]] = {
    "closure": (_closing_over(SHARED), "weight requires grad"),
    "global": (lambda x: (x * SHARED).sum(), "SHARED requires grad"),
    "self": (Holder().energy, r"self.weights\['w'\]\[0\] requires grad"),
    "callable": (Holder(), r"self.weights\['w'\]\[0\] requires grad"),
    "partial": (functools.partial(lambda w, x: (w * x).sum(), SHARED), r"argument\[0\] of the partial requires grad"),
    "keyword of a partial": (
        functools.partial(lambda x, w: (w * x).sum(), w=SHARED),
        r"argument\[0\]\['w'\] of the partial requires grad",
    ),
}


@pytest.mark.parametrize(("fn", "name"), CLOSED_OVER.values(), ids=CLOSED_OVER)
def test_a_gradient_that_would_be_lost_raises(fn: Callable[..., Any], name: str) -> None:
    """A tensor that requires grad is no argument: no derivative could reach it."""
    f = jittable(differentiable(as_jax(fn)))
    assert f(a) == jax.jit(f)(a) == 3
    for ask in (jax.grad(f), jax.jit(jax.grad(f))):
        with pytest.raises(interop.NotDifferentiableError, match=name):
            ask(a)


def test_what_is_closed_over_without_grad_is_a_constant() -> None:
    weight, net = torch.full((3,), 2.0), torch.nn.Linear(3, 1)
    params = {"weight": torch.ones(1, 3), "bias": torch.ones(1)}
    for fn, expected in {
        _closing_over(weight): [2, 2, 2],
        lambda x: torch.func.functional_call(net, params, (x,)).sum(): [1, 1, 1],
        lambda x: net(x).sum(): net.weight[0].tolist(),
    }.items():
        assert jax.grad(differentiable(as_jax(fn)))(a).tolist() == expected


# --- nondiff_argnames -------------------------------------------------------------------------------------------------


def product(x: Any, y: Any) -> Any:
    """Of either framework."""
    return (x * y).sum()


def test_a_derivative_that_was_excluded_raises_in_torch() -> None:
    f = differentiable(nondiff_argnames="y")(as_torch(product))
    f(needs_grad(), x).backward()
    with pytest.raises(interop.NotDifferentiableError, match=r"argument y.*nondiff_argnames"):
        f(x, needs_grad())


def test_a_derivative_that_was_excluded_raises_in_jax() -> None:
    f = differentiable(nondiff_argnames="y")(as_jax(product))
    assert jax.grad(f)(a, a).tolist() == [1, 1, 1]
    with pytest.raises(interop.NotDifferentiableError, match=r"argument y.*nondiff_argnames"):
        jax.grad(f, argnums=1)(a, a)


# --- jittable ---------------------------------------------------------------------------------------------------------


def _fake() -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(3)


TORCH_TRACES: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "a fake tensor": lambda f: f(_fake()),
    "make_fx": lambda f: make_fx(f, tracing_mode="fake")(x),
}


@pytest.mark.parametrize(
    "crossing", [as_torch(square), differentiable(as_torch(square))], ids=["plain", "differentiable"]
)
@pytest.mark.parametrize("trace", TORCH_TRACES.values(), ids=TORCH_TRACES)
def test_a_trace_in_torch_names_the_decorator(trace: Callable[..., Any], crossing: Callable[..., Any]) -> None:
    with pytest.raises(interop.NotJittableError, match=r"square.*@jittable"):
        trace(crossing)


def test_a_fake_tensor_beside_a_number() -> None:
    f = as_torch(lambda x, scale=2.0: x * scale)
    assert jittable(f)(_fake()).shape == (3,)
    with pytest.raises(interop.NotJittableError):
        f(_fake())


@pytest.mark.parametrize(
    "crossing", [as_torch(square), differentiable(as_torch(square))], ids=["plain", "differentiable"]
)
def test_compiling_without_breaks_names_the_decorator(crossing: Callable[..., Any]) -> None:
    """Dynamo wraps the error in one of its own."""
    with pytest.raises(Exception, match="@jittable"):
        torch.compile(lambda y: crossing(y), fullgraph=True, backend="eager")(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own, at its breaks
def test_compiling_with_breaks_works() -> None:
    f = differentiable(as_torch(square))
    y = needs_grad()
    torch.compile(lambda y: f(y * 2), backend="aot_eager")(y).backward()
    assert y.grad is not None
    assert y.grad.tolist() == [8, 8, 8]


JAX_TRACES: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "jit": lambda f: jax.jit(f)(a),
    "jit inside a function": lambda f: jax.jit(lambda b: f(b * 2))(a),
    "scan": lambda f: jax.lax.scan(lambda c, b: (c, f(b)), 0, jnp.ones((2, 3))),
    "cond": lambda f: jax.lax.cond(True, f, lambda b: b.sum(), a),
    "while_loop": lambda f: jax.lax.while_loop(lambda s: s < 10, lambda s: s + f(a * s), 1.0),
    "map": lambda f: jax.lax.map(f, jnp.ones((2, 3))),
    "lower": lambda f: jax.jit(f).lower(a),
    "jit of vmap": lambda f: jax.jit(jax.vmap(f))(jnp.ones((2, 3))),
}


@pytest.mark.parametrize("crossing", [as_jax(square), differentiable(as_jax(square))], ids=["plain", "differentiable"])
@pytest.mark.parametrize("trace", JAX_TRACES.values(), ids=JAX_TRACES)
def test_a_trace_in_jax_names_the_decorator(trace: Callable[..., Any], crossing: Callable[..., Any]) -> None:
    with pytest.raises(interop.NotJittableError, match=r"square.*@jittable"):
        trace(crossing)


def test_a_jitted_gradient_names_the_decorator() -> None:
    with pytest.raises(interop.NotJittableError, match=r"square.*@jittable"):
        jax.jit(jax.grad(differentiable(as_jax(square))))(a)


def test_what_jax_traces_without_compiling_needs_no_jittable() -> None:
    f = differentiable(as_jax(square))
    assert jax.grad(jax.checkpoint(f))(a).tolist() == [2, 2, 2]
    out, push = jax.linearize(f, a)
    assert (out, push(a)) == (3, 6)


# --- example_output ---------------------------------------------------------------------------------------------------


def by_numpy(t: Any) -> Any:
    """Of a shape that can't be inferred, by a library that can't be traced."""
    return {"double": torch.from_numpy(t.numpy() * 2)}


struct = jax.ShapeDtypeStruct((3,), jnp.float32)

EXAMPLES: dict[str, Any] = {
    "struct": {"double": struct},
    "array": {"double": jnp.zeros(3)},
    "tensor": {"double": torch.zeros(3)},
    "function of the inputs": lambda t: {"double": jax.ShapeDtypeStruct(t.shape, t.dtype)},
}


def test_shapes_that_can_not_be_inferred_are_asked_for() -> None:
    with pytest.raises(interop.AbstractEvalError, match=r"by_numpy.*example_output"):
        jax.jit(jittable(as_jax(by_numpy)))(a)


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_an_example_of_the_output_says_its_shape(example: Any) -> None:
    f = jittable(example_output=example)(as_jax(by_numpy))
    assert f(a)["double"].tolist() == [2, 2, 2]
    assert jax.jit(f)(a)["double"].tolist() == [2, 2, 2]
    assert jax.eval_shape(f, a)["double"].shape == (3,)


DISAGREEMENTS: dict[str, Any] = {
    "shape": {"double": jax.ShapeDtypeStruct((4,), jnp.float32)},
    "dtype": {"double": jax.ShapeDtypeStruct((3,), jnp.int32)},
    "count": {"double": struct, "more": struct},
}


@pytest.mark.parametrize("example", DISAGREEMENTS.values(), ids=DISAGREEMENTS)
def test_a_result_that_disagrees_raises(example: Any) -> None:
    """As itself where a frame of ours is above; under jit inside JAX's error. Nothing is broadcast or cast."""
    f = jittable(example_output=example)(as_jax(by_numpy))
    with pytest.raises(interop.OutputMismatchError, match="example_output"):
        f(a)
    with pytest.raises(Exception, match="example_output"):
        jax.block_until_ready(jax.jit(f)(a))


@pytest.mark.parametrize("example", [{"twice": struct}, struct, [struct]], ids=["key", "bare", "list"])
def test_a_structure_that_disagrees_raises(example: Any) -> None:
    f = jittable(example_output=example)(as_jax(by_numpy))
    with pytest.raises(Exception, match="example_output"):
        jax.block_until_ready(jax.jit(f)(a))


def test_a_derivative_of_what_can_not_be_traced() -> None:
    """By running it again."""
    f = differentiable(
        jittable(example_output=jax.ShapeDtypeStruct((), jnp.float32))(as_jax(lambda t: t.sum() ** int(t[0])))
    )
    assert f(jnp.full(2, 2.0)) == 16
    assert jax.jit(jax.grad(f))(jnp.full(2, 2.0)).tolist() == [8, 8]


# --- plain ------------------------------------------------------------------------------------------------------------


def test_plain_crossings_are_batched() -> None:
    assert torch.func.vmap(as_torch(square))(torch.ones(2, 3)).tolist() == [3, 3]
    assert jax.vmap(as_jax(square))(jnp.ones((2, 3))).tolist() == [3, 3]


def test_a_sequential_batch_is_a_loop() -> None:
    """For a function that a batch can't enter."""
    f = as_jax(lambda y: y * 2 if y.sum().item() > 0 else y, vmap="sequential")
    assert jax.vmap(f)(jnp.array([[1.0], [-1.0]])).tolist() == [[2], [-1]]


def test_auto_falls_back_to_a_loop() -> None:
    """Where torch has no rule."""
    f = as_jax(lambda y: torch.from_numpy(y.numpy() * 2))
    assert jax.vmap(f)(jnp.array([[1.0], [-1.0]])).tolist() == [[2], [-2]]


def test_a_refusal_leaves_everything_usable() -> None:
    f, g = as_torch(square), as_jax(square)
    for _ in range(3):
        with pytest.raises(interop.NotDifferentiableError):
            f(needs_grad())
        with pytest.raises(interop.NotDifferentiableError):
            jax.grad(g)(a)
        with pytest.raises(interop.NotJittableError):
            jax.jit(g)(a)
        assert f(x) == 3
        assert g(a) == 3
