"""A torch layer in two processes of `jax.distributed`, each with its half of one array."""

import multiprocessing
import socket


def run(rank, meet):
    import jax
    import numpy as np
    import torch
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from interop import as_jax, differentiable, jittable

    torch.set_num_threads(1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(meet, num_processes=2, process_id=rank)
    mesh = jax.make_mesh((2,), ("batch",))
    x, w = np.random.default_rng(0).normal(size=(8, 3)).astype("f"), np.ones((3, 2), "f")
    place = lambda value, spec: jax.make_array_from_callback(value.shape, NamedSharding(mesh, spec), value.__getitem__)
    layer = jittable(differentiable(as_jax(lambda w, x: torch.tanh(x @ w))))
    loss = lambda w, x: jax.lax.psum((layer(w, x) ** 2).sum(), "batch")
    step = jax.jit(jax.grad(jax.shard_map(loss, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P())))
    gradient = np.asarray(step(place(w, P()), place(x, P("batch"))).addressable_data(0))
    y = np.tanh(x @ w)
    assert np.allclose(gradient, x.T @ (2 * y * (1 - y**2)), rtol=1e-4, atol=1e-5)
    print(f"process {rank}: the gradient of both halves")


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [multiprocessing.get_context("spawn").Process(target=run, args=(rank, meet)) for rank in range(2)]
    [process.start() for process in processes]
    [process.join() for process in processes]
    assert [process.exitcode for process in processes] == [0, 0]
