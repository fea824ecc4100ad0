"""Real models in JAX: values, batches, gradients, tangents and second derivatives, against torch alone.

The weights are never the module's own, so that a module which looks at its own is seen to do so.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import models
from hosts import HOSTS, numpy_of, other_example
from interop import ContainerError, InteropError, UnsupportedError, as_jax, differentiable, jittable
from models import BY_ID, MODELS, Model

Fn = Callable[..., Any]
TORCH, JAX = HOSTS["torch"], HOSTS["jax"]

# Torch's own, of what it does at its first use.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # Dynamo
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),  # checkpoint
]


def levels(fn: Any, **options: Any) -> Fn:
    """A torch function or module in JAX, with every level on."""
    return differentiable(jittable(as_jax(fn, **options)))


def arrays(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def tensors(tree: Any) -> Any:
    return jax.tree.map(torch.tensor, tree)


# --- a model in either framework --------------------------------------------------------------------------------------


@functools.cache
def crossed(model: Model) -> tuple[Fn, list[int]]:
    """The model in JAX, of parameters and inputs; and a list that grows by one whenever its Python forward runs.

    The same crossing for every test of a model, as in a program.
    """
    module, calls = model.module(), []
    inner = getattr(module, "_orig_mod", module)  # of a compiled one
    inner.register_forward_pre_hook(lambda *_: calls.append(1))
    if model.traceable:
        fn = levels(module, **({"mutable": True} if model.mutable else {}))
    else:
        example = jax.tree.map(torch.Tensor.detach, model.module()(*tensors(model.inputs)))
        fn = jittable(example_output=example)(differentiable(as_jax(module)))
    return lambda params, *inputs: model.call(fn, params, inputs), calls


def ours(model: Model) -> Fn:
    """It alone."""
    return crossed(model)[0]


def theirs(model: Model, *, double: bool = False) -> tuple[Fn, dict[str, torch.Tensor]]:
    """The model in torch, as a function of parameters and inputs; and its parameters."""
    module = model.module()
    module.load_state_dict(tensors(model.params), strict=False)
    module = module.double() if double else module

    def apply(params: dict[str, torch.Tensor], *args: Any, **named: Any) -> Any:
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        out = functional_call(module, params | buffers, args, named)
        return (out, buffers) if model.mutable else out

    return lambda params, *inputs: model.call(apply, params, inputs), dict(module.named_parameters())


def loss_of(host: Any, fn: Fn) -> Fn:
    return lambda params, *inputs: host.total(dict_of(fn(params, *inputs)))


def dict_of(tree: Any) -> Any:
    """A `ModelOutput` as the dict that it is, whoever has registered it."""
    return dict(tree) if isinstance(tree, dict) else tree


def directions(host: Any, params: dict[str, Any]) -> dict[str, Any]:
    return {name: host.weights(p) for name, p in params.items()}


def assert_close(got: Any, expected: Any, tolerance: float) -> None:
    """The same containers, precisions, shapes and numbers, each array measured by its largest number."""
    one, other = dict_of(got), dict_of(expected)
    assert isinstance(expected, torch.Tensor) or type(got) is type(expected)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    largest = max((float(np.abs(numpy_of(y)).max()) for _, y in pairs), default=0.0)
    for x, y in pairs:
        a, b = numpy_of(x), numpy_of(y)
        assert a.shape == b.shape
        assert a.dtype.kind in "iu" or str(x.dtype) == str(y.dtype).removeprefix("torch.")
        # An array of numbers that are zero but for rounding is measured by the others.
        scale = max(float(np.abs(b).max()), 1e-3 * largest)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


# --- what is done with a model, in JAX --------------------------------------------------------------------------------


def value(f: Fn, params: Any, inputs: list[Any]) -> Any:
    return f(params, *inputs)


def gradient(f: Fn, params: Any, inputs: list[Any]) -> Any:
    return jax.grad(loss_of(JAX, f))(params, *inputs)


def batch(f: Fn, params: Any, inputs: list[Any]) -> Any:
    return jax.vmap(f, in_axes=(None, *(0 for _ in inputs)))(params, *inputs)


def tangent(f: Fn, params: Any, inputs: list[Any]) -> Any:
    part = lambda p: JAX.inexact(dict_of(f(p, *inputs)))
    return jax.jvp(part, (params,), (directions(JAX, params),))[1]


def second(f: Fn, params: Any, inputs: list[Any]) -> Any:
    """A Hessian-vector product, forwards over backwards."""
    return jax.jvp(lambda p: gradient(f, p, inputs), (params,), (directions(JAX, params),))[1]


# --- and in torch -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def composite() -> Iterator[None]:
    """No fused kernel: those have no forward rule and no second derivative."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what `flags` touches beside
            with torch.backends.mkldnn.flags(enabled=False):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def torch_value(model: Model) -> Any:
    f, params = theirs(model)
    with torch.no_grad():
        return f(params, *tensors(model.inputs))


def torch_gradient(model: Model, *, double: bool = False, step: float = 0.0) -> dict[str, torch.Tensor]:
    """By `backward`, which a reentrant checkpoint wants."""
    f, params = theirs(model, double=double)
    with torch.no_grad():
        for name, direction in directions(TORCH, params).items():
            params[name] += step * direction
    anchor = 0 * TORCH.total(params)  # a parameter that is not used has a gradient of zero
    (loss_of(TORCH, f)(params, *inputs_of(model, double=double)) + anchor).backward()
    return {name: in_jax(p.grad) for name, p in params.items()}


def inputs_of(model: Model, *, double: bool) -> list[torch.Tensor]:
    inputs = tensors(model.inputs)
    return [x.double() if double and x.is_floating_point() else x for x in inputs]


def in_jax(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient in JAX's convention, which is the conjugate of torch's."""
    return gradient.conj()


def torch_batch(model: Model) -> Any:
    """One example after the other."""
    f, params = theirs(model)
    with torch.no_grad():
        outs = [f(params, *tensors(row)) for row in zip(*two_examples(model), strict=True)]
    stacked = [jax.tree.leaves(dict_of(out)) for out in outs]
    structure = jax.tree.structure(dict_of(outs[0]))
    tree = jax.tree.unflatten(structure, [torch.stack(column) for column in zip(*stacked, strict=True)])
    return type(outs[0])(**tree) if isinstance(outs[0], dict) else tree


def torch_tangent(model: Model) -> Any:
    forward, _ = model.orders
    f, params = theirs(model, double=not forward)
    params = {name: p.detach() for name, p in params.items()}
    moved, inputs = directions(TORCH, params), inputs_of(model, double=not forward)
    part = lambda p: TORCH.inexact(dict_of(f(p, *inputs)))
    if forward:
        with composite():
            outs, along = torch.func.jvp(part, (params,), (moved,))
        # Torch makes a float64 tangent of a float32 number and a Python number.
        return tuple(t.to(out.dtype) for out, t in zip(outs, along, strict=True))
    one, other = (part({name: p + step * moved[name] for name, p in params.items()}) for step in (1e-6, -1e-6))
    return tuple(((a - b) / 2e-6).float() for a, b in zip(one, other, strict=True))


def torch_second(model: Model) -> dict[str, torch.Tensor]:
    _, backward = model.orders
    if backward < 2:
        one, other = (torch_gradient(model, double=True, step=step) for step in (1e-6, -1e-6))
        return {name: ((one[name] - other[name]) / 2e-6).float() for name in one}
    f, params = theirs(model)
    wrt = list(params.values())
    anchor = 0 * TORCH.total([p * p for p in wrt])
    with composite():
        loss = loss_of(TORCH, f)(params, *tensors(model.inputs)) + anchor
        grads = torch.autograd.grad(loss, wrt, create_graph=True)
        along = sum((in_jax(g) * TORCH.weights(p)).real.sum() for g, p in zip(grads, wrt, strict=True))
        return dict(zip(params, map(in_jax, torch.autograd.grad(along + anchor, wrt)), strict=True))


MODES: dict[str, tuple[Fn, Callable[[Model], Any]]] = {
    "value": (value, torch_value),
    "gradient": (gradient, torch_gradient),
    "batch": (batch, torch_batch),
    "tangent": (tangent, torch_tangent),
    "second": (second, torch_second),
}


def two_examples(model: Model) -> list[np.ndarray[Any, Any]]:
    return [np.stack([x, other_example(x)]) for x in model.inputs]


@functools.cache
def reference(model: Model, mode: str) -> Any:
    return MODES[mode][1](model)


REENTRANT = pytest.mark.xfail(strict=True, reason="a reentrant checkpoint knows backward() alone")


def gap(model: Model, mode: str) -> Any:
    """The mark of what does not hold yet."""
    return REENTRANT if model.id == "reentrant_checkpoint" and mode in ("gradient", "tangent", "second") else ()


@pytest.mark.parametrize(
    ("model", "mode", "how"),
    [
        pytest.param(model, mode, how, marks=gap(model, mode), id=f"{model.id}-{mode}-{how}")
        for model in MODELS
        for mode in MODES
        for how in ("eager", "compiled")
    ],
)
def test_model(model: Model, mode: str, how: str) -> None:
    """A model under a transform of JAX is what torch makes of it."""
    apply = functools.partial(MODES[mode][0], ours(model))
    run = jax.jit(apply) if how == "compiled" else apply
    inputs = two_examples(model) if mode == "batch" else model.inputs
    assert_close(run(arrays(model.params), arrays(inputs)), reference(model, mode), model.tolerance)


@pytest.mark.parametrize("name", ["mlp", "resnet", "tied", "gpt2"])
def test_a_module_inside_a_function(name: str) -> None:
    """A function of the user's own that calls a module with the parameters it is given."""
    model = BY_ID[name]
    module = model.module()
    f = levels(lambda params, *inputs: functional_call(module, params, inputs, model.statics))
    params, inputs = arrays(model.params), arrays(model.inputs)
    assert_close(f(params, *inputs), reference(model, "value"), model.tolerance)
    apply = functools.partial(gradient, f)
    for run in (apply, jax.jit(apply)):
        assert_close(run(params, inputs), reference(model, "gradient"), model.tolerance)


# Where nobody can renew what is held, a refusal is right: it names the attribute.
MAY_REFUSE = {
    "Closure": "Closure.run",
    "Hooked": "_forward_hooks",
    "with_new_forward": "Two.forward",
    "with_scripted_child": "Two.a",
}


@pytest.mark.parametrize("model", models.REFERRING, ids=lambda model: model.id)
def test_a_module_computes_with_the_weights_it_is_given(model: Model) -> None:
    """However it refers to its parts: by attribute, in a list, from a parent. Never with its own, in silence."""
    for mode in ("value", "gradient"):
        for jitted in (False, True):
            try:
                apply = functools.partial(MODES[mode][0], ours(model))
                found = (jax.jit(apply) if jitted else apply)(arrays(model.params), arrays(model.inputs))
            except InteropError as error:
                assert MAY_REFUSE[model.id] in str(error)
            else:
                assert_close(found, reference(model, mode), model.tolerance)


# --- how often the Python forward runs --------------------------------------------------------------------------------

RUNS_AGAIN = pytest.mark.xfail(strict=True, reason="a compiled function can't be traced: its gradient runs it again")
TRACEABLE = [model for model in MODELS if model.traceable and model.id != "reentrant_checkpoint"]


@pytest.mark.parametrize("model", TRACEABLE, ids=lambda model: model.id)
def test_an_eager_gradient_runs_the_forward_once(model: Model) -> None:
    f, calls = crossed(model)
    params, inputs = arrays(model.params), arrays(model.inputs)
    gradient(f, params, inputs)  # the first also looks at shapes
    calls.clear()
    gradient(f, params, inputs)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "model", [pytest.param(m, id=m.id, marks=RUNS_AGAIN if m.id == "compiled_part" else ()) for m in TRACEABLE]
)
def test_a_compiled_gradient_never_runs_the_forward(model: Model) -> None:
    """What ran in the trace is all that runs; the program computes with graphs, whatever weights it is given."""
    f, calls = crossed(model)
    params, inputs = arrays(model.params), arrays(model.inputs)
    step = jax.jit(jax.value_and_grad(loss_of(JAX, f)))
    jax.block_until_ready(step(params, *inputs))
    calls.clear()
    for _ in range(2):
        params = jax.block_until_ready(step(params, *inputs))[1]
    assert not calls


# --- torch's global flags ---------------------------------------------------------------------------------------------


def flags() -> dict[str, Any]:
    """By what torch chooses its kernels, in every thread of the process."""
    return {
        "mkldnn": torch.backends.mkldnn.enabled,
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "fast path of attention": torch.backends.mha.get_fastpath_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "default dtype": torch.get_default_dtype(),
    }


FUSED = {
    "attention": ("gradient", "batch", "tangent", "second"),
    "transformer_encoder": ("gradient", "batch", "tangent", "second"),
    "lstm": ("gradient", "batch", "tangent"),
    "llama": ("gradient", "second"),
}


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, modes in FUSED.items() for mode in modes])
def test_torchs_flags_are_left_alone(name: str, mode: str) -> None:
    """No other thread sees them change, from the first trace on, and nobody afterwards."""
    model, before, seen = BY_ID[name], flags(), []
    module = model.module()
    with ThreadPoolExecutor(1) as other:
        module.register_forward_pre_hook(lambda *_: seen.append(other.submit(flags).result()))
        net = levels(module)
        f = lambda params, *inputs: model.call(net, params, inputs)
        inputs = two_examples(model) if mode == "batch" else model.inputs
        jax.block_until_ready(jax.jit(functools.partial(MODES[mode][0], f))(arrays(model.params), arrays(inputs)))
    assert seen
    assert all(state == before for state in [*seen, flags()])


# --- what was silently wrong ------------------------------------------------------------------------------------------

_MATRIX = np.array([[2.0, 0.3, -0.1], [0.2, 1.5, 0.4], [0.1, -0.3, 1.2]], np.float32)
LINEAR_ALGEBRA: dict[str, Fn] = {
    "det": torch.linalg.det,
    "logdet": torch.logdet,
    "slogdet": lambda a: torch.linalg.slogdet(a).logabsdet,
    "solve": lambda a: torch.linalg.solve(a, a.sin()),
    "cholesky": lambda a: torch.linalg.cholesky(a @ a.mT),
}
IN_JAX = {name: levels(fn) for name, fn in LINEAR_ALGEBRA.items()}
ORDERS: dict[str, Callable[[Fn, jax.Array, jax.Array], jax.Array]] = {
    "forwards_over_backwards": lambda f, a, d: jax.jvp(jax.grad(f), (a,), (d,))[1],
    "backwards_over_backwards": lambda f, a, d: jax.grad(lambda b: (jax.grad(f)(b) * d).sum())(a),
    "backwards_over_forwards": lambda f, a, d: jax.grad(lambda b: jax.jvp(f, (b,), (d,))[1])(a),
    "forwards_over_forwards": lambda f, a, d: jax.jacfwd(lambda b: jax.jvp(f, (b,), (d,))[1])(a),
}


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", LINEAR_ALGEBRA)
def test_second_derivatives_of_linear_algebra(name: str, order: str, how: str) -> None:
    """In any order of the modes. Torch's own are wrong in some of them, and in silence."""
    fn, direction = LINEAR_ALGEBRA[name], np.cos(np.arange(9, dtype=np.float32).reshape(3, 3))
    apply = functools.partial(ORDERS[order], lambda a: JAX.total(IN_JAX[name](a)))
    run = jax.jit(apply) if how == "compiled" else apply

    a = torch.tensor(_MATRIX, requires_grad=True)
    (g,) = torch.autograd.grad(TORCH.total(fn(a)), a, create_graph=True)
    (expected,) = torch.autograd.grad((g * torch.tensor(direction)).sum(), a)
    assert_close(run(jnp.asarray(_MATRIX), jnp.asarray(direction)), expected, 1e-4)


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_checkpoint_computes_again_with_the_weights_it_was_given(how: str) -> None:
    """In a function of the user's own too, which puts them in the module for the time of the call."""
    model = BY_ID["checkpoint"]
    module = model.module()
    f = levels(lambda params, x: functional_call(module, params, (x,)))
    apply = functools.partial(gradient, f)
    run = jax.jit(apply) if how == "compiled" else apply
    assert_close(run(arrays(model.params), arrays(model.inputs)), reference(model, "gradient"), model.tolerance)


class Mixed(nn.Module):
    """Integers and a mask beside floats, before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = torch.sin(self.linear(x))
        best = y.argmax(1)
        return {"best": best, "rows": y * best[:, None], "mask": y > 0, "kept": torch.where(y > 0, y**2, x)}


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.complex64))
        self.phase = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = torch.polar(x, self.phase.expand_as(x)) @ self.weight
        return z * z.conj().roll(1, -1) + z**3, z.abs()


@pytest.mark.parametrize("mode", ["value", "gradient", "batch", "tangent", "second"])
@pytest.mark.parametrize("make", [Mixed, Complex])
def test_what_stands_beside_a_float(make: type[nn.Module], mode: str) -> None:
    """Outputs without a derivative shift nothing, and a complex gradient is the conjugate of torch's."""
    x = np.random.default_rng(0).uniform(0.2, 1, (4, 3)).astype(np.float32)
    model = Model(make.__name__, make, (x,))
    apply = functools.partial(MODES[mode][0], ours(model))
    inputs = arrays(two_examples(model) if mode == "batch" else model.inputs)
    for run in (apply, jax.jit(apply)):
        assert_close(run(arrays(model.params), inputs), reference(model, mode), model.tolerance)


@pytest.mark.parametrize("name", ["tied", "gpt2", "t5"])
def test_a_module_that_shares_its_parts_is_not_damaged(name: str) -> None:
    """It keeps its own parameters, under every name, with their own values."""
    model = BY_ID[name]
    module = model.module()
    before = {n: (id(p), p.detach().clone()) for n, p in module.named_parameters(remove_duplicate=False)}
    net = levels(module)
    f = lambda params, *inputs: model.call(net, params, inputs)
    for transform in (gradient, second):
        apply = functools.partial(transform, f)
        for run in (apply, jax.jit(apply)):
            run(arrays(model.params), arrays(model.inputs))
    after = dict(module.named_parameters(remove_duplicate=False))
    assert list(after) == list(before)
    for n, parameter in after.items():
        assert type(parameter) is nn.Parameter
        assert id(parameter) == before[n][0]
        assert torch.equal(parameter, before[n][1])
        assert parameter.grad is None


class CountsInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.linear(x) * self.calls


class CountsAnew(CountsInPlace):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        return self.linear(x) * self.calls


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


UPDATES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch_norm": (normalised, "1.running_mean"),
    "in_place": (CountsInPlace, "calls"),
    "anew": (CountsAnew, "calls"),
}


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("mode", ["value", "gradient"])
@pytest.mark.parametrize("name", UPDATES)
def test_a_module_that_would_update_its_buffers_is_refused(name: str, mode: str, how: str) -> None:
    """The message names the buffer, and it stays as it was."""
    make, buffer = UPDATES[name]
    module = make()
    before = copy.deepcopy(module.state_dict())
    net = levels(module)
    apply = functools.partial(MODES[mode][0], net)
    run = jax.jit(apply) if how == "compiled" else apply
    params = {n: jnp.asarray(p.detach().numpy()) for n, p in module.named_parameters()}
    with pytest.raises(UnsupportedError, match=buffer):
        run(params, [jnp.ones((3, 2))])
    for n, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[n])


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("mode", MODES)
def test_a_model_in_training_keeps_its_own_buffers(mode: str, how: str) -> None:
    model = BY_ID["resnet_in_training"]
    module = model.module()
    before = copy.deepcopy(module.state_dict())
    net = levels(module, mutable=True)
    apply = functools.partial(MODES[mode][0], net)
    run = jax.jit(apply) if how == "compiled" else apply
    jax.block_until_ready(run(arrays(model.params), arrays(two_examples(model) if mode == "batch" else model.inputs)))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("name", UPDATES)
def test_a_module_that_may_update_its_buffers_returns_them(name: str) -> None:
    """Starting from those in the mapping, else from its own; the module is not touched. A scan is a training loop."""
    make, _ = UPDATES[name]
    module = make()
    own = {n: b.detach().clone() for n, b in module.named_buffers()}
    net = levels(module, mutable=True)
    params = {n: jnp.asarray(p.detach().numpy()) for n, p in module.named_parameters()}
    xs = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)

    out, first = net(params, jnp.asarray(xs[0]))
    start = {n: jnp.asarray(b.numpy()).astype(first[n].dtype) for n, b in own.items()}

    def step(buffers: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        y, buffers = net(params | buffers, x)
        return buffers, y

    last, outs = jax.jit(lambda buffers: jax.lax.scan(step, buffers, jnp.asarray(xs)))(start)
    assert all(torch.equal(b, own[n]) for n, b in module.named_buffers())

    twin = copy.deepcopy(module)
    with torch.no_grad():
        ys = [twin(torch.tensor(x)) for x in xs]
    assert_close(out, ys[0], 2e-5)
    assert_close(outs, torch.stack(ys), 2e-5)
    assert_close(last, dict(twin.named_buffers()), 2e-5)


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_cache_that_cannot_leave_torch_is_refused(how: str) -> None:
    """GPT-2 as it is by default returns one; the message says what to pass."""
    model = BY_ID["gpt2"]
    net = levels(model.module())
    run = jax.jit(lambda *xs: net(*xs).logits) if how == "compiled" else net
    with pytest.raises(ContainerError, match="use_cache=False"):
        run(arrays(model.params), *arrays(model.inputs))


# --- dropout ----------------------------------------------------------------------------------------------------------

RANDOM: dict[str, Model] = {
    "transformer_encoder": replace(BY_ID["transformer_encoder"], make=lambda: models.transformer_encoder().train()),
    "lstm": replace(BY_ID["lstm"], make=lambda: nn.LSTM(3, 4, num_layers=2, batch_first=True, dropout=0.5)),
    "gpt2": replace(BY_ID["gpt2"], make=lambda: models.gpt2().train()),
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_model_in_training_takes_a_key(name: str) -> None:
    """The same key is the same mask: eagerly, compiled, batched, and in the backward. Torch's generator stays put."""
    model = RANDOM[name]
    net = levels(model.module().double(), rng="key")
    state = torch.get_rng_state()
    with jax.enable_x64(True):
        point = {n: p.astype(np.float64) for n, p in model.params.items()}
        params = arrays(point)
        inputs = [jnp.asarray(x.astype(np.float64) if x.dtype == np.float32 else x) for x in model.inputs]

        def loss(params: Any, key: jax.Array) -> jax.Array:
            return JAX.total(dict_of(model.call(functools.partial(net, key=key), params, inputs)))

        keys = jax.random.split(jax.random.key(0), 2)
        one, other = loss(params, keys[0]), loss(params, keys[1])
        assert one != other
        np.testing.assert_allclose(jax.jit(loss)(params, keys[0]), one, rtol=1e-12)
        np.testing.assert_allclose(jax.vmap(loss, in_axes=(None, 0))(params, keys), [one, other], rtol=1e-12)

        moved = jax.tree.map(np.asarray, directions(JAX, params))
        ahead, behind = (loss(arrays({n: p + h * moved[n] for n, p in point.items()}), keys[0]) for h in (1e-6, -1e-6))
        for derivative in (jax.value_and_grad(loss), jax.jit(jax.value_and_grad(loss))):
            found, grads = derivative(params, keys[0])
            np.testing.assert_allclose(found, one, rtol=1e-12)
            slope = sum((np.asarray(g) * moved[n]).sum() for n, g in grads.items())
            np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, rtol=1e-5)
    assert torch.equal(state, torch.get_rng_state())
