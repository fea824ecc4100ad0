"""A physics-informed network: torch computes it, JAX takes its second derivatives, and trains through them.

It learns to solve Poisson's equation on the unit square, where the solution is known.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
import torch
from tqdm import trange

from interop import make_functional

torch.set_num_threads(1)
torch.manual_seed(0)


class Solution(torch.nn.Module):
    """A network of the point f32[2], zero on the edges of the square."""

    def __init__(self) -> None:
        super().__init__()
        layers = [torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32), torch.nn.Tanh()]
        self.net = torch.nn.Sequential(*layers, torch.nn.Linear(32, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Its value there, a scalar."""
        return (4 * x * (1 - x)).prod(-1) * self.net(x).squeeze(-1)


u, params = make_functional(Solution())


def exact(x: jax.Array) -> jax.Array:
    """The solution for the source below."""
    return jnp.sin(jnp.pi * x).prod(-1)


def residual(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """By how much the network misses the equation at a point."""
    laplacian = jnp.trace(jax.hessian(u, argnums=1)(params, x))
    return laplacian + 2 * jnp.pi**2 * exact(x)


STEPS = 300
optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, STEPS))


@jax.jit
def step(params, state, key):
    def loss(params):
        points = jax.random.uniform(key, (128, 2))
        return jnp.mean(jax.vmap(residual, in_axes=(None, 0))(params, points) ** 2)

    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state, value


state = optimizer.init(params)
for i in (bar := trange(STEPS, desc="solving")):
    params, state, value = step(params, state, jax.random.key(i))
    bar.set_postfix(loss=f"{value:.4f}")

grid = jnp.stack(jnp.meshgrid(*2 * [jnp.linspace(0, 1, 65)], indexing="ij"), -1)
found, error = u(params, grid), jnp.abs(u(params, grid) - exact(grid))
print(f"the largest error is {error.max():.1e} of a solution of size 1")

figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
for panel, values, title in zip(panels, (found, error), ("what the network learned", "its error"), strict=True):
    picture = panel.imshow(values.T, origin="lower", extent=(0, 1, 0, 1))
    figure.colorbar(picture, ax=panel)
    panel.set_title(title)
figure.savefig(Path(__file__).parent / "pictures" / "pinn_torch_net.png", dpi=80)
assert error.max() < 0.01
