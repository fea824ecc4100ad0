"""A program written for torch-jax-interop, whose names these are, runs with nothing changed but its import.

First every form of call that its documentation and its tests show, beside what the frameworks themselves compute. Then
what it got wrong without a word: right here, or an error that says so.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import interop
from interop import (
    LeafError,
    NarrowingError,
    OutputMismatchError,
    UnsupportedError,
    WrappedJaxFunction,
    WrappedJaxScalarFunction,
    jax_to_torch,
    torch_module_to_jax,
    torch_to_jax,
)

Fn = Callable[..., Any]


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """Programs written for it ran in this mode, in which torch refuses what it can't reproduce."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    yield
    torch.set_deterministic_debug_mode(before)


def close(ours: Any, theirs: Any) -> None:
    """The same numbers and shapes, whichever framework holds them, up to the rounding of float32."""
    ours, theirs = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x) for x in (ours, theirs))
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


def all_close(ours: Any, theirs: Any) -> None:
    """The same of two sequences."""
    for one, other in zip(ours, theirs, strict=True):
        close(one, other)


def tensor(x: Any, *, grad: bool = False) -> torch.Tensor:
    """A tensor of its own memory."""
    return torch.tensor(np.asarray(x), requires_grad=grad)


def uniform(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), shape)


# --- names ------------------------------------------------------------------------------------------------------------


def _jax_to_torch(value, /): ...
def _torch_to_jax(value, /): ...
def _torch_module_to_jax(model, example_output=None): ...
def _function(jax_function, jax_params, has_aux=False, clone_params=False): ...
def _scalar_function(jax_function, jax_params, has_aux=True, clone_params=False): ...


SEED = {
    "jax_to_torch": _jax_to_torch,
    "torch_to_jax": _torch_to_jax,
    "torch_module_to_jax": _torch_module_to_jax,
    "WrappedJaxFunction": _function,
    "WrappedJaxScalarFunction": _scalar_function,
}
OTHER_DEFAULTS = {"clone_params": True}  # the only ones


@pytest.mark.parametrize("name", SEED)
def test_a_name_takes_what_it_took(name: str) -> None:
    """In the same order, under the same names, with the same defaults; what is new has a default and a name."""
    theirs = list(inspect.signature(SEED[name]).parameters.values())
    ours = list(inspect.signature(getattr(interop, name)).parameters.values())
    assert name in interop.__all__
    for old, new in zip(theirs, ours, strict=False):
        assert new.kind == old.kind
        assert new.name == old.name or old.kind == old.POSITIONAL_ONLY
        if old.default is not old.empty:
            assert new.default is OTHER_DEFAULTS.get(old.name, old.default)
    assert all(new.kind == new.KEYWORD_ONLY and new.default is not new.empty for new in ours[len(theirs) :])


# --- values -----------------------------------------------------------------------------------------------------------

SHAPES = [(1,), (10, 10), (1, 2, 3, 4, 5), (1, 3, 32, 32)]
DTYPES = [
    (torch.float32, jnp.float32),
    (torch.int32, jnp.int32),
    (torch.int64, jnp.int32),
    (torch.float64, jnp.float32),
]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tensor_there_and_back(shape: tuple[int, ...], dtypes: tuple[Any, Any], caplog: Any) -> None:
    """JAX keeps 32 bits; of the loss of 64 there is one warning, of anything else none, and no line in a log."""
    torch_dtype, jax_dtype = dtypes
    t = (torch.rand(shape) * 100).to(torch_dtype)
    with caplog.at_level(logging.DEBUG, "interop"):
        if torch_dtype == torch.float64:
            with pytest.warns(UserWarning, match="^f64.* is narrowed to 32 bits"):
                a = torch_to_jax(t)
        else:
            a = torch_to_jax(t)
        back = jax_to_torch(a)
    assert not caplog.records
    assert a.dtype == jax_dtype
    assert a.devices() == {torch_to_jax(t.device)}
    assert back.device == t.device
    assert torch.equal(back, t.to(back.dtype))
    close(a, t)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_array_there_and_back(shape: tuple[int, ...], dtype: Any) -> None:
    a = (uniform(*shape) * 100).astype(dtype)
    t = jax_to_torch(a)
    assert t.device == jax_to_torch(next(iter(a.devices())))
    close(t, a)
    assert np.array_equal(torch_to_jax(t), a)


def test_devices() -> None:
    assert torch_to_jax(torch.device("cpu")) == jax.devices("cpu")[0]
    assert jax_to_torch(jax.devices("cpu")[0]) == torch.device("cpu")


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclasses.dataclass
class Sample:
    image: Any
    label: Any


CONTAINERS: dict[str, Callable[[Any, Any], Any]] = {
    "dict": lambda x, y: {"x": x, "y": y},
    "nested dict": lambda x, y: {"a": {"b": x}, "y": y},
    "list": lambda x, y: [x, y],
    "tuple": lambda x, y: (x, y),
    "deep": lambda x, y: {"a": [(x, {"b": y})]},
    "dataclass": Sample,
    "plain values": lambda x, y: {"x": x, "n": 2, "f": 0.5, "s": "a", "b": True, "none": None, "bytes": b"c", "y": y},
    # It made these of a tuple of one value, of fields, of keys that are no identifiers.
    "tuple of one": lambda x, y: ((x,), (y,)),
    "namedtuple": Pair,
    "integer keys": lambda x, y: {0: x, 1: y},
    "ordered": lambda x, y: OrderedDict([("b", x), ("a", y)]),
    "empty": lambda x, y: ([], (), {}, x, y),
}


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_a_container_keeps_its_kind(make: Callable[[Any, Any], Any]) -> None:
    tensors, arrays = make(torch.ones(3), torch.arange(2)), make(jnp.ones(3), jnp.arange(2))
    assert repr(torch_to_jax(tensors)) == repr(arrays)
    assert repr(jax_to_torch(arrays)) == repr(make(torch.ones(3), torch.arange(2, dtype=torch.int32)))


def test_leaf_by_leaf() -> None:
    tensors = {"x": torch.randn(5), "y": torch.arange(5)}
    arrays = jax.tree.map(torch_to_jax, tensors)
    back = jax.tree.map(jax_to_torch, arrays)
    assert {k: a.dtype.name for k, a in arrays.items()} == {"x": "float32", "y": "int32"}
    assert torch.equal(back["x"], tensors["x"])
    assert back["y"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("convert", [torch_to_jax, jax_to_torch])
def test_an_object_that_is_no_value_is_itself(convert: Fn) -> None:
    class Thing:
        pass

    thing = Thing()
    assert convert(thing) is thing


# --- functions --------------------------------------------------------------------------------------------------------


def test_a_jax_function_by_decorator() -> None:
    @jax_to_torch
    def up(x: jax.Array) -> jax.Array:
        return x + jnp.ones_like(x)

    out = up(torch.arange(5, dtype=torch.int32))
    assert out.dtype == torch.int32
    assert out.tolist() == [1, 2, 3, 4, 5]
    assert up(torch.arange(5)).tolist() == [1, 2, 3, 4, 5]
    assert up.__name__ == "up"


def test_a_torch_function_by_decorator() -> None:
    @torch_to_jax
    def up(x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones_like(x)

    out = up(jnp.arange(5))
    assert isinstance(out, jax.Array)
    assert out.dtype == jnp.int32
    assert out.tolist() == [1, 2, 3, 4, 5]
    assert up.__name__ == "up"


def test_a_jax_function_by_a_call() -> None:
    """Compiled before, with arguments by name, of containers and to containers."""

    def spread(batch: dict[str, jax.Array], *, scale: float = 1.0) -> dict[str, Any]:
        return {"sum": scale * (batch["x"] + batch["y"]), "both": [batch["x"], {"y": batch["y"]}]}

    x, y = torch.rand(3), torch.rand(3)
    for fn in (jax_to_torch(spread), jax_to_torch(jax.jit(spread))):
        out = fn({"x": x, "y": y}, scale=2.0)
        assert torch.equal(out["sum"], 2 * (x + y))
        assert torch.equal(out["both"][0], x)
        assert torch.equal(out["both"][1]["y"], y)


def test_a_torch_function_by_a_call() -> None:
    """With arguments by name, of containers and to containers."""

    def spread(batch: dict[str, torch.Tensor], *, scale: float = 1.0) -> dict[str, Any]:
        return {"sum": scale * (batch["x"] + batch["y"]), "both": [batch["x"], {"y": batch["y"]}]}

    x, y = uniform(3), uniform(3, seed=1)
    out = torch_to_jax(spread)({"x": x, "y": y}, scale=2.0)
    close(out["sum"], 2 * (x + y))
    close(out["both"][0], x)
    close(out["both"][1]["y"], y)


# --- a torch module in JAX --------------------------------------------------------------------------------------------

TORCH_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(16), nn.Tanh(), nn.Linear(16, 10)),
    "convolutional": lambda: nn.Sequential(
        nn.LazyConv2d(4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(10)
    ),
}
in_torch = pytest.mark.parametrize("network", TORCH_NETWORKS.values(), ids=TORCH_NETWORKS)
in_jit = pytest.mark.parametrize("compile", [lambda f: f, jax.jit], ids=["eager", "jit"])


def initialised(network: Callable[[], nn.Module]) -> tuple[nn.Module, torch.Tensor]:
    """A network that knows its shapes, and an input."""
    module, x = network(), torch.rand(2, 3, 8, 8)
    module(x)
    return module, x


def linear_loss(apply: Fn) -> Fn:
    return lambda params, x, y: jnp.mean((y - apply(params, x)) ** 2)


def gradients_of(model: nn.Module, x: Any, y: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The same loss in torch, and its gradients in the parameters."""
    loss = ((tensor(y) - model(tensor(x))) ** 2).mean()
    return loss, torch.autograd.grad(loss, list(model.parameters()))


EXAMPLES: dict[str, Callable[[nn.Module], Any]] = {
    "no example": lambda model: None,
    "zeros": lambda model: torch.zeros(1, 2),
    "an output, which requires grad": lambda model: model(torch.rand(1, 3)),
}


@in_jit
@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_a_linear_model_in_jax(example: Callable[[nn.Module], Any], compile: Fn) -> None:
    """`jit` needed an example of the output; it may have one still."""
    model = nn.Linear(3, 2, device="cpu")
    apply, params = torch_module_to_jax(model, example_output=example(model))
    x, y = uniform(1, 3), uniform(1, 1, seed=1)
    loss, grads = compile(jax.value_and_grad(linear_loss(apply)))(params, x, y)
    expected, gradients = gradients_of(model, x, y)
    close(loss, expected)
    assert isinstance(grads, tuple)
    all_close(grads, gradients)


def test_an_example_is_a_promise() -> None:
    """Another shape than the example's was an error inside a callback."""
    apply, params = torch_module_to_jax(nn.Linear(3, 2), torch.zeros(1, 2))
    with pytest.raises(OutputMismatchError, match=r"f32\[5,2\].*f32\[1,2\]"):
        jax.block_until_ready(apply(params, jnp.ones((5, 3))))


@in_torch
def test_parameters_are_a_tuple_in_the_modules_order(network: Callable[[], nn.Module]) -> None:
    module, x = initialised(network)
    apply, params = torch_module_to_jax(module)
    assert isinstance(params, tuple)
    assert all(isinstance(p, jax.Array) for p in params)
    all_close(params, module.parameters())
    all_close(jax.tree.map(jax_to_torch, params), module.parameters())
    close(jax_to_torch(apply(params, torch_to_jax(x))), module(x))


@in_jit
@in_torch
@pytest.mark.parametrize("with_example", [False, True], ids=["no example", "example"])
@pytest.mark.parametrize("argnums", [0, [0, 1]], ids=["parameters", "parameters and input"])
def test_a_network_in_a_loss_of_jax(
    network: Callable[[], nn.Module], argnums: Any, with_example: bool, compile: Fn
) -> None:
    """With the logits beside the loss, as optax takes it; the labels are a second argument, without a gradient."""
    module, x = initialised(network)
    apply, params = torch_module_to_jax(module, example_output=module(x) if with_example else None)
    labels = jnp.array([3, 7])

    def loss_of(params: tuple[jax.Array, ...], x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = apply(params, x)
        one_hot = jax.nn.one_hot(y, logits.shape[-1])
        return jnp.mean(optax.softmax_cross_entropy(logits=logits, labels=one_hot)), logits

    (loss, logits), grads = compile(jax.value_and_grad(loss_of, argnums, has_aux=True))(
        params, tensor_in_jax(x), labels
    )

    x.requires_grad_()
    expected_logits = module(x)
    expected = F.cross_entropy(expected_logits, tensor(labels).long())
    *of_params, of_x = torch.autograd.grad(expected, [*module.parameters(), x])
    close(loss, expected)
    close(logits, expected_logits)
    all_close(grads if argnums == 0 else grads[0], of_params)
    if argnums != 0:
        close(grads[1], of_x)
    for p, g in zip(params, grads if argnums == 0 else grads[0], strict=True):
        assert (g.shape, g.dtype, g.devices()) == (p.shape, p.dtype, p.devices())


def tensor_in_jax(x: torch.Tensor) -> jax.Array:
    """A tensor that may require grad, without its graph."""
    return torch_to_jax(x)


def test_a_module_is_converted_as_a_value() -> None:
    """It gave a tuple of parameters; ours are a dict by name, in the same order."""
    model = nn.Linear(3, 2)
    apply, params = torch_to_jax(model)
    assert list(params) == ["weight", "bias"]
    all_close(params.values(), model.parameters())
    x, y = uniform(4, 3), uniform(4, 1, seed=1)
    loss, grads = jax.jit(jax.value_and_grad(linear_loss(apply)))(params, x, y)
    expected, gradients = gradients_of(model, x, y)
    close(loss, expected)
    all_close([grads[name] for name in params], gradients)


def test_training_by_hand_is_torchs_own() -> None:
    model = nn.Linear(3, 1)
    apply, params = torch_module_to_jax(model, example_output=torch.zeros(8, 1))
    x, y = uniform(8, 3), uniform(8, 1, seed=1)
    step = jax.jit(jax.grad(linear_loss(apply)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(5):
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, step(params, x, y))
        optimizer.zero_grad()
        F.mse_loss(model(tensor(x)), tensor(y)).backward()
        optimizer.step()
    all_close(params, model.parameters())


# --- a JAX function as a torch module ---------------------------------------------------------------------------------


def dot(params: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.dot(x, params)


@pytest.mark.parametrize("form", ["positional", "named"])
def test_a_function_with_one_array_of_parameters(form: str) -> None:
    w = jax.random.normal(jax.random.key(0), (2, 1))
    module = WrappedJaxFunction(dot, w) if form == "positional" else WrappedJaxFunction(jax_function=dot, jax_params=w)
    module = module.to("cpu")
    assert isinstance(module, nn.Module)
    assert list(dict(module.state_dict())) == ["params.0"]
    close(module.state_dict()["params.0"], w)
    assert list(dict(module.named_parameters())) == ["params.0"]

    x, y = torch.randn(2), torch.rand(1)
    loss = F.mse_loss(module(x), y)
    loss.backward()
    twin = tensor(w, grad=True)
    expected = F.mse_loss(x @ twin, y)
    expected.backward()
    close(loss, expected)
    close(next(module.parameters()).grad, twin.grad)
    close(next(module.parameters()).grad, jax.grad(lambda w: ((dot(w, np.asarray(x)) - np.asarray(y)) ** 2).mean())(w))


def test_a_function_between_layers_of_torch() -> None:
    torch.manual_seed(1)
    first = nn.Linear(123, 2)
    w = uniform(2, 1)
    model = nn.Sequential(first, WrappedJaxFunction(dot, w))
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.params.0"]
    x = torch.randn(5, 123)
    grads = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    twin = tensor(w, grad=True)
    expected = torch.autograd.grad((first(x) @ twin).square().mean(), [*first.parameters(), twin])
    all_close(grads, expected)


class Dense(linen.Module):
    num_classes: int = 10

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Dense(16)(x.reshape(x.shape[0], -1))
        return linen.Dense(self.num_classes)(linen.tanh(x))


class Convolutional(linen.Module):
    num_classes: int = 10

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.relu(linen.Conv(4, (3, 3))(x))
        x = linen.avg_pool(x, (2, 2), (2, 2))
        return linen.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


def dense_in_torch(params: Any, x: torch.Tensor) -> torch.Tensor:
    bias0, kernel0, bias1, kernel1 = params
    return F.linear(torch.tanh(F.linear(x.flatten(1), kernel0.T, bias0)), kernel1.T, bias1)


def convolutional_in_torch(params: Any, x: torch.Tensor) -> torch.Tensor:
    bias0, kernel0, bias1, kernel1 = params
    x = torch.relu(F.conv2d(x.permute(0, 3, 1, 2), kernel0.permute(3, 2, 0, 1), bias0, padding=1))
    x = F.avg_pool2d(x, 2).permute(0, 2, 3, 1)
    return F.linear(x.reshape(len(x), -1), kernel1.T, bias1)


JAX_NETWORKS = {"dense": (Dense(), dense_in_torch), "convolutional": (Convolutional(), convolutional_in_torch)}
in_jax = pytest.mark.parametrize("network", JAX_NETWORKS.values(), ids=JAX_NETWORKS)
input_trains = pytest.mark.parametrize("input_trains", [False, True], ids=["input fixed", "input trains"])
IMAGES = uniform(4, 8, 8, 1)
LABELS = np.array([1, 7, 0, 9])


def cross_entropy_of(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy(logits=logits, labels=jax.nn.one_hot(labels, logits.shape[-1])).mean()


def gradients_in_torch(network: Fn, params: Any) -> tuple[torch.Tensor, ...]:
    """The loss of a network written in torch, with these parameters; its gradients in them, and in the input."""
    leaves, x = [tensor(p, grad=True) for p in jax.tree.leaves(params)], tensor(IMAGES, grad=True)
    loss = F.cross_entropy(network(leaves, x), torch.tensor(LABELS))
    return (loss, *torch.autograd.grad(loss, [*leaves, x]))


def gradients_in_jax(network: linen.Module, params: Any) -> tuple[jax.Array, ...]:
    """The same by JAX alone."""
    loss, grads = jax.value_and_grad(lambda p, x: cross_entropy_of(network.apply(p, x), LABELS), (0, 1))(params, IMAGES)
    return (loss, *jax.tree.leaves(grads))


def by_leaf(module: nn.Module, params: Any) -> list[nn.Parameter]:
    """The parameters of a module, by the names of the leaves that they were made from."""
    named = dict(module.named_parameters())
    paths = [path for path, _ in jax.tree.leaves_with_path(params)]
    return [named[f"params.{jax.tree_util.keystr(path, simple=True, separator='.')}"] for path in paths]


@in_jit
@in_jax
@input_trains
@pytest.mark.parametrize("has_aux", [False, True], ids=["alone", "aux"])
def test_a_flax_model_in_torch(network: Any, compile: Fn, input_trains: bool, has_aux: bool) -> None:
    model, twin = network
    params = model.init(jax.random.key(0), IMAGES)

    def with_statistics(params: Any, *inputs: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        out = model.apply(params, *inputs)
        return out, {"mean": out.mean(), "max": out.max()}

    function = compile(with_statistics if has_aux else model.apply)
    module = WrappedJaxFunction(function, jax_params=params, has_aux=has_aux)
    x = tensor(IMAGES, grad=input_trains)
    out = module(x)
    if has_aux:
        out, statistics = out
        assert not any(value.requires_grad for value in statistics.values())
        close(statistics["mean"], out.mean())
        close(statistics["max"], out.max())
    loss = F.cross_entropy(out, torch.tensor(LABELS), reduction="mean")
    loss.backward()

    assert out.requires_grad
    assert len(list(module.parameters())) == len(jax.tree.leaves(params))
    assert all(p.requires_grad for p in module.parameters())
    ours = (loss, *(p.grad for p in by_leaf(module, params)), *([x.grad] if input_trains else []))
    for theirs in (gradients_in_torch(twin, params), gradients_in_jax(model, params)):
        all_close(ours, theirs[: len(ours)])
    if not input_trains:
        assert x.grad is None


def test_parameters_of_a_flax_model_have_its_names() -> None:
    """They were `params.0` to `params.3`, in the order of `jax.tree.leaves`: a checkpoint of those loads by position."""
    model = Dense()
    params = model.init(jax.random.key(0), IMAGES)
    module = WrappedJaxFunction(jax.jit(model.apply), params)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "params.params.Dense_0.bias": (16,),
        "params.params.Dense_0.kernel": (64, 16),
        "params.params.Dense_1.bias": (10,),
        "params.params.Dense_1.kernel": (16, 10),
    }
    checkpoint = {f"params.{i}": 1 + tensor(p) for i, p in enumerate(jax.tree.leaves(params))}
    module.load_state_dict(checkpoint)
    all_close(by_leaf(module, params), [1 + p for p in jax.tree.leaves(params)])


@pytest.mark.parametrize(
    "params",
    [
        pytest.param([(jnp.full(2, 1.0), jnp.full(3, 2.0)), (jnp.full(4, 3.0), jnp.full(5, 4.0))], id="pairs"),
        pytest.param({"b": jnp.full(2, 1.0), "a": jnp.full(3, 2.0)}, id="dict"),
        pytest.param(Dense().init(jax.random.key(0), IMAGES), id="flax"),
    ],
)
def test_parameters_keep_the_order_of_the_leaves(params: Any) -> None:
    """An optimizer saves what it knows of a parameter by its position: a checkpoint of it would load at another."""
    all_close(WrappedJaxFunction(lambda params, x: x, params).parameters(), jax.tree.leaves(params))


@pytest.mark.parametrize("clone", [True, False])
def test_parameters_in_memory_of_their_own_or_not(clone: bool) -> None:
    w = uniform(64)
    module = WrappedJaxFunction(lambda w, x: w * x, jax_params=w, clone_params=clone)
    F.mse_loss(module(torch.ones(64)), torch.zeros(64)).backward()
    (p,) = module.parameters()
    close(p.grad, w / 32)
    assert (p.data_ptr() == jax_to_torch(w).data_ptr()) is not clone


def test_an_output_of_jax_in_a_loss_of_torch() -> None:
    """On an array that was converted, with labels on its device."""
    model = Dense()
    params = model.init(jax.random.key(0), IMAGES)
    module = WrappedJaxFunction(jax.jit(model.apply), jax_params=params)
    x = jax_to_torch(IMAGES)
    y = torch.randint(0, 10, (4,), device=x.device)
    F.cross_entropy(module(x), y, reduction="mean").backward()
    assert [tuple(p.grad.shape) for p in by_leaf(module, params)] == [(16,), (64, 16), (10,), (16, 10)]


# --- a JAX loss as a torch module -------------------------------------------------------------------------------------


def loss_with_logits(model: linen.Module) -> Fn:
    def loss(params: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.apply(params, x)
        return cross_entropy_of(logits, y), logits

    return loss


@in_jit
@in_jax
@input_trains
def test_a_loss_of_jax_in_torch(network: Any, compile: Fn, input_trains: bool) -> None:
    """With integer labels as its second input; the logits beside it belong to the graph."""
    model, twin = network
    params = model.init(jax.random.key(0), IMAGES)
    module = WrappedJaxScalarFunction(compile(loss_with_logits(model)), params)
    x, labels = tensor(IMAGES, grad=input_trains), torch.tensor(LABELS)
    loss, logits = module(x, labels)
    assert loss.requires_grad
    assert logits.requires_grad
    assert loss.shape == ()
    loss.backward()
    assert len(list(module.parameters())) == len(jax.tree.leaves(params))
    close(logits, model.apply(params, IMAGES))
    ours = (loss, *(p.grad for p in by_leaf(module, params)), *([x.grad] if input_trains else []))
    for theirs in (gradients_in_torch(twin, params), gradients_in_jax(model, params)):
        all_close(ours, theirs[: len(ours)])


def squares(params: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    """A number, and beside it values of several kinds."""
    z = params["w"] * x
    return (z**2).sum(), {"z": jnp.sin(z), "count": jnp.sum(z > 0.5)}


# What is asked of (the number, what is beside it), in either framework.
ASKED: dict[str, Callable[[Any, Any], Any]] = {
    "the loss": lambda loss, aux: loss,
    "a scaled loss": lambda loss, aux: 3 * loss,
    "a negated loss": lambda loss, aux: -loss,
    "a function of the loss": lambda loss, aux: loss**2 / (1 + loss),
    "what is beside it": lambda loss, aux: (aux["z"] ** 2).sum(),
    "both": lambda loss, aux: 0.5 * loss + aux["z"].sum(),
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_any_use_of_a_loss_has_its_own_gradient(asked: Callable[[Any, Any], Any]) -> None:
    """It asserted that the upstream gradient is 1, and returned the unscaled gradient under `python -O`."""
    w, x = uniform(5), uniform(5, seed=1)
    module = WrappedJaxScalarFunction(squares, {"w": w}, has_aux=True)
    inputs = tensor(x, grad=True)
    loss, aux = module(inputs)
    assert not aux["count"].requires_grad
    ours = torch.autograd.grad(asked(loss, aux), [*module.parameters(), inputs])
    theirs = jax.grad(lambda w, x: asked(*squares({"w": w}, x)), (0, 1))(w, x)
    all_close(ours, theirs)


def test_a_loss_alone() -> None:
    """`has_aux=False`, which its signature offered, failed."""
    w, x = uniform(5), torch.rand(5)
    module = WrappedJaxScalarFunction(lambda w, x: ((w * x) ** 2).sum(), w, has_aux=False)
    (2 * module(x)).backward()
    close(next(module.parameters()).grad, 4 * np.asarray(w) * np.asarray(x) ** 2)


def test_a_loss_with_a_frozen_parameter() -> None:
    """It asserted that either all parameters train or none."""
    module = WrappedJaxScalarFunction(
        lambda p, x: ((p["a"] * p["b"] * x).sum(), None), {"a": uniform(3), "b": uniform(3)}
    )
    frozen, trained = module.parameters()
    frozen.requires_grad_(False)
    x = torch.rand(3, requires_grad=True)
    loss, _ = module(x)
    loss.backward()
    assert frozen.grad is None
    close(trained.grad, frozen * x)
    close(x.grad, frozen * trained)


# --- what was wrong without a word ------------------------------------------------------------------------------------


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


@in_jit
def test_tied_weights(compile: Fn) -> None:
    """They were memory that nobody had written."""
    model = Tied()
    apply, params = torch_module_to_jax(model, torch.zeros(4, 3))
    assert len(params) == 1
    x, y = uniform(4, 3), uniform(4, 3, seed=1)
    loss, grads = compile(jax.value_and_grad(linear_loss(apply)))(params, x, y)
    expected, gradients = gradients_of(model, x, y)
    close(loss, expected)
    all_close(grads, gradients)


OUTPUTS: dict[str, Fn] = {
    "two": lambda w, x: (jnp.sin(w * x), w**2),
    "one of two": lambda w, x: (jnp.sin(w * x), jnp.cos(w)),
    "tree": lambda w, x: {"a": [(jnp.sin(w * x),)], "b": w**2},
    "integer beside float": lambda w, x: (jnp.sin(w * x), (x > 0.5).astype(jnp.int32)),
}


@pytest.mark.parametrize("fn", OUTPUTS.values(), ids=OUTPUTS)
def test_several_outputs_all_have_a_gradient(fn: Fn) -> None:
    """They were cut off: the loss below had the gradient of `x.sum()` alone."""
    w, x = uniform(4), uniform(4, seed=1)

    def first_and_rest(out: Any) -> list[Any]:
        leaves = jax.tree.leaves(out)
        return leaves[:1] if fn is OUTPUTS["one of two"] else [leaf for leaf in leaves if "int" not in str(leaf.dtype)]

    module, inputs = WrappedJaxFunction(fn, w), tensor(x, grad=True)
    loss = sum(leaf.sum() for leaf in first_and_rest(module(inputs))) + inputs.sum()
    ours = torch.autograd.grad(loss, [*module.parameters(), inputs])
    theirs = jax.grad(lambda w, x: sum(leaf.sum() for leaf in first_and_rest(fn(w, x))) + x.sum(), (0, 1))(w, x)
    all_close(ours, theirs)


def test_a_converted_function_is_differentiable_in_torch() -> None:
    """It detached."""
    x = torch.rand(4, requires_grad=True)
    jax_to_torch(lambda x: jnp.sin(x) ** 2)(x).sum().backward()
    close(x.grad, torch.sin(2 * x))


@in_jit
def test_a_converted_function_is_differentiable_in_jax(compile: Fn) -> None:
    x = uniform(4)
    close(compile(jax.grad(lambda x: torch_to_jax(lambda x: torch.sin(x) ** 2)(x).sum()))(x), jnp.sin(2 * x))


class Centred(nn.Module):
    """What is taken over all of its input tells one example from a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * (x - x.mean())


@in_jit
@pytest.mark.parametrize("with_example", [False, True], ids=["no example", "example"])
def test_examples_of_a_batch_do_not_mix(with_example: bool, compile: Fn) -> None:
    """`jax.vmap` gave the whole batch to the function as one example."""
    apply, params = torch_module_to_jax(Centred(), torch.zeros(3) if with_example else None)
    x = uniform(5, 3)
    close(compile(jax.vmap(apply, (None, 0)))(params, x), 2 * (x - x.mean(1, keepdims=True)))


def test_a_gradient_has_a_gradient() -> None:
    """The terms of second order were dropped: here, a gradient penalty."""

    def f(w: Any, x: Any) -> Any:
        return jnp.sin(w * x).sum()

    def penalty(w: Any, x: Any) -> Any:
        return (jax.grad(f, 1)(w, x) ** 2).sum() + f(w, x)

    w, x = uniform(4), uniform(4, seed=1)
    module, inputs = WrappedJaxFunction(f, w), tensor(x, grad=True)
    out = module(inputs)
    (slope,) = torch.autograd.grad(out, inputs, create_graph=True)
    ours = torch.autograd.grad((slope**2).sum() + out, [*module.parameters(), inputs])
    all_close(ours, jax.grad(penalty, (0, 1))(w, x))


@in_jit
def test_a_gradient_has_a_gradient_in_jax(compile: Fn) -> None:
    """It was refused, and so was every derivative in forward mode."""
    apply, params = torch_module_to_jax(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    (w0, b0, w1, b1), x = params, uniform(3)

    def theirs(x: jax.Array) -> jax.Array:
        return (w1 @ jnp.tanh(w0 @ x + b0) + b1)[0]

    close(compile(jax.hessian(lambda x: apply(params, x)[0]))(x), jax.hessian(theirs)(x))


z = jnp.array([1 + 2j, -0.5 + 0.3j, 0.1 - 1j], jnp.complex64)
COMPLEX: dict[str, tuple[Fn, Any]] = {
    "complex to real": (lambda w, x: ((w * x**2).real ** 2).sum(), z),
    "complex to complex": (lambda w, x: w**2 * x, z),
    "real to complex": (lambda w, x: w * x, jnp.array([1.0, -2.0, 0.5])),
}


@pytest.mark.parametrize(("fn", "w"), COMPLEX.values(), ids=COMPLEX)
def test_complex_gradients_are_those_of_the_caller(fn: Fn, w: Any) -> None:
    """They were the conjugate."""
    x = z[::-1]
    module, twin = WrappedJaxFunction(fn, w), tensor(w, grad=True)
    ours, theirs = module(tensor(x)), fn(twin, tensor(x))
    close(ours, theirs)
    weight = cotangent_of(ours)
    ours.backward(torch.tensor(weight))
    theirs.backward(torch.tensor(weight))
    close(next(module.parameters()).grad, twin.grad)

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(tensor(w))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return fn(self.w, x)

    apply, params = torch_module_to_jax(Module())
    (in_jax,) = jax.vjp(lambda p: apply(p, x), params)[1](weight)
    close(in_jax[0], jax.vjp(lambda w: fn(w, x), w)[1](weight)[0])


def cotangent_of(t: torch.Tensor) -> np.ndarray:
    """One that a conjugate would show."""
    return np.full(t.shape, 0.3 - 0.7j, np.complex64) if t.is_complex() else np.ones(t.shape, np.float32)


def test_an_input_that_is_written_to_before_the_backward() -> None:
    """It gave the gradient at the new value; torch says what happened."""
    module, x = WrappedJaxFunction(lambda w, x: jnp.sin(w * x), uniform(4)), torch.rand(4, requires_grad=True)
    y = x * 1
    out = module(y)
    y.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("kind", [WrappedJaxFunction, WrappedJaxScalarFunction])
def test_an_optimizer_leaves_the_callers_arrays_alone(kind: type) -> None:
    """`clone_params=False`, its default, stepped through memory that JAX takes for immutable."""
    w = uniform(64)  # large and aligned enough to be shared
    before = np.array(w)
    module = kind(lambda w, x: (w * x).sum(), w, has_aux=False)
    optimizer = torch.optim.SGD(module.parameters(), 0.5)
    module(torch.ones(64)).backward()
    optimizer.step()
    close(next(module.parameters()), before - 0.5)
    assert np.array_equal(w, before)


def test_an_output_is_not_its_input() -> None:
    """Writing to the output of an identity changed the input."""
    x = torch.rand(64)
    before = x.clone()
    jax_to_torch(lambda x: x)(x).add_(1)
    WrappedJaxFunction(lambda w, x: x, uniform(2))(x).detach().add_(1)
    assert torch.equal(x, before)


@in_jit
def test_a_function_that_writes_to_its_argument(compile: Fn) -> None:
    """It wrote to the caller's array."""
    x = uniform(64)
    before = np.array(x)
    close(compile(torch_to_jax(lambda x: x.add_(1)))(x), before + 1)
    assert np.array_equal(x, before)


@in_jit
@pytest.mark.parametrize("with_example", [False, True], ids=["no example", "example"])
def test_the_backward_has_the_mask_of_the_forward(with_example: bool, compile: Fn) -> None:
    """It ran the forward again, with another mask."""
    model = nn.Sequential(nn.Linear(1, 64), nn.Dropout(0.5))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(1)
    apply, params = torch_module_to_jax(model, torch.zeros(1, 64) if with_example else None)

    def loss(params: Any) -> Any:
        out = apply(params, jnp.ones((1, 1)))
        return out.sum(), out

    (_, out), grads = compile(jax.value_and_grad(loss, has_aux=True))(params)
    assert 16 < int((out == 0).sum()) < 48
    assert np.array_equal(grads[1], out[0])  # twice the mask is the value, and the derivative


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_a_bare_tensor_of_64_bits_is_narrowed_with_a_warning(dtype: torch.dtype) -> None:
    with pytest.warns(UserWarning, match=r"^(f64|c128)\[3\] is narrowed to 32 bits"):
        assert torch_to_jax(torch.ones(3, dtype=dtype)).dtype.itemsize == dtype.itemsize // 2


def test_a_large_integer_is_refused() -> None:
    """2**40 + 5 was 5."""
    with pytest.raises(NarrowingError, match=str(2**40 + 5)):
        torch_to_jax(torch.tensor([2**40 + 5]))
    with pytest.raises(NarrowingError, match=str(2**40 + 5)):
        jax_to_torch(lambda n: n + 1)(torch.tensor([2**40 + 5]))


def test_64_bits_stay_through_a_function() -> None:
    """While JAX keeps 32; the gradient too, in the dtype of what it is the gradient of."""
    x = torch.tensor([1 / 3, 1e300], dtype=torch.float64, requires_grad=True)
    module = WrappedJaxFunction(lambda w, x: w * x, jnp.array([3.0, 2.0]))
    out = module(x)
    out.sum().backward()
    assert out.dtype == torch.float64
    assert out.tolist() == [1.0, 2e300]
    assert x.grad.dtype == torch.float64
    assert next(module.parameters()).grad.dtype == torch.float32


# --- what failed ------------------------------------------------------------------------------------------------------


def test_the_backward_of_a_sum() -> None:
    """Its gradient is one number, expanded."""
    module = WrappedJaxFunction(dot, uniform(3, 2))
    module(torch.ones(4, 3)).sum().backward()
    close(next(module.parameters()).grad, np.full((3, 2), 4.0))


@pytest.mark.parametrize("part", [slice(1, None), slice(None, None, 2)], ids=["unaligned", "with gaps"])
def test_any_memory(part: slice) -> None:
    t = torch.rand(64)[part]
    close(torch_to_jax(t), t)
    close(torch_to_jax(t.expand(3, -1)), t.expand(3, -1))


def test_any_arguments() -> None:
    """By name and by keyword only, static values among them."""
    fn = jax_to_torch(lambda x, n=2, *, kind="power": x**n if kind == "power" else x * n)
    x = torch.rand(3, requires_grad=True)
    fn(x, n=3).sum().backward()
    close(x.grad, 3 * x**2)
    close(fn(x, 4, kind="times"), 4 * x)
    module = WrappedJaxFunction(lambda w, x, *, scale: scale * w * x, uniform(3))
    close(module(x, scale=2.0), 2 * next(module.parameters()) * x)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return scale * self.linear(x) * y


@in_jit
def test_a_module_of_several_arguments(compile: Fn) -> None:
    """A compiled gradient was possible of exactly one; no argument could be given by name."""
    model = Scaled()
    apply, params = torch_module_to_jax(model)
    x, y = uniform(4, 3), uniform(4, 2, seed=1)
    grads = compile(jax.grad(lambda p, x, y: apply(p, x, y=y, scale=2.0).sum(), (0, 2)))(params, x, y)
    ty = tensor(y, grad=True)
    *of_params, of_y = torch.autograd.grad(model(tensor(x), ty, scale=2.0).sum(), [*model.parameters(), ty])
    all_close(grads[0], of_params)
    close(grads[1], of_y)


def test_a_new_shape_under_jit() -> None:
    model = nn.Linear(3, 2)
    apply, params = torch_module_to_jax(model)
    fn = jax.jit(apply)
    for n in (1, 5):
        x = uniform(n, 3)
        close(fn(params, x), model(tensor(x)))


@in_jit
def test_a_module_with_buffers(compile: Fn) -> None:
    """Those that are read; one that writes to them is refused, by name."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model(torch.rand(8, 3))
    apply, params = torch_module_to_jax(model.eval())
    x, y = uniform(8, 3), uniform(8, 1, seed=1)
    loss, grads = compile(jax.value_and_grad(linear_loss(apply)))(params, x, y)
    expected, gradients = gradients_of(model, x, y)
    close(loss, expected)
    all_close(grads, gradients)
    with pytest.raises(UnsupportedError, match="1.running_mean and 1.running_var"):
        compile(torch_module_to_jax(model.train())[0])(params, x)


def test_parameters_that_do_not_fit() -> None:
    """Too many, or too few, or of another shape."""
    apply, params = torch_module_to_jax(nn.Linear(3, 2))
    for given in (params[:1], (*params, params[0]), (params[0].T, params[1])):
        with pytest.raises(LeafError):
            apply(given, jnp.ones((1, 3)))
