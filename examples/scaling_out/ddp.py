"""A JAX model in `DistributedDataParallel`: two processes, each with its half of the batch, one gradient."""

import tempfile

import jax
import jax.numpy as jnp
import torch
import torch.distributed as dist

from interop import WrappedJaxFunction

torch.set_num_threads(1)


def model():
    w, v = jax.random.normal(jax.random.key(0), (3, 8)), jax.random.normal(jax.random.key(1), (8, 1))
    return WrappedJaxFunction(lambda params, x: jnp.tanh(x @ params["w"]) @ params["v"], {"w": w, "v": v})


def run(rank, meet):
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    parallel, alone = torch.nn.parallel.DistributedDataParallel(model()), model()
    parallel(x[rank::2]).square().mean().backward()
    alone(x).square().mean().backward()
    for mine, expected in zip(parallel.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad)
    print(f"process {rank}: the gradient of the whole batch")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (f"{folder}/meet",), nprocs=2)
