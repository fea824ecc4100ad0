"""A JAX model as a torch module: parameters by name, state, random numbers, and all that torch does with a module.

Values and gradients are those of JAX alone, and training is that of optax, step by step. The models are functions of
`(params, *args)`, flax's (linen and nnx) and equinox's.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen, nnx
from torch import nn
from torch.func import functional_call, stack_module_state
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, parametrizations, parametrize, vector_to_parameters
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import interop
from hosts import DEVICE
from interop import WrappedJaxFunction, WrappedJaxScalarFunction, jax_to_torch
from tables import rows
from together import TESTS, each, one_of_two, two_ranks

Fn = Callable[..., Any]

# torch's own, at its first use of a compiler that generates code
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")


def array(*shape: int, seed: int = 0) -> jax.Array:
    """Numbers like those of a weight."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tensor(a: Any) -> torch.Tensor:
    """Of its own memory."""
    return torch.from_numpy(np.array(a))


def numpy_of(x: Any) -> np.ndarray[Any, Any]:
    """A tensor or an array, typed keys as their data."""
    if isinstance(x, torch.Tensor):
        return x.detach().resolve_conj().numpy()
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def close(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """The same structure, shapes, dtypes and numbers, whichever framework holds them."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(map(numpy_of, jax.tree.leaves(got)), map(numpy_of, jax.tree.leaves(expected)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def named(tree: Any, root: str = "params") -> dict[str, Any]:
    """The leaves of a pytree by the names that they have in a module."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join([root, *map(part, path)]) if path else f"{root}.0": leaf for path, leaf in pairs}


def part(key: Any) -> str:
    return str(next(getattr(key, a) for a in ("key", "idx", "name") if hasattr(key, a)))


def parameters_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters())


def gradients_of(module: nn.Module) -> dict[str, Any]:
    return {name: p.grad for name, p in module.named_parameters()}


def total_in_torch(tree: Any) -> torch.Tensor:
    """A number that every element of every float result has a different share in."""
    leaves = [x for x in jax.tree.leaves(tree) if x.is_floating_point() or x.is_complex()]
    return sum(
        (x * torch.cos(torch.arange(1.0, x.numel() + 1)).reshape(x.shape).to(x.dtype)).sum().real for x in leaves
    )


def total_in_jax(tree: Any) -> jax.Array:
    """The same in JAX."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return sum((x * jnp.cos(jnp.arange(1.0, x.size + 1)).reshape(x.shape)).sum().real for x in leaves)


def is_float(a: Any) -> bool:
    return jnp.issubdtype(a.dtype, jnp.inexact)


# --- values and gradients ---------------------------------------------------------------------------------------------


def tanh_affine(params: Any, x: Any) -> Any:
    """One layer."""
    return jnp.tanh(x @ params["w"] + params["b"])


AFFINE = {"w": array(3, 4), "b": array(4, seed=1)}
x3 = array(5, 3, seed=2)


class Pair(NamedTuple):
    first: Any
    second: Any


@flax.struct.dataclass
class Struct:
    w: Any
    b: Any


def several(params: Any, x: Any) -> Any:
    return x @ params["w"], (x**2).sum(), params["b"] * 2


def branching(params: Any, x: Any) -> Any:
    h = x @ params["w"]
    return {"out": [h, jnp.tanh(h)], "best": h.argmax(-1), "pair": Pair(h.sum(), None), "positive": h > 0}


def of_keywords(params: Any, x: Any, *, scale: Any, shift: float = 0.5) -> Any:
    return tanh_affine(params, x) * scale + shift


def of_pytrees(params: Any, batch: Any, *more: Any) -> Any:
    return tanh_affine(params, batch["x"][0]) * batch["y"].first + more[0] + batch["ids"][:, None]


def waves(params: Any, x: Any) -> Any:
    return (jnp.exp(1j * x) @ params["w"]) ** 2, jnp.abs(params["w"]).sum()


FUNCTIONS: dict[str, tuple[Fn, Any, tuple[Any, ...], dict[str, Any]]] = {
    "one result": (tanh_affine, AFFINE, (x3,), {}),
    "several": (several, AFFINE, (x3,), {}),
    "a pytree, with integers": (branching, AFFINE, (x3,), {}),
    "keywords": (of_keywords, AFFINE, (x3,), {"scale": array(4, seed=3)}),
    "pytrees as arguments": (
        of_pytrees,
        AFFINE,
        ({"x": [x3], "y": Pair(array(4, seed=3), None), "ids": jnp.arange(5)}, array(4, seed=4)),
        {},
    ),
    "a bare array": (lambda w, x: jnp.sin(x @ w), array(3, 2), (x3,), {}),
    "a list": (lambda params, x: x @ params[0] + params[1], [array(3, 2), array(2, seed=1)], (x3,), {}),
    "complex parameters": (waves, {"w": array(3, 2) + 1j * array(3, 2, seed=1)}, (x3,), {}),
    "no parameters": (lambda params, x: jnp.sin(x), {}, (x3,), {}),
    "no arguments": (lambda params: jnp.sin(params["w"]), AFFINE, (), {}),
    "a compiled function": (jax.jit(tanh_affine), AFFINE, (x3,), {}),
    "a partial": (functools.partial(of_keywords, scale=2.0), AFFINE, (x3,), {}),
}


@pytest.mark.parametrize(("fn", "params", "args", "kwargs"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_value_and_gradients_are_those_of_jax(fn: Fn, params: Any, args: Any, kwargs: Any) -> None:
    """Of every result, in every parameter and argument."""
    given = jax.tree.map(lambda a: tensor(a).requires_grad_(is_float(a)), (args, kwargs))
    module = WrappedJaxFunction(fn, params)
    out = module(*given[0], **given[1])
    close(out, fn(params, *args, **kwargs))
    total_in_torch(out).backward()
    of_params, of_args = jax.grad(lambda p, given: total_in_jax(fn(p, *given[0], **given[1])), (0, 1), allow_int=True)(
        params, (args, kwargs)
    )
    expected = {name: g.conj() for name, g in named(of_params).items()}
    used = {name: g for name, g in gradients_of(module).items() if g is not None}
    close(used, {name: g for name, g in expected.items() if name in used})
    assert all((expected[name] == 0).all() for name in expected if name not in used)
    for t, g in zip(jax.tree.leaves(given), jax.tree.leaves(of_args), strict=True):
        close(t.grad, g) if t.requires_grad else None


def test_results_keep_their_containers() -> None:
    out = WrappedJaxFunction(branching, AFFINE)(tensor(x3))
    assert list(out) == ["out", "best", "pair", "positive"]
    assert (type(out["out"]), type(out["pair"])) == (list, Pair)
    assert out["pair"].second is None
    assert (out["best"].requires_grad, out["positive"].dtype) == (False, torch.bool)


def test_every_result_carries_its_gradient() -> None:
    """Each alone, as well as together."""
    module = WrappedJaxFunction(several, AFFINE)
    for i in (0, 2):
        module.zero_grad()
        total_in_torch(module(tensor(x3))[i]).backward()
        expected = jax.grad(lambda p: total_in_jax(several(p, x3)[i]))(AFFINE)
        name = ("params.w", None, "params.b")[i]
        close(parameters_of(module)[name].grad, named(expected)[name])


def test_only_some_parameters_require_grad() -> None:
    module = WrappedJaxFunction(tanh_affine, AFFINE)
    parameters_of(module)["params.b"].requires_grad_(False)
    module(tensor(x3)).sum().backward()
    grads = gradients_of(module)
    assert grads["params.b"] is None
    close(grads["params.w"], jax.grad(lambda p: tanh_affine(p, x3).sum())(AFFINE)["w"])


def test_none_requires_grad() -> None:
    module = WrappedJaxFunction(tanh_affine, AFFINE).requires_grad_(False)
    assert not module(tensor(x3)).requires_grad
    x = tensor(x3).requires_grad_()
    module(x).sum().backward()
    close(x.grad, jax.grad(lambda x: tanh_affine(AFFINE, x).sum())(x3))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_gradient(mode: Fn) -> None:
    for kind in (WrappedJaxFunction, WrappedJaxScalarFunction):
        with mode():
            out = kind(loss_of, AFFINE)(tensor(x3))
        assert not any(t.requires_grad for t in jax.tree.leaves(out))
        close(out, loss_of(AFFINE, x3))


def test_an_error_of_the_function_is_the_users() -> None:
    def fails(params: Any, x: Any) -> Any:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="^mine"):
        WrappedJaxFunction(fails, AFFINE)(tensor(x3))


def test_a_wrong_call_is_refused_in_pythons_words() -> None:
    module = WrappedJaxFunction(tanh_affine, AFFINE)
    with pytest.raises(TypeError, match=r"tanh_affine\(\) missing 1 required positional argument: 'x'"):
        module()
    with pytest.raises(TypeError, match=r"tanh_affine\(\) .*'y'"):
        module(tensor(x3), y=1)


REFUSED: dict[str, tuple[Fn, type[Exception], str]] = {
    "no parameters": (lambda: WrappedJaxFunction(tanh_affine), TypeError, "params"),
    "no variables": (lambda: WrappedJaxFunction(Net()), TypeError, "variables"),
    "nothing to call": (lambda: WrappedJaxFunction(AFFINE, AFFINE), TypeError, "call"),
    "a tensor": (lambda: WrappedJaxFunction(tanh_affine, {"w": tensor(w), "b": b}), interop.LeafError, r"params\.w"),
    "state of its own": (
        lambda: WrappedJaxFunction(Net(), variables_of_net(), state=STATISTICS),
        interop.OptionError,
        "state",
    ),
    "parameters of its own": (
        lambda: WrappedJaxFunction(NnxNet(nnx.Rngs(0)), AFFINE),
        interop.OptionError,
        "params",
    ),
    "64 bits back to 32": (
        lambda: WrappedJaxFunction(tanh_affine, AFFINE).double().to_jax(),
        interop.PrecisionError,
        r"params\.[wb].*f64.*float\(\)",
    ),
}


@pytest.mark.parametrize(("make", "kind", "text"), REFUSED.values(), ids=REFUSED)
def test_what_can_be_no_module_is_refused(make: Fn, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        make()


# --- aux --------------------------------------------------------------------------------------------------------------


def with_aux(params: Any, x: Any) -> Any:
    h = x @ params["w"]
    return jnp.tanh(h + params["b"]), {"hidden": h, "best": h.argmax(-1), "nothing": None}


def loss_of(params: Any, x: Any) -> Any:
    """A scalar, and what else there is to know."""
    out, aux = with_aux(params, x)
    return (out**2).mean(), aux


def test_the_aux_of_a_function_is_plain_values() -> None:
    module = WrappedJaxFunction(with_aux, AFFINE, has_aux=True)
    out, aux = module(tensor(x3))
    close((out, aux), with_aux(AFFINE, x3))
    assert out.requires_grad
    assert not any(t.requires_grad for t in jax.tree.leaves(aux))
    out.sum().backward()
    close(gradients_of(module), named(jax.grad(lambda p: with_aux(p, x3)[0].sum())(AFFINE)))


def test_without_has_aux_a_pair_is_two_results() -> None:
    module = WrappedJaxFunction(with_aux, AFFINE)
    out, aux = module(tensor(x3))
    (out.sum() + (aux["hidden"] ** 2).sum()).backward()
    expected = jax.grad(lambda p: with_aux(p, x3)[0].sum() + (with_aux(p, x3)[1]["hidden"] ** 2).sum())(AFFINE)
    close(gradients_of(module), named(expected))


def test_a_scalar_function() -> None:
    """The value, its gradient, and the aux beside it."""
    module = WrappedJaxScalarFunction(loss_of, AFFINE)
    x = tensor(x3).requires_grad_()
    value, aux = module(x)
    close((value, aux), loss_of(AFFINE, x3))
    value.backward()
    of_params, of_x = jax.grad(lambda p, x: loss_of(p, x)[0], (0, 1))(AFFINE, x3)
    close(gradients_of(module), named(of_params))
    close(x.grad, of_x)


@pytest.mark.parametrize("scale", [3.0, -0.5, 0.0])
def test_the_gradient_of_a_scaled_loss_is_scaled(scale: float) -> None:
    module = WrappedJaxScalarFunction(loss_of, AFFINE)
    (scale * module(tensor(x3))[0]).backward()
    close(gradients_of(module), named(jax.grad(lambda p: scale * loss_of(p, x3)[0])(AFFINE)))


def test_a_scalar_loss_inside_a_larger_one() -> None:
    """The upstream gradient is a value of torch, with a graph of its own."""
    module = WrappedJaxScalarFunction(loss_of, AFFINE)
    factor = torch.tensor(2.0, requires_grad=True)
    (torch.exp(module(tensor(x3))[0] * factor)).backward()
    grads, of_factor = jax.grad(lambda p, k: jnp.exp(loss_of(p, x3)[0] * k), (0, 1))(AFFINE, 2.0)
    close(gradients_of(module), named(grads))
    close(factor.grad, of_factor)


def test_the_aux_of_a_scalar_function_carries_its_gradient() -> None:
    """Alone, and together with the value."""
    module = WrappedJaxScalarFunction(loss_of, AFFINE)
    for k in (0.0, 2.0):
        module.zero_grad()
        value, aux = module(tensor(x3))
        assert not aux["best"].requires_grad
        (k * value + (aux["hidden"] ** 2).sum()).backward()
        expected = jax.grad(lambda p: k * loss_of(p, x3)[0] + (loss_of(p, x3)[1]["hidden"] ** 2).sum())(AFFINE)
        expected = {name: g for name, g in named(expected).items() if k or name == "params.w"}
        close({name: g for name, g in gradients_of(module).items() if name in expected}, expected)


def test_a_scalar_function_without_aux() -> None:
    module = WrappedJaxScalarFunction(lambda p, x: loss_of(p, x)[0], AFFINE, has_aux=False)
    value = module(tensor(x3))
    close(value, loss_of(AFFINE, x3)[0])
    value.backward()
    close(gradients_of(module), named(jax.grad(lambda p: loss_of(p, x3)[0])(AFFINE)))


def vector(params: Any, x: Any) -> Any:
    return (x @ params["w"]).sum(0)


NO_SCALARS: dict[str, tuple[Fn, bool, str]] = {
    "vector": (vector, False, r"f32\[4\]"),
    "vector beside aux": (lambda p, x: (vector(p, x), None), True, r"f32\[4\]"),
    "one element": (lambda p, x: vector(p, x)[:1], False, r"f32\[1\]"),
    "two scalars": (lambda p, x: (vector(p, x).sum(), x.sum()), False, "tuple"),
    "dict": (lambda p, x: {"loss": vector(p, x).sum()}, False, "dict"),
    "nothing": (lambda p, x: None, False, "None"),
}


@pytest.mark.parametrize(("fn", "has_aux", "got"), rows(NO_SCALARS))
def test_a_value_that_is_no_scalar_is_refused(fn: Fn, has_aux: bool, got: str) -> None:
    """With what it is instead; the next call of another shape is not concerned."""
    with pytest.raises(interop.InteropError, match=f"scalar.*{got}|{got}.*scalar"):
        WrappedJaxScalarFunction(fn, AFFINE, has_aux=has_aux)(tensor(x3))


@pytest.mark.parametrize("kind", [WrappedJaxFunction, WrappedJaxScalarFunction])
@pytest.mark.parametrize("out", [lambda x: x.sum(), lambda x: (x.sum(), x, x)], ids=["one", "three"])
def test_has_aux_of_a_function_that_returns_no_pair_is_refused(kind: Fn, out: Fn) -> None:
    with pytest.raises(interop.OutputMismatchError, match=r"\(out, aux\)"):
        kind(lambda params, x: out(x @ params["w"]), AFFINE, has_aux=True)(tensor(x3))


def test_the_value_and_gradient_of_a_scalar_function_are_one_call() -> None:
    """The program runs once in each step."""
    runs = []

    def loss(params: Any, x: Any) -> Any:
        jax.debug.callback(lambda: runs.append(1))
        return loss_of(params, x)

    module = WrappedJaxScalarFunction(loss, AFFINE)
    for k in range(3):
        module(tensor(x3) + k)[0].backward()
        jax.effects_barrier()
        assert len(runs) == k + 1


@pytest.mark.parametrize("kind", [WrappedJaxFunction, WrappedJaxScalarFunction])
def test_training_traces_once(kind: Fn) -> None:
    """Value and gradient together, for each shape; whatever the optimizer makes of the parameters."""
    traces = []

    def loss(params: Any, x: Any) -> Any:
        traces.append(1)
        return loss_of(params, x)[0]

    module = kind(loss, AFFINE, has_aux=False)
    optimizer = torch.optim.Adam(module.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        module(tensor(x3)).backward()
        optimizer.step()
    assert len(traces) == 1
    module(tensor(x3[:2])).backward()
    assert len(traces) == 2


@pytest.mark.parametrize("kind", [WrappedJaxFunction, WrappedJaxScalarFunction])
def test_second_derivatives(kind: Fn) -> None:
    """A gradient penalty, by `backward` of a gradient."""
    module = kind(loss_of, AFFINE)
    x = tensor(x3).requires_grad_()
    (slope,) = torch.autograd.grad(module(x)[0], x, create_graph=True)
    (slope**2).sum().backward()

    def penalty(params: Any) -> Any:
        return (jax.grad(lambda x: loss_of(params, x)[0])(x3) ** 2).sum()

    close(gradients_of(module), named(jax.grad(penalty)(AFFINE)))


# --- the caller's arrays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [jnp.asarray, np.array], ids=["jax", "numpy"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_a_step_of_an_optimizer_leaves_the_callers_arrays_alone(optimizer: Fn, make: Fn) -> None:
    params = jax.tree.map(lambda a: make(np.array(a)), AFFINE)
    module = WrappedJaxFunction(tanh_affine, params)
    steps = optimizer(module.parameters(), lr=0.1)
    module(tensor(x3)).sum().backward()
    steps.step()
    assert all((a != tensor(b)).any() for a, b in zip(module.parameters(), named(params).values(), strict=True))
    jax.tree.map(np.testing.assert_array_equal, params, AFFINE)


def address(x: Any) -> int:
    return x.data_ptr() if isinstance(x, torch.Tensor) else np.asarray(x).__array_interface__["data"][0]


def test_parameters_share_memory_only_if_asked() -> None:
    for clone in (True, False):
        module = WrappedJaxFunction(tanh_affine, jax.tree.map(jnp.copy, AFFINE), clone_params=clone)
        close(module(tensor(x3)), tanh_affine(AFFINE, x3))
    params = jax.tree.map(jnp.copy, AFFINE)
    for kind in (WrappedJaxFunction, WrappedJaxScalarFunction):
        copied, shared = (parameters_of(kind(loss_of, params, clone_params=clone)) for clone in (True, False))
        for name, a in named(params).items():
            assert address(shared[name]) == address(a)
            assert address(copied[name]) != address(a)


def test_the_same_array_twice_is_two_parameters() -> None:
    """As it is two leaves for JAX: each has its own gradient and goes its own way, whoever shares memory."""
    w = array(3, 3)
    params = {"a": w, "b": w}

    def fn(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["a"]) @ params["b"]

    for clone in (True, False):
        module = WrappedJaxFunction(fn, jax.tree.map(jnp.copy, params) if clone else params, clone_params=clone)
        assert sorted(parameters_of(module)) == ["params.a", "params.b"]
        module(tensor(x3)).sum().backward()
        grads = jax.grad(lambda p: fn(p, x3).sum())(params)
        close(gradients_of(module), named(grads))
        expected = named({k: np.asarray(w) - 0.1 * np.asarray(g) for k, g in grads.items()})
        torch.optim.SGD(module.parameters(), lr=0.1).step()
        close({name: p.detach() for name, p in parameters_of(module).items()}, expected)


def test_to_jax_gives_copies() -> None:
    """What a later step makes of the parameters does not show in them."""
    module = WrappedJaxFunction(tanh_affine, AFFINE)
    before = module.to_jax()
    assert all(isinstance(a, jax.Array) for a in jax.tree.leaves(before))
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    close(before, AFFINE)
    close(module.to_jax(), jax.tree.map(lambda a: a + 1, AFFINE))


# --- names ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Plain:
    """Registered nowhere."""

    w: Any
    b: Any


w, b = AFFINE["w"], AFFINE["b"]
slope = jax.grad(lambda w: jnp.tanh(x3 @ w).sum())(w)
# a pytree, where its weight is, and its names, that of the weight first
NAMES: dict[str, tuple[Any, Fn, list[str]]] = {
    "array": (w, lambda p: p, ["params.0"]),
    "list": ([w, b], lambda p: p[0], ["params.0", "params.1"]),
    "tuple": ((w, b), lambda p: p[0], ["params.0", "params.1"]),
    "dict": ({"w": w, "b": b}, lambda p: p["w"], ["params.w", "params.b"]),
    "variables of flax": (
        {"params": {"Dense_0": {"kernel": w, "bias": b}}},
        lambda p: p["params"]["Dense_0"]["kernel"],
        ["params.params.Dense_0.kernel", "params.params.Dense_0.bias"],
    ),
    "NamedTuple": (Pair(w, b), lambda p: p.first, ["params.first", "params.second"]),
    "dataclass": (Plain(w, b), lambda p: p.w, ["params.w", "params.b"]),
    "flax struct": (Struct(w, b), lambda p: p.w, ["params.w", "params.b"]),
    "equinox": (
        eqx.tree_at(lambda m: (m.weight, m.bias), eqx.nn.Linear(3, 4, key=jax.random.key(0)), (w, b)),
        lambda p: p.weight,
        ["params.weight", "params.bias"],
    ),
    "nested": (
        {"layers": [Pair(w, {"b": b}), (b,)]},
        lambda p: p["layers"][0].first,
        ["params.layers.0.first", "params.layers.0.second.b", "params.layers.1.0"],
    ),
    "integer keys": ({1: w, 0: b}, lambda p: p[1], ["params.1", "params.0"]),
}
ODD = [
    "training",
    "forward",
    "weight",
    "if",
    "mlp/~/linear_0",
    "3",
    "params",
    "state",
    "state_dict",
    "keys",
    "type",
    "a b",
]
ODD += [
    "read",
    "write",
    "to_jax",
    "label",
    "T_destination",
    "_parameters",
    "_modules",
    "requires_grad_",
    "é",
    "__init__",
    "0",
]


def spelled(key: str) -> str:
    """A name that every module has of its own gets an underscore."""
    return f"{key}_" if hasattr(nn.Module(), key) else key


NAMES |= {
    f"key {odd!r}": (
        {odd: w, "below": {odd: {"b": b}}},
        lambda p, odd=odd: p[odd] + 0 * p["below"][odd]["b"],
        [f"params.{spelled(odd)}", f"params.below.{spelled(odd)}.b"],
    )
    for odd in ODD
}


@pytest.mark.parametrize(("params", "pick", "names"), NAMES.values(), ids=NAMES)
def test_a_parameter_is_named_by_its_path(params: Any, pick: Fn, names: list[str]) -> None:
    """It is saved and loaded under that name, and has the gradient of its leaf."""
    module = WrappedJaxFunction(lambda params, x: jnp.tanh(x @ pick(params)), params)
    assert sorted(parameters_of(module)) == sorted(names) == sorted(module.state_dict())
    assert all(type(p) is nn.Parameter for p in module.parameters())
    out = module(tensor(x3))
    close(out, jnp.tanh(x3 @ w))
    out.sum().backward()
    close(parameters_of(module)[names[0]].grad, slope)
    other = WrappedJaxFunction(lambda params, x: jnp.tanh(x @ pick(params)), params)
    with torch.no_grad():
        for p in other.parameters():
            p.fill_(7)
    other.load_state_dict(module.state_dict())
    assert type(other.to_jax()) is type(params)
    close(pick(other.to_jax()), w)


@pytest.mark.parametrize(("params", "pick", "names"), rows(NAMES))
def test_a_parameter_is_replaced_by_its_name(params: Any, pick: Fn, names: list[str]) -> None:
    """By those that find a module of torch by attribute, part by part."""
    module = WrappedJaxFunction(lambda params, x: jnp.tanh(x @ pick(params)), params)
    assert all(module.get_parameter(name) is p for name, p in module.named_parameters())
    replaced = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    assert (functional_call(module, replaced, (tensor(x3),)) == 0).all()


AWKWARD: dict[str, Fn] = {
    "a dot": lambda w, b: {"a.b": w, "c": b},
    "a dot that reads like a path": lambda w, b: {"a.b": w, "a": {"b": b}},
    "dots alone": lambda w, b: {".": w, "..": b},
    "nothing": lambda w, b: {"": w, "a": b},
    "nothing below nothing": lambda w, b: {"": {"": w}, "a": b},
    "a number and a bool": lambda w, b: {3: w, True: b},
    "tuples": lambda w, b: {(0, "w"): w, (1, "w"): b},
}


@pytest.mark.parametrize("make", AWKWARD.values(), ids=AWKWARD)
def test_keys_that_are_no_names_still_have_one_each(make: Fn) -> None:
    """Torch has dots between names, and no empty ones: whatever the spelling, each leaf is saved, found and replaced."""

    def fn(params: Any, x: Any) -> Any:
        k, c = (next(iter(p.values())) if isinstance(p, dict) else p for p in params.values())
        return x @ k + c

    module, other = WrappedJaxFunction(fn, make(w, b)), WrappedJaxFunction(fn, make(w * 0, b * 0))
    assert len(parameters_of(module)) == len(module.state_dict()) == 2
    assert all(module.get_parameter(name) is p for name, p in module.named_parameters())
    out = module(tensor(x3))
    close(out, x3 @ w + b)
    out.sum().backward()
    assert sorted(tuple(p.grad.shape) for p in module.parameters()) == [(3, 4), (4,)]
    replaced = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    assert (functional_call(module, replaced, (tensor(x3),)) == 0).all()
    assert (other(tensor(x3)) == 0).all()
    other.load_state_dict(module.state_dict())
    close(other(tensor(x3)), out)


ALIKE: dict[str, tuple[Any, str]] = {
    "a number and its spelling": ({3: w, "3": b}, r"params\.3"),
    "true and its spelling": ({"in": [{True: w, "True": b}]}, r"params\.in\.0\.True"),
    "below a number and its spelling": ({3: {"a": w}, "3": {"a": b}}, r"params\.3\.a"),
}


@pytest.mark.parametrize(("params", "name"), rows(ALIKE))
def test_leaves_of_one_name_are_refused_by_it(params: Any, name: str) -> None:
    with pytest.raises(interop.OptionError, match=name):
        WrappedJaxFunction(tanh_affine, params)


def test_what_a_module_looks_like() -> None:
    """The function, and the tree of its parameters with their shapes."""
    params = {"params": {"Dense_0": {"kernel": w, "bias": b}}, "steps": jnp.arange(3), "name": "x"}
    text = repr(nn.Sequential(WrappedJaxFunction(tanh_affine, params)))
    for word in ("WrappedJaxFunction", "tanh_affine", "Dense_0", "kernel", "f32[3,4]", "bias", "f32[4]", "i32[3]"):
        assert word in text
    text = repr(WrappedJaxScalarFunction(loss_of, AFFINE))
    for word in ("WrappedJaxScalarFunction", "loss_of", "w", "f32[3,4]"):
        assert word in text


# --- a checkpoint -----------------------------------------------------------------------------------------------------

NESTED = {
    "b": [array(3, 4), array(4, seed=1)],
    "a": {"z": array(4, seed=2), "y": (array(2, 2, seed=3), array(4, seed=4))},
}


def nested(params: Any, x: Any) -> Any:
    h = x @ params["b"][0] + params["b"][1]
    return h * params["a"]["z"] + params["a"]["y"][0].sum() * params["a"]["y"][1]


def filled() -> WrappedJaxFunction:
    """Of which nothing is as it should be yet."""
    return WrappedJaxFunction(nested, jax.tree.map(jnp.zeros_like, NESTED))


def test_a_checkpoint_of_the_module_itself() -> None:
    module, other = WrappedJaxFunction(nested, NESTED), filled()
    assert str(other.load_state_dict(module.state_dict(), strict=True)) == "<All keys matched successfully>"
    close(other(tensor(x3)), nested(NESTED, x3))
    close(other.to_jax(), NESTED)


@pytest.mark.parametrize(
    "make", [lambda module: module, lambda module: nn.Sequential(nn.ReLU(), module)], ids=["alone", "in a part"]
)
def test_a_checkpoint_with_positions_for_names(make: Callable[[nn.Module], nn.Module]) -> None:
    """As torch-jax-interop writes it: the leaves in JAX's order, which is that of sorted keys."""
    prefix = "1." if isinstance(make(filled()), nn.Sequential) else ""
    old = {f"{prefix}params.{i}": tensor(leaf) for i, leaf in enumerate(jax.tree.leaves(NESTED))}
    other = make(filled())
    given = dict(old)
    other.load_state_dict(given, strict=True)
    assert given.keys() == old.keys()
    close((other[1] if prefix else other).to_jax(), NESTED)


def test_names_come_before_positions() -> None:
    """Where a checkpoint of names could be read as one of positions."""
    params = {2: w, 1: b, 0: w * 2}
    module = WrappedJaxFunction(lambda p, x: x @ p[2] + p[1], params)
    other = WrappedJaxFunction(lambda p, x: x @ p[2] + p[1], jax.tree.map(jnp.zeros_like, params))
    other.load_state_dict(module.state_dict())
    close(other.to_jax(), params)


def test_what_does_not_fit_is_told_all_at_once() -> None:
    module = filled()
    wrong = dict(WrappedJaxFunction(nested, NESTED).state_dict())
    del wrong["params.b.0"], wrong["params.a.z"]
    wrong |= {"params.c": torch.ones(2), "other": torch.ones(2), "params.a.y.0": torch.ones(3)}
    with pytest.raises(RuntimeError) as caught:
        module.load_state_dict(wrong)
    text = str(caught.value)
    assert re.search(
        r'Missing key\(s\).*"params\.a\.z", "params\.b\.0"|Missing key\(s\).*"params\.b\.0", "params\.a\.z"', text
    )
    assert re.search(r'Unexpected key\(s\).*"params\.c", "other"|Unexpected key\(s\).*"other", "params\.c"', text)
    assert re.search(r"size mismatch for params\.a\.y\.0: .*\[3\].*\[2, 2\]", text)


def test_what_does_not_fit_by_position_is_told_all_at_once() -> None:
    """One too many, or of another shape: never the next best leaf."""
    leaves = list(map(tensor, jax.tree.leaves(NESTED)))
    more = {f"params.{i}": leaf for i, leaf in enumerate([*leaves, torch.ones(1)])}
    with pytest.raises(RuntimeError, match=r"params\.5"):
        filled().load_state_dict(more)
    fewer = {f"params.{i}": leaf for i, leaf in enumerate(leaves[:-1])}
    with pytest.raises(RuntimeError, match=r"Missing key"):
        filled().load_state_dict(fewer)
    turned = {f"params.{i}": leaf for i, leaf in enumerate(leaves[::-1])}
    with pytest.raises(RuntimeError, match=r"size mismatch"):
        filled().load_state_dict(turned)


def test_a_checkpoint_of_a_part_is_loaded_without_strictness() -> None:
    module = filled()
    part_of = {"params.b.0": tensor(NESTED["b"][0]), "unknown": torch.ones(1)}
    missing, unexpected = module.load_state_dict(part_of, strict=False)
    assert sorted(missing) == ["params.a.y.0", "params.a.y.1", "params.a.z", "params.b.1"]
    assert unexpected == ["unknown"]
    close(module.to_jax()["b"][0], NESTED["b"][0])


def test_a_checkpoint_is_assigned() -> None:
    """Without a copy, as torch has it."""
    module, state = filled(), {name: tensor(leaf) for name, leaf in named(NESTED).items()}
    module.load_state_dict(state, assign=True)
    assert all(address(p) == address(state[name]) for name, p in module.named_parameters())
    close(module(tensor(x3)), nested(NESTED, x3))


def test_a_checkpoint_on_disk(tmp_path: Path) -> None:
    """Nothing but tensors is in it."""
    torch.save(WrappedJaxFunction(nested, NESTED).state_dict(), tmp_path / "state.pt")
    module = filled()
    module.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    close(module(tensor(x3)), nested(NESTED, x3))


# --- what torch does with a module ------------------------------------------------------------------------------------


def test_modules_of_torch_around_it() -> None:
    """In a list, a dictionary, below others: found by name, trained with them."""
    inner = WrappedJaxFunction(tanh_affine, AFFINE)
    net = nn.Sequential(nn.Linear(2, 3), nn.ModuleDict({"jax": inner, "torch": nn.ReLU()})["jax"], nn.Linear(4, 1))
    assert {"1.params.w", "1.params.b"} < set(net.state_dict())
    box = nn.ModuleDict({"a": inner, "b": nn.ModuleList([inner])})
    assert len(list(box.parameters())) == 2
    x = torch.randn(6, 2, requires_grad=True)
    net(x).sum().backward()
    k0, b0, k1 = (p.detach().numpy() for p in (net[0].weight, net[0].bias, net[2].weight))

    def native(params: Any, x: Any) -> Any:
        return (tanh_affine(params, x @ k0.T + b0) @ k1.T).sum()

    of_params, of_x = jax.grad(native, (0, 1))(AFFINE, numpy_of(x))
    close(gradients_of(inner), named(of_params))
    close(x.grad, of_x)


def test_double_precision_while_jax_keeps_32_bits() -> None:
    assert not jax.config.jax_enable_x64
    module = WrappedJaxFunction(tanh_affine, AFFINE).double()
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    x = tensor(x3).double().requires_grad_()
    out = module(x)
    out.sum().backward()
    k, c, y = (np.asarray(a, np.float64) for a in (w, b, x3))
    expected = np.tanh(y @ k + c)
    close(out, expected, 1e-13)
    close(x.grad, (1 - expected**2) @ k.T, 1e-13)
    close(gradients_of(module), {"params.b": (1 - expected**2).sum(0), "params.w": y.T @ (1 - expected**2)}, 1e-13)
    assert {a.dtype for a in map(tensor, jax.tree.leaves(module.float().to_jax()))} == {torch.float32}


def test_double_precision_of_a_scalar_function() -> None:
    module = WrappedJaxScalarFunction(loss_of, AFFINE).double()
    value, aux = module(tensor(x3).double())
    assert {value.dtype, aux["hidden"].dtype} == {torch.float64}
    value.backward()
    with jax.enable_x64(True):
        grads = jax.grad(lambda p: loss_of(p, np.float64(x3))[0])(jax.tree.map(np.float64, AFFINE))
    close(gradients_of(module), named(grads), 1e-13)


@pytest.mark.parametrize(("cast", "dtype"), [("half", jnp.float16), ("bfloat16", jnp.bfloat16)])
def test_half_precision(cast: str, dtype: Any) -> None:
    """Computed as JAX computes it, and the gradient in the dtype of the parameter."""
    module = getattr(WrappedJaxFunction(tanh_affine, AFFINE), cast)()
    out = module(getattr(tensor(x3), cast)())
    out.sum().backward()
    params, x = jax.tree.map(lambda a: a.astype(dtype), (AFFINE, x3))
    torch_dtype = next(module.parameters()).dtype
    assert {out.dtype, *(p.grad.dtype for p in module.parameters())} == {torch_dtype}
    close(out.float(), tanh_affine(params, x).astype(jnp.float32), 1e-2)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), jax.grad(lambda p: tanh_affine(p, x).sum())(params))
    close({name: g.float() for name, g in gradients_of(module).items()}, named(grads), 3e-2)
    assert module(tensor(x3)).dtype == torch.float32


def test_parameters_move_to_a_dtype_and_a_device() -> None:
    module = WrappedJaxFunction(tanh_affine, AFFINE).to("cpu").to(torch.float64).to(torch.float32)
    close(module(tensor(x3)), tanh_affine(AFFINE, x3))
    empty = module.to("meta").to_empty(device="cpu")
    empty.load_state_dict({name: tensor(leaf) for name, leaf in named(AFFINE).items()})
    close(empty(tensor(x3)), tanh_affine(AFFINE, x3))


def test_zero_grad() -> None:
    module = WrappedJaxFunction(tanh_affine, AFFINE)
    for _ in range(2):
        module(tensor(x3)).sum().backward()
    close(
        gradients_of(module), named(jax.tree.map(lambda g: 2 * g, jax.grad(lambda p: tanh_affine(p, x3).sum())(AFFINE)))
    )
    module.zero_grad(set_to_none=False)
    assert all((g == 0).all() for g in gradients_of(module).values())
    module.zero_grad()
    assert set(gradients_of(module).values()) == {None}


def test_parameters_as_a_vector() -> None:
    module = WrappedJaxFunction(tanh_affine, AFFINE)
    vector = parameters_to_vector(module.parameters()).detach()
    vector_to_parameters(vector * 2, module.parameters())
    close(module(tensor(x3)), tanh_affine(jax.tree.map(lambda a: 2 * a, AFFINE), x3))


def test_a_parameter_is_read_at_each_call() -> None:
    """However it was written to, or replaced."""
    module = WrappedJaxFunction(tanh_affine, AFFINE)
    module(tensor(x3))
    owner = module.get_submodule("params")
    writes: list[Fn] = [
        lambda: owner.w.data.mul_(3),
        lambda: setattr(owner.w, "data", tensor(w) * 3),
        lambda: setattr(owner, "w", nn.Parameter(tensor(w) * 3)),
    ]
    for write in writes:
        with torch.no_grad():
            owner.w.copy_(tensor(w))
            write()
        close(module(tensor(x3)), tanh_affine({"w": 3 * w, "b": b}, x3))
        module.zero_grad()
        module(tensor(x3)).sum().backward()
        close(owner.w.grad, jax.grad(lambda p: tanh_affine(p, x3).sum())({"w": 3 * w, "b": b})["w"])


class Net(linen.Module):
    """Of flax: normalised by the batch, with dropout."""

    @linen.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = linen.Dense(8, use_bias=False)(x)  # a bias would have a gradient of nothing but rounding
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = linen.Dropout(0.5, deterministic=not train)(jax.nn.relu(x))
        return linen.Dense(2)(x)


class NnxNet(nnx.Module):
    """The same of the newer flax: it keeps its keys itself."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(3, 8, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.last(self.drop(jax.nn.relu(self.norm(self.first(x)))))


def relu(x: Any) -> Any:
    """JAX's own can't be pickled."""
    return jax.nn.relu(x)


class EqxNet(eqx.Module):
    """Of equinox: of one example, with dropout."""

    first: eqx.nn.Linear
    drop: eqx.nn.Dropout
    last: eqx.nn.Linear
    activation: Fn
    name: str = eqx.field(static=True)

    def __init__(self, key: Any) -> None:
        one, two = jax.random.split(key)
        self.first, self.last = eqx.nn.Linear(3, 8, key=one), eqx.nn.Linear(8, 2, key=two)
        self.drop, self.activation, self.name = eqx.nn.Dropout(0.5), relu, "net"

    def __call__(self, x: Any, *, key: Any = None) -> Any:
        x = self.drop(self.activation(jax.vmap(self.first)(x)), key=key)
        return jax.vmap(self.last)(x)


@functools.cache
def variables_of_net() -> Any:
    return jax.jit(Net().init)(jax.random.key(0), x3)


MODULES: dict[str, Callable[[], WrappedJaxFunction]] = {
    "function": lambda: WrappedJaxFunction(tanh_affine, AFFINE),
    "scalar function": lambda: WrappedJaxScalarFunction(loss_of, AFFINE),
    "state": lambda: WrappedJaxFunction(normalised, NORM, state=STATISTICS),
    "linen": lambda: WrappedJaxFunction(Net(), variables_of_net(), rngs=("dropout",)),
    "nnx": lambda: WrappedJaxFunction(NnxNet(nnx.Rngs(0))),
    "equinox": lambda: WrappedJaxFunction(EqxNet(jax.random.key(0)), rngs="key"),
}


def through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def through_a_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    f"{how.__name__} of {name}": (make, how)
    for how in (copy.deepcopy, through_pickle)
    for name, make in MODULES.items()
}
COPIES["through_a_file of state"] = (MODULES["state"], through_a_file)


@pytest.mark.parametrize(("make", "again"), rows(COPIES))
def test_a_copy_of_a_module_is_another(make: Callable[[], nn.Module], again: Callable[[nn.Module], nn.Module]) -> None:
    """Of the same values, mode and gradients; what happens to one does not happen to the other."""
    module = make().eval()
    x = tensor(x3)
    expected = module(x)
    other = again(module)
    assert (type(other), other.training) == (type(module), False)
    close(other(x), expected)
    first(other(x)).sum().backward()
    assert set(gradients_of(module).values()) == {None}
    first(module(x)).sum().backward()
    close(gradients_of(other), gradients_of(module))
    torch.manual_seed(1)
    other.train()(x)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    close(module(x), expected)
    torch.manual_seed(1)
    module.train()(x)
    close(dict(module.named_buffers()), dict(other.named_buffers()))


def first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def test_an_average_of_models() -> None:
    module = WrappedJaxFunction(normalised, NORM, state=STATISTICS)
    averaged = AveragedModel(module, use_buffers=True)
    for k in (1.0, 3.0):
        with torch.no_grad():
            for t in (*module.parameters(), *module.buffers()):
                t.fill_(k)
        averaged.update_parameters(module)
    assert {t.double().mean().item() for t in averaged.module.state_dict().values()} == {2.0}
    params, state = jax.tree.map(lambda a: jnp.full_like(a, 2), (NORM, STATISTICS))
    close(averaged.eval()(tensor(x3)), normalised(params, state, x3, train=False)[0])


def test_a_module_as_a_function_of_its_parameters() -> None:
    module = WrappedJaxFunction(tanh_affine, AFFINE)
    params = {name: 2 * p.detach() for name, p in module.named_parameters()}
    close(functional_call(module, params, (tensor(x3),)), tanh_affine(jax.tree.map(lambda a: 2 * a, AFFINE), x3))
    some = {"params.w": torch.zeros(3, 4)}
    close(functional_call(module, some, (), {"x": tensor(x3)}), tanh_affine({"w": 0 * w, "b": b}, x3))
    close(module(tensor(x3)), tanh_affine(AFFINE, x3))


@pytest.mark.parametrize("kind", [WrappedJaxFunction, WrappedJaxScalarFunction])
def test_transforms_of_a_module_as_a_function(kind: Fn) -> None:
    """Gradient, tangent, per-example gradients and Hessian, each that of JAX."""
    module = kind(loss_of, AFFINE)
    params = {name: p.detach() for name, p in module.named_parameters()}

    def ours(params: Any, x: Any) -> Any:
        return functional_call(module, params, (x,))[0]

    def theirs(params: Any, x: Any) -> Any:
        return loss_of({"b": params["params.b"], "w": params["params.w"]}, x)[0]

    arrays, x = named(AFFINE), tensor(x3)
    close(torch.func.grad(ours)(params, x), jax.grad(theirs)(arrays, x3))
    close(torch.func.jvp(ours, (params, x), (params, x)), jax.jvp(theirs, (arrays, x3), (arrays, x3)))
    each = torch.func.vmap(torch.func.grad(ours), (None, 0))(params, x[:, None])
    close(each, jax.vmap(jax.grad(theirs), (None, 0))(arrays, x3[:, None]))
    close(torch.func.hessian(ours)(params, x), jax.hessian(theirs)(arrays, x3), 1e-4)


def test_a_batch_of_calls() -> None:
    module = WrappedJaxFunction(tanh_affine, AFFINE)
    rows = torch.func.vmap(module)(tensor(x3))
    close(rows, tanh_affine(AFFINE, x3))
    rows.sum().backward()
    close(gradients_of(module), named(jax.grad(lambda p: tanh_affine(p, x3).sum())(AFFINE)))


def test_an_ensemble() -> None:
    """Several models as one, stacked on a skeleton without values."""
    many = {"w": array(4, 3, 4), "b": array(4, 4, seed=1)}
    models = [WrappedJaxFunction(tanh_affine, jax.tree.map(lambda a: a[i], many)) for i in range(4)]
    params, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    out = torch.func.vmap(lambda p, b: functional_call(skeleton, (p, b), (tensor(x3),)))(params, buffers)
    close(out, jax.vmap(tanh_affine, (0, None))(many, x3))
    out.square().sum().backward()
    grads = jax.grad(lambda p: (jax.vmap(tanh_affine, (0, None))(p, x3) ** 2).sum())(many)
    close({name: p.grad for name, p in params.items()}, named(grads))


def test_an_ensemble_with_state() -> None:
    """Each member has its own, and updates it."""
    many = {"scale": array(4, 3) + 2, "shift": array(4, 3, seed=1)}
    models = [WrappedJaxFunction(normalised, jax.tree.map(lambda a: a[i], many), state=STATISTICS) for i in range(4)]
    params, buffers = stack_module_state(models)
    xs = array(4, 5, 3, seed=5)
    out = torch.func.vmap(lambda p, b, x: functional_call(models[0], (p, b), (x,)))(params, buffers, tensor(xs))
    states = jax.tree.map(lambda a: jnp.stack([a] * 4), STATISTICS)
    expected, states = jax.vmap(functools.partial(normalised, train=True))(many, states, xs)
    close(out, expected)
    close(buffers, named(states, "state"))
    close(dict(models[0].named_buffers()), named(STATISTICS, "state"))


def test_a_gradient_of_a_module_with_state() -> None:
    """Torch's rule: what is written to is an argument of what is transformed."""
    module = WrappedJaxFunction(normalised, NORM, state=STATISTICS)
    params = {name: p.detach() for name, p in module.named_parameters()}
    buffers = {name: t.clone() for name, t in module.named_buffers()}

    def ours(params: Any, buffers: Any) -> Any:
        return (functional_call(module, (params, buffers), (tensor(x3),)) ** 3).sum()

    def theirs(params: Any) -> Any:
        out, new = normalised(params, STATISTICS, x3, train=True)
        return (out**3).sum(), new

    grads, state = jax.grad(theirs, has_aux=True)(NORM)
    close(torch.func.grad(ours)(params, buffers), named(grads))
    close(buffers, named(state, "state"))
    close(dict(module.named_buffers()), named(STATISTICS, "state"))


class Symmetric(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).mT


PARAMETRIZED: dict[str, tuple[Any, str, str, Fn]] = {
    "a bare array": (array(3, 3), "params", "0", lambda p: p),
    "in a dict": ({"w": array(3, 3), "b": b}, "params", "w", lambda p: p["w"]),
    "deeper": ({"layer": [array(3, 3), b]}, "params.layer", "0", lambda p: p["layer"][0]),
}


@pytest.mark.parametrize(("params", "owner", "name", "pick"), PARAMETRIZED.values(), ids=PARAMETRIZED)
def test_a_parameter_is_parametrized(params: Any, owner: str, name: str, pick: Fn) -> None:
    module = WrappedJaxFunction(lambda p, x: jnp.tanh(x @ pick(p)), params)
    parametrize.register_parametrization(module.get_submodule(owner), name, Symmetric())
    out = module(tensor(x3))

    def native(w: Any) -> Any:
        return jnp.tanh(x3 @ (jnp.triu(w) + jnp.triu(w, 1).T))

    close(out, native(pick(params)))
    out.sum().backward()
    original = module.get_parameter(f"{owner}.parametrizations.{name}.original")
    close(original.grad, jax.grad(lambda w: native(w).sum())(pick(params)))
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    close(module(tensor(x3)), native(pick(params) - 0.1 * numpy_of(original.grad)))
    parametrize.remove_parametrizations(module.get_submodule(owner), name)
    close(module(tensor(x3)), native(pick(params) - 0.1 * numpy_of(original.grad)))


def test_a_normalised_weight() -> None:
    """By one of torch's own parametrizations: what is trained is length and direction."""
    module = WrappedJaxFunction(tanh_affine, AFFINE)
    parametrizations.weight_norm(module.get_submodule("params"), "w", dim=0)
    close(module(tensor(x3)), tanh_affine(AFFINE, x3))
    module(tensor(x3)).sum().backward()
    length, direction = (module.get_parameter(f"params.parametrizations.w.original{i}") for i in range(2))

    def native(length: Any, direction: Any) -> Any:
        unit = direction / jnp.linalg.norm(direction, axis=1, keepdims=True)
        return tanh_affine({"w": length * unit, "b": b}, x3).sum()

    close((length.grad, direction.grad), jax.grad(native, (0, 1))(*map(numpy_of, (length, direction))))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_checkpoint_of_the_call(reentrant: bool) -> None:
    """Computed again in the backward."""
    module = WrappedJaxFunction(tanh_affine, AFFINE)
    checkpoint(module, tensor(x3).requires_grad_(), use_reentrant=reentrant).sum().backward()
    close(gradients_of(module), named(jax.grad(lambda p: tanh_affine(p, x3).sum())(AFFINE)))


def test_hooks_of_a_module() -> None:
    """On the way in, on the way out, and backwards; on parameters, before and after they have their gradient."""
    module, seen = WrappedJaxFunction(tanh_affine, AFFINE), []
    module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    module.register_forward_hook(lambda module, args, out: out * 3)
    module.register_full_backward_hook(lambda module, into, of: seen.append((into[0], of[0])))
    parameters_of(module)["params.w"].register_hook(lambda g: g * 5)
    parameters_of(module)["params.b"].register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    x = tensor(x3).requires_grad_()
    module(x).sum().backward()

    def native(params: Any, x: Any) -> Any:
        return (3 * tanh_affine(params, 2 * x)).sum()

    grads, of_x = jax.grad(native, (0, 1))(AFFINE, x3)
    close(gradients_of(module), {"params.b": grads["b"], "params.w": 5 * grads["w"]})
    assert len(seen) == 2
    (into, of), of_b = sorted(seen, key=lambda s: not isinstance(s, tuple))
    close((2 * into, of, of_b), (of_x, jnp.ones((5, 4)), grads["b"]))


# --- training ---------------------------------------------------------------------------------------------------------


def data(step: int) -> tuple[jax.Array, jax.Array]:
    """Another batch in each step."""
    x = array(16, 3, seed=100 + step)
    return x, jnp.stack([jnp.sin(x).sum(1), x[:, 0] * x[:, 1]], 1)


STEPS = 10


def trained_by_torch(module: nn.Module, forward: Callable[[Any], torch.Tensor] | None = None) -> list[float]:
    """The losses of ten steps of Adam."""
    forward = forward or module
    optimizer, losses = torch.optim.Adam(module.parameters(), lr=1e-2), []
    for step in range(STEPS):
        x, y = map(tensor, data(step))
        optimizer.zero_grad()
        loss = ((forward(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained_by_optax(apply: Fn, params: Any) -> tuple[list[float], Any]:
    """The same of a function of parameters and batch, and its parameters after it."""
    optimizer = optax.adam(1e-2)

    @jax.jit
    def update(params: Any, moments: Any, x: Any, y: Any) -> Any:
        value, grads = jax.value_and_grad(lambda p: ((apply(p, x) - y) ** 2).mean())(params)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, value

    moments, losses = optimizer.init(params), []
    for step in range(STEPS):
        params, moments, value = update(params, moments, *data(step))
        losses.append(float(value))
    return losses, params


def mlp(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params[0]["w"] + params[0]["b"]) @ params[1]["w"] + params[1]["b"]


MLP = [{"w": array(3, 8), "b": array(8, seed=1)}, {"w": array(8, 2, seed=2), "b": array(2, seed=3)}]


def test_ten_steps_of_a_function() -> None:
    module = WrappedJaxFunction(mlp, MLP)
    losses, params = trained_by_optax(mlp, MLP)
    np.testing.assert_allclose(trained_by_torch(module), losses, rtol=1e-5)
    close(module.to_jax(), params)
    assert losses[-1] < losses[0]


def test_ten_steps_of_a_scalar_function() -> None:
    """The loss is the module."""
    module = WrappedJaxScalarFunction(lambda p, x, y: (((mlp(p, x) - y) ** 2).mean(), None), MLP)
    optimizer, losses = torch.optim.Adam(module.parameters(), lr=1e-2), []
    for step in range(STEPS):
        optimizer.zero_grad()
        value, _ = module(*map(tensor, data(step)))
        value.backward()
        optimizer.step()
        losses.append(value.item())
    expected, params = trained_by_optax(mlp, MLP)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    close(module.to_jax(), params)


def test_clipped_gradients_and_weight_decay() -> None:
    """Of torch's optimizer, against those of optax."""
    module = WrappedJaxFunction(mlp, MLP)
    steps = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    native = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=0.1))
    params, moments = MLP, native.init(MLP)

    @jax.jit
    def update(params: Any, moments: Any, x: Any, y: Any) -> Any:
        grads = jax.grad(lambda p: ((mlp(p, x) - y) ** 2).mean())(params)
        updates, moments = native.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, optax.tree.norm(grads)

    for step in range(STEPS):
        x, y = data(step)
        steps.zero_grad()
        ((module(tensor(x)) - tensor(y)) ** 2).mean().backward()
        norm = clip_grad_norm_(module.parameters(), 0.5)
        steps.step()
        params, moments, expected = update(params, moments, x, y)
        close(norm, expected)
    close(module.to_jax(), params)


# --- what is no parameter ---------------------------------------------------------------------------------------------

MIXED = {
    "w": w,
    "ids": jnp.arange(4),
    "mask": jnp.array([True, False, True, True]),
    "key": jax.random.key(3),
    "scale": 2.0,
    "k": 3,
    "flag": True,
    "name": "tanh",
    "act": jnp.tanh,
    "nothing": None,
    "numbers": np.arange(4, dtype=np.float32),
}


def mixed(params: Any, x: Any) -> Any:
    assert params["nothing"] is None
    assert jnp.issubdtype(params["key"].dtype, jax.dtypes.prng_key)
    assert params["act"] is getattr(jnp, params["name"])
    h = params["act"](x @ params["w"]) * params["mask"] + params["ids"] + params["numbers"]
    noise = jax.random.normal(params["key"], h.shape)
    return sum((h * params["scale"] + noise for _ in range(params["k"])), h if params["flag"] else 0.0)


def test_what_is_no_float_array_is_no_parameter() -> None:
    """Integers, masks and keys are buffers; the rest stays what it is."""
    module = WrappedJaxFunction(mixed, MIXED)
    assert sorted(parameters_of(module)) == ["params.numbers", "params.w"]
    assert sorted(dict(module.named_buffers())) == ["params.ids", "params.key", "params.mask"]
    assert len(module.state_dict()) == 5
    close(module.get_buffer("params.key").view(torch.uint32), jax.random.key_data(MIXED["key"]))
    assert (module.get_buffer("params.mask").dtype, module.get_buffer("params.ids").dtype) == (torch.bool, torch.int32)
    out = module(tensor(x3))
    close(out, mixed(MIXED, x3))
    out.sum().backward()
    close(parameters_of(module)["params.w"].grad, jax.grad(lambda w: mixed(MIXED | {"w": w}, x3).sum())(w))


def test_a_buffer_is_data_of_the_call() -> None:
    """Loaded or written to, it counts at the next call."""
    module = WrappedJaxFunction(mixed, MIXED)
    module(tensor(x3))
    new = {"ids": MIXED["ids"] * 5, "mask": ~MIXED["mask"], "key": jax.random.key(4)}
    module.load_state_dict(WrappedJaxFunction(mixed, MIXED | new).state_dict())
    close(module(tensor(x3)), mixed(MIXED | new, x3))
    module.get_buffer("params.ids").add_(1)
    close(module(tensor(x3)), mixed(MIXED | new | {"ids": new["ids"] + 1}, x3))
    close(MIXED["ids"], jnp.arange(4))


def test_everything_comes_back_to_jax() -> None:
    """Keys as keys, and what never crossed as it was."""
    back = WrappedJaxFunction(mixed, MIXED).double().float().to_jax()
    assert back.keys() == MIXED.keys()
    arrays = {name: a for name, a in MIXED.items() if hasattr(a, "dtype")}
    close({name: back[name] for name in arrays}, jax.tree.map(jnp.asarray, arrays))
    assert jnp.issubdtype(back["key"].dtype, jax.dtypes.prng_key)
    rest = MIXED.keys() - arrays.keys()
    assert all(back[name] is MIXED[name] or back[name] == MIXED[name] for name in rest)
    close(mixed(back, x3), mixed(MIXED, x3))


def test_keys_of_another_kind_and_many_at_once() -> None:
    keys = {"one": jax.random.key(1, impl="rbg"), "many": jax.random.split(jax.random.key(2), (2, 3)), "w": b}

    def fn(params: Any, x: Any) -> Any:
        of_many = jax.vmap(jax.vmap(lambda k: jax.random.normal(k, (4,))))(params["many"])
        return x * params["w"] + jax.random.normal(params["one"], (4,)) + of_many

    module = WrappedJaxFunction(fn, keys)
    close(module(torch.ones(4)), fn(keys, jnp.ones(4)))
    close(module.to_jax(), keys)


CONTAINERS: dict[str, tuple[Any, Fn]] = {
    "dataclass": (Plain(w, b), lambda p: (p.w, p.b)),
    "NamedTuple": (Pair(w, [b, None]), lambda p: (p.first, p.second[0])),
    "flax struct": (Struct(w, (b,)), lambda p: (p.w, p.b[0])),
    "dataclass in a list": ([Plain(w, "x"), Plain(b, jnp.tanh)], lambda p: (p[0].w, p[1].w)),
    "tuple": ((w, (b, "x")), lambda p: (p[0], p[1][0])),
}


@pytest.mark.parametrize(("params", "pick"), CONTAINERS.values(), ids=CONTAINERS)
def test_the_function_gets_the_containers_that_were_given(params: Any, pick: Fn) -> None:
    def fn(params_: Any, x: Any) -> Any:
        assert type(params_) is type(params)
        k, c = pick(params_)
        return jnp.tanh(x @ k + c)

    module = WrappedJaxFunction(fn, params)
    out = module(tensor(x3))
    close(out, tanh_affine(AFFINE, x3))
    out.sum().backward()
    expected = jax.grad(lambda p: tanh_affine(p, x3).sum())(AFFINE)
    assert sorted(tuple(p.grad.shape) for p in module.parameters()) == [(3, 4), (4,)]
    close({p.dim(): p.grad for p in module.parameters()}, {1: expected["b"], 2: expected["w"]})
    back = module.to_jax()
    assert type(back) is type(params)
    close(pick(back), (w, b))


# --- state ------------------------------------------------------------------------------------------------------------

NORM = {"scale": array(3) + 2, "shift": array(3, seed=1)}
STATISTICS = {"mean": jnp.zeros(3), "var": jnp.ones(3), "count": jnp.zeros((), jnp.int32)}


def normalised(params: Any, state: Any, x: Any, *, train: bool) -> Any:
    """By the batch, with torch's own rule for the statistics."""
    if train:
        n, mean, var = len(x), x.mean(0), x.var(0)
        state = {
            "mean": 0.9 * state["mean"] + 0.1 * mean,
            "var": 0.9 * state["var"] + 0.1 * var * n / (n - 1),
            "count": state["count"] + 1,
        }
    else:
        mean, var = state["mean"], state["var"]
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * params["scale"] + params["shift"], state


def test_state_is_updated_in_training_alone() -> None:
    """As torch's own batch normalisation: values, gradients, statistics, and then the mode that uses them."""
    ours, theirs = WrappedJaxFunction(normalised, NORM, state=STATISTICS), nn.BatchNorm1d(3)
    theirs.load_state_dict({"weight": tensor(NORM["scale"]), "bias": tensor(NORM["shift"])}, strict=False)
    assert sorted(ours.state_dict()) == ["params.scale", "params.shift", "state.count", "state.mean", "state.var"]
    for step in range(3):
        x, _ = data(step)
        one, other = (tensor(x).requires_grad_() for _ in range(2))
        out, expected = ours(one), theirs(other)
        close(out, expected)
        for loss in (out, expected):
            (loss**3).sum().backward()
        close(one.grad, other.grad, 1e-4)
    statistics = [theirs.running_mean, theirs.running_var, theirs.num_batches_tracked.int()]
    names = ["state.mean", "state.var", "state.count"]
    close([ours.get_buffer(name) for name in names], statistics)
    close(gradients_of(ours), {"params.scale": theirs.weight.grad, "params.shift": theirs.bias.grad}, 1e-4)
    ours.eval()
    theirs.eval()
    close(ours(tensor(x)), theirs(tensor(x)))
    close([ours.get_buffer(name) for name in names], statistics)
    close(STATISTICS, {"mean": jnp.zeros(3), "var": jnp.ones(3), "count": jnp.zeros((), jnp.int32)})


def test_state_has_no_graph() -> None:
    """A step does not reach into the step before."""
    module = WrappedJaxFunction(normalised, NORM, state=STATISTICS)
    for _ in range(3):
        module(tensor(x3)).sum().backward()
    assert not any(buffer.requires_grad for buffer in module.buffers())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_state_is_updated_without_gradients_too(mode: Fn) -> None:
    module = WrappedJaxFunction(normalised, NORM, state=STATISTICS)
    with mode():
        module(tensor(x3))
    module(tensor(x3)).sum().backward()
    assert module.get_buffer("state.count").item() == 2
    assert all(not buffer.is_inference() for buffer in module.buffers())


def test_state_in_double_precision() -> None:
    """While JAX keeps 32 bits; a count stays a count."""
    ours, theirs = WrappedJaxFunction(normalised, NORM, state=STATISTICS).double(), nn.BatchNorm1d(3).double()
    x = tensor(x3).double()
    for _ in range(2):
        ours(x)
        theirs(x)
    statistics = [theirs.running_mean, theirs.running_var, theirs.num_batches_tracked.int()]
    close([ours.get_buffer(name) for name in ("state.mean", "state.var", "state.count")], statistics, 1e-12)


def test_a_backward_sees_the_state_of_its_forward() -> None:
    """Also when later calls have written to it."""

    def fn(params: Any, state: Any, x: Any) -> Any:
        return x * params * state, state + 1

    module = WrappedJaxFunction(fn, jnp.ones(3), state=jnp.ones(3))
    outs = [module(torch.ones(3)) for _ in range(3)]
    for k, out in enumerate(outs):
        module.zero_grad()
        out.sum().backward()
        close(parameters_of(module)["params.0"].grad, jnp.full(3, 1.0 + k))


def test_state_with_aux() -> None:
    def fn(params: Any, state: Any, x: Any, *, train: bool) -> Any:
        out, new = normalised(params, state, x, train=train)
        return (out, {"before": state["mean"], "largest": x.max()}), new

    module = WrappedJaxFunction(fn, NORM, has_aux=True, state=STATISTICS)
    _, aux = module(tensor(x3))
    assert not any(t.requires_grad for t in aux.values())
    close(aux, {"before": jnp.zeros(3), "largest": x3.max()})
    close(module.get_buffer("state.mean"), 0.1 * x3.mean(0))
    close(module(tensor(x3))[1]["before"], 0.1 * x3.mean(0))


def test_state_of_a_scalar_function() -> None:
    def loss(params: Any, state: Any, x: Any, *, train: bool) -> Any:
        out, new = normalised(params, state, x, train=train)
        return ((out**3).mean(), {"out": out}), new

    module = WrappedJaxScalarFunction(loss, NORM, state=STATISTICS)
    value, aux = module(tensor(x3))
    (2 * value + aux["out"].sum()).backward()

    def native(params: Any) -> Any:
        (value, aux), _ = loss(params, STATISTICS, x3, train=True)
        return 2 * value + aux["out"].sum()

    close(gradients_of(module), named(jax.grad(native)(NORM)))
    close(dict(module.named_buffers()), named(loss(NORM, STATISTICS, x3, train=True)[1], "state"))


@pytest.mark.parametrize(
    ("state", "names"),
    [
        (jnp.zeros(3), ["state.0"]),
        ([jnp.zeros(3), jnp.ones(2)], ["state.0", "state.1"]),
        ({"batch_stats": {"norm": Pair(jnp.zeros(3), None)}}, ["state.batch_stats.norm.first"]),
    ],
    ids=["array", "list", "nested"],
)
def test_state_of_any_structure(state: Any, names: list[str]) -> None:
    def fn(params: Any, state: Any, x: Any) -> Any:
        return x * params + jax.tree.leaves(state)[0], jax.tree.map(lambda a: a + 1, state)

    module = WrappedJaxFunction(fn, b[:3], state=state)
    assert list(dict(module.named_buffers())) == names
    close(module(torch.ones(3)), 1 * b[:3])
    close(module(torch.ones(3)), b[:3] + 1)
    params, back = module.to_jax()
    close((params, back), (b[:3], jax.tree.map(lambda a: a + 2, state)))


def new_state(change: Fn) -> Fn:
    """A function whose new state is another than its old."""
    return lambda params, state, x: (x * params["scale"], change(dict(state)))


DISAGREEING: dict[str, tuple[Fn, str]] = {
    "shape": (lambda s: s | {"mean": jnp.zeros((1, 3))}, r"state.*mean.*got f32\[1,3\].*expected f32\[3\]"),
    "missing": (lambda s: {"mean": s["mean"], "count": s["count"]}, r"state.*var"),
    "more": (lambda s: s | {"more": jnp.zeros(3)}, r"state.*more"),
    "kind": (lambda s: s | {"count": s["count"] / 2}, r"state.*count.*got f32\[\].*expected i32\[\]"),
    "nothing": (lambda s: None, r"state"),
}


@pytest.mark.parametrize(("change", "text"), DISAGREEING.values(), ids=DISAGREEING)
def test_a_new_state_that_disagrees_is_refused_by_name(change: Fn, text: str) -> None:
    """And the old one stays, all of it."""
    module = WrappedJaxFunction(new_state(change), NORM, state=STATISTICS)
    with pytest.raises(interop.OutputMismatchError, match=text):
        module(tensor(x3))
    close(dict(module.named_buffers()), named(STATISTICS, "state"))


def test_a_function_with_state_that_returns_no_pair_is_refused() -> None:
    with pytest.raises(interop.InteropError, match="new_state|new state"):
        WrappedJaxFunction(lambda params, state, x: x * params["scale"], NORM, state=STATISTICS)(tensor(x3))


def test_an_error_leaves_the_state_as_it_was() -> None:
    def fails(params: Any, state: Any, x: Any) -> Any:
        raise ZeroDivisionError

    module = WrappedJaxFunction(fails, NORM, state=STATISTICS)
    with pytest.raises(ZeroDivisionError):
        module(tensor(x3))
    close(dict(module.named_buffers()), named(STATISTICS, "state"))


# --- random numbers ---------------------------------------------------------------------------------------------------


def dropped(params: Any, x: Any, *, key: Any) -> Any:
    """Of ones, the mask itself."""
    if key is not None:
        x = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0)
    return x * params


def dropping() -> WrappedJaxFunction:
    return WrappedJaxFunction(dropped, jnp.ones(()), rngs="key")


ones = torch.ones(64)


def test_a_mask_is_drawn_from_the_generator_of_torch() -> None:
    """Another in each call; the same from the same seed."""
    module = dropping()
    torch.manual_seed(3)
    masks = [module(ones).tolist() for _ in range(20)]
    assert len(set(map(str, masks))) == 20
    assert all(16 < mask.count(0) < 48 for mask in masks)
    torch.manual_seed(3)
    assert [module(ones).tolist() for _ in range(20)] == masks
    torch.manual_seed(4)
    assert module(ones).tolist() not in masks


def test_nothing_is_drawn_in_eval() -> None:
    module, before = dropping().eval(), torch.get_rng_state().tolist()
    assert module(ones).tolist() == [1] * 64
    WrappedJaxFunction(tanh_affine, AFFINE)(tensor(x3))
    assert torch.get_rng_state().tolist() == before
    assert module.train()(ones).tolist() != [1] * 64


def test_the_generator_of_a_block() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        inside = dropping()(ones).tolist()
    torch.manual_seed(5)
    assert dropping()(ones).tolist() == inside


AGAIN: dict[str, Fn] = {
    "call": lambda module, x: module(x),
    "checkpoint": lambda module, x: checkpoint(module, x, use_reentrant=False),
    "reentrant checkpoint": lambda module, x: checkpoint(module, x, use_reentrant=True),
    "checkpoint below another": lambda module, x: checkpoint(
        lambda x: checkpoint(module, x, use_reentrant=False) * 1, x, use_reentrant=False
    ),
}


@pytest.mark.parametrize("call", AGAIN.values(), ids=AGAIN)
def test_the_mask_of_the_backward_is_that_of_the_forward(call: Fn) -> None:
    """Also where the forward runs again, and something was drawn in between."""
    x, module = torch.ones(64, requires_grad=True), dropping()
    out = call(module, x)
    torch.rand(3)
    out.sum().backward()
    assert x.grad.tolist() == out.tolist()
    assert 16 < out.tolist().count(0) < 48


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_a_model_with_random_state_of_its_own_is_refused(reentrant: bool) -> None:
    """What it was in the first run nobody knows when it runs again."""
    module, x = WrappedJaxFunction(nnx.Dropout(0.5, rngs=nnx.Rngs(0))).train(), torch.ones(64, requires_grad=True)
    out = checkpoint(module, x, use_reentrant=reentrant)
    with pytest.raises(interop.UnsupportedError, match="Dropout: a checkpoint runs it again.*rngs="):
        out.sum().backward()
    out = checkpoint(module.eval(), x, use_reentrant=reentrant)
    out.sum().backward()
    assert x.grad.tolist() == [1] * 64
    norm = WrappedJaxFunction(nnx.BatchNorm(4, rngs=nnx.Rngs(0))).train()
    (checkpoint(norm, torch.rand(3, 4, requires_grad=True), use_reentrant=reentrant) ** 2).sum().backward()


def test_several_keys_by_name() -> None:
    """In flax's own form; no two are alike."""
    seen = []

    def fn(params: Any, x: Any, *, rngs: Any) -> Any:
        seen.append(rngs)
        if rngs is None:
            return x * params, None
        assert list(rngs) == ["dropout", "noise"]
        return x * params, jax.tree.map(jax.random.key_data, rngs)

    module = WrappedJaxFunction(fn, jnp.ones(()), has_aux=True, rngs=("dropout", "noise"))
    keys = [tuple(data.tolist()) for _ in range(3) for data in module(ones)[1].values()]
    assert len(set(keys)) == 6
    module.eval()(ones)
    assert seen[-1] is None


@pytest.mark.parametrize("randomness", ["same", "different", "error"])
def test_masks_of_a_batch_are_as_torch_is_told(randomness: str) -> None:
    module, batch = dropping(), torch.ones(5, 64)
    call = torch.func.vmap(module, randomness=randomness)
    if randomness == "error":
        with pytest.raises(RuntimeError, match="randomness"):
            call(batch)
    else:
        assert len({str(row) for row in call(batch).tolist()}) == (1 if randomness == "same" else 5)


def test_the_gradients_of_a_batch_have_the_masks_of_their_values() -> None:
    module = dropping()
    x = torch.ones(5, 64, requires_grad=True)
    out = torch.func.vmap(module, randomness="different")(x)
    out.sum().backward()
    assert x.grad.tolist() == out.tolist()


# --- the mode ---------------------------------------------------------------------------------------------------------

FLAGS = {"train": True, "training": True, "is_training": True}
FLAGS |= dict.fromkeys(("deterministic", "use_running_average", "inference"), False)


def told(name: str, *, state: bool = False, default: str = "") -> Fn:
    """A function with a flag of this name, which says what it was told."""
    arguments = f"params, {'state, ' if state else ''}x, {name}{default}"
    out = f"x * params + (10 if {name} else 0)"
    return eval(f"lambda {arguments}: {f'({out}, state)' if state else out}")


def told_by_keys(name: str) -> Fn:
    return eval(f"lambda params, x, *, key, {name}: x * params + (10 if {name} else 0)")


@pytest.mark.parametrize(("name", "in_training"), FLAGS.items(), ids=FLAGS)
def test_the_flag_of_the_mode(name: str, in_training: bool) -> None:
    """With state, or with random numbers; it follows `train()` and `eval()`."""
    for module in (
        WrappedJaxFunction(told(name, state=True), jnp.ones(()), state=jnp.zeros(())),
        WrappedJaxFunction(told(name, state=True, default="=None"), jnp.ones(()), state=jnp.zeros(())),
        WrappedJaxFunction(told_by_keys(name), jnp.ones(()), rngs="key"),
    ):
        for training in (True, False, True):
            expected = 11 if training == in_training else 1
            assert module.train(training)(torch.ones(())).item() == expected


BY: dict[str, Fn] = {
    "keyword": lambda module, name, flag: module(torch.ones(()), **{name: flag}),
    "position": lambda module, name, flag: module(torch.ones(()), flag),
}


@pytest.mark.parametrize("call", rows(BY))
@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_that_the_call_gives_wins(name: str, call: Fn) -> None:
    module = WrappedJaxFunction(told(name, state=True), jnp.ones(()), state=jnp.zeros(()))
    for training in (True, False):
        module.train(training)
        assert [call(module, name, flag).item() for flag in (True, False)] == [11, 1]


@pytest.mark.parametrize("name", FLAGS)
def test_a_plain_function_is_told_nothing(name: str) -> None:
    """Without state and random numbers, its arguments are the user's own."""
    module = WrappedJaxFunction(told(name, default="=None"), jnp.ones(()))
    assert [module.train(training)(torch.ones(())).item() for training in (True, False)] == [1, 1]
    with pytest.raises(TypeError, match=f"missing 1 required positional argument: '{name}'"):
        WrappedJaxFunction(told(name), jnp.ones(()))(torch.ones(()))


def test_a_function_without_a_flag_is_told_nothing() -> None:
    module = WrappedJaxFunction(lambda params, state, x, **rest: (x + len(rest), state), {}, state=jnp.zeros(()))
    assert module(torch.zeros(())).item() == 0


# --- flax, linen ------------------------------------------------------------------------------------------------------


def linen_step(params: Any, state: Any, x: Any, *, rngs: Any, train: bool) -> Any:
    """The network as a function; aux is the key that it was given."""
    out, new = Net().apply({"params": params, **state}, x, train=train, rngs=rngs, mutable=["batch_stats"])
    return (out, rngs and jax.random.key_data(rngs["dropout"])), new


def split(variables: Any) -> tuple[Any, Any]:
    """What is trained, and the rest."""
    return variables["params"], {name: rest for name, rest in variables.items() if name != "params"}


def trained_natively(step: Fn, params: Any, state: Any, keys: list[Any]) -> tuple[list[float], Any, Any]:
    """Ten steps of optax with the given keys: the losses, the parameters and the state after them."""
    optimizer = optax.adam(1e-2)

    @jax.jit
    def update(params: Any, state: Any, moments: Any, key: Any, x: Any, y: Any) -> Any:
        def loss(params: Any) -> Any:
            out, new = step(params, state, x, key)
            return ((out - y) ** 2).mean(), new

        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), state, moments, value

    moments, losses = optimizer.init(params), []
    for i, key in enumerate(keys):
        params, state, moments, value = update(params, state, moments, jax.random.wrap_key_data(key), *data(i))
        losses.append(float(value))
    return losses, params, state


def recorded(module: nn.Module) -> tuple[Fn, list[Any]]:
    """A module whose aux is its key, as its value alone; and the keys of the calls."""
    keys: list[Any] = []

    def forward(x: Any) -> Any:
        out, key = module(x)
        keys.append(numpy_of(key))
        return out

    return forward, keys


def test_ten_steps_of_batch_normalisation_and_dropout_in_flax() -> None:
    """From torch, and by flax and optax alone with the same keys: losses, parameters, statistics and predictions."""
    params, state = split(variables_of_net())
    module = WrappedJaxFunction(linen_step, params, has_aux=True, state=state, rngs=("dropout",))
    forward, keys = recorded(module)
    losses = trained_by_torch(module, forward)
    assert len({str(key.tolist()) for key in keys}) == STEPS

    def step(params: Any, state: Any, x: Any, key: Any) -> Any:
        return Net().apply({"params": params, **state}, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"])

    expected, params, state = trained_natively(step, params, state, keys)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    close(module.to_jax(), (params, state))
    close(module.eval()(tensor(x3))[0], Net().apply({"params": params, **state}, x3))


def test_a_linen_module_is_its_function() -> None:
    """Its "params" are trained, its other collections are state, and its flag follows the mode."""
    variables = variables_of_net()
    module = WrappedJaxFunction(Net(), variables, rngs=("dropout",))
    params, state = split(variables)
    function = WrappedJaxFunction(linen_step, params, has_aux=True, state=state, rngs=("dropout",))
    assert len(parameters_of(module)) == len(jax.tree.leaves(params)) == 5
    assert len(list(module.buffers())) == len(jax.tree.leaves(state)) == 2
    losses = []
    for m, forward in ((module, module), (function, recorded(function)[0])):
        torch.manual_seed(0)
        losses.append(trained_by_torch(m, forward))
    assert losses[0] == losses[1]
    trained = module.to_jax()
    assert trained.keys() == variables.keys()
    assert split(trained)[1]["batch_stats"]["BatchNorm_0"]["mean"].any()
    close(split(trained), function.to_jax())
    close(module.eval()(tensor(x3)), Net().apply(trained, x3))
    close(variables, variables_of_net())


def test_a_linen_module_without_state() -> None:
    net = linen.Sequential([linen.Dense(8), jnp.tanh, linen.Dense(2)])
    variables = net.init(jax.random.key(0), x3)
    module = WrappedJaxFunction(net, variables)
    losses, trained = trained_by_optax(net.apply, variables)
    np.testing.assert_allclose(trained_by_torch(module), losses, rtol=1e-5)
    close(module.to_jax(), trained)


def test_a_linen_module_is_told_the_mode_by_the_call() -> None:
    module = WrappedJaxFunction(Net(), variables_of_net(), rngs=("dropout",))
    close(module(tensor(x3), train=False), Net().apply(variables_of_net(), x3))
    torch.manual_seed(0)
    in_training = module(tensor(x3))
    module.load_state_dict(WrappedJaxFunction(Net(), variables_of_net()).state_dict())
    torch.manual_seed(0)
    close(module(tensor(x3), train=True), in_training)


def test_half_of_a_network_is_frozen() -> None:
    """What is frozen stays, the rest is trained as optax trains it alone."""
    net = linen.Sequential([linen.Dense(8), jnp.tanh, linen.Dense(2)])
    variables = net.init(jax.random.key(0), x3)
    module = WrappedJaxFunction(net, variables)
    frozen = [p for name, p in module.named_parameters() if "layers_0" in name]
    assert len(frozen) == 2
    for p in frozen:
        p.requires_grad_(False)
    trained_by_torch(module)
    first, last = variables["params"]["layers_0"], variables["params"]["layers_2"]
    _, trained = trained_by_optax(lambda p, x: net.apply({"params": {"layers_0": first, "layers_2": p}}, x), last)
    close(module.to_jax()["params"], {"layers_0": first, "layers_2": trained})


# --- flax, nnx --------------------------------------------------------------------------------------------------------


def trained_by_nnx(model: Any) -> list[float]:
    """By nnx and optax alone."""
    optimizer, losses = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param), []

    @nnx.jit
    def update(model: Any, optimizer: Any, x: Any, y: Any) -> Any:
        value, grads = nnx.value_and_grad(lambda model: ((model(x) - y) ** 2).mean())(model)
        optimizer.update(model, grads)
        return value

    for step in range(STEPS):
        losses.append(float(update(model, optimizer, *data(step))))
    return losses


def arrays_of(model: Any) -> Any:
    """All that an nnx model holds, by path."""
    return {str(path): v for path, v in jax.tree_util.tree_leaves_with_path(nnx.state(model))}


def test_ten_steps_of_an_nnx_module() -> None:
    """Its parameters are trained; statistics, keys and their counts are state, and go on as nnx has them."""
    model, twin = (NnxNet(nnx.Rngs(0)) for _ in range(2))
    module = WrappedJaxFunction(model)
    assert len(parameters_of(module)) == 5
    np.testing.assert_allclose(trained_by_torch(module), trained_by_nnx(twin), rtol=1e-5)
    back = module.to_jax()
    assert type(back) is NnxNet
    close(arrays_of(back), arrays_of(twin))
    assert int(back.drop.rngs.count[...]) == STEPS
    close(arrays_of(model), arrays_of(NnxNet(nnx.Rngs(0))))
    twin.eval()
    before = dict(module.named_buffers())
    close(module.eval()(tensor(x3)), twin(x3))
    close(dict(module.named_buffers()), before)
    back.eval()
    close(back(x3), twin(x3))


def test_an_nnx_module_in_training_goes_on_where_the_model_was_built() -> None:
    """Back from `eval()`, it drops and normalises again."""
    module, twin = WrappedJaxFunction(NnxNet(nnx.Rngs(0))), NnxNet(nnx.Rngs(0))
    module.eval()(tensor(x3))
    module.train()
    for _ in range(2):
        close(module(tensor(x3)), twin(x3))


def test_an_nnx_module_with_keys_of_torch() -> None:
    """The streams of these names start anew in each call."""
    module = WrappedJaxFunction(NnxNet(nnx.Rngs(params=0, dropout=1)), rngs=("dropout",))
    torch.manual_seed(3)
    outs = [module(tensor(x3)).tolist() for _ in range(3)]
    assert len(set(map(str, outs))) == 3
    torch.manual_seed(3)
    assert module(tensor(x3)).tolist() == outs[0]
    assert module.eval()(tensor(x3)).tolist() == module(tensor(x3)).tolist() != outs[0]


def test_keys_for_a_stream_that_an_nnx_module_has_not() -> None:
    """It would go on with keys of its own, whatever the seed of torch."""
    with pytest.raises(interop.InteropError, match="noise"):
        WrappedJaxFunction(NnxNet(nnx.Rngs(params=0, dropout=1)), rngs=("noise",))(tensor(x3))


def test_an_nnx_module_that_shares_a_part() -> None:
    """A variable in two places is one parameter, with the sum of the gradients."""

    class Tied(nnx.Module):
        def __init__(self) -> None:
            self.one = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
            self.other = self.one

        def __call__(self, x: Any) -> Any:
            return self.other(jnp.tanh(self.one(x)))[:, :2]

    module, twin = WrappedJaxFunction(Tied()), Tied()
    assert len(parameters_of(module)) == 2
    np.testing.assert_allclose(trained_by_torch(module), trained_by_nnx(twin), rtol=1e-5)
    back = module.to_jax()
    assert back.one is back.other
    close(arrays_of(back), arrays_of(twin))


# --- equinox ----------------------------------------------------------------------------------------------------------


def without(model: Any) -> Any:
    """An equinox model without its functions."""
    return eqx.filter(model, eqx.is_array)


def test_ten_steps_of_an_equinox_module() -> None:
    """In inference mode, so that there are no keys; the trained model comes back as itself."""
    model = EqxNet(jax.random.key(0))
    module = WrappedJaxFunction(model, rngs="key").eval()
    arrays, rest = eqx.partition(eqx.nn.inference_mode(model), eqx.is_array)
    losses, trained = trained_by_optax(lambda p, x: eqx.combine(p, rest)(x), arrays)
    np.testing.assert_allclose(trained_by_torch(module), losses, rtol=1e-5)
    back = module.to_jax()
    assert (type(back), back.name, back.activation) == (EqxNet, "net", relu)
    close(without(back), trained)
    assert not back.drop.inference
    close(eqx.nn.inference_mode(back)(x3), eqx.combine(trained, rest)(x3))


def test_an_equinox_module_drops_in_training() -> None:
    """With a key from torch's generator: the values are those of the model with some key of JAX."""
    module = WrappedJaxFunction(EqxNet(jax.random.key(0)), rngs="key")
    torch.manual_seed(3)
    outs = [module(tensor(x3)).tolist() for _ in range(3)]
    assert len(set(map(str, outs))) == 3
    torch.manual_seed(3)
    assert module(tensor(x3)).tolist() == outs[0]
    assert module.eval()(tensor(x3)).tolist() == module(tensor(x3)).tolist() != outs[0]


class EqxNormed(eqx.Module):
    """Normalised by the batch, with dropout; of one example, and its state."""

    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    last: eqx.nn.Linear

    def __init__(self, key: Any) -> None:
        one, two = jax.random.split(key)
        self.first, self.last = eqx.nn.Linear(3, 8, use_bias=False, key=one), eqx.nn.Linear(8, 2, key=two)
        self.norm, self.drop = eqx.nn.BatchNorm(8, "batch", mode="batch", momentum=0.9), eqx.nn.Dropout(0.5)

    def __call__(self, x: Any, state: Any, *, key: Any) -> Any:
        x, state = self.norm(self.first(x), state)
        return self.last(self.drop(jax.nn.relu(x), key=key)), state


def eqx_step(model: Any, state: Any, x: Any, *, key: Any, inference: bool) -> Any:
    """On a batch."""
    model = eqx.nn.inference_mode(model, inference)
    keys = None if key is None else jax.random.split(key, len(x))
    run = jax.vmap(lambda x, key: model(x, state, key=key), axis_name="batch", out_axes=(0, None))
    out, state = run(x, keys)
    return (out, key if key is None else jax.random.key_data(key)), state


def test_ten_steps_of_batch_normalisation_and_dropout_in_equinox() -> None:
    """From torch, and by equinox and optax alone with the same keys."""
    model, state = eqx.nn.make_with_state(EqxNormed)(jax.random.key(0))
    module = WrappedJaxFunction(eqx_step, model, has_aux=True, state=state, rngs="key")
    forward, keys = recorded(module)
    losses = trained_by_torch(module, forward)
    params, rest = eqx.partition(model, eqx.is_inexact_array)

    def step(params: Any, state: Any, x: Any, key: Any) -> Any:
        (out, _), state = eqx_step(eqx.combine(params, rest), state, x, key=key, inference=False)
        return out, state

    expected, params, state = trained_natively(step, params, state, keys)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    back, back_state = module.to_jax()
    close(jax.tree.leaves(without(back)), jax.tree.leaves(params))
    close(jax.tree.leaves(back_state), jax.tree.leaves(state))
    (predicted, _), _ = eqx_step(back, back_state, x3, key=None, inference=True)
    close(module.eval()(tensor(x3))[0], predicted)


def test_a_copy_of_an_equinox_module_with_state() -> None:
    """The markers by which equinox finds its state go along."""
    model, state = eqx.nn.make_with_state(EqxNormed)(jax.random.key(0))
    module = WrappedJaxFunction(eqx_step, model, has_aux=True, state=state, rngs="key")
    other = copy.deepcopy(module)
    torch.manual_seed(0)
    expected = module(tensor(x3))
    torch.manual_seed(0)
    close(other(tensor(x3)), expected)
    close(dict(other.named_buffers()), dict(module.named_buffers()))


# --- haiku ------------------------------------------------------------------------------------------------------------


def test_ten_steps_of_haiku() -> None:
    hk = pytest.importorskip("haiku")
    net = hk.transform(lambda x: hk.nets.MLP([8, 2])(x, dropout_rate=0.0, rng=hk.next_rng_key()))
    params = net.init(jax.random.key(0), x3)
    module = WrappedJaxFunction(
        lambda p, x, *, key: net.apply(p, jax.random.key(0) if key is None else key, x), params, rngs="key"
    )
    assert "params.mlp/~/linear_0.w" in parameters_of(module)
    losses, trained = trained_by_optax(lambda p, x: net.apply(p, jax.random.key(0), x), params)
    np.testing.assert_allclose(trained_by_torch(module), losses, rtol=1e-5)
    close(module.to_jax(), trained)


# --- a model by jax_to_torch ------------------------------------------------------------------------------------------


def test_an_equinox_model_by_conversion() -> None:
    model = eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(0))
    module = jax_to_torch(model)
    assert isinstance(module, WrappedJaxFunction)
    assert {"params.layers.0.weight", "params.layers.1.bias"} < set(module.state_dict())
    out = module(tensor(x3[0]))
    close(out, model(x3[0]))
    out.sum().backward()
    grads = eqx.filter_grad(lambda model: model(x3[0]).sum())(model)
    close(parameters_of(module)["params.layers.0.weight"].grad, grads.layers[0].weight)


def test_an_nnx_model_by_conversion() -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    module = jax_to_torch(model)
    assert isinstance(module, WrappedJaxFunction)
    out = module(tensor(x3))
    close(out, model(x3))
    out.sum().backward()
    grads = nnx.grad(lambda model: model(x3).sum())(model)
    close({p.dim(): p.grad for p in module.parameters()}, {1: grads.bias[...], 2: grads.kernel[...]})


def test_a_function_by_conversion_is_no_module() -> None:
    for fn in (jnp.sin, jax.jit(jnp.sin), functools.partial(tanh_affine, AFFINE)):
        assert not isinstance(jax_to_torch(fn), nn.Module)


# --- compilers --------------------------------------------------------------------------------------------------------


def compiled(fn: Any, backend: str = "aot_eager") -> Fn:
    """In one graph."""
    return torch.compile(fn, fullgraph=True, backend=backend)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_module_in_one_graph(backend: str) -> None:
    """Between operations of torch, forwards and backwards; the parameters are read at each call."""
    module = WrappedJaxFunction(nested, NESTED)
    net = nn.Sequential(nn.Linear(3, 3), module, nn.Tanh())
    run = compiled(net, backend)
    for _ in range(2):
        x = torch.randn(5, 3)
        net.zero_grad()
        out = run(x)
        out.sum().backward()
        got = gradients_of(net)
        net.zero_grad(set_to_none=True)
        expected = net(x)
        expected.sum().backward()
        close(out, expected)
        close(got, gradients_of(net))
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(0.9)


def test_a_scalar_function_in_one_graph() -> None:
    module = WrappedJaxScalarFunction(loss_of, AFFINE)
    value, aux = compiled(module)(tensor(x3))
    (3 * value + aux["hidden"].sum()).backward()
    expected = jax.grad(lambda p: 3 * loss_of(p, x3)[0] + loss_of(p, x3)[1]["hidden"].sum())(AFFINE)
    close(gradients_of(module), named(expected))


@pytest.mark.parametrize(
    "make", [MODULES["linen"], MODULES["nnx"], MODULES["equinox"]], ids=["linen", "nnx", "equinox"]
)
def test_state_and_random_numbers_in_one_graph(make: Callable[[], nn.Module]) -> None:
    """The masks, statistics and gradients of eager calls from the same seed; each mode has a graph of its own."""
    results = []
    for fuse in (compiled, lambda module: module):
        module = make()
        run, x = fuse(module), tensor(x3)
        torch.manual_seed(0)
        outs = [run(x), run(x)]
        outs[1].sum().backward()
        module.eval()
        outs.append(run(x))
        module.train()
        outs.append(run(x))
        results.append((outs, gradients_of(module), dict(module.named_buffers())))
    close(*results)
    assert not torch.equal(results[0][0][0], results[0][0][1])


def test_odd_names_in_one_graph() -> None:
    weight, bias = array(3, 3), b[:3]
    params = {"if": {"w": weight}, "forward": weight, "training": [bias], "mlp/~/0": {3: weight}, "a.b": bias, "": bias}

    def fn(params: Any, x: Any) -> Any:
        x = x @ params["if"]["w"] @ params["forward"] + params["training"][0]
        return x @ params["mlp/~/0"][3] + params["a.b"] + params[""]

    module = WrappedJaxFunction(fn, params)
    out = compiled(lambda x: torch.tanh(module(x * 2)))(tensor(x3))
    out.sum().backward()
    got = gradients_of(module)
    module.zero_grad()
    torch.tanh(module(tensor(x3) * 2)).sum().backward()
    close(got, gradients_of(module))


def test_an_lstm_of_flax_in_a_compiled_caller() -> None:
    """One of its gates is named `if`, which no generated code may spell as an attribute."""
    net = linen.RNN(linen.LSTMCell(4))
    x = array(2, 5, 3)
    variables = net.init(jax.random.key(0), x)
    module = WrappedJaxFunction(net, variables)
    assert "params.params.cell.if.kernel" in parameters_of(module)
    out = compiled(lambda x: torch.tanh(module(x) * 2))(tensor(x))
    out.sum().backward()

    @jax.jit
    def native(variables: Any) -> Any:
        return jnp.tanh(net.apply(variables, x) * 2)

    close(out, native(variables))
    close(gradients_of(module), named(jax.grad(lambda v: native(v).sum())(variables)))


GUESTS = """
import jax.numpy as jnp

def layer(params, x):
    return jnp.tanh(x @ params["w"] + params["b"])
"""

LOADS = """
import interop, torch
x, out = torch.load("values.pt")
for name in ("nonstrict", "strict"):
    program = torch.export.load(f"{name}.pt2")
    torch.testing.assert_close(program.module()(x), out)
    print(sorted(program.state_dict))
"""


def test_an_exported_module_runs_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_python: Callable[..., str]
) -> None:
    """One that can import the function. The parameters are in it, as they are now and under their names."""
    (tmp_path / "guests.py").write_text(GUESTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "guests", raising=False)
    import guests

    module, x = WrappedJaxFunction(guests.layer, AFFINE), tensor(x3)
    with torch.no_grad():
        parameters_of(module)["params.w"].add_(1)
    for name in ("nonstrict", "strict"):
        program = torch.export.export(module, (x,), strict=name == "strict")
        assert sorted(program.state_dict) == sorted(module.state_dict())
        close(program.module()(x + 1), module(x + 1))
        torch.export.save(program, tmp_path / f"{name}.pt2")
    torch.save((x, module(x).detach()), tmp_path / "values.pt")
    paths = os.pathsep.join([str(tmp_path), str(TESTS.parent)])
    printed = run_python(f"import os; os.chdir({str(tmp_path)!r})\n{LOADS}", PYTHONPATH=paths)
    assert printed.splitlines()[-2:] == ["['params.b', 'params.w']"] * 2


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_a_closure_is_refused_when_it_is_saved(strict: bool, tmp_path: Path) -> None:
    """By name: no other process could find it."""
    scale = 2.0

    def hidden_away(params: Any, x: Any) -> Any:
        return tanh_affine(params, x) * scale

    module = WrappedJaxFunction(hidden_away, AFFINE)
    with pytest.raises(Exception, match="hidden_away"):
        torch.export.save(torch.export.export(module, (tensor(x3),), strict=strict), tmp_path / "a.pt2")


# --- two processes ----------------------------------------------------------------------------------------------------
#
# Each holds half of the batch. What they find is compared with one process that holds all of it.


def whole(t: Any) -> torch.Tensor:
    """A tensor with the parts of all processes."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def half(t: torch.Tensor) -> torch.Tensor:
    """The part of a batch that is this process's."""
    import torch.distributed as dist

    return t.chunk(dist.get_world_size())[dist.get_rank()]


def steps_of(module: nn.Module, share: Fn) -> dict[str, torch.Tensor]:
    """The parameters and buffers after three steps of Adam."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for step in range(3):
        x, y = (share(tensor(a)) for a in data(step))
        optimizer.zero_grad()
        ((module(x) - y) ** 2).mean().backward()
        optimizer.step()
    state = {name.replace("module.", ""): whole(t).detach() for name, t in module.state_dict().items()}
    return {name: t.double() for name, t in state.items()}


def mixed_network() -> nn.Sequential:
    """Torch between JAX and JAX; always the same."""
    torch.manual_seed(0)
    ours = [WrappedJaxFunction(tanh_affine, {"w": array(3, 8), "b": array(8)}), WrappedJaxFunction(mlp_of_lists, LAST)]
    return nn.Sequential(ours[0], nn.Linear(8, 8), ours[1])


LAST = [array(8, 2), array(2, seed=1)]


def mlp_of_lists(params: Any, x: Any) -> Any:
    return jnp.tanh(x) @ params[0] + params[1]


def plain_mlp() -> nn.Module:
    return WrappedJaxFunction(mlp, MLP)


def largest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference."""
    assert one.keys() == other.keys(), (one.keys(), other.keys())
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def parallel(make: Callable[[], nn.Module], **options: Any) -> dict[str, Any]:
    """By DDP."""
    wrapped = nn.parallel.DistributedDataParallel(make(), **options)
    return {"error": largest(steps_of(wrapped, half), steps_of(make(), lambda t: t))}


def parallel_with_state() -> dict[str, Any]:
    """DDP gives the buffers of the first process to all: the statistics are those of its half of each batch."""
    import torch.distributed as dist

    def make() -> nn.Module:
        return nn.Sequential(WrappedJaxFunction(normalised, NORM, state=STATISTICS), WrappedJaxFunction(mlp, MLP))

    model = make()
    found = steps_of(nn.parallel.DistributedDataParallel(model), half)
    state = STATISTICS
    for step in range(3):
        for rank in (0, 1) if step == 2 else (0,):
            x = jnp.split(data(step)[0], 2)[rank]
            new = normalised(NORM, state, x, train=True)[1]
            if rank == dist.get_rank() or step < 2:
                mine = new
        state = mine
    expected = {name: tensor(a).double() for name, a in named(mine, "0.state").items()}
    return {"error": largest({name: found[name] for name in expected}, expected)}


def parallel_nnx() -> dict[str, Any]:
    """A model that keeps keys and counts among its buffers."""
    model = WrappedJaxFunction(NnxNet(nnx.Rngs(0)))
    steps_of(nn.parallel.DistributedDataParallel(model), half)
    return {"count": int(model.to_jax().drop.rngs.count[...])}


def sharded(make: Callable[[], nn.Module]) -> nn.Module:
    """By FSDP2: each part, and the whole."""
    from torch.distributed.fsdp import fully_shard

    model = make()
    for child in model if isinstance(model, nn.Sequential) else ():
        fully_shard(child)
    return fully_shard(model)


def fsdp(make: Callable[[], nn.Module]) -> dict[str, Any]:
    model = sharded(make)
    shards = all(type(p).__name__ == "DTensor" or type(p.data).__name__ == "DTensor" for p in model.parameters())
    return {"error": largest(steps_of(model, half), steps_of(make(), lambda t: t)), "sharded": shards}


def saved_and_loaded() -> dict[str, Any]:
    """A trained and sharded model through a checkpoint on disk into one that is not trained."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, other = sharded(mixed_network), sharded(mixed_network)
    trained = steps_of(model, half)
    dcp.save(get_model_state_dict(model), checkpoint_id="checkpoint")
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id="checkpoint")
    set_model_state_dict(other, state)
    loaded = {name: whole(t).detach().double() for name, t in other.state_dict().items()}
    return {"error": largest(loaded, trained), "names": sorted(state)}


RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    "ddp": lambda: parallel(plain_mlp),
    "ddp, mixed": lambda: parallel(mixed_network, gradient_as_bucket_view=True),
    "ddp, static graph": lambda: parallel(mixed_network, static_graph=True),
    "ddp, state": parallel_with_state,
    "ddp, nnx": parallel_nnx,
    "fsdp": lambda: fsdp(plain_mlp),
    "fsdp, mixed": lambda: fsdp(mixed_network),
    "checkpoint": saved_and_loaded,
}


def two_processes() -> None:
    """One of the two."""
    one_of_two(RUNS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(place: Path) -> list[dict[str, Any]]:
    """What each of the two processes found, by name."""
    return two_ranks("import test_module_in_torch as t; t.two_processes()", place)


def test_both_processes_come_to_an_end(ranks: list[dict[str, Any]]) -> None:
    assert [rank["exit"] for rank in ranks] == [0, 0], ranks[0]["tail"] + ranks[1]["tail"]


@pytest.mark.parametrize("way", ["ddp", "ddp, mixed", "ddp, static graph", "ddp, state", "fsdp", "fsdp, mixed"])
def test_two_processes_train_as_one_does(ranks: list[dict[str, Any]], way: str) -> None:
    for found in each(ranks, way):
        assert found["error"] < 1e-5
        assert found.get("sharded", True)


def test_a_module_that_keeps_keys_in_two_processes(ranks: list[dict[str, Any]]) -> None:
    assert each(ranks, "ddp, nnx") == [{"count": 3}] * 2


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")  # which is meant
def test_a_sharded_checkpoint(ranks: list[dict[str, Any]], place: Path) -> None:
    """Into a sharded model, and into one of a single process."""
    import torch.distributed.checkpoint as dcp

    for found in each(ranks, "checkpoint"):
        assert found["error"] == 0
        assert found["names"] == sorted(mixed_network().state_dict())
    model = mixed_network()
    state = model.state_dict()
    dcp.load(state, checkpoint_id=place / "checkpoint", no_dist=True)
    model.load_state_dict(state)
    expected = steps_of(mixed_network(), lambda t: t)
    assert largest({name: t.double() for name, t in model.state_dict().items()}, expected) < 1e-5


# --- GPU --------------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="INTEROP_DEVICE is not cuda")


@needs_gpu
def test_a_module_on_the_gpu() -> None:
    """Parameters, state, random numbers and gradients are there, and the training is that of the CPU."""
    for make in (MODULES["function"], MODULES["state"], MODULES["nnx"]):
        one, other = make().cpu(), make().cuda()
        x = tensor(x3)
        out, expected = other(x.cuda()), one(x)
        for loss in (out, expected):
            (loss**2).sum().backward()
        found = (out, gradients_of(other), dict(other.named_buffers()))
        assert {t.device.type for t in jax.tree.leaves(found)} == {"cuda"}
        wanted = (expected, gradients_of(one), dict(one.named_buffers()))
        close(jax.tree.map(torch.Tensor.cpu, found), wanted, 1e-2)


@needs_gpu
def test_random_numbers_on_the_gpu() -> None:
    module, x = dropping().cuda(), torch.ones(64, device="cuda", requires_grad=True)
    torch.manual_seed(3)
    out = module(x)
    out.sum().backward()
    assert x.grad.tolist() == out.tolist()
    assert module(x).tolist() != out.tolist()
    torch.manual_seed(3)
    assert module(x).tolist() == out.tolist()
