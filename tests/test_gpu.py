"""Both directions on a GPU: where results are, which stream waits for which, and what memory is kept.

With `INTEROP_DEVICE=cuda` this file and the matrix run there (`make test-gpu`); without, all of it is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from hosts import DEVICE, numpy_of
from interop import (
    DeviceError,
    WrappedJaxFunction,
    as_jax,
    as_torch,
    differentiable,
    jax_to_torch,
    jittable,
    make_functional,
    torch_to_jax,
)

pytestmark = pytest.mark.skipif(DEVICE != "cuda", reason="INTEROP_DEVICE is not cuda")
SIZE = 2**24  # large enough for an allocator to give the same memory again
LONG = 100_000_000  # cycles of the GPU: some 50 ms
Fn = Callable[..., Any]


def into_jax(fn: Fn, **options: Any) -> Fn:
    return differentiable(jittable(as_jax(fn, **options)))


def into_torch(fn: Fn) -> Fn:
    return differentiable(jittable(as_torch(fn)))


def array(value: float) -> jax.Array:
    """A large one on the GPU, that is there."""
    return jax.block_until_ready(jnp.full(SIZE, value))


def tensor(value: float) -> torch.Tensor:
    """A large one on the GPU, that is there."""
    found = torch.full((SIZE,), value, device="cuda")
    torch.cuda.synchronize()
    return found


def sleep() -> None:
    """Keep torch's stream busy."""
    torch.cuda._sleep(LONG)


@jax.jit
def _busy(m: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, 40, lambda _, x: jnp.tanh(x @ m), m)[0, 0]


def busy() -> jax.Array:
    """Keep JAX's stream busy; a zero that is there when it is done."""
    return _busy(jnp.zeros((4096, 4096)))


def slowly(x: jax.Array) -> jax.Array:
    """In JAX: read it late."""
    return x + 1 + jax.lax.fori_loop(0, 40, lambda _, m: jnp.tanh(m @ m), jnp.zeros((4096, 4096)))[0, 0]


def equal(x: Any, value: float) -> bool:
    return bool((numpy_of(x) == value).all())


# --- where results are ------------------------------------------------------------------------------------------------

ASKED: dict[str, Fn] = {
    "call": lambda f, x: f(x),
    "jit": lambda f, x: jax.jit(f)(x),
    "gradient": lambda f, x: jax.grad(lambda x: f(x).sum())(x),
    "jit of gradient": lambda f, x: jax.jit(jax.grad(lambda x: f(x).sum()))(x),
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,))[1],
    "vmap": lambda f, x: jax.vmap(f)(x),
    "Hessian": lambda f, x: jax.hessian(lambda x: f(x).sum())(x),
    "scan": lambda f, x: jax.jit(lambda x: jax.lax.scan(lambda c, r: (c, f(r)), 0, x)[1])(x),
}


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_a_torch_function_runs_on_the_gpu_of_its_arguments(ask: Fn) -> None:
    x = jax.device_put(jnp.arange(12.0).reshape(3, 4) / 12, jax.devices("gpu")[0])
    scale = torch.tensor(2.0, device="cuda")
    seen: list[torch.device] = []

    def fn(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.device)
        return torch.tanh(x * scale)

    got = ask(into_jax(fn), x)
    np.testing.assert_allclose(got, ask(lambda x: jnp.tanh(x * 2), x), atol=1e-5)
    assert {d.platform for d in got.devices()} == {"gpu"}
    assert {d.type for d in seen} == {"cuda"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_jax_function_runs_where_its_tensors_are(device: str) -> None:
    """Wherever JAX would have put them."""
    f = into_torch(lambda x, n: jnp.tanh(x) * n)
    x = torch.linspace(0, 1, 5, device=device, requires_grad=True)
    y = f(x, 2)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    assert {t.device.type for t in (y, g, h, torch.func.vmap(f, (0, None))(x.detach(), 2))} == {device}
    torch.testing.assert_close(g, 2 / torch.cosh(x) ** 2)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_torch_function_runs_where_its_arrays_are(platform: str) -> None:
    x = jax.device_put(jnp.arange(3.0), jax.devices(platform)[0])
    for f in (into_jax(torch.sin), jax.jit(into_jax(torch.sin)), jax.grad(lambda x: into_jax(torch.sin)(x).sum())):
        assert {d.platform for d in f(x).devices()} == {platform}
    add = into_jax(lambda x, y: x + y)
    assert {d.platform for d in add(jnp.arange(3.0), x).devices()} == {
        platform
    }  # as in JAX, what was put nowhere moves


def test_arrays_on_two_devices_are_refused() -> None:
    x, y = (jax.device_put(jnp.ones(3), jax.devices(platform)[0]) for platform in ("cpu", "gpu"))
    with pytest.raises(DeviceError, match="arrays on cpu and cuda:0 together. Move them to one device"):
        into_jax(lambda x, y: x + y)(x, y)


def test_numbers_alone_are_computed_on_where_torch_would() -> None:
    f = into_torch(lambda a, b: a * b)
    assert f(2.0, 3.0).device.type == "cpu"
    assert f(torch.tensor(2.0), 3.0).device.type == "cpu"
    with torch.device("cuda"):
        assert f(2.0, 3.0).device.type == "cuda"


def test_a_number_of_the_cpu_goes_where_the_others_are() -> None:
    f = into_torch(lambda x, n: jnp.sin(x) * n)
    x, n = torch.ones(3, device="cuda", requires_grad=True), torch.tensor(2.0, requires_grad=True)
    y = f(x, n)
    assert y.device.type == "cuda"
    y.sum().backward()
    assert (x.grad.device.type, n.grad.device.type) == ("cuda", "cpu")
    torch.testing.assert_close(n.grad, torch.sin(x.detach()).sum().cpu())


@pytest.mark.parametrize("other", [lambda: torch.ones(3), lambda: torch.ones(3, requires_grad=True)])
def test_tensors_on_two_devices_are_refused(other: Callable[[], torch.Tensor]) -> None:
    f = into_torch(lambda x, y: x + y)
    for pair in ((torch.ones(3, device="cuda"), other()), (other(), torch.tensor(1.0, device="cuda"))):
        with pytest.raises(DeviceError, match="together.*Move them to one device"):
            f(*pair)


def test_what_was_put_nowhere_goes_where_the_tensors_are() -> None:
    """As in JAX: an array of numpy, an array or a key that JAX has put on its default device."""
    f = into_torch(lambda x, y: x + y)
    noise = into_torch(lambda x, key: x + jax.random.normal(key, x.shape))
    for device in ("cpu", "cuda"):
        x = torch.ones(3, device=device)
        for other in (np.ones(3, np.float32), jnp.ones(3)):
            y = f(x, other)
            assert (y.device.type, y.tolist()) == (device, [2, 2, 2])
        assert noise(x, jax.random.key(0)).device.type == device


def test_bare_conversions_keep_the_device() -> None:
    t, a = torch.arange(3.0, device="cuda"), jnp.arange(3.0)
    assert torch_to_jax(t).devices() == {jax.devices("gpu")[0]}
    assert jax_to_torch(a).device == torch.device("cuda", 0)
    assert jax_to_torch(a).data_ptr() == a.unsafe_buffer_pointer()  # shared
    assert torch_to_jax(torch.device("cuda", 0)) == jax.devices("gpu")[0]


# --- which stream waits for which -------------------------------------------------------------------------------------

TRIALS = range(5)


def test_torch_waits_for_what_jax_computes() -> None:
    f = into_torch(slowly)
    assert all(equal(f(tensor(1.0)), 2) for _ in TRIALS)


def test_jax_waits_for_what_torch_computes() -> None:
    def late(x: torch.Tensor) -> torch.Tensor:
        sleep()
        return x + 1

    f = into_jax(late)
    for run in (f, jax.jit(f), jax.jit(lambda x: f(x * 2) / 2 + 0.5)):
        assert all(equal(run(array(1.0)), 2) for _ in TRIALS)


def test_jax_waits_for_an_argument() -> None:
    f = into_torch(lambda x: x * 2)
    for _ in TRIALS:
        sleep()
        assert equal(f(torch.full((SIZE,), 3.0, device="cuda")), 6)


def test_torch_waits_for_an_argument() -> None:
    for f in (into_jax(lambda x: x * 2), jax.jit(into_jax(lambda x: x * 2))):
        assert all(equal(f(array(3.0) + busy()), 6) for _ in TRIALS)


def test_the_stream_that_is_current_is_the_one_that_waits() -> None:
    f = into_torch(slowly)
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in TRIALS:
            sleep()
            assert equal(f(torch.full((SIZE,), 1.0, device="cuda")), 2)


def test_what_a_stream_has_still_to_write_is_seen_by_a_backward() -> None:
    f = into_torch(lambda x: x * 2)
    x = tensor(0.0).requires_grad_()
    with torch.cuda.stream(torch.cuda.Stream()):
        for k in TRIALS:
            y = f(x)
            cotangent = torch.zeros_like(y)
            sleep()
            cotangent.fill_(k)
            (grad,) = torch.autograd.grad(y, x, cotangent)
            assert equal(grad + 0, 2 * k)


def test_threads_at_once() -> None:
    f = into_torch(lambda x: jnp.sin(x) * x)

    def work(i: int) -> list[torch.Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            x = torch.full((1 << 16,), float(i), device="cuda", requires_grad=True)
            y = f(x)
            y.sum().backward()
            return [y.detach().cpu(), x.grad.cpu()]

    xs = [torch.full((1 << 16,), float(i)) for i in range(8)]
    expected = [[torch.sin(x) * x, torch.cos(x) * x + torch.sin(x)] for x in xs]
    with ThreadPoolExecutor(8) as pool:
        torch.testing.assert_close(list(pool.map(work, range(8))), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_a_device_that_is_not_the_current_one() -> None:
    """The values decide, not the state of the thread, which stays."""
    f = into_torch(lambda x: x * x)
    x = torch.full((64,), 3.0, device="cuda:1", requires_grad=True)
    y = f(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert {y.device, grad.device} == {torch.device("cuda:1")}
    assert torch.cuda.current_device() == 0
    assert (y[0].item(), grad[0].item()) == (9, 6)
    with pytest.raises(DeviceError, match=r"cuda:[01].*cuda:[01]"):
        into_torch(lambda x, y: x * y)(x, torch.ones(64, device="cuda:0"))


def test_an_argument_may_be_written_to_as_soon_as_the_call_returns() -> None:
    f = into_torch(slowly)
    for _ in TRIALS:
        x = tensor(1.0)
        y = f(x)
        x.zero_()
        assert equal(y, 2)


def test_what_a_torch_function_closes_over_may_be_written_to_before_and_after() -> None:
    weight = tensor(0.0)

    def fn(x: torch.Tensor) -> torch.Tensor:
        sleep()
        return x + weight

    for run in (into_jax(fn), jax.jit(into_jax(fn))):
        for i in TRIALS:
            sleep()
            weight.fill_(i)
            y = run(array(1.0))
            weight.zero_()
            assert equal(y, i + 1)


# --- what memory is kept ----------------------------------------------------------------------------------------------


def jax_uses_memory_again(value: float) -> list[jax.Array]:
    return [jnp.full(SIZE, value) for _ in range(4)]


def torch_uses_memory_again(value: float) -> list[torch.Tensor]:
    return [torch.full((SIZE,), value, device="cuda") for _ in range(4)]


def test_a_result_may_be_dropped_while_torch_reads_it() -> None:
    f = into_torch(lambda x: x + 1)
    for _ in TRIALS:
        x = tensor(1.0)
        y = f(x)
        sleep()
        z = y.clone()
        del y
        others = jax_uses_memory_again(7.0)
        jax.block_until_ready(others)
        assert equal(z, 2)


def test_a_gradient_may_be_dropped_while_torch_reads_it() -> None:
    f = into_torch(lambda x: jnp.sin(x) * x)
    for _ in TRIALS:
        x = tensor(0.0).requires_grad_()
        (g,) = torch.autograd.grad(f(x), x, torch.ones_like(x))
        sleep()
        z = g + 1
        del g
        jax.block_until_ready(jax_uses_memory_again(7.0))
        assert equal(z, 1)


def test_an_argument_may_be_dropped_while_torch_reads_it() -> None:
    def late(x: torch.Tensor) -> torch.Tensor:
        sleep()
        return x + 1

    f = into_jax(late)
    for _ in TRIALS:
        x = array(1.0)
        y = f(x)
        del x
        jax.block_until_ready(jax_uses_memory_again(7.0))
        assert equal(y, 2)


def test_a_result_may_be_dropped_while_jax_reads_it() -> None:
    f, late = into_jax(lambda x: x + 1), jax.jit(slowly)
    for _ in TRIALS:
        y = f(array(0.0))
        z = late(y)
        del y
        others = torch_uses_memory_again(7.0)
        assert equal(z, 2)
        del others


def test_a_converted_array_may_be_dropped_while_torch_reads_it() -> None:
    for _ in TRIALS:
        a = array(1.0)
        t = jax_to_torch(a)
        sleep()
        z = t + 1
        del t, a
        jax.block_until_ready(jax_uses_memory_again(7.0))
        assert equal(z, 2)


def test_a_converted_tensor_may_be_dropped_while_jax_reads_it() -> None:
    late = jax.jit(slowly)
    for _ in TRIALS:
        t = tensor(1.0)
        a = torch_to_jax(t)
        z = late(a)
        del t, a
        others = torch_uses_memory_again(7.0)
        assert equal(z, 2)
        del others


def test_memory_is_given_back() -> None:
    """Of calls and gradients in a loop, either way."""
    f, g = into_torch(lambda x: jnp.sin(x) * x), into_jax(lambda x: torch.sin(x) * x)
    gradient = jax.jit(jax.grad(lambda x: g(x).sum()))

    def step() -> None:
        x = torch.ones(2**20, device="cuda", requires_grad=True)
        f(x).sum().backward()
        gradient(jax.grad(lambda x: g(x).sum())(jnp.ones(2**20)))

    def used() -> tuple[int, int]:
        torch.cuda.synchronize()
        f(torch.ones(3, device="cuda"))  # what was waited for is dropped by the next
        return torch.cuda.memory_allocated(), jax.devices()[0].memory_stats()["bytes_in_use"]

    for _ in range(5):
        step()
    before = used()
    for _ in range(50):
        step()
    after = used()
    assert all(b - a < 2**24 for a, b in zip(before, after, strict=True)), (before, after)


def test_a_jax_function_inside_a_compiled_program_is_refused() -> None:
    """XLA compiles nothing for a GPU while it runs a program there: it would hang."""
    inner = into_torch(lambda t: jnp.tanh(t @ t))
    outer = into_jax(lambda t: inner(t) + t)
    a = jnp.eye(500)
    np.testing.assert_allclose(outer(a), jnp.tanh(a @ a) + a, rtol=1e-6)
    with pytest.raises(jax.errors.JaxRuntimeError, match="NestedError.*on a GPU.*Call it outside jit"):
        jax.block_until_ready(jax.jit(outer)(a))
    np.testing.assert_allclose(outer(a), jnp.tanh(a @ a) + a, rtol=1e-6)


# --- randomness, modes, modules ---------------------------------------------------------------------------------------


def test_a_key_seeds_the_generator_of_the_gpu() -> None:
    f = into_jax(lambda x: torch.nn.functional.dropout(x, 0.5), rng="key")
    x, key = jnp.ones(1000), jax.random.key(3)
    before = torch.cuda.get_rng_state()
    first = f(x, key=key)
    assert bool((first == f(x, key=key)).all())
    assert bool((first == jax.jit(f)(x, key=key)).all())
    assert bool((first == jax.grad(lambda x: f(x, key=key).sum())(x)).all())
    assert bool((first == jax.jit(jax.grad(lambda x: f(x, key=key).sum()))(x)).all())
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_without_a_key_the_mask_of_the_backward_is_that_of_the_forward() -> None:
    f = into_jax(lambda x: torch.nn.functional.dropout(x, 0.5))
    for grad in (jax.value_and_grad(lambda x: f(x).sum()), jax.jit(jax.value_and_grad(lambda x: f(x).sum()))):
        value, g = grad(jnp.ones(1000))
        assert float(value) == float(g.sum())
        assert 700 < float(value) < 1300


def test_a_derivative_that_would_draw_others_is_refused() -> None:
    f = differentiable(as_jax(lambda x: torch.nn.functional.dropout(x, 0.5)))
    with pytest.raises(Exception, match="it draws random numbers"):
        jax.jvp(f, (jnp.ones(1000),), (jnp.ones(1000),))


def test_autocast_is_that_of_the_gpu() -> None:
    f = into_jax(lambda x: (x @ x).float() if (x @ x).dtype is torch.float16 else x * torch.nan)
    with torch.autocast("cuda", torch.float16):
        for run in (f, jax.jit(f)):
            assert equal(run(jnp.ones((4, 4))), 4)


def _network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 2)
    )


@pytest.mark.parametrize("way", [lambda f: f, jax.jit], ids=["eagerly", "compiled"])
def test_a_torch_module_trains_from_jax(way: Fn) -> None:
    net = _network().cuda()
    apply, params = make_functional(net.eval())
    assert {d.platform for leaf in jax.tree.leaves(params) for d in leaf.devices()} == {"gpu"}
    x, y = torch.randn(5, 3, 8, 8, device="cuda"), torch.randn(5, 2, device="cuda")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    sgd = optax.sgd(0.1)
    state = sgd.init(params)
    step = way(jax.value_and_grad(lambda p, x, y: ((apply(p, x) - y) ** 2).mean()))
    xs, ys = torch_to_jax(x), torch_to_jax(y)
    for _ in range(5):
        value, grads = step(params, xs, ys)
        updates, state = sgd.update(grads, state)
        params = optax.apply_updates(params, updates)
        optimizer.zero_grad()
        loss = ((net(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        np.testing.assert_allclose(float(value), loss.item(), rtol=1e-3)


def test_a_jax_model_trains_from_torch() -> None:
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 4)).astype(np.float32), "b": np.zeros(4, np.float32)}
    model = WrappedJaxFunction(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]), jax.tree.map(jnp.asarray, params)).to("cuda")
    x = torch.randn(7, 3, device="cuda")
    native = torch.nn.Linear(3, 4, device="cuda")
    native.weight.data.copy_(torch.tensor(params["w"]).T)
    native.bias.data.zero_()
    ours, theirs = torch.optim.Adam(model.parameters()), torch.optim.Adam(native.parameters())
    for _ in range(5):
        for optimizer, out in ((ours, model(x)), (theirs, torch.tanh(native(x)))):
            optimizer.zero_grad()
            (out**2).mean().backward()
            optimizer.step()
    torch.testing.assert_close(model(x), torch.tanh(native(x)), rtol=1e-3, atol=1e-4)


def test_a_compiled_caller() -> None:
    f = into_torch(lambda x: jnp.tanh(x) * 2)
    x = torch.linspace(0, 1, 5, device="cuda", requires_grad=True)
    run = torch.compile(lambda x: f(torch.sin(x)) + 1, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(run(x).sum(), x)
    (expected,) = torch.autograd.grad((torch.tanh(torch.sin(x)) * 2).sum(), x)
    torch.testing.assert_close(got, expected)


def test_64_bits() -> None:
    x = torch.linspace(0, 1, 5, device="cuda", dtype=torch.float64, requires_grad=True)
    f = into_torch(lambda x: jnp.sin(x) * x)
    assert torch.autograd.gradcheck(f, (x,))
    n = torch.tensor([1, 2, 3], device="cuda")
    assert f(n.double()).dtype is torch.float64
    assert torch.equal(into_torch(lambda n: n * 2)(n).long(), n * 2)
