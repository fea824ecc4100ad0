"""What an installation has to do, with the run-time packages alone: `make smoke`."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import torch

import interop
from interop import WrappedJaxFunction, as_jax, as_torch, differentiable, jittable, make_functional

OPTIONAL = {"flax", "equinox", "haiku", "optax", "tensordict", "transformers", "jaxtyping", "scipy", "matplotlib"}


def main() -> None:
    """Both directions: values, derivatives, batches, compilation, models."""
    in_torch = jittable(differentiable(as_torch(lambda x: jnp.sum(jnp.sin(x)))))
    x = torch.linspace(0, 1, 8, requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(in_torch(x), x)[0], x.cos())
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(in_torch))(x[:, None])[:, 0], x.cos())
    torch.testing.assert_close(torch.func.hessian(in_torch)(x), torch.diag(-x.sin()))
    compiled = torch.compile(in_torch, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], x.cos())

    in_jax = jittable(differentiable(as_jax(lambda x: torch.sin(x).sum())))
    y = jnp.linspace(0, 1, 8)
    assert jnp.allclose(jax.jit(jax.grad(in_jax))(y), jnp.cos(y), atol=1e-6)
    assert jnp.allclose(jax.vmap(jax.grad(in_jax))(y), jnp.cos(y), atol=1e-6)
    assert jnp.allclose(jax.hessian(in_jax)(y), jnp.diag(-jnp.sin(y)), atol=1e-6)

    apply, params = make_functional(torch.nn.Linear(8, 1))
    assert jax.jit(jax.grad(lambda params: apply(params, y).sum()))(params)["weight"].shape == (1, 8)
    module = WrappedJaxFunction(lambda w, x: x @ w, jnp.ones(8))
    module(x).backward()
    assert torch.equal(module.get_parameter("params.0").grad, x)

    assert str(interop.explain(in_torch, x))
    brought = sorted(OPTIONAL & set(sys.modules))
    assert not brought, f"imported though nobody asked: {brought}"
    print(f"interop {interop.__version__} works, from {interop.__file__}")


if __name__ == "__main__":
    main()
