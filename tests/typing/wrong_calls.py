"""What a checker refuses: each line with a mark is an error in both, and without an error the mark is one."""
# mypy: warn-unused-ignores
# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import torch
from jax import Array
from torch import Tensor

from interop import (
    WrappedJaxFunction,
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


def stub(x: Tensor, n: int = 3, *, mask: Tensor | None = None) -> Tensor:
    raise NotImplementedError


def scaled(x: Array, n: int = 3, *, mask: Array | None = None) -> Array:
    return x * n


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x


exact = as_torch(signature=stub)(scaled)
stacked = jittable(differentiable(as_torch(scaled, signature=stub)))
loose = as_torch(scaled)
apply, params = make_functional(torch.nn.Linear(3, 2))
module = WrappedJaxFunction(lambda w, x: w * x, a)


def with_a_signature_the_arguments_are_checked() -> None:
    exact(t, "s")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    exact(a)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    exact(t, q=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    exact()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    exact(t, 3, t)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    exact(t, mask=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    stacked("x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    stacked(t).block_until_ready()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def a_result_is_of_the_host() -> None:
    loose(t).block_until_ready()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    as_jax(halves)(a)[0].backward()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    as_jax(halves)(a)[2]  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
    apply(params, a).backward()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    jax_to_torch({"x": a})["x"].at[0]  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    torch_to_jax([t]).backward()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    params[0]  # type: ignore[index]  # pyright: ignore[reportArgumentType]
    kept: Callable[[Tensor], Array] = loose  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    del kept


def what_is_no_function_is_refused() -> None:
    as_torch(3)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    as_jax("f")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    differentiable(a)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    make_functional(scaled)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    torch_module_to_jax(jax.jit(scaled))  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]


def an_unknown_option_is_refused() -> None:
    as_torch(scaled, rng="key")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    as_torch(jit="no")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    as_jax(vmap=1)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    torch_to_jax(t, clone=True)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    WrappedJaxFunction(scaled, a, states=a)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


def limits() -> None:
    """Accepted, and wrong when it runs: the arguments of a crossing without a signature, of one from options too."""
    loose()
    loose(a, "s", q=1)
    module("s")
    as_torch(jit=False)(scaled, jit=True)
