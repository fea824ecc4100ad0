"""What a checker knows of a JAX function in torch. Every line also runs, and the value has the type that is asserted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypedDict, TypeVar

import jax
import jax.numpy as jnp
import torch
from jax import Array
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import assert_type

from interop import Crossed, SupportsTorch, as_jax, as_torch, differentiable, jittable

t, a = torch.ones(3), jnp.ones(3)
A = TypeVar("A")


@dataclass
class State(Generic[A]):
    x: A
    v: A

    def __interop_torch__(self) -> State[Tensor]:
        raise NotImplementedError


class Pair(NamedTuple, Generic[A]):
    first: A
    second: A

    def __interop_torch__(self) -> Pair[Tensor]:
        raise NotImplementedError


# --- results ----------------------------------------------------------------------------------------------------------


def nothing(x: Array) -> None: ...
def array(x: Array) -> Array:
    return x


def optional(x: Array, give: bool = True) -> Array | None:
    return x if give else None


def two(x: Array, y: Array) -> tuple[Array, Array]:
    return x, y


def three(x: Array) -> tuple[Array, Array, Array]:
    return x, x, x


def four(x: Array) -> tuple[Array, Array, Array, Array]:
    return x, x, x, x


def any_number(x: Array) -> tuple[Array, ...]:
    return x, x


def listed(x: Array) -> list[Array]:
    return [x]


def named(x: Array) -> dict[str, Array]:
    return {"x": x}


def carry(x: Array) -> tuple[Array, tuple[Array, Array]]:
    return x, (x, x)


def with_list(x: Array) -> tuple[Array, list[Array]]:
    return x, [x]


def with_names(x: Array) -> tuple[Array, dict[str, Array]]:
    return x, {"x": x}


def names_first(x: Array) -> tuple[dict[str, Array], Array]:
    return {"x": x}, x


def two_dicts(x: Array) -> tuple[dict[str, Array], dict[int, Array]]:
    return {"x": x}, {0: x}


def with_number(x: Array) -> tuple[Array, int]:
    return x, 3


def with_text(x: Array) -> tuple[Array, str | None]:
    return x, "s"


def names_and_number(x: Array) -> tuple[dict[str, Array], float]:
    return {"x": x}, 2.5


def pairs(x: Array) -> list[tuple[Array, Array]]:
    return [(x, x)]


def lists(x: Array) -> list[list[Array]]:
    return [[x]]


def records(x: Array) -> list[dict[str, Array]]:
    return [{"x": x}]


def named_pairs(x: Array) -> dict[str, tuple[Array, Array]]:
    return {"x": (x, x)}


def named_lists(x: Array) -> dict[str, list[Array]]:
    return {"x": [x]}


def layers(x: Array) -> dict[str, dict[str, Array]]:
    return {"l": {"w": x}}


def number(x: Array) -> int:
    return x.ndim


def state(x: Array) -> State[Array]:
    return State(x, x)


def pair(x: Array) -> Pair[Array]:
    return Pair(x, x)


def with_state(x: Array) -> tuple[Array, State[Array]]:
    return x, State(x, x)


assert_type(as_torch(nothing)(t), None)
assert_type(as_torch(array)(t), Tensor)
assert_type(as_torch(optional)(t), Tensor | None)
assert_type(as_torch(two)(t, t), tuple[Tensor, Tensor])
assert_type(as_torch(three)(t), tuple[Tensor, Tensor, Tensor])
assert_type(as_torch(four)(t), tuple[Tensor, Tensor, Tensor, Tensor])
assert_type(as_torch(any_number)(t), tuple[Tensor, ...])
assert_type(as_torch(listed)(t), list[Tensor])
assert_type(as_torch(named)(t), dict[str, Tensor])
assert_type(as_torch(carry)(t), tuple[Tensor, tuple[Tensor, Tensor]])
assert_type(as_torch(with_list)(t), tuple[Tensor, list[Tensor]])
assert_type(as_torch(with_names)(t), tuple[Tensor, dict[str, Tensor]])
assert_type(as_torch(names_first)(t), tuple[dict[str, Tensor], Tensor])
assert_type(as_torch(two_dicts)(t), tuple[dict[str, Tensor], dict[int, Tensor]])
assert_type(as_torch(with_number)(t), tuple[Tensor, int])
assert_type(as_torch(with_text)(t), tuple[Tensor, str | None])
assert_type(as_torch(names_and_number)(t), tuple[dict[str, Tensor], float])
assert_type(as_torch(pairs)(t), list[tuple[Tensor, Tensor]])
assert_type(as_torch(lists)(t), list[list[Tensor]])
assert_type(as_torch(records)(t), list[dict[str, Tensor]])
assert_type(as_torch(named_pairs)(t), dict[str, tuple[Tensor, Tensor]])
assert_type(as_torch(named_lists)(t), dict[str, list[Tensor]])
assert_type(as_torch(layers)(t), dict[str, dict[str, Tensor]])
assert_type(as_torch(number)(t), int)
assert_type(as_torch(state)(t), State[Tensor])
assert_type(as_torch(pair)(t), Pair[Tensor])
assert_type(as_torch(pair)(t).second, Tensor)
assert_type(as_torch(with_state)(t), tuple[Tensor, State[Tensor]])


# --- parameters -------------------------------------------------------------------------------------------------------


@as_torch
def options(x: Array, n: int = 3, *, mask: Array | None = None) -> Array:
    return x * n if mask is None else x * mask


@as_torch
def stars(*xs: Array, **named: Array) -> Array:
    return sum(named.values(), xs[0])


@as_torch
def shaped(x: Float[Array, "n"]) -> tuple[Float[Array, "n"], Int[Array, ""]]:
    return x, jnp.argmax(x)


assert_type(options(t), Tensor)
assert_type(options(x=t, n=4, mask=t), Tensor)
assert_type(stars(t, t, b=t), Tensor)
assert_type(shaped(t), tuple[Tensor, Tensor])
one_to_one: Callable[[Tensor], Tensor] = options
two_to_two: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = as_torch(two)
declared: Crossed[[Array], Tensor] = as_torch(array)
twin: SupportsTorch[State[Tensor]] = State(a, a)


# --- a signature ------------------------------------------------------------------------------------------------------


def stub(x: Tensor, n: int = 3, *, mask: Tensor | None = None) -> tuple[Tensor, int]:
    raise NotImplementedError


@as_torch(signature=stub, static_argnames="n")
def exact(x: Array, n: int = 3, *, mask: Array | None = None) -> tuple[Array, int]:
    return x, n


assert_type(exact(t), tuple[Tensor, int])
assert_type(exact(x=t, n=2, mask=t), tuple[Tensor, int])
assert_type(as_torch(with_number, signature=stub)(t), tuple[Tensor, int])


# --- decorators in any order, with and without options ----------------------------------------------------------------


@as_torch
@differentiable
@jittable
def order_1(x: Array) -> Array:
    return x


@jittable
@differentiable
@as_torch
def order_2(x: Array) -> Array:
    return x


@differentiable
@as_torch
@jittable
def order_3(x: Array) -> Array:
    return x


@differentiable
@jittable
@as_torch
def order_4(x: Array) -> Array:
    return x


@jittable
@as_torch
@differentiable
def order_5(x: Array) -> Array:
    return x


@as_torch
@jittable
@differentiable
def order_6(x: Array) -> Array:
    return x


@jittable(example_output=a)
@differentiable(nondiff_argnames="n")
@as_torch(static_argnames=("n",))
def with_options(x: Array, n: int = 1) -> Array:
    return x


@differentiable
@as_torch(signature=stub, static_argnames="n")
@jittable
def with_signature(x: Array, n: int = 3, *, mask: Any = None) -> Any:
    return x, n


assert_type(order_1(t), Tensor)
assert_type(order_2(t), Tensor)
assert_type(order_3(t), Tensor)
assert_type(order_4(t), Tensor)
assert_type(order_5(t), Tensor)
assert_type(order_6(t), Tensor)
assert_type(with_options(t, n=2), Tensor)
assert_type(with_signature(t), tuple[Tensor, int])
assert_type(as_torch(two, jit=False)(t, t), tuple[Tensor, Tensor])
assert_type(as_torch(jit=False)(named)(t), dict[str, Tensor])
assert_type(as_torch()(state)(t), State[Tensor])


# --- what can be decorated --------------------------------------------------------------------------------------------


class Model:
    scale = 2.0

    @as_torch
    def method(self, x: Array) -> Array:
        return x * self.scale

    @differentiable
    @as_torch
    def pair(self, x: Array) -> tuple[Array, Array]:
        return x, x

    @as_torch
    @staticmethod
    def static(x: Array) -> Array:
        return x

    @staticmethod
    @as_torch
    def static_outside(x: Array) -> Array:
        return x

    @as_torch
    @classmethod
    def of_class(cls, x: Array) -> Array:
        return x * cls.scale

    @classmethod
    @as_torch
    def of_class_outside(cls, x: Array) -> Array:
        return x * cls.scale

    @differentiable
    @as_torch
    @jittable
    @classmethod
    def stacked(cls, x: Array) -> dict[str, Array]:
        return {"x": x}

    def __call__(self, x: Array, n: int) -> Array:
        return x * n


def stub_of_method(self: Exact, x: Tensor) -> Tensor:
    raise NotImplementedError


class Exact:
    @as_torch(signature=stub_of_method)
    def method(self, x: Array) -> Array:
        return x


assert_type(Model().method(t), Tensor)
assert_type(Exact().method(t), Tensor)
assert_type(Exact.method(Exact(), x=t), Tensor)
assert_type(Model.method(Model(), t), Tensor)
assert_type(Model().pair(t), tuple[Tensor, Tensor])
assert_type(Model.static(t), Tensor)
assert_type(Model().static(t), Tensor)
assert_type(Model.static_outside(t), Tensor)
assert_type(Model.of_class(t), Tensor)
assert_type(Model().of_class(t), Tensor)
assert_type(Model.of_class_outside(t), Tensor)
assert_type(Model.stacked(t), dict[str, Tensor])
assert_type(as_torch(Model())(t, 1), Tensor)
assert_type(as_torch(Model().__call__)(t, 1), Tensor)
assert_type(as_torch(functools.partial(two, y=a))(t), tuple[Tensor, Tensor])
assert_type(as_torch(functools.partial(optional, give=False))(t), Tensor | None)
assert_type(as_jax(as_torch(array))(a), Array)


# --- limits: where the type is less than the value's ------------------------------------------------------------------


class Fields(TypedDict):
    x: Array


class OnlyArrays(NamedTuple):
    x: Array


@dataclass
class Plain:
    x: Array


X = TypeVar("X", Array, Tensor)


def fields(x: Array) -> Fields:
    return {"x": x}


def only_arrays(x: Array) -> OnlyArrays:
    return OnlyArrays(x)


def plain(x: Array) -> Plain:
    return Plain(x)


def deep(x: Array) -> tuple[Array, list[dict[str, Array]]]:
    return x, [{"x": x}]


def generic(x: X, n: int = 2) -> X:
    return x * n


@as_torch
@jax.jit
def jitted(x: Array) -> Array:
    return x


assert_type(as_torch(fields)(t), Any)
assert_type(as_torch(only_arrays)(t), tuple[Tensor, ...])  # its field x is a tensor
assert_type(as_torch(plain)(t), Any)
assert_type(as_torch(deep)(t), tuple[Tensor, Any])
assert_type(as_torch(lambda x: x)(t), Any)
assert_type(jitted(t), Any)  # a jitted function has no types
of_both: Tensor = as_torch(generic)(t)  # Any to pyright, a Tensor to mypy
assert_type(differentiable(generic)(a, n=3), Array)
