"""A log-density written in torch, sampled by two libraries of JAX: NUTS of NumPyro, and NUTS of BlackJAX.

The model is the bioassay of Racine et al. (1986), how the deaths of animals rise with a dose. Two parameters are few
enough to integrate the density on a grid, in one batch: both samplers are compared with that.
"""

from pathlib import Path

import blackjax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import torch
from numpyro.infer import MCMC, NUTS
from torch.distributions import Binomial, Normal

from interop import as_jax, differentiable, jittable

torch.set_num_threads(1)
DOSES, DEATHS = torch.tensor([-0.86, -0.30, -0.05, 0.73]), torch.tensor([0.0, 1.0, 3.0, 5.0])
PRIOR = Normal(torch.tensor([0.0, 10.0]), torch.tensor([2.0, 10.0]))
WARMUP, SAMPLES = 300, 600


@jittable
@differentiable
@as_jax
def log_density(at: torch.Tensor) -> torch.Tensor:
    """Of the intercept and the slope f32[2], given what happened to five animals at each dose."""
    intercept, slope = at
    deaths = Binomial(5, logits=intercept + slope * DOSES)
    return PRIOR.log_prob(at).sum() + deaths.log_prob(DEATHS).sum()


mcmc = MCMC(NUTS(potential_fn=lambda at: -log_density(at)), num_warmup=WARMUP, num_samples=SAMPLES)
mcmc.run(jax.random.key(0), init_params=jnp.array([0.0, 10.0]))
tuned = mcmc.last_state.adapt_state

print("BlackJAX goes on with the steps that NumPyro found")
sampler = blackjax.nuts(log_density, tuned.step_size, tuned.inverse_mass_matrix)
_, by_blackjax = blackjax.util.run_inference_algorithm(
    jax.random.key(1), sampler, SAMPLES, initial_position=mcmc.last_state.z, transform=lambda state, _: state.position
)

grid = jnp.stack(jnp.meshgrid(jnp.linspace(-3, 6, 121), jnp.linspace(-5, 40, 121), indexing="ij"), -1)
density = jax.nn.softmax(jax.vmap(jax.vmap(log_density))(grid), axis=(0, 1))
mean = jnp.einsum("ij,ijk->k", density, grid)
deviation = jnp.sqrt(jnp.einsum("ij,ijk->k", density, (grid - mean) ** 2))
drawn = {"NumPyro": mcmc.get_samples(), "BlackJAX": by_blackjax}
print(f"the grid: mean {mean}, deviation {deviation}")

levels = density.max() * jnp.array([0.01, 0.1, 0.3, 0.5, 0.7, 0.9])
figure, panels = plt.subplots(1, 2, figsize=(7, 3.2), sharey=True, layout="constrained")
for panel, (name, samples) in zip(panels, drawn.items(), strict=True):
    print(f"{name}: mean {samples.mean(0)}, deviation {samples.std(0)}")
    panel.contour(grid[:, 0, 0], grid[0, :, 1], density.T, levels=levels, colors="0.4", linewidths=1)
    panel.plot(*samples.T, ".", markersize=3, alpha=0.4)
    panel.set(title=f"NUTS of {name}, and the density", xlabel="intercept", xlim=(-3, 6), ylim=(-5, 40))
panels[0].set_ylabel("slope")
figure.savefig(Path(__file__).parent / "pictures" / "sample_torch_posterior.png", dpi=80)
for samples in drawn.values():
    assert (abs(samples.mean(0) - mean) < 0.2 * deviation).all()
    assert (abs(samples.std(0) / deviation - 1) < 0.2).all()
