"""What sharing memory between two asynchronous frameworks can break, each as a test through the public functions.

Every block is the shortest program that gave a wrong number, a crash or a hang without a defence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch

import interop
from interop import as_jax, as_torch, differentiable, jax_to_torch, jittable, torch_to_jax

N = 1500  # of a product that takes long enough to be overtaken


def levels(crossing: Callable[..., Any]) -> Callable[..., Any]:
    """The crossing with every level on."""
    return jittable(differentiable(crossing))


# --- a tensor is written while JAX still reads it ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def averaging() -> torch.Tensor:
    """A matrix that is its own square."""
    return torch.ones(N, N) / N


def test_a_write_after_a_call_does_not_reach_it(averaging: torch.Tensor) -> None:
    f = as_torch(lambda a: (a @ a) @ a)
    for _ in range(10):
        x = averaging.clone()
        y = f(x)
        x.zero_()
        torch.testing.assert_close(y[3, 3].item(), 1 / N, rtol=1e-4, atol=0)


def test_a_write_after_a_call_of_which_one_output_is_kept(averaging: torch.Tensor) -> None:
    """The small output is there before the large one is."""
    f = as_torch(lambda a: (a[0, 0], (a @ a) @ a))
    kept = []
    for _ in range(10):
        x = averaging.clone()
        small, large = f(x)
        x.zero_()
        del small
        kept.append(large[3, 3].item())
    torch.testing.assert_close(torch.tensor(kept), torch.full((10,), 1 / N), rtol=1e-4, atol=0)


def test_a_write_after_a_backward_does_not_reach_it(averaging: torch.Tensor) -> None:
    """Neither the cotangent nor the gradient is shared with work still going on."""
    f = levels(as_torch(lambda a: (a @ a) @ a))
    for _ in range(3):
        x = averaging.clone().requires_grad_()
        cotangent = averaging.clone()
        y = f(x)
        (grad,) = torch.autograd.grad(y, x, cotangent)
        cotangent.zero_()
        with torch.no_grad():
            x.zero_()
        torch.testing.assert_close(grad[3, 3].item(), 3 / N, rtol=1e-4, atol=0)


def test_a_tensor_that_a_torch_function_keeps_is_not_shared() -> None:
    """It returns its weight, and changes it later."""
    weight = torch.ones(1 << 16)
    f = as_jax(lambda x: weight)
    out = f(jnp.zeros(1))
    weight.zero_()
    assert float(out.min()) == 1


def test_a_view_of_what_is_kept_is_not_shared() -> None:
    memory = torch.ones(64)

    def f(x: torch.Tensor) -> torch.Tensor:
        memory.add_(1)
        return memory[16:32]

    g = as_jax(f)
    first, second = g(jnp.zeros(1)), g(jnp.zeros(1))
    assert first.tolist() == [2] * 16
    assert second.tolist() == [3] * 16


# --- a copy that is none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 1024, 1 << 20])
def test_a_copy_is_a_copy(size: int) -> None:
    x = torch.ones(size)
    a = torch_to_jax(x, copy=True)
    x.zero_()
    assert float(a.min()) == 1
    b = jnp.ones(size)
    t = jax_to_torch(b, copy=True)
    t.zero_()
    assert float(b.min()) == 1


# --- a copy that is not finished --------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [1, 4])
def test_the_copy_of_unaligned_memory_is_finished(offset: int) -> None:
    n = (16 << 20) + offset
    for _ in range(3):
        x = torch.ones(n)
        a = torch_to_jax(x[offset:])
        x.zero_()
        assert float(jnp.min(a)) == 1


def test_unaligned_memory_in_a_crossing() -> None:
    f = as_torch(lambda a: a * 1)
    x = torch.ones((1 << 20) + 1)
    for _ in range(20):
        x.fill_(1)
        y = f(x[1:])
        x.zero_()
        assert y.min() == 1


# --- an array that is written -----------------------------------------------------------------------------------------

WRITES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "add_": lambda t: t.add_(1),
    "item": lambda t: (t.__setitem__(0, 7), t)[1],
    "view": lambda t: (t[1:].zero_(), t)[1],
    "data": lambda t: (t.data.add_(1), t)[1],
    "numpy": lambda t: (t.detach().numpy().fill(3), t)[1],
    "out": lambda t: torch.mul(t, 2, out=t),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_function_that_writes_to_its_argument_leaves_the_array(write: Callable[[torch.Tensor], torch.Tensor]) -> None:
    a = jnp.arange(4.0)
    expected = write(torch.arange(4.0)).tolist()
    for _ in range(2):
        assert as_jax(write)(a).tolist() == expected
        assert a.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("write", [WRITES[name] for name in ("add_", "item", "view")], ids=["add_", "item", "view"])
def test_the_same_under_jit(write: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Nor does it change what else the program makes of the array."""
    f = jittable(as_jax(lambda t: write(t) + 1))
    a = jnp.arange(4.0)
    y, z = jax.jit(lambda a: (f(a), a * 2))(a)
    assert y.tolist() == (write(torch.arange(4.0)) + 1).tolist()
    assert z.tolist() == [0, 2, 4, 6]
    assert a.tolist() == [0, 1, 2, 3]


def test_a_large_argument_written_under_jit() -> None:
    def f(t: torch.Tensor) -> torch.Tensor:
        out = t + 1
        t.zero_()
        return out

    a = jnp.ones(1 << 16)
    y, z = jax.jit(lambda a: (jittable(as_jax(f))(a), a * 2))(a)
    assert [float(v.min()) for v in (y, z, a)] == [2, 2, 1]


def test_two_results_over_one_argument() -> None:
    """An argument given twice is two tensors to the function."""
    a = jnp.zeros(2)
    f = as_jax(lambda s, t: (s.add_(1), t))
    one, other = f(a, a)
    assert (one.tolist(), other.tolist(), a.tolist()) == ([1, 1], [0, 0], [0, 0])


# --- residuals that alias ---------------------------------------------------------------------------------------------

STALE = RuntimeError  # torch's "modified by an inplace operation"


@pytest.mark.parametrize(
    "fn", [lambda q: q * q, lambda q: jnp.exp(q), lambda q: q @ q], ids=["square", "exp", "product"]
)
def test_an_input_written_before_the_backward(fn: Callable[..., Any]) -> None:
    """The gradient is the one of the forward, or torch's own error; never one of the new values."""
    x = torch.full((4,), 3.0, requires_grad=True)
    expected = torch.autograd.grad(levels(as_torch(fn))(x).sum(), x)[0]
    y = levels(as_torch(fn))(x)
    with torch.no_grad():
        x.add_(100)
    try:
        y.sum().backward()
    except STALE as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("fn", [lambda q: q, lambda q: jnp.exp(q), lambda q: q * q], ids=["identity", "exp", "square"])
def test_an_output_written_before_the_backward(fn: Callable[..., Any]) -> None:
    x = torch.full((4,), 3.0, requires_grad=True)
    expected = torch.autograd.grad(levels(as_torch(fn))(x).sum(), x)[0]
    y = levels(as_torch(fn))(x)
    total = y.sum()
    with torch.no_grad():
        y.mul_(10)
    try:
        total.backward()
    except STALE as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(x.grad, expected)


def test_an_output_never_aliases_an_input() -> None:
    """What is returned as it came is a new tensor: writing to it writes to nothing else."""
    x = torch.zeros(64)
    outs = as_torch(lambda a: (a, a, a[:], jax.lax.stop_gradient(a), a.astype(a.dtype), a.reshape(8, 8)))(x)
    pointers = {out.data_ptr() for out in outs} | {x.data_ptr()}
    assert len(pointers) == 7
    outs[0].add_(1)
    assert x.sum() == 0
    assert outs[1].sum() == 0


def test_a_weight_written_before_the_backward_in_jax() -> None:
    """torch's own graph is the residual; the optimiser does not reach into it, or torch raises."""
    weight = torch.full((4,), 3.0)
    f = levels(as_jax(lambda x: (x * weight).sum()))
    _, pull = jax.vjp(f, jnp.ones(4))
    weight.add_(100)
    try:
        (grad,) = pull(jnp.float32(1))
    except STALE as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert grad.tolist() == [3] * 4


# --- tensors without memory -------------------------------------------------------------------------------------------


def test_a_tensor_without_memory_is_refused_and_does_not_crash(run_python: Callable[..., str]) -> None:
    """JAX would read address 0."""
    out = run_python(
        """
        import torch, interop
        from torch._subclasses.fake_tensor import FakeTensorMode

        class Wrapper(torch.Tensor):
            @staticmethod
            def __new__(cls, inner):
                return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
            def __init__(self, inner): self.inner = inner
            @classmethod
            def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
                inner = [a.inner if isinstance(a, cls) else a for a in args]
                out = func(*inner, **(kwargs or {}))
                return cls(out) if isinstance(out, torch.Tensor) else out

        with FakeTensorMode():
            fake = torch.ones(1 << 16)
        for bad in (fake, Wrapper(torch.ones(1 << 16))):
            try:
                interop.torch_to_jax(bad)
            except TypeError as error:
                print(type(error).__name__)
            try:
                interop.as_torch(lambda a: a + 0)(bad)
            except (TypeError, RuntimeError) as error:
                assert isinstance(error, interop.InteropError), error
                print("refused")
        assert interop.as_torch(lambda a: a + 1)(torch.zeros(1)).item() == 1
        """
    )
    assert out.split() == ["LeafError", "refused"] * 2


# --- 64 bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [2**31 + 5, 2**40 + 1, -(2**31) - 1])
def test_an_integer_is_exact_or_refused(value: int) -> None:
    for cross in (torch_to_jax, as_torch(lambda a: a * 1), levels(as_torch(lambda a: a * 1))):
        with pytest.raises(OverflowError, match=str(value)):
            cross(torch.tensor([value]))


def test_an_integer_inside_a_compiled_graph_is_exact_or_refused() -> None:
    f = torch.compile(levels(as_torch(lambda a: a * 1)), fullgraph=True, backend="aot_eager")
    assert f(torch.tensor([5])).item() == 5
    with pytest.raises(Exception, match=str(2**40 + 1)):
        f(torch.tensor([2**40 + 1]))


def test_a_double_is_a_double_in_forward_and_backward() -> None:
    x = torch.tensor([1e300, 1e-300], dtype=torch.float64, requires_grad=True)
    y = levels(as_torch(lambda a: jnp.sqrt(a) * 2 + jnp.zeros_like(a) + a.mean() * 0))(x)
    assert y.dtype is torch.float64
    torch.testing.assert_close(y.detach(), x.detach().sqrt() * 2, rtol=1e-14, atol=0)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.dtype is torch.float64
    torch.testing.assert_close(grad, 1 / x.detach().sqrt(), rtol=1e-14, atol=0)


def test_a_backward_in_another_thread_is_as_wide() -> None:
    """The switch belongs to a thread; the gradient must not."""
    from concurrent.futures import ThreadPoolExecutor

    x = torch.full((2,), 1 / 3, dtype=torch.float64, requires_grad=True)
    y = levels(as_torch(lambda a: (a**3).sum()))(x)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(y.backward).result()
    torch.testing.assert_close(x.grad, torch.full((2,), 1 / 3, dtype=torch.float64), rtol=1e-15, atol=0)


# --- strides ----------------------------------------------------------------------------------------------------------


def test_the_gradient_of_a_sum_has_stride_zero() -> None:
    x = torch.ones(32, requires_grad=True)
    levels(as_torch(lambda a: a * 2))(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2] * 32


STRIDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "expand": lambda t: t[:, :1].expand(4, 6),
    "step": lambda t: t[:, ::2],
    "transpose": lambda t: t.T,
    "diagonal": lambda t: t.diagonal(),
    "offset": lambda t: t[1:, 1:],
    "flip": lambda t: t.flip(0),
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_any_stride_goes_in_and_comes_back_as_a_gradient(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """As an argument, as a cotangent, and as both under jit in JAX."""
    x = torch.arange(24.0).reshape(4, 6).requires_grad_()
    square = levels(as_torch(lambda a: a * a))
    assert torch.equal(square(view(x.detach())), view(x.detach()) ** 2)
    weight = view(torch.arange(24.0, 48.0).reshape(4, 6))
    (ours,) = torch.autograd.grad(square(view(x)), x, weight)
    (theirs,) = torch.autograd.grad(view(x) ** 2, x, weight)
    assert torch.equal(ours, theirs)
    (through,) = torch.autograd.grad(view(square(x)), x, weight)
    (theirs,) = torch.autograd.grad(view(x**2), x, weight)
    assert torch.equal(through, theirs)


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_a_torch_function_may_return_any_stride(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    f = levels(as_jax(view))
    a = jnp.arange(24.0).reshape(4, 6)
    expected = view(torch.arange(24.0).reshape(4, 6))
    for call in (f, jax.jit(f)):
        assert call(a).tolist() == expected.tolist()
    x = torch.arange(24.0).reshape(4, 6).requires_grad_()
    (grad,) = torch.autograd.grad(view(x).pow(2).sum(), x)
    for gradient in (jax.grad(lambda b: (f(b) ** 2).sum()), jax.jit(jax.grad(lambda b: (f(b) ** 2).sum()))):
        assert gradient(a).tolist() == grad.tolist()


# --- bits that are not in the memory ----------------------------------------------------------------------------------


def test_lazy_bits_as_arguments_and_cotangents() -> None:
    z = torch.tensor([1 + 2j, 3 - 1j])
    negative = torch._neg_view(torch.ones(3))
    twice = levels(as_torch(lambda a: a * 2))
    assert torch.equal(twice(z.conj()), z.conj() * 2)
    assert torch.equal(twice(z.conj().imag), z.conj().imag * 2)
    assert torch.equal(twice(negative), negative * 2)
    x = torch.ones(3, requires_grad=True)
    (grad,) = torch.autograd.grad(twice(x), x, negative)
    assert grad.tolist() == [-2] * 3
    w = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    (grad,) = torch.autograd.grad(twice(w), w, z.conj())
    assert torch.equal(grad.resolve_conj(), (z.conj() * 2).resolve_conj())


def test_lazy_bits_as_results() -> None:
    z = jnp.array([1 + 2j, 3 - 1j])
    for fn in (torch.conj, lambda t: t.conj().imag, lambda t: torch._neg_view(t.real)):
        f = jittable(as_jax(fn))
        expected = fn(torch.tensor([1 + 2j, 3 - 1j])).tolist()
        assert f(z).tolist() == expected
        assert jax.jit(f)(z).tolist() == expected


def test_a_dual_tensor_keeps_its_tangent() -> None:
    """Forward mode, without a transform around it."""
    import torch.autograd.forward_ad as fwad

    f = levels(as_torch(lambda a: a * a))
    with fwad.dual_level():
        dual = fwad.make_dual(torch.tensor(3.0), torch.tensor(1.0))
        out, tangent = fwad.unpack_dual(f(dual))
        assert (out.item(), tangent.item()) == (9, 6)
        with pytest.raises(interop.NotDifferentiableError):
            as_torch(lambda a: a * a)(dual)


# --- modes of the thread ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "another default dtype": _double_by_default,
    "another default device": lambda: torch.device("meta"),
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(mode=True, check_nan=True),
    "disable_jit": jax.disable_jit,
    "enable_x64": lambda: jax.enable_x64(True),
    "checking_leaks": jax.checking_leaks,
    "debug_nans": lambda: jax.debug_nans(True),
}

ASKED: dict[str, Callable[[Callable[..., Any], jax.Array], Any]] = {
    "call": lambda f, a: f(a),
    "jit": lambda f, a: jax.jit(f)(a),
    "grad": lambda f, a: jax.grad(f)(a),
    "jit of grad": lambda f, a: jax.jit(jax.grad(f))(a),
    "vmap of grad": lambda f, a: jax.vmap(jax.grad(f))(a[None])[0],
    "hessian": lambda f, a: jax.hessian(f)(a),
    "checkpoint": lambda f, a: jax.grad(jax.checkpoint(f))(a),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_mode_of_the_thread_changes_no_result(mode: Callable[[], Any], asked: Callable[..., Any]) -> None:
    """A gradient that was asked for is the gradient, also where torch records none by itself."""
    a = jnp.arange(1.0, 4.0)
    expected = asked(lambda x: (x**3).sum(), a)
    with mode():
        got = asked(levels(as_jax(lambda t: (t**3).sum())), a)
    assert got.tolist() == expected.tolist()


# --- what escapes a callback ------------------------------------------------------------------------------------------


def test_a_value_that_escapes_a_compiled_program_stays_right() -> None:
    """A cache or a hook keeps a tensor; the program's buffers are used again."""
    kept: list[torch.Tensor] = []

    def f(t: torch.Tensor) -> torch.Tensor:
        out = t + 1
        kept.extend([t, out])
        return out

    g = jittable(as_jax(f))
    jax.jit(lambda a: g(a * 3) * 2)(jnp.ones(1 << 16)).block_until_ready()
    junk = [jnp.full(1 << 16, 7.0) + i for i in range(20)]
    values = [t for t in kept if not isinstance(t, torch._subclasses.FakeTensor)]
    assert [(t.min().item(), t.max().item()) for t in values] == [(3, 3), (4, 4)] * (len(values) // 2)
    assert values
    del junk


# --- memory that goes, and other devices -----------------------------------------------------------------------------


def test_a_storage_that_is_freed_after_a_call_takes_nothing_along(run_python: Callable[..., str]) -> None:
    """Neither the result, nor the gradient that needs none of it; JAX would read memory that is gone."""
    out = run_python(
        """
        import torch, jax, jax.numpy as jnp, interop
        f = interop.differentiable(interop.as_torch(lambda a: (a[0, 0], jnp.tanh(a), a * 3)))
        n, wrong = 4096, 0
        for trial in range(10):
            x = torch.full((n, n), 0.5, requires_grad=True)
            corner, bent, scaled = f(x)
            with torch.no_grad():
                x.untyped_storage().resize_(0)
            junk = torch.full((n, n), 7.0)
            (grad,) = torch.autograd.grad(bent.sum() + scaled.sum(), x)
            tanh = torch.tanh(torch.tensor(0.5))
            wrong += not torch.allclose(grad, 1 - tanh * tanh + 3)
            wrong += not (torch.allclose(bent, tanh) and bool((scaled == 1.5).all()) and corner == 0.5)
        x = torch.ones(1 << 16)
        y = interop.as_torch(lambda a: a + 1)(x)
        x.resize_(1 << 22)
        print(wrong, y.min().item(), y.max().item())
        """,
        timeout=120,
    )
    assert out.split() == ["0", "2.0", "2.0"]


def test_devices_of_jax_other_than_the_first(run_python: Callable[..., str]) -> None:
    """A default device, and a closure that lives on another: the values come, in either width."""
    out = run_python(
        """
        import torch, jax, jax.numpy as jnp, interop
        parameter = jax.device_put(jnp.arange(3.0), jax.devices()[3])
        f = interop.differentiable(interop.as_torch(lambda a: (a * parameter).sum()))
        with jax.default_device(jax.devices()[5]):
            g = interop.as_torch(lambda a: a * 2)
            for dtype in (torch.float32, torch.float64):
                print(g(torch.ones(2, dtype=dtype)).tolist())
        x = torch.ones(3, requires_grad=True)
        out = f(x)
        out.backward()
        print(out.item(), x.grad.tolist())
        sharded = jax.device_put(jnp.arange(8.0), jax.sharding.NamedSharding(
            jax.make_mesh((8,), ("i",)), jax.sharding.PartitionSpec("i")))
        print(interop.as_torch(lambda a, b: a + b)(torch.ones(8), sharded).tolist())
        """,
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )
    assert out.splitlines() == ["[2.0, 2.0]"] * 2 + ["3.0 [0.0, 1.0, 2.0]", "[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]"]


# --- programs that could hang or crash --------------------------------------------------------------------------------


def test_no_hang_in_a_loop_of_imports_and_exports(run_python: Callable[..., str]) -> None:
    run_python(
        """
        import time, torch, jax.numpy as jnp, interop
        f = interop.as_torch(lambda a: a + 1)
        g = interop.as_jax(lambda t: t + 1)
        end = time.time() + 4
        while time.time() < end:
            f(torch.zeros(1 << 16))
            g(interop.torch_to_jax(torch.zeros(1 << 16)))
        """,
        timeout=40,
    )


def test_a_forked_child_is_told(run_python: Callable[..., str]) -> None:
    """JAX's threads do not survive a fork; a crossing there says so within a second."""
    out = run_python(
        """
        import os, time, warnings
        warnings.simplefilter("ignore")
        import torch, jax.numpy as jnp, interop
        f = interop.as_torch(lambda a: a + 1)
        f(torch.zeros(1))
        pid = os.fork()
        if pid == 0:
            start = time.time()
            try:
                f(torch.zeros(1))
            except interop.ForkError as error:
                os._exit(0 if time.time() - start < 1 and "spawn" in str(error) else 3)
            os._exit(4)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        assert f(torch.zeros(1)).item() == 1
        """,
        timeout=40,
    )
    assert out == "0\n"


# --- modes of JAX -----------------------------------------------------------------------------------------------------


def test_a_crossing_is_no_transfer_that_a_guard_forbids() -> None:
    f = interop.differentiable(interop.as_torch(lambda x, k: (x * k).sum()))
    x, a = torch.ones(3, requires_grad=True), jnp.ones(3)
    with jax.transfer_guard("disallow"):
        assert torch.autograd.grad(f(x, 2.0), x)[0].tolist() == [2, 2, 2]
        assert float(interop.as_jax(torch.sum)(a)) == 3


def test_outputs_are_new_and_gradients_right_without_jit() -> None:
    """Not compiled, a function may return its input itself, and shows no trace in which residuals could be told apart."""
    x, y = torch.ones(3), torch.ones(3, requires_grad=True)
    f = interop.jittable(interop.differentiable(interop.as_torch(lambda x: x * x)))
    with jax.disable_jit():
        out = interop.as_torch(lambda x: x)(x)
        x.zero_()
        assert out.tolist() == [1, 1, 1]
        assert torch.autograd.grad(f(y).sum(), y)[0].tolist() == [2, 2, 2]
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        assert torch.autograd.grad(compiled(y).sum(), y)[0].tolist() == [2, 2, 2]
