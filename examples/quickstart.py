"""A PyTorch network trained from JAX, and a JAX network trained from PyTorch, on real handwritten digits.

The 1,797 digits (8 x 8 pixels) ship with scikit-learn, so nothing is downloaded. Run this file with `make demo`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from interop import as_jax, as_torch, differentiable, jax_to_torch, jittable, torch_to_jax

BATCH, EPOCHS, RATE = 64, 12, 3e-3


class Digits(NamedTuple):
    """Images as rows of 64 pixels between 0 and 1, with the digit that each shows."""

    images: np.ndarray
    labels: np.ndarray


def load() -> tuple[Digits, Digits]:
    """The digits to learn from, and the quarter held out."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.25, random_state=0, stratify=labels
    )
    return Digits(train, train_labels), Digits(test, test_labels)


# --- (a) a torch network, trained from JAX ----------------------------------------------------------------------------

torch.manual_seed(0)
net = nn.Sequential(
    nn.Unflatten(1, (1, 8, 8)),
    nn.Conv2d(1, 16, kernel_size=3, padding=1),
    nn.ReLU(),
    nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(512, 10),
)


@jittable
@differentiable
@as_jax
def conv_scores(params: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The score of each digit: torch computes it, JAX calls it."""
    return torch.func.functional_call(net, params, (images,))


def conv_loss(params: dict[str, jax.Array], images: jax.Array, labels: jax.Array) -> jax.Array:
    """A loss of JAX on the scores of torch; its gradient goes through both."""
    return optax.softmax_cross_entropy_with_integer_labels(conv_scores(params, images), labels).mean()


conv_optimizer = optax.adam(RATE)


@jax.jit
def conv_step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any, jax.Array]:
    """One step of training, compiled as a whole, with the torch network inside."""
    loss, grads = jax.value_and_grad(conv_loss)(params, images, labels)
    updates, state = conv_optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, loss


def minibatches(data: Digits, epochs: int) -> Iterator[tuple[jax.Array, jax.Array]]:
    """All the data in a new order each epoch."""
    rng = np.random.default_rng(0)
    for _ in range(epochs):
        order = rng.permutation(len(data.images))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            yield jnp.asarray(data.images[chosen]), jnp.asarray(data.labels[chosen])


def train_from_jax(data: Digits) -> dict[str, jax.Array]:
    """The trained parameters of the torch network, as arrays."""
    params = torch_to_jax(dict(net.named_parameters()), copy=True)
    state = conv_optimizer.init(params)
    with tqdm(total=EPOCHS * (len(data.images) // BATCH), desc="torch network, trained from JAX") as bar:
        for images, labels in minibatches(data, EPOCHS):
            params, state, loss = conv_step(params, state, images, labels)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
    return params


# --- (b) a JAX network, trained from torch ----------------------------------------------------------------------------


@differentiable
@as_torch
def dense_scores(params: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    """The score of each digit: JAX computes it, torch calls it."""
    hidden = jax.nn.gelu(images @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def dense_loss(params: dict[str, torch.Tensor], images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A loss of torch on the scores of JAX; its gradient goes through both."""
    return nn.functional.cross_entropy(dense_scores(params, images), labels)


def dense_parameters(hidden: int = 128) -> dict[str, jax.Array]:
    """Parameters to start from."""
    first, second = jax.random.split(jax.random.key(0))
    return {
        "w1": jax.random.normal(first, (64, hidden)) / 8,
        "b1": jnp.zeros(hidden),
        "w2": jax.random.normal(second, (hidden, 10)) / hidden**0.5,
        "b2": jnp.zeros(10),
    }


def train_from_torch(data: Digits) -> dict[str, torch.Tensor]:
    """The trained parameters of the JAX network, as tensors."""
    params = jax_to_torch(dense_parameters(), copy=True)  # a copy, because the optimizer writes to them
    optimizer = torch.optim.Adam([p.requires_grad_() for p in params.values()], lr=RATE)
    loader = DataLoader(
        TensorDataset(torch.from_numpy(data.images), torch.from_numpy(data.labels)),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
    )
    with tqdm(total=EPOCHS * len(loader), desc="JAX network, trained from torch") as bar:
        for _ in range(EPOCHS):
            for images, labels in loader:
                loss = torch_step(partial(dense_loss, params), optimizer, images, labels)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
    return params


def torch_step(loss_of: Callable[..., torch.Tensor], optimizer: torch.optim.Optimizer, *batch: torch.Tensor) -> float:
    """One step of training, as torch writes it."""
    optimizer.zero_grad()
    loss = loss_of(*batch)
    loss.backward()
    optimizer.step()
    return loss.item()


# --- the same in torch alone, to compare with -------------------------------------------------------------------------


def conv_loss_in_torch(params: dict[str, torch.Tensor], images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What `conv_loss` computes."""
    return nn.functional.cross_entropy(torch.func.functional_call(net, params, (images,)), labels)


def dense_loss_in_torch(params: dict[str, torch.Tensor], images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What `dense_loss` computes."""
    hidden = nn.functional.gelu(images @ params["w1"] + params["b1"], approximate="tanh")
    return nn.functional.cross_entropy(hidden @ params["w2"] + params["b2"], labels)


def accuracy(scores: Any, labels: np.ndarray) -> float:
    """The share of digits recognised."""
    return float((np.asarray(scores).argmax(-1) == labels).mean())


def difference(ours: Any, pure: Any) -> float:
    """How far two gradients are apart at most, relative to the largest entry of their array."""
    pairs = zip(jax.tree.leaves(torch_to_jax(ours)), jax.tree.leaves(torch_to_jax(pure)), strict=True)
    return max(float(abs(a - b).max() / abs(b).max()) for a, b in pairs)


def milliseconds(*steps: Callable[[], Any], rounds: int = 60) -> list[float]:
    """The median time of each step; they take turns, so that a busy machine is busy for all of them."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for step, taken in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]


# --- the program ------------------------------------------------------------------------------------------------------


def report_from_jax(train: Digits, test: Digits) -> None:
    """Train (a), and compare its derivatives and its speed with torch alone."""
    params = train_from_jax(train)
    right = accuracy(conv_scores(params, jnp.asarray(test.images)), test.labels)

    batch = jnp.asarray(train.images[:BATCH]), jnp.asarray(train.labels[:BATCH])
    gradient = jax.jit(jax.grad(conv_loss))
    # Forward over reverse: how the gradient changes along a direction.
    hessian_times = jax.jit(lambda along: jax.jvp(lambda p: jax.grad(conv_loss)(p, *batch), (params,), (along,))[1])

    tensors = jax_to_torch(params, copy=True)
    same_batch = torch.from_numpy(train.images[:BATCH]), torch.from_numpy(train.labels[:BATCH])
    gradient_in_torch = lambda p: torch.func.grad(conv_loss_in_torch)(p, *same_batch)
    hessian_times_in_torch = lambda along: torch.func.jvp(gradient_in_torch, (tensors,), (along,))[1]

    state, optimizer = conv_optimizer.init(params), torch.optim.Adam(net.parameters(), lr=RATE)
    loss_in_torch = lambda images, labels: nn.functional.cross_entropy(net(images), labels)
    report(
        "torch network, trained from JAX",
        right,
        {
            "gradient": difference(gradient(params, *batch), gradient_in_torch(tensors)),
            "Hessian-vector product": difference(hessian_times(params), hessian_times_in_torch(tensors)),
        },
        lambda: jax.block_until_ready(conv_step(params, state, *batch)),
        lambda: torch_step(loss_in_torch, optimizer, *same_batch),
    )


def report_from_torch(train: Digits, test: Digits) -> None:
    """Train (b), and compare its derivatives and its speed with torch alone."""
    params = train_from_torch(train)
    with torch.no_grad():
        right = accuracy(dense_scores(params, torch.from_numpy(test.images)), test.labels)

    batch = torch.from_numpy(train.images[:BATCH]), torch.from_numpy(train.labels[:BATCH])
    gradients = {loss: torch.func.grad(loss) for loss in (dense_loss, dense_loss_in_torch)}
    per_example = {loss: torch.func.vmap(grad, in_dims=(None, 0, 0)) for loss, grad in gradients.items()}
    apart = lambda of: difference(of[dense_loss](params, *batch), of[dense_loss_in_torch](params, *batch))

    optimizer = torch.optim.Adam(params.values(), lr=RATE)
    report(
        "JAX network, trained from torch",
        right,
        {"gradient": apart(gradients), "per-example gradients": apart(per_example)},
        lambda: torch_step(partial(dense_loss, params), optimizer, *batch),
        lambda: torch_step(partial(dense_loss_in_torch, params), optimizer, *batch),
    )


def report(
    title: str, right: float, differences: dict[str, float], ours: Callable[[], Any], pure: Callable[[], Any]
) -> None:
    """Print how it went, and fail if it went wrong."""
    print(f"{title}: {right:.1%} of the held-out digits recognised")
    for name, apart in differences.items():
        print(f"  {name + ',':<23} against torch alone: max relative difference {apart:.1e}")
        assert apart < 1e-4
    step, pure_step = milliseconds(ours, pure)
    print(f"  {'step,':<23} against torch alone: {step:.2f} ms / {pure_step:.2f} ms = {step / pure_step:.2f}")
    assert right > 0.95


def main() -> None:
    """Both directions, one after the other."""
    torch.set_num_threads(1)  # the networks are small: two pools of threads would only get in each other's way
    train, test = load()
    report_from_jax(train, test)
    report_from_torch(train, test)


if __name__ == "__main__":
    main()
