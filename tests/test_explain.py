"""What a call would do, without doing it; what the library tells of itself; what there is on the machine."""

from __future__ import annotations

import functools
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import interop
from interop import (
    WrappedJaxFunction,
    WrappedJaxScalarFunction,
    __main__,
    _log,
    as_jax,
    as_torch,
    differentiable,
    explain,
    jittable,
    make_functional,
    torch_module_to_jax,
)
from interop._in_torch import _residuals
from interop._leaf import describe, tensor_to_array
from interop._private import torch as torch_private
from programs import ROOT
from tables import rows

Call = tuple[Callable[..., Any], tuple[Any, ...]]


def levels(fn: Any) -> Any:
    """With every level on."""
    return jittable(differentiable(fn))


# --- the report -------------------------------------------------------------------------------------------------------


def loss(w: Any, x: Any, y: Any, n: Any, *, mode: str = "mean") -> Any:
    """A function of JAX."""
    return getattr(jnp, mode)((x @ w - y) ** n)


def energy(params: Any, x: Any, *, scale: float = 1.0) -> Any:
    """A function of torch."""
    return (torch.tanh(x @ params["w"]) * scale).sum(), x.shape[0]


def test_a_jax_function_in_torch() -> None:
    report = explain(
        levels(as_torch(loss)),
        torch.zeros(3, requires_grad=True),
        torch.ones(3, 8).T,
        torch.ones(8, dtype=torch.int64),
        3,
        mode="mean",
    )
    assert str(report) == repr(report)
    assert str(report).splitlines() == [
        "loss: a JAX function, called from torch; differentiable, jittable",
        "  w       f32[3]    shared                                 yes",
        "  x       f32[8,3]  copied: it is not contiguous           not asked",
        "  y       i64[8]    copied: 64-bit integers go in 32 bits",
        "  n       3         converted: a traced number",
        "  mode    'mean'    static",
        "  result  f32[]     shared: it is the caller's             yes",
        "  gradient: computed with the value, kept for the backward: f32[3] (12 bytes of its own)",
        "  traced anew for: another shape or dtype of w, x, y; another value of mode",
    ]


def test_a_torch_function_in_jax() -> None:
    report = explain(levels(as_jax(energy)), {"w": jnp.ones((3, 2))}, jnp.ones((4, 3)), scale=2.0)
    assert str(report).splitlines() == [
        "energy: a torch function, called from JAX; differentiable, jittable",
        "  params['w']  f32[3,2]  copied: the function may write to it  yes",
        "  x            f32[4,3]  copied: the function may write to it  yes",
        "  scale        2.0       static: a number, given as it is",
        "  result[0]    f32[]     copied: the function may keep it      yes",
        "  gradient: eagerly by torch's own graph of the call; in a trace captured, kept for the backward: "
        "params['w'], x, f32[4,2] (32 bytes of its own)",
        "  traced anew for: another shape or dtype of params['w'], x; another value of scale; "
        "other modes of torch or of a module",
        "  note: eagerly nothing is traced",
    ]


def test_a_report_is_read_by_its_attributes() -> None:
    report = explain(as_torch(loss), torch.ones(3), torch.ones(8, 3), torch.ones(8), 2.0)
    assert (report.function, report.guest, report.host, report.levels) == ("loss", "JAX", "torch", ())
    assert report.leaves[0] == ("w", "f32[3]", "shared", "", "")
    assert (report.leaves[3].path, report.leaves[3].how) == ("n", "converted")
    assert [row.value for row in report.outputs] == ["f32[]"]
    assert report.refused is None


# --- how a leaf crosses -----------------------------------------------------------------------------------------------

SHARED = ("shared", "")
INTO_TORCH: dict[str, tuple[Callable[[], Any], tuple[str, str]]] = {
    "a dense tensor": (lambda: torch.ones(16, 3), SHARED),
    "a parameter": (lambda: torch.nn.Parameter(torch.ones(16)), SHARED),
    "a number on its own": (lambda: torch.ones(()), SHARED),
    "an empty one": (lambda: torch.ones(0, 3), SHARED),
    "a transposed one": (lambda: torch.ones(16, 3).T, ("copied", "it is not contiguous")),
    "an expanded one": (lambda: torch.ones(1).expand(4), ("copied", "it is not contiguous")),
    "an unaligned one": (lambda: torch.ones(17)[1:], ("copied", "its memory is not aligned to 64 bytes")),
    "a conjugated one": (lambda: torch.ones(4, dtype=torch.complex64).conj(), ("copied", "it is a conjugated view")),
    "64-bit floats": (lambda: torch.ones(4, dtype=torch.float64), SHARED),
    "64-bit integers": (lambda: torch.ones(4, dtype=torch.int64), ("copied", "64-bit integers go in 32 bits")),
    "bfloat16": (lambda: torch.ones(4, dtype=torch.bfloat16), SHARED),
}


@pytest.mark.parametrize(("make", "expected"), rows(INTO_TORCH))
def test_into_a_jax_function(make: Callable[[], Any], expected: tuple[str, str]) -> None:
    """And it is so: the array that the call makes is over the tensor's memory, or is not."""
    x = make()
    row = explain(as_torch(lambda x: x), x.detach()).leaves[0]
    assert (row.how, row.why) == expected
    x = x.detach()
    array = tensor_to_array(x, x64=x.dtype is torch.float64)
    is_there = torch.from_dlpack(array).data_ptr() == x.data_ptr()
    assert is_there == (row.how == "shared")


OTHERS: dict[str, tuple[Any, Callable[[], Any], tuple[str, str]]] = {
    "numpy in torch": (as_torch, lambda: np.ones(3), ("copied", "numpy's memory is the user's to write")),
    "an array in torch": (as_torch, lambda: jnp.ones(3), ("shared", "an array already")),
    "a key in torch": (as_torch, lambda: jax.random.key(0), ("converted", "to its data, and typed again")),
    "a number in torch": (as_torch, lambda: 1.5, ("converted", "a traced number")),
    "a flag in torch": (as_torch, lambda: True, ("static", "")),
    "an array in JAX": (as_jax, lambda: jnp.ones(3), ("copied", "the function may write to it")),
    "numpy in JAX": (as_jax, lambda: np.ones(3), ("copied", "numpy's memory is the user's to write")),
    "a tensor in JAX": (as_jax, lambda: torch.ones(3), ("copied", "a tensor, of which the value crosses")),
    "a number in JAX": (as_jax, lambda: 1.5, ("static", "a number, given as it is")),
    "a string in JAX": (as_jax, lambda: "a", ("static", "")),
}


@pytest.mark.parametrize(("cross", "make", "expected"), rows(OTHERS))
def test_other_leaves(cross: Any, make: Callable[[], Any], expected: tuple[str, str]) -> None:
    one = jnp.ones(()) if cross is as_torch else torch.ones(())
    row = explain(cross(lambda x: one), make()).leaves[0]
    assert (row.how, row.why) == expected


def test_what_is_not_traced_is_copied() -> None:
    report = explain(as_torch(loss, jit=False), torch.ones(3), torch.ones(8, 3), torch.ones(8), 2)
    assert report.leaves[0].crosses == "copied: a function that is not traced may keep it"
    assert report.outputs[0].how == "copied"
    assert report.retraces == ()
    assert "it is not traced (jit=False): it runs operation by operation, on copies" in report.notes


def test_a_64_bit_float_anywhere_keeps_integers_whole() -> None:
    report = explain(as_torch(lambda x, n: x * n), np.ones(3), torch.tensor([2**40] * 3))
    assert report.leaves[1].how == "shared"
    assert report.refused is None


def test_a_function_without_arguments() -> None:
    report = explain(as_jax(lambda: torch.ones(3)))
    assert report.leaves == ()
    assert report.outputs[0].value == "f32[3]"


def test_in_a_trace_a_leaf_has_no_memory() -> None:
    found = []

    def f(x: jax.Array) -> jax.Array:
        found.append(explain(levels(as_jax(torch.sin)), x).leaves[0])
        return x

    jax.jit(f)(jnp.ones(3))
    assert (found[0].value, found[0].crosses) == ("f32[3]", "traced: it has no values yet")


# --- what a later call is traced for ----------------------------------------------------------------------------------

LATER: dict[str, tuple[Callable[..., Any], Any, Any, str]] = {
    "another number": (lambda x, n: x * n, 2, 3, "converted"),
    "another number whose value is needed": (lambda x, n: x[:n], 2, 3, "static"),
    "another flag": (lambda x, n: x if n else -x, True, False, "static"),
    "another name": (lambda x, n: getattr(jnp, n)(x), "sin", "cos", "static"),
}


@pytest.mark.parametrize(("fn", "one", "other", "how"), rows(LATER))
def test_what_is_static_is_traced_anew(fn: Any, one: Any, other: Any, how: str) -> None:
    """And what is not, is not: counted."""
    traces = []

    def counted(x: Any, n: Any) -> Any:
        traces.append(n)
        return fn(x, n)

    crossing, x = as_torch(counted), torch.ones(4)
    report = explain(crossing, x, one)
    assert report.leaves[1].how == how
    assert any(re.search(r"value of.* n\b", said) for said in report.retraces) == (how == "static")
    crossing(x, one)
    before = len(traces)
    crossing(x, other)
    assert (len(traces) > before) == (how == "static")


# --- derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.parametrize("fn", [lambda x, y: x * y, lambda x, y: x + 2 * y, lambda x, y: x * 2 + jnp.sin(y)],
                         ids=["product", "sum", "sine"])  # fmt: skip
def test_what_is_kept_may_not_be_written_to(fn: Any, name: str) -> None:
    """And what is not kept may: torch's own version counter says whether the report is true."""
    crossing = differentiable(as_torch(fn))
    given = {"x": torch.ones(4, requires_grad=True), "y": torch.full((4,), 2.0, requires_grad=True)}
    kept = explain(crossing, **given).gradient.partition("kept for the backward: ")[2].split(", ")
    out = crossing(**given).sum()
    with torch.no_grad():
        given[name].add_(1)
    if name in kept:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()
    else:
        out.backward()


def test_a_leaf_that_no_output_depends_on_has_no_gradient() -> None:
    x, y = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    report = explain(differentiable(as_torch(lambda x, y: x * 2)), x, y)
    assert [row.gradient for row in report.leaves] == ["yes", "none: no output depends on it"]


def test_no_derivative_is_asked() -> None:
    report = explain(differentiable(as_torch(jnp.sin)), torch.ones(3))
    assert report.gradient == "not asked: no argument requires grad"
    with torch.no_grad():
        report = explain(differentiable(as_torch(jnp.sin)), torch.ones(3, requires_grad=True))
    assert report.gradient == "not asked: no argument requires grad"


def by_value(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.sum() > 0 else x


def test_a_gradient_that_can_not_be_captured() -> None:
    f = differentiable(jittable(as_jax(by_value), example_output=jax.ShapeDtypeStruct((3,), jnp.float32)))
    report = explain(f, jnp.ones(3))
    assert report.gradient.startswith(
        "eagerly by torch's own graph of the call; in a trace by running the function again: it can't be captured ("
    )
    assert "\n" not in report.gradient


def test_outputs_that_can_not_be_inferred() -> None:
    report = explain(levels(as_jax(lambda x: x * x.sum().item())), jnp.ones(3))
    assert report.outputs == ()
    (said,) = [note for note in report.notes if "inferred" in note]
    assert said.startswith("the output shapes can't be inferred (")
    assert said.endswith("Declare them: @jittable(example_output=...)")
    assert report.refused is None


def test_an_exception_of_the_users_is_told() -> None:
    def f(x: Any) -> Any:
        raise ValueError("no")

    for cross, x in ((as_torch, torch.ones(3)), (as_jax, jnp.ones(3))):
        assert "its outputs can't be inferred: ValueError: no" in explain(cross(f), x).notes
    assert explain(differentiable(as_torch(f)), torch.ones(3)).gradient == "not known: the outputs can't be inferred"


def test_64_bits() -> None:
    report = explain(as_torch(jnp.sin), torch.ones(3, dtype=torch.float64))
    assert report.outputs[0].value == "f64[3]"
    assert "it is computed in 64 bits, with every constant that it makes" in report.notes


def test_effects_and_random_numbers() -> None:
    def printing(x: Any) -> Any:
        jax.debug.print("{}", x)
        return x * 2

    x = torch.ones(3, requires_grad=True)
    report = explain(differentiable(as_torch(printing)), x)
    assert "it has effects (a print, a callback), which happen once a call" in report.notes
    assert report.gradient == "of the function without its effects, which are run first"
    report = explain(as_jax(torch.nn.functional.dropout), jnp.ones(3))
    assert "it draws from torch's generator: in a compiled program, an effect" in report.notes


# --- what is missing, and what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cross", "x", "note"),
    [
        (as_torch, torch.ones(3), "it is not jittable: torch.compile breaks its graph. Stack @jittable"),
        (as_jax, jnp.ones(3), "it is not jittable: a compiled program raises. Stack @jittable"),
    ],
)
def test_a_level_that_is_not_declared(cross: Any, x: Any, note: str) -> None:
    plain = explain(cross(lambda x: x * 2), x)
    assert note in plain.notes
    assert plain.gradient == "refused. Stack @differentiable"
    full = explain(levels(cross(lambda x: x * 2)), x)
    assert note not in full.notes
    assert "refused" not in full.gradient


class Holder:
    """An object that hides a tensor."""

    def __init__(self) -> None:
        self.content = torch.ones(3)

    def __hash__(self) -> int:
        return 0


two = as_torch(lambda x, y: x)
REFUSED: dict[str, Call] = {
    "sparse": (two, (torch.ones(3), [torch.eye(3).to_sparse()])),
    "a dtype": (two, (torch.ones(3, dtype=torch.complex32), 1)),
    "meta": (two, (torch.ones(3), torch.ones(3, device="meta"))),
    "an integer that does not fit": (two, (torch.ones(3), torch.tensor([2**40]))),
    "a number that does not fit": (two, (torch.ones(3), 2**40)),
    "a gradient": (two, (torch.ones(3), torch.ones(3, requires_grad=True))),
    "a gradient that is refused": (
        differentiable(two, nondiff_argnames="y"),
        (torch.ones(3), torch.ones(3, requires_grad=True)),
    ),
    "a hidden tensor": (two, (torch.ones(3), Holder())),
    "a key": (as_jax(lambda x, y: x), (jnp.ones(3), jax.random.key(0))),
    "a tensor that would lose its gradient": (as_jax(lambda x: x), (torch.ones(3, requires_grad=True),)),
    "an array dtype": (as_jax(lambda x: x), (jnp.ones(3, jnp.int4),)),
    "a 64-bit result": (as_jax(lambda x: x.double()), (jnp.ones(3),)),
    "buffers": (
        as_jax(torch.nn.BatchNorm1d(3)),
        ({"weight": jnp.ones(3), "bias": jnp.ones(3)}, jnp.ones((4, 3))),
    ),
}


@pytest.mark.parametrize(("fn", "args"), rows(REFUSED))
def test_what_is_refused_is_told_in_the_words_of_the_call(fn: Any, args: tuple[Any, ...]) -> None:
    said = explain(fn, *args).refused
    with pytest.raises(interop.InteropError) as raised:
        fn(*args)
    assert said == str(raised.value)


def test_a_leaf_that_is_refused_says_why() -> None:
    row = explain(two, torch.ones(3), torch.eye(3).to_sparse()).leaves[1]
    assert (row.path, row.crosses) == ("y", "refused: a sparse_coo tensor can't cross")


def test_a_wrong_call_is_pythons_own_error() -> None:
    for fn in (explain, lambda f, *args: f(*args)):
        with pytest.raises(TypeError, match=r"^loss\(\) missing 1 required positional argument: 'n'$"):
            fn(as_torch(loss), 1, 2, 3)


@pytest.mark.parametrize("fn", [jnp.sin, differentiable(loss), torch.nn.Linear(1, 1)])
def test_what_is_not_crossed_is_refused(fn: Any) -> None:
    with pytest.raises(interop.OptionError, match=r"it is not crossed: expected a crossing\. Stack @as_torch or"):
        explain(fn, 1)


# --- every form of a crossing -----------------------------------------------------------------------------------------


class Scaled:
    """Methods of every kind."""

    def __init__(self, by: float) -> None:
        self.by = by

    @as_torch
    def in_torch(self, x: Any) -> Any:
        return jnp.concatenate([x, x]) * self.by

    @as_jax
    def in_jax(self, x: Any) -> Any:
        return torch.cat([x, x]) * self.by

    @staticmethod
    @as_torch
    def static(x: Any) -> Any:
        return jnp.concatenate([x, x])

    @classmethod
    @as_jax
    def of_class(cls, x: Any) -> Any:
        return torch.cat([x, x])


class Linear(equinox.Module):
    """A `self` that is an argument."""

    w: jax.Array

    @as_torch
    def __call__(self, x: Any) -> Any:
        return x @ self.w


net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 6))
apply, params = make_functional(net)
by_position, positional = torch_module_to_jax(net)


def scaled(w: Any, state: Any, x: Any, *, key: Any = None) -> Any:
    """A function of parameters, with a state and a key."""
    return jnp.concatenate([x, x]) * w["scale"], {"count": state["count"] + 1}


stateful = WrappedJaxFunction(scaled, {"scale": jnp.ones(())}, state={"count": jnp.zeros((), jnp.int32)}, rngs="key")
in_torch, in_jax = torch.ones(3), jnp.ones(3)

FORMS: dict[str, Call] = {
    "a method in torch": (Scaled(2).in_torch, (in_torch,)),
    "a method in JAX": (Scaled(2).in_jax, (in_jax,)),
    "a method of the class": (Scaled.in_torch, (Scaled(2), in_torch)),
    "a static method": (Scaled.static, (in_torch,)),
    "a class method": (Scaled.of_class, (in_jax,)),
    "a self that is an argument": (Linear(jnp.ones((3, 6))).__call__, (in_torch,)),
    "a partial": (functools.partial(as_torch(lambda y, x: jnp.concatenate([x, y])), in_torch), (in_torch,)),
    "of a partial": (as_jax(functools.partial(lambda y, x: torch.cat([x, x]), 1)), (in_jax,)),
    "a module in JAX": (as_jax(net), (params, in_jax)),
    "make_functional": (apply, (params, in_jax)),
    "torch_module_to_jax": (by_position, (positional, in_jax)),
    "a JAX function of parameters": (
        WrappedJaxFunction(lambda w, x: jnp.concatenate([x, x]) * w, jnp.ones(())),
        (in_torch,),
    ),
    "an equinox model": (WrappedJaxFunction(equinox.nn.Linear(3, 6, key=jax.random.key(0))), (in_torch,)),
    "a function with a state": (stateful, (in_torch,)),
}


@pytest.mark.parametrize(("fn", "args"), rows(FORMS))
def test_every_form_of_a_crossing(fn: Any, args: tuple[Any, ...]) -> None:
    report = explain(fn, *args)
    assert report.refused is None
    assert report.leaves[-1].value in ("f32[3]", "True")
    assert report.outputs[0][:2] == ("result", "f32[6]") == ("result", describe(jax.tree.leaves(_first(fn(*args)))[0]))


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


def test_a_module_calls_its_arrays_by_their_names() -> None:
    report = explain(stateful, in_torch)
    assert [row.path for row in report.leaves] == ["params.scale", "state.count", "rngs['key']", "x"]
    assert [row.path for row in report.outputs] == ["result", "state.count"]
    assert [row.gradient for row in report.leaves[:2]] == ["yes", ""]


@pytest.mark.parametrize("wrapped", [WrappedJaxFunction, WrappedJaxScalarFunction])
def test_a_loss_has_its_gradient_at_once(wrapped: Any) -> None:
    module = wrapped(lambda w, x: (x @ w).sum(), jnp.ones((3, 2)), has_aux=False)
    assert explain(module, in_torch).gradient.startswith("computed with the value, kept for the backward: f32[3,2]")


@pytest.mark.parametrize("has_aux", [False, True])
def test_what_has_no_derivative_beside_a_loss_does_not_matter(has_aux: bool) -> None:
    """New state, and what the function says beside its value."""

    def loss(params: Any, state: Any, x: Any) -> Any:
        out = x @ params
        value = ((out - out.mean(0)) ** 2).mean()
        return (value, out) if has_aux else value, 0.9 * state + 0.1 * out.mean(0)

    module = WrappedJaxFunction(loss, jnp.ones((3, 2)), state=jnp.zeros(2), has_aux=has_aux)
    assert explain(module, in_torch).gradient.startswith("computed with the value, kept for the backward: f32[3,2]")


def test_a_second_number_has_its_own_gradient() -> None:
    both = levels(as_torch(lambda x: ((x**2).sum(), (x**3).sum())))
    assert explain(both, torch.ones(3, requires_grad=True)).gradient.startswith("captured")


def test_a_loss_that_nobody_differentiates_has_its_gradient_no_longer_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_residuals, "_IN_VAIN", 1e6)
    waves = levels(as_torch(lambda x: jnp.tanh(jnp.tanh(x)).sum()))
    x = torch.linspace(-1, 1, 10_000, requires_grad=True)

    def gradient() -> str:
        return explain(waves, x).gradient.partition(",")[0]

    for _ in range(20):
        (at_once,) = torch.autograd.grad(waves(x), x)
    assert gradient() == "computed with the value"
    for _ in range(20):
        waves(x)
    assert gradient() == "captured"
    (captured,) = torch.autograd.grad(waves(x), x)
    (expected,) = torch.autograd.grad(torch.tanh(torch.tanh(x)).sum(), x)
    torch.testing.assert_close([at_once, captured], [expected, expected])


PARTS: dict[str, Any] = {
    "dropout": lambda x: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), 2 * x, 0),
    "noise": lambda x: x * jax.random.normal(jax.random.fold_in(jax.random.key(0), 1), x.shape),
    "pooling": lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (2, 2), (2, 2), "VALID"),
    "split and stack": lambda x: jnp.stack(jnp.split(x, 2)),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_loss_of_what_networks_are_made_of_has_its_gradient_at_once(part: Any) -> None:
    def loss(x: Any) -> Any:
        return jnp.tanh(part(x)).sum()

    crossed, x = levels(as_torch(loss)), torch.linspace(-2, 2, 64).reshape(8, 8).requires_grad_()
    assert explain(crossed, x).gradient.startswith("computed with the value")
    (gradient,) = torch.autograd.grad(crossed(x), x)
    expected = jax.grad(loss)(jnp.asarray(x.detach().numpy()))
    torch.testing.assert_close(gradient, torch.tensor(np.asarray(expected)))


def test_what_is_random_is_not_drawn_again() -> None:
    """However cheap it is."""
    noisy = levels(as_torch(lambda x: x * jax.random.normal(jax.random.key(0), x.shape)))
    assert explain(noisy, torch.ones(3, requires_grad=True)).gradient == (
        "captured, kept for the backward: f32[3] (12 bytes of its own)"
    )


def test_gradients_larger_than_the_residuals_are_not_kept() -> None:
    report = explain(levels(as_torch(lambda w, x: jnp.tanh(x @ w).sum())), torch.ones(512, 1024, requires_grad=True),
                     torch.ones(512))  # fmt: skip
    assert report.gradient.startswith("captured, kept for the backward: f32[1024], x")


def test_a_key_is_a_leaf() -> None:
    report = explain(as_jax(torch.nn.functional.dropout, rng="key"), in_jax, key=jax.random.key(0))
    assert report.leaves[1][:4] == ("key", "u32[2]", "copied", "it seeds torch")
    assert not any("generator" in note for note in report.notes)


# --- it is not run ----------------------------------------------------------------------------------------------------


def test_the_function_never_sees_a_value() -> None:
    seen: list[Any] = []

    def keep(x: Any) -> Any:
        seen.append(x)
        return x * 2

    explain(levels(as_torch(keep)), torch.ones(3, requires_grad=True))
    explain(levels(as_jax(keep)), jnp.ones(3))
    assert len(seen) >= 2
    assert all(isinstance(x, jax.core.Tracer) or torch_private.is_traced(x) for x in seen)


def test_nothing_changes() -> None:
    """No generator moves, no module, and no state of one."""
    norm = torch.nn.BatchNorm1d(3)
    crossed, given = make_functional(norm, mutable=True)
    before = torch.get_rng_state(), {k: v.clone() for k, v in norm.state_dict().items()}
    count = int(stateful.state.count)
    explain(crossed, given, jnp.ones((4, 3)))
    explain(as_jax(torch.nn.functional.dropout), in_jax)
    explain(stateful, in_torch)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(torch.equal(v, before[1][k]) for k, v in norm.state_dict().items())
    assert int(stateful.state.count) == count


# --- what is logged ---------------------------------------------------------------------------------------------------


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[tuple[str, str]]]:
    """What the logger has told since it was last asked: level and message, times left out."""
    caplog.set_level(logging.DEBUG, logger="interop")

    def found() -> list[tuple[str, str]]:
        records = [r for r in caplog.records if r.name == "interop"]
        caplog.clear()
        return [(r.levelname, re.sub(r"\d+\.\d s", "# s", r.getMessage())) for r in records]

    return found


def test_what_is_told_of_a_jax_function(told: Any) -> None:
    """A call that has run before says nothing."""
    f = levels(as_torch(loss))
    w, x, y = torch.zeros(3, requires_grad=True), torch.ones(3, 8).T, torch.ones(8)
    f(w, x, y, 2)
    assert told() == [
        ("DEBUG", "loss: x f32[8,3] is copied: it is not contiguous"),
        ("DEBUG", "loss: traced for (f32[3], f32[8,3], f32[8], i32[])"),
        ("DEBUG", "loss: gradient captured (kept for it: nothing, it is computed with the value)"),
        ("DEBUG", "loss: traced and compiled in # s"),
    ]
    f(w, x, y, 3).backward()
    assert told() == []


def test_what_is_told_of_a_backward(told: Any) -> None:
    def double(x: Any) -> Any:
        return x * jnp.sin(x)

    x = torch.ones(4, requires_grad=True)
    differentiable(as_torch(double))(x).sum().backward()
    assert told() == [
        ("DEBUG", "double: traced for (f32[4])"),
        ("DEBUG", "double: gradient captured (kept for it: x)"),
        ("DEBUG", "double: traced and compiled in # s"),
        ("DEBUG", "double.backward: traced for (f32[4], f32[4])"),
        ("DEBUG", "double.backward: traced and compiled in # s"),
    ]


def test_what_is_told_of_a_torch_function(told: Any) -> None:
    def tanh(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x).sum()

    f = levels(as_jax(tanh))
    f(jnp.ones(3))
    assert told() == []  # eagerly nothing is traced
    step = jax.jit(jax.grad(f))
    step(jnp.ones(3))
    assert told() == [
        ("DEBUG", "tanh: traced for (f32[3])"),
        ("DEBUG", "tanh: gradient captured (kept for it: f32[3]) in # s"),
    ]
    step(jnp.ones(3))
    assert told() == []


def test_listening_changes_no_error(told: Any) -> None:
    for fn, args in REFUSED.values():
        with pytest.raises(interop.InteropError) as raised:
            fn(*args)
        assert str(raised.value) == explain(fn, *args).refused
    assert not any("refused" in message for _, message in told())


def test_falling_back_is_told(told: Any) -> None:
    def first(x: Any, n: int) -> Any:
        return x[:n]

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.sin(x.detach().numpy()))

    as_torch(first)(torch.ones(4), 2)
    assert ("DEBUG", "first: fell back on numbers as constants (IndexError)") in told()
    jax.vmap(as_jax(by_hand))(jnp.ones((2, 3)))
    assert any(m.startswith("by_hand.vmap: fell back on another way (") for _, m in told())


def test_a_long_compilation_is_told_once_and_aloud(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _log.LONG == 2.0
    f = as_torch(loss)
    monkeypatch.setattr(_log, "LONG", 0.0)
    for rows_ in (8, 8, 9):
        f(torch.ones(3), torch.ones(rows_, 3), torch.ones(rows_), 2)
    aloud = [message for level, message in told() if level == "INFO"]
    assert aloud == ["loss: traced and compiled in # s; calls with the same shapes do not do it again"]


def test_a_long_capture_is_told_once_and_aloud(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_log, "LONG", 0.0)
    step = jax.jit(jax.grad(levels(as_jax(lambda x: torch.sin(x).sum()))))
    for size in (3, 3, 4):
        step(jnp.ones(size))
    aloud = [message for level, message in told() if level == "INFO"]
    assert aloud == [
        "<lambda>: gradient captured (kept for it: x) in # s; calls with the same shapes do not do it again"
    ]


def test_a_failed_trace_is_not_timed(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def picky(x: Any) -> Any:
        if x.ndim == 2:
            raise ValueError("no matrix")
        return x * 2

    f = as_torch(picky)
    f(torch.ones(3))
    monkeypatch.setattr(_log, "LONG", 0.0)
    with pytest.raises(ValueError, match="no matrix"):
        f(torch.ones(3, 3))
    told()
    f(torch.ones(3))
    assert told() == []


def test_nothing_is_put_into_words_for_nobody() -> None:
    class Word:
        def __str__(self) -> str:
            raise AssertionError

    _log.tell("f", "%s", Word())


ORDINARY = """
import torch, jax, jax.numpy as jnp
from interop import *
f = jittable(differentiable(as_torch(lambda x, n: jnp.sin(x)[:n])))
f(torch.ones(4, 4, requires_grad=True).T, 2).sum().backward()
g = jittable(differentiable(as_jax(lambda x: torch.sin(x).sum())))
jax.vmap(g)(jnp.ones((2, 3))), jax.jit(jax.grad(g))(jnp.ones(3))
"""


def test_ordinary_use_says_nothing() -> None:
    done = _python("-c", ORDINARY)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- python -m interop ------------------------------------------------------------------------------------------------


def _python(*arguments: str, path: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}", "JAX_PLATFORMS": "cpu"} | environment,
        check=False,
    )


def _report(**environment: str) -> dict[str, tuple[str, str]]:
    """What is found, and what to do about it, by name."""
    done = _python("-m", "interop", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [re.split(r" {2,}", line) for line in done.stdout.splitlines()]
    return {name: (found, advice) for name, found, advice in lines}


def test_what_there_is_on_this_machine() -> None:
    report = _report()
    assert list(report) == [
        *("python", "torch", "jax", "jaxlib", "numpy", "wrapt", "interop", "fast paths, torch", "fast paths, jax"),
        *("devices, torch", "devices, jax", "CUDA", "x64", "preallocation", "start method"),
    ]
    assert torch.__version__.startswith(report["torch"][0])  # some wheels are for a device, and don't say it
    assert report["jax"] == (jax.__version__, "nothing to do: >=0.10.0,<0.13 is supported")
    assert report["interop"] == (interop.__version__, "nothing to do")
    assert report["fast paths, torch"] == ("11 of 11 active", "nothing to do")
    assert report["fast paths, jax"] == ("10 of 10 active", "nothing to do")
    assert report["devices, jax"] == ("cpu:0", "nothing to do")
    assert report["x64"][0] == "off"


def test_settings_are_read() -> None:
    report = _report(INTEROP_PUBLIC_ONLY="1", JAX_ENABLE_X64="1", XLA_PYTHON_CLIENT_PREALLOCATE="false")
    assert report["fast paths, torch"][0] == "0 of 11 active"
    assert report["fast paths, jax"][0] == "0 of 10 active"
    assert report["fast paths, jax"][1].startswith("unset INTEROP_PUBLIC_ONLY (without: arrays from capsules, ")
    assert report["x64"] == ("on", "nothing to do")
    assert report["preallocation"] == ("false", "nothing to do")


@pytest.mark.parametrize(
    ("version", "wanted", "within"),
    [
        ("2.13.0+cpu", ">=2.13,<3", True),
        ("2.12.1", ">=2.13,<3", False),
        ("3.0.0", ">=2.13,<3", False),
        ("0.10.2", ">=0.10.2,<0.11", True),
        ("0.9.9", ">=0.10.2,<0.11", False),
        ("0.11.0.dev1", ">=0.10.2,<0.11", False),
    ],
)
def test_a_version_is_within_a_range_or_not(version: str, wanted: str, within: bool) -> None:
    line = __main__._version("torch", version, wanted)
    assert line.advice == (
        f"nothing to do: {wanted} is supported"
        if within
        else f"not supported, {wanted} is: pip install 'torch{wanted}'"
    )


def test_a_package_that_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(__main__, "PACKAGES", ("no-such-package",))
    assert __main__.versions()[1] == ("no-such-package", "missing", "pip install 'no-such-package'")


@pytest.mark.parametrize(
    ("of_torch", "plugin", "advice"),
    [
        ("12.8", "12", "nothing to do"),
        ("13.0", "12", "they disagree, and load two sets of libraries: pip install 'jax[cuda13]'"),
        (None, "12", "nothing to do"),
    ],
)
def test_two_builds_for_cuda(of_torch: Any, plugin: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", of_torch)
    monkeypatch.setattr(__main__, "_installed", lambda name: "1" if name == f"jax-cuda{plugin}-plugin" else None)
    assert __main__.cuda() == [("CUDA", f"torch {of_torch or 'without'}, jax {plugin}", advice)]
