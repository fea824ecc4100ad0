"""A JAX model sharded by FSDP2: each of two processes keeps half of each weight."""

import tempfile

import jax
import jax.numpy as jnp
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from interop import WrappedJaxFunction

torch.set_num_threads(1)


def model():
    layer = lambda i: WrappedJaxFunction(lambda w, x: jnp.tanh(x @ w), jax.random.normal(jax.random.key(i), (8, 8)) / 3)
    return torch.nn.Sequential(*[layer(i) for i in range(3)])


def run(rank, meet):
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    sharded, alone = model(), model()
    for layer in sharded:
        fully_shard(layer)
    fully_shard(sharded)
    sharded(x[rank::2]).square().mean().backward()
    alone(x).square().mean().backward()
    for mine, expected in zip(sharded.parameters(), alone.parameters(), strict=True):
        assert mine.to_local().numel() == expected.numel() // 2
        torch.testing.assert_close(mine.grad.full_tensor(), expected.grad)
    print(f"process {rank}: half of each weight, the gradient of the whole batch")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (f"{folder}/meet",), nprocs=2)
