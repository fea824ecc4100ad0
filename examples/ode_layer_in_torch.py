"""An ODE solved by diffrax as a layer of torch, whose four rates a torch optimizer learns from noisy counts.

The solver is adaptive and batched by JAX; L-BFGS of torch sees a module with four parameters.
"""

from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import torch
from tqdm import trange

from interop import WrappedJaxFunction

torch.set_num_threads(1)
torch.manual_seed(0)
RATES = {"birth": 1.1, "hunted": 0.4, "death": 0.9, "fed": 0.15}


def hares_and_lynxes(_: jax.Array, counts: jax.Array, rates: dict[str, jax.Array]) -> jax.Array:
    """The equations of Lotka and Volterra."""
    hares, lynxes = counts
    births, hunts = rates["birth"] * hares, hares * lynxes
    return jnp.stack([births - rates["hunted"] * hunts, rates["fed"] * hunts - rates["death"] * lynxes])


def solve(log_rates: dict[str, jax.Array], start: jax.Array, times: jax.Array) -> jax.Array:
    """The counts f32[n,times,2] from each of the starts f32[n,2]."""
    term, solver, rates = diffrax.ODETerm(hares_and_lynxes), diffrax.Tsit5(), jax.tree.map(jnp.exp, log_rates)
    saved, control = diffrax.SaveAt(ts=times), diffrax.PIDController(rtol=1e-4, atol=1e-4)

    def trajectory(y: jax.Array) -> jax.Array:
        return diffrax.diffeqsolve(
            term, solver, 0.0, times[-1], 0.05, y, rates, saveat=saved, stepsize_controller=control
        ).ys

    return jax.vmap(trajectory)(start)


layer = WrappedJaxFunction(solve, {name: jnp.log(rate) for name, rate in RATES.items()})
start, times = torch.tensor([[8.0, 3.0], [4.0, 1.0], [2.0, 5.0]]), torch.linspace(0, 10, 60)
with torch.no_grad():
    counts = layer(start, times) * torch.exp(0.02 * torch.randn(3, 60, 2))
    for rate in layer.parameters():
        rate.fill_(-0.7)  # forgotten

optimizer = torch.optim.LBFGS(layer.parameters(), lr=0.5, max_iter=1)


def loss() -> torch.Tensor:
    """The error of the counts; the gradient goes through the solver."""
    optimizer.zero_grad()
    error = (layer(start, times).log() - counts.log()).square().mean()
    error.backward()
    return error


for _ in (bar := trange(35, desc="fitting")):
    bar.set_postfix(loss=f"{optimizer.step(loss).item():.5f}")

learned = {name: float(jnp.exp(rate)) for name, rate in layer.to_jax().items()}
for name, rate in RATES.items():
    print(f"{name:>7}: {learned[name]:.3f} (truth {rate})")

figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
with torch.no_grad():
    curves = layer(start, times)
for animal, name in enumerate(("hares", "lynxes")):
    axes.plot(times, counts[0, :, animal], ".", color=f"C{animal}")
    axes.plot(times, curves[0, :, animal], color=f"C{animal}", label=name)
axes.set(title="the counts, and what the layer learned", xlabel="time")
axes.legend()
figure.savefig(Path(__file__).parent / "pictures" / "ode_layer_in_torch.png", dpi=80)
assert all(abs(learned[name] / rate - 1) < 0.02 for name, rate in RATES.items())
