"""What a JAX function is under torch's compilers and tracers: one operation, with its own shapes and derivatives.

Numbers are compared with the same mathematics in torch, and so is how often torch compiles.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import grad
from torch.fx.experimental.proxy_tensor import make_fx

import interop
from interop import as_torch, differentiable, jittable
from tables import rows

Fn = Callable[..., Any]
ROOT = Path(__file__).parent.parent


def levels(fn: Fn) -> Fn:
    """The JAX function as a torch function, with every level on."""
    return differentiable(jittable(as_torch(fn)))


def compiled(fn: Fn, **options: Any) -> Fn:
    """The function in one graph."""
    return torch.compile(fn, fullgraph=True, **({"backend": "aot_eager"} | options))


def close(got: Any, expected: Any, **tolerance: float) -> None:
    """The same structure, dtypes and numbers."""
    torch.testing.assert_close(got, expected, **tolerance)


def ramp(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Different numbers between 0.1 and 1.1, of which a derivative is asked."""
    size = torch.Size(shape).numel()
    return (torch.arange(size, dtype=dtype).reshape(shape) / size + 0.1).requires_grad_()


def total(tree: Any) -> torch.Tensor:
    """A number that every element of every tensor of a result has a different share in."""
    leaves = [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return sum((x * torch.cos(torch.arange(x.numel()).reshape(x.shape) + 1.0).to(x.dtype)).sum() for x in leaves)


def value_and_gradients(fn: Fn, *args: torch.Tensor) -> Any:
    """The result, and the gradients of all arguments."""
    out = fn(*args)
    return torch.utils._pytree.tree_map(torch.Tensor.detach, out), grad(total(out), args, materialize_grads=True)


def gap(reason: str) -> pytest.MarkDecorator:
    """Does not work yet, for this reason."""
    return pytest.mark.xfail(strict=True, reason=reason)


UNFINISHED = "Dynamo hands over an object that it makes itself before it has any attributes"

# torch's own, at its first use of a compiler that generates code
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")


# --- one graph --------------------------------------------------------------------------------------------------------


def in_jax(x: Any, y: Any) -> Any:
    """A residual of every kind: an input, an output, a new value."""
    return jnp.sin(x) * y**2 + jnp.exp(y) * x.sum()


def in_torch(x: Any, y: Any) -> Any:
    """The same in torch."""
    return torch.sin(x) * y**2 + torch.exp(y) * x.sum()


ours = levels(in_jax)


def around(fn: Fn) -> Fn:
    """A caller, with operations of torch on both sides."""
    return lambda x, y: torch.tanh(fn(x * 2, y) + x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "aot_eager_decomp_partition", "inductor"])
def test_a_caller_is_one_graph_forward_and_backward(backend: str) -> None:
    x, y = ramp(3), ramp(3)
    close(
        value_and_gradients(compiled(around(ours), backend=backend), x, y), value_and_gradients(around(in_torch), x, y)
    )


def test_the_function_itself_is_compiled() -> None:
    x, y = ramp(3), ramp(3)
    close(value_and_gradients(compiled(ours), x, y), value_and_gradients(in_torch, x, y))


def test_a_crossing_made_inside_breaks_the_graph() -> None:
    """It is made, and called, outside of it; where that is forbidden, torch says what to move."""

    def inside(x: torch.Tensor) -> torch.Tensor:
        return jittable(differentiable(as_torch(jnp.sin)))(x) * 2

    x, kept = torch.ones(3, requires_grad=True), jnp.ones(3)
    torch.compile(inside, backend="aot_eager")(x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * torch.cos(x.detach()))
    assert (
        torch.compile(lambda x: interop.jax_to_torch(kept) + x, backend="aot_eager")(torch.ones(3)).tolist() == [2] * 3
    )
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"(?s)as_torch.*called outside of what is compiled"):
        torch.compile(inside, backend="aot_eager", fullgraph=True)(x)


def test_two_calls_in_one_graph() -> None:
    def twice(f: Fn) -> Fn:
        return lambda x, y: f(f(x, y), y)

    x, y = ramp(3), ramp(3)
    close(value_and_gradients(compiled(twice(ours)), x, y), value_and_gradients(twice(in_torch), x, y))


def test_a_training_step_is_one_graph() -> None:
    """Forward, gradient and update, all inside."""

    def step(f: Fn) -> Fn:
        def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            slope = torch.func.grad(lambda x: f(x, y).sum())(x)
            return x - 0.1 * slope

        return run

    x, y = ramp(3).detach(), ramp(3).detach()
    close(compiled(step(ours))(x, y), step(in_torch)(x, y))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_network_trains_compiled_as_eagerly(backend: str) -> None:
    """Three steps of an optimizer on parameters that are a torch module's."""

    class Net(torch.nn.Module):
        def __init__(self, activation: Fn) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(ramp(3, 2).detach())
            self.activation = activation

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.activation(x @ self.weight)

    def trained(activation: Fn, compiler: Fn) -> torch.Tensor:
        net = Net(activation)
        call = compiler(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            call(ramp(4, 3).detach()).pow(2).sum().backward()
            optimizer.step()
        return net.weight.detach()

    close(trained(levels(jnp.tanh), lambda net: compiled(net, backend=backend)), trained(torch.tanh, lambda net: net))


def test_a_hook_of_the_result_is_called() -> None:
    """With the cotangent."""
    seen: list[torch.Tensor] = []
    x, y = ramp(3), ramp(3)
    out = compiled(ours)(x, y)
    out.register_hook(seen.append)
    out.sum().backward()
    assert [s.tolist() for s in seen] == [[1, 1, 1]]


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_requires_grad_has_a_gradient(needs: tuple[bool, bool]) -> None:
    def gradients(f: Fn) -> Any:
        xs = [ramp(3).detach().requires_grad_(need) for need in needs]
        f(*xs).sum().backward()
        return [x.grad for x in xs]

    close(gradients(compiled(around(ours))), gradients(around(in_torch)))


def test_a_view_and_a_write_around_the_call() -> None:
    """What torch functionalizes."""

    def program(f: Fn) -> Fn:
        def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            z = x.clone()
            z[1:].mul_(2)
            out = f(z[::2], y[1:])
            out[0] += 1
            return out * z.sum()

        return run

    x, y = ramp(3), ramp(3)
    close(value_and_gradients(compiled(program(ours)), x, y), value_and_gradients(program(in_torch), x, y))


def test_a_write_to_an_argument_after_the_call() -> None:
    """The caller's tensor changes, the result does not."""

    def program(f: Fn) -> Fn:
        def run(x: torch.Tensor) -> torch.Tensor:
            out = f(x, x)
            x.add_(1)
            return out + x

        return run

    x, z = ramp(3).detach(), ramp(3).detach()
    close(compiled(program(ours))(x), program(in_torch)(z))
    close(x, z)


# --- sizes that change ------------------------------------------------------------------------------------------------


class Sized:
    """JAX functions of arrays of any size, each to be found by its name."""

    def elementwise(x: Any) -> Any:
        return jnp.sin(x)

    def total(x: Any) -> Any:
        return (x**2).sum()

    def mean(x: Any) -> Any:
        return x / x.shape[0]

    def joined(x: Any, y: Any) -> Any:
        return jnp.concatenate([x, y * y])

    def flat(x: Any) -> Any:
        return x.reshape(-1) ** 2

    def halved(x: Any) -> Any:
        return x[::2] ** 2

    def neighbours(x: Any) -> Any:
        return x[1:] * x[:-1]

    def outer(x: Any, y: Any) -> Any:
        return jnp.outer(x, y)

    def broadcast(x: Any, y: Any) -> Any:
        return x[:, None] * y**2

    def padded(x: Any) -> Any:
        return jnp.pad(x, (1, 2))

    def tiled(x: Any) -> Any:
        return jnp.tile(x**2, 3)

    def transposed(x: Any) -> Any:
        return x.T**2

    def product(x: Any, y: Any) -> Any:
        return x * y**2

    def contraction(a: Any, b: Any) -> Any:
        return a @ b

    def softmax(x: Any) -> Any:
        return jax.nn.softmax(x, -1)

    def several(x: Any) -> Any:
        return {"a": x.sum(), "b": (x * x, x[:2])}

    def new(x: Any) -> Any:
        return jnp.ones(x.shape[0] + 1) * x.sum()


# a JAX function, the same in torch, and arguments by a size
SIZES: dict[str, tuple[Fn, Fn, Callable[[int], tuple[torch.Tensor, ...]]]] = {
    "elementwise": (Sized.elementwise, torch.sin, lambda n: (ramp(n),)),
    "total": (Sized.total, Sized.total, lambda n: (ramp(n),)),
    "mean": (Sized.mean, Sized.mean, lambda n: (ramp(n),)),
    "sum of sizes": (Sized.joined, lambda x, y: torch.cat([x, y * y]), lambda n: (ramp(n), ramp(2 * n + 1))),
    "product of sizes": (Sized.flat, Sized.flat, lambda n: (ramp(n, n + 2),)),
    "half a size": (Sized.halved, Sized.halved, lambda n: (ramp(n),)),
    "a size less one": (Sized.neighbours, Sized.neighbours, lambda n: (ramp(n),)),
    "outer product": (Sized.outer, lambda x, y: torch.outer(x, y), lambda n: (ramp(n), ramp(n + 3))),
    "broadcast": (Sized.broadcast, Sized.broadcast, lambda n: (ramp(n), ramp(n + 1))),
    "pad": (Sized.padded, lambda x: torch.nn.functional.pad(x, (1, 2)), lambda n: (ramp(n),)),
    "tile": (Sized.tiled, lambda x: (x**2).tile(3), lambda n: (ramp(n),)),
    "transposed": (Sized.transposed, Sized.transposed, lambda n: (ramp(n, 3),)),
    "a shared size": (Sized.product, Sized.product, lambda n: (ramp(n), ramp(n))),
    "contraction": (Sized.contraction, Sized.contraction, lambda n: (ramp(n + 1, n), ramp(n, 2))),
    "softmax": (Sized.softmax, lambda x: x.softmax(-1), lambda n: (ramp(2, n),)),
    "several outputs": (Sized.several, Sized.several, lambda n: (ramp(n),)),
    "a new array": (Sized.new, lambda x: torch.ones(x.shape[0] + 1) * x.sum(), lambda n: (ramp(n),)),
}


def frames_of(fn: Fn, calls: Sequence[tuple[Any, ...]], *, mark: bool = False) -> tuple[list[Any], int]:
    """Values and gradients of calls with different sizes, and how many graphs were made for them."""
    counter = CompileCounterWithBackend("aot_eager")
    graph = compiled(fn, backend=counter, dynamic=None if mark else True)
    found = []
    for args in calls:
        if mark:
            for x in args:
                torch._dynamo.mark_dynamic(x, tuple(d for d, size in enumerate(x.shape) if size > 3))
        found.append(value_and_gradients(graph, *args))
    return found, counter.frame_count


@pytest.mark.parametrize("mark", [False, True], ids=["dynamic", "mark_dynamic"])
@pytest.mark.parametrize(("fn", "native", "args"), rows(SIZES))
def test_a_size_that_changes_is_no_new_graph(fn: Fn, native: Fn, args: Fn, mark: bool) -> None:
    """Also where the sizes of the result are expressions of those of the arguments."""
    sizes = (4, 7, 9) if mark else (4, 6, 9, 12)
    got, frames = frames_of(levels(fn), [args(n) for n in sizes], mark=mark)
    for one, n in zip(got, sizes, strict=True):
        close(one, value_and_gradients(native, *args(n)))
    assert frames == 1


# those whose results are sized otherwise than their arguments
RESIZED = [
    "sum of sizes",
    "product of sizes",
    "half a size",
    "broadcast",
    "contraction",
    "several outputs",
    "a new array",
]


@pytest.mark.parametrize(("fn", "native", "args"), rows({name: SIZES[name] for name in RESIZED}))
def test_a_size_that_changes_has_the_right_numbers(fn: Fn, native: Fn, args: Fn) -> None:
    """As torch compiles by default: a second size makes the graph dynamic, or one of its own."""
    graph = compiled(levels(fn))
    for n in (4, 6, 5):
        close(value_and_gradients(graph, *args(n)), value_and_gradients(native, *args(n)))


def by_size(x: Any) -> Any:
    """Branches in Python."""
    return x * 2 if x.shape[0] > 6 else x * 3


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_branch_on_a_size(dynamic: bool | None) -> None:
    """It may be compiled again, and is never taken wrongly."""
    graph = compiled(levels(by_size), dynamic=dynamic)
    for n in (4, 8, 5, 9, 6, 7):
        close(value_and_gradients(graph, ramp(n)), value_and_gradients(by_size, ramp(n)))


def test_a_size_that_jax_must_know() -> None:
    """A shape of a loop or of a decomposition: one graph a size, if need be."""
    fn = lambda x: sum((x[i] * (i + 1) for i in range(x.shape[0])), 0 * x[0])  # noqa: E731
    graph = compiled(levels(fn), dynamic=True)
    for n in (3, 5, 4):
        close(value_and_gradients(graph, ramp(n)), value_and_gradients(fn, ramp(n)))


def test_a_size_of_torch_as_an_argument() -> None:
    """`x.shape[0]` is a Python integer in the caller."""
    f = levels(lambda x, n: x * n)
    graph = compiled(lambda x: f(x, x.shape[0]), dynamic=True)
    for n in (3, 5, 4):
        close(graph(ramp(n)), ramp(n) * n)


INSIDE: dict[str, Fn] = {
    "vmap": lambda f: lambda x: torch.func.vmap(f)(x),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x * 2,)),
    "grad": lambda f: lambda x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f: lambda x: torch.func.vjp(f, x)[1](x * 2)[0],
    "jacrev": lambda f: lambda x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f: lambda x: torch.func.jacfwd(f)(x),
    "hessian": lambda f: lambda x: torch.func.hessian(lambda x: f(x).sum())(x),
    "vmap of grad": lambda f: lambda x: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(x),
}


def bump(sin: Fn) -> Fn:
    """Of any shape, with second derivatives."""
    return lambda x: sin(x) * x**2


@pytest.mark.parametrize("inside", rows(INSIDE))
def test_a_transform_inside_a_graph(inside: Fn) -> None:
    x = ramp(2, 3).detach()
    close(compiled(inside(levels(bump(jnp.sin))))(x), inside(bump(torch.sin))(x))


@pytest.mark.parametrize("inside", [INSIDE["vmap"], INSIDE["jvp"], INSIDE["grad"]], ids=["vmap", "jvp", "grad"])
def test_a_transform_inside_a_graph_is_differentiated(inside: Fn) -> None:
    x = ramp(2, 3)
    got = value_and_gradients(compiled(inside(levels(bump(jnp.sin)))), x)
    close(got, value_and_gradients(inside(bump(torch.sin)), x))


@pytest.mark.parametrize("name", ["vmap", "jvp", "grad", "vmap of grad"])
def test_a_transform_inside_a_graph_of_changing_sizes(name: str) -> None:
    inside = INSIDE[name]
    expected = CompileCounterWithBackend("aot_eager")
    native = compiled(inside(bump(torch.sin)), backend=expected, dynamic=True)
    counter = CompileCounterWithBackend("aot_eager")
    graph = compiled(inside(levels(bump(jnp.sin))), backend=counter, dynamic=True)
    for n in (3, 5, 4):
        x = ramp(n, n + 1).detach()
        close(graph(x), native(x))
    assert counter.frame_count <= expected.frame_count


# --- Python values that change ----------------------------------------------------------------------------------------

CHANGING: dict[str, tuple[Fn, Fn, Sequence[Any]]] = {
    "float": (lambda x, k: x * k, lambda x, k: x * k, (1.5, 2.5, 3.5, 4.5)),
    "int": (lambda x, k: x * k, lambda x, k: x * k, (2, 3, 4, 5)),
    "zero and one": (lambda x, k: x * k, lambda x, k: x * k, (0, 1, 2, 3)),
    "int and float": (lambda x, k: x * k, lambda x, k: x * k, (2, 2.5, 3, 3.5)),
    "bool": (lambda x, k: x * 2 if k else x, lambda x, k: x * 2 if k else x, (True, False, True)),
    "str": (
        lambda x, k: {"sin": jnp.sin, "cos": jnp.cos}[k](x),
        lambda x, k: {"sin": torch.sin, "cos": torch.cos}[k](x),
        ("sin", "cos", "sin"),
    ),
    "none": (lambda x, k: x if k is None else x * k, lambda x, k: x if k is None else x * k, (None, 2.0, None)),
    "in a dict": (lambda x, k: x * k["s"], lambda x, k: x * k["s"], ({"s": 1.5}, {"s": 2.5}, {"s": 3.5})),
}


@pytest.mark.parametrize(("fn", "native", "values"), rows(CHANGING))
def test_a_python_value_that_changes(fn: Fn, native: Fn, values: Sequence[Any]) -> None:
    """It has the right numbers, in no more graphs than torch's own function."""

    def run(f: Fn) -> tuple[list[Any], int]:
        counter = CompileCounterWithBackend("aot_eager")
        graph = compiled(lambda x, k: f(x, k), backend=counter)
        return [value_and_gradients(lambda x, k=k: graph(x, k), ramp(5)) for k in values], counter.frame_count

    (got, frames), (expected, most) = run(levels(fn)), run(native)
    close(got, expected)
    assert frames <= most


NEEDED: dict[str, tuple[Fn, Fn]] = {
    "a count": (lambda x, k: jnp.tile(x, k), lambda x, k: x.tile(k)),
    "an end": (lambda x, k: x[:k] * 2, lambda x, k: x[:k] * 2),
    "a length": (lambda x, k: x.sum() * jnp.ones(k), lambda x, k: x.sum() * torch.ones(k)),
    "a loop": (lambda x, k: sum(x * i for i in range(k)), lambda x, k: sum(x * i for i in range(k))),
    "a branch": (lambda x, k: x if k > 2 else -x, lambda x, k: x if k > 2 else -x),
}


@pytest.mark.parametrize(("fn", "native"), rows(NEEDED))
def test_a_python_value_that_jax_must_know(fn: Fn, native: Fn) -> None:
    """It becomes a constant by itself."""
    f = levels(fn)
    graph = compiled(lambda x, k: f(x, k))
    for k in (2, 3, 4):
        close(
            value_and_gradients(lambda x, k=k: graph(x, k), ramp(5)),
            value_and_gradients(lambda x: native(x, k), ramp(5)),
        )


# --- who is called, and with what -------------------------------------------------------------------------------------


class Affine:
    """Has methods of every kind."""

    def __init__(self, k: float) -> None:
        self.k = k

    @levels
    def method(self, x: Any) -> Any:
        """Reads its instance."""
        return jnp.sin(x) * self.k

    @staticmethod
    @levels
    def static(x: Any) -> Any:
        """Reads nothing."""
        return jnp.sin(x) * 3

    @classmethod
    @levels
    def of_class(cls, x: Any) -> Any:
        """Reads its class."""
        return jnp.sin(x) * 3 if cls is Affine else x

    def __call__(self, x: Any) -> Any:
        """In JAX."""
        return jnp.sin(x) * self.k


class Layer(torch.nn.Module):
    """A crossing as a method and as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.k = 3.0
        self.attribute = levels(lambda x: jnp.sin(x) * 3)
        self.listed = [self.attribute]

    @levels
    def method(self, x: Any) -> Any:
        """Reads its instance."""
        return jnp.sin(x) * self.k


class OwnForward(torch.nn.Module):
    """Its forward is the crossing."""

    @levels
    def forward(self, x: Any) -> Any:
        """In JAX."""
        return jnp.sin(x) * 3


def scaled(x: Any, k: Any) -> Any:
    """With an argument to bind."""
    return jnp.sin(x) * k


def closure(k: float) -> Fn:
    """A function that reads a number outside of it."""
    return lambda x: jnp.sin(x) * k


affine, layer = Affine(3.0), Layer()
partial = levels(functools.partial(scaled, k=3.0))
outer_partial = functools.partial(levels(scaled), k=3.0)
instance = levels(Affine(3.0))
closed = levels(closure(3.0))
jitted = levels(jax.jit(closure(3.0)))
static_argument = jittable(differentiable(as_torch(scaled, static_argnames=("k",))))

GUESTS: dict[str, Fn] = {
    "function": lambda x: closed(x),
    "itself": closed,
    "jitted function": lambda x: jitted(x),
    "partial": lambda x: partial(x),
    "partial of a crossing": lambda x: outer_partial(x),
    "callable object": lambda x: instance(x),
    "static argument": lambda x: static_argument(x, k=3.0),
    "bound method": lambda x: affine.method(x),
    "bound method itself": affine.method,
    "method of a new object": lambda x: Affine(3.0).method(x),
    "static method": lambda x: affine.static(x),
    "static method of the class": lambda x: Affine.static(x),
    "class method": lambda x: Affine.of_class(x),
    "method of a module": lambda x: layer.method(x),
    "attribute of a module": lambda x: layer.attribute(x),
    "in a list of a module": lambda x: layer.listed[0](x),
    "forward of a module": OwnForward(),
}


UNBOUND = "the bound wrapper that looking up on a class returns is of a type that Dynamo can't take"


@pytest.mark.parametrize("caller", rows(GUESTS, {"method of a new object": UNFINISHED, "class method": UNBOUND}))
def test_every_kind_of_function(caller: Fn) -> None:
    x = ramp(3)
    close(value_and_gradients(compiled(caller), x), value_and_gradients(lambda x: torch.sin(x) * 3, x))


def test_a_method_of_two_objects() -> None:
    """One graph never answers for the other."""
    graph = compiled(lambda a, x: a.method(x))
    x = ramp(3)
    for k in (2.0, 5.0, 2.0):
        close(graph(Affine(k), x), torch.sin(x) * k)


def test_a_function_as_an_argument() -> None:
    """Each is compiled for itself."""
    graph = compiled(lambda f, x: f(x))
    f, g, x = levels(jnp.sin), levels(jnp.cos), ramp(3)
    for fn, native in ((f, torch.sin), (g, torch.cos), (f, torch.sin)):
        close(graph(fn, x), native(x))


class Pair(NamedTuple):
    """A container that both frameworks know."""

    first: Any
    second: Any


@dataclass
class Record:
    """A container that neither was told of."""

    first: Any
    second: Any


CONTAINERS: dict[str, Callable[[Any, Any], Any]] = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"b": a, "a": b},
    "dict of integer keys": lambda a, b: {1: a, 0: b},
    "NamedTuple": Pair,
    "dataclass": Record,
    "none": lambda a, b: (a, None, b),
    "nested": lambda a, b: {"x": [a, (b, None)], "y": {}},
    "static beside": lambda a, b: (a, "sin", b),
}


def first_and_second(tree: Any) -> tuple[Any, Any]:
    """The two leaves, however they are held."""
    if isinstance(tree, Record | Pair):
        return tree.first, tree.second
    if isinstance(tree, dict):
        return first_and_second(tree["x"]) if "x" in tree else tuple(tree.values())
    return tree[0], tree[-1][0] if isinstance(tree[-1], tuple) else tree[-1]


@pytest.mark.parametrize("make", rows(CONTAINERS))
def test_an_argument_in_a_container(make: Fn) -> None:
    def fn(tree: Any) -> Any:
        a, b = first_and_second(tree)
        return a * b**2

    f, x, y = levels(fn), ramp(3), ramp(3)
    got = value_and_gradients(compiled(lambda x, y: f(make(x, y))), x, y)
    close(got, value_and_gradients(lambda x, y: x * y**2, x, y))


@pytest.mark.parametrize("make", rows(CONTAINERS))
def test_a_container_given_to_a_graph(make: Fn) -> None:
    """It is opened by the graph's caller."""

    def fn(tree: Any) -> Any:
        a, b = first_and_second(tree)
        return a * b**2

    f, x, y = levels(fn), ramp(3), ramp(3)
    graph = compiled(lambda tree: f(tree))
    close(value_and_gradients(lambda x, y: graph(make(x, y)), x, y), value_and_gradients(lambda x, y: x * y**2, x, y))


@pytest.mark.parametrize("make", rows(CONTAINERS))
def test_a_result_in_a_container(make: Fn) -> None:
    """Used in the graph, and returned from it."""
    f, x, y = levels(lambda x, y: make(x * y, y**2)), ramp(3), ramp(3)

    def program(x: Any, y: Any) -> Any:
        out = f(x, y)
        a, b = first_and_second(out)
        return a + b, out

    used, out = compiled(program)(x, y)
    expected = make(x * y, y**2)
    assert type(out) is type(expected)
    close(used, x * y + y**2)
    for got, want in zip(first_and_second(out), first_and_second(expected), strict=True):
        close(got, want)
    assert not isinstance(out, dict) or list(out) == list(expected)


def test_keywords_defaults_and_rests() -> None:
    def fn(a: Any, /, *rest: Any, k: Any = 2.0, **more: Any) -> Any:
        return (a + sum(rest)) * k + sum(more.values())

    f, x, y = levels(fn), ramp(3), ramp(3)
    got = value_and_gradients(compiled(lambda x, y: f(x, y, x, k=y, z=x)), x, y)
    close(got, value_and_gradients(lambda x, y: fn(x, y, x, k=y, z=x), x, y))


def test_no_tensor_in_and_a_tensor_out() -> None:
    f = levels(lambda: jnp.arange(3.0))
    close(compiled(lambda x: x + f())(ramp(3).detach()), ramp(3).detach() + torch.arange(3.0))


# --- compiled autograd ------------------------------------------------------------------------------------------------


# torch's own: it looks at the gradients of what it lifts into a graph
OF_LIFTED = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@OF_LIFTED
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("forward", ["eager", "compiled"])
def test_a_backward_that_is_compiled_as_it_runs(forward: str, backend: str, fullgraph: bool) -> None:
    def gradients(f: Fn) -> Any:
        x, y = ramp(3), ramp(3)
        f(x, y).pow(2).sum().backward()
        return x.grad, y.grad

    f = compiled(around(ours)) if forward == "compiled" else around(ours)
    expected = gradients(around(in_torch))
    with compiled_autograd._enable(torch.compile(backend=backend, fullgraph=fullgraph)):
        if fullgraph and forward == "eager":  # what an eager forward has kept is no tensor, and can't be in a graph
            with pytest.raises(torch._dynamo.exc.Unsupported, match="_Eager.backward"):
                gradients(f)
            return
        for _ in range(2):
            close(gradients(f), expected)


@OF_LIFTED
def test_a_backward_inside_a_compiled_step() -> None:
    def step(f: Fn) -> Fn:
        def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            loss = f(x, y).pow(2).sum()
            loss.backward()
            return loss.detach()

        return run

    def gradients(run: Fn) -> Any:
        x, y = ramp(3), ramp(3)
        return run(x, y), x.grad, y.grad

    expected = gradients(step(in_torch))
    with torch._dynamo.config.patch(compiled_autograd=True):
        close(gradients(torch.compile(step(ours), backend="aot_eager")), expected)


# --- tensors without values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("inside", [True, False], ids=["in the mode", "outside of it"])
def test_a_fake_tensor(inside: bool, dtype: torch.dtype) -> None:
    """Shape and dtype are those of a real call."""
    f = levels(lambda x: {"a": x[1:], "b": x.sum(0) > 0})
    real = f(torch.ones(3, 2).to(dtype))
    mode = FakeTensorMode()
    x = mode.from_tensor(torch.ones(3, 2).to(dtype))
    with mode if inside else contextlib.nullcontext():
        out = f(x)
    assert {k: (v.shape, v.dtype, v.device) for k, v in out.items()} == {
        k: (v.shape, v.dtype, v.device) for k, v in real.items()
    }


@pytest.mark.parametrize("inside", [True, False], ids=["in the mode", "outside of it"])
def test_a_fake_tensor_is_differentiated(inside: bool) -> None:
    mode = FakeTensorMode()
    x = mode.from_tensor(torch.ones(3, 2)).requires_grad_()
    with mode if inside else contextlib.nullcontext():
        (g,) = grad(levels(lambda x: jnp.sin(x).sum())(x), x)
    assert (g.shape, g.dtype) == ((3, 2), torch.float32)


def test_a_fake_tensor_and_a_number_and_a_transform() -> None:
    with FakeTensorMode():
        x = torch.empty(4, 3)
        assert levels(lambda x, k: x * k)(x, 2.0).shape == (4, 3)
        assert torch.func.vmap(levels(lambda x: x[1:]))(x).shape == (4, 2)
        assert torch.func.jacrev(levels(lambda x: x[1:] ** 2))(x[0]).shape == (2, 3)


def test_a_fake_tensor_does_not_meet_a_real_one() -> None:
    """As torch has it."""
    with FakeTensorMode():
        x = torch.empty(3)
    y = torch.ones(3)
    for f in (lambda x, y: x * y, levels(lambda x, y: x * y)):
        with pytest.raises(AssertionError, match="FakeTensor"), FakeTensorMode():
            f(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.bfloat16], ids=str)
def test_a_meta_tensor(dtype: torch.dtype) -> None:
    """Shape and dtype come out; there are no values."""
    out = levels(lambda x, k: (x[1:], x.sum() > k))(torch.empty(3, 2, dtype=dtype, device="meta"), 0)
    assert [(o.shape, o.dtype, o.device.type) for o in out] == [((2, 2), dtype, "meta"), ((), torch.bool, "meta")]


def test_a_meta_tensor_is_differentiated() -> None:
    x = torch.empty(3, device="meta", requires_grad=True)
    levels(lambda x: jnp.sin(x).sum())(x).backward()
    assert (x.grad.shape, x.grad.device.type) == ((3,), "meta")


# --- graphs of operations ---------------------------------------------------------------------------------------------

MODES = ["real", "fake", "symbolic"]


def traced(fn: Fn, *args: torch.Tensor, mode: str = "real") -> Any:
    """The graph of a call."""
    return make_fx(fn, tracing_mode=mode)(*args)


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_computes_on_new_values(mode: str) -> None:
    x, y = ramp(3).detach(), ramp(3).detach()
    graph = traced(around(ours), x, y, mode=mode)
    close(graph(x + 1, y * 2), around(in_torch)(x + 1, y * 2))


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_outlives_the_crossing(mode: str) -> None:
    """Whoever holds a graph need not hold the function."""
    graph = traced(levels(lambda x: jnp.sin(x) * 3), ramp(3).detach(), mode=mode)
    gc.collect()
    close(graph(ramp(3).detach()), torch.sin(ramp(3).detach()) * 3)


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_of_a_gradient(mode: str) -> None:
    def gradients(f: Fn) -> Fn:
        def run(x: torch.Tensor, y: torch.Tensor) -> Any:
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            return grad(f(x, y).pow(2).sum(), (x, y))

        return run

    x, y = ramp(3).detach(), ramp(3).detach()
    graph = traced(gradients(around(ours)), x, y, mode=mode)
    close(graph(x + 1, y * 2), gradients(around(in_torch))(x + 1, y * 2))


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_of_a_second_gradient(mode: str) -> None:
    def second(f: Fn) -> Fn:
        return torch.func.grad(lambda x, y: torch.func.grad(lambda x: f(x, y).sum())(x).pow(2).sum())

    x, y = ramp(3).detach(), ramp(3).detach()
    graph = traced(second(ours), x, y, mode=mode)
    close(graph(x + 1, y * 2), second(in_torch)(x + 1, y * 2))


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_of_a_functionalized_program(mode: str) -> None:
    def program(f: Fn) -> Fn:
        def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            out = f(x[::2], y[1:])
            out.add_(1)
            return out

        return run

    x, y = ramp(3).detach(), ramp(3).detach()
    graph = traced(torch.func.functionalize(program(ours)), x, y, mode=mode)
    close(graph(x + 1, y * 2), program(in_torch)(x + 1, y * 2))
    assert not any(str(node.target).endswith("_.Tensor") for node in graph.graph.nodes)


def test_functionalized_without_a_graph() -> None:
    x, y = ramp(3).detach(), ramp(3).detach()
    close(torch.func.functionalize(ours)(x, y), in_torch(x, y))


@pytest.mark.parametrize(("fn", "native", "args"), rows(SIZES))
def test_a_symbolic_graph_computes_on_new_sizes(fn: Fn, native: Fn, args: Fn) -> None:
    first, second = ([x.detach() for x in args(n)] for n in (4, 7))
    graph = traced(levels(fn), *first, mode="symbolic")
    for xs in (first, second):
        close(graph(*xs), native(*xs))


@pytest.mark.parametrize(("fn", "native", "args"), rows(SIZES))
def test_a_symbolic_graph_of_a_gradient_computes_on_new_sizes(fn: Fn, native: Fn, args: Fn) -> None:
    def gradients(f: Fn) -> Fn:
        def run(*xs: torch.Tensor) -> Any:
            xs = tuple(x.detach().requires_grad_() for x in xs)
            out = torch.utils._pytree.tree_leaves(f(*xs))
            return grad(sum((o**2).sum() for o in out), xs)

        return run

    first, second = ([x.detach() for x in args(n)] for n in (4, 7))
    graph = traced(gradients(levels(fn)), *first, mode="symbolic")
    for xs in (first, second):
        close(graph(*xs), gradients(native)(*xs))


def test_a_graph_is_differentiated_later() -> None:
    """Right, or refused: never without a gradient in silence."""
    x, y = ramp(3), ramp(3)
    graph = traced(ours, x.detach(), y.detach())
    close(value_and_gradients(graph, x, y), value_and_gradients(in_torch, x, y))


def test_a_graph_is_mapped_later() -> None:
    x, y = ramp(2, 3).detach(), ramp(3).detach()
    graph = traced(ours, x[0], y)
    in_dims = (0, None)
    close(torch.func.vmap(graph, in_dims)(x, y), torch.func.vmap(in_torch, in_dims)(x, y))


CHECKS = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]


@pytest.mark.parametrize(
    ("of", "test"),
    [pytest.param(of, test) for of in ("call", "gradient", "call that is differentiated") for test in CHECKS],
)
def test_the_operation_keeps_the_rules_of_torch(of: str, test: str) -> None:
    """Every one in a graph, by torch's own checker."""

    def gradients(x: torch.Tensor, y: torch.Tensor) -> Any:
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        return grad(ours(x, y).sum(), (x, y))

    x, y = ramp(3).detach(), ramp(3).detach()
    checked = []

    class Checker(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if getattr(target, "namespace", "") == "interop":
                checked.append(torch.library.opcheck(target, args, kwargs, test_utils=test))
            return super().call_function(target, args, kwargs)

    graph = traced(gradients if of == "gradient" else ours, x, y)
    if of == "call that is differentiated":
        x, y = ramp(3), ramp(3)
    Checker(graph).run(x, y)
    assert checked
    assert all(result == {test: "SUCCESS"} for result in checked)


# --- export -----------------------------------------------------------------------------------------------------------


class Program(torch.nn.Module):
    """A function as a module."""

    def __init__(self, fn: Fn) -> None:
        super().__init__()
        self.fn = fn
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, *args: Any) -> Any:
        """The function, and a parameter of torch."""
        return self.fn(*args) * self.weight


# torch's own: it copies what it marked as deprecated
OF_STRUCTURES = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")


STRICTNESS = pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])


def tripled(x: Any) -> Any:
    """To be found by name."""
    return jnp.sin(x) * 3


@STRICTNESS
def test_an_exported_program_computes_on_new_values(strict: bool) -> None:
    x, y = ramp(3).detach(), ramp(3).detach()
    program = torch.export.export(Program(ours), (x, y), strict=strict)
    close(program.module()(x + 1, y * 2), in_torch(x + 1, y * 2) * 2)


@OF_STRUCTURES
@STRICTNESS
def test_an_exported_program_is_decomposed(strict: bool) -> None:
    x, y = ramp(3).detach(), ramp(3).detach()
    program = torch.export.export(Program(ours), (x, y), strict=strict).run_decompositions()
    close(program.module()(x + 1, y * 2), in_torch(x + 1, y * 2) * 2)


@STRICTNESS
def test_an_exported_program_outlives_the_crossing(strict: bool) -> None:
    f = levels(tripled)
    x = ramp(3).detach()
    program = torch.export.export(Program(f), (x,), strict=strict)
    torch._dynamo.reset()
    del f
    gc.collect()
    close(program.module()(x), torch.sin(x) * 6)


@STRICTNESS
def test_an_exported_program_is_differentiated(strict: bool) -> None:
    """By whoever trains it further."""
    x, y = ramp(3), ramp(3)
    run = torch.export.export(Program(ours), (x, y), strict=strict).module()
    close(value_and_gradients(run, x, y), value_and_gradients(lambda x, y: in_torch(x, y) * 2, x, y))


@STRICTNESS
@pytest.mark.parametrize(("fn", "native", "args"), rows({n: SIZES[n] for n in SIZES if n != "several outputs"}))
def test_an_exported_program_of_any_size(fn: Fn, native: Fn, args: Fn, strict: bool) -> None:
    """A dimension that is declared dynamic stays so."""
    first, second = (tuple(x.detach() for x in args(n)) for n in (5, 8))
    shapes = [
        tuple(torch.export.Dim.AUTO if a != b else None for a, b in zip(x.shape, y.shape, strict=True))
        for x, y in zip(first, second, strict=True)
    ]
    program = torch.export.export(Program(levels(fn)), first, dynamic_shapes=(tuple(shapes),), strict=strict)
    for xs in (first, second):
        close(program.module()(*xs), native(*xs) * 2)


@STRICTNESS
def test_an_exported_program_of_named_sizes(strict: bool) -> None:
    """A `Dim` with a name and a range, shared by two arguments."""
    n = torch.export.Dim("n", min=2, max=64)
    f, x = levels(Sized.joined), ramp(5).detach()
    program = torch.export.export(Program(f), (x, x), dynamic_shapes=(({0: n}, {0: n}),), strict=strict)
    z = ramp(9).detach()
    close(program.module()(z, z), torch.cat([z, z * z]) * 2)
    assert list(program.range_constraints.values())[0].upper == 64


@STRICTNESS
@pytest.mark.parametrize("kind", ["lambda", "closure"])
def test_what_another_process_cannot_find_is_refused_when_it_is_saved(kind: str, strict: bool, tmp_path: Path) -> None:
    """By name."""
    fn = (lambda x: jnp.sin(x)) if kind == "lambda" else closure(3.0)
    with pytest.raises(Exception, match="lambda") as caught:
        torch.export.save(
            torch.export.export(Program(levels(fn)), (ramp(3).detach(),), strict=strict), tmp_path / "a.pt2"
        )
    assert is_ours(caught.value)


ERRORS = [
    name for name, kind in vars(interop).items() if isinstance(kind, type) and issubclass(kind, interop.InteropError)
]


def is_ours(error: BaseException | None) -> bool:
    """Whether it is an error of the library, or holds the text of one."""
    while error is not None:
        if isinstance(error, interop.InteropError) or any(name in str(error) for name in ERRORS):
            return True
        error = error.__cause__ or error.__context__
    return False


GUESTS_OF_TWO_PROCESSES = '''
"""What two processes import."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import torch

from interop import as_torch, differentiable, jittable


class Pair(NamedTuple):
    first: Any
    second: Any


@jittable
@differentiable
@as_torch
def function(x):
    return jnp.sin(x) * 3


@jittable
@as_torch
def not_differentiable(x):
    return jnp.sin(x) * 3


@jittable
@differentiable
@as_torch(static_argnames=("k",))
def statics(x, kind, k, scale=1.0):
    return {"sin": jnp.sin, "cos": jnp.cos}[kind](x) * len(range(k)) * scale


@jittable
@differentiable
@as_torch
def named(pair):
    return Pair(jnp.sin(pair.first), pair.second * 3)


@jittable
@differentiable
@as_torch
def concatenated(x):
    return jnp.concatenate([x, x * 2])


class Affine:
    def __init__(self, k):
        self.k = k

    @jittable
    @differentiable
    @as_torch
    def method(self, x):
        return jnp.sin(x) * self.k

    @staticmethod
    @jittable
    @differentiable
    @as_torch
    def static(x):
        return jnp.sin(x) * 3


affine = Affine(3.0)


def in_jax(x, k):
    return jnp.sin(x) * k


def by_numpy(x):
    return jnp.asarray(np.sin(np.asarray(x))) * 3


untraced = jittable(example_output=lambda x: x)(as_torch(by_numpy, jit=False))
undecorated = differentiable(jittable(as_torch(in_jax)))
partial = differentiable(jittable(as_torch(functools.partial(in_jax, k=3.0))))


class Inside(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return undecorated(x, self.weight)


class Program(torch.nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x)


N = torch.export.Dim("n", min=2)
three = lambda x: torch.sin(x) * 3
# a module, the same in torch, and what is known of the shapes
PROGRAMS = {
    "function": (Program(lambda x: function(x)), three, None),
    "function itself": (Program(function), three, None),
    "not differentiable": (Program(lambda x: not_differentiable(x)), three, None),
    "statics": (Program(lambda x: statics(x, "cos", 3, scale=2.0)), lambda x: torch.cos(x) * 6, None),
    "NamedTuple": (Program(lambda x: sum(named(Pair(x, x)))), lambda x: torch.sin(x) + x * 3, None),
    "method": (Program(lambda x: affine.method(x)), three, None),
    "static method": (Program(lambda x: Affine.static(x)), three, None),
    "a function that kept its name": (Program(lambda x: undecorated(x, 3.0)), three, None),
    "partial": (Program(lambda x: partial(x)), three, None),
    "not traced": (Program(lambda x: untraced(x)), three, None),
    "parameter": (Inside(), three, None),
    "batch": (Program(lambda x: torch.func.vmap(function)(x)), three, None),
    "any size": (Program(lambda x: concatenated(x)), lambda x: torch.cat([x, x * 2]), ({0: N},)),
}
'''

SAVES = """
import json, sys, torch, guests
told = {}
for name, (module, native, shapes) in guests.PROGRAMS.items():
    for strict in (False, True):
        torch._dynamo.reset()
        key = f"{name}-{strict}"
        try:
            program = torch.export.export(module, (torch.ones(3),), dynamic_shapes=shapes, strict=strict)
            torch.export.save(program, f"{key}.pt2")
            told[key] = "saved"
        except Exception as error:
            told[key] = f"{type(error).__name__}: {error}"
print(json.dumps(told))
"""

LOADS = """
import json, sys, torch, guests
from pathlib import Path
told = {}
for name, (module, native, shapes) in guests.PROGRAMS.items():
    for strict in (False, True):
        key = f"{name}-{strict}"
        if not Path(f"{key}.pt2").exists():
            continue
        x = torch.arange(5.0 if shapes else 3.0) + 0.5
        try:
            torch.testing.assert_close(torch.export.load(f"{key}.pt2").module()(x), native(x))
            told[key] = "right"
        except Exception as error:
            told[key] = f"{type(error).__name__}: {error}"
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def trip(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """What became of every program that one process saved and another loaded."""
    folder = tmp_path_factory.mktemp("trip")
    (folder / "guests.py").write_text(GUESTS_OF_TWO_PROCESSES)

    def run(program: str) -> dict[str, str]:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    saved = run(SAVES)
    loaded = run(LOADS)
    return {key: (told, loaded.get(key, "")) for key, told in saved.items()}


TRIPS = ["function", "function itself", "not differentiable", "statics", "NamedTuple", "method", "static method"]
TRIPS += ["a function that kept its name", "partial", "not traced", "parameter", "batch", "any size"]


@STRICTNESS
@pytest.mark.parametrize("name", TRIPS)
def test_an_exported_program_runs_in_another_process(name: str, strict: bool, trip: dict[str, tuple[str, str]]) -> None:
    """One that imports the same module."""
    assert trip[f"{name}-{strict}"] == ("saved", "right")


@pytest.mark.parametrize("fullgraph", [False, True])
def test_an_array_of_numpy_is_an_argument(fullgraph: bool) -> None:
    """One that is closed over, one that is given, and one that is made of a tensor."""
    times = levels(lambda x, y: x * y)
    array, x = np.array([1.0, 2.0, 3.0], np.float32), torch.ones(3)
    compiled = functools.partial(torch.compile, backend="aot_eager", fullgraph=fullgraph)
    assert compiled(lambda x: times(x, array))(x).tolist() == [1, 2, 3]
    assert compiled(lambda x, y: times(x, {"y": y}["y"]))(x, array).tolist() == [1, 2, 3]
    assert compiled(lambda x: times(x, x.numpy() * 3))(x).tolist() == [3, 3, 3]
    x.requires_grad_()
    compiled(lambda x: times(x, array).sum())(x).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 2, 3]


def test_no_two_processes_name_a_function_alike(run_python: Callable[..., str]) -> None:
    """Inductor keeps on disk what it compiled, and finds it by the text of a graph."""
    program = """
        import os, torch, jax.numpy as jnp
        from interop import as_torch, jittable

        def names():
            texts = []
            f = jittable(as_torch(lambda x: jnp.sin(x)))
            tell = lambda graph, _: texts.append(str(graph.graph)) or graph.forward
            torch.compile(lambda x: f(x), backend=tell, fullgraph=True)(torch.ones(3))
            from interop._in_torch import FLATS
            assert texts
            return FLATS.add(f._self_entry)

        print(names())
        read, write = os.pipe()
        if os.fork():
            print(os.read(read, 1000).decode())
        else:
            from interop._in_torch import FLATS
            os.write(write, FLATS.process.encode())
            os._exit(0)
    """
    first, second = (run_python(program).split()[-2:] for _ in range(2))
    assert len({*first, *second}) == 4


# --- older and other compilers ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def works_or_is_refused() -> Iterator[None]:
    """An error is one of ours, and says what to do instead."""
    try:
        yield
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, it is judged
        if isinstance(error, AssertionError):
            raise
        assert is_ours(error), repr(error)


@levels
def sine(x: jax.Array) -> jax.Array:
    """Annotated, as TorchScript asks of what it calls."""
    return jnp.sin(x)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("needs_grad", [False, True])
def test_traced_by_torch_jit(needs_grad: bool) -> None:
    x, y = ramp(3).detach().requires_grad_(needs_grad), ramp(3).detach()
    with works_or_is_refused():
        graph = torch.jit.trace(around(ours), (x, y))
        close(graph(x + 1, y * 2), around(in_torch)(x + 1, y * 2))


def scripted(x: torch.Tensor) -> torch.Tensor:
    """A caller that the compiler of TorchScript can read."""
    return sine(x) * 2


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_scripted_by_torch_jit() -> None:
    """A function is not; a caller is, and calls it in Python."""
    for refused in (levels(tripled), interop.WrappedJaxFunction(jnp.multiply, jnp.ones(3))):
        with pytest.raises(interop.UnsupportedError, match=r"torch\.export"):
            torch.jit.script(refused)
    x = ramp(3)
    close(value_and_gradients(torch.jit.script(scripted), x), value_and_gradients(lambda x: torch.sin(x) * 2, x))


class Scaled:
    """With a method of JAX's."""

    @levels
    def __call__(self, tree: dict[str, Any], *, power: int) -> dict[str, Any]:
        """A value of each leaf."""
        return {"first": tree["x"] ** power, "second": tree["y"] * 2}


def test_written_down_by_symbolic_trace() -> None:
    """One node of the graph, as an operation of torch is, whatever it takes; the parameters of a module are read."""
    scale = Scaled()
    nameless = levels(lambda x: jnp.sin(x))

    def caller(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = scale({"x": x, "y": y}, power=3)
        return ours(out["first"], out["second"]) + nameless(x)

    x, y = ramp(3), ramp(3)
    graph = torch.fx.symbolic_trace(caller)
    assert [node.op for node in graph.graph.nodes].count("call_function") == 6
    close(value_and_gradients(graph, x, y), value_and_gradients(caller, x, y))
    module = torch.nn.Sequential(interop.WrappedJaxFunction(lambda p, x: p["w"] * x, {"w": jnp.ones(3)}))
    traced = torch.fx.symbolic_trace(module)
    assert "get_attr" in [node.op for node in traced.graph.nodes]
    (gradient,) = grad(traced(x).sum(), tuple(module.parameters()))
    close((traced(x), gradient), (module(x), x.detach()))


@OF_STRUCTURES
def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    x, module = ramp(3).detach(), Program(levels(tripled))
    with works_or_is_refused():
        program = torch.export.export(module, (x,))
        package = aoti_compile_and_package(program, package_path=str(tmp_path / "a.pt2"))
        close(aoti_load_package(package)(x), torch.sin(x) * 6)


# --- modes ------------------------------------------------------------------------------------------------------------

AROUND: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("where", ["around the graph", "in the graph"])
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "autocast"])
def test_a_graph_under_a_mode(mode: str, where: str) -> None:
    """Whether a gradient is kept is the mode's, the dtype is the function's own."""

    def program(f: Fn) -> Fn:
        def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            with AROUND[mode]():
                return f(x, y)

        return run

    x, y = ramp(3), ramp(3)
    if where == "in the graph":
        got, expected = compiled(program(ours))(x, y), compiled(program(in_torch))(x, y)
    else:
        with AROUND[mode]():
            got, expected = compiled(ours)(x, y), compiled(in_torch)(x, y)
    close(got, expected)
    assert got.requires_grad is expected.requires_grad
    assert got.is_inference() is expected.is_inference()


def test_one_graph_under_every_mode() -> None:
    """It is asked in one after the other."""
    graph = compiled(around(ours))
    x, y = ramp(3), ramp(3)
    for _ in range(2):
        for mode in (torch.no_grad, torch.inference_mode, contextlib.nullcontext):
            with mode():
                got, expected = graph(x, y), around(in_torch)(x, y)
            close(got, expected)
            assert got.requires_grad is expected.requires_grad


@pytest.mark.parametrize(
    "crossing", [as_torch(in_jax), differentiable(as_torch(in_jax))], ids=["plain", "differentiable"]
)
def test_what_is_not_jittable_breaks_the_graph_and_works(crossing: Fn) -> None:
    x, y = ramp(3).detach(), ramp(3).detach()
    counter = CompileCounterWithBackend("aot_eager")
    graph = torch.compile(around(crossing), backend=counter)
    for _ in range(2):
        close(graph(x, y), around(in_torch)(x, y))
    assert counter.frame_count == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own, at its breaks
def test_a_graph_that_breaks_at_a_crossing_is_differentiated() -> None:
    x, y = ramp(3), ramp(3)
    graph = torch.compile(around(differentiable(as_torch(in_jax))), backend="aot_eager")
    close(value_and_gradients(graph, x, y), value_and_gradients(around(in_torch), x, y))


@pytest.mark.parametrize(
    "crossing", [as_torch(in_jax), differentiable(as_torch(in_jax))], ids=["plain", "differentiable"]
)
def test_what_is_not_jittable_is_named_under_fullgraph(crossing: Fn) -> None:
    with pytest.raises(Exception, match="@jittable"):
        compiled(around(crossing))(ramp(3).detach(), ramp(3).detach())


def test_what_is_not_differentiable_is_named() -> None:
    with pytest.raises(Exception, match="@differentiable"):
        compiled(around(jittable(as_torch(in_jax))))(ramp(3), ramp(3))


# --- 64 bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_double_is_exact_forward_and_backward(dynamic: bool | None) -> None:
    assert not jax.config.jax_enable_x64
    x, y = ramp(3, dtype=torch.float64), ramp(3, dtype=torch.float64)
    got = value_and_gradients(compiled(around(ours), dynamic=dynamic), x, y)
    close(got, value_and_gradients(around(in_torch), x, y), rtol=1e-12, atol=1e-12)
    assert not jax.config.jax_enable_x64


def test_a_double_beside_a_single() -> None:
    x, y = ramp(3, dtype=torch.float64), ramp(3)
    close(value_and_gradients(compiled(ours), x, y), value_and_gradients(lambda x, y: in_torch(x, y.double()), x, y))


def test_one_graph_for_each_width() -> None:
    graph = compiled(ours)
    for dtype in (torch.float32, torch.float64, torch.float32):
        x, y = ramp(3, dtype=dtype), ramp(3, dtype=dtype)
        close(value_and_gradients(graph, x, y), value_and_gradients(in_torch, x, y))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_an_integer_that_does_not_fit_is_named(backend: str) -> None:
    """When the graph runs, with the values."""
    graph = compiled(levels(lambda a: a * 1), backend=backend)
    assert graph(torch.tensor([5])).tolist() == [5]
    with pytest.raises(OverflowError, match=str(2**40 + 1)):
        graph(torch.tensor([2**40 + 1]))
    assert graph(torch.tensor([7])).tolist() == [7]


def test_a_python_integer_that_does_not_fit_is_named() -> None:
    f = levels(lambda x, k: x * k)
    with pytest.raises(Exception, match=str(2**40 + 1)):
        compiled(lambda x: f(x, 2**40 + 1))(torch.ones(2, dtype=torch.int32))


def test_an_integer_beside_a_double_is_whole() -> None:
    f, k = levels(lambda x, k: x * k), torch.tensor(2**40 + 1)
    x = ramp(3, dtype=torch.float64)
    close(value_and_gradients(lambda x: compiled(f)(x, k), x), value_and_gradients(lambda x: x * k, x))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_complex_gradient(dtype: torch.dtype) -> None:
    def gradient(f: Fn) -> Any:
        z = torch.tensor([1 + 2j, 0.5 - 1j], dtype=dtype, requires_grad=True)
        out = f(z)
        return out.detach(), grad((out.real * 2 + out.imag * 3).sum(), z)

    close(gradient(compiled(levels(lambda z: z * jnp.conj(z) + z**2))), gradient(lambda z: z * torch.conj(z) + z**2))


# --- functions that raise ---------------------------------------------------------------------------------------------


class Custom(Exception):
    """Of the user's program."""


class Fuse:
    """Whether the function raises."""

    lit = False


def fused(x: Any) -> Any:
    """A JAX function that raises while the fuse is lit."""
    if Fuse.lit:
        raise Custom("mine")
    return x**3


RAISING: dict[str, Callable[[Fn, torch.Tensor], Any]] = {
    "compiled": lambda f, x: compiled(f)(x),
    "compiled with a gradient": lambda f, x: value_and_gradients(compiled(f), x),
    "compiled with changing sizes": lambda f, x: compiled(f, dynamic=True)(x),
    "make_fx": lambda f, x: make_fx(f, tracing_mode="symbolic")(x.detach())(x.detach()),
    "export": lambda f, x: torch.export.export(Program(f), (x.detach(),)).module()(x.detach()),
}


@pytest.mark.parametrize("ask", rows(RAISING))
def test_an_error_of_the_function_is_told_and_the_next_call_works(
    ask: Callable[[Fn, torch.Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its type and its message are in what is raised."""
    f, x = levels(fused), ramp(3)
    monkeypatch.setattr(Fuse, "lit", True)
    for _ in range(2):
        with pytest.raises(Exception) as caught:
            ask(f, x)
        assert caught.type is Custom or "Custom" in str(caught.value)
        assert "mine" in str(caught.value)
    monkeypatch.setattr(Fuse, "lit", False)
    close(ask(f, x), ask(lambda x: x**3, x))


def test_an_error_of_jax_is_told() -> None:
    """Shapes that do not go together."""
    f = levels(lambda a, b: a @ b)
    with pytest.raises(Exception, match="dot_general"):
        compiled(f)(ramp(2), ramp(3))


def test_a_wrong_call_is_told() -> None:
    """Python's own error, under the function's name."""
    with pytest.raises(Exception, match=r"in_jax\(\) missing a required argument|in_jax\(\) missing 1 required"):
        compiled(lambda x: ours(x))(ramp(3))


# --- again and again --------------------------------------------------------------------------------------------------


class Counted:
    """A JAX function that counts how often it is traced."""

    def __init__(self, fn: Fn) -> None:
        self.fn = fn
        self.traces = 0

    def __call__(self, *args: Any) -> Any:
        """Count and run."""
        self.traces += 1
        return self.fn(*args)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_a_graph_that_is_called_again_traces_nothing(with_gradient: bool) -> None:
    f = Counted(in_jax)
    counter = CompileCounterWithBackend("aot_eager")
    graph = compiled(around(levels(f)), backend=counter)

    def run() -> None:
        x, y = ramp(3), ramp(3)
        if with_gradient:
            value_and_gradients(graph, x, y)
        else:
            graph(x.detach(), y.detach())

    run()
    warm = f.traces
    for _ in range(50):
        run()
    assert warm >= 1
    assert f.traces == warm
    assert counter.frame_count == 1


def test_a_graph_that_is_made_again_infers_nothing_again() -> None:
    """Two callers share what is known of the function."""
    f = Counted(in_jax)
    g = levels(f)
    x, y = ramp(3).detach(), ramp(3).detach()
    compiled(around(g))(x, y)
    warm = f.traces
    compiled(lambda x, y: g(x, y) * 2)(x, y)
    assert f.traces == warm


def test_graphs_that_are_made_again_do_not_pile_up() -> None:
    """What was interned for a graph goes with it."""

    def once() -> weakref.ref[Any]:
        f = Counted(in_jax)
        compiled(around(levels(f)))(ramp(3).detach(), ramp(3).detach())
        torch._dynamo.reset()
        return weakref.ref(f)

    gone = [once() for _ in range(3)]
    jax.clear_caches()
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
