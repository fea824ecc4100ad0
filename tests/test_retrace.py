"""How often a function is traced: once for what is the same, once more for what is new."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor

from interop import as_jax, as_torch, differentiable, jittable


class Counted:
    """A function that counts how often its Python runs: under a trace, and for real."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.traces = 0
        self.runs = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Count, and call."""
        leaves = jax.tree.leaves((args, kwargs))
        traced = any(isinstance(x, jax.core.Tracer | FakeTensor) for x in leaves)
        self.traces += traced
        self.runs += not traced
        return self.fn(*args, **kwargs)


def levels(crossing: Callable[..., Any]) -> Callable[..., Any]:
    """The crossing with every level on."""
    return jittable(differentiable(crossing))


def added(counted: Counted, work: Callable[[], object], *, traces: bool = True) -> int:
    """How many traces, or real runs, a piece of work adds."""
    before = counted.traces if traces else counted.runs
    work()
    return (counted.traces if traces else counted.runs) - before


# --- a JAX function in torch ------------------------------------------------------------------------------------------


def test_the_same_shapes_are_traced_once_in_torch() -> None:
    f = Counted(lambda x, y: x * y)
    g = as_torch(f)
    for k in range(5):
        g(torch.full((3,), float(k)), torch.ones(3))
    assert f.traces == 1
    assert f.runs == 0


def test_a_new_shape_or_dtype_is_traced_once_more_in_torch() -> None:
    f = Counted(lambda x: x * 2)
    g = as_torch(f)
    shapes = [torch.ones(3), torch.ones(4), torch.ones(4, dtype=torch.int32), torch.ones(3, 1)]
    for _ in range(3):
        for x in shapes:
            g(x)
    assert f.traces == len(shapes)


@pytest.mark.parametrize("number", [float, int, complex])
def test_python_numbers_are_never_traced_again(number: Callable[[Any], Any]) -> None:
    """They are data of the call, weakly typed, not part of the trace."""
    f = Counted(lambda x, k: x * k)
    g = as_torch(f)
    for k in range(1, 6):
        assert g(torch.ones(2), number(k)).tolist() == [k, k]
    assert f.traces == 1


def test_python_numbers_are_never_traced_again_in_a_gradient() -> None:
    f = Counted(lambda x, k: (x * k).sum())
    g = levels(as_torch(f))

    def gradient(k: float) -> None:
        x = torch.ones(2, requires_grad=True)
        g(x, k).backward()
        assert x.grad is not None
        assert x.grad.tolist() == [k, k]

    gradient(1.0)
    assert added(f, lambda: [gradient(float(k)) for k in range(2, 6)]) == 0


def test_a_number_that_the_trace_needs_becomes_static() -> None:
    """One try, and one trace for each value from then on."""
    f = Counted(lambda x, n: jnp.stack([x for _ in range(n)]))
    g = as_torch(f)
    assert g(torch.ones(2), 3).shape == (3, 2)
    for n in (2, 3, 2, 3):
        assert g(torch.ones(2), n).shape == (n, 2)
    assert f.traces == 3


def test_a_default_that_the_trace_hashes_becomes_static() -> None:
    """`jnp.fft.fft(a, n=None, axis=-1)` puts its axis into a set."""
    assert as_torch(jnp.fft.fft)(torch.ones(4)).tolist() == [4, 0, 0, 0]
    assert as_torch(jnp.sum)(torch.ones(2, 4), 1).tolist() == [4, 4]


def test_a_new_static_value_is_traced_once_more_in_torch() -> None:
    f = Counted(lambda x, kind: {"double": x * 2, "triple": x * 3}[kind])
    g = as_torch(f)
    for kind, expected in [("double", 2), ("triple", 3)] * 3:
        assert g(torch.ones(()), kind) == expected
    assert f.traces == 2


def test_statics_of_different_types_are_different() -> None:
    """`True`, `1` and `1.0` are equal in Python."""
    f = as_torch(lambda x, kind: x * {bool: 2, int: 3, float: 4}[type(kind)], static_argnames="kind")
    for _ in range(2):
        assert [f(torch.ones(()), k).item() for k in (True, 1, 1.0)] == [2, 3, 4]
    inside = as_torch(lambda x, kinds: x * {bool: 2, int: 3, float: 4}[type(*kinds)], static_argnames="kinds")
    for wrap in (lambda k: (k,), lambda k: frozenset((k,))):
        assert [inside(torch.ones(()), wrap(k)).item() for k in (True, 1, 1.0)] == [2, 3, 4]


def test_a_new_structure_is_traced_once_more() -> None:
    f = Counted(lambda tree: sum(jax.tree.leaves(tree)))
    g = as_torch(f)
    x = torch.ones(())
    for _ in range(3):
        g([x, x])
        g((x, x))
        g({"a": x, "b": x})
    assert f.traces == 3


def test_a_gradient_in_torch_is_traced_once() -> None:
    f = Counted(lambda x: jnp.sin(x).sum())
    g = levels(as_torch(f))

    def gradient() -> None:
        x = torch.ones(3, requires_grad=True)
        g(x).backward()

    gradient()
    assert f.traces == 1
    assert added(f, lambda: [gradient() for _ in range(4)]) == 0


@pytest.mark.parametrize(
    "transform",
    [
        lambda g: torch.func.vmap(g)(torch.ones(2, 3)),
        lambda g: torch.func.grad(g)(torch.ones(3)),
        lambda g: torch.func.vmap(torch.func.grad(g))(torch.ones(2, 3)),
        lambda g: torch.func.hessian(g)(torch.ones(3)),
        lambda g: torch.func.jvp(g, (torch.ones(3),), (torch.ones(3),)),
    ],
    ids=["vmap", "grad", "vmap of grad", "hessian", "jvp"],
)
def test_a_transform_in_torch_is_traced_once(transform: Callable[..., Any]) -> None:
    f = Counted(lambda x: (jnp.sin(x) * x).sum())
    g = levels(as_torch(f))
    transform(g)
    assert f.traces >= 1
    assert added(f, lambda: [transform(g) for _ in range(3)]) == 0


def test_torch_compile_does_not_recompile() -> None:
    f = Counted(lambda x: x * 2)
    g = levels(as_torch(f))
    counter = CompileCounter()
    compiled = torch.compile(lambda x: g(x) + 1, backend=counter, fullgraph=True)
    for k in range(4):
        assert compiled(torch.full((3,), float(k))).tolist() == [2 * k + 1] * 3
    assert counter.frame_count == 1
    assert added(f, lambda: compiled(torch.ones(3))) == 0


@pytest.mark.parametrize("numbers", [(1.5, 2.5, 3.5, 4.5), (2, 3, 4, 5)], ids=["float", "int"])
def test_a_number_that_changes_inside_torch_compile(numbers: tuple[complex, ...]) -> None:
    g = levels(as_torch(lambda x, k: x * k))
    counter = CompileCounter()
    compiled = torch.compile(lambda x, k: g(x, k), backend=counter, fullgraph=True)
    assert [compiled(torch.ones(()), k).item() for k in numbers] == list(numbers)
    assert counter.frame_count <= 2


# --- a torch function in JAX ------------------------------------------------------------------------------------------


def test_an_eager_call_in_jax_runs_once_and_is_not_traced() -> None:
    f = Counted(lambda x: x * 2)
    g = levels(as_jax(f))
    for _ in range(3):
        g(jnp.ones(3))
    assert (f.runs, f.traces) == (3, 0)


def test_an_eager_gradient_in_jax_runs_the_forward_once() -> None:
    """The residual is torch's own graph: nothing is computed twice."""
    f = Counted(lambda x: (x.sin() * x).sum())
    g = levels(as_jax(f))
    jax.value_and_grad(g)(jnp.ones(3))
    assert added(f, lambda: jax.value_and_grad(g)(jnp.ones(3)), traces=False) == 1


def test_jit_traces_once_for_the_same_shapes() -> None:
    f = Counted(lambda x: x * 2)
    g = jax.jit(levels(as_jax(f)))
    g(jnp.ones(3))
    assert f.traces >= 1
    assert added(f, lambda: [g(jnp.full(3, float(k))) for k in range(4)]) == 0
    assert added(f, lambda: g(jnp.ones(4))) >= 1
    assert added(f, lambda: g(jnp.ones(4))) == 0


def test_two_jits_share_what_is_known_of_a_function() -> None:
    """The shapes of its outputs are inferred once."""
    f = Counted(lambda x: x * 2)
    g = levels(as_jax(f))
    jax.jit(lambda x: g(x) + 1)(jnp.ones(3))
    assert added(f, lambda: jax.jit(lambda x: g(x) + 2)(jnp.ones(3))) == 0


def test_a_jitted_gradient_never_enters_the_python_again() -> None:
    """Forward and backward are graphs that were captured once."""
    f = Counted(lambda x: (x.sin() * x).sum())
    g = jax.jit(jax.grad(levels(as_jax(f))))
    g(jnp.ones(3)).block_until_ready()
    assert f.traces >= 1

    def again() -> None:
        for k in range(4):
            g(jnp.full(3, float(k))).block_until_ready()

    assert added(f, again) == 0
    assert added(f, again, traces=False) == 0


def test_python_numbers_in_jax_are_no_new_plan() -> None:
    f = Counted(lambda x, k: x * k)
    g = as_jax(f)
    for k in range(4):
        assert g(jnp.ones(()), float(k)) == k
    assert (f.runs, f.traces) == (4, 0)


def test_vmap_in_jax_is_one_run_for_the_whole_batch() -> None:
    f = Counted(lambda x: x * 2)
    jax.vmap(levels(as_jax(f)))(jnp.ones((7, 3)))
    assert f.runs + f.traces <= 2
