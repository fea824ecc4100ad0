"""What a torch function may do when JAX calls it: shapes, writes, aliases, modes, threads, exceptions."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import re
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import interop
import tables
from interop import as_jax, as_torch, differentiable, jittable, make_functional
from together import THREADS, at_once

Fn = Callable[..., Any]


def levels(fn: Fn) -> Fn:
    """With everything declared."""
    return jittable(differentiable(as_jax(fn)))


def missing(reason: str) -> Any:
    """What is not as it must be yet."""
    return pytest.mark.xfail(strict=True, reason=reason)


def is_fake(t: torch.Tensor) -> bool:
    """Whether a trace is looking."""
    return isinstance(t, torch._subclasses.FakeTensor)


def array(t: torch.Tensor) -> jax.Array:
    """A copy, in the dtype that JAX keeps."""
    return jnp.asarray(t.detach().numpy().copy())


def close(got: Any, expected: Any) -> None:
    """Tuples of arrays or tensors."""
    got, expected = (x if isinstance(x, tuple | list) else (x,) for x in (got, expected))
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(g), np.asarray(e), rtol=1e-5, atol=1e-5)


# --- shapes -----------------------------------------------------------------------------------------------------------

table = torch.arange(12.0).reshape(4, 3)
rows = torch.tensor([2, 0])
net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()).eval()
CLOSED_OVER: dict[str, Fn] = {
    "tensor": lambda x: x @ table.T,
    "parameter": lambda x: F.linear(x, net[0].weight.detach()),
    "indices": lambda x: (x @ table.T)[:, rows],
    "mask": lambda x: torch.where(table[:, 0] > 4, x @ table.T, -1.0),
    "module": lambda x: net(x).detach() + net[1].running_var,
    "made inside": lambda x: x + torch.arange(x.shape[-1], device=x.device) + torch.eye(3)[0],
    "numpy": lambda x: x * torch.from_numpy(np.arange(3.0, dtype=np.float32)),
    "written inside": lambda x: torch.zeros(2, 3).copy_(x).add_(table[0]),
    "lookup": lambda x: F.embedding(x.long().clamp(0, 3), table).sum(-1),
}


@pytest.mark.parametrize("fn", CLOSED_OVER.values(), ids=CLOSED_OVER)
def test_shapes_are_inferred_beside_real_tensors(fn: Fn) -> None:
    """Nothing of them is run or changed by that."""
    x = torch.rand(2, 3)
    before = (table._version, table.tolist())
    shape = jax.eval_shape(levels(fn), array(x))
    got = jax.jit(levels(fn))(array(x))
    assert (got.shape, got.dtype) == (shape.shape, shape.dtype)
    close(got, fn(x).detach())
    assert (table._version, table.tolist()) == before


def test_inferring_computes_nothing() -> None:
    huge = jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.float32)
    out = jax.eval_shape(levels(lambda x: {"sum": (x * 2).sum(0), "half": x[: x.shape[0] // 2]}), huge)
    assert (out["sum"].shape, out["half"].shape) == ((1 << 20,), (1 << 19, 1 << 20))


class Entries:
    """A function that counts how often Python enters it, on values and on fakes."""

    def __init__(self) -> None:
        self.real = self.fake = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.fake += is_fake(x)
        self.real += not is_fake(x)
        return torch.sin(x) * x


AGAIN: dict[str, Callable[[Fn, Any], Any]] = {
    "eval_shape": lambda f, x: jax.eval_shape(lambda x: f(x), x),
    "make_jaxpr": lambda f, x: jax.make_jaxpr(lambda x: f(x))(x),
    "lower": lambda f, x: jax.jit(lambda x: f(x)).lower(x),
    "vmap": lambda f, x: jax.jit(jax.vmap(lambda x: f(x))).lower(x[None]),
    "vmap of another axis": lambda f, x: jax.jit(jax.vmap(lambda x: f(x), in_axes=1)).lower(x[:, None]),
    "scan": lambda f, x: jax.jit(lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=3)).lower(x),
    "cond": lambda f, x: jax.jit(lambda x: jax.lax.cond(x[0] > 0, f, lambda x: x, x)).lower(x),
}


@pytest.mark.parametrize("ask", AGAIN.values(), ids=AGAIN)
def test_the_shapes_of_an_example_are_asked_once(ask: Callable[[Fn, Any], Any]) -> None:
    """By whatever transform: those of its derivatives and of its batches follow."""
    entries = Entries()
    f, x = levels(entries), jnp.ones(3)
    jax.eval_shape(f, x)
    assert (entries.fake, entries.real) == (1, 0)
    ask(f, x)
    assert (entries.fake, entries.real) == (1, 0)
    jax.eval_shape(f, jnp.ones(4))
    assert entries.fake == 2


def test_gradients_are_captured_once() -> None:
    """In two programs of one function and of the same shapes."""
    entries = Entries()
    f, x = levels(entries), jnp.ones(3)
    jax.jit(jax.grad(lambda x: f(x).sum())).lower(x)
    seen = entries.fake
    jax.jit(lambda x: jax.grad(lambda x: f(x * 2).sum())(x)).lower(x)
    jax.jit(lambda x: jax.vjp(f, x)[1](x)).lower(x)
    assert (entries.fake, entries.real) == (seen, 0)


def by_numpy(x: torch.Tensor) -> torch.Tensor:
    """Leaves torch in the middle."""
    return torch.from_numpy(np.flip(x.numpy()).copy())


@torch.library.custom_op("test_callbacks::plain", mutates_args=())
def without_a_fake(x: torch.Tensor) -> torch.Tensor:
    """An operator that nobody said the shapes of."""
    return x * 2


DYNAMIC: dict[str, tuple[Fn, bool]] = {
    "mask": (lambda x: x[x > 0], False),
    "nonzero": (lambda x: x.nonzero().float(), False),
    "unique": (lambda x: x.unique(), False),
    "repeat_interleave": (lambda x: x.repeat_interleave(x.abs().long()), False),
    "item": (lambda x: x * x.sum().item(), True),
    "number": (lambda x: x * max(1, int(x.sum())), True),
    "tolist": (lambda x: torch.tensor(x.tolist()), True),
    "numpy": (by_numpy, True),
    "custom op": (lambda x: without_a_fake(x), True),
}


@pytest.mark.parametrize(("fn", "same"), DYNAMIC.values(), ids=DYNAMIC)
def test_shapes_that_depend_on_values_are_refused_with_the_way_out(fn: Fn, same: bool) -> None:
    """Eagerly there is nothing to infer. Where the shape is known after all, saying it is enough."""
    x = torch.tensor([1.0, 2.0, -3.0, 4.0])
    f = as_jax(fn)
    close(f(array(x)), fn(x))
    for ask in (
        jax.jit(jittable(f)),
        lambda a: jax.eval_shape(jittable(f), a),
        lambda a: jax.jit(jax.vmap(jittable(f)))(a[None]),
    ):
        with pytest.raises(interop.AbstractEvalError, match=r"@jittable\(example_output="):
            ask(array(x))
    if same:
        told = jittable(example_output=lambda x: x)(f)
        close(jax.jit(told)(array(x)), fn(x))
        close(jax.jit(lambda x: told(x * 2) + 1)(array(x)), fn(x * 2) + 1)
        close(jax.lax.map(told, array(x)[None])[0], fn(x))


lengths = torch.tensor([5, 4]), torch.tensor([2, 3])
UNSAID: dict[str, Fn] = {
    "lstsq": lambda a: torch.linalg.lstsq(a, a[:, :1] ** 2).solution,
    "lstsq of a vector": lambda a: torch.linalg.lstsq(a, a[:, 0] ** 2)[0],
    "lstsq of full rank": lambda a: torch.linalg.lstsq(a, a**2, driver="gels").residuals,
    "lstsq with singular values": lambda a: torch.linalg.lstsq(a[:3] + a[2:], a[:3], driver="gelsd").singular_values,
    "lstsq of a batch": lambda a: torch.linalg.lstsq(torch.stack([a, 2 * a]), torch.stack([a, a**2])).solution,
    "ctc_loss": lambda a: torch.nn.functional.ctc_loss(
        torch.stack([a, 2 * a], 1).log_softmax(-1), torch.tensor([[1, 2, 0], [2, 1, 2]]), *lengths, reduction="none"
    ),
}


@pytest.mark.parametrize("fn", UNSAID.values(), ids=UNSAID)
def test_shapes_that_torch_does_not_say_without_values(fn: Fn) -> None:
    """They do not depend on them."""
    a = torch.randn(5, 3, requires_grad=True)
    expected, f = fn(a), levels(fn)
    struct = jax.eval_shape(f, array(a))
    assert (struct.shape, struct.dtype) == (tuple(expected.shape), np.float32)
    close(jax.jit(f)(array(a)), expected.detach())
    if expected.requires_grad:
        gradient = jax.jit(jax.grad(lambda a: f(a).sum()))(array(a))
        np.testing.assert_allclose(gradient, torch.autograd.grad(expected.sum(), a)[0], rtol=1e-3, atol=1e-4)


x4 = jnp.arange(4.0)
OTHER: dict[str, tuple[Fn, str]] = {
    "broadcastable": (lambda x: x[:1], "f32[1]"),
    "scalar": (lambda x: x.sum(), "f32[]"),
    "longer": (lambda x: x.repeat(2), "f32[8]"),
    "column": (lambda x: x[:, None], "f32[4,1]"),
    "wider": (lambda x: x.double(), "f64[4]"),
    "narrower": (lambda x: x.half(), "f16[4]"),
    "integer": (lambda x: x.int(), "i32[4]"),
    "bool": (lambda x: x > 0, "bool[4]"),
    "complex": (lambda x: x.to(torch.complex64), "c64[4]"),
}
RUN: dict[str, Callable[[Fn], Any]] = {
    "jit": lambda f: jax.jit(f)(x4),
    "scan": lambda f: jax.lax.scan(lambda c, x: (c, f(x)), 0, x4[None]),
    "in between": lambda f: jax.jit(lambda x: f(x * 2) + 1)(x4),
}


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
@pytest.mark.parametrize(("fn", "got"), OTHER.values(), ids=OTHER)
def test_a_result_that_is_not_what_was_said_names_both(fn: Fn, got: str, run: Callable[[Fn], Any]) -> None:
    """Nothing is broadcast, cast or left as it was in memory."""
    f = jittable(example_output=jax.ShapeDtypeStruct((4,), jnp.float32))(as_jax(fn))
    with pytest.raises(Exception) as caught:
        jax.block_until_ready(run(f))
    assert "OutputMismatchError: <lambda>: " in str(caught.value)
    assert f"got ({got}), expected (f32[4]). Correct example_output" in str(caught.value)
    with pytest.raises(Exception, match="OutputMismatchError"):
        jax.block_until_ready(jax.jit(jax.vmap(f))(x4[None]))


@pytest.mark.parametrize(
    "other",
    [
        lambda x: (x[:1], x),
        lambda x: (x.double(), x),
        lambda x: (x, x, x),
        lambda x: x,
        lambda x: (x, None),
        lambda x: {"b": x, "a": x},
    ],
    ids=["shape", "dtype", "more", "less", "none", "structure"],
)
def test_a_function_that_changes_its_mind(other: Fn) -> None:
    """What it returned while it was traced is not what it returns now."""
    f = levels(lambda x: (x, x) if is_fake(x) else other(x))
    with pytest.raises(
        Exception, match=r"OutputMismatchError: <lambda>: the result .*was inferred for it.* say what it"
    ):
        jax.block_until_ready(jax.jit(f)(x4))


CACHE: dict[str, torch.Tensor] = {}


@functools.lru_cache
def table_of(n: int) -> torch.Tensor:
    """Made once, by whoever comes first."""
    return torch.arange(float(n)).cos()


def from_a_dict(x: torch.Tensor) -> torch.Tensor:
    """The same."""
    if "table" not in CACHE:
        CACHE["table"] = torch.arange(float(len(x))).cos()
    return x * CACHE["table"]


class Lazy:
    """An object that makes it when it is first called."""

    table: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.arange(float(len(x))).cos()
        return x * self.table


class Held(nn.Module):
    """A module with such an object."""

    def __init__(self) -> None:
        super().__init__()
        self.lazy = Lazy()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lazy(x)


KEEPING: dict[str, Callable[[], Fn]] = {
    "a cached function": lambda: levels(lambda x: x * table_of(len(x))),
    "a dict": lambda: levels(from_a_dict),
    "an object": lambda: levels(Lazy()),
    "an object of a module": lambda: functools.partial(make_functional(Held())[0], {}),
    "beside dropout": lambda: levels(lambda x: F.dropout(x, 0.0) * table_of(len(x)) + 0 * torch.rand(4)),
}
FIRST: dict[str, Callable[[Fn, Any], Any]] = {
    "jit": lambda f, x: jax.jit(lambda x: f(x))(x),
    "gradient": lambda f, x: jax.jit(jax.grad(lambda x: (f(x) * x).sum() / 2))(x),
    "eval_shape": jax.eval_shape,
    "batch": lambda f, x: jax.jit(jax.vmap(f))(x[None])[0],
}


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("make", KEEPING.values(), ids=KEEPING)
def test_what_a_function_keeps_for_later_calls_has_values(make: Callable[[], Fn], first: str) -> None:
    """Whoever calls it first: a trace has nothing else to give it."""
    table_of.cache_clear()
    CACHE.clear()
    f, x, expected = make(), jnp.ones(4), np.cos(np.arange(4.0))
    for name in (first, *FIRST):
        found = FIRST[name](f, x)
        if name != "eval_shape":
            np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(f(x), expected, rtol=1e-5)


def test_a_traced_value_that_was_kept_is_refused() -> None:
    """It has none."""
    kept: list[torch.Tensor] = []

    def fn(x: torch.Tensor) -> torch.Tensor:
        kept.append(x * 2)
        return kept[0] + x

    f = levels(fn)
    for call in (jax.jit(f), f, lambda x: jax.vmap(f)(x[None])):
        with pytest.raises(
            (interop.LeafError, jax.errors.JaxRuntimeError),
            match=r"a tensor without a value \(FakeTensor\), which was kept",
        ):
            jax.block_until_ready(call(x4))


def test_a_module_that_is_made_inside_can_be_moved(run_python: Callable[..., str]) -> None:
    """The first time in a process too."""
    program = """
        import jax, jax.numpy as jnp, torch
        from interop import torch_to_jax

        def f(x):
            return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).to(x).half().to(x.device)(x.half())

        print(jax.jit(torch_to_jax(f))(jnp.ones((4, 2))).dtype)
    """
    assert run_python(program).split() == ["float16"]


def test_what_a_trace_assigns_to_a_module_is_taken_back() -> None:
    """It has no values. What a run assigns stays."""
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    weight, mean = module[0].weight, module[1].running_mean

    def assigned(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        module.load_state_dict(module.state_dict() | {"0.weight": w, "1.running_mean": w[0]}, assign=True)
        return module.eval()(x).sum()

    f, w, x = levels(assigned), jnp.eye(2), jnp.ones((3, 2))
    jax.eval_shape(f, w, x)
    jax.jit(jax.grad(f, 1)).lower(w, x)
    assert module[0].weight is weight
    assert module[1].running_mean is mean
    jax.block_until_ready(jax.jit(f)(w, x))
    assert torch.equal(module[0].weight, torch.eye(2))


NOTHING_IN: dict[str, tuple[Fn, tuple[int, ...]]] = {
    "a sum over nothing": (lambda x: x.sum(0) + 5, (0, 3)),
    "beside something": (lambda x: torch.cat([x, x.new_full((2, 3), 7.0)]), (0, 3)),
    "nothing out": (lambda x: x * 2, (0, 3)),
    "nothing of something": (lambda x: x[:0], (2, 3)),
}


@pytest.mark.parametrize(("fn", "shape"), NOTHING_IN.values(), ids=NOTHING_IN)
def test_arrays_without_elements(fn: Fn, shape: tuple[int, ...]) -> None:
    """A callback that is not called would leave its outputs as they were in memory."""
    f, expected = levels(fn), fn(torch.zeros(shape))
    for call in (f, jax.jit(f), lambda x: jax.jit(jax.vmap(f))(x[None])[0]):
        junk = [jnp.full((3,), 9.0) + i for i in range(50)]
        close(call(jnp.zeros(shape)), expected)
        del junk
    grad = jax.jit(jax.grad(lambda x: f(x).sum()))(jnp.zeros(shape))
    assert grad.shape == shape


# --- writes and aliases -----------------------------------------------------------------------------------------------


def _batch_norm(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Writes its statistics, though its schema does not say so."""
    x = x.reshape(4, 3)
    mean, var = y.detach().reshape(4, 3)[:2]
    return F.batch_norm(x, mean, var, training=True) ** 3


KEPT_CONSTANT = torch.full((3, 4), 2.0)
IMPURE: dict[str, Fn] = {
    "add_": lambda x, y: x.add_(y),
    "both": lambda x, y: x.mul_(y.clone()) + y.add_(1),
    "a slice": lambda x, y: (x[1:].mul_(y[1:]), x)[1],
    "an item": lambda x, y: (x.__setitem__(0, y[1]), x)[1],
    "a view of a view": lambda x, y: (x.T[1:].flatten(0, 0).copy_(y.T[:-1]), x)[1],
    "data": lambda x, y: (x.data.add_(1), x * y)[1],
    "no_grad": lambda x, y: (_under_no_grad(x), x * y)[1],
    "index_put_": lambda x, y: x.index_put_((torch.tensor([0, 0]),), y[:2], accumulate=True),
    "swap": lambda x, y: (lambda t: (x.copy_(y), y.copy_(t), x * 2 + y)[2])(x.clone()),
    "relu inplace": lambda x, y: F.relu(x, inplace=True) * y,
    "fill": lambda x, y: y.zero_() + x,
    "renormalised": lambda x, y: F.embedding(torch.tensor([0, 2]), x, max_norm=0.5) @ y.T,
    "batch norm": _batch_norm,
    "the argument itself": lambda x, y: x,
    "both arguments": lambda x, y: (y, x),
    "one result twice": lambda x, y: (lambda z: (z, z))(x * y),
    "a view": lambda x, y: (x.T, y[1:], x.reshape(-1)),
    "overlapping": lambda x, y: (x[:2], x[1:], x),
    "expanded": lambda x, y: (x[0].expand(5, 4), y[:1].expand(3, 4)),
    "written after it was taken": lambda x, y: (lambda v: (v, x.add_(1)))(x[1:]),
    "a constant": lambda x, y: (KEPT_CONSTANT, KEPT_CONSTANT.T, x),
}  # fmt: skip


@torch.no_grad()
def _under_no_grad(x: torch.Tensor) -> None:
    x.mul_(3)


def _as_tuple(fn: Fn) -> Fn:
    """Of the results, those of floats."""
    return lambda *xs: (lambda out: tuple(out) if isinstance(out, tuple | list) else (out,))(fn(*xs))


def _weighted(outs: Any) -> Any:
    """One number that depends on every element in its own way."""
    if isinstance(outs[0], torch.Tensor):
        return sum((o * torch.arange(1.0, 1 + o.numel()).reshape(o.shape)).sum() for o in outs)
    return sum((o * jnp.arange(1.0, 1 + o.size).reshape(o.shape)).sum() for o in outs)


def _gradient(f: Fn) -> Fn:
    return jax.grad(lambda x, y: _weighted(f(x, y)), argnums=(0, 1))


def _one(f: Fn) -> Fn:
    """Of a batch of one, the only example."""
    return lambda x, y: tuple(out[0] for out in f(x[None], y[None]))


VALUES: dict[str, Callable[[Fn], Fn]] = {
    "call": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: _one(jax.vmap(f)),
    "jit of vmap": lambda f: _one(jax.jit(jax.vmap(f))),
    "scan": lambda f: _one(jax.jit(lambda xs, ys: jax.lax.scan(lambda c, xy: (c, f(*xy)), 0, (xs, ys))[1])),
    "checkpoint": jax.checkpoint,
    "jvp": lambda f: lambda x, y: jax.jvp(f, (x, y), (x, y))[0],
    "vjp": lambda f: lambda x, y: jax.vjp(f, x, y)[0],
    "jit of vjp": lambda f: jax.jit(lambda x, y: (lambda out, pull: (out, pull(out))[0])(*jax.vjp(f, x, y))),
}
GRADIENTS: dict[str, Callable[[Fn], Fn]] = {
    "grad": _gradient,
    "jit of grad": lambda f: jax.jit(_gradient(f)),
    "vmap of grad": lambda f: _one(jax.vmap(_gradient(f))),
    "jit of vmap of grad": lambda f: _one(jax.jit(jax.vmap(_gradient(f)))),
    "grad of checkpoint": lambda f: _gradient(jax.checkpoint(f)),
    "grad of scan": lambda f: _gradient(lambda x, y: _one(lambda xs, ys: jax.lax.scan(lambda c, xy: (c, f(*xy)), 0, (xs, ys))[1])(x, y)),
}  # fmt: skip


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    """The same two each time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, generator=generator), torch.rand(3, 4, generator=generator) + 0.5


def left_alone(call: Fn) -> Any:
    """The result of a call, with other arrays where freed memory was; the arguments are what they were."""
    x, y = operands()
    a, b = array(x), array(y)
    out = jax.block_until_ready(call(a, b))
    junk = [jnp.full((3, 4), 7.0) + i for i in range(20)]
    close((a, b), (x, y))
    del junk
    return out


EVERY_WAY = ["a view of a view", "swap", "batch norm", "overlapping"]


def crossed(everywhere: list[str], ways: dict[str, Any]) -> Any:
    """Every function in some ways, some functions in every way."""
    return pytest.mark.parametrize(
        ("name", "way"), [(n, w) for n in IMPURE for w in ways if w in everywhere or n in EVERY_WAY]
    )


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's own, of what it has no batching rule for
@crossed(["call", "jit"], VALUES)
def test_a_function_that_writes_or_returns_views_is_pure_in_jax(name: str, way: str) -> None:
    fn = _as_tuple(IMPURE[name])
    expected = [out.clone() for out in fn(*operands())]
    close(left_alone(VALUES[way](levels(fn))), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@crossed(["grad", "jit of grad"], GRADIENTS)
def test_its_gradient_is_torchs_own(name: str, way: str) -> None:
    fn = _as_tuple(IMPURE[name])
    leaves = [t.requires_grad_() for t in operands()]
    total = _weighted(fn(*[t.clone() for t in leaves]))
    expected = torch.autograd.grad(total, leaves, materialize_grads=True)
    close(left_alone(GRADIENTS[way](levels(fn))), expected)


def test_results_share_no_memory() -> None:
    """With each other, with an argument, or with what the function keeps."""
    a, b = map(array, operands())
    for name, fn in IMPURE.items():
        outs = as_jax(_as_tuple(fn))(a, b)
        starts = [np.asarray(v).__array_interface__["data"][0] for v in (*outs, a, b)]
        assert len({*starts, KEPT_CONSTANT.data_ptr()}) == len(outs) + 3, name


def test_a_constant_that_is_written_later() -> None:
    """What was returned of it stays."""
    kept = torch.zeros(4)
    f = levels(lambda x: (kept, x + kept))
    eager, jitted = f(x4), jax.jit(f)(x4)
    jax.block_until_ready(jitted)
    kept.fill_(7)
    for same, added in (eager, jitted):
        assert same.tolist() == [0] * 4
        assert added.tolist() == [0, 1, 2, 3]


CONSTANT, COUNT, NORM = torch.ones(3, 4), torch.zeros(()), nn.BatchNorm1d(4)


def _spectral(y: torch.Tensor) -> torch.Tensor:
    CONSTANT.add_(1)
    return torch.linalg.cholesky(y.T @ y + torch.eye(4)) * CONSTANT[:1].sum()


# Each writes to what it closes over, in a way that torch can differentiate.
WRITERS: dict[str, Fn] = {
    "a constant": lambda x, y: CONSTANT.fill_(3.0) * x,
    "and reads it": lambda x, y: CONSTANT.mul_(2.0) * x + CONSTANT * y,
    "a counter": lambda x, y: x * COUNT.add_(1),
    "from an argument": lambda x, y: (CONSTANT.copy_(x.detach()), CONSTANT * y)[1],
    "batch norm": lambda x, y: NORM(x) ** 3,
    "beside a check": lambda x, y: _spectral(y),
    "a view": lambda x, y: (CONSTANT.view(-1).mul_(2.0), (CONSTANT * x))[1],
    "a diagonal": lambda x, y: (CONSTANT.diagonal().add_(2.0), (CONSTANT * x))[1],
}


def _written() -> list[torch.Tensor]:
    return [CONSTANT, COUNT, *NORM.buffers()]


def _three_times(call: Fn) -> list[Any]:
    CONSTANT.fill_(1)
    COUNT.zero_()
    NORM.reset_running_stats()
    return [*(call() for _ in range(3)), *(t.clone() for t in _written())]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("fn", tables.rows(WRITERS))
@pytest.mark.parametrize("way", ["call", "jit", "grad", "jit of grad", "jit of vmap of grad", "jvp", "second"])
def test_what_a_function_closes_over_is_written_once_a_run(way: str, fn: Fn) -> None:
    """As torch writes it, or the run is refused; a trace writes nothing."""
    leaves, (a, b) = [t.requires_grad_() for t in operands()], map(array, operands())
    f = levels(fn)
    value = lambda a, b: (f(a, b) ** 2).sum()  # noqa: E731
    ways: dict[str, Fn] = {
        "call": f,
        "jit": jax.jit(f),
        "grad": jax.grad(value),
        "jit of grad": jax.jit(jax.grad(value)),
        "jit of vmap of grad": lambda a, b: jax.jit(jax.vmap(jax.grad(value)))(a[None], b[None])[0],
        "jvp": lambda a, b: jax.jvp(f, (a, b), (a, b))[0],
        "second": jax.jit(lambda a, b: jax.jvp(jax.grad(value), (a, b), (a, b))[0]),
    }
    if "grad" in way or way == "second":
        native = lambda: torch.autograd.grad((fn(*leaves) ** 2).sum(), leaves[0], materialize_grads=True)[0]  # noqa: E731
    else:
        native = lambda: fn(*leaves).detach()  # noqa: E731
    expected = _three_times(native)
    for trace in (jax.eval_shape, lambda f, *x: jax.jit(f).lower(*x)):
        before = [t.clone() for t in _written()]
        trace(ways[way] if "vmap" not in way else f, a, b)
        close(_written(), before)
    try:
        found = _three_times(lambda: ways[way](a, b))
    except (interop.UnsupportedError, jax.errors.JaxRuntimeError) as error:
        assert "closes over" in str(error) or "mutate a captured Tensor" in str(error)
        assert way not in ("call", "jit", "grad")
        assert way != "jit of grad" or fn in (WRITERS["from an argument"], WRITERS["a view"], WRITERS["a diagonal"])
    else:
        close(found, expected)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: torch.linalg.cholesky(x).sum(),
        lambda x: torch.linalg.inv(0 * x).sum(),
        lambda x: (torch._assert_async((x > 0).all()), x.sum())[1],
    ],
    ids=["factor", "inverse", "assertion"],
)
def test_what_torch_checks_is_checked_in_a_gradient(fn: Fn) -> None:
    """Nobody reads what a check returns."""
    gradient = jax.value_and_grad(levels(fn))
    batched = jax.jit(jax.vmap(gradient))
    for call in (gradient, jax.jit(gradient), lambda x: batched(x[None])):
        with pytest.raises((RuntimeError, jax.errors.JaxRuntimeError)):
            jax.block_until_ready(call(-jnp.eye(2)))


VIEWS: dict[str, Callable[[torch.Tensor], Any]] = {
    "itself": lambda x: x,
    "a slice": lambda x: x[1:],
    "transposed": lambda x: x.reshape(2, -1).T,
    "detached": lambda x: x.detach(),
    "numpy": lambda x: x.detach().numpy(),
    "in a module": lambda x: nn.ParameterList([nn.Parameter(x.detach())])[0],
}
KEPT_WAYS: dict[str, Callable[[Fn, Any], Any]] = {
    "call": lambda f, a: f(a),
    "jit": lambda f, a: jax.jit(lambda a: f(a * 1) * 2)(a),
    "grad": lambda f, a: jax.grad(lambda a: f(a).sum())(a),
    "vjp": lambda f, a: jax.vjp(f, a)[0],
    "scan": lambda f, a: jax.lax.scan(lambda c, k: (c, f(a * k)), 0, jnp.ones(3)),
}


@pytest.mark.parametrize("way", KEPT_WAYS.values(), ids=KEPT_WAYS)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_what_a_function_keeps_is_its_own(view: Callable[[torch.Tensor], Any], way: Callable[[Fn, Any], Any]) -> None:
    """A view of an argument outlives the program, and may be written to; nobody else sees that."""
    kept: list[Any] = []

    def f(x: torch.Tensor) -> torch.Tensor:
        if not is_fake(x):
            kept.append(view(x))
        return x + 1

    a = jnp.full(1 << 14, 3.0)
    out = jax.block_until_ready(way(jittable(example_output=lambda x: x)(differentiable(as_jax(f))), a))
    before = [np.asarray(leaf).copy() for leaf in jax.tree.leaves(out)]
    junk = [jnp.full(1 << 14, 7.0) + i for i in range(20)]
    assert kept
    for x in kept:
        values = x.detach() if isinstance(x, torch.Tensor) else x
        assert (float(values.min()), float(values.max())) == (3, 3)
        values[...] = 9
    assert float(a.min()) == float(a.max()) == 3
    for leaf, was in zip(jax.tree.leaves(out), before, strict=True):
        assert np.array_equal(np.asarray(leaf), was)
    del junk


def test_a_write_to_what_was_kept_does_not_change_a_gradient() -> None:
    """The gradient of the call, or torch's own error; never one of the new values."""
    kept: list[torch.Tensor] = []

    def f(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        return x**3

    out, pull = jax.vjp(levels(f), x4)
    kept[-1].detach().fill_(100)
    try:
        (grad,) = pull(jnp.ones(4))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert grad.tolist() == [0, 3, 12, 27]
    assert out.tolist() == [0, 1, 8, 27]
    assert x4.tolist() == [0, 1, 2, 3]


def test_writes_under_load() -> None:
    """Large arrays, many programs on their way at once, and every one of them writes to what it is given."""

    def destroys(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = x + y
        x.zero_()
        y.fill_(torch.nan)
        return out, x

    f, n = levels(destroys), 1 << 18
    run = jax.jit(lambda a, b: (f(a, b)[0], f(b * 2, a)[0] - a, a + b))
    a, b = jnp.full(n, 1.0), jnp.full(n, 2.0)
    results = [(i, run(a + i, b)) for i in range(30)]
    for i, (one, other, plain) in results:
        for got, expected in ((one, 3 + i), (other, 4), (plain, 3 + i)):
            assert (float(got.min()), float(got.max())) == (expected, expected)
    assert (float(a.max()), float(b.max())) == (1, 2)


# --- modes ------------------------------------------------------------------------------------------------------------


def modes() -> dict[str, Any]:
    """Of this thread."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "denormals": bool(np.float32(1e-40) * np.float32(1) != 0),
    }


USUAL = modes()


class Reports:
    """Notes the modes in which it is run on values."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not is_fake(x):
            self.seen.append(modes())
        return x * 2


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "none": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default dtype": lambda: _default(torch.float64),
    "default device": lambda: torch.device("cpu"),
}


@pytest.mark.parametrize("run", CONTEXTS)
@pytest.mark.parametrize("traced", CONTEXTS)
def test_a_program_runs_in_the_modes_it_was_traced_with(traced: str, run: str) -> None:
    """Whatever the caller's are now; those are as they were afterwards."""
    reports = Reports()
    program = jax.jit(levels(reports))
    with CONTEXTS[traced]():
        compiled = program.lower(x4).compile()
        expected = modes()
    with CONTEXTS[run]():
        before = modes()
        compiled(x4).block_until_ready()
        assert modes() == before
    (seen,) = reports.seen
    assert seen == expected


def test_the_modes_do_not_depend_on_the_thread() -> None:
    """A program whose input is still on its way calls back from a thread of XLA's."""
    reports, threads = Reports(), []

    def f(x: torch.Tensor) -> torch.Tensor:
        if not is_fake(x):
            threads.append(threading.current_thread() is threading.main_thread())
        return reports(x)

    big = jnp.ones((1200, 1200))
    slow = jax.jit(lambda a: (a @ a) @ a)
    program = jax.jit(lambda a: levels(f)((a @ a)[0, 0]))
    slow(big).block_until_ready()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = program.lower(big).compile()
    for _ in range(3):
        compiled(big).block_until_ready()
        with torch.no_grad():
            compiled(slow(big)).block_until_ready()
    assert len(reports.seen) == 6
    assert all(seen == reports.seen[0] for seen in reports.seen), threads
    assert reports.seen[0]["autocast"] == torch.bfloat16


@pytest.mark.parametrize("first", ["none", "autocast"])
def test_another_trace_in_another_mode(first: str) -> None:
    """What was inferred, or captured, in the one is not taken for what the other returns."""
    f, m = levels(lambda x: x @ x), jnp.eye(3)
    for name in (first, "autocast" if first == "none" else "none"):
        with CONTEXTS[name]():
            expected = jnp.bfloat16 if name == "autocast" else jnp.float32
            assert jax.jit(lambda x: f(x))(m).dtype == expected
            value, grad = jax.jit(lambda x: jax.value_and_grad(lambda x: f(x).sum())(x))(m)
            assert (value.dtype, grad.dtype) == (expected, jnp.float32)


def test_another_trace_with_another_default_dtype() -> None:
    f = levels(lambda x: torch.ones(4))
    assert jax.jit(lambda x: f(x))(x4).dtype == jnp.float32
    with _default(torch.bfloat16):
        assert f(x4).dtype == jnp.bfloat16
        assert jax.jit(lambda x: f(x))(x4).dtype == jnp.bfloat16


def block(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Partly in lower precision, partly not."""
    return (torch.tanh(x @ w).float() * F.layer_norm(x, (16,))).sum()


@pytest.mark.parametrize("jitted", [False, True], ids=["", "jit"])
def test_autocast_computes_as_in_torch(jitted: bool) -> None:
    """Value and gradients, to the last bit."""
    x, w = (torch.randn(16, 16, requires_grad=True) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x, w)
    expected = torch.autograd.grad(y, (x, w))
    ask = jax.value_and_grad(levels(block), argnums=(0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, grads = (jax.jit(ask) if jitted else ask)(array(x), array(w))
    assert float(value) == y.item()
    for got, want in zip(grads, expected, strict=True):
        assert got.tolist() == want.tolist()


def force(x: torch.Tensor) -> torch.Tensor:
    """A function that takes a derivative by itself, as potentials do."""
    if not x.requires_grad:
        x = x.clone().requires_grad_()
    return -torch.autograd.grad((x**4).sum(), x, create_graph=True)[0]


FORCES: dict[str, Callable[[Fn], Any]] = {
    "call": lambda f: f(x4),
    "jit": lambda f: jax.jit(f)(x4),
    "vmap": lambda f: jax.vmap(f)(x4[None])[0],
    "grad": lambda f: jax.grad(lambda x: f(x).sum())(x4) * x4 / 3,
    "jit of grad": lambda f: jax.jit(jax.grad(lambda x: f(x).sum()))(x4) * x4 / 3,
    "jvp": lambda f: jax.jvp(f, (x4,), (x4,))[1] / 3,
}


@pytest.mark.parametrize("ask", FORCES.values(), ids=FORCES)
def test_a_function_that_takes_a_gradient_by_itself(ask: Callable[[Fn], Any]) -> None:
    close(ask(levels(force)), -4.0 * x4**3)


def test_it_takes_none_where_the_caller_records_none() -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        as_jax(lambda x: torch.autograd.grad((x * 2).sum(), x)[0])(x4)


FAILING_WAYS: dict[str, Callable[[Fn], Any]] = {
    "call": lambda f: f(x4),
    "jit": lambda f: jax.jit(f)(x4).block_until_ready(),
    "grad": lambda f: jax.grad(lambda x: f(x).sum())(x4),
    "vmap": lambda f: jax.vmap(f)(x4[None]),
    "jit of vmap": lambda f: jax.jit(jax.vmap(f))(x4[None]).block_until_ready(),
    "jvp": lambda f: jax.jvp(f, (x4,), (x4,)),
}
UPSET: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "grad": lambda: torch.set_grad_enabled(True),
    "no grad": lambda: torch.set_grad_enabled(False),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16).__enter__(),
    "flush": lambda: torch.set_flush_denormal(True),
}


@pytest.mark.parametrize("raising", [False, True], ids=["", "raising"])
@pytest.mark.parametrize("name", [n for n in CONTEXTS if n != "default dtype"])
@pytest.mark.parametrize("way", FAILING_WAYS.values(), ids=FAILING_WAYS)
def test_the_callers_modes_are_restored(name: str, way: Callable[[Fn], Any], raising: bool) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        if raising and not is_fake(x):
            raise ArithmeticError
        return x * 2

    with CONTEXTS[name]():
        before = modes()
        with contextlib.suppress(ArithmeticError, jax.errors.JaxRuntimeError):
            way(levels(f))
        assert modes() == before


@pytest.mark.parametrize("upset", UPSET.values(), ids=UPSET)
def test_a_mode_that_a_callback_leaves_ends_with_it(upset: Callable[[], Any]) -> None:
    """It runs on whatever thread there is, between the operations of others."""

    def f(x: torch.Tensor) -> torch.Tensor:
        if not is_fake(x):
            upset()
        return x * 2

    before = modes()
    run = jax.jit(levels(f))
    try:
        run(x4).block_until_ready()
        assert modes() == before
    finally:
        torch.set_flush_denormal(False)
        torch.set_autocast_enabled("cpu", False)
        torch.set_grad_enabled(True)


def test_denormals_are_numbers_in_a_callback() -> None:
    """XLA flushes them to zero, torch does not; nor does it afterwards."""
    f = levels(lambda x: (x * 2 != 0).float() + 0 * x)
    tiny = jnp.asarray(np.full(4, 1e-40, np.float32))
    for call in (
        f,
        jax.jit(f),
        lambda x: jax.jit(jax.vmap(f))(x[None])[0],
        lambda x: jax.jit(lambda x: jax.vjp(f, x)[0])(x),
    ):
        assert call(tiny).tolist() == [1] * 4
        assert modes()["denormals"]


def test_denormals_in_the_threads_of_torch(run_python: Callable[..., str]) -> None:
    """Threads that are born in a callback would flush for the rest of their lives."""
    out = run_python(
        """
        import torch, jax, jax.numpy as jnp, interop
        torch.set_num_threads(2)
        n = 1 << 21
        f = interop.jittable(interop.as_jax(lambda x: x * 2))
        jax.jit(f)(jnp.ones(n)).block_until_ready()
        print(int((torch.full((n,), 1e-40) * 2 == 0).sum()))
        """,
        OMP_NUM_THREADS="2",
    )
    assert out == "0\n"


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor can't flush")
def test_a_user_who_wants_denormals_flushed_keeps_that() -> None:
    run = jax.jit(levels(lambda x: x * 2))
    run(x4).block_until_ready()
    torch.set_flush_denormal(True)
    try:
        run(x4).block_until_ready()
        assert not modes()["denormals"]
    finally:
        torch.set_flush_denormal(False)


# --- threads ----------------------------------------------------------------------------------------------------------


def mixed(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Residuals of every kind, and a write."""
    z = torch.tanh(x @ y)
    return z.mul(2).add_(y.exp()), x[0] * 2


def mine(i: int, n: int = 16) -> tuple[jax.Array, jax.Array]:
    """The arguments of one thread."""
    generator = torch.Generator().manual_seed(i)
    return array(torch.rand(n, n, generator=generator)), array(torch.rand(n, n, generator=generator))


def of_both(f: Fn) -> Fn:
    """Value and gradients."""
    return jax.value_and_grad(lambda x, y: sum(out.sum() for out in f(x, y)), argnums=(0, 1))


PROGRAMS: dict[str, Callable[[Fn], Fn]] = {
    "jit": lambda f: jax.jit(of_both(f)),
    "eager": of_both,
}


@pytest.mark.parametrize(
    ("program", "same"),
    [(PROGRAMS["jit"], True), (PROGRAMS["jit"], False), (PROGRAMS["eager"], True)],
    ids=["jit", "jit, a shape each", "eager"],
)
def test_eight_threads_get_what_one_gets(program: Callable[[Fn], Fn], same: bool) -> None:
    """Also from the first call on, when they trace and compile it together."""
    alone, run = program(levels(mixed)), program(levels(mixed))
    size = lambda i: 16 if same else 16 + i
    expected = [jax.tree.leaves(alone(*mine(i, size(i)))) for i in range(THREADS)]

    def work(i: int) -> None:
        for _ in range(3):
            close(jax.tree.leaves(run(*mine(i, size(i)))), expected[i])

    at_once(work)


FORWARDS: dict[str, Callable[[Fn], Fn]] = {
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,))[1],
    "jit of jvp": lambda f: jax.jit(lambda x: jax.jvp(f, (x,), (x,))[1]),
    "jacfwd": jax.jacfwd,
}


@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_forward_derivatives_of_two_threads_at_once(forward: Callable[[Fn], Fn]) -> None:
    """Torch has one count of levels for the process: the thread that leaves first takes those of the other away."""
    meet, both = threading.Barrier(2), threading.local()

    def f(x: torch.Tensor) -> torch.Tensor:
        with contextlib.suppress(threading.BrokenBarrierError):
            if hasattr(both, "run") and meet.wait(1):  # the one that came last
                threading.Event().wait(0.05)
        return x.sin() * x

    run, expected = forward(levels(f)), forward(lambda x: jnp.sin(x) * x)

    def work(i: int) -> jax.Array:
        both.run = True
        return run(jnp.arange(1.0, 4.0) + i)

    run(jnp.arange(1.0, 4.0))
    with ThreadPoolExecutor(2) as pool:
        for i, got in enumerate(pool.map(work, range(2))):
            close(got, expected(jnp.arange(1.0, 4.0) + i))


def test_a_thread_that_fails_does_not_trouble_the_others() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        if not is_fake(x) and x[0] == 3:
            raise ArithmeticError
        return x * 2

    eager = levels(f)
    run = jax.jit(eager)

    def work(i: int) -> int:
        failed = 0
        for _ in range(10):
            for call in (eager, run):
                try:
                    assert call(jnp.full(4, float(i))).tolist() == [2 * i] * 4
                except Exception as error:
                    assert "ArithmeticError" in repr(error)
                    failed += 1
        return failed

    assert at_once(work) == [0, 0, 0, 20, 0, 0, 0, 0]


def deep() -> nn.Module:
    """Long enough to be left in the middle."""
    return nn.Sequential(*[part for _ in range(6) for part in (nn.Linear(64, 64), nn.Tanh())])


RACES: dict[str, tuple[Callable[[nn.Module], Fn], int]] = {
    "functional_call": (lambda net: levels(lambda p, x: torch.func.functional_call(net, p, (x,))), 200),
    "module": (levels, 50),
}


@pytest.mark.parametrize(("make", "calls"), RACES.values(), ids=RACES)
def test_callbacks_of_one_program_do_not_mix_their_weights(make: Callable[[nn.Module], Fn], calls: int) -> None:
    """Independent parts of a program may run at once, and `functional_call` swaps what the module holds."""
    net = deep()
    f, before = make(net), {name: t.clone() for name, t in net.state_dict().items()}
    weights = [{name: array(p) * s for name, p in net.named_parameters()} for s in (1.0, 0.5, 0.25, 2.0)]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(256, 64)), jnp.float32)

    def part(i: int, p: Any) -> jax.Array:
        return f(p, x + i) @ jnp.ones((64, 64))

    program = jax.jit(lambda ps: [part(i, p) for i, p in enumerate(ps)])
    expected = [part(i, p) for i, p in enumerate(weights)]
    for _ in range(calls):
        close(program(weights), expected)
    slope = lambda i, p: jax.grad(lambda p: (f(p, x + i) ** 2).mean())(p)
    push = lambda i, p: jax.jvp(lambda p: f(p, x + i), (p,), (p,))[1]
    for derivative in (slope, push):
        program = jax.jit(lambda ps, d=derivative: [d(i, p) for i, p in enumerate(ps)])
        expected = jax.tree.leaves([derivative(i, p) for i, p in enumerate(weights)])
        for _ in range(10):
            close(jax.tree.leaves(program(weights)), expected)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert all(p.requires_grad and isinstance(p, nn.Parameter) for p in net.parameters())


def waits_for_a_thread() -> None:
    """A torch function that waits for a program of JAX, which calls torch from another thread."""
    inner = jax.jit(levels(lambda x: x + 1))
    inner(x4).block_until_ready()

    def outer(x: torch.Tensor) -> torch.Tensor:
        if is_fake(x):
            return x
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: interop.jax_to_torch(inner(x4))).result() + x

    print(jax.jit(levels(outer))(x4).tolist())


def two_locks() -> None:
    """One thread seeds and calls a program, another runs a program that seeds."""
    add = levels(lambda x: x + torch.rand(4))
    program = jax.jit(levels(lambda x: x * 2))
    through = as_torch(lambda a: program(a))
    seeds = as_jax(lambda x: through(x) + torch.rand(4), rng="key")
    seeded = jax.jit(jittable(as_jax(lambda x: x + torch.rand(4), rng="key")))
    key, works = jax.random.key(0), []

    def work(i: int) -> None:
        for _ in range(300):
            (seeds if i % 2 else seeded)(x4, key=key).block_until_ready()
        works.append(i)

    at_once(work)
    print(len(works), add(x4).shape)


IN_TURN = missing("a callback waits for its turn, which is that of the one that waits for it")


@pytest.mark.parametrize(
    ("program", "printed", "seconds"),
    [
        pytest.param(waits_for_a_thread, "[1.0, 3.0, 5.0, 7.0]\n", 3, id="waiting for a thread", marks=IN_TURN),
        pytest.param(two_locks, "8 (4,)\n", 30, id="two locks"),
    ],
)
def test_a_callback_inside_a_callback_never_hangs(
    program: Fn, printed: str, seconds: int, run_python: Callable[..., str]
) -> None:
    """The inner one comes on another thread than the one that waits for it, as it may inside XLA too."""
    assert printed == run_python(
        f"""
        import faulthandler, test_callbacks
        faulthandler.dump_traceback_later({seconds}, exit=True)
        test_callbacks.{program.__name__}()
        """,
        PYTHONPATH=os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parent.parent))),
        timeout=40,
    )


# --- exceptions -------------------------------------------------------------------------------------------------------


class Odd(Exception):
    """Can't be made from a message alone."""

    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(code)
        self.code, self.detail = code, detail

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


class Unprintable(Exception):
    """Can't be told."""

    def __str__(self) -> str:
        raise ValueError("no text")


class Slotted(BaseException):
    """No attribute can be set on it but a few."""

    __slots__ = ("code",)


def interrupt() -> BaseException:
    """As Ctrl-C does, while torch runs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    raise AssertionError


ERRORS: dict[str, Callable[[], BaseException]] = {
    "custom": lambda: Odd(7, detail="mine"),
    "unprintable": Unprintable,
    "slotted": Slotted,
    "KeyboardInterrupt": KeyboardInterrupt,
    "SIGINT": interrupt,
    "SystemExit": lambda: SystemExit(3),
    "GeneratorExit": GeneratorExit,
    "StopIteration": lambda: StopIteration(1),
    "MemoryError": lambda: MemoryError("mine"),
    "TypeError": lambda: TypeError("mine"),
    "OverflowError": lambda: OverflowError("mine"),
    "group": lambda: ExceptionGroup("mine", [ValueError("one"), KeyError("two")]),
    "RuntimeError": lambda: RuntimeError("mine"),
    "NotImplementedError": lambda: NotImplementedError("mine"),
    "RecursionError": lambda: RecursionError("mine"),
}

EAGERLY: dict[str, Callable[[Fn], Any]] = {
    "call": lambda f: f(x4),
    "grad": lambda f: jax.grad(lambda x: f(x).sum())(x4),
    "jvp": lambda f: jax.jvp(f, (x4,), (x4,)),
    "vmap": lambda f: jax.vmap(f)(x4[None]),
    "vmap of grad": lambda f: jax.vmap(jax.grad(lambda x: f(x).sum()))(x4[None]),
    "in torch in jax": lambda f: as_jax(lambda t: as_torch(lambda a: f(a), jit=False)(t))(x4),
}
TRACING: dict[str, Callable[[Fn], Any]] = {
    "jit": lambda f: jax.jit(f)(x4),
    "jit of grad": lambda f: jax.jit(jax.grad(lambda x: f(x).sum()))(x4),
    "jit of vmap": lambda f: jax.jit(jax.vmap(f))(x4[None]),
    "make_jaxpr": lambda f: jax.make_jaxpr(f)(x4),
    "eval_shape": lambda f: jax.eval_shape(f, x4),
    "scan": lambda f: jax.lax.scan(lambda c, x: (c, f(x)), 0, x4),
    "checkpoint": lambda f: jax.checkpoint(f)(x4),
    "nested": lambda f: jax.jit(levels(lambda t: as_torch(lambda a: f(a))(t)))(x4),
}


def raiser(make: Callable[[], BaseException]) -> tuple[Fn, list[BaseException]]:
    """A function that raises it, and what it has raised."""
    raised: list[BaseException] = []

    def the_users_own(x: torch.Tensor) -> torch.Tensor:
        raised.append(make())
        raise raised[-1]

    return the_users_own, raised


SQUARE = levels(lambda x: (x * x).sum())
WORKS = [SQUARE, jax.jit(SQUARE), jax.grad(SQUARE), jax.jit(jax.grad(SQUARE))]


def usable() -> None:
    """JAX, torch and the crossing work, here and in another thread: nobody holds a lock."""

    def work() -> None:
        assert [call(x4).tolist() for call in WORKS] == [14, 14, [0, 2, 4, 6], [0, 2, 4, 6]]

    work()
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize("way", [*EAGERLY, *TRACING])
@pytest.mark.parametrize("name", ERRORS)
def test_an_exception_arrives_as_itself(name: str, way: str) -> None:
    """The very object, with the user's line, wherever a frame of ours is above; and once."""
    fn, raised = raiser(ERRORS[name])
    kind = KeyboardInterrupt if name == "SIGINT" else type(ERRORS[name]())
    with pytest.raises(kind) as caught:
        (EAGERLY | TRACING)[way](levels(fn))
    if raised:
        assert caught.value in raised
    assert any(entry.name == "the_users_own" for entry in caught.traceback)
    assert modes() == USUAL


def test_an_error_of_torch_while_tracing_is_torchs_own() -> None:
    """Not a lack of shapes: they were there, and did not fit."""
    f = levels(lambda x: x @ torch.ones(3, 3))
    with pytest.raises(RuntimeError) as eagerly:
        f(x4)
    with pytest.raises(RuntimeError) as traced:
        jax.jit(f)(x4)
    assert "mat1" in str(eagerly.value) or "size mismatch" in str(eagerly.value)
    assert not isinstance(traced.value, interop.InteropError)


class Backward(torch.autograd.Function):
    """The identity, whose derivative fails on values alone."""

    fails: Callable[[], BaseException] = staticmethod(lambda: Odd(7, detail="mine"))

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> torch.Tensor:
        raise Backward.fails()

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
        raise Backward.fails()


DERIVED: dict[str, Callable[[Fn], Any]] = {
    "grad": EAGERLY["grad"],
    "vjp": lambda f: jax.vjp(f, x4)[1](x4),
    "jvp": EAGERLY["jvp"],
    "jacrev": lambda f: jax.jacrev(f)(x4),
    "jacfwd": lambda f: jax.jacfwd(f)(x4),
    "vmap of grad": EAGERLY["vmap of grad"],
    "hessian": lambda f: jax.hessian(lambda x: f(x).sum())(x4),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(lambda x: f(x).sum()))(x4),
}


@pytest.mark.parametrize("name", ["custom", "KeyboardInterrupt", "SystemExit", "RuntimeError"])
@pytest.mark.parametrize("way", DERIVED.values(), ids=DERIVED)
def test_an_exception_in_a_derivative_arrives_as_itself(
    name: str, way: Callable[[Fn], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backward, "fails", staticmethod(ERRORS[name]))
    f = levels(lambda x: Backward.apply(x))
    assert f(x4).tolist() == x4.tolist()
    with pytest.raises(type(ERRORS[name]()), match={"custom": "7: mine", "SystemExit": "3"}.get(name)):
        way(f)
    usable()


def late(x: torch.Tensor) -> torch.Tensor:
    """Fails on values alone, on this line."""
    if not is_fake(x):
        raise failing()
    return x * 2


LINE = late.__code__.co_firstlineno + 3
FAILURE: list[Callable[[], BaseException]] = [ERRORS["custom"]]


def failing() -> BaseException:
    """What `late` raises; another each time, for an exception keeps its frames."""
    return FAILURE[0]()


COMPILED: dict[str, Callable[[Fn], Any]] = {
    "jit": lambda f: jax.jit(f)(x4),
    "in between": lambda f: jax.jit(lambda x: f(x * 2) + 1)(x4),
    "jit of vmap": lambda f: jax.jit(jax.vmap(f))(x4[None]),
    "jit of jvp": lambda f: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(x4),
    "scan": lambda f: jax.lax.scan(lambda c, x: (c, f(x)), 0, x4),
    "ahead of time": lambda f: jax.jit(f).lower(x4).compile()(x4),
    "eager derivative of jit": lambda f: jax.jvp(jax.jit(f), (x4,), (x4,)),
}


@pytest.mark.parametrize(
    ("name", "way"), [(n, w) for n in ERRORS for w in COMPILED if n != "SIGINT" and (w == "jit" or n == "custom")]
)
def test_an_exception_in_the_users_own_program_is_in_the_message(name: str, way: str) -> None:
    """JAX admits its own type alone. Crossing, type, message and line are in it; and JAX goes on."""
    error, FAILURE[0] = ERRORS[name](), ERRORS[name]
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(COMPILED[way](levels(late)))
    text = str(caught.value)
    for part in ("late", type(error).__name__, "" if name == "unprintable" else str(error)):
        assert part in text
    assert re.search(rf'test_callbacks\.py(:|", line ){LINE}\b', text)
    usable()


class Witness:
    """Something whose end can be seen."""


def test_a_failure_keeps_nothing() -> None:
    """What was in its frames is gone with the exception; nor do arrays stay."""
    seen: list[weakref.ref[Any]] = []

    def f(x: torch.Tensor) -> torch.Tensor:
        if is_fake(x):
            return x * 2
        witness, tensor = Witness(), torch.ones(8)
        seen.extend([weakref.ref(witness), weakref.ref(tensor), weakref.ref(x)])
        raise Odd(7, detail="mine")

    alive = len(jax.live_arrays())
    ways = EAGERLY | COMPILED
    for way in ways.values():
        with contextlib.suppress(Odd, jax.errors.JaxRuntimeError):
            jax.block_until_ready(way(levels(f)))
    gc.collect()
    assert len(seen) >= 3 * (len(ways) - 1)  # one of them runs a captured graph
    assert [ref() for ref in seen if ref() is not None] == []
    assert len(jax.live_arrays()) <= alive + 2


def test_a_gradient_that_fails_frees_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    def f(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        if not is_fake(y):
            kept.append(weakref.ref(y))
        return Backward.apply(y)

    for _ in range(3):
        with pytest.raises(Odd):
            jax.grad(lambda x: levels(f)(x).sum())(x4)
    gc.collect()
    assert len(kept) == 3
    assert [ref() for ref in kept if ref() is not None] == []


# --- memory -----------------------------------------------------------------------------------------------------------


def resident() -> float:
    """The memory of this process now, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _loss(x: torch.Tensor) -> torch.Tensor:
    return (torch.sin(x) * x).sum()


LOSS, FAILING = levels(_loss), levels(late)
JITTED, GRADIENT, FAILED = jax.jit(LOSS), jax.jit(jax.grad(LOSS)), jax.jit(FAILING)
data = jnp.ones(1 << 14)  # 64 kB: one of them lost in each of 500 calls would be 32 MB


def _suppressed(call: Fn) -> None:
    with contextlib.suppress(Odd, jax.errors.JaxRuntimeError):
        jax.block_until_ready(call(data))


LOOPS: dict[str, tuple[int, float, Callable[[int], Any]]] = {
    "jitted calls": (5000, 3, lambda i: JITTED(data)),
    "jitted gradients": (500, 3, lambda i: GRADIENT(data)),
    "eager calls": (500, 3, lambda i: LOSS(data)),
    "eager gradients": (500, 3, lambda i: jax.grad(LOSS)(data)),
    "graphs that are dropped": (200, 3, lambda i: jax.vjp(LOSS, data)),
    "second order": (50, 3, lambda i: jax.jvp(jax.grad(LOSS), (data,), (data,))),
    "batches": (200, 3, lambda i: jax.vmap(LOSS)(data[None])),
    "errors": (300, 3, lambda i: _suppressed(FAILING)),
    "errors in a program": (300, 3, lambda i: _suppressed(FAILED)),
    "retraces": (60, 5, lambda i: jax.jit(lambda x: LOSS(x) + i)(data)),
    "retraced gradients": (10, 10, lambda i: jax.jit(lambda x: jax.grad(LOSS)(x) + i)(data)),
    "new functions": (10, 10, lambda i: jax.jit(levels(lambda x: x + i))(data)),
}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="nobody says how much memory is in use")
@pytest.mark.parametrize(("count", "allowed", "loop"), LOOPS.values(), ids=LOOPS)
def test_a_loop_needs_no_more_memory(count: int, allowed: float, loop: Callable[[int], Any]) -> None:
    """After a first part of it has filled what is filled once."""
    FAILURE[0] = ERRORS["custom"]
    for i in range(max(count // 5, 10)):
        jax.block_until_ready(loop(-i))
    gc.collect()
    before, alive = resident(), len(jax.live_arrays())
    for i in range(count):
        jax.block_until_ready(loop(i))
    gc.collect()
    assert resident() - before < allowed
    assert len(jax.live_arrays()) <= alive + 2
