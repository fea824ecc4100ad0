"""A JAX function in torch's engines: workers that load data, threads, DDP, FSDP2, checkpoints of many processes, Fabric.

Whatever could hang or crash runs in processes of its own under a time limit: they import this file, and print what
they found. The engines are torch's; a crossing is an ordinary function inside them.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import os
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import interop
from interop import as_torch, differentiable, jittable, torch_to_jax
from together import PATHS, THREADS, at_once, each, one_of_two, two_ranks

Fn = Callable[..., Any]


def levels(fn: Fn) -> Fn:
    """The JAX function as a torch function, with every level on."""
    return differentiable(jittable(as_torch(fn)))


# --- a layer in either framework --------------------------------------------------------------------------------------


@differentiable
@jittable
@as_torch
def tanh_affine(params: Any, x: Any) -> Any:
    """In JAX: what autograd has to keep is the weight, the input and the output."""
    return jnp.tanh(x @ params["w"] + params["b"])


class TorchLayer(nn.Module):
    """The layer in torch."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_in, n_out) / math.sqrt(n_in))
        self.b = nn.Parameter(torch.randn(n_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply."""
        return torch.tanh(x @ self.w + self.b)


class JaxLayer(TorchLayer):
    """The same, computed by JAX."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply."""
        return tanh_affine({"w": self.w, "b": self.b}, x)


class Checkpointed(JaxLayer):
    """The same, computed again in the backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply."""
        return checkpoint(super().forward, x, use_reentrant=False)


def network(layer: type[TorchLayer], n: int) -> nn.Sequential:
    """Three layers of which torch computes the middle one; the same weights every time."""
    torch.manual_seed(0)
    return nn.Sequential(layer(n, n), nn.Linear(n, n), layer(n, n))


def batch(n: int) -> torch.Tensor:
    """What all processes together compute on."""
    return torch.randn(8, n, generator=torch.Generator().manual_seed(1))


def share(x: torch.Tensor) -> torch.Tensor:
    """The part of a batch that is this process's."""
    return x.chunk(dist.get_world_size())[dist.get_rank()]


@functools.cache
def truth(n: int) -> dict[str, torch.Tensor]:
    """The gradients of one process, in torch, on the whole batch."""
    model = network(TorchLayer, n)
    model(batch(n)).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def whole(t: Any) -> torch.Tensor:
    """A tensor with the parts of all processes."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def error_of(model: nn.Module, n: int) -> float:
    """The largest error of a gradient, relative to the largest gradient of that parameter."""
    found = {name.removeprefix("module."): whole(p.grad).float() for name, p in model.named_parameters()
             if p.grad is not None}  # fmt: skip
    expected = truth(n)
    assert found.keys() == expected.keys(), (found.keys(), expected.keys())
    worst = max(float((found[k] - expected[k]).abs().max() / expected[k].abs().max()) for k in expected)
    return worst if all(torch.isfinite(g).all() for g in found.values()) else math.inf


# --- workers that load data -------------------------------------------------------------------------------------------


class Squares(Dataset[Any]):
    """Items that JAX computes."""

    def __init__(self) -> None:
        self.layer = tanh_affine
        self.params = {"w": torch.eye(64), "b": torch.zeros(64)}

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.full((64,), index / 8, requires_grad=True)
        y = self.layer(self.params, x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        return y.detach(), grad


def load() -> None:
    """Read every item, in two workers of a process that runs JAX: first forked, then spawned; print what came of it."""
    data = Squares()
    expected = [data[i] for i in range(len(data))]
    workers = functools.partial(DataLoader, data, batch_size=None, num_workers=2, timeout=40)
    start = time.monotonic()
    try:
        list(workers(multiprocessing_context="fork"))
    except interop.ForkError as error:
        assert time.monotonic() - start < 10
        print("multiprocessing_context='spawn'" in str(error))
        traceback.clear_frames(error.__traceback__)  # they hold the workers
    found = list(workers(multiprocessing_context="spawn"))
    torch.testing.assert_close(found, expected)
    print(len(found))


def test_workers_that_load_data(run_python: Callable[..., str]) -> None:
    """Forked ones are refused, by an error that reaches the loop and names the way out, which works.

    The items come back as they are: memory of JAX in memory that torch shares between processes.
    """
    assert run_python("import test_engines; test_engines.load()", PYTHONPATH=PATHS) == "True\n8\n"


def test_a_forked_child_without_a_tensor_is_told(run_python: Callable[..., str]) -> None:
    """Numbers alone, or nothing, are a crossing too."""
    out = run_python(
        """
        import os, signal, warnings
        warnings.simplefilter("ignore")
        import jax.numpy as jnp, interop
        f = interop.as_torch(lambda k: jnp.ones((300, 300)) @ jnp.ones((300, 300)) * k)
        g = interop.as_torch(lambda: jnp.ones((300, 300)) @ jnp.ones((300, 300)))
        f(1.0)
        for call in (lambda: f(2.0), lambda: f(2), g):
            pid = os.fork()
            if pid == 0:
                signal.alarm(1)
                try:
                    call()
                except interop.ForkError:
                    os._exit(0)
                os._exit(1)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        """,
        timeout=30,
    )
    assert out.split() == ["0"] * 3


# --- threads ----------------------------------------------------------------------------------------------------------


def mixed(x: Any, y: Any) -> Any:
    """A function with residuals of every kind, and a result of several parts."""
    return {"a": jnp.tanh(x @ y), "b": (jnp.exp(y).sum(0), x[0] * 2)}


def value_and_gradients(f: Fn, i: int, dtype: torch.dtype = torch.float32, n: int = 32) -> list[torch.Tensor]:
    """Of this thread's own arguments."""
    generator = torch.Generator().manual_seed(i)
    x, y = (torch.rand(n, n, generator=generator, dtype=dtype).requires_grad_() for _ in range(2))
    out = f(x, y)
    parts = [out["a"], *out["b"]]
    return [*(p.detach() for p in parts), *torch.autograd.grad(sum(p.sum() for p in parts), (x, y))]


def all_equal(found: list[Any], expected: list[Any]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_threads_at_once_give_what_one_gives() -> None:
    f = levels(mixed)
    expected = [value_and_gradients(f, i) for i in range(THREADS)]
    for _ in range(20):
        all_equal(at_once(lambda i: value_and_gradients(f, i)), expected)


@pytest.mark.parametrize("same", [True, False], ids=["one shape", "a shape each"])
def test_the_first_call_is_made_by_many_threads(same: bool) -> None:
    """They trace and compile it together; every one gets its own result."""
    sizes = [8 if same else 8 + i for i in range(THREADS)]
    serial = levels(mixed)
    expected = [value_and_gradients(serial, i, n=sizes[i]) for i in range(THREADS)]
    f = levels(mixed)
    all_equal(at_once(lambda i: value_and_gradients(f, i, n=sizes[i])), expected)


def cold() -> None:
    """The first that this process hears of JAX is eight threads at once, of two widths."""
    f, widths = levels(mixed), [torch.float32, torch.float64]
    found = at_once(lambda i: value_and_gradients(f, i, widths[i % 2]))
    all_equal(found, [value_and_gradients(f, i, widths[i % 2]) for i in range(THREADS)])
    print([str(t.dtype) for t in found[1]].count("torch.float64"))


def test_the_first_call_of_a_process_is_made_by_many_threads(run_python: Callable[..., str]) -> None:
    """JAX itself starts there."""
    assert run_python("import test_engines; test_engines.cold()", PYTHONPATH=PATHS) == "5\n"


def test_threads_of_two_widths_keep_to_themselves() -> None:
    """64 bits belong to the call: doubles stay doubles beside floats, while JAX keeps 32 in every thread."""
    f = levels(mixed)
    widths = [torch.float32, torch.float64]
    expected = [value_and_gradients(mixed_in_torch, i, widths[i % 2]) for i in range(THREADS)]

    def work(i: int) -> list[torch.Tensor]:
        for _ in range(20):
            found = value_and_gradients(f, i, widths[i % 2])
            torch.testing.assert_close(found, expected[i], rtol=(1e-5, 1e-13)[i % 2], atol=(1e-5, 1e-13)[i % 2])
            assert not jax.config.jax_enable_x64
        return found

    assert [{t.dtype for t in found} for found in at_once(work)] == [{widths[i % 2]} for i in range(THREADS)]


def mixed_in_torch(x: Any, y: Any) -> Any:
    """The same in torch."""
    return {"a": torch.tanh(x @ y), "b": (torch.exp(y).sum(0), x[0] * 2)}


def test_threads_walk_one_graph_each_from_one_forward() -> None:
    """The forward was made elsewhere, and all the threads need its residuals."""
    f = levels(mixed)
    x, y = (torch.rand(64, 64, dtype=torch.float64, requires_grad=True) for _ in range(2))
    total = f(x, y)["a"].sum()
    expected = torch.autograd.grad(total, (x, y), retain_graph=True)
    found = at_once(lambda i: torch.autograd.grad(total, (x, y), retain_graph=True))
    all_equal(found, [expected] * THREADS)


class Deeper(torch.autograd.Function):
    """Its backward walks a graph of its own, so deep that torch goes on in a thread of its pool."""

    seen: set[int] = set()

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, f: Fn, depth: int) -> torch.Tensor:
        """The identity; at the bottom, the function."""
        ctx.save_for_backward(x)
        ctx.f, ctx.depth = f, depth
        return x.clone() if depth else f(x.detach())

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Backward inside backward."""
        Deeper.seen.add(threading.get_ident())
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            y = Deeper.apply(x, ctx.f, ctx.depth - 1) if ctx.depth else ctx.f(x)
        y.backward(cotangent)
        return x.grad, None, None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_backward_on_the_threads_of_autograd(dtype: torch.dtype) -> None:
    """Neither the thread that called, nor one that Python started."""
    f = levels(lambda x: jnp.sin(x) * x)
    x = torch.tensor([0.3, 0.7], dtype=dtype, requires_grad=True)
    Deeper.seen.clear()
    (grad,) = torch.autograd.grad(Deeper.apply(x, f, 70).sum(), x)
    assert len(Deeper.seen) > 1, "torch has used its pool"
    torch.testing.assert_close(grad, (torch.cos(x) * x + torch.sin(x)).detach())


# --- two processes ----------------------------------------------------------------------------------------------------


def ddp(layer: type[TorchLayer] = JaxLayer, *, unused: bool = False, **options: Any) -> dict[str, Any]:
    """DDP's gradients on a share of the batch each; the third step, when its buckets have been arranged anew."""
    model = network(layer, 32)
    if unused:
        model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    parallel = nn.parallel.DistributedDataParallel(model, **options)
    for _ in range(3):
        parallel.zero_grad()
        parallel(share(batch(32))).square().mean().backward()
    if unused:
        model.unused.grad = None
    return {"error": error_of(parallel, 32)}


def fsdp(n: int, *, layer: type[TorchLayer] = JaxLayer, **options: Any) -> dict[str, Any]:
    """FSDP2's gradients, with junk where a freed weight may have been; and what is left of a weight after the forward."""
    from torch.distributed.fsdp import fully_shard

    model = network(layer, n)
    gathered: list[torch.Tensor] = []  # the whole weights, as the layers see them
    for part in model:
        part.register_forward_hook(lambda part, *_: gathered.extend(p for p in part.parameters() if p.dim() == 2))
        fully_shard(part, **options)
    fully_shard(model, **options)
    for _ in range(2):
        model.zero_grad()
        gathered.clear()
        loss = model(share(batch(n))).square().mean()
        gc.collect()
        copies = [a for a in jax.live_arrays() if a.shape == (n, n)]
        sizes = [p.untyped_storage().size() for p in gathered]
        junk = [torch.full((n, n), math.nan) for _ in range(8)]
        loss.backward()
        del junk
    return {
        "error": error_of(model, n),
        "weights": len(gathered),
        "gathered": sum(size > 0 for size in sizes),
        "copies": len(copies),
    }


def fsdp_mixed(layer: type[TorchLayer]) -> dict[str, Any]:
    """The same in mixed precision."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return fsdp(64, layer=layer, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def saved_and_loaded() -> dict[str, Any]:
    """A sharded model through a checkpoint on disk into one with other weights; both go on alike."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    def sharded() -> nn.Module:
        model = network(JaxLayer, 32)
        for part in model:
            fully_shard(part)
        return fully_shard(model)

    model, other = sharded(), sharded()
    with torch.no_grad():
        for p in other.parameters():
            p.fill_(7)
    dcp.save(get_model_state_dict(model), checkpoint_id="checkpoint")
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id="checkpoint")
    set_model_state_dict(other, state)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    same = all(torch.equal(whole(p), whole(q)) for p, q in pairs)
    other(share(batch(32))).square().mean().backward()
    return {"same": same, "error": error_of(other, 32)}


def saved_on_cpu(f: Fn, *xs: Any) -> Any:
    """A call whose residuals are kept elsewhere."""
    with torch.autograd.graph.save_on_cpu():
        return f(*xs)


def refused() -> dict[str, Any]:
    """What each level says of a DTensor, as an argument and as a cotangent; and the way out, taken."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    plain = torch.arange(1.0, 9)
    x = distribute_tensor(plain, mesh, [Shard(0)])
    y = distribute_tensor(plain, mesh, [Shard(0)]).requires_grad_()
    f, local = levels(lambda x: x * x), plain.clone().requires_grad_()
    calls: dict[str, Callable[[], Any]] = {
        "bare": lambda: torch_to_jax(x),
        "plain": lambda: as_torch(lambda x: x * x)(x),
        "differentiable": lambda: differentiable(as_torch(lambda x: x * x))(y),
        "jittable": lambda: jittable(as_torch(lambda x: x * x))(x),
        "every level": lambda: f(y),
        "in a dictionary": lambda: levels(lambda d: d["w"] * 2)({"w": y}),
        "beside a tensor": lambda: levels(lambda x, y: x + y)(plain, x),
        "a parameter": lambda: f(nn.Parameter(x)),
        "a cotangent": lambda: torch.autograd.grad(f(local), local, x),
        "a cotangent of a graph": lambda: torch.autograd.grad(f(local), local, x, create_graph=True),
        "torch.func.vjp": lambda: torch.func.vjp(f, plain)[1](x),
        "torch.func.grad": lambda: torch.func.grad(lambda x: f(x).sum())(x),
        "torch.func.vmap": lambda: torch.func.vmap(f)(x),
        "checkpoint": lambda: checkpoint(f, y, use_reentrant=False),
        "save_on_cpu": lambda: saved_on_cpu(f, y),
    }
    said: dict[str, Any] = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            said[name] = [isinstance(error, interop.LeafError), str(error)]
        else:
            said[name] = [False, "passed"]
    out = DTensor.from_local(f(y.to_local()), mesh, [Shard(0)])
    out.sum().full_tensor().backward()
    right = torch.equal(whole(out).detach(), plain**2) and torch.equal(whole(y.grad), 2 * plain)
    return {"said": said, "local": right}


def local_map_of_layer() -> dict[str, Any]:
    """`local_map` of a crossing, told that the gradient of what is replicated is a partial sum."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.experimental import local_map

    mesh = init_device_mesh("cpu", (2,))
    x, w = batch(16), torch.randn(16, 16, generator=torch.Generator().manual_seed(2))
    mapped = local_map(
        levels(lambda x, w: jnp.tanh(x @ w)),
        out_placements=[Shard(0)],
        in_placements=([Shard(0)], [Replicate()]),
        in_grad_placements=([Shard(0)], [Partial()]),
        device_mesh=mesh,
    )
    dx = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
    dw = distribute_tensor(w, mesh, [Replicate()]).requires_grad_()
    mapped(dx, dw).square().sum().backward()
    x.requires_grad_()
    w.requires_grad_()
    torch.tanh(x @ w).square().sum().backward()
    pairs = [(whole(dx.grad), x.grad), (whole(dw.grad), w.grad)]
    return {"error": max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)}


def fabric() -> dict[str, Any]:
    """Lightning Fabric around the network, by DDP."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment

    run = Fabric(accelerator="cpu", devices=2, strategy="ddp", plugins=[LightningEnvironment()])
    run.launch()
    model = network(JaxLayer, 32)
    wrapped, optimizer = run.setup(model, torch.optim.SGD(model.parameters(), lr=0.0))
    for _ in range(2):
        optimizer.zero_grad()
        run.backward(wrapped(share(batch(32))).square().mean())
        optimizer.step()
    return {"error": error_of(model, 32), "size": run.world_size, "strategy": type(run.strategy).__name__}


DDP: dict[str, Callable[[], dict[str, Any]]] = {
    "default": ddp,
    "small buckets": lambda: ddp(bucket_cap_mb=1e-3),
    "gradient_as_bucket_view": lambda: ddp(gradient_as_bucket_view=True),
    "find_unused_parameters": lambda: ddp(unused=True, find_unused_parameters=True),
    "static_graph": lambda: ddp(static_graph=True),
    "checkpointed": lambda: ddp(Checkpointed),
    "checkpointed, static_graph": lambda: ddp(Checkpointed, static_graph=True),
}
FSDP: dict[str, Callable[[], dict[str, Any]]] = {
    f"{kind}{n}, reshard {reshard}": functools.partial(fsdp, n, layer=layer, reshard_after_forward=reshard)
    for kind, layer, n in (("", JaxLayer, 64), ("", JaxLayer, 1024), ("checkpointed ", Checkpointed, 64))
    for reshard in (True, False)
}
OTHERS: dict[str, Callable[[], dict[str, Any]]] = {
    "mixed precision": lambda: fsdp_mixed(JaxLayer),
    "mixed precision in torch": lambda: fsdp_mixed(TorchLayer),
    "saved and loaded": saved_and_loaded,
    "local_map": local_map_of_layer,
    "refused": refused,
    "fabric": fabric,
}


def two_processes() -> None:
    """One of the two."""
    one_of_two(DDP | FSDP | OTHERS)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found, by name."""
    return two_ranks("import test_engines; test_engines.two_processes()", tmp_path_factory.mktemp("ranks"))


# --- DDP --------------------------------------------------------------------------------------------------------------


def test_both_processes_come_to_an_end(ranks: list[dict[str, Any]]) -> None:
    assert [rank["exit"] for rank in ranks] == [0, 0], ranks[0]["tail"] + ranks[1]["tail"]


@pytest.mark.parametrize("mode", DDP)
def test_ddp(ranks: list[dict[str, Any]], mode: str) -> None:
    """The gradients are those of one process on the whole batch."""
    for found in each(ranks, mode):
        assert found["error"] < 1e-6


def test_fabric(ranks: list[dict[str, Any]]) -> None:
    """Lightning's, around DDP."""
    for found in each(ranks, "fabric"):
        assert (found["size"], found["strategy"]) == (2, "DDPStrategy")
        assert found["error"] < 1e-6


# --- FSDP2 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", FSDP)
def test_fsdp(ranks: list[dict[str, Any]], mode: str) -> None:
    """The same by FSDP2, which frees a weight after the forward and reuses its memory before the backward."""
    for found in each(ranks, mode):
        assert found["error"] < 1e-6


@pytest.mark.parametrize("mode", FSDP)
def test_fsdp_saves_the_memory_of_the_weights(ranks: list[dict[str, Any]], mode: str) -> None:
    """A weight that the backward needs is kept by torch, to be freed and gathered again; JAX has no copy."""
    for found in each(ranks, mode):
        assert found["weights"] == 3
        assert found["gathered"] == (0 if mode.endswith("True") else 3)
        assert found["copies"] == 0


def test_fsdp_in_mixed_precision(ranks: list[dict[str, Any]]) -> None:
    """Computed in bfloat16, and as exact as torch is."""
    ours, theirs = each(ranks, "mixed precision"), each(ranks, "mixed precision in torch")
    for found, expected in zip(ours, theirs, strict=True):
        assert found["error"] < max(2 * expected["error"], 1e-6) < 0.05
        assert (found["gathered"], found["copies"]) == (0, 0)


def test_a_sharded_model_through_a_checkpoint(ranks: list[dict[str, Any]]) -> None:
    """Every weight arrives, and the loaded model has the gradients of the saved one."""
    for found in each(ranks, "saved and loaded"):
        assert found["same"]
        assert found["error"] < 1e-6


CROSSED: dict[str, Callable[[torch.Tensor], Any]] = {
    "call": lambda x: as_torch(lambda a: a + 1)(x),
    "forward": lambda x: levels(lambda a: a * a)(x.requires_grad_()),
    "backward": lambda x: torch.autograd.grad(levels(lambda a: a * a)(x.requires_grad_()).sum(), x),
    "cotangent": lambda x: torch.autograd.grad(levels(lambda a: a * a)(y := torch.ones(3).requires_grad_()), y, x),
    "torch.func": lambda x: torch.func.vmap(levels(lambda a: a * a))(x),
    "result": lambda x: interop.as_jax(lambda _: x)(jnp.ones(3)),
    "conversion": lambda x: torch_to_jax(x),
}


@pytest.mark.parametrize("cross", CROSSED.values(), ids=CROSSED)
def test_a_tensor_that_has_crossed_can_be_resized(cross: Callable[[torch.Tensor], Any]) -> None:
    """It is as it was; who frees and fills storages, as FSDP2 does, finds nothing changed."""
    x = torch.ones(3)
    cross(x)
    x.detach().untyped_storage().resize_(64)
    assert x.tolist() == [1, 1, 1]


# --- DTensor and other tensors that are not their memory --------------------------------------------------------------

REFUSALS = ["bare", "plain", "differentiable", "jittable", "every level", "in a dictionary", "beside a tensor"]
REFUSALS += ["a parameter", "a cotangent", "a cotangent of a graph", "torch.func.vjp"]
REFUSALS += ["torch.func.grad", "torch.func.vmap", "checkpoint", "save_on_cpu"]


@pytest.mark.parametrize("way", REFUSALS)
def test_a_dtensor_is_refused_and_the_way_out_named(ranks: list[dict[str, Any]], way: str) -> None:
    """It is one process's view of a value, and has no memory of its own."""
    for found in each(ranks, "refused"):
        ours, text = found["said"][way]
        assert ours, text
        assert "DTensor" in text
        assert "x.to_local()" in text


def test_the_local_part_of_a_dtensor_crosses(ranks: list[dict[str, Any]]) -> None:
    """There and back, with its gradient."""
    assert [found["local"] for found in each(ranks, "refused")] == [True, True]


def test_local_map(ranks: list[dict[str, Any]]) -> None:
    """Torch's own way to give local parts to a function."""
    for found in each(ranks, "local_map"):
        assert found["error"] < 1e-6


def odd() -> None:
    """Print what is said of a subclass that wraps its value, and of a fake tensor outside its mode, by level."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner: torch.Tensor) -> Any:
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        __torch_dispatch__ = classmethod(lambda cls, func, types, args=(), kwargs=None: NotImplemented)

    n = 1 << 16  # enough that address 0 could not be read
    with FakeTensorMode():
        fakes = [torch.ones(n), torch.ones(n, requires_grad=True)]
    wrappers = [Wrapper(torch.ones(n)), Wrapper(torch.ones(n)).requires_grad_()]
    plain, x = as_torch(lambda a: a * a), torch.ones(n, requires_grad=True)
    calls: dict[str, Callable[[Any, Any], Any]] = {
        "plain": lambda bad, _: plain(bad),
        "jittable": lambda bad, _: jittable(plain)(bad),
        "differentiable": lambda bad, _: differentiable(plain)(bad),
        "its gradient": lambda _, bad: differentiable(plain)(bad),
        "levels": lambda bad, _: differentiable(jittable(plain))(bad),
        "their gradient": lambda _, bad: differentiable(jittable(plain))(bad),
        "a cotangent": lambda bad, _: torch.autograd.grad(differentiable(plain)(x), x, bad),
    }
    for made, pair in {"wrapper": wrappers, "fake": fakes}.items():
        for called, call in calls.items():
            try:
                call(*pair)
                print(json.dumps([made, called, "", ""]))
            except interop.InteropError as error:
                print(json.dumps([made, called, type(error).__name__, str(error)]))
    assert plain(torch.full((), 3.0)).item() == 9


def test_other_tensors_without_memory_are_refused_at_every_level(run_python: Callable[..., str]) -> None:
    """A tensor type by its name, a fake one by the level that a trace needs. Nothing reads address 0."""
    out = run_python("import test_engines; test_engines.odd()", PYTHONPATH=PATHS)
    said = {(made, called): (kind, text) for made, called, kind, text in map(json.loads, out.splitlines())}
    assert len(said) == 14
    for (made, called), (kind, text) in said.items():
        if made == "wrapper" or called == "a cotangent":
            assert kind == "LeafError", (made, called)
            assert ("Wrapper" if made == "wrapper" else "FakeTensor") in text
        elif called in ("plain", "differentiable", "its gradient"):
            assert kind == "NotJittableError", (made, called)
            assert "@jittable" in text
        else:
            assert kind == "", (made, called, text)


# --- JAX in torch in JAX ----------------------------------------------------------------------------------------------


def nested(asynchronous: bool, rounds: int) -> None:
    """Print, by program, how many runs were right, and how many were refused for the reason that there is."""
    jax.config.update("jax_cpu_enable_async_dispatch", asynchronous)
    inner = levels(lambda t: jnp.tanh(t @ t / 500))
    outer = differentiable(jittable(interop.as_jax(lambda t: inner(t) + t)))
    a = jax.random.uniform(jax.random.key(0), (500, 500))

    def pure(t: Any) -> Any:
        return jnp.tanh(t @ t / 500) + t

    programs: dict[str, Callable[[Any], Any]] = {
        "alone": lambda f: jax.jit(f),
        "in between": lambda f: jax.jit(lambda a: f(a @ a / 500) @ a),
        "of a value on its way": lambda f: lambda a: jax.jit(f)(jax.jit(lambda a: (a @ a) @ a / 1e4)(a)),
        "gradient": lambda f: jax.jit(jax.grad(lambda a: f(a @ a / 500).sum())),
        "scan": lambda f: jax.jit(lambda a: jax.lax.scan(lambda c, _: (f(c) / 2, None), a, None, length=3)[0]),
        "without jit": lambda f: f,
    }
    for name, program in programs.items():
        run, expected = program(outer), program(pure)(a)
        right = refused = 0
        for _ in range(rounds):
            try:
                right += bool(jnp.allclose(run(a), expected, rtol=1e-3, atol=1e-3))
            except Exception as error:  # under jit the type is JAX's own
                if "NestedError" not in repr(error) or "jax_cpu_enable_async_dispatch" not in str(error):
                    raise
                refused += 1
        print(json.dumps([name, right, refused]), flush=True)


@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "synchronous"])
def test_jax_in_torch_in_jax_never_hangs(run_python: Callable[..., str], asynchronous: bool) -> None:
    """Large enough to need XLA's threads, which may all wait: right, or refused by a message that names the switch."""
    rounds = 30 if asynchronous else 5
    out = run_python(
        f"import test_engines; test_engines.nested({asynchronous}, {rounds})", PYTHONPATH=PATHS, timeout=60
    )
    found = {name: (right, refused) for name, right, refused in map(json.loads, out.splitlines())}
    assert len(found) == 6
    for name, (right, refused) in found.items():
        assert right + refused == rounds, (name, right, refused)
        if not asynchronous or name == "without jit":
            assert right == rounds, name


# --- under load -------------------------------------------------------------------------------------------------------


def test_nothing_is_lost_or_shared_under_load() -> None:
    """Large arguments are written, or gone, as soon as a call has returned; every result stays what it was."""
    n, trials = 1024, 12
    f = levels(lambda x, m, s: (jnp.tanh(x @ m) + s, s * 2))
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for trial in range(trials):
        x, m, s, c = (torch.rand(n, n) / 16 + trial / 100 for _ in range(4))
        x.requires_grad_(trial % 3 != 0)
        s.requires_grad_(trial % 3 != 1)
        y = torch.tanh(x.detach() @ m)
        expected = [y + s.detach(), s.detach() * 2, c * (1 - y * y) @ m.T, c + 2 * c]
        total, double = f(x, m, s)
        with torch.no_grad():  # the gradients need neither; only m and the tanh
            x.zero_()
            s.fill_(math.nan)
        del m
        junk = [torch.full((n, n), math.nan) for _ in range(4)]
        wanted = [t for t in (x, s) if t.requires_grad]
        grads = torch.autograd.grad((total, double)[: 1 + s.requires_grad], wanted, (c, c)[: 1 + s.requires_grad])
        c.zero_()
        del junk
        found = dict(zip([2] * x.requires_grad + [3] * s.requires_grad, grads, strict=True))
        kept += [(total.detach(), expected[0]), (double.detach(), expected[1])]
        kept += [(g, expected[i]) for i, g in found.items()]
        assert len(found) == 1 + (trial % 3 == 2)
    for got, expected_of in kept:
        torch.testing.assert_close(got, expected_of, rtol=1e-4, atol=1e-4)
    starts = sorted(got.data_ptr() for got, _ in kept)
    assert all(b - a >= 4 * n * n for a, b in zip(starts, starts[1:], strict=False)), "no two share memory"


def resident() -> float:
    """The memory of this process now, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _fails(x: Any) -> Any:
    raise ZeroDivisionError


def _attempt(x: torch.Tensor) -> None:
    with pytest.raises(ZeroDivisionError):
        FAILING(x)


SIN, FAILING = levels(lambda x: jnp.sin(x) * x), levels(_fails)
LOOPS: dict[str, Callable[[torch.Tensor], Any]] = {
    "call": lambda x: SIN(x.detach()),
    "backward": lambda x: SIN(x).sum().backward(),
    "a graph that is dropped": lambda x: SIN(x),
    "a graph that is retained": lambda x: torch.autograd.grad(SIN(x).sum(), x, retain_graph=True),
    "second order": lambda x: torch.autograd.grad(torch.autograd.grad(SIN(x).sum(), x, create_graph=True)[0].sum(), x),
    "torch.func": lambda x: torch.func.grad(lambda x: SIN(x).sum())(x.detach()),
    "unaligned": lambda x: SIN(x.detach().flatten()[1:]),
    "double": lambda x: SIN(x.detach().double()),
    "an error": _attempt,
}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="nobody says how much memory is in use")
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_a_loop_needs_no_more_memory(loop: Callable[[torch.Tensor], Any]) -> None:
    """One megabyte lost in each call would be 120."""
    x = torch.rand(512, 512, requires_grad=True)
    for _ in range(20):
        loop(x)
    gc.collect()
    before, alive = resident(), len(jax.live_arrays())
    for _ in range(120):
        loop(x)
    assert resident() - before < 40
    assert len(jax.live_arrays()) <= alive + 2


def test_a_parameter_made_from_an_array_is_trained_and_the_array_is_not() -> None:
    """With a copy, an optimizer's step leaves what JAX takes for immutable."""
    a = jnp.ones(8)
    p = nn.Parameter(interop.jax_to_torch(a, copy=True))
    optimizer = torch.optim.SGD([p], lr=0.1)
    levels(lambda x: (x * x).sum())(p).backward()
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((8,), 0.8))
    assert a.tolist() == [1] * 8
