"""A torch module as a function of its parameters in JAX: how it is made, called, trained and written back, and refused.

Values, gradients and whole trainings are compared with the module itself in torch.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import enum
import functools
import gc
import inspect
import pickle
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from flax.training.train_state import TrainState
from torch import nn
from torch.nn.functional import cross_entropy, linear
from torch.nn.utils import parametrizations, parametrize
from transformers.modeling_outputs import BaseModelOutput

import interop
from hosts import HOSTS, numpy_of
from interop import as_jax, jax_to_torch, jittable, make_functional, torch_module_to_jax, torch_to_jax
from interop._in_jax._random import seeding
from tables import rows
from together import at_once

Fn = Callable[..., Any]
TORCH, JAX = HOSTS["torch"], HOSTS["jax"]

x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)


def tensor(array: Any) -> torch.Tensor:
    """A tensor of its own."""
    return jax_to_torch(array, copy=True)


def arrays(named: Any) -> dict[str, jax.Array]:
    """Parameters or buffers as arrays of their own."""
    return {name: torch_to_jax(t.detach(), copy=True) for name, t in named}


def close(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Two leaves, or two dicts of them, of either framework: precision, shape and numbers."""
    if isinstance(expected, dict):
        assert set(got) == set(expected)  # JAX sorts them
        for name in expected:
            close(got[name], expected[name], tolerance)
        return
    a, b = numpy_of(got), numpy_of(expected)
    assert a.shape == b.shape
    assert a.dtype.kind == b.dtype.kind
    assert a.dtype.kind in "iu" or str(got.dtype).split(".")[-1] == str(expected.dtype).split(".")[-1]
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def parts(tree: Any) -> dict[Any, Any] | None:
    """What a container holds, registered or not; None of a leaf."""
    if isinstance(tree, dict):
        return dict(tree)
    if isinstance(tree, tuple | list):
        return dict(enumerate(tree))
    return vars(tree) if dataclasses.is_dataclass(tree) and not isinstance(tree, type) else None


def leaves(tree: Any) -> Iterator[Any]:
    """The arrays or tensors of a result."""
    below = parts(tree)
    if below is not None:
        for part in below.values():
            yield from leaves(part)
    elif isinstance(tree, torch.Tensor | jax.Array):
        yield tree


def same(got: Any, expected: Any) -> None:
    """Arrays for tensors, and everything else as it is, in the same containers."""
    below = parts(expected)
    if below is not None:
        assert type(got) is type(expected)
        found = parts(got)
        assert found is not None
        assert list(found) == list(below)
        for name, part in below.items():
            same(found[name], part)
    elif isinstance(expected, torch.Tensor):
        assert isinstance(got, jax.Array)
        close(got, expected)
    else:
        assert type(got) is type(expected)
        assert got == expected


def native_gradient(module: nn.Module, out: Any) -> dict[str, torch.Tensor]:
    """Of every parameter, in JAX's convention."""
    names, params = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad(TORCH.total(list(leaves(out))), params, materialize_grads=True)
    return {name: grad.conj() for name, grad in zip(names, grads, strict=True)}


def agrees(module: nn.Module, /, *args: Any, **kwargs: Any) -> None:
    """Value and gradient, eagerly and compiled, are those of the module itself; which nothing is done to."""
    given, named = jax_to_torch((args, kwargs), copy=True)
    expected = module(*given, **named)
    grads = native_gradient(module, expected)
    before = everything(module)

    apply, params = make_functional(module)
    loss = lambda p: JAX.total(list(leaves(apply(p, *args, **kwargs))))
    same(apply(params, *args, **kwargs), expected)
    for out, wanted in zip(
        jax.jit(lambda p: list(leaves(apply(p, *args, **kwargs))))(params), leaves(expected), strict=True
    ):
        close(out, wanted)
    for gradient in (jax.grad(loss), jax.jit(jax.grad(loss))):
        close(gradient(params), grads)
    assert everything(module) == before


def everything(module: nn.Module) -> dict[str, Any]:
    """All there is to a module: parts, modes, hooks and attributes; identity, version, value and gradient of tensors."""
    return {
        path: {name: described(value) for name, value in vars(part).items()}
        for path, part in module.named_modules(remove_duplicate=False)
    }


def described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        values = str(value.shape) if value.is_meta else str(value.tolist())
        grad = str(value.grad) if value.is_leaf else ""
        return id(value), type(value), 0 if value.is_inference() else value._version, value.requires_grad, values, grad
    if isinstance(value, dict):
        return id(value), [(key, described(part)) for key, part in value.items()]
    if isinstance(value, list | tuple | collections.deque):
        return id(value), [described(part) for part in value]
    if isinstance(value, types.SimpleNamespace):
        return id(value), described(vars(value))
    return (id(value), *sorted(map(str, value))) if isinstance(value, set) else value


# --- any signature ----------------------------------------------------------------------------------------------------


def layer(forward: Fn) -> nn.Module:
    """A linear layer of three features with a forward of its own."""
    return type("Layer", (nn.Linear,), {"forward": forward})(3, 3)


class Pair(NamedTuple):
    """A container with names."""

    left: Any
    right: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Batch:
    """A container that JAX knows."""

    inputs: Any
    weights: Any = None


@dataclasses.dataclass
class Plain:
    """A container that nobody knows."""

    inputs: Any
    label: str = "none"


class Mode(enum.Enum):
    """How to reduce."""

    SUM = "sum"
    MEAN = "mean"


def run(self: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(linear(x, self.weight, self.bias))


tokens = jnp.array([0, 2, 1, 2])
mask = jnp.array([True, False, True, True])

CALLS: dict[str, tuple[Fn, tuple[Any, ...], dict[str, Any]]] = {
    "one argument": (run, (x,), {}),
    "by keyword": (run, (), {"x": x}),
    "default": (lambda self, x, scale=2.0: run(self, x) * scale, (x,), {}),
    "default replaced": (lambda self, x, scale=2.0: run(self, x) * scale, (x,), {"scale": 3.0}),
    "default replaced by an array": (lambda self, x, scale=2.0: run(self, x) * scale, (x, jnp.ones(3)), {}),
    "keyword only": (lambda self, x, *, scale=2.0, shift: run(self, x) * scale + shift, (x,), {"shift": x}),
    "positional only": (lambda self, x, /, scale: run(self, x) * scale, (x,), {"scale": 2}),
    "any number": (lambda self, *xs: sum(run(self, x) for x in xs), (x, 2 * x, 3 * x), {}),
    "any keyword": (lambda self, **named: {k: run(self, v) for k, v in named.items()}, (), {"b": x, "a": 2 * x}),
    "both": (lambda self, x, *xs, **named: run(self, x) + sum(xs) * named["w"], (x, x, x), {"w": 2 * x}),
    "an argument called params": (lambda self, params, x: run(self, x) * params["w"], ({"w": x}, x), {}),
    "an argument called params, by keyword": (lambda self, params, x: run(self, x) * params, (), {"params": 2.0, "x": x}),
    "an argument called module": (lambda self, module: run(self, module), (), {"module": x}),
    "none given": (lambda self, x, mask=None: run(self, x) if mask is None else x * mask, (x, None), {}),
    "a string": (lambda self, x, mode: getattr(run(self, x), mode)(0), (x, "sum"), {}),
    "an enum": (lambda self, x, mode: run(self, x).sum() if mode is Mode.SUM else x, (x,), {"mode": Mode.SUM}),
    "a bool": (lambda self, x, flag: (run(self, x), flag is True), (x, True), {}),
    "an int": (lambda self, x, n: run(self, x).repeat(n, 1), (x, 2), {}),
    "a dtype of torch": (lambda self, x, dtype: run(self, x).to(dtype), (x, torch.bfloat16), {}),
    "integers": (lambda self, ids: (run(self, self.weight[ids]), ids), (tokens,), {}),
    "a mask": (lambda self, x, mask: run(self, x).masked_fill(~mask[:, None], 0.5), (x, mask), {}),
    "nested in": (
        lambda self, tree, *, extra: run(self, tree["a"][0]) * tree["b"]["c"][1] + extra[0],
        ({"a": [x, None], "b": {"c": (None, 2 * x)}},), {"extra": [x, "word", 3]},
    ),
    "nested out": (lambda self, x: {"a": [run(self, x), None], 3: ({"c": (x, "word", 2.5)},)}, (x,), {}),
    "a named tuple": (lambda self, p: Pair(run(self, p.left), p), (Pair(x, 2 * x),), {}),
    "a registered dataclass": (lambda self, b: Batch(run(self, b.inputs), b.weights), (Batch(x, 2 * x),), {}),
    "a plain dataclass": (lambda self, b: Plain(run(self, b.inputs), b.label), (Plain(x, "yes"),), {}),
    "an ordered dict": (lambda self, d: collections.OrderedDict(z=run(self, d["z"]), a=d["a"]), (collections.OrderedDict(z=x, a=x),), {}),
    "a model output": (lambda self, x: BaseModelOutput(last_hidden_state=run(self, x), hidden_states=(x, run(self, 2 * x))), (x,), {}),
    "a model output as a tuple": (lambda self, x, return_dict: (run(self, x), (x,)) if return_dict is False else x, (x,), {"return_dict": False}),
    "what torch returns of a maximum": (lambda self, x: run(self, x).max(1), (x,), {}),
    "an argument as it is": (lambda self, x: (run(self, x), x, x), (x,), {}),
    "without arguments": (lambda self: run(self, self.weight), (), {}),
    "beside integers": (lambda self, x: (run(self, x), run(self, x).argmax(1), x > 0), (x,), {}),
}  # fmt: skip


@pytest.mark.parametrize(("forward", "args", "kwargs"), CALLS.values(), ids=CALLS)
def test_any_forward(forward: Fn, args: Any, kwargs: Any) -> None:
    agrees(layer(forward), *args, **kwargs)


class Hinted(nn.Linear):
    """A forward with all kinds of parameters."""

    def forward(
        self, x: torch.Tensor, /, scale: float = 2.0, *rest: torch.Tensor, key_bias: bool = True
    ) -> torch.Tensor:
        return super().forward(x) * scale


def test_the_signature_is_that_of_forward_after_the_parameters() -> None:
    apply, _ = make_functional(Hinted(3, 3))
    signature = inspect.signature(apply)
    assert list(signature.parameters) == ["params", "x", "scale", "rest", "key_bias"]
    assert signature.parameters["params"].kind is inspect.Parameter.POSITIONAL_ONLY
    assert signature.parameters["scale"].default == 2.0
    assert signature.parameters["key_bias"].kind is inspect.Parameter.KEYWORD_ONLY
    keyed = inspect.signature(make_functional(nn.Dropout(), rng="key")[0])
    assert list(keyed.parameters) == ["params", "input", "key"]


WRONG_CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "nothing": ((), {}, "params"),
    "too few": (({},), {}, "missing 1 required positional argument: 'input'"),
    "too many": (({}, x, x), {}, "too many positional arguments|takes .* positional arguments"),
    "unknown": (({}, x), {"scale": 2}, "unexpected keyword argument 'scale'"),
    "twice": (({}, x), {"input": x}, "multiple values for argument 'input'"),
}


@pytest.mark.parametrize(("args", "kwargs", "message"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_a_wrong_call_fails_as_python_fails(args: Any, kwargs: Any, message: str) -> None:
    apply, _ = make_functional(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=rf"Linear\(\).*({message})"):
        apply(*args, **kwargs)


# --- the parameters are an ordinary dict ------------------------------------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1))


y = jnp.sin(x.sum(1, keepdims=True))


def test_the_parameters_are_a_dict_of_arrays_by_name() -> None:
    module = mlp()
    _, params = make_functional(module)
    assert type(params) is dict
    assert list(params) == [name for name, _ in module.named_parameters()]
    assert all(isinstance(p, jax.Array) for p in params.values())
    close(params, dict(module.named_parameters()), 0)


def test_they_are_copies_both_ways() -> None:
    """Whatever becomes of the module, by an optimiser or by hand, or of what is written back."""
    module = mlp()
    apply, params = make_functional(module)
    kept, out = jax.tree.map(np.array, params), np.array(apply(params, x))
    optimiser = torch.optim.SGD(module.parameters(), 1.0)
    module(tensor(x)).sum().backward()
    optimiser.step()
    with torch.no_grad():
        module[0].weight.fill_(7)
    np.testing.assert_allclose(apply(params, x), out, rtol=1e-6)

    module.load_state_dict(jax_to_torch(params), strict=False)
    close(module(tensor(x)), out)
    optimiser.step()
    assert all(np.array_equal(params[name], kept[name]) for name in kept)


OPTIMISERS: dict[str, tuple[Any, Callable[[Any], torch.optim.Optimizer]]] = {
    "adam": (optax.adam(1e-2), lambda p: torch.optim.Adam(p, 1e-2)),
    "momentum": (optax.sgd(1e-2, momentum=0.9, nesterov=True), lambda p: torch.optim.SGD(p, 1e-2, 0.9, nesterov=True)),
    "decay": (optax.adamw(1e-2, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1)),
}


def natively_trained(module: nn.Module, optimiser: torch.optim.Optimizer, steps: int = 10) -> list[float]:
    """The losses of the steps; the module itself is trained."""
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = ((module(tensor(x)) - tensor(y)) ** 2).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def squared(apply: Fn) -> Fn:
    return lambda params: ((apply(params, x) - y) ** 2).mean()


@pytest.mark.parametrize(("optimiser", "native"), OPTIMISERS.values(), ids=OPTIMISERS)
def test_ten_steps_of_optax_are_ten_steps_of_torch(optimiser: Any, native: Fn) -> None:
    """And neither training shows in the other."""
    module = mlp()
    apply, params = make_functional(module)
    before = everything(module)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        loss, grads = jax.value_and_grad(squared(apply))(params)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimiser.init(params), []
    for _ in range(10):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert everything(module) == before

    np.testing.assert_allclose(losses, natively_trained(module, native(module.parameters())), rtol=1e-5)
    close(params, dict(module.named_parameters()))


def test_frozen_parameters_stay_with_one_line_of_optax() -> None:
    """They are parameters like the others, with gradients of their own; what to train is the host's choice."""
    module = mlp()
    module[0].requires_grad_(False)
    apply, params = make_functional(module)
    assert list(params) == [name for name, _ in module.named_parameters()]
    assert float(jnp.abs(jax.grad(squared(apply))(params)["0.weight"]).max()) > 1e-3

    labels = {name: "train" if p.requires_grad else "freeze" for name, p in module.named_parameters()}
    optimiser = optax.multi_transform({"train": optax.adam(1e-2), "freeze": optax.set_to_zero()}, labels)
    state, gradient = optimiser.init(params), jax.jit(jax.grad(squared(apply)))
    for _ in range(10):
        updates, state = optimiser.update(gradient(params), state)
        params = optax.apply_updates(params, updates)

    natively_trained(module, torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 1e-2))
    close(params, dict(module.named_parameters()))


def test_a_train_state_of_flax() -> None:
    """Its parameters may be a frozen dict."""
    module = mlp()
    apply, params = make_functional(module)

    @jax.jit
    def step(state: TrainState) -> TrainState:
        grads = jax.grad(lambda p: ((state.apply_fn(p, x) - y) ** 2).mean())(state.params)
        return state.apply_gradients(grads=grads)

    trained = []
    for kind in (dict, flax.core.freeze):
        state = TrainState.create(apply_fn=apply, params=kind(params), tx=optax.adam(1e-2))
        for _ in range(10):
            state = step(state)
        assert type(state.params) is type(kind(params))
        trained.append(dict(state.params))

    natively_trained(module, torch.optim.Adam(module.parameters(), 1e-2))
    for found in trained:
        close(found, dict(module.named_parameters()))


class Hybrid(eqx.Module):
    """A layer of JAX on top of a network of torch, whose parameters are leaves like its own."""

    body: dict[str, jax.Array]
    head: eqx.nn.Linear
    apply: Fn = eqx.field(static=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.vmap(self.head)(self.apply(self.body, x))


def test_a_model_of_equinox_with_a_part_of_torch() -> None:
    module = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
    apply, params = make_functional(module)
    model = Hybrid(params, eqx.nn.Linear(8, 1, key=jax.random.key(0)), apply)
    loss = lambda model: ((model(x) - y) ** 2).mean()
    value, grads = eqx.filter_value_and_grad(loss)(model)
    jitted, again = eqx.filter_jit(eqx.filter_value_and_grad(loss))(model)

    head = nn.Linear(8, 1)
    head.load_state_dict({"weight": tensor(model.head.weight), "bias": tensor(model.head.bias)})
    expected = ((head(module(tensor(x))) - tensor(y)) ** 2).mean()
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-6) == pytest.approx(float(jitted), rel=1e-6)
    for found in (grads, again):
        close(found.body, {name: p.grad for name, p in module.named_parameters()})
        close(found.head.weight, head.weight.grad)


def test_what_jax_does_with_a_dict() -> None:
    module = mlp()
    apply, params = make_functional(module)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    assert paths == [f"['{name}']" for name in sorted(params)]
    doubled = apply(jax.tree.map(lambda p: 2 * p, params), x)
    vector, unravel = jax.flatten_util.ravel_pytree(params)
    slope = jax.grad(lambda v: squared(apply)(unravel(v)))(vector)
    close(unravel(slope)["2.weight"], jax.grad(squared(apply))(params)["2.weight"], 1e-6)

    with torch.no_grad():
        for p in module.parameters():
            p *= 2
    close(doubled, module(tensor(x)))


def test_an_ensemble_is_a_stack_of_parameters() -> None:
    modules = [mlp() for _ in range(3)]
    apply, _ = make_functional(modules[0])
    stacked = jax.tree.map(lambda *ps: jnp.stack(ps), *(make_functional(m)[1] for m in modules))
    for over in (jax.vmap(apply, (0, None)), jax.jit(jax.vmap(apply, (0, None)))):
        close(over(stacked, x), torch.stack([m(tensor(x)) for m in modules]))
    slopes = jax.jit(jax.vmap(jax.grad(squared(apply))))(stacked)
    for i, module in enumerate(modules):
        ((module(tensor(x)) - tensor(y)) ** 2).mean().backward()
        close(
            {n: slopes[n][i] for n, _ in module.named_parameters()}, {n: p.grad for n, p in module.named_parameters()}
        )


def test_parameters_that_are_given_away() -> None:
    """The step may have their memory; the module's own is another."""
    module = mlp()
    apply, params = make_functional(module)
    before = everything(module)
    expected = jax.tree.map(lambda p, g: np.array(p - 0.1 * g), params, jax.grad(squared(apply))(params))
    descend = lambda p: jax.tree.map(lambda p, g: p - 0.1 * g, p, jax.grad(squared(apply))(p))
    new = jax.jit(descend, donate_argnums=0)(params)
    assert all(p.is_deleted() for p in params.values())
    for name, p in new.items():
        np.testing.assert_allclose(p, expected[name], rtol=1e-5, atol=1e-6)
    assert everything(module) == before


def test_a_checkpoint_of_jax_computes_again() -> None:
    module = mlp()
    apply, params = make_functional(module)
    expected = jax.grad(squared(apply))(params)
    for found in (
        jax.grad(squared(jax.checkpoint(apply)))(params),
        jax.jit(jax.grad(squared(jax.checkpoint(apply))))(params),
    ):
        close(found, expected, 1e-6)


def test_parameters_in_a_file(tmp_path: Path) -> None:
    """As numpy reads them."""
    apply, params = make_functional(mlp())
    np.savez(tmp_path / "params.npz", **params)
    with np.load(tmp_path / "params.npz") as file:
        loaded = dict(file)
    for call in (apply, jax.jit(apply)):
        np.testing.assert_allclose(call(loaded, x), apply(params, x), rtol=1e-6)
    grads = jax.grad(squared(apply))(loaded)
    close(grads, jax.grad(squared(apply))(params), 1e-6)


MAPPINGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "ordered": collections.OrderedDict,
    "frozen": flax.core.freeze,
    "in another order": lambda p: dict(reversed(p.items())),
    "numpy": lambda p: jax.tree.map(np.asarray, p),
    "tensors": jax_to_torch,
}


@pytest.mark.parametrize("make", MAPPINGS.values(), ids=MAPPINGS)
def test_any_mapping_of_values(make: Fn) -> None:
    module = mlp()
    apply, params = make_functional(module)
    close(apply(make(params), x), module(tensor(x)))
    close(jax.jit(lambda x: apply(make(params), x))(x), module(tensor(x)))


# --- dtypes -----------------------------------------------------------------------------------------------------------

DTYPES: dict[str, tuple[torch.dtype, float]] = {
    "float32": (torch.float32, 1e-5),
    "bfloat16": (torch.bfloat16, 1e-2),
    "float16": (torch.float16, 2e-3),
    "complex64": (torch.complex64, 1e-5),
    "float64": (torch.float64, 1e-12),
    "complex128": (torch.complex128, 1e-12),
}
WIDE = ("float64", "complex128")


@pytest.mark.parametrize("name", DTYPES)
def test_a_module_of_any_dtype(name: str) -> None:
    """Parameters, results and gradients have the module's; a complex gradient is the conjugate of torch's."""
    dtype, tolerance = DTYPES[name]
    module = nn.Linear(3, 2, dtype=dtype)
    with jax.enable_x64(name in WIDE):
        apply, params = make_functional(module)
        close(params, dict(module.named_parameters()), 0)
        given = jnp.asarray(np.asarray(x), name)
        expected = module(tensor(given))
        grads = native_gradient(module, expected)
        loss = lambda p: JAX.total([apply(p, given)])
        for call, gradient in ((apply, jax.grad(loss)), (jax.jit(apply), jax.jit(jax.grad(loss)))):
            close(call(params, given), expected, tolerance)
            close(gradient(params), grads, tolerance)


class Several(nn.Module):
    """Parameters of several dtypes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
        self.single = nn.Parameter(torch.randn(3))
        self.phase = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.bits = nn.Parameter(torch.tensor([1, 0, 3], dtype=torch.uint8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.low.float() + (self.phase * self.single).abs() * self.bits


def test_a_module_of_several_dtypes() -> None:
    module = Several()
    apply, params = make_functional(module)
    close(params, dict(module.named_parameters()), 0)
    expected = module(tensor(x))
    wanted = torch.autograd.grad(TORCH.total([expected]), [module.low, module.single, module.phase])
    loss = lambda p: JAX.total([apply(p, x)])
    for wrap in (lambda f: f, jax.jit):
        close(wrap(apply)(params, x), expected)
        grads = wrap(jax.grad(loss, allow_int=True))(params)
        assert grads["bits"].dtype == jax.dtypes.float0
        for name, grad in zip(("low", "single", "phase"), wanted, strict=True):
            close(grads[name], grad.conj(), 1e-2 if name == "low" else 1e-5)


def test_parameters_cast_by_the_host() -> None:
    """A lower precision is the host's choice too: the module computes in it."""
    module = mlp()
    apply, params = make_functional(module)
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    out = apply(low, x.astype(jnp.bfloat16))
    close(out, copy.deepcopy(module).bfloat16()(tensor(x).bfloat16()), 1e-2)


@pytest.mark.parametrize("name", WIDE)
def test_64_bits_that_jax_does_not_keep(name: str) -> None:
    """Neither narrowed in silence, nor with a warning."""
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, dtype=DTYPES[name][0]))
    for make in (make_functional, torch_to_jax, torch_module_to_jax):
        with pytest.raises(interop.PrecisionError, match=r"(?s)1\.weight.*(jax_enable_x64|\.float\(\))"):
            make(module)


# --- tied parameters --------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding that is also the last layer, as language models have it; and a layer used under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.first = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.again = self.first

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.again(torch.tanh(self.first(self.embed(ids))))))


def test_tied_weights_appear_once_and_their_gradient_is_the_sum() -> None:
    module = Tied()
    _, params = make_functional(module)
    assert list(params) == ["embed.weight", "first.weight", "first.bias"]
    agrees(module, tokens)


def test_tied_weights_stay_tied_in_training_and_when_written_back() -> None:
    """`load_state_dict` writes to the one parameter, whatever it is called."""
    module = Tied()
    twin = copy.deepcopy(module)
    apply, params = make_functional(module)
    optimiser = optax.adam(1e-2)
    loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(apply(p, tokens), tokens).mean()
    state, gradient = optimiser.init(params), jax.jit(jax.grad(loss))
    native = torch.optim.Adam(twin.parameters(), 1e-2)
    for _ in range(10):
        updates, state = optimiser.update(gradient(params), state)
        params = optax.apply_updates(params, updates)
        native.zero_grad()
        cross_entropy(twin(tensor(tokens).long()), tensor(tokens).long()).backward()
        native.step()

    keys = module.load_state_dict(jax_to_torch(params), strict=False)
    assert keys.unexpected_keys == []
    assert keys.missing_keys == ["head.weight", "again.weight", "again.bias"]
    assert module.head.weight is module.embed.weight
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        close(p, q)
    close(apply(params, tokens), module(tensor(tokens)))


def test_a_tied_weight_under_its_other_name() -> None:
    module = Tied()
    apply, params = make_functional(module)
    renamed = {name.replace("embed.weight", "head.weight"): p for name, p in params.items()}
    close(apply(renamed, tokens), module(tensor(tokens)))


def test_a_tied_weight_under_both_names_is_refused() -> None:
    """Whichever counted, the other would be lost."""
    apply, params = make_functional(Tied())
    both = {**params, "head.weight": params["embed.weight"]}
    for ask in (apply, jax.jit(apply), lambda p, x: jax.grad(lambda p: apply(p, x).sum())(p)):
        with pytest.raises(interop.LeafError, match=r"(?s)embed\.weight.*head\.weight|head\.weight.*embed\.weight"):
            ask(both, tokens)


# --- buffers ----------------------------------------------------------------------------------------------------------


class Holds(nn.Module):
    """Buffers of every kind, all of which its output depends on, and none of which it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))
        self.register_buffer("shift", torch.ones(3), persistent=False)
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.register_buffer("keep", torch.tensor([True, False, True]))
        self.register_buffer("nothing", None)
        self.inner = nn.Module()
        self.inner.register_buffer("table", torch.arange(6.0).reshape(2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x[:, self.order] * self.weight * self.scale + self.shift
        return torch.where(self.keep, y, self.inner.table[1]) if self.nothing is None else x


def test_buffers_are_constants() -> None:
    module = Holds()
    _, params = make_functional(module)
    assert list(params) == ["weight"]
    agrees(module, x)


OTHER_BUFFERS: dict[str, Any] = {
    "scale": jnp.array([3.0, -1.0, 0.5]),
    "shift": jnp.zeros(3),
    "order": jnp.array([1, 2, 0]),
    "keep": jnp.array([False, True, True]),
    "inner.table": jnp.ones((2, 3)),
}


@pytest.mark.parametrize("names", [[name] for name in OTHER_BUFFERS] + [list(OTHER_BUFFERS)], ids=", ".join)
def test_a_buffer_that_is_given_is_an_input(names: list[str]) -> None:
    """Persistent or not, of floats, integers or bools; what is not given is the module's own. A float has a gradient."""
    module, twin = Holds(), Holds()
    apply, params = make_functional(module)
    given = {name: OTHER_BUFFERS[name] for name in names}
    before = everything(module)
    twin.load_state_dict(module.state_dict())
    for name, value in given.items():
        path, _, last = name.rpartition(".")
        setattr(twin.get_submodule(path), last, tensor(value).to(dict(twin.named_buffers())[name].dtype))
    floats = {n: b.requires_grad_() for n, b in twin.named_buffers() if n in given and b.is_floating_point()}
    expected = twin(tensor(x))
    wanted = torch.autograd.grad(TORCH.total([expected]), [*floats.values(), twin.weight], materialize_grads=True)
    loss = lambda part, rest: JAX.total([apply({**part, **rest}, x)])
    inexact = {**{name: given[name] for name in floats}, **params}
    others = {name: value for name, value in given.items() if name not in floats}
    for wrap in (lambda f: f, jax.jit):
        close(wrap(apply)({**params, **given}, x), expected)
        grads = wrap(jax.grad(loss))(inexact, others)
        for name, grad in zip(inexact, wanted, strict=True):
            close(grads[name], grad)
    assert everything(module) == before


def test_a_mutable_module_returns_its_buffers_by_name() -> None:
    """All of them, under one name each; one that is None is none. Those in the mapping come first."""
    module = nn.ModuleDict({"a": nn.BatchNorm1d(3), "b": Holds()})
    module["again"] = module["a"]
    module.forward = lambda x: x
    apply, params = make_functional(module, mutable=True)
    assert not any("running" in name for name in params)
    _, buffers = apply(params, x)
    assert set(buffers) == {name for name, _ in module.named_buffers()}
    out, buffers = jax.jit(apply)({**params, "b.scale": jnp.zeros(3)}, x)
    assert out.tolist() == x.tolist()
    assert buffers["b.scale"].tolist() == [0, 0, 0]
    assert buffers["b.shift"].tolist() == [1, 1, 1]


def test_buffers_are_written_back_with_the_parameters() -> None:
    """The dict is complete: a strict load takes it. An integer has the buffer's width there."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    apply, params = make_functional(module, mutable=True)
    _, buffers = jax.jit(apply)(params, x)
    twin = copy.deepcopy(module)
    twin(tensor(x))
    module.load_state_dict(jax_to_torch({**params, **buffers}))
    assert module[1].num_batches_tracked.dtype is torch.int64
    close(dict(module.named_buffers()), dict(twin.named_buffers()), 1e-6)
    module.eval()
    twin.eval()
    close(make_functional(module)[0](params, x), twin(tensor(x)))


class Cache(nn.Module):
    """A buffer that is None at first, and longer after each call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("seen", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x if self.seen is None else torch.cat([self.seen, x])
        return self.layer(self.seen)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_buffer_that_grows(wrap: Fn) -> None:
    module = Cache()
    before, (apply, params) = everything(module), make_functional(module, mutable=True)
    outs, buffers = [], {}
    for _ in range(3):
        out, buffers = wrap(apply)({**params, **buffers}, x)
        outs.append(out)
    assert everything(module) == before
    for out in outs:
        close(out, module(tensor(x)))
    close(buffers["seen"], module.seen)


# --- training with state and randomness -------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Batch statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        # A bias before a normalisation has a gradient of rounding errors, which Adam makes large.
        self.first, self.norm = nn.Linear(3, 16, bias=False), nn.BatchNorm1d(16)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(torch.relu(self.norm(self.first(x)))))


@pytest.mark.parametrize("how", ["eager", "jit", "scan"])
def test_a_network_with_statistics_and_dropout_trains_as_in_torch(how: str) -> None:
    """The same masks, from a key a step; each step counts once. Then the module has learnt what its twin has."""
    module = Noisy()
    twin, before = copy.deepcopy(module), everything(module)
    apply, params = make_functional(module, rng="key", mutable=True)
    buffers, optimiser = arrays(module.named_buffers()), optax.adam(1e-2)
    xs = jnp.asarray(np.random.default_rng(1).normal(size=(10, 32, 3)), jnp.float32)
    keys = jax.random.split(jax.random.key(5), 10)

    def step(carry: Any, now: Any) -> Any:
        params, buffers, state = carry
        x, key = now

        def loss(params: Any) -> Any:
            out, new = apply({**params, **buffers}, x, key=key)
            return ((out - x.sum(1, keepdims=True)) ** 2).mean(), new

        (value, buffers), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimiser.update(grads, state)
        return (optax.apply_updates(params, updates), buffers, state), value

    carry, losses = (params, buffers, optimiser.init(params)), []
    if how == "scan":
        carry, losses = jax.jit(lambda carry: jax.lax.scan(step, carry, (xs, keys)))(carry)
    else:
        run = jax.jit(step) if how == "jit" else step
        for now in zip(xs, keys, strict=True):
            carry, value = run(carry, now)
            losses.append(value)
    assert everything(module) == before

    native = torch.optim.Adam(twin.parameters(), 1e-2)
    for data, key, value in zip(xs, keys, losses, strict=True):
        native.zero_grad()
        with seeding(tensor(jax.random.key_data(key))):
            loss = ((twin(tensor(data)) - tensor(data).sum(1, keepdim=True)) ** 2).mean()
        loss.backward()
        native.step()
        assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    params, buffers, _ = carry
    module.load_state_dict(jax_to_torch({**params, **buffers}))
    assert int(module.norm.num_batches_tracked) == 10
    for name, value in module.state_dict().items():
        close(value, twin.state_dict()[name])
    close(make_functional(module.eval())[0](params, xs[0]), twin.eval()(tensor(xs[0])))


def test_dropout_is_off_once_the_module_is_evaluated() -> None:
    """The function stays the same, and still takes a key."""
    module = Noisy()
    apply, params = make_functional(module, rng="key")
    module.eval()
    for call in (apply, jax.jit(apply)):
        close(call(params, x, key=jax.random.key(0)), module(tensor(x)))


class Autoencoder(nn.Module):
    """A variational one: it samples, and compares distributions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 4), nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_scale = self.encoder(x).chunk(2, -1)
        posterior = torch.distributions.Normal(mean, log_scale.exp())
        prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        return self.decoder(posterior.rsample()), torch.distributions.kl_divergence(posterior, prior).sum(-1)


def test_a_model_that_samples() -> None:
    module, key = Autoencoder(), jax.random.key(3)
    apply, params = make_functional(module, rng="key")
    with seeding(tensor(jax.random.key_data(key))):
        expected = module(tensor(x))
    grads = native_gradient(module, expected)
    loss = lambda p: JAX.total(list(apply(p, x, key=key)))
    for wrap in (lambda f: f, jax.jit):
        same(wrap(apply)(params, x, key=key), expected)
        close(wrap(jax.grad(loss))(params), grads)


# --- hooks and parametrizations ---------------------------------------------------------------------------------------


def twice(_module: nn.Module, before: Any, _after: Any = None) -> Any:
    """What a hook of the backward is given, doubled."""
    return tuple(None if g is None else 2 * g for g in before)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m[0].register_forward_hook(lambda part, args, out: out * part.weight.sum()),
    "forward of the root": lambda m: m.register_forward_hook(lambda part, args, out: out + part[0].bias),
    "forward with keywords": lambda m: m.register_forward_hook(
        lambda part, args, kwargs, out: out * 3, with_kwargs=True
    ),
    "before forward": lambda m: m[1].register_forward_pre_hook(lambda part, args: (args[0] * part.weight.sum(),)),
    "before forward with keywords": lambda m: m.register_forward_pre_hook(
        lambda part, args, kwargs: ((2 * args[0],), kwargs), with_kwargs=True
    ),
    "backward": lambda m: m[1].register_full_backward_hook(twice),
    "before backward": lambda m: m[1].register_full_backward_pre_hook(lambda part, grads: (3 * grads[0],)),
    "of every module": lambda m: nn.modules.module.register_module_forward_hook(
        lambda part, args, out: out * 2 if isinstance(part, nn.Linear) else None
    ),
}


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_hooks_run(register: Fn) -> None:
    """Whatever they change; they see the weights that are given."""
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    handle = register(module)
    try:
        agrees(module, x)
    finally:
        handle.remove()


def test_a_hook_of_a_parameter_is_not_lost() -> None:
    """It changes the gradient; or the parameter is refused by name."""
    module = nn.Linear(3, 3)
    module.weight.register_hook(lambda g: 2 * g)
    try:
        agrees(module, x)
    except interop.InteropError as error:
        assert "weight" in str(error)


def test_a_hook_can_be_removed() -> None:
    """It is the module that says which there are, at each trace."""
    module = nn.Linear(3, 3)
    apply, params = make_functional(module)
    plain = apply(params, x)
    handle = module.register_forward_hook(lambda part, args, out: out * 2)
    close(apply(params, x), 2 * plain)
    handle.remove()
    close(apply(params, x), plain)


class Symmetric(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return self.scale * (w.triu() + w.triu(1).mT)


def symmetric() -> nn.Module:
    module = nn.Linear(3, 3)
    parametrize.register_parametrization(module, "weight", Symmetric())
    return module


PARAMETRIZED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "of ones own": (symmetric, "parametrizations.weight.0.scale"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(3, 3)), "parametrizations.weight.original"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), "parametrizations.weight.original0"),
    "weight norm, by hooks": (lambda: nn.utils.weight_norm(nn.Linear(3, 3)), "weight_g"),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(3, 3)).eval(), "parametrizations.weight.original"),
    "spectral norm, by hooks": (lambda: nn.utils.spectral_norm(nn.Linear(3, 3)).eval(), "weight_orig"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(("make", "name"), PARAMETRIZED.values(), ids=PARAMETRIZED)
def test_parametrizations_are_of_the_weights_that_are_given(make: Fn, name: str) -> None:
    module = make()
    assert name in make_functional(module)[1]
    agrees(module, x)


def test_a_spectral_norm_by_hooks_takes_its_steps() -> None:
    """It keeps its vectors in buffers, and the weight that it makes in an attribute."""
    module = nn.utils.spectral_norm(nn.Linear(3, 3))
    before, (apply, params) = everything(module), make_functional(module, mutable=True)
    buffers = arrays(module.named_buffers())
    step = jax.jit(lambda buffers: apply({**params, **buffers}, x))
    outs = []
    for _ in range(3):
        out, buffers = step(buffers)
        outs.append(out)
    assert everything(module) == before
    with pytest.raises(interop.UnsupportedError, match=r"weight_u.*mutable=True"):
        make_functional(module)[0](params, x)
    for out in outs:
        close(out, module(tensor(x)))
    close(buffers, dict(module.named_buffers()))


def test_a_cached_parametrization_is_that_of_the_weights_of_the_call() -> None:
    """torch keeps it by the identity of the module that asks."""
    apply, params = make_functional(symmetric())
    many = [jax.tree.map(lambda p, k=k: k * p, params) for k in range(1, 9)]
    expected = [apply(p, x).tolist() for p in many]
    with parametrize.cached():
        assert [apply(p, x).tolist() for p in many] == expected


# --- modules of all kinds ---------------------------------------------------------------------------------------------


class Slots(nn.Linear):
    """Attributes that are not in its `__dict__`, one of them never set."""

    __slots__ = ("never", "scale")

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.scale = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


class PrivateSlots(nn.Linear):
    """One that Python gives another name."""

    __slots__ = ("__scale",)

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.__scale = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.__scale


class Property(nn.Linear):
    """A weight that is computed when it is read."""

    def __init__(self) -> None:
        super().__init__(3, 3)

    @property
    def double(self) -> torch.Tensor:
        return 2 * self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.double, self.bias)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.a(x))

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(x)


def two(forward: Fn) -> Callable[[], nn.Module]:
    """Two layers under a forward of its own."""
    return lambda: type("Other", (Two,), {"forward": forward})()


class Lists(nn.Module):
    """Parameters in containers of torch's, and one of the module's own, which is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.ParameterList([torch.randn(3), torch.randn(3)])
        self.two = nn.ParameterDict({"up": torch.randn(3), "down": nn.ParameterList([torch.randn(3)])})
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.none = nn.Parameter(torch.randn(0, 3))
        self.register_parameter("missing", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for p in self.one:
            x = torch.sin(x * p)
        return (x * self.two["up"] + self.two["down"][0]) * self.gain + self.none.sum()


class Nested(nn.Module):
    """Modules in dicts of lists of dicts."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.ModuleDict({"if": nn.Linear(3, 3), "a-b c": nn.Linear(3, 3)})
        self.blocks = nn.ModuleDict({"größe": nn.ModuleList([inner, nn.Identity()]), "0": nn.Sequential()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.blocks["größe"]
        return self.blocks["0"](second(first["if"](x) * first["a-b c"](x)))


class Wrapper(nn.Module):
    """What it does not have, its module has: as libraries wrap models."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Two()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x)) * self.a.weight.sum()


class Guarded(nn.Linear):
    """Lets nothing be set once it is made."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.made = True

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("made"):
            raise AttributeError(name)
        super().__setattr__(name, value)


@dataclasses.dataclass(eq=False)
class Declared(nn.Module):
    """A module that is a dataclass."""

    width: int = 3

    def __post_init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(self.width, self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.width


class Teacher(Two):
    """Another network is kept out of torch's sight: it is no part of this one."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = [nn.Linear(3, 3).requires_grad_(False)]
        self.table = torch.arange(3.0)  # a constant that is no buffer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.teacher[0](x) + self.table


class Energy(Two):
    """A force: the derivative of its own output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = super().forward(x).square().sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]


class Expanded(nn.Module):
    """Parameters that are not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed = nn.Parameter(torch.randn(3, 3).T)
        self.last = nn.Parameter(torch.randn(1, 3, 2, 2).to(memory_format=torch.channels_last))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.transposed + self.last.sum((0, 2, 3))


class SelfTied(nn.Module):
    """One parameter, under two names of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.left = self.right = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.left) @ self.right


class Unpicklable(Two):
    """Nothing that it holds can be copied, but for its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.rows, self.shift = threading.Lock(), (i for i in range(3)), lambda x: x + 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            return self.shift(super().forward(x))


def with_inference_tensors() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(3, 3)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "slots": Slots,
    "private slots": PrivateSlots,
    "property": Property,
    "other methods": Two,
    "containers of parameters": Lists,
    "containers of modules": Nested,
    "attributes of another": Wrapper,
    "nothing can be set": Guarded,
    "dataclass": Declared,
    "a hidden module": Teacher,
    "derivative inside": Energy,
    "not contiguous": Expanded,
    "by name": two(lambda self, x: self._modules["b"](self.get_submodule("a")(x))),
    "by class": two(lambda self, x: nn.Linear.forward(self.b, torch.tanh(self.a.forward(x)))),
    "all children": two(lambda self, x: sum(part(x) for part in self.children())),
    "all parameters": two(lambda self, x: x * sum(p.square().sum() for p in self.parameters())),
    "parameters by name": two(lambda self, x: x @ dict(self.named_parameters())["a.weight"]),
    "a parameter by name": two(lambda self, x: x @ self.get_parameter("a.weight")),
    "parameters as such": two(lambda self, x: self.a(x) if isinstance(self.a.weight, nn.Parameter) else x),
    "dtype of its parameters": two(lambda self, x: self.b(x.to(next(self.parameters()).dtype))),
    "functional call": two(lambda self, x: torch.func.functional_call(self.a, dict(self.b.named_parameters()), x)),
    "vmap inside": two(lambda self, x: torch.vmap(lambda row: self.b(self.a(row)))(x)),
    "one parameter under two names": SelfTied,
    "what can't be pickled": Unpicklable,
    "a copy inside": two(lambda self, x: self.b(copy.copy(self.a)(x))),
}


PLAIN = "what stands for a parameter is a plain tensor"


@pytest.mark.parametrize("make", rows(KINDS))
def test_modules_of_all_kinds(make: Fn) -> None:
    module = make()
    assert list(make_functional(module)[1]) == [name for name, _ in module.named_parameters()]
    agrees(module, x)


EMBEDDINGS: dict[str, dict[str, Any]] = {"sparse gradient": {"sparse": True}, "renormalised": {"max_norm": 0.5}}


@pytest.mark.parametrize("options", rows(EMBEDDINGS))
def test_an_embedding(options: dict[str, Any]) -> None:
    """Its gradient is dense in JAX, and what it does to its weights is not done to the module's."""
    module = nn.Embedding(5, 3, **options)
    before, (apply, params) = everything(module), make_functional(module)
    grads = [wrap(jax.grad(lambda p: JAX.total([apply(p, tokens)])))(params) for wrap in (lambda f: f, jax.jit)]
    outs = [wrap(apply)(params, tokens) for wrap in (lambda f: f, jax.jit)]
    assert everything(module) == before
    expected = module(tensor(tokens))
    TORCH.total([expected]).backward()
    for out, grad in zip(outs, grads, strict=True):
        close(out, expected)
        close(grad["weight"], module.weight.grad.to_dense())


def test_a_module_made_for_inference() -> None:
    """Its tensors have no versions, and no gradients of their own; in JAX they are parameters like any other."""
    module = with_inference_tensors()
    before = everything(module)
    apply, params = make_functional(module)
    for wrap in (lambda f: f, jax.jit):
        close(wrap(apply)(params, x), module(tensor(x)))
        grads = wrap(jax.grad(lambda p: apply(p, x).sum()))(params)
        close(grads["weight"], jnp.broadcast_to(x.sum(0), (3, 3)))
    assert everything(module) == before


def test_a_module_without_parameters() -> None:
    apply, params = make_functional(nn.Sequential(nn.Flatten(), nn.Tanh()))
    assert params == {}
    slope = jax.grad(lambda x: apply(params, x).sum())
    for wrap in (lambda f: f, jax.jit):
        close(wrap(lambda x: apply(params, x))(x), torch.tanh(tensor(x)))
        close(wrap(slope)(x), 1 - torch.tanh(tensor(x)) ** 2)


class Returns(nn.Module):
    """Its own parameter and buffer, as they are and in part."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.register_buffer("table", torch.randn(3))

    def forward(self) -> tuple[torch.Tensor, ...]:
        return self.weight, self.weight[1:], self.table, self.table[:2], self.weight


def test_a_module_that_returns_its_own() -> None:
    """They are results like any other: what is done with the module, or with its parameters, does not show in them."""
    module = Returns()
    agrees(module)
    expected = [t.detach().numpy().copy() for t in module()]
    apply, params = make_functional(module)
    outs = [apply(params), jax.jit(apply)(params)]
    jax.jit(lambda p: jax.tree.map(lambda a: a * 0, p), donate_argnums=0)(params)
    with torch.no_grad():
        module.table.fill_(9)
        module.weight.fill_(9)
    for found in outs:
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


class Renamed(nn.Module):
    """Its state dict has other names than its parameters, and something extra."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self._register_state_dict_hook(
            lambda part, state, prefix, meta: collections.OrderedDict(old=state["layer.weight"])
        )

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 2}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"version": 2}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_names_are_those_of_the_parameters_whatever_the_state_dict_says() -> None:
    module = Renamed()
    assert list(module.state_dict()) == ["old"]
    assert list(make_functional(module)[1]) == ["layer.weight", "layer.bias"]
    agrees(module, x)


def test_a_compiled_module_is_the_module() -> None:
    """Compiled in place or not. It goes by the original's names, and writing back reaches both."""
    module = mlp()
    compiled = torch.compile(module, backend="eager")
    inplace = copy.deepcopy(module)
    inplace.compile(backend="eager")
    expected = module(tensor(x))
    for each in (compiled, inplace):
        apply, params = make_functional(each)
        close(params, dict(module.named_parameters()), 0)
        for wrap in (lambda f: f, jax.jit):
            close(wrap(apply)(params, x), expected)
            grads = wrap(jax.grad(lambda p, apply=apply: JAX.total([apply(p, x)])))(params)
            wanted = native_gradient(module, module(tensor(x)))
            close(grads, wanted)
    module.load_state_dict(jax_to_torch(jax.tree.map(jnp.zeros_like, params)))
    assert compiled(tensor(x)).tolist() == [[0.0]] * 4


# --- parts that are held in other ways --------------------------------------------------------------------------------


class Holder:
    """An object of the user's own."""

    def __init__(self, part: Any) -> None:
        self.part = part

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x)


KEPT: dict[str, Any] = {}  # by the module that uses them
HOLD: dict[str, tuple[Fn, Fn]] = {
    "named tuple": (lambda self: Pair(self.a, 1), lambda self, x: self.held.left(x)),
    "default dict": (lambda self: collections.defaultdict(list, a=[self.a]), lambda self, x: self.held["a"][0](x)),
    "queue": (lambda self: collections.deque([self.a]), lambda self, x: self.held[0](x)),
    "set": (lambda self: {self.a}, lambda self, x: next(iter(self.held))(x)),
    "frozen set": (lambda self: frozenset({self.a}), lambda self, x: next(iter(self.held))(x)),
    "keys of a dict": (lambda self: {self.a: 1}, lambda self, x: next(iter(self.held))(x)),
    "read-only dict": (lambda self: types.MappingProxyType({"a": self.a}), lambda self, x: self.held["a"](x)),
    "namespace": (lambda self: types.SimpleNamespace(part=self.a), lambda self, x: self.held.part(x)),
    "dataclass": (lambda self: Plain(self.a), lambda self, x: self.held.inputs(x)),
    "object": (lambda self: Holder(self.a), lambda self, x: self.held.part(x)),
    "list of an object": (lambda self: Holder([self.a]), lambda self, x: self.held.part[0](x)),
    "object that is called": (lambda self: Holder(self.a), lambda self, x: self.held(x)),
    "method of an object": (lambda self: Holder(self.a).run, lambda self, x: self.held(x)),
    "method of a part": (lambda self: self.a.forward, lambda self, x: self.held(x)),
    "weak reference": (lambda self: weakref.ref(self.a), lambda self, x: self.held()(x)),
    "weak proxy": (lambda self: weakref.proxy(self.a), lambda self, x: self.held.forward(x)),
    "default of a function": (lambda self: lambda x, part=self.a: part(x), lambda self, x: self.held(x)),
    "cached function": (lambda self: functools.lru_cache(self.a.forward), lambda self, x: self.held(x)),
    "class": (lambda self: setattr(type(self), "kept", [self.a]), lambda self, x: self.kept[0](x)),
    "global": (lambda self: KEPT.update(a=self.a), lambda self, x: KEPT["a"](x)),
    "view of a parameter": (lambda self: self.a.weight[:2], lambda self, x: x @ self.held.T),
    "what was computed": (lambda self: [self.a.weight * 2, self.a.weight * 3], lambda self, x: x @ self.held[1].T),
}  # fmt: skip


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", HOLD)
def test_a_part_that_is_held_elsewhere_never_computes_with_its_own_weights(name: str, wrap: Fn) -> None:
    """With those that are given, or it is refused by name."""
    hold, forward = HOLD[name]
    module = type("Holding", (Two,), {"forward": forward})()
    doubled = {name: 2 * p for name, p in arrays(module.named_parameters()).items()}
    module.held = hold(module)
    found: list[Any] = []
    for derive in (lambda f: f, lambda f: lambda p, x: jax.grad(lambda p: JAX.total([f(p, x)]))(p)["a.weight"]):
        try:
            found.append(wrap(derive(make_functional(module)[0]))(doubled, x))
        except interop.InteropError as error:
            assert "held" in str(error) or "a.weight" in str(error)
            found.append(None)

    module.held = None
    module.load_state_dict(jax_to_torch(doubled))
    module.held = hold(module)
    out = module(tensor(x))
    for one, expected in zip(found, (out, native_gradient(module, out)["a.weight"]), strict=True):
        if one is not None:
            close(one, expected)


class Draws(nn.Linear):
    """From a generator of its own."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.generator = torch.Generator()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * torch.rand(3, generator=self.generator)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_generator_of_the_modules_own(wrap: Any) -> None:
    """A key is all that counts; the generator stays where it was, and draws other numbers than torch's."""
    module = Draws()
    own, torchs = module.generator.get_state(), torch.get_rng_state()
    apply, params = make_functional(module, rng="key")
    draw = wrap(lambda key: apply(params, x, key=key))
    gradient = wrap(jax.grad(lambda w, key: apply({"weight": w, "bias": params["bias"]}, x, key=key).sum()))
    for _ in range(2):
        one, other = (draw(jax.random.key(seed)) for seed in (0, 1))
        close(one, apply(params, x, key=jax.random.key(0)))
        assert not jnp.allclose(one, other)
        scale = one / (x @ params["weight"].T + params["bias"])
        close(gradient(params["weight"], jax.random.key(0)), (scale[:, :, None] * x[:, None, :]).sum(0))
    numbers = as_jax(lambda x: (x, torch.rand(3), torch.rand(3, generator=module.generator)), rng="key")
    _, of_torch, of_module = wrap(jittable(numbers))(x, key=jax.random.key(0))
    assert not jnp.allclose(of_torch, of_module)
    assert torch.equal(module.generator.get_state(), own)
    assert torch.equal(torch.get_rng_state(), torchs)


def test_tracing_draws_nothing() -> None:
    """Of a kernel that says less than it keeps a trial is run."""
    apply, params = make_functional(nn.LSTM(3, 4, num_layers=2, dropout=0.5))
    before = torch.get_rng_state()
    jax.jit(jax.grad(lambda p: apply(p, jnp.ones((5, 3)))[0].sum())).lower(params)
    assert torch.equal(torch.get_rng_state(), before)


# --- the module stays as it is ----------------------------------------------------------------------------------------


class Remembers(nn.Module):
    """Everything that a forward may leave on its module, in the ways of its subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.last: Any = None
        self.calls = 0
        self.record: dict[str, Any] = {"inner": {"rows": []}}
        self.lists = collections.defaultdict(list)
        self.queue: collections.deque[Any] = collections.deque(maxlen=4)
        self.names: set[str] = set()
        self.object = types.SimpleNamespace(last=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer(x)
        self.leave(out)
        return out * 2


LEAVES: dict[str, Fn] = {
    "attribute": lambda self, out: setattr(self, "last", out),
    "new attribute": lambda self, out: setattr(self, "other", out),
    "counter": lambda self, out: setattr(self, "calls", self.calls + 1),
    "nested dict": lambda self, out: self.record["inner"]["rows"].append(out),
    "default dict": lambda self, out: self.lists["outs"].append(out),
    "queue": lambda self, out: self.queue.append(out),
    "set": lambda self, out: self.names.add("seen"),
    "object": lambda self, out: setattr(self.object, "last", out),
    "submodule": lambda self, out: setattr(self.layer, "last", out),
    "new submodule": lambda self, out: self.add_module("extra", nn.Identity()),
    "mode": lambda self, out: self.eval(),
    "hook": lambda self, out: self.layer.register_forward_hook(lambda *_: None),
    "removed": lambda self, out: delattr(self, "last"),
    "parameter set": lambda self, out: self.layer.weight.data.zero_(),
    "parameter replaced": lambda self, out: setattr(self.layer, "bias", nn.Parameter(torch.zeros(3))),
}


SHARED = "a container of this kind is shared with the skeleton"


@pytest.mark.parametrize("leave", rows(LEAVES, {"object": SHARED}))
def test_what_a_forward_leaves_on_its_module_is_not_left_on_yours(leave: Fn) -> None:
    """Nor does one call see what another left."""
    module = type("Leaving", (Remembers,), {"leave": leave})()
    before = everything(module)
    apply, params = make_functional(module)
    expected = 2 * linear(tensor(x), module.layer.weight, module.layer.bias)
    wanted = dict(zip(params, torch.autograd.grad(TORCH.total([expected]), module.layer.parameters()), strict=True))
    for wrap in (lambda f: f, jax.jit):
        for _ in range(2):
            close(wrap(apply)(params, x), expected)
        grads = wrap(jax.grad(lambda p: JAX.total([apply(p, x)])))(params)
        close(grads, wanted)
    assert everything(module) == before


def test_a_buffer_made_in_forward_is_named() -> None:
    """It would be a change of the module; a mutable one returns it."""
    module = layer(lambda self, x: (self.register_buffer("seen", x.sum(0)), run(self, x))[1])
    before = everything(module)
    apply, params = make_functional(module)
    with pytest.raises(interop.UnsupportedError, match=r"buffer seen.*mutable=True"):
        apply(params, x)
    _, buffers = make_functional(module, mutable=True)[0](params, x)
    close(buffers["seen"], x.sum(0))
    assert everything(module) == before


# --- threads and programs ---------------------------------------------------------------------------------------------


def test_threads_with_parameters_of_their_own() -> None:
    """The same function, its compiled program and its gradient, at once; and the module itself trains meanwhile."""
    module = mlp()
    apply, params = make_functional(module)
    value, slope = jax.jit(apply), jax.jit(jax.grad(squared(apply)))
    mine = [jax.tree.map(lambda p, k=k: p * (1 + k / 4), params) for k in range(8)]
    expected = [(apply(p, x), slope(p)) for p in mine]

    def work(i: int) -> None:
        if i == 0:
            natively_trained(module, torch.optim.SGD(module.parameters(), 0.1), steps=20)
            return
        for _ in range(5):
            for call in (apply, value):
                close(call(mine[i], x), expected[i][0])
            for found in (slope(mine[i]), jax.grad(squared(apply))(mine[i])):
                close(found, expected[i][1])

    at_once(work)
    assert all(p.grad is not None for p in module.parameters())


def test_one_program_with_several_sets_of_parameters() -> None:
    """Its calls may run at once."""
    apply, params = make_functional(Tied())
    many = [jax.tree.map(lambda p, k=k: p * (1 + k / 4), params) for k in range(6)]
    every = jax.jit(lambda many: [apply(p, tokens) for p in many])
    slopes = jax.jit(lambda many: [jax.grad(lambda p: JAX.total([apply(p, tokens)]))(p) for p in many])
    expected = [apply(p, tokens) for p in many]
    for _ in range(10):
        for out, one in zip(every(many), expected, strict=True):
            close(out, one)
    for found, p in zip(slopes(many), many, strict=True):
        close(found, jax.grad(lambda p: JAX.total([apply(p, tokens)]))(p))


# --- the function as an object ----------------------------------------------------------------------------------------

COPIES: dict[str, Fn] = {
    "copy": copy.copy,
    "deep copy": copy.deepcopy,
    "pickle": lambda f: pickle.loads(pickle.dumps(f)),
}


@pytest.mark.parametrize("again", rows(COPIES))
def test_a_copy_of_the_function_is_the_function(again: Fn) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    apply, params = make_functional(module)
    other = again(apply)
    assert inspect.signature(other) == inspect.signature(apply)
    for wrap in (lambda f: f, jax.jit):
        close(wrap(other)(params, x), module(tensor(x)))
        grads = wrap(jax.grad(squared(other)))(params)
        close(grads, jax.grad(squared(apply))(params), 1e-6)


def test_two_functions_of_one_module_are_two() -> None:
    """For what compiles them too."""
    module = nn.BatchNorm1d(3)
    one, params = make_functional(module, mutable=True)
    other, _ = make_functional(module.eval())
    assert one != other
    ask = jax.jit(lambda f, p: f(p, x), static_argnums=0)
    assert isinstance(ask(one, params), tuple)
    close(ask(other, params), module(tensor(x)))


HOLDERS: dict[str, Fn] = {
    "call": lambda apply, p: apply(p, x),
    "grad": lambda apply, p: jax.grad(lambda p: apply(p, x).sum())(p),
    "jit": lambda apply, p: jax.jit(apply)(p, x),
    "jit of grad": lambda apply, p: jax.jit(jax.grad(lambda p: apply(p, x).sum()))(p),
}


@pytest.mark.parametrize("use", rows(HOLDERS))
def test_a_module_that_nobody_has_any_more_is_freed(use: Fn) -> None:
    """Its weights may be most of the memory."""
    apply, params = make_functional(module := nn.Linear(3, 3))
    jax.block_until_ready(use(apply, params))
    gone = weakref.ref(module)
    del module, apply
    for _ in range(2):  # what JAX frees with its programs may hold others
        gc.collect()
    assert gone() is None


# --- the other names --------------------------------------------------------------------------------------------------


def test_converting_a_module_makes_it_functional() -> None:
    module = mlp()
    apply, params = torch_to_jax(module)
    assert type(params) is dict
    close(params, dict(module.named_parameters()), 0)
    close(jax.jit(apply)(params, x), module(tensor(x)))
    close(jax.jit(jax.grad(squared(apply)))(params)["0.bias"], native_of(module)["0.bias"])


def native_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of the squared error."""
    loss = ((module(tensor(x)) - tensor(y)) ** 2).mean()
    return dict(zip(dict(module.named_parameters()), torch.autograd.grad(loss, module.parameters()), strict=True))


def test_as_jax_of_a_module_is_the_plain_level() -> None:
    module = mlp()
    params = make_functional(module)[1]
    apply = as_jax(module)
    close(apply(params, x), module(tensor(x)))
    with pytest.raises(interop.NotDifferentiableError, match="differentiable"):
        jax.grad(squared(apply))(params)
    with pytest.raises(interop.NotJittableError, match="jittable"):
        jax.jit(apply)(params, x)


@pytest.mark.parametrize("told", [False, True], ids=["", "example output"])
def test_parameters_as_a_tuple(told: bool) -> None:
    """In the order of `parameters()`, tied ones once; in any sequence."""
    module = mlp()
    example = jax.ShapeDtypeStruct((4, 1), jnp.float32)
    apply, params = torch_module_to_jax(module, example) if told else torch_module_to_jax(module)
    assert type(params) is tuple
    for p, q in zip(params, module.parameters(), strict=True):
        close(p, q, 0)
    wanted = native_of(module)
    for wrap in (lambda f: f, jax.jit):
        close(wrap(apply)(params, x), module(tensor(x)))
        close(wrap(apply)(params, input=x), module(tensor(x)))
        value, grads = wrap(jax.value_and_grad(squared(apply)))(params)
        assert type(grads) is tuple
        for grad, other in zip(grads, wanted.values(), strict=True):
            close(grad, other)
    module.load_state_dict(dict(zip(wanted, jax_to_torch(params), strict=True)))

    _, tied = torch_module_to_jax(Tied())
    assert [p.shape for p in tied] == [p.shape for p in Tied().parameters()]


@pytest.mark.parametrize("cut", [slice(1, None), slice(0, 0)], ids=["one", "all"])
def test_a_tuple_that_does_not_fit_is_refused(cut: slice) -> None:
    apply, params = torch_module_to_jax(nn.Linear(3, 3))
    with pytest.raises(interop.LeafError, match="bias"):
        apply(params[cut], x)
    with pytest.raises(interop.LeafError):
        apply((*params, params[0]), x)


class Looks(nn.Linear):
    """Its output's shape depends on values, which a trace does not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[x[:, 0] > -9])


def test_an_example_of_the_output() -> None:
    module = Looks(3, 2)
    _, params = make_functional(module)
    told, _ = make_functional(module, example_output=jax.ShapeDtypeStruct((4, 2), jnp.float32))
    called, _ = make_functional(module, example_output=lambda params, x: jax.ShapeDtypeStruct((len(x), 2), x.dtype))
    wrong, _ = make_functional(module, example_output=jnp.ones((3, 2)))
    for apply in (told, called):
        close(jax.jit(apply)(params, x), module(tensor(x)))
        grads = jax.jit(jax.grad(lambda p, apply=apply: JAX.total([apply(p, x)])))(params)
        wanted = native_gradient(module, module(tensor(x)))
        close(grads, wanted)
    with pytest.raises(Exception, match=r"(?s)f32\[4,2\].*f32\[3,2\]"):
        jax.block_until_ready(jax.jit(wrong)(params, x))
    with pytest.raises(interop.AbstractEvalError, match="example_output"):
        jax.jit(make_functional(module)[0])(params, x)


# --- what is refused --------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """A part with values beside one without."""

    def __init__(self) -> None:
        super().__init__()
        self.here, self.nowhere = nn.Linear(3, 3), nn.Linear(3, 3, device="meta")


class Sub(torch.Tensor):
    """A subclass that nobody has said anything about."""


def with_odd_parameter(p: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = nn.Module()
        module.inner = nn.Module()
        module.inner.register_parameter("odd", nn.Parameter(p(), requires_grad=False))
        return module

    return make


REFUSED: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "data parallel": (lambda: nn.DataParallel(mlp()), ["DataParallel", "module.module"]),
    "scripted": (lambda: torch.jit.script(mlp()), ["scripted"]),
    "traced": (lambda: torch.jit.trace(mlp(), tensor(x)), ["scripted"]),
    "with a scripted part": (lambda: nn.Sequential(nn.Linear(3, 3), torch.jit.script(mlp())), ["scripted", "1"]),
    "quantized": (lambda: nn.Sequential(nn.ReLU(), torch.ao.nn.quantized.dynamic.Linear(3, 3)), ["quantised", "1"]),
    "lazy": (lambda: nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(2)), ["1.weight", "1.bias"]),
    "lazy buffers": (lambda: nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d(affine=False)), ["1.running_mean"]),
    "on meta": (lambda: nn.Linear(3, 3, device="meta"), ["weight", "meta"]),
    "buffers on meta": (lambda: nn.Sequential(nn.BatchNorm1d(3, affine=False, device="meta")), ["0.running_mean", "meta"]),
    "on two devices": (Mixed, ["nowhere.weight", "meta"]),
    "sparse": (with_odd_parameter(lambda: torch.eye(3).to_sparse()), ["inner.odd", "sparse"]),
    "subclass": (with_odd_parameter(lambda: torch.ones(3).as_subclass(Sub)), ["inner.odd", "Sub"]),
    "no counterpart": (with_odd_parameter(lambda: torch.ones(3).to(torch.complex32)), ["inner.odd", "complex32"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.torch.jit.trace(_method)?. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, .* are deprecated:UserWarning")
@pytest.mark.parametrize(
    ("make", "words"),
    rows(REFUSED),
)
def test_a_module_that_is_refused_by_name(make: Fn, words: list[str]) -> None:
    """When it is made functional, whichever way; not when it is called."""
    module = make()
    for ask in (make_functional, torch_to_jax, torch_module_to_jax):
        with pytest.raises(interop.InteropError) as caught:
            ask(module)
        for word in words:
            assert word in str(caught.value)


def test_a_lazy_module_that_has_seen_data() -> None:
    module = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()).eval()
    module(tensor(x))
    agrees(module, x)


@pytest.mark.parametrize(
    "thing", [nn.Linear, lambda x: x, None, {"weight": x}], ids=["class", "function", "none", "dict"]
)
def test_what_is_no_module(thing: Any) -> None:
    for make in (make_functional, torch_module_to_jax):
        with pytest.raises(interop.InteropError, match="Module"):
            make(thing)


def test_modules_wrapped_for_several_processes(run_python: Fn) -> None:
    """The message names what is inside, which can be crossed."""
    printed = run_python(
        """
        import warnings
        import torch, torch.distributed as dist
        from torch import nn
        from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
        from torch.nn.parallel import DistributedDataParallel
        import interop

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        warnings.simplefilter("ignore")  # torch's own
        wrapped = DistributedDataParallel(nn.Linear(3, 2)), FullyShardedDataParallel(nn.Linear(3, 2), device_id=torch.device("cpu"))
        sharded = fully_shard(nn.Linear(3, 2), mesh=dist.init_device_mesh("cpu", (1,)))
        warnings.simplefilter("error")
        for module in (*wrapped, nn.Sequential(wrapped[0]), sharded):
            for make in (interop.make_functional, interop.torch_module_to_jax, interop.torch_to_jax):
                try:
                    make(module)
                except interop.InteropError as error:
                    print(type(module).__name__, "-", error)
                else:
                    print("accepted", type(module))
        apply, params = interop.make_functional(wrapped[0].module)
        print(apply(params, interop.torch_to_jax(torch.ones(1, 3))).shape)
        dist.destroy_process_group()
        """
    ).splitlines()
    assert printed.pop() == "(1, 2)"
    assert len(printed) == 12
    for lines, words in zip(
        (printed[:3], printed[3:6], printed[6:9], printed[9:]),
        (
            ["DistributedDataParallel", "module.module"],
            ["FullyShardedDataParallel", "module.module"],
            ["Sequential.0", "module.module"],
            ["Linear", "fully_shard"],
        ),
        strict=True,
    ):
        for line in lines:
            assert "accepted" not in line
            assert all(word in line for word in words), line


# --- parameters that do not fit ---------------------------------------------------------------------------------------


def changed(**others: Any) -> Fn:
    """With some leaves replaced; one that is deleted is `...`."""

    def change(params: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in {**params, **others}.items() if value is not ...}

    return change


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "missing": (changed(**{"0.bias": ..., "2.weight": ...}), ["0.bias", "f32[8]", "2.weight", "f32[8,8]"]),
    "all missing": (lambda p: {}, ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]),
    "unknown": (changed(extra=x, **{"5.bias": x}), ["extra", "5.bias"]),
    "shape": (changed(**{"0.weight": jnp.ones((3, 8))}), ["0.weight", "f32[3,8]", "f32[8,3]"]),
    "a row too many": (changed(**{"0.bias": jnp.ones((1, 8))}), ["0.bias", "f32[1,8]", "f32[8]"]),
    "a shape that would broadcast": (changed(**{"0.bias": jnp.ones(1)}), ["0.bias", "f32[1]", "f32[8]"]),
    "integers": (changed(**{"0.bias": jnp.ones(8, int)}), ["0.bias", "i32[8]", "f32[8]"]),
    "bools": (changed(**{"0.bias": jnp.ones(8, bool)}), ["0.bias", "bool[8]", "f32[8]"]),
    "complex": (changed(**{"0.bias": jnp.ones(8, complex)}), ["0.bias", "c64[8]", "f32[8]"]),
    "a number": (changed(**{"4.bias": 2.0}), ["4.bias", "float", "f32[1]"]),
    "none": (changed(**{"4.bias": None}), ["4.bias", "None", "f32[1]"]),
    "a list": (changed(**{"4.bias": [0.0]}), ["4.bias", "list", "f32[1]"]),
    "nested": (
        lambda p: {"0": {"weight": p["0.weight"], "bias": p["0.bias"]}, **{n: v for n, v in p.items() if n[0] != "0"}},
        ["0.weight", "0.bias"],
    ),
    "a key that is no name": (lambda p: {**p, 3: x}, ["3"]),
    "everything at once": (
        changed(extra=x, **{"0.weight": jnp.ones((3, 8)), "0.bias": ..., "2.weight": jnp.ones((8, 8), int), "4.bias": 2.0}),
        ["extra", "0.weight", "f32[3,8]", "f32[8,3]", "0.bias", "f32[8]", "2.weight", "i32[8,8]", "f32[8,8]", "4.bias", "f32[1]"],
    ),
}  # fmt: skip
WAYS: dict[str, Callable[[Fn, Any], Any]] = {
    "call": lambda apply, p: apply(p, x),
    "jit": lambda apply, p: jax.jit(lambda x: apply(p, x))(x),
    "grad": lambda apply, p: jax.grad(lambda x: apply(p, x).sum())(x),
    "jit of grad": lambda apply, p: jax.jit(jax.grad(lambda x: apply(p, x).sum()))(x),
    "vmap": lambda apply, p: jax.vmap(lambda x: apply(p, x))(x[None]),
}


@pytest.mark.parametrize("ask", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("change", "words"), rows(BAD))
def test_a_mapping_that_does_not_fit_is_refused_with_every_name(change: Fn, words: list[str], ask: Fn) -> None:
    """All that is wrong with it at once, with what was got and what is expected; and the module is untouched."""
    module = mlp()
    apply, params = make_functional(module)
    before = everything(module)
    with pytest.raises(interop.LeafError) as caught:
        ask(apply, change(params))
    for word in words:
        assert word in str(caught.value)
    assert str(caught.value).startswith("Sequential: argument params: ")
    assert everything(module) == before


NO_MAPPINGS: dict[str, Any] = {"none": None, "list": [x, x], "array": x, "module": nn.Linear(3, 3), "number": 2.0}


@pytest.mark.parametrize("given", NO_MAPPINGS.values(), ids=NO_MAPPINGS)
def test_what_is_no_mapping(given: Any) -> None:
    apply, _ = make_functional(nn.Linear(3, 3))
    with pytest.raises(interop.InteropError, match=r"(?s)Linear: argument params: .*(mapping|Pass its parameters)"):
        apply(given, x)


def test_a_buffer_that_does_not_fit_is_refused_with_them() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    apply, params = make_functional(module)
    with pytest.raises(interop.LeafError) as caught:
        apply({**params, "1.running_mean": jnp.ones(4), "1.running_var": jnp.ones(3, int), "0.bias": jnp.ones(2)}, x)
    for word in ("0.bias", "f32[2]", "1.running_mean", "f32[4]", "1.running_var", "i32[3]", "f32[3]"):
        assert word in str(caught.value)


def test_an_integer_buffer_is_never_wrapped() -> None:
    """JAX has 32 bits for 64; any other width is another kind of buffer."""
    module = layer(run)
    module.register_buffer("level", torch.tensor(3, dtype=torch.uint8))
    apply, params = make_functional(module, mutable=True)
    with pytest.raises(interop.InteropError, match="level"):
        apply({**params, "level": jnp.asarray(300)}, x)


def test_the_whole_message() -> None:
    apply, params = make_functional(mlp())
    others = {"extra": x, "0.weight": jnp.ones((3, 8)), "0.bias": ..., "4.bias": 2.0}
    with pytest.raises(interop.LeafError) as caught:
        apply(changed(**others)(params), x)
    assert str(caught.value) == (
        "Sequential: argument params: the mapping does not fit the module:\n"
        "    0.weight: got f32[3,8], expected f32[8,3]\n"
        "    4.bias: got float, expected f32[1]\n"
        "    extra: unknown\n"
        "    0.bias: missing, expected f32[8]. Give every parameter by its name in named_parameters(), once [errors.md#leaferror]"
    )


def test_a_parameter_that_the_module_got_later() -> None:
    """The module says what it has, at each call."""
    module = mlp()
    apply, params = make_functional(module)
    module.append(nn.Linear(1, 1))
    with pytest.raises(interop.LeafError, match=r"(?s)5\.weight: missing.*5\.bias: missing"):
        apply(params, x)
    close(apply(make_functional(module)[1], x), module(tensor(x)))


def test_a_stack_of_parameters_is_no_set_of_parameters() -> None:
    """Only `jax.vmap` takes it apart."""
    apply, params = make_functional(nn.Linear(3, 3))
    stacked = jax.tree.map(lambda p: jnp.stack([p, p]), params)
    with pytest.raises(interop.LeafError) as caught:
        apply(stacked, x)
    for word in ("f32[2,3,3]", "f32[3,3]", "f32[2,3]", "f32[3]"):
        assert word in str(caught.value)
    assert jax.vmap(apply, (0, None))(stacked, x).shape == (2, 4, 3)


class Raises(nn.Linear):
    """After it has changed what it can."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.register_buffer("count", torch.zeros(()))
        self.kept: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.kept.append(x)
        self.weight.data.zero_()
        raise ArithmeticError("not today")


@pytest.mark.parametrize("ask", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("mutable", [False, True], ids=["", "mutable"])
def test_a_module_that_raises_stays_as_it_was(mutable: bool, ask: Fn) -> None:
    module = Raises()
    before, (apply, params) = everything(module), make_functional(module, mutable=mutable)
    kept = jax.tree.map(np.array, params)
    with pytest.raises(ArithmeticError, match="not today"):
        ask(apply, params)
    assert everything(module) == before
    assert all(np.array_equal(params[name], kept[name]) for name in kept)


# --- gradients that would be lost -------------------------------------------------------------------------------------


class Forgotten(Two):
    """Parameters in a plain list, where torch does not see them."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = [nn.Parameter(torch.ones(3))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.gains[0]


class Behind(Two):
    """A parameter in a list, behind a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = [torch.ones(3), nn.Parameter(torch.ones(3))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.gains[0] * self.gains[1]


class Attribute(Two):
    """A tensor that requires grad and is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.ones(3, requires_grad=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.gain


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(("make", "name"), [(Forgotten, r"gains\[0\]"), (Behind, r"gains\[1\]"), (Attribute, "gain")])
def test_a_tensor_that_requires_grad_and_is_no_parameter(make: Fn, name: str, wrap: Fn) -> None:
    """Its gradient would be lost: it is named. The value is that of the module."""
    module = make()
    apply, params = make_functional(module)
    close(wrap(apply)(params, x), module(tensor(x)))
    with pytest.raises(interop.InteropError, match=rf"{name}.*requires grad"):
        wrap(jax.grad(squared(lambda p, x: apply(p, x).sum(1, keepdims=True))))(params)


# --- models of others -------------------------------------------------------------------------------------------------


def whisper() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.WhisperConfig(
        vocab_size=16, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12, num_mel_bins=4, max_source_positions=6,
        max_target_positions=8, pad_token_id=0, bos_token_id=0, eos_token_id=1, decoder_start_token_id=2,
    )  # fmt: skip
    features = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 12)), jnp.float32)
    named = {"input_features": features, "decoder_input_ids": jnp.array([[2, 3, 4]]), "use_cache": False}
    model = transformers.WhisperForConditionalGeneration(config).eval()
    return model.requires_grad_(), named  # positions too, which it keeps from training


def mamba() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.MambaConfig(vocab_size=16, hidden_size=8, state_size=4, num_hidden_layers=1, time_step_rank=2)
    return transformers.MambaForCausalLM(config).eval(), {"input_ids": jnp.array([[1, 2, 3, 4]]), "use_cache": False}


def resnet() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.ResNetConfig(num_channels=2, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 16, 16)), jnp.float32)
    return transformers.ResNetForImageClassification(config).eval(), {"pixel_values": images}


@pytest.mark.parametrize("make", [whisper, mamba, resnet])
def test_models_of_hugging_face(make: Fn) -> None:
    """With integers, strings and None as they are, and their own classes of outputs."""
    module, named = make()
    agrees(module, **named)
