"""A torch layer in `jax.shard_map`: each of two devices computes its half of the batch, and the gradient is summed."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"  # two CPU devices in one process

import jax
import jax.numpy as jnp
import torch
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from interop import as_jax, differentiable, jittable

torch.set_num_threads(1)
rows = []


@jittable
@differentiable
@as_jax
def layer(w, x):
    rows.append(len(x))
    return torch.tanh(x @ w)


def loss(w, x):
    return jax.lax.psum((layer(w, x) ** 2).sum(), "batch")


if __name__ == "__main__":
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
    w, x = jax.random.normal(jax.random.key(0), (3, 5)), jax.random.normal(jax.random.key(1), (16, 3))
    sharded = jax.shard_map(loss, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P())
    value, gradient = jax.jit(jax.value_and_grad(sharded))(w, x)
    expected = jax.value_and_grad(lambda w: (jnp.tanh(x @ w) ** 2).sum())(w)
    assert jnp.allclose(value, expected[0], rtol=1e-5) and jnp.allclose(gradient, expected[1], rtol=1e-4, atol=1e-5)
    assert 16 not in rows, "no device has the whole batch"
    print(f"loss {value:.3f}, each device with {rows[-1]} rows of 16")
