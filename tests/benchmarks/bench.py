"""Cost of a crossing against its floor and against the pure framework.

The contestants of a cell run interleaved in one process, in random order per round, one untimed call before each block;
the figure of a contestant is the minimum over the rounds of the mean of a block. Trust the ratios, not the microseconds.

    python tests/benchmarks/bench.py [part of a cell's name ...]
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.experimental.buffer_callback import buffer_callback
from jaxlib import _jax

from interop import as_jax, as_torch, differentiable, jax_to_torch, jittable, torch_to_jax

CPU = jax.devices("cpu")[0]


def to_jax(t: torch.Tensor) -> jax.Array:
    """The cheapest import there is through DLPack."""
    return _jax.dlpack_managed_tensor_to_buffer(torch._C._to_dlpack(t), CPU, None)


def to_torch(a: jax.Array) -> torch.Tensor:
    """The cheapest export there is."""
    return torch._C._from_dlpack(_jax.buffer_to_dlpack_managed_tensor(a, None))


@dataclass
class Cell:
    """One row: the contestants by name, `ours` among them, and the target for `ours / against`."""

    name: str
    contestants: dict[str, Callable[[], object]]
    targets: dict[str, float] = field(default_factory=dict)


def measure(contestants: dict[str, Callable[[], object]], rounds: int = 60, budget: float = 0.004) -> dict[str, float]:
    """Microseconds per call."""
    blocks, best = {}, dict.fromkeys(contestants, float("inf"))
    for name, call in contestants.items():
        call()
        start = time.perf_counter()
        call()
        blocks[name] = max(1, int(budget / (time.perf_counter() - start)))
    for _ in range(rounds):
        order = list(contestants)
        random.shuffle(order)
        for name in order:
            call, block = contestants[name], blocks[name]
            call()
            start = time.perf_counter()
            for _ in range(block):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / block)
    return {name: 1e6 * seconds for name, seconds in best.items()}


# --- a JAX function in torch ------------------------------------------------------------------------------------------


def f_jax(x: jax.Array, w: jax.Array) -> jax.Array:
    return (jnp.tanh(x @ w) ** 2).sum()


def f_torch(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x @ w).pow(2).sum()


def into_torch() -> Iterator[Cell]:
    x, w = torch.randn(4, 3), torch.randn(3, 5)
    ours, jitted = as_torch(f_jax), jax.jit(f_jax)
    yield Cell(
        "as_torch call, no grad",
        {
            "ours": lambda: ours(x, w),
            "floor": lambda: to_torch(jitted(to_jax(x), to_jax(w))),
            "pure": lambda: f_torch(x, w),
        },
        {"floor": 1.2},
    )
    smooth, leaf = differentiable(ours), torch.randn(4, 3, requires_grad=True)
    one = torch.ones(())
    forward = jax.jit(lambda a, b: jax.vjp(f_jax, a, b))
    backward = jax.jit(lambda pull, ct: pull(ct)[0])

    def floor() -> torch.Tensor:
        out, pull = forward(to_jax(leaf.detach()), to_jax(w))
        to_torch(out)
        return to_torch(backward(pull, to_jax(one)))

    yield Cell(
        "as_torch forward + backward",
        {
            "ours": lambda: torch.autograd.grad(smooth(leaf, w), leaf, one),
            "floor": floor,
            "pure": lambda: torch.autograd.grad(f_torch(leaf, w), leaf, one),
        },
        {"floor": 1.9, "pure": 1.6},
    )
    yield dict_cell()
    batch = torch.randn(16, 4, 3)
    batched = jax.jit(jax.vmap(f_jax, in_axes=(0, None)))
    direct = as_torch(jax.vmap(f_jax, in_axes=(0, None)))
    yield Cell(
        "torch.func.vmap of it",
        {
            "ours": lambda: torch.func.vmap(ours, in_dims=(0, None))(batch, w),
            "direct": lambda: direct(batch, w),
            "floor": lambda: to_torch(batched(to_jax(batch), to_jax(w))),
        },
        {"direct": 3.0},
    )


def dict_cell() -> Cell:
    """20 leaves in a dict: ten layers of 64."""

    def layers_jax(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        for i in range(10):
            x = jnp.tanh(x @ params[f"w{i}"] + params[f"b{i}"])
        return x.sum()

    def layers_torch(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        for i in range(10):
            x = torch.tanh(x @ params[f"w{i}"] + params[f"b{i}"])
        return x.sum()

    params = {f"w{i}": torch.randn(64, 64) / 8 for i in range(10)} | {f"b{i}": torch.zeros(64) for i in range(10)}
    for p in params.values():
        p.requires_grad_()
    x, leaves, one = torch.randn(64, 64), list(params.values()), torch.ones(())
    ours = differentiable(as_torch(layers_jax))
    forward = jax.jit(lambda p, x: jax.vjp(lambda p: layers_jax(p, x), p))
    backward = jax.jit(lambda pull, ct: pull(ct)[0])

    def floor() -> list[torch.Tensor]:
        out, pull = forward({n: to_jax(p.detach()) for n, p in params.items()}, to_jax(x))
        to_torch(out)
        return [to_torch(g) for g in backward(pull, to_jax(one)).values()]

    return Cell(
        "as_torch forward + backward, 20-leaf dict",
        {
            "ours": lambda: torch.autograd.grad(ours(params, x), leaves, one),
            "floor": floor,
            "pure": lambda: torch.autograd.grad(layers_torch(params, x), leaves, one),
        },
        {"floor": 1.25, "pure": 1.3},
    )


# --- a torch function in JAX ------------------------------------------------------------------------------------------


def into_jax() -> Iterator[Cell]:
    x, w = jnp.asarray(np.random.randn(4, 3), jnp.float32), jnp.asarray(np.random.randn(3, 5), jnp.float32)
    ours = jittable(differentiable(as_jax(f_torch)))

    def floor() -> jax.Array:
        with torch.no_grad():
            return to_jax(f_torch(to_torch(x), to_torch(w)))

    yield Cell(
        "as_jax eager call",
        {"ours": lambda: ours(x, w), "floor": floor, "pure": lambda: f_jax(x, w).block_until_ready()},
        {"floor": 1.2},
    )

    def body(_: object, out: object, a: object, b: object) -> None:
        with torch.no_grad():
            torch.from_dlpack(out).copy_(f_torch(torch.from_dlpack(a), torch.from_dlpack(b)))

    bare = jax.jit(buffer_callback(body, jax.ShapeDtypeStruct((), jnp.float32)))
    jitted = jax.jit(ours)
    yield Cell(
        "as_jax under jit",
        {
            "ours": lambda: jitted(x, w).block_until_ready(),
            "floor": lambda: bare(x, w).block_until_ready(),
            "pure": lambda: jax.jit(f_jax)(x, w).block_until_ready(),
        },
        {"floor": 1.15},
    )
    yield mlp_cell()


def mlp_cell() -> Cell:
    net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 10))
    images = torch.randn(128, 64)

    def loss(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(net, params, (x,)).logsumexp(-1).mean()

    gradient = jax.jit(jax.grad(jittable(differentiable(as_jax(loss)))))
    params, x = {n: jnp.array(p.detach().numpy()) for n, p in net.named_parameters()}, jnp.asarray(images.numpy())
    weights = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    return Cell(
        "as_jax jit gradient: MLP",
        {
            "ours": lambda: jax.block_until_ready(gradient(params, x)),
            "pure": lambda: torch.autograd.grad(loss(weights, images), list(weights.values())),
        },
        {"pure": 1.2},
    )


# --- values -----------------------------------------------------------------------------------------------------------


def values() -> Iterator[Cell]:
    small, large = torch.zeros(1 << 10), torch.zeros(1 << 24)
    yield Cell(
        "a conversion to JAX, 64 MB against 4 kB",
        {"ours": lambda: torch_to_jax(large), "4 kB": lambda: torch_to_jax(small)},
        {"4 kB": 1.15},
    )
    a, b = jnp.zeros(1 << 10), jnp.zeros(1 << 24)
    yield Cell(
        "a conversion to torch, 64 MB against 4 kB",
        {"ours": lambda: jax_to_torch(b), "4 kB": lambda: jax_to_torch(a)},
        {"4 kB": 1.15},
    )

    def total(tree: dict[str, jax.Array]) -> jax.Array:
        return sum(tree.values(), jnp.zeros(4))

    for count in (1, 10, 100, 1000):
        tree = {f"leaf{i}": torch.ones(4) for i in range(count)}
        ours, jitted = as_torch(total), jax.jit(total)
        yield Cell(
            f"{count} leaves in a dict",
            {
                "ours": lambda tree=tree, ours=ours: ours(tree),
                "floor": lambda tree=tree, jitted=jitted: to_torch(jitted({n: to_jax(t) for n, t in tree.items()})),
            },
            {"floor": 1.2},
        )


def importing() -> None:
    """Milliseconds that `import interop` adds to `import torch, jax`, the median of several processes."""
    code = "import time, torch, jax; s = time.perf_counter(); import interop; print(time.perf_counter() - s)"
    times = [float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
             for _ in range(5)]  # fmt: skip
    print(f"{'import interop, after torch and jax':44s} ours {1e3 * sorted(times)[2]:8.1f} ms   (target +50 ms)")


def retraces() -> None:
    """Traces over repeated shapes, one new shape, and new Python floats."""
    traced = [0]

    @as_torch
    def counted(x: jax.Array, scale: float = 1.0) -> jax.Array:
        traced[0] += 1
        return x * scale

    counts = []
    for calls in ([(torch.ones(3),)] * 5, [(torch.ones(4),)], [(torch.ones(3), s / 7) for s in range(5)]):
        before = traced[0]
        for arguments in calls:
            counted(*arguments)
        counts.append(traced[0] - before)
    print(f"{'traces: 5 calls, a new shape, 5 floats':44s} ours {counts}   (target [1, 1, 0])")


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1:]
    for cells in (into_torch, into_jax, values):
        for cell in cells():
            if wanted and not any(part in cell.name for part in wanted):
                continue
            us = measure(cell.contestants)
            times = "  ".join(f"{name} {us[name]:9.1f}" for name in us)
            ratios = "  ".join(f"{us['ours'] / us[n]:.2f}x {n} (target {t}x)" for n, t in cell.targets.items())
            print(f"{cell.name:44s} {times} us   {ratios}", flush=True)
    if not wanted:
        importing()
        retraces()


if __name__ == "__main__":
    main()
