"""Every dtype into a JAX function and back: what results and derivatives are, in 32 and in 64 bits, and what is refused.

Values are chosen to be exact in their dtype, so every comparison is of dtype and number, with no tolerance.
"""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch.autograd import grad

import interop
from interop import as_torch, differentiable, jittable

Fn = Callable[..., Any]


def gap(names: Any, reason: str, *of: str) -> list[Any]:
    """Parameters by name, of which some do not work yet."""
    mark = pytest.mark.xfail(strict=True, reason=reason)
    return [pytest.param(name, marks=mark) if name in of else name for name in names]


def levels(fn: Fn) -> Fn:
    """The JAX function as a torch function, with every level on."""
    return differentiable(jittable(as_torch(fn)))


def compiled(fn: Fn) -> Fn:
    """The function in one graph."""
    return torch.compile(fn, fullgraph=True, backend="aot_eager")


def in_another_thread(fn: Fn) -> Fn:
    """The function called in a thread that has seen no JAX yet."""

    def call(*args: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(fn, *args).result()

    return call


@pytest.fixture(params=[False, True], ids=["x64_off", "x64_on"])
def x64(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether JAX keeps 64 bits, in every thread."""
    jax.config.update("jax_enable_x64", request.param)
    yield request.param
    jax.config.update("jax_enable_x64", False)


# --- the table --------------------------------------------------------------------------------------------------------

BOOL = [torch.bool]
INTEGERS = [
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FLOAT8 = [
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]
COMPLEX = [torch.complex64, torch.complex128]
INEXACT = [*FLOATS, *FLOAT8, *COMPLEX]
SMOOTH = [*FLOATS, torch.float8_e4m3fn, *COMPLEX]
NARROW = {torch.int64: torch.int32, torch.uint64: torch.uint32}
WIDE = [torch.int64, torch.uint64, torch.float64, torch.complex128]


def every(*dtypes: torch.dtype) -> Any:
    """A test of each dtype with x64 off, and with x64 on where that could matter."""
    cases = [(d, False) for d in dtypes] + [(d, True) for d in dtypes if d in WIDE or d is torch.float32]
    ids = [f"{str(d).removeprefix('torch.')}-{'x64_on' if on else 'x64_off'}" for d, on in cases]
    return pytest.mark.parametrize(("dtype", "x64"), cases, ids=ids, indirect=["x64"])


def function(dtype: torch.dtype) -> Fn:
    """What is computed in a dtype; in Python, on one number, it is the same."""
    if dtype in FLOAT8:
        return lambda a: a
    return (lambda a: a * a) if dtype in INEXACT else (lambda a: a ^ True)


def slope(dtype: torch.dtype, value: Any, tangent: Any) -> Any:
    """What the function's derivative makes of a tangent."""
    return tangent if dtype in FLOAT8 else 2 * value * tangent


def conjugate(value: Any) -> Any:
    """The conjugate of a Python number."""
    return value.conjugate() if isinstance(value, complex) else value


def held(dtype: torch.dtype, *, x64: bool) -> torch.dtype:
    """The dtype in which JAX computes with it."""
    return dtype if x64 else NARROW.get(dtype, dtype)


def numbers(dtype: torch.dtype, *, x64: bool = False) -> list[Any]:
    """Six numbers of the dtype, with the outermost, and ones that a narrower dtype would lose."""
    if dtype is torch.bool:
        return [True, False, False, True, True, False]
    if dtype in FLOAT8:
        return [1.0, 2.0, 4.0, 0.5, 8.0, 16.0]
    if dtype in FLOATS:
        fine = {torch.float16: 2**-4, torch.bfloat16: 2**-3, torch.float32: 2**-10, torch.float64: 2**-25}[dtype]
        return [0.0, -1.5, 2.0, 0.25, 1 + fine, -3.0]
    if dtype in COMPLEX:
        fine = 2**-10 if dtype is torch.complex64 else 2**-25
        return [0j, 1 + 2j, -1j, 1 + fine, -2 + 1j, complex(0, 1 + fine)]
    info = torch.iinfo(held(dtype, x64=x64))
    return [0, 1, 2, 77, info.min, info.max]


def weights(dtype: torch.dtype) -> list[Any]:
    """Six numbers to be tangents and cotangents."""
    return [1 - 1j, 2j, 1 + 0j, -1 + 0j, 4 + 0j, 2 + 1j] if dtype in COMPLEX else [1.0, 2.0, 4.0, 0.5, 0.25, 1.0]


def tensor(values: list[Any], dtype: torch.dtype) -> torch.Tensor:
    """The values in two rows."""
    return torch.tensor(values, dtype=dtype).reshape(2, 3)


def exactly(got: torch.Tensor, values: list[Any], dtype: torch.dtype) -> None:
    """The dtype and the numbers, one by one."""
    assert got.dtype is dtype
    assert got.flatten().tolist() == values


# --- values -----------------------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[Fn], Fn]] = {
    "eagerly": lambda f: f,
    "batched": torch.func.vmap,
    "compiled": compiled,
    "thread": in_another_thread,
}


@pytest.mark.parametrize("way", WAYS)
@every(*BOOL, *INTEGERS, *INEXACT)
def test_a_result_is_exact_in_the_dtype_of_its_argument(dtype: torch.dtype, way: str, x64: bool) -> None:
    """An integer of 64 bits comes back in 32 where JAX keeps no more."""
    values, f = numbers(dtype, x64=x64), function(dtype)
    got = WAYS[way](levels(f))(tensor(values, dtype))
    exactly(got, [f(v) for v in values], held(dtype, x64=x64))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", SMOOTH, ids=str)
def test_a_result_under_the_tape_is_the_same(dtype: torch.dtype, way: str) -> None:
    values, f = numbers(dtype), function(dtype)
    got = WAYS[way](levels(f))(tensor(values, dtype).requires_grad_())
    assert got.requires_grad
    exactly(got.detach(), [f(v) for v in values], dtype)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("integer", [torch.int64, torch.uint64], ids=str)
def test_an_integer_beside_64_bit_floats_keeps_64(integer: torch.dtype, dtype: torch.dtype, way: str) -> None:
    """Both ways, while x64 is off."""
    values = numbers(integer, x64=True)
    got, _ = WAYS[way](levels(lambda i, a: (i ^ True, a)))(tensor(values, integer), tensor(numbers(dtype), dtype))
    exactly(got, [v ^ True for v in values], integer)


@pytest.mark.parametrize("way", WAYS)
@every(torch.float32, torch.float64)
def test_an_index_is_as_wide_as_jax_computes(dtype: torch.dtype, way: str, x64: bool) -> None:
    """The scope of a float64 is that of the whole function."""
    got = WAYS[way](levels(lambda a: jnp.argmax(a, axis=-1, keepdims=True)))(tensor(numbers(dtype), dtype))
    exactly(got, [2, 1], torch.int64 if x64 or dtype is torch.float64 else torch.int32)


@pytest.mark.parametrize("way", WAYS)
def test_what_a_function_makes_itself_is_as_wide_as_its_arguments(way: str, x64: bool) -> None:
    for dtype in (torch.float32, torch.float64):
        got = WAYS[way](levels(lambda a: a[..., :1] * 0 + jnp.arange(3) + jnp.linspace(0, 1, 3)))(
            tensor(numbers(dtype), dtype)
        )
        exactly(got, [0.0, 1.5, 3.0] * 2, torch.float64 if x64 else dtype)


@pytest.mark.parametrize("way", ["eagerly", "batched", "compiled"])
@every(torch.int8, torch.uint64, torch.bfloat16, torch.float64)
def test_a_python_number_does_not_widen(dtype: torch.dtype, way: str, x64: bool) -> None:
    """It is as weak as one that stands in the function."""
    values = [v // 2 if dtype in INTEGERS else v for v in numbers(dtype, x64=x64)]
    f, two = levels(lambda a, n: a * n), 2 if dtype in INTEGERS else 2.0
    got = WAYS[way](lambda a: f(a, two))(tensor(values, dtype))
    exactly(got, [2 * v for v in values], held(dtype, x64=x64))


@pytest.mark.parametrize("shape", [(), (2, 0)], ids=str)
@every(*BOOL, *INTEGERS, *INEXACT)
def test_one_number_and_none(dtype: torch.dtype, shape: tuple[int, ...], x64: bool) -> None:
    """A tensor of no axes, and one of no elements."""
    x = torch.ones(shape).to(dtype)
    got = levels(function(dtype))(x)
    assert got.shape == shape
    exactly(got, [function(dtype)(v) for v in x.flatten().tolist()], held(dtype, x64=x64))
    if dtype in INEXACT:
        (slopes,) = grad(levels(function(dtype))(x.requires_grad_()), x, torch.ones(shape).to(dtype))
        assert slopes.shape == shape
        exactly(slopes, [slope(dtype, 1, 1)] * x.numel(), dtype)


# --- derivatives ------------------------------------------------------------------------------------------------------


def _pulled(f: Fn, x: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
    return torch.func.vjp(f, x)[1](cotangent)[0]


def _of_backward(f: Fn, x: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    f(x).backward(cotangent)
    assert x.grad is not None
    return x.grad


def _with_a_graph(f: Fn, x: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    return grad(f(x), x, cotangent, create_graph=True)[0].detach()


PULLS: dict[str, Callable[[Fn], Fn]] = {
    "backward": lambda f: functools.partial(_of_backward, f),
    "create_graph": lambda f: functools.partial(_with_a_graph, f),
    "vjp": lambda f: functools.partial(_pulled, f),
    "vmap_of_vjp": lambda f: torch.func.vmap(functools.partial(_pulled, f)),
    "backward_of_vmap": lambda f: functools.partial(_of_backward, torch.func.vmap(f)),
    "compiled_vjp": lambda f: compiled(functools.partial(_pulled, f)),
    "backward_of_compiled": lambda f: functools.partial(_of_backward, compiled(f)),
    "thread": lambda f: in_another_thread(functools.partial(_of_backward, f)),
}


@pytest.mark.parametrize("way", PULLS)
@every(*SMOOTH)
def test_a_gradient_is_exact_in_the_dtype_of_its_input(dtype: torch.dtype, way: str, x64: bool) -> None:
    """A complex one is the conjugate of what JAX calls it."""
    values, cotangent = numbers(dtype), weights(dtype)
    got = PULLS[way](levels(function(dtype)))(tensor(values, dtype), tensor(cotangent, dtype))
    expected = [slope(dtype, conjugate(v), c) for v, c in zip(values, cotangent, strict=True)]
    exactly(got.resolve_conj(), expected, dtype)


def _pushed(f: Fn, x: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
    return torch.func.jvp(f, (x,), (tangent,))[1]


def _dual(f: Fn, x: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
    with fwad.dual_level():
        return fwad.unpack_dual(f(fwad.make_dual(x, tangent))).tangent


PUSHES: dict[str, Callable[[Fn], Fn]] = {
    "jvp": lambda f: functools.partial(_pushed, f),
    "dual": lambda f: functools.partial(_dual, f),
    "vmap_of_jvp": lambda f: torch.func.vmap(functools.partial(_pushed, f)),
    "jvp_of_vmap": lambda f: functools.partial(_pushed, torch.func.vmap(f)),
    "compiled_jvp": lambda f: compiled(functools.partial(_pushed, f)),
    "thread": lambda f: in_another_thread(functools.partial(_pushed, f)),
}


@pytest.mark.parametrize("way", PUSHES)
@every(*SMOOTH)
def test_a_tangent_is_exact_in_the_dtype_of_its_result(dtype: torch.dtype, way: str, x64: bool) -> None:
    values, tangent = numbers(dtype), weights(dtype)
    got = PUSHES[way](levels(function(dtype)))(tensor(values, dtype), tensor(tangent, dtype))
    exactly(got, [slope(dtype, v, t) for v, t in zip(values, tangent, strict=True)], dtype)


# Two arguments that are promoted: each gradient is in the dtype of its own.
MIXED = [
    (torch.float32, torch.float64),
    (torch.float16, torch.bfloat16),
    (torch.bfloat16, torch.float64),
    (torch.float32, torch.complex128),
    (torch.complex64, torch.complex128),
]
MIXED_WAYS = {name: PULLS[name] for name in ("backward", "create_graph", "vmap_of_vjp", "backward_of_compiled")}


@pytest.mark.parametrize("way", MIXED_WAYS)
@pytest.mark.parametrize(("one", "other"), MIXED, ids=str)
def test_each_of_two_gradients_has_the_dtype_of_its_input(one: torch.dtype, other: torch.dtype, way: str) -> None:
    """As in torch, number for number."""
    x, y = tensor([1.0, 2, 4, 0.5, 8, -1], one), tensor([1.0, 0.5, -2, 2, 3, 1], other)

    def gradients(f: Fn) -> list[torch.Tensor]:
        cotangent = torch.ones_like(x * y)
        return [
            MIXED_WAYS[way](lambda x: f(x, y) if x.dim() == y.dim() else f(x, y[0]))(x, cotangent),
            MIXED_WAYS[way](lambda y: f(x, y) if x.dim() == y.dim() else f(x[0], y))(y, cotangent),
        ]

    got, expected = gradients(levels(lambda x, y: x * y)), gradients(lambda x, y: x * y)
    assert [g.dtype for g in got] == [one, other]
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("one", "other"), MIXED, ids=str)
def test_second_gradients_have_the_dtypes_of_their_inputs(one: torch.dtype, other: torch.dtype) -> None:
    x, y = torch.tensor([1, 2, 4], dtype=one), torch.tensor([2, 0.5, -1], dtype=other)

    def second(f: Fn) -> list[torch.Tensor]:
        slopes = lambda x, y: torch.func.vjp(f, x, y)[1](torch.ones_like(x * y))
        pulled = lambda x, y: torch.func.vjp(slopes, x, y)[1]((torch.ones_like(x), torch.ones_like(y)))
        return [g.resolve_conj() for g in pulled(x, y)]

    got, expected = second(levels(lambda x, y: x * x * y)), second(lambda x, y: x * x * y)
    assert [g.dtype for g in got] == [one, other]
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("way", ["backward", "backward_of_compiled"])
@every(torch.bool, torch.uint8, torch.int64)
def test_a_gradient_beside_integers(dtype: torch.dtype, way: str, x64: bool) -> None:
    """They are constants of the derivative, in and out."""
    factor = torch.tensor([1, 0, 1], dtype=dtype)
    f = levels(lambda x, i: (x * i, i ^ True))
    got = MIXED_WAYS[way](lambda x: f(x, factor)[0])(torch.ones(2, 3), torch.ones(2, 3))
    exactly(got, [1.0, 0.0, 1.0] * 2, torch.float32)
    x = torch.ones(3, requires_grad=True)
    out, flipped = f(x, factor)
    assert out.requires_grad
    assert not flipped.requires_grad
    exactly(flipped, [i ^ True for i in factor.tolist()], held(dtype, x64=x64))


# --- threads and scopes -----------------------------------------------------------------------------------------------

LIVES = [torch.float64, torch.complex128]


@every(*LIVES)
@pytest.mark.parametrize("way", ["eagerly", "compiled", "batched"])
def test_a_backward_in_another_thread(dtype: torch.dtype, way: str, x64: bool) -> None:
    """Than that which made the graph."""
    x = tensor(numbers(dtype), dtype).requires_grad_()
    out = WAYS[way](levels(function(dtype)))(x)
    (got,) = in_another_thread(lambda: grad(out, x, torch.ones_like(out)))()
    exactly(got.resolve_conj(), [2 * conjugate(v) for v in numbers(dtype)], dtype)


@pytest.mark.parametrize("dtype", LIVES, ids=str)
@pytest.mark.parametrize("way", ["eagerly", "compiled", "batched"])
@pytest.mark.parametrize("then", [False, True])
def test_a_backward_in_another_width(dtype: torch.dtype, way: str, then: bool) -> None:
    """x64 is switched between the forward and its backward: the gradient is as exact."""
    x = tensor(numbers(dtype), dtype).requires_grad_()
    with jax.enable_x64(not then):
        out = WAYS[way](levels(function(dtype)))(x)
    with jax.enable_x64(then):
        (got,) = grad(out, x, torch.ones_like(out))
    exactly(got.resolve_conj(), [2 * conjugate(v) for v in numbers(dtype)], dtype)


NO_GUARD = "a graph of torch does not look at jax_enable_x64 again, so it keeps the width that it was traced in"


@pytest.mark.parametrize("way", gap(["eagerly", "batched", "compiled"], NO_GUARD, "compiled"))
def test_a_function_called_again_in_another_width(way: str) -> None:
    """As `jax.jit` does, it notices."""
    f = WAYS[way](levels(lambda i: i ^ True))
    for x64 in (False, True, False):
        with jax.enable_x64(x64):
            exactly(f(torch.arange(3)), [1, 0, 3], torch.int64 if x64 else torch.int32)


def test_threads_of_both_widths_at_once() -> None:
    """Each has its own results, whatever the others do."""
    f = levels(lambda i, a: (i ^ True, a * a))

    def run(x64: bool) -> set[tuple[torch.dtype, ...]]:
        seen = set()
        with jax.enable_x64(x64):
            for dtype in (torch.float32, torch.float64) * 20:
                a = torch.ones(3, dtype=dtype, requires_grad=True)
                i, out = f(torch.arange(3), a)
                seen.add((dtype, i.dtype, out.dtype, grad(out.sum(), a)[0].dtype))
        return seen

    def expected(x64: bool) -> set[tuple[torch.dtype, ...]]:
        return {(d, torch.int64 if x64 or d is torch.float64 else torch.int32, d, d) for d in (torch.float32, torch.float64)}  # fmt: skip

    with ThreadPoolExecutor(4) as pool:
        for x64, seen in zip([True, False] * 4, pool.map(run, [True, False] * 4), strict=True):
            assert seen == expected(x64)


# --- what does not fit ------------------------------------------------------------------------------------------------

TOO_LARGE = [
    (torch.int64, 2**31, "int32"),
    (torch.int64, -(2**31) - 1, "int32"),
    (torch.int64, 2**32 + 1, "int32"),  # 1 if its bits were cut
    (torch.uint64, 2**32, "uint32"),
]
OVERFLOWS: dict[str, Callable[[Fn], Fn]] = {
    "eagerly": lambda f: f,
    "thread": in_another_thread,
    "compiled": compiled,
    "batched": torch.func.vmap,
    "compiled_batch": lambda f: compiled(torch.func.vmap(f)),
}


def energy(params: Any, x: Any) -> Any:
    """A function with an integer inside an argument."""
    return x * (params["n"][0] > 0)


@pytest.mark.parametrize("taped", [False, True], ids=["plain", "taped"])
@pytest.mark.parametrize("way", OVERFLOWS)
def test_an_integer_that_does_not_fit_raises(way: str, taped: bool) -> None:
    """The error has the value, wherever the call is; the next call is right."""
    f = OVERFLOWS[way](levels(energy))
    x = torch.ones(2, 3, requires_grad=taped)
    for dtype, value, name in TOO_LARGE:
        with pytest.raises(OverflowError, match=f"the value {value} does not fit into {name}"):
            f({"n": [tensor([0, 1, value, 0, 0, 0], dtype)]}, x)
        assert f({"n": [tensor([0, 1, 2, 0, 0, 0], dtype)]}, x).tolist() == [[0, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("way", ["vjp", "jvp", "vmap_of_vjp", "compiled_vjp", "backward_of_compiled"])
def test_an_integer_that_does_not_fit_into_a_derivative(way: str) -> None:
    derivative, f = (PULLS | PUSHES)[way], levels(energy)
    x, ones = torch.ones(2, 3), torch.ones(2, 3)

    def ask(value: int) -> torch.Tensor:
        n = torch.tensor([1, value, 0])
        return derivative(lambda x: f({"n": [n]}, x))(x, ones)

    with pytest.raises(OverflowError, match=f"the value {2**40} does not fit into int32"):
        ask(2**40)
    assert ask(2**31 - 1).tolist() == [[1, 1, 0]] * 2


CALLS: dict[str, Callable[[Fn, Any, Any], Any]] = {
    **{name: lambda f, x, n, way=way: way(f)({"n": [n]}, x) for name, way in OVERFLOWS.items()},
    **{
        name: lambda f, x, n, way=(PULLS | PUSHES)[name]: way(lambda x: f({"n": [n[0]]}, x))(x, x)
        for name in ("backward", "vjp", "jvp", "vmap_of_vjp", "compiled_vjp", "backward_of_compiled")
    },
}


@pytest.mark.parametrize("way", CALLS)
def test_an_integer_that_does_not_fit_is_named_with_its_argument(way: str) -> None:
    """The same words as in an eager call."""
    with pytest.raises(OverflowError) as caught:
        CALLS[way](levels(energy), torch.ones(1, 2), torch.tensor([[0, 2**40]]))
    message = f"energy: argument params['n'][0]: the value {2**40} does not fit into int32: got i64[SHAPE]. "
    message += "JAX keeps 32 bits: set jax.config.update('jax_enable_x64', True) [errors.md#narrowingerror]"
    assert re.sub(r"i64\[.*?\]\.", "i64[SHAPE].", str(caught.value)) == message


# --- complex derivatives of higher order ------------------------------------------------------------------------------


def _weigh(z: torch.Tensor) -> torch.Tensor:
    n = torch.arange(z.numel(), dtype=torch.float64).reshape(z.shape) + 1
    return torch.complex(torch.cos(n), torch.sin(2 * n)).to(z.dtype) if z.is_complex() else torch.cos(n).to(z.dtype)


def _vjp(f: Fn) -> Fn:
    def pulled(z: torch.Tensor) -> torch.Tensor:
        out, pull = torch.func.vjp(f, z)
        return pull(_weigh(out))[0]

    return pulled


def _jvp(f: Fn) -> Fn:
    return lambda z: torch.func.jvp(f, (z,), (_weigh(z),))[1]


def _backward(f: Fn) -> Fn:
    def gradient(z: torch.Tensor) -> torch.Tensor:
        if not z.requires_grad:
            z = z.clone().requires_grad_()
        out = f(z)
        return grad(out, z, _weigh(out), create_graph=True)[0]

    return gradient


ANALYSIS: dict[str, tuple[Fn, Fn]] = {
    "holomorphic": (lambda z: jnp.sin(z) * z, lambda z: torch.sin(z) * z),
    "conjugate": (lambda z: z * z * jnp.conj(z), lambda z: z * z * torch.conj(z)),
    "to real": (lambda z: jnp.abs(z) ** 3 + z.imag * z.real, lambda z: torch.abs(z) ** 3 + z.imag * z.real),
    "through real": (
        lambda z: jnp.exp(1j * z.real) * jnp.conj(z) ** 2,
        lambda z: torch.exp(1j * z.real) * torch.conj(z) ** 2,
    ),
}
ORDERS: dict[str, Callable[[Fn], Fn]] = {
    "vjp of vjp": lambda f: _vjp(_vjp(f)),
    "jvp of vjp": lambda f: _jvp(_vjp(f)),
    "vjp of jvp": lambda f: _vjp(_jvp(f)),
    "vjp of vjp of vjp": lambda f: _vjp(_vjp(_vjp(f))),
    "vmap of vjp of vjp": lambda f: torch.func.vmap(_vjp(_vjp(f))),
    "backward of backward": lambda f: _backward(_backward(f)),
    "backward of vmap of vjp": lambda f: _backward(torch.func.vmap(_vjp(f))),
}
COMPILED = ["jvp of vjp"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ANALYSIS)
def test_a_complex_derivative_is_torchs_at_every_order(name: str, order: str) -> None:
    """In torch's convention, which is the conjugate of JAX's."""
    ours, native = ANALYSIS[name]
    z = torch.tensor([[0.3 - 0.7j, 1.1j], [0.4 + 0.2j, -0.5 + 1j]])
    got, expected = ORDERS[order](levels(ours))(z), ORDERS[order](native)(z)
    torch.testing.assert_close(got.detach().resolve_conj(), expected.detach().resolve_conj())


@pytest.mark.parametrize("order", COMPILED)
@pytest.mark.parametrize("name", ANALYSIS)
def test_a_complex_derivative_in_a_graph_of_torch(name: str, order: str) -> None:
    ours, native = ANALYSIS[name]
    z = torch.tensor([[0.3 - 0.7j, 1.1j], [0.4 + 0.2j, -0.5 + 1j]])
    torch.testing.assert_close(compiled(ORDERS[order](levels(ours)))(z), ORDERS[order](native)(z).resolve_conj())


@pytest.mark.parametrize("name", ANALYSIS)
def test_a_conjugated_view_is_differentiated_as_its_values_are(name: str) -> None:
    """As an argument, and as what torch conjugates on the way back."""
    ours, native = ANALYSIS[name]
    z = torch.tensor([0.3 - 0.7j, 1.1j], requires_grad=True)

    def gradient(f: Fn) -> torch.Tensor:
        out = torch.conj(f(torch.conj(z)))
        return grad(out, z, _weigh(out))[0].resolve_conj()

    torch.testing.assert_close(gradient(levels(ours)), gradient(native))


# --- what is refused --------------------------------------------------------------------------------------------------


def _quietly(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


REFUSED: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
    "sparse_csr": (lambda: torch.eye(3).to_sparse_csr(), "sparse_csr"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "qint8"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
    "jagged": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "NestedTensor"),
    "meta": (lambda: torch.ones(3, device="meta"), "meta"),
    "complex32": (lambda: torch.ones(3, dtype=torch.complex32), "complex32"),
    "int4": (lambda: torch.empty(3, dtype=torch.int4), "int4"),
    "uint1": (lambda: torch.empty(3, dtype=torch.uint1), "uint1"),
    "packed float4": (lambda: torch.empty(3, dtype=torch.float4_e2m1fn_x2), "float4"),
}


def first_of(x: Any, params: Any) -> Any:
    """A function with an argument that it does not look at."""
    return x * 2


@pytest.mark.parametrize("taped", [False, True], ids=["plain", "taped"])
@pytest.mark.parametrize(("make", "name"), REFUSED.values(), ids=REFUSED)
def test_what_jax_can_not_hold_is_refused_by_name(make: Callable[[], torch.Tensor], name: str, taped: bool) -> None:
    """Also beside a tensor that is differentiated; the next call and its gradient are right."""
    f, x, bad = levels(first_of), torch.ones(3, requires_grad=taped), _quietly(make)
    with pytest.raises(interop.LeafError, match=rf"argument params\['w'\].*{name}"):
        f(x, {"w": bad})
    out = f(x, {"w": torch.ones(3)})
    assert out.tolist() == [2, 2, 2]
    assert not taped or grad(out.sum(), x)[0].tolist() == [2, 2, 2]


TRANSFORMED: dict[str, Callable[[Fn], Fn]] = {
    "vmap": lambda f: torch.func.vmap(f),
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum()),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1],
    "compile": compiled,
}


def refusals() -> Iterator[Any]:
    """Kind and transform; what Dynamo does not take itself never reaches a crossing."""
    for kind in ("sparse", "quantized", "meta", "complex32", "int4"):
        for transform in TRANSFORMED:
            if transform != "compile" or kind not in {"sparse", "quantized"}:
                yield pytest.param(kind, transform, id=f"{kind}-{transform}")


@pytest.mark.parametrize(("kind", "transform"), list(refusals()))
def test_what_jax_can_not_hold_is_refused_below_a_transform(kind: str, transform: str) -> None:
    """In the same words, which Dynamo puts into an error of its own."""
    make, name = REFUSED[kind]
    bad, f = _quietly(make), levels(first_of)
    with pytest.raises(Exception, match=rf"argument params\['w'\].*{name}"):
        TRANSFORMED[transform](lambda x: f(x, {"w": bad}))(torch.ones(3))


@pytest.mark.parametrize("kind", ["sparse", "quantized", "meta", "complex32", "int4"])
@pytest.mark.parametrize("transform", TRANSFORMED)
def test_the_next_call_works(kind: str, transform: str) -> None:
    """Whatever became of the one before."""
    bad, f = _quietly(REFUSED[kind][0]), levels(first_of)
    with contextlib.suppress(Exception):
        TRANSFORMED[transform](lambda x: f(x, {"w": bad}))(torch.ones(3))
    assert TRANSFORMED[transform](lambda x: f(x, {"w": torch.ones(3)}))(torch.ones(3)).tolist() == [2, 2, 2]


class Foreign(torch.Tensor):
    """A subclass that nobody has said anything about."""


# The last is refused by torch itself.
COTANGENTS: dict[str, tuple[Callable[[], torch.Tensor], type[Exception], str]] = {
    "sparse": (lambda: torch.ones(3).to_sparse(), interop.LeafError, "sparse_coo"),
    "subclass": (lambda: torch.ones(3).as_subclass(Foreign), interop.LeafError, "Foreign"),
    "meta": (lambda: torch.ones(3, device="meta"), RuntimeError, "meta"),
}


@pytest.mark.parametrize("kind", COTANGENTS)
def test_a_cotangent_that_jax_can_not_hold_is_refused_by_name(kind: str) -> None:
    """The graph can still be walked with another."""
    make, error, name = COTANGENTS[kind]
    x = torch.ones(3, requires_grad=True)
    out = levels(lambda x: x * x)(x)
    with pytest.raises(error, match=name):
        grad(out, x, make(), retain_graph=True)
    assert grad(out, x, torch.ones(3))[0].tolist() == [2, 2, 2]


@pytest.mark.parametrize("kind", COTANGENTS)
def test_a_cotangent_that_jax_can_not_hold_into_a_compiled_function(kind: str) -> None:
    """Torch's own graph does not take it; the crossing in it goes on working."""
    x = torch.ones(3, requires_grad=True)
    f = compiled(levels(lambda x: x * x))
    with pytest.raises(RuntimeError):
        grad(f(x), x, COTANGENTS[kind][0]())
    assert grad(f(x), x, torch.ones(3))[0].tolist() == [2, 2, 2]


def test_a_cotangent_of_a_small_loss_is_refused_too() -> None:
    """Where the gradient has come with the value."""
    x = torch.ones(3, requires_grad=True)
    out = levels(lambda x: (x * x).sum())(x)
    with pytest.raises(interop.LeafError, match="Foreign"):
        grad(out, x, torch.ones(()).as_subclass(Foreign), retain_graph=True)
    assert grad(out, x)[0].tolist() == [2, 2, 2]


def test_a_refused_cotangent_names_the_function() -> None:
    x = torch.ones(3, requires_grad=True)
    out = levels(energy)({"n": [torch.ones(3)]}, x)
    with pytest.raises(interop.LeafError, match="energy"):
        grad(out, x, torch.ones(3).to_sparse())
