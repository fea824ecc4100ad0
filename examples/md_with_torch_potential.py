"""Molecular dynamics in JAX with a potential of torch: Lennard-Jones, and a network of the distances.

The forces are its gradient, the flight of the atoms is one `lax.scan`, the vibrations are in its Hessian.
"""

from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import torch
from tqdm import trange

from interop import jax_to_torch, make_functional

torch.set_num_threads(1)
torch.manual_seed(0)
jax.config.update("jax_enable_x64", True)
DT = 0.005


class Potential(torch.nn.Sequential):
    """The energy of atoms at f64[n,3], with a network of the distance of each pair."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        i, j = torch.triu_indices(len(x), len(x), 1)
        r = (x[i] - x[j]).norm(dim=-1, keepdim=True)
        return (4 * (r**-12 - r**-6) + 0.1 * super().forward(r) * torch.exp(-r)).sum()


potential = Potential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()
energy, params = make_functional(potential)
force = jax.grad(lambda x: -energy(params, x))


@jax.jit
def move(x: jax.Array, v: jax.Array, friction: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """100 steps of velocity Verlet; the kinetic and the potential energy after each."""

    def step(state, _):
        x, v, f = state
        v = v + DT / 2 * f
        x = x + DT * v
        f = force(x)
        v = (1 - friction) * (v + DT / 2 * f)
        return (x, v, f), jnp.stack([(v**2).sum() / 2, energy(params, x)])

    (x, v, _), energies = jax.lax.scan(step, (x, v, force(x)), length=100)
    return x, v, energies


rest = 1.2 * jnp.array(list(product(range(2), repeat=3)), float)  # the corners of a cube, until they are cooled
v = 0.3 * jax.random.normal(jax.random.key(0), rest.shape)
for _ in trange(25, desc="cooling"):
    rest, v, _ = move(rest, v, 0.03)
hessian = jax.hessian(energy, argnums=1)(params, rest)
error = abs(hessian - torch.autograd.functional.hessian(potential, jax_to_torch(rest)).numpy()).max()
stiffness = jnp.linalg.eigvalsh(hessian.reshape(rest.size, rest.size))

x, v, history = rest, 0.3 * jax.random.normal(jax.random.key(1), rest.shape), []
for _ in trange(10, desc="moving"):
    x, v, energies = move(x, v, 0.0)
    history.append(energies)
energies = jnp.concatenate(history) - jnp.array([0, energy(params, rest)])
drift = jnp.ptp(energies.sum(1)) / jnp.ptp(energies[:, 0])
print(f"energy kept within {drift:.1e} of what is exchanged, Hessian within {error:.1e} of torch's own")

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
left.plot(jnp.c_[energies, energies.sum(1)], label=["kinetic", "potential", "total"], linewidth=1)
left.legend()
left.set(title="energies", xlabel="step")
right.plot(jnp.sqrt(abs(stiffness)), "o", markersize=4)
right.set(title="frequencies, six of them zero", xlabel="mode")
figure.savefig(Path(__file__).parent / "pictures" / "md_with_torch_potential.png", dpi=80)
assert drift < 1e-2
assert error < 1e-9
assert (stiffness < 1e-9).sum() == 6
