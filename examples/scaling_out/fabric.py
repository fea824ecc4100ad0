"""A JAX model trained by Lightning Fabric in two processes."""

import jax
import jax.numpy as jnp
import torch
from lightning_fabric import Fabric

from interop import WrappedJaxFunction

torch.set_num_threads(1)
x = torch.linspace(-2, 2, 64)[:, None]


def model():
    w, v = jax.random.normal(jax.random.key(0), (1, 16)), jax.random.normal(jax.random.key(1), (16, 1)) / 4
    return WrappedJaxFunction(lambda params, x: jnp.tanh(x @ params["w"]) @ params["v"], {"w": w, "v": v})


def train(fabric):
    net = model()
    parallel, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), 0.03))
    for _ in range(200):
        optimizer.zero_grad()
        mine = x[fabric.global_rank :: fabric.world_size]
        loss = (parallel(mine) - torch.sin(mine)).square().mean()
        fabric.backward(loss)
        optimizer.step()
    error = float((net(x) - torch.sin(x)).square().mean())
    assert fabric.world_size == 2 and error < 0.01
    print(f"process {fabric.global_rank}: sin(x) within {error:.4f}")


if __name__ == "__main__":
    Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn").launch(train)
