"""A policy of torch learns to balance pendulums, by gradients through a physics step of JAX.

64 pendulums move at once; the gradient of a whole flight reaches the policy through every step of it.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import torch
from tqdm import trange

from interop import as_torch, differentiable

torch.set_num_threads(1)
torch.manual_seed(0)
STEPS, DT = 50, 0.05


@differentiable
@as_torch
@jax.vmap
def physics(angle: jax.Array, speed: jax.Array, torque: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A pendulum a moment later; an angle of zero is upright, and the motor is not much stronger than gravity."""
    speed = speed + DT * (10 * jnp.sin(angle) - 0.1 * speed + 15 * jnp.tanh(torque))
    return angle + DT * speed, speed


assert torch.autograd.gradcheck(physics, [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(3)])

policy = torch.nn.Sequential(
    torch.nn.Linear(3, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)
)


def flight(angle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The angles f32[steps,n] of pendulums that start here, at rest, under the policy; what they cost."""
    speed, angles, cost = torch.zeros_like(angle), [angle], torch.zeros(())
    for _ in range(STEPS):
        seen = torch.stack([angle.cos(), angle.sin(), speed / 5], -1)
        angle, speed = physics(angle, speed, policy(seen).squeeze(-1))
        angles.append(angle)
        cost = cost + (1 - angle.cos() + 0.02 * speed**2).mean() / STEPS
    return torch.stack(angles), cost


everywhere = torch.linspace(-torch.pi, torch.pi, 201)
with torch.no_grad():
    before, _ = flight(everywhere)

optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
for _ in (bar := trange(120, desc="learning")):
    optimizer.zero_grad()
    _, cost = flight(torch.pi * (2 * torch.rand(64) - 1))
    cost.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    bar.set_postfix(cost=f"{cost.item():.2f}")

with torch.no_grad():
    after, _ = flight(everywhere)
upright = [int((angles[-1].cos() > 0.95).sum()) for angles in (before, after)]
print(f"upright after {STEPS * DT} s: {upright[1]} pendulums of {len(everywhere)}, {upright[0]} before")

figure, panels = plt.subplots(1, 2, figsize=(7, 2.8), sharey=True, layout="constrained")
for panel, angles, when in zip(panels, (before, after), ("before", "after learning"), strict=True):
    panel.plot(torch.arange(STEPS + 1) * DT, angles[:, ::25].cos(), color="C0", linewidth=1)
    panel.set(title=when, xlabel="seconds")
panels[0].set_ylabel("height")
figure.savefig(Path(__file__).parent / "pictures" / "policy_through_physics.png", dpi=80)
assert upright[1] > 0.95 * len(everywhere)
