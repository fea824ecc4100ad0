"""A GPT-2 of Hugging Face learns a sentence from JAX: optax under `jax.jit`, then torch's own `generate`.

The same training in torch alone follows the same losses.
"""

from copy import deepcopy
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import torch
from tqdm import trange
from transformers import GPT2Config, GPT2LMHeadModel

from interop import jax_to_torch, make_functional

torch.set_num_threads(1)
torch.manual_seed(0)
SENTENCE, STEPS = b"Two frameworks, one gradient: a crossing that no one sees.", 60

model = GPT2LMHeadModel(
    GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
).eval()
native = deepcopy(model)
apply, params = make_functional(model)
ids = jnp.array([list(SENTENCE)])
optimizer = optax.adamw(3e-3, weight_decay=0.01)


def loss(params: dict[str, jax.Array]) -> jax.Array:
    """How badly each letter is foreseen from those before it."""
    logits = apply(params, ids, use_cache=False).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()


@jax.jit
def step(params, state):
    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value


state, losses = optimizer.init(params), []
for _ in (bar := trange(STEPS, desc="from JAX")):
    params, state, value = step(params, state)
    losses.append(float(value))
    bar.set_postfix(loss=f"{value:.3f}")
model.load_state_dict(jax_to_torch(params), strict=False)

native_optimizer, native_losses = torch.optim.AdamW(native.parameters(), 3e-3, weight_decay=0.01), []
tokens = torch.tensor([list(SENTENCE)])
for _ in (bar := trange(STEPS, desc="in torch")):
    native_optimizer.zero_grad()
    value = native(tokens, labels=tokens).loss
    value.backward()
    native_optimizer.step()
    native_losses.append(value.item())
    bar.set_postfix(loss=f"{value.item():.3f}")

said = bytes(model.generate(tokens[:, :4], max_length=len(SENTENCE), do_sample=False)[0].tolist())
difference = np.abs(np.subtract(losses, native_losses)).max()
print(f"generated: {said.decode()}")
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, within {difference:.1e} of the training in torch at every step")

figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
axes.plot(losses, label="optax, under jax.jit")
axes.plot(native_losses, "k:", label="torch.optim")
axes.set(title="fine-tuning of GPT-2", xlabel="step", ylabel="loss", yscale="log")
axes.legend()
figure.savefig(Path(__file__).parent / "pictures" / "finetune_hf_from_jax.png", dpi=80)
assert said == SENTENCE
assert difference < 1e-3
