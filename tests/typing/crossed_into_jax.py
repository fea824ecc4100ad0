"""What a checker knows of a torch function in JAX, of values, and of modules. Every line runs, as in the mirror."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen
from jax import Array
from jaxtyping import Float
from torch import Tensor
from typing_extensions import assert_type

from interop import (
    Crossed,
    SupportsJax,
    WrappedJaxFunction,
    WrappedJaxScalarFunction,
    as_jax,
    as_torch,
    differentiable,
    jax_to_torch,
    jittable,
    make_functional,
    torch_module_to_jax,
    torch_to_jax,
)

t, a = torch.ones(3), jnp.ones(3)
A = TypeVar("A")


@dataclass
class State(Generic[A]):
    x: A

    def __interop_torch__(self) -> State[Tensor]:
        raise NotImplementedError

    def __interop_jax__(self) -> State[Array]:
        raise NotImplementedError


class Pair(NamedTuple, Generic[A]):
    first: A
    second: A

    def __interop_torch__(self) -> Pair[Tensor]:
        raise NotImplementedError

    def __interop_jax__(self) -> Pair[Array]:
        raise NotImplementedError


# --- functions --------------------------------------------------------------------------------------------------------


def tensor(x: Tensor, n: int = 1) -> Tensor:
    return x * n


def optional(x: Tensor) -> Tensor | None:
    return x


def two(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x, y


def named(x: Tensor) -> dict[str, Tensor]:
    return {"x": x}


def listed(x: Tensor) -> list[Tensor]:
    return [x]


def with_number(x: Tensor) -> tuple[Tensor, float]:
    return x, 2.5


def layers(x: Tensor) -> dict[str, dict[str, Tensor]]:
    return {"l": {"w": x}}


def state(x: Tensor) -> State[Tensor]:
    return State(x)


def pair(x: Tensor) -> Pair[Tensor]:
    return Pair(x, x)


def stub(x: Array, *, n: int = 1) -> Array:
    raise NotImplementedError


@jittable
@as_jax
@differentiable
def stacked(x: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    return x


@as_jax(signature=stub)
def exact(x: Tensor, *, n: int = 1) -> Tensor:
    return x * n


@as_jax(rng="key", vmap="sequential")
def noisy(x: Tensor) -> Tensor:
    return x + torch.rand_like(x)


assert_type(as_jax(tensor)(a, 2), Array)
assert_type(as_jax(optional)(a), Array | None)
assert_type(as_jax(two)(a, a), tuple[Array, Array])
assert_type(as_jax(named)(a), dict[str, Array])
assert_type(as_jax(listed)(a), list[Array])
assert_type(as_jax(with_number)(a), tuple[Array, float])
assert_type(as_jax(layers)(a), dict[str, dict[str, Array]])
assert_type(as_jax(state)(a), State[Array])
assert_type(as_jax(pair)(a).first, Array)
assert_type(stacked(a), Array)
assert_type(exact(a, n=2), Array)
assert_type(noisy(a, key=jax.random.key(0)), Array)
assert_type(as_jax(torch.sin)(a), Array)
assert_type(as_jax(functools.partial(two, y=t))(a), tuple[Array, Array])
assert_type(as_torch(as_jax(named))(t), dict[str, Tensor])
of_a_function: Callable[[Array], Array] = as_jax(tensor)
declared: Crossed[[Tensor, int], Array] = as_jax(tensor)
twin: SupportsJax[State[Array]] = State(t)


# --- values -----------------------------------------------------------------------------------------------------------

assert_type(jax_to_torch(a), Tensor)
assert_type(torch_to_jax(t, copy=True), Array)
assert_type(jax_to_torch((a, a)), tuple[Tensor, Tensor])
assert_type(jax_to_torch({"x": a}), dict[str, Tensor])
assert_type(jax_to_torch([a]), list[Tensor])
assert_type(jax_to_torch({"x": {"w": a}}), dict[str, dict[str, Tensor]])
assert_type(jax_to_torch((a, 3)), tuple[Tensor, int])
assert_type(jax_to_torch(State(a)), State[Tensor])
assert_type(jax_to_torch(Pair(a, a)), Pair[Tensor])
assert_type(torch_to_jax(State(t)), State[Array])
assert_type(torch_to_jax([(t, t)]), list[tuple[Array, Array]])
assert_type(torch_to_jax(torch.device("cpu")).platform, str)
assert_type(jax_to_torch(torch_to_jax(torch.device("cpu"))), torch.device)
assert_type(torch_to_jax(torch.float32), np.dtype[Any])
assert_type(jax_to_torch(np.dtype("float32")), torch.dtype)
assert_type(jax_to_torch(3), int)
assert_type(torch_to_jax("s"), str)
assert_type(jax_to_torch(t), Tensor)
assert_type(torch_to_jax(two)(a, a), tuple[Array, Array])


# --- torch modules ----------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def forward(self, x: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        return x, x * k


def stub_of_module(params: dict[str, Array], x: Array) -> tuple[Array, dict[str, Array]]:
    raise NotImplementedError


linear = torch.nn.Linear(3, 2)
apply, params = make_functional(linear)
renewing, _ = make_functional(linear, mutable=True)
by_position, values = torch_module_to_jax(linear)

assert_type(params, dict[str, Array])
assert_type(apply(params, a), Array)
assert_type(renewing(params, a), tuple[Array, dict[str, Array]])
assert_type(values, tuple[Array, ...])
assert_type(by_position(values, a), Array)
assert_type(torch_to_jax(linear)[1], dict[str, Array])
assert_type(as_jax(linear)(params, a), Array)
assert_type(as_jax(linear, mutable=True)(params, a), tuple[Array, dict[str, Array]])
assert_type(as_jax(mutable=True)(linear)(params, a), tuple[Any, dict[str, Array]])
assert_type(as_jax(Net())({}, a, k=2), tuple[Array, Array])
assert_type(differentiable(as_jax(linear))(params, a), Array)
assert_type(as_jax(linear, signature=stub_of_module, mutable=True)(params, a), tuple[Array, dict[str, Array]])


# --- JAX functions and models as torch modules ------------------------------------------------------------------------


class Scale(equinox.Module):
    w: Array

    def __call__(self, x: Array) -> Array:
        return self.w * x


def product(w: Array, x: Array, flag: bool = False) -> Array:
    return w * x


def loss(w: Array, x: Array) -> tuple[Array, dict[str, Array]]:
    return (w * x).sum(), {"x": x}


def counted(w: Array, n: Array, x: Array) -> tuple[Array, Array]:
    return w * x, n + 1


dense = linen.Dense(2)
module = WrappedJaxFunction(product, a)
assert_type(module(t, flag=True), Tensor)
assert_type(module.eval()(t), Tensor)
assert_type(WrappedJaxFunction(jax_function=product, jax_params=a, clone_params=False)(t), Tensor)
assert_type(WrappedJaxFunction(loss, a, has_aux=True)(t), tuple[Tensor, dict[str, Tensor]])
assert_type(WrappedJaxScalarFunction(loss, a)(t), tuple[Tensor, dict[str, Tensor]])
assert_type(WrappedJaxFunction(counted, a, state=jnp.zeros(()))(t), Tensor)
assert_type(WrappedJaxFunction(Scale(a))(t), Tensor)
assert_type(WrappedJaxFunction(dense, dense.init(jax.random.key(0), a))(t), Tensor)


class Frozen(WrappedJaxFunction):
    """A class of a user, who says nothing of its types."""


def shared(module: WrappedJaxFunction[..., Tensor]) -> Tensor:
    return module(t)


assert_type(shared(module), Tensor)
assert_type(Frozen(product, a)(t), Any)


# --- limits -----------------------------------------------------------------------------------------------------------

bound = jax_to_torch(Scale(a))
untyped, untyped_params = make_functional(torch.nn.Sequential(linear))

assert_type(bound(t), Tensor)  # a WrappedJaxFunction; no checker tells a callable pytree from a function
assert_type(WrappedJaxFunction(loss, a, True)(t), Any)  # its options by position
assert_type(untyped(untyped_params, a), Any)  # its forward has no types
assert_type(jax_to_torch(jax.devices()[0]), Any)  # JAX's devices have none either
assert_type(jax_to_torch([a, 3]), list[Any])
