"""A torch network trained from JAX, and a JAX network trained from torch, on 1,797 real handwritten digits.

Each is compared with the same program written in one framework: the same gradient, in about the same time.

    python examples/quickstart.py
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from interop import as_jax, as_torch, differentiable, jittable

EPOCHS, BATCH = 15, 64
shuffle = np.random.default_rng(0)


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """8x8 images as f32[n,1,8,8] in [0, 1] and labels as i32[n]: a training part, and a held-out part."""
    data = load_digits()
    images, labels = (data.images[:, None] / 16).astype(np.float32), data.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, held_out = order[:1437], order[1437:]
    return images[train], labels[train], images[held_out], labels[held_out]


# --- (a) a torch network, trained from JAX ----------------------------------------------------------------------------

net = torch.nn.Sequential(
    torch.nn.Conv2d(1, 16, 3, padding=1),
    torch.nn.ReLU(),
    torch.nn.MaxPool2d(2),
    torch.nn.Conv2d(16, 32, 3, padding=1),
    torch.nn.ReLU(),
    torch.nn.Flatten(),
    torch.nn.Linear(32 * 4 * 4, 10),
)


def torch_loss(params: dict[str, torch.Tensor], images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The network as a function of its parameters: its cross-entropy, a scalar."""
    logits = torch.func.functional_call(net, params, (images,))
    return torch.nn.functional.cross_entropy(logits, labels.long())


loss_in_jax = jittable(differentiable(as_jax(torch_loss)))


@jittable
@as_jax
def predict_in_jax(params: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The class of each image, i64[n]; i32[n] in JAX."""
    return torch.func.functional_call(net, params, (images,)).argmax(-1)


def train_from_jax(images: np.ndarray, labels: np.ndarray) -> tuple[dict[str, jax.Array], Callable[..., Any]]:
    """Train it by optax under `jax.jit`; returns the parameters and the jitted step."""
    params = {name: jnp.array(p.detach().numpy()) for name, p in net.named_parameters()}
    optimizer = optax.adam(3e-3)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_in_jax)(params, images, labels)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    with tqdm(total=EPOCHS, desc="torch network, trained from JAX", unit="epoch") as bar:
        for _ in range(EPOCHS):
            for x, y in minibatches(images, labels):
                params, state, loss = step(params, state, x, y)
            bar.set_postfix(loss=f"{loss:.4f}")
            bar.update()
    return params, lambda x, y: step(params, state, x, y)


def minibatches(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Shuffled batches of one size, so that `jax.jit` compiles once."""
    order = shuffle.permutation(len(labels))
    for i in range(0, len(order) - BATCH + 1, BATCH):
        chosen = order[i : i + BATCH]
        yield jnp.asarray(images[chosen]), jnp.asarray(labels[chosen])


def native_step_in_torch(params: dict[str, jax.Array]) -> Callable[..., torch.Tensor]:
    """The same step, in torch alone."""
    weights = {name: torch.tensor(np.asarray(p), requires_grad=True) for name, p in params.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=3e-3)

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch_loss(weights, images, labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


# --- (b) a JAX network, trained from torch ----------------------------------------------------------------------------


def jax_loss(params: dict[str, jax.Array], images: jax.Array, labels: jax.Array) -> jax.Array:
    """A network of two layers: its mean cross-entropy over the images, a scalar."""
    return optax.softmax_cross_entropy_with_integer_labels(jax_logits(params, images), labels).mean()


def jax_logits(params: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    """The logits f32[n,10] of images f32[n,1,8,8]."""
    hidden = jax.nn.gelu(images.reshape(-1, 64) @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


loss_in_torch = jittable(differentiable(as_torch(jax_loss)))
logits_in_torch = as_torch(jax_logits)


def train_from_torch(images: np.ndarray, labels: np.ndarray) -> tuple[dict[str, torch.Tensor], Callable[..., Any]]:
    """Train it by `torch.optim`, from a `DataLoader`; returns the parameters and the step."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w1": (64, 128), "b1": (128,), "w2": (128, 10), "b2": (10,)}
    params = {name: (torch.randn(shape, generator=generator) * 0.1) for name, shape in shapes.items()}
    for p in params.values():
        p.requires_grad_()
    optimizer = torch.optim.Adam(params.values(), lr=5e-3)
    data = TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_in_torch(params, x, y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    with tqdm(total=EPOCHS, desc="JAX network, trained from torch", unit="epoch") as bar:
        for _ in range(EPOCHS):
            for x, y in DataLoader(data, batch_size=BATCH, shuffle=True, drop_last=True, generator=generator):
                loss = step(x, y)
            bar.set_postfix(loss=f"{loss:.4f}")
            bar.update()
    return params, step


def native_step_in_jax(params: dict[str, torch.Tensor]) -> Callable[..., Any]:
    """The same step, in JAX alone."""
    weights = {name: jnp.array(p.detach().numpy()) for name, p in params.items()}
    optimizer = optax.adam(5e-3)
    state = optimizer.init(weights)

    @jax.jit
    def step(x: jax.Array, y: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(jax_loss)(weights, x, y)
        updates, new = optimizer.update(grads, state, weights)
        return optax.apply_updates(weights, updates), new, loss

    return step


# --- comparing --------------------------------------------------------------------------------------------------------


def difference(ours: dict[str, Any], native: dict[str, Any]) -> float:
    """The largest difference of two gradients, relative to the largest entry of each array."""
    pairs = [(np.asarray(ours[name]), np.asarray(native[name])) for name in native]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def milliseconds(step: Callable[[], Any], repeats: int = 30) -> float:
    """The median time of a step, waited for."""
    jax.block_until_ready(step())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(step())
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times))


def report(name: str, accuracy: float, error: float, ours: float, native: float) -> None:
    """One line of results; fails if they are not as promised."""
    print(
        f"{name}: held-out accuracy {accuracy:.1%}, gradient within {error:.1e} of the native one, "
        f"step {ours:.2f} ms against {native:.2f} ms native"
    )
    assert accuracy > 0.95
    assert error < 1e-4


def main() -> None:
    """Train both ways, and compare."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels, held_images, held_labels = digits()
    x, y = images[:BATCH], labels[:BATCH]
    tx, ty = torch.from_numpy(x), torch.from_numpy(y)

    params, step = train_from_jax(images, labels)
    accuracy = float((predict_in_jax(params, jnp.asarray(held_images)) == held_labels).mean())
    ours = jax.jit(jax.grad(loss_in_jax))(params, x, y)
    weights = {name: torch.tensor(np.asarray(p), requires_grad=True) for name, p in params.items()}
    native = dict(zip(weights, torch.autograd.grad(torch_loss(weights, tx, ty), weights.values()), strict=True))
    native_step = native_step_in_torch(params)
    report(
        "(a) torch network in JAX",
        accuracy,
        difference(ours, native),
        milliseconds(lambda: step(x, y)),
        milliseconds(lambda: native_step(tx, ty).item()),
    )

    trained, torch_step = train_from_torch(images, labels)
    with torch.no_grad():
        guesses = logits_in_torch(trained, torch.from_numpy(held_images)).argmax(-1).numpy()
    accuracy = float((guesses == held_labels).mean())
    grads = torch.autograd.grad(loss_in_torch(trained, tx, ty), trained.values())
    plain = {name: p.detach().clone() for name, p in trained.items()}  # timing the step below goes on training
    arrays = {name: jnp.array(p.numpy()) for name, p in plain.items()}
    jax_step = native_step_in_jax(trained)
    report(
        "(b) JAX network in torch",
        accuracy,
        difference(dict(zip(trained, grads, strict=True)), jax.grad(jax_loss)(arrays, x, y)),
        milliseconds(lambda: torch_step(tx, ty).item()),
        milliseconds(lambda: jax_step(x, y)),
    )

    # (c) A Hessian-vector product of (a), forward over reverse; a gradient for each example of (b), batched.
    product = jax.jvp(lambda p: jax.grad(loss_in_jax)(p, x, y), (params,), (params,))[1]
    vectors = list(weights.values())
    gradient = torch.autograd.grad(torch_loss(weights, tx, ty), vectors, create_graph=True)
    along = sum((g * v.detach()).sum() for g, v in zip(gradient, vectors, strict=True))
    expected = dict(zip(weights, torch.autograd.grad(along, vectors), strict=True))
    each = torch.func.vmap(torch.func.grad(loss_in_torch), in_dims=(None, 0, 0))(plain, tx[:, None], ty[:, None])
    each_native = jax.vmap(jax.grad(jax_loss), in_axes=(None, 0, 0))(arrays, x[:, None], y[:, None])
    hvp, per_example = difference(product, expected), difference(each, each_native)
    print(f"(c) Hessian-vector product within {hvp:.1e}, per-example gradients within {per_example:.1e}")
    assert hvp < 1e-3
    assert per_example < 1e-4


if __name__ == "__main__":
    main()
