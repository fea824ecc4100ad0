"""Randomness and state of a torch function in JAX: keys, torch's generator, buffers, the modes of a module."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import dropout
from torch.nn.utils import parametrizations

import interop
from interop import as_jax, as_torch, differentiable, jittable

Fn = Callable[..., Any]


def levels(fn: Fn) -> Fn:
    """With everything declared."""
    return jittable(differentiable(fn))


def masked(x: torch.Tensor) -> torch.Tensor:
    """Half of it, twice as large; of ones, the mask itself, which is also the derivative."""
    return dropout(x, 0.5)


ones = jnp.ones(64)
x = jnp.linspace(-1, 1, 64)


def state() -> list[int]:
    """Of torch's generator."""
    return torch.get_rng_state().tolist()


# --- a key ------------------------------------------------------------------------------------------------------------


def keyed(fn: Fn = masked, **options: Any) -> Fn:
    """A function of torch that is given a key."""
    return levels(as_jax(fn, rng="key", **options))


key = jax.random.key(7)
keys = jax.random.split(jax.random.key(8), 5)


def looped(k: Any) -> Any:
    """Keyed values of a `while_loop`, which has no reverse mode."""
    return lambda f, x: jax.lax.while_loop(lambda s: s[0] < 1, lambda s: (s[0] + 1, f(x, key=k)), (0, x))[1]


VALUE_WAYS: dict[str, Callable[[Fn, Any, Any], Any]] = {
    "call": lambda f, x, k: f(x, key=k),
    "jit": lambda f, x, k: jax.jit(f)(x, key=k),
    "jit closing over the key": lambda f, x, k: jax.jit(lambda x: f(x, key=k))(x),
    "compiled ahead": lambda f, x, k: jax.jit(f).lower(x, key=k).compile()(x, key=k),
    "scan": lambda f, x, k: jax.lax.scan(lambda c, k: (c, f(x, key=k)), 0, k[None])[1][0],
    "map": lambda f, x, k: jax.lax.map(lambda k: f(x, key=k), k[None])[0],
    "while_loop": lambda f, x, k: looped(k)(f, x),
    "cond": lambda f, x, k: jax.lax.cond(True, lambda: f(x, key=k), lambda: x),
    "checkpoint": lambda f, x, k: jax.checkpoint(f)(x, key=k),
    "vmap over the key": lambda f, x, k: jax.vmap(lambda k: f(x, key=k))(k[None])[0],
    "vmap over the rest": lambda f, x, k: jax.vmap(lambda x: f(x, key=k))(x[None])[0],
    "jit of vmap": lambda f, x, k: jax.jit(jax.vmap(lambda x, k: f(x, key=k)))(x[None], k[None])[0],
    "value and grad": lambda f, x, k: jax.value_and_grad(lambda x: (lambda y: (y.sum(), y))(f(x, key=k)), has_aux=True)(x)[0][1],
    "jit of value and grad": lambda f, x, k: jax.jit(jax.value_and_grad(lambda x: (lambda y: (y.sum(), y))(f(x, key=k)), has_aux=True))(x)[0][1],
    "jvp": lambda f, x, k: jax.jvp(lambda x: f(x, key=k), (x,), (x,))[0],
    "vjp": lambda f, x, k: jax.vjp(lambda x: f(x, key=k), x)[0],
    "custom_vjp": lambda f, x, k: _custom_vjp(f)(x, k),
}  # fmt: skip


def _custom_vjp(f: Fn) -> Fn:
    g = jax.custom_vjp(lambda x, k: f(x, key=k))
    g.defvjp(lambda x, k: (f(x, key=k), (x, k)), lambda residuals, ct: (f(residuals[0], key=residuals[1]) * ct, None))
    return g


@pytest.mark.parametrize("way", VALUE_WAYS.values(), ids=VALUE_WAYS)
def test_one_key_is_one_draw_however_it_is_asked(way: Callable[..., Any]) -> None:
    expected = keyed()(x, key=key)
    assert 16 < int((expected == 0).sum()) < 48
    for _ in range(2):
        torch.rand(3)
        assert way(keyed(), x, key).tolist() == expected.tolist()


GRADIENT_WAYS: dict[str, Fn] = {
    "grad": lambda f: jax.grad(lambda x: f(x).sum())(ones),
    "jit of grad": lambda f: jax.jit(jax.grad(lambda x: f(x).sum()))(ones),
    "grad of jit": lambda f: jax.grad(lambda x: jax.jit(f)(x).sum())(ones),
    "vjp": lambda f: jax.vjp(f, ones)[1](ones)[0],
    "jitted pull-back": lambda f: jax.jit(jax.vjp(f, ones)[1])(ones)[0],
    "jvp": lambda f: jax.jvp(f, (ones,), (ones,))[1],
    "jit of jvp": lambda f: jax.jit(lambda x: jax.jvp(f, (x,), (x,))[1])(ones),
    "linearize": lambda f: jax.linearize(f, ones)[1](ones),
    "jacrev": lambda f: jax.jacrev(f)(ones).sum(1),
    "jacfwd": lambda f: jax.jacfwd(f)(ones).sum(1),
    "hessian": lambda f: jnp.diag(jax.hessian(lambda x: (f(x) * x).sum())(ones)) / 2,
    "checkpoint": lambda f: jax.grad(jax.checkpoint(lambda x: f(x).sum()))(ones),
    "jit of checkpoint": lambda f: jax.jit(jax.grad(jax.checkpoint(lambda x: f(x).sum())))(ones),
    "grad of vmap": lambda f: jax.grad(lambda b: jax.vmap(f)(b).sum())(ones[None])[0],
    "vmap of grad": lambda f: jax.vmap(jax.grad(lambda x: f(x).sum()))(ones[None])[0],
    "grad of scan": lambda f: jax.grad(lambda x: jax.lax.scan(lambda c, _: (c, f(x)), 0, None, length=1)[1].sum())(ones),
    "grad of cond": lambda f: jax.grad(lambda x: jax.lax.cond(x[0] > 0, f, lambda x: x, x).sum())(ones),
}  # fmt: skip


@pytest.mark.parametrize("way", GRADIENT_WAYS.values(), ids=GRADIENT_WAYS)
def test_the_mask_of_the_backward_is_the_mask_of_the_forward(way: Fn) -> None:
    f = keyed()
    assert way(lambda x: f(x, key=key)).tolist() == f(ones, key=key).tolist()


@pytest.mark.parametrize("way", GRADIENT_WAYS.values(), ids=GRADIENT_WAYS)
def test_the_same_of_a_function_that_looks_at_values(way: Fn) -> None:
    """Its gradient can't be captured: it is recomputed, with the same key."""
    f = jittable(example_output=jax.ShapeDtypeStruct((64,), jnp.float32))(keyed(looks))
    assert way(lambda x: f(x, key=key)).tolist() == f(ones, key=key).tolist()


def test_one_key_over_a_batch_is_one_mask() -> None:
    f, batch = keyed(), jnp.ones((5, 64))
    for rows in (jax.vmap(lambda x: f(x, key=key))(batch), jax.jit(jax.vmap(lambda x: f(x, key=key)))(batch)):
        assert rows.tolist() == [f(ones, key=key).tolist()] * 5


OVER_KEYS: dict[str, Fn] = {
    "vmap": lambda f: jax.vmap(lambda x, k: f(x, key=k)),
    "jit of vmap": lambda f: jax.jit(jax.vmap(lambda x, k: f(x, key=k))),
    "vmap of jit": lambda f: jax.vmap(jax.jit(lambda x, k: f(x, key=k))),
    "vmap of grad": lambda f: jax.vmap(jax.grad(lambda x, k: (f(x, key=k) ** 2).sum())),
    "jit of vmap of grad": lambda f: jax.jit(jax.vmap(jax.grad(lambda x, k: (f(x, key=k) ** 2).sum()))),
    "vmap of hessian": lambda f: jax.vmap(jax.hessian(lambda x, k: (f(x, key=k) ** 2).sum())),
    "vmap of jvp": lambda f: jax.vmap(lambda x, k: jax.jvp(lambda x: f(x, key=k), (x,), (x,))[1]),
    "vmap of checkpoint": lambda f: jax.vmap(jax.grad(jax.checkpoint(lambda x, k: f(x, key=k).sum()))),
}


@pytest.mark.parametrize("over", OVER_KEYS.values(), ids=OVER_KEYS)
def test_a_batch_of_keys_is_a_loop_over_keys(over: Fn) -> None:
    f = keyed()
    batch = jnp.arange(1.0, 21.0).reshape(5, 4)
    rows = over(f)(batch, keys)
    assert rows.tolist() == [over(f)(batch[i : i + 1], keys[i : i + 1])[0].tolist() for i in range(5)]
    assert len({str(row.tolist()) for row in jax.vmap(lambda k: f(ones, key=k))(keys)}) == 5


def test_keys_in_two_axes() -> None:
    f = keyed()
    many = jax.random.split(key, (2, 3))
    rows = jax.jit(jax.vmap(jax.vmap(lambda k: f(x, key=k))))(many)
    assert rows.tolist() == [[f(x, key=many[i, j]).tolist() for j in range(3)] for i in range(2)]


def test_the_gradient_of_a_scan_over_keys_is_that_of_the_loop_written_out() -> None:
    f = keyed()

    def scanned(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, k: (f(c, key=k) * 0.5, None), x, keys)[0].sum()

    def unrolled(x: jax.Array) -> jax.Array:
        for i in range(5):
            x = f(x, key=keys[i]) * 0.5
        return x.sum()

    many = jnp.ones(512)  # some of it is left after five halvings
    assert scanned(many) == unrolled(many) > 0
    for grad in (jax.grad, lambda g: jax.jit(jax.grad(g))):
        assert grad(scanned)(many).tolist() == grad(unrolled)(many).tolist()


@pytest.mark.parametrize("call", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_raw_key_is_the_typed_key(call: Fn) -> None:
    f = call(keyed())
    for raw in (jax.random.PRNGKey(7), jax.random.key_data(key), np.asarray(jax.random.key_data(key))):
        assert f(x, key=raw).tolist() == f(x, key=key).tolist()


def test_a_key_of_another_kind() -> None:
    """Its data is longer; nothing of it is lost."""
    f, one = keyed(), jax.random.key(0, impl="rbg")
    masks = [f(ones, key=k).tolist() for k in (one, *jax.random.split(one, 3))]
    assert len(set(map(str, masks))) == 4
    assert jax.jit(f)(ones, key=one).tolist() == masks[0]


@pytest.mark.parametrize("word", [0, 1], ids=["high", "low"])
def test_every_bit_of_a_key_counts(word: int) -> None:
    """Torch's own seed counts with 32 bits alone."""
    raw = np.full((200, 2), 5, np.uint32)
    raw[:, word] = [*range(100), *(2**32 - 1 - np.arange(100))]
    masks = jax.vmap(lambda k: keyed()(ones, key=k))(jnp.asarray(raw))
    assert len({str(mask) for mask in masks.tolist()}) == 200


DRAWS: dict[str, Fn] = {
    "rand": lambda x: x + torch.rand(64),
    "randn_like": lambda x: x + torch.randn_like(x),
    "normal_": lambda x: x + torch.empty(64).normal_(),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "multinomial": lambda x: torch.multinomial(x.softmax(0), 64, replacement=True),
    "randperm": lambda x: x * torch.randperm(64),
    "randint": lambda x: x + torch.randint(1000, (64,)),
    "poisson": lambda x: torch.poisson(x * 30),
    "rrelu": lambda x: torch.nn.functional.rrelu(x - 2, training=True),
    "gumbel_softmax": lambda x: torch.nn.functional.gumbel_softmax(x),
    "distribution": lambda x: torch.distributions.Normal(x, 1.0).rsample(),
    "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(*[x.reshape(1, 8, 8)] * 3, dropout_p=0.5),
}


TURNED: dict[str, Fn] = {  # of values whose memory is in another order than their elements
    "dropout": lambda x: dropout(x.T, 0.5),
    "dropout in place": lambda x: dropout(x.T * 1, 0.5, True, True),
    "alpha_dropout": lambda x: torch.nn.functional.alpha_dropout(x.T, 0.5, training=True),
    "rrelu": lambda x: torch.nn.functional.rrelu(x.T - 2, training=True),
    "rand_like": lambda x: x.T * torch.rand_like(x.T),
    "fill": lambda x: x.T * torch.empty_like(x.T).normal_(),
    "bernoulli": lambda x: x.T * torch.bernoulli(x.T.sigmoid()),
    "by keyword": lambda x: dropout(input=x.T * 1, p=0.5, inplace=True),
    "normal of a number": lambda x: x.T * torch.normal(0.0, x.T),
    "normal of numbers": lambda x: x.T * torch.normal(0.0, 1.0, (8, 8)),
    "normal of two": lambda x: x.T * torch.normal(x, x.T).detach(),
    "channels last": lambda x: dropout(x.reshape(1, 4, 4, 4).to(memory_format=torch.channels_last), 0.5),
}


@pytest.mark.parametrize("fn", TURNED.values(), ids=TURNED)
def test_a_draw_does_not_depend_on_the_order_of_the_memory(fn: Fn) -> None:
    """Which is another in a batch, below a derivative, and in a captured graph."""
    f, matrix = keyed(fn), jnp.ones((8, 8))
    g = lambda x: f(x, key=key)
    expected = g(matrix).tolist()
    assert jax.jit(g)(matrix).tolist() == expected
    assert jax.vmap(g)(matrix[None])[0].tolist() == expected
    assert jax.jvp(g, (matrix,), (matrix,))[0].tolist() == expected
    slope = jax.grad(lambda x: g(x).sum())(matrix)
    for gradient in (
        jax.jit(jax.grad(lambda x: g(x).sum()))(matrix),
        jax.vmap(jax.grad(lambda x: g(x).sum()))(matrix[None])[0],
        jax.grad(lambda x: jax.checkpoint(g)(x).sum())(matrix),
    ):
        np.testing.assert_allclose(gradient, slope, rtol=1e-6)
    along = jax.jvp(lambda x: g(x).sum(), (matrix,), (matrix,))[1]
    np.testing.assert_allclose(along, slope.sum(), rtol=1e-5)


def test_a_transformer_in_training_has_one_mask_in_every_derivative() -> None:
    apply, params = interop.make_functional(
        nn.TransformerEncoderLayer(8, 2, 16, 0.3, "gelu", batch_first=True), rng="key"
    )
    x = jax.random.normal(jax.random.key(1), (2, 4, 8))
    v, w = (jax.random.normal(jax.random.key(i), x.shape) for i in (2, 3))
    loss = lambda x: (apply(params, x, key=key) ** 2 * w).sum()
    slope = (jax.grad(loss)(x) * v).sum()
    for along in (jax.jvp(loss, (x,), (v,))[1], jax.jit(lambda x: jax.jvp(loss, (x,), (v,))[1])(x)):
        np.testing.assert_allclose(along, slope, rtol=1e-4)
    np.testing.assert_allclose(jax.vmap(loss)(x[None])[0], loss(x), rtol=1e-5)
    by_differences = (jax.grad(loss)(x + 1e-2 * v) - jax.grad(loss)(x - 1e-2 * v)) / 2e-2
    product = jax.jvp(jax.grad(loss), (x,), (v,))[1]
    np.testing.assert_allclose(product, by_differences, atol=2e-2 * float(abs(product).max()))


@pytest.mark.parametrize("fn", DRAWS.values(), ids=DRAWS)
def test_whatever_is_drawn_comes_from_the_key(fn: Fn) -> None:
    f = keyed(fn)
    one, other = (f(ones, key=k).tolist() for k in keys[:2])
    assert one != other
    assert one == f(ones, key=keys[0]).tolist() == jax.jit(f)(ones, key=keys[0]).tolist()
    assert jax.vmap(lambda k: f(ones, key=k))(keys[:2]).tolist() == [one, other]


def raises(x: torch.Tensor) -> torch.Tensor:
    """After it has drawn."""
    torch.rand(3)
    raise ArithmeticError


def test_the_generator_of_the_user_is_left_alone() -> None:
    """Whatever is asked, and whatever becomes of it."""
    f, failing = keyed(), keyed(raises)
    before = state()
    for way in VALUE_WAYS.values():
        jax.block_until_ready(way(f, x, key))
    for gradient in GRADIENT_WAYS.values():
        jax.block_until_ready(gradient(lambda x: f(x, key=key)))
    for call in (failing, jax.jit(failing), jax.grad(lambda x, key: failing(x, key=key).sum())):
        with pytest.raises(ArithmeticError):
            call(x, key=key)
    assert state() == before


def test_keys_in_threads_at_once() -> None:
    """One generator serves them all, one after the other."""
    f = keyed(lambda x: torch.cat([x + torch.rand(64) for _ in range(20)]))
    jitted, many = jax.jit(f), jax.random.split(key, 8)
    expected = [f(x, key=k).tolist() for k in many]
    before = state()

    def work(i: int) -> bool:
        return all(call(x, key=many[i]).tolist() == expected[i] for _ in range(10) for call in (f, jitted))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert state() == before


def test_a_key_inside_a_key() -> None:
    """A crossing that calls another through JAX: each has its own, and goes on with it afterwards."""
    inner = keyed(lambda x: x + torch.rand(64))

    def both(x: torch.Tensor) -> torch.Tensor:
        first = torch.rand(64)
        return torch.stack([first, as_torch(lambda a: inner(a, key=keys[1]))(x), torch.rand(64)])

    def alone(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.rand(64), torch.zeros(64), torch.rand(64)])

    rows, expected = keyed(both)(x, key=key), keyed(alone)(x, key=key)
    assert rows[0].tolist() == expected[0].tolist()
    assert rows[1].tolist() == inner(x, key=keys[1]).tolist()
    assert rows[2].tolist() == expected[2].tolist()


def test_the_key_is_no_argument_of_the_function() -> None:
    """It is not given, whatever the function takes."""

    @functools.partial(as_jax, rng="key")
    def f(*args: Any, **kwargs: Any) -> torch.Tensor:
        assert not kwargs
        return args[0] + torch.rand(64)

    assert f(x, key=key).shape == (64,)
    parameter = inspect.signature(as_jax(masked, rng="key")).parameters["key"]
    assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
    assert parameter.default is inspect.Parameter.empty


def test_a_key_under_a_name_of_ones_own() -> None:
    f = as_jax(masked, rng="dropout_key")
    assert f(x, dropout_key=key).tolist() == keyed()(x, key=key).tolist()


def test_a_name_that_is_taken() -> None:
    with pytest.raises(interop.OptionError, match="x"):
        as_jax(masked, rng="x")


def test_a_call_without_its_key() -> None:
    with pytest.raises(TypeError, match=r"masked\(\) missing 1 required keyword-only argument: 'key'"):
        as_jax(masked, rng="key")(x)


NO_KEY_AT_ALL: dict[str, Any] = {
    "none": None,
    "number": 7,
    "string": "seed",
    "floats": jnp.ones(2),
    "too short": jnp.ones(1, jnp.uint32),
    "signed": jnp.ones(2, jnp.int32),
    "tensor": torch.ones(2),
    "several raw": jnp.ones((3, 2), jnp.uint32),
    "several": keys,
}


@pytest.mark.parametrize("given", NO_KEY_AT_ALL.values(), ids=NO_KEY_AT_ALL)
def test_what_is_no_key_is_refused_by_name(given: Any) -> None:
    """Nothing is drawn, and the next call works."""
    f, before = keyed(), state()
    for call in (f, jax.jit(lambda x: f(x, key=given))):
        with pytest.raises(interop.LeafError, match=r"masked: argument key: .*jax\.random\.key"):
            call(x) if call is not f else f(x, key=given)
    assert state() == before
    assert f(x, key=key).shape == (64,)


class Net(nn.Module):
    """Two layers with a dropout each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(8, 32), nn.Linear(32, 32), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.second(self.drop(self.first(x))))


def arrays(named: Any) -> dict[str, jax.Array]:
    """Parameters or buffers as arrays of their own."""
    return {name: jnp.asarray(t.detach().numpy().copy()) for name, t in named}


def test_a_module_with_dropout() -> None:
    """The gradient is that of the layers under the masks that the value shows; without training the key does nothing."""
    net = Net()
    apply, params, batch = keyed(net), arrays(net.named_parameters()), jnp.ones((4, 8))

    def loss(params: Any, key: Any) -> Any:
        return (apply(params, batch, key=key) ** 2).sum()

    value, grads = jax.value_and_grad(loss)(params, key)
    again, jitted = jax.jit(jax.value_and_grad(loss))(params, key)
    assert value == loss(params, key)
    assert jnp.allclose(value, again, rtol=1e-6)
    for name, grad in grads.items():
        np.testing.assert_allclose(jitted[name], grad, rtol=1e-5, atol=1e-5)
    there, back = ({name: p + step * grads[name] for name, p in params.items()} for step in (1e-4, -1e-4))
    slope = sum(float((g * g).sum()) for g in grads.values())
    assert float(loss(there, key) - loss(back, key)) / 2e-4 == pytest.approx(slope, rel=0.05)
    assert value != loss(params, keys[0])
    assert loss(params, keys[0]) != loss(params, keys[1])
    net.eval()
    assert apply(params, batch, key=key).tolist() == apply(params, batch, key=keys[0]).tolist()


# --- without a key, eagerly -------------------------------------------------------------------------------------------

noisy = levels(as_jax(masked))


def test_an_eager_call_draws_from_the_generator_of_torch() -> None:
    """As the function itself would, one call after the other."""
    torch.manual_seed(3)
    expected = [masked(torch.ones(64)).tolist() for _ in range(3)]
    after = state()
    torch.manual_seed(3)
    assert [noisy(ones).tolist() for _ in range(3)] == expected
    assert state() == after
    assert len(set(map(str, expected))) == 3


def test_an_eager_gradient_has_the_mask_of_its_value_and_draws_once() -> None:
    torch.manual_seed(3)
    expected = masked(torch.ones(64)).tolist()
    after = state()
    torch.manual_seed(3)
    out, pull = jax.vjp(noisy, ones)
    grad = pull(ones)[0]
    assert out.tolist() == grad.tolist() == expected
    assert pull(ones)[0].tolist() == expected
    assert state() == after


def pulled(f: Fn, x: Any) -> tuple[Any, Any]:
    """Value and derivative, from one call."""
    out, pull = jax.vjp(f, x)
    return out, pull(jnp.ones_like(out))[0]


def pushed(f: Fn, x: Any) -> tuple[Any, Any]:
    """The same forwards."""
    return jax.jvp(f, (x,), (jnp.ones_like(x),))


def looks(x: torch.Tensor) -> torch.Tensor:
    """The same mask, of a function that can't be traced."""
    return masked(x) if float(x.detach().sum()) > 0 else x


TWICE: dict[str, Callable[[Fn, Any], Any]] = {
    "jitted pull-back": lambda f, x: (lambda out, pull: (out, jax.jit(pull)(x)[0]))(*jax.vjp(f, x)),
    "batch of cotangents": lambda f, x: (lambda out, pull: (out, jax.vmap(pull)(x[None])[0][0]))(*jax.vjp(f, x)),
    "jvp": pushed,
    "linearize": lambda f, x: (lambda out, push: (out, push(x)))(*jax.linearize(f, x)),
    "checkpoint": lambda f, x: pulled(jax.checkpoint(f), x),
    "vmap of vjp": lambda f, x: [row[0] for row in jax.vmap(lambda x: pulled(f, x))(x[None])],
    "vmap of jvp": lambda f, x: [row[0] for row in jax.vmap(lambda x: pushed(f, x))(x[None])],
    "vjp of vjp": lambda f, x: jax.vjp(lambda x: pulled(f, x), x)[0],
    "vjp of jvp": lambda f, x: jax.vjp(lambda x: pushed(f, x), x)[0],
    "jvp of vjp": lambda f, x: jax.jvp(lambda x: pulled(f, x), (x,), (x,))[0],
    "jvp of jvp": lambda f, x: jax.jvp(lambda x: pushed(f, x), (x,), (x,))[0],
}


@pytest.mark.parametrize("ask", TWICE.values(), ids=TWICE)
def test_a_derivative_never_has_another_mask(ask: Callable[[Fn, Any], Any]) -> None:
    """What needs a second run of a function that draws is right, or refused."""
    _right_or_refused(lambda: ask(noisy, ones))


@pytest.mark.parametrize("ask", TWICE.values(), ids=TWICE)
def test_nor_does_one_of_a_function_that_can_not_be_traced(ask: Callable[[Fn, Any], Any]) -> None:
    f = jittable(example_output=lambda x: x)(differentiable(as_jax(looks)))
    _right_or_refused(lambda: ask(f, ones))


def _right_or_refused(ask: Callable[[], Any]) -> None:
    for _ in range(3):
        try:
            value, derivative = ask()
        except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
            assert "rng=" in str(error)
        else:
            assert value.tolist() == derivative.tolist()
            assert 0 < int((derivative == 0).sum()) < 64


def test_an_example_of_a_batch_draws_its_own() -> None:
    rows = jax.vmap(noisy)(jnp.ones((6, 64)))
    assert len({str(row) for row in rows.tolist()}) == 6
    torch.manual_seed(4)
    first = jax.vmap(noisy)(jnp.ones((6, 64))).tolist()
    torch.manual_seed(4)
    assert jax.vmap(noisy)(jnp.ones((6, 64))).tolist() == first


def test_a_batch_by_a_loop_draws_as_the_loop_does() -> None:
    f = as_jax(masked, vmap="sequential")
    torch.manual_seed(5)
    expected = [masked(torch.ones(64)).tolist() for _ in range(4)]
    torch.manual_seed(5)
    assert jax.vmap(f)(jnp.ones((4, 64))).tolist() == expected


# --- without a key, in a program --------------------------------------------------------------------------------------


def test_every_execution_draws_anew_and_a_seed_repeats_it() -> None:
    run = jax.jit(noisy)
    assert len({str(run(ones).tolist()) for _ in range(4)}) == 4
    torch.manual_seed(3)
    first = [run(ones).tolist() for _ in range(2)]
    torch.manual_seed(3)
    assert [run(ones).tolist() for _ in range(2)] == first


def test_an_execution_draws_as_the_function_does() -> None:
    """What torch gives after the same seed."""
    run = jax.jit(noisy)
    run(ones).block_until_ready()
    torch.manual_seed(3)
    expected = masked(torch.ones(64)).tolist()
    after = state()
    torch.manual_seed(3)
    assert run(ones).tolist() == expected
    assert state() == after


noise = levels(as_jax(lambda: torch.rand(64)))
UNTRACED: dict[str, Fn] = {
    "no argument": lambda x: x + noise(),
    "a constant": lambda x: x + noisy(ones),
    "map": lambda x: jax.lax.map(lambda i: noise(), jnp.arange(1))[0] + x,
    "scan": lambda x: jax.lax.scan(lambda c, _: (c, noisy(ones)), 0, None, length=1)[1][0] + x,
    "gradient": lambda x: jax.grad(lambda x: (x * noise()).sum())(x),
    "batch": lambda x: jax.vmap(lambda x: x + noise())(x[None])[0],
}


@pytest.mark.parametrize("program", UNTRACED.values(), ids=UNTRACED)
def test_a_call_in_a_program_is_part_of_it_though_no_argument_is_traced(program: Fn) -> None:
    run = jax.jit(program)
    assert len({str(run(x).tolist()) for _ in range(3)}) == 3


def test_a_call_in_a_program_says_that_it_is_not_jittable() -> None:
    with pytest.raises(interop.NotJittableError):
        jax.jit(lambda x: x + as_jax(lambda: torch.rand(64))())(x)
    with jax.ensure_compile_time_eval():
        constant = as_jax(lambda: torch.ones(64))()
    assert jax.jit(lambda x: x + constant)(ones).tolist() == [2] * 64


def test_a_trace_draws_nothing() -> None:
    before = state()
    f = levels(as_jax(masked))
    jax.make_jaxpr(f)(ones)
    jax.eval_shape(f, ones)
    jax.jit(f).lower(ones).compile()
    jax.jit(jax.grad(lambda x: f(x).sum())).lower(ones).compile()
    assert state() == before


def test_twins_are_not_merged() -> None:
    one, other = jax.jit(lambda x: (noisy(x), noisy(x)))(ones)
    assert one.tolist() != other.tolist()
    grads = jax.jit(lambda x: tuple(jax.grad(lambda x: noisy(x).sum())(x) for _ in range(2)))(ones)
    assert grads[0].tolist() != grads[1].tolist()


def test_what_nobody_uses_is_drawn_all_the_same() -> None:
    """Or what comes after it would change."""
    run = jax.jit(lambda x: (noisy(x), x + 1)[1])
    run(ones).block_until_ready()
    jax.effects_barrier()
    before = state()
    run(ones).block_until_ready()
    jax.effects_barrier()
    assert state() != before


JITTED_GRADIENTS: dict[str, Fn] = {
    "jit of vjp": lambda f: jax.jit(lambda x: (lambda out, pull: (out, pull(ones)[0]))(*jax.vjp(f, x))),
    "jit of value and grad": lambda f: jax.jit(lambda x: (lambda v: (v[0][1], v[1]))(
        jax.value_and_grad(lambda x: (lambda y: (y.sum(), y))(f(x)), has_aux=True)(x))),
    "vjp of jit": lambda f: lambda x: (lambda out, pull: (out, pull(ones)[0]))(*jax.vjp(jax.jit(f), x)),
    "jit of linear_transpose": lambda f: jax.jit(lambda x: (lambda out, push: (out, jax.linear_transpose(push, x)(ones)[0]))(*jax.linearize(f, x))),
    "jit of linearize": lambda f: jax.jit(lambda x: (lambda out, push: (out, push(ones)))(*jax.linearize(f, x))),
    "jit of vmap of linearize": lambda f: jax.jit(lambda x: jax.vmap(lambda x: (lambda out, push: (out, push(ones)))(*jax.linearize(f, x)))(x[None])),
    "jit of vmap of vjp": lambda f: jax.jit(lambda x: jax.vmap(lambda x: (lambda out, pull: (out, pull(ones)[0]))(*jax.vjp(f, x)))(x[None])),
}  # fmt: skip


@pytest.mark.parametrize("ask", JITTED_GRADIENTS.values(), ids=JITTED_GRADIENTS)
def test_the_gradient_of_a_program_has_the_mask_of_its_value(ask: Fn) -> None:
    run = ask(noisy)
    seen = set()
    for _ in range(3):
        out, grad = run(ones)
        assert out.tolist() == grad.tolist()
        seen.add(str(out.tolist()))
    assert len(seen) == 3


def test_a_gradient_of_a_program_draws_once() -> None:
    run = jax.jit(jax.grad(lambda x: noisy(x).sum()))
    run(ones).block_until_ready()
    torch.manual_seed(3)
    masked(torch.ones(64))
    after = state()
    torch.manual_seed(3)
    run(ones).block_until_ready()
    assert state() == after


JITTED_BATCHES: dict[str, Fn] = {
    "jit of vmap": lambda f: jax.jit(jax.vmap(f)),
    "vmap of jit": lambda f: jax.vmap(jax.jit(f)),
    "jit of vmap of grad": lambda f: jax.jit(jax.vmap(jax.grad(lambda x: f(x).sum()))),
    "vmap of grad of jit": lambda f: jax.vmap(jax.grad(lambda x: jax.jit(f)(x).sum())),
    "jit of vmap of vmap": lambda f: jax.jit(lambda b: jax.vmap(jax.vmap(f))(b.reshape(2, 3, 64)).reshape(6, 64)),
}


@pytest.mark.parametrize("ask", JITTED_BATCHES.values(), ids=JITTED_BATCHES)
def test_an_example_of_a_batch_in_a_program_draws_its_own(ask: Fn) -> None:
    rows = ask(noisy)(jnp.ones((6, 64))).tolist()
    assert len(set(map(str, rows))) == 6
    assert {value for row in rows for value in row} == {0, 2}


CONTROL: dict[str, Callable[[Fn, Any], Any]] = {
    "scan": lambda f, b: jax.lax.scan(lambda c, x: (c, f(x)), 0, b)[1],
    "grad of scan": lambda f, b: jax.grad(lambda b: jax.lax.scan(lambda c, x: (c, f(x)), 0, b)[1].sum())(b),
    "map": lambda f, b: jax.lax.map(f, b),
    "while_loop": lambda f, b: jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1].at[s[0]].set(f(b[0]))), (0, b))[1],
    "fori_loop": lambda f, b: jax.lax.fori_loop(0, 3, lambda i, rows: rows.at[i].set(f(b[0])), b),
    "cond": lambda f, b: jnp.stack([jax.lax.cond(x[0] > 0, f, lambda x: x, x) for x in b]),
    "switch": lambda f, b: jnp.stack([jax.lax.switch(x[0].astype(int), [lambda x: x, f], x) for x in b]),
    "checkpoint": lambda f, b: jnp.stack([jax.checkpoint(f)(x) for x in b]),
    "grad of checkpoint": lambda f, b: jnp.stack([jax.grad(jax.checkpoint(lambda x: f(x).sum()))(x) for x in b]),
    "grad of custom_vjp": lambda f, b: jnp.stack([jax.grad(lambda x: _ruled(f)(x).sum())(x) for x in b]),
    "grad of custom_jvp": lambda f, b: jnp.stack([jax.grad(lambda x: _ruled_forward(f)(x).sum())(x) for x in b]),
}  # fmt: skip


def _ruled(f: Fn) -> Fn:
    g = jax.custom_vjp(f)
    g.defvjp(lambda x: (lambda y: (y, y))(f(x)), lambda mask, ct: (mask * ct,))
    return g


def _ruled_forward(f: Fn) -> Fn:
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: (lambda y: (y, y * tangents[0]))(f(*primals)))
    return g


@pytest.mark.parametrize("jitted", [False, True], ids=["", "jit"])
@pytest.mark.parametrize("name", CONTROL)
def test_control_flow_draws_anew_each_time_or_names_the_way_out(name: str, jitted: bool) -> None:
    """JAX admits no effects of others in some places. One mask for all the rounds of a loop would be wrong."""
    ask = CONTROL[name]
    try:
        rows = (jax.jit(ask, static_argnums=0) if jitted else ask)(noisy, jnp.ones((3, 64)))
    except NotImplementedError as error:  # ours, or JAX's own
        assert "masked" in str(error)
        assert "rng=" in str(error)
    else:
        assert len({str(row) for row in rows.tolist()}) == 3
        assert {value for row in rows.tolist() for value in row} == {0, 2}
    assert noisy(ones).shape == (64,)


def test_a_function_that_can_not_be_traced_is_watched() -> None:
    """It counts as random if it drew when it ran: then it is an effect, or refused; never two runs in one."""
    f = jittable(example_output=lambda x: x)(as_jax(looks))
    try:
        one, other = jax.jit(lambda x: (f(x), f(x)))(ones)
        differ = one.tolist() != other.tolist()
    except Exception as error:
        assert "looks" in str(error)
        assert "rng=" in str(error)
    else:
        assert differ
    out, pull = jax.vjp(differentiable(f), ones)
    assert pull(ones)[0].tolist() == out.tolist()


def test_a_module_with_dropout_and_no_key() -> None:
    net = Net()
    apply, params = levels(as_jax(net)), arrays(net.named_parameters())
    run = jax.jit(jax.value_and_grad(lambda p: (apply(p, jnp.ones((4, 8))) ** 2).sum()))
    (one, _), (other, grads) = run(params), run(params)
    assert one != other
    assert all(bool(jnp.isfinite(g).all()) for g in grads.values())
    net.eval()
    quiet = jax.jit(lambda p: apply(p, jnp.ones((4, 8))))
    before = state()
    assert quiet(params).tolist() == quiet(params).tolist()
    assert state() == before


# --- modules that change their buffers --------------------------------------------------------------------------------


class Counts(nn.Module):
    """Of integers, under a name in a submodule's table."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x * self.weight * self.count.clone()


class Copies(nn.Module):
    """Writes into a buffer that no state dict shows, beside one that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("last", torch.zeros(3), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x * self.weight + self.last
        self.last.copy_(x.detach().mean(0))
        return out


class Rebinds(nn.Module):
    """Puts a new tensor in the buffer's place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return (x - self.mean) * self.weight


UPDATES: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(3),
    "batch norm, deep": lambda: nn.Sequential(nn.Linear(3, 8), nn.Sequential(nn.BatchNorm1d(8)), nn.ReLU(), nn.Linear(8, 2)),
    "instance norm": lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1, affine=True, track_running_stats=True)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(3, 4)),
    "counts": Counts,
    "copies": Copies,
    "rebinds": Rebinds,
    "shared": lambda: (lambda part: nn.Sequential(part, nn.Linear(3, 3), part))(Counts()),
}  # fmt: skip
STEPS = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def native(
    module: nn.Module,
) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """What torch itself computes step by step: outputs, buffers after each, gradients of the sum of squares."""
    module = copy.deepcopy(module)
    outs, buffers, grads = [], [], []
    for step in STEPS:
        out = module(step)
        names, params = zip(*module.named_parameters(), strict=True)
        found = torch.autograd.grad((out**2).sum(), params, allow_unused=True)
        outs.append(out.detach())
        buffers.append({name: b.clone() for name, b in module.named_buffers()})
        grads.append({n: torch.zeros_like(p) if g is None else g for n, g, p in zip(names, found, params, strict=True)})
    return outs, buffers, grads


def same(got: Any, expected: Any) -> None:
    """Names, dtypes as JAX keeps them, and values."""
    if isinstance(expected, dict):
        assert set(got) == set(expected)
        for name in expected:
            same(got[name], expected[name])
    else:
        kept = np.asarray(jnp.asarray(expected.numpy()))
        assert got.dtype == kept.dtype
        np.testing.assert_allclose(got, kept, rtol=1e-6, atol=1e-6)


def mutable(module: nn.Module) -> tuple[Fn, dict[str, jax.Array], dict[str, jax.Array]]:
    """The function, its parameters, and its buffers."""
    apply = levels(as_jax(module, mutable=True))
    return apply, arrays(module.named_parameters()), arrays(module.named_buffers())


def squares(apply: Fn) -> Fn:
    """A loss with everything else as its auxiliary value."""

    def loss(params: Any, buffers: Any, x: Any) -> Any:
        out, new = apply({**params, **buffers}, x)
        return (out**2).sum(), (out, new)

    return loss


STEPPED: dict[str, Callable[[Fn], Fn]] = {
    "call": lambda apply: lambda p, b, x: (*apply({**p, **b}, x), None),
    "jit": lambda apply: jax.jit(lambda p, b, x: (*apply({**p, **b}, x), None)),
    "grad": lambda apply: lambda p, b, x: _unpacked(jax.grad(squares(apply), has_aux=True)(p, b, x)),
    "value and grad": lambda apply: lambda p, b, x: _unpacked(jax.value_and_grad(squares(apply), has_aux=True)(p, b, x)[::-1]),
    "jit of grad": lambda apply: jax.jit(lambda p, b, x: _unpacked(jax.grad(squares(apply), has_aux=True)(p, b, x))),
    "grad of jit": lambda apply: lambda p, b, x: _unpacked(jax.grad(jax.jit(squares(apply)), has_aux=True)(p, b, x)),
    "checkpoint": lambda apply: jax.jit(lambda p, b, x: _unpacked(jax.grad(jax.checkpoint(squares(apply)), has_aux=True)(p, b, x))),
    "jvp": lambda apply: lambda p, b, x: (*jax.jvp(lambda p: apply({**p, **b}, x), (p,), (p,))[0], None),
}  # fmt: skip


def _unpacked(found: Any) -> Any:
    """Outputs, buffers and gradients of `grad(has_aux)`, or the same the other way round of `value_and_grad`."""
    first, second = found
    grads, (out, buffers) = (first, second[1]) if isinstance(second[1], tuple) else (first, second)
    return out, buffers, grads


@pytest.mark.parametrize(
    ("name", "way"),
    [
        (n, w)
        for n in UPDATES
        for w in STEPPED
        if n in ("batch norm, deep", "counts") or w in ("call", "jit", "jit of grad")
    ],
)
def test_training_is_torchs_own_step_by_step(name: str, way: str) -> None:
    """Outputs, buffers (each updated once a step) and gradients; the arrays that went in stay as they were."""
    module = UPDATES[name]()
    apply, params, buffers = mutable(module)
    trained(module, STEPPED[way](apply), params, buffers)


@pytest.mark.parametrize("way", ["call", "jit", "grad", "jit of grad"])
def test_a_module_that_looks_at_its_buffers(way: str) -> None:
    """A cumulative average divides by a number: under jit the shapes have to be said."""
    module = nn.BatchNorm1d(3, momentum=None)
    apply, params, buffers = mutable(module)
    told = jittable(example_output=lambda params, x: (x, {name: params[name] for name in buffers}))(apply)
    trained(module, STEPPED[way](told), params, buffers)


@pytest.mark.parametrize("way", ["jit", "jit of grad"])
def test_where_they_are_not_said_they_are_asked_for(way: str) -> None:
    module = nn.BatchNorm1d(3, momentum=None)
    apply, params, buffers = mutable(module)
    before = contents(module)
    with pytest.raises(interop.AbstractEvalError, match="example_output"):
        STEPPED[way](apply)(params, buffers, jnp.asarray(STEPS[0].numpy()))
    assert contents(module) == before


def trained(module: nn.Module, run: Fn, params: Any, buffers: Any) -> None:
    """All the steps, compared with torch's."""
    outs, after, gradients = native(module)
    for x, out, expected, wanted in zip(STEPS, outs, after, gradients, strict=True):
        given = {name: np.array(b) for name, b in buffers.items()}
        got, new, grads = run(params, buffers, jnp.asarray(x.numpy()))
        same(got, out)
        same(new, expected)
        if grads is not None:
            for name, grad in grads.items():
                np.testing.assert_allclose(grad, wanted[name], rtol=1e-5, atol=1e-5)
        for name, before in given.items():
            assert np.array_equal(buffers[name], before)
        buffers = new


@pytest.mark.parametrize("make", UPDATES.values(), ids=UPDATES)
def test_buffers_carried_by_a_scan(make: Callable[[], nn.Module]) -> None:
    module = make()
    outs, after, _ = native(module)
    apply, params, buffers = mutable(module)

    def body(buffers: Any, x: Any) -> Any:
        out, new = apply({**params, **buffers}, x)
        return new, out

    batch = jnp.stack([jnp.asarray(x.numpy()) for x in STEPS])
    last, stacked = jax.lax.scan(body, buffers, batch)
    same(last, after[-1])
    same(stacked, torch.stack(outs))


@pytest.mark.parametrize("jitted", [False, True], ids=["", "jit"])
@pytest.mark.parametrize("make", UPDATES.values(), ids=UPDATES)
def test_a_batch_of_modules_is_a_loop_over_modules(make: Callable[[], nn.Module], jitted: bool) -> None:
    """Buffers, parameters and inputs each have an axis of examples."""
    apply, params, buffers = mutable(make())
    every = {**params, **buffers}
    many = {name: jnp.stack([v, v + 1, v * 2]).astype(v.dtype) for name, v in every.items()}
    batch = jnp.stack([jnp.asarray(x.numpy()) for x in STEPS])
    run = jax.vmap(apply)
    out, new = (jax.jit(run) if jitted else run)(many, batch)
    for i in range(3):
        expected = apply({name: v[i] for name, v in many.items()}, batch[i])
        np.testing.assert_allclose(out[i], expected[0], rtol=1e-5, atol=1e-6)
        assert set(new) == set(expected[1])
        for name, value in expected[1].items():
            np.testing.assert_allclose(new[name][i], value, rtol=1e-5, atol=1e-6)


def test_a_batch_of_inputs_with_one_set_of_buffers() -> None:
    """Each example starts from it, and has buffers of its own afterwards."""
    apply, params, buffers = mutable(nn.BatchNorm1d(3))
    batch = jnp.stack([jnp.asarray(x.numpy()) for x in STEPS])
    out, new = jax.vmap(lambda x: apply({**params, **buffers}, x))(batch)
    for i in range(3):
        expected = apply({**params, **buffers}, batch[i])
        np.testing.assert_allclose(out[i], expected[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(new["running_mean"][i], expected[1]["running_mean"], rtol=1e-6, atol=1e-6)
    assert new["num_batches_tracked"].tolist() == [1, 1, 1]


def test_buffers_that_are_not_given_are_the_modules_own() -> None:
    """As they are at the call."""
    module = nn.BatchNorm1d(3)
    apply, params, buffers = mutable(module)
    module.running_mean.fill_(4)
    module.num_batches_tracked.fill_(9)
    data = jnp.asarray(STEPS[0].numpy())
    _, own = apply(params, data)
    _, mixed = apply({**params, "running_mean": buffers["running_mean"]}, data)
    mean = 0.1 * STEPS[0].mean(0).numpy()
    np.testing.assert_allclose(own["running_mean"], 3.6 + mean, rtol=1e-6)
    np.testing.assert_allclose(mixed["running_mean"], mean, rtol=1e-6)
    assert int(own["num_batches_tracked"]) == int(mixed["num_batches_tracked"]) == 10
    assert module.running_mean.tolist() == [4, 4, 4]


def test_a_module_in_evaluation_returns_its_buffers_as_they_were() -> None:
    apply, params, buffers = mutable(nn.BatchNorm1d(3).eval())
    _, new = jax.jit(apply)({**params, **buffers}, jnp.asarray(STEPS[0].numpy()))
    same(new, {name: torch.from_numpy(np.array(b)) for name, b in buffers.items()})


def test_a_module_without_buffers_returns_none() -> None:
    apply, params, _ = mutable(nn.Linear(3, 2))
    out, new = apply(params, jnp.ones((4, 3)))
    assert out.shape == (4, 2)
    assert new == {}


def test_both_a_key_and_buffers() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    apply = levels(as_jax(net, rng="key", mutable=True))
    params = arrays(net.named_parameters())
    data = jnp.asarray(STEPS[0].numpy())
    out, new = jax.jit(apply)(params, data, key=key)
    again, _ = apply(params, data, key=key)
    np.testing.assert_allclose(out, again, rtol=1e-6)
    assert int(new["0.num_batches_tracked"]) == 1
    assert out.tolist() != apply(params, data, key=keys[0])[0].tolist()


def test_a_gradient_through_a_buffer() -> None:
    """A buffer of floats in the mapping is an argument like any other."""
    apply, params, buffers = mutable(Copies())
    grad = jax.grad(lambda b: apply({**params, **b}, jnp.ones((4, 3)))[0].sum())(buffers)
    assert grad["last"].tolist() == [4, 4, 4]


def test_only_a_module_has_buffers() -> None:
    with pytest.raises(Exception, match="mutable"):
        as_jax(lambda x: x, mutable=True)


def contents(module: nn.Module) -> dict[str, tuple[int, list[Any]]]:
    """Version and value of everything that a module holds."""
    return {name: (t._version, t.tolist()) for name, t in (*module.named_buffers(), *module.named_parameters())}


NAMES = {
    "batch norm": "running_mean.*running_var",
    "batch norm, deep": r"1\.0\.running_mean",
    "instance norm": r"1\.running_mean",
    "spectral norm": r"parametrizations\.weight\.0\._u",
    "counts": "count",
    "copies": "last",
    "rebinds": "mean",
    "shared": r"0\.count",
}
ASKED: dict[str, Callable[[Fn, Any], Any]] = {
    "call": lambda apply, p: apply(p, jnp.ones((4, 3))),
    "jit": lambda apply, p: jax.jit(apply)(p, jnp.ones((4, 3))),
    "grad": lambda apply, p: jax.grad(lambda p: apply(p, jnp.ones((4, 3))).sum())(p),
    "jit of grad": lambda apply, p: jax.jit(jax.grad(lambda p: apply(p, jnp.ones((4, 3))).sum()))(p),
    "vmap": lambda apply, p: jax.vmap(lambda x: apply(p, x))(jnp.ones((2, 4, 3))),
    "jvp": lambda apply, p: jax.jvp(lambda p: apply(p, jnp.ones((4, 3))), (p,), (p,)),
}


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("name", UPDATES)
def test_a_module_that_would_update_its_buffers_raises(name: str, ask: Callable[[Fn, Any], Any]) -> None:
    """Naming them and the way out; and it has updated nothing."""
    module = UPDATES[name]()
    before = contents(module)
    params = arrays(module.named_parameters())
    with pytest.raises(interop.InteropError, match=rf"(?s){NAMES[name]}.*mutable=True"):
        ask(levels(as_jax(module)), params)
    assert contents(module) == before


@pytest.mark.parametrize("ask", [ASKED["call"], ASKED["jit"]], ids=["call", "jit"])
def test_so_does_one_that_was_given_them(ask: Callable[[Fn, Any], Any]) -> None:
    module = nn.BatchNorm1d(3)
    every = arrays([*module.named_parameters(), *module.named_buffers()])
    with pytest.raises(interop.InteropError, match=r"running_mean.*mutable=True"):
        ask(levels(as_jax(module)), every)


QUIET: dict[str, Callable[[], nn.Module]] = {
    "in evaluation": lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()).eval(),
    "without statistics": lambda: nn.BatchNorm1d(3, track_running_stats=False),
    "layer norm": lambda: nn.LayerNorm(3),
    "spectral norm in evaluation": lambda: parametrizations.spectral_norm(nn.Linear(3, 4)).eval(),
}


@pytest.mark.parametrize("make", QUIET.values(), ids=QUIET)
def test_a_module_that_only_reads_its_buffers_needs_nothing(make: Callable[[], nn.Module]) -> None:
    module = make()
    apply, params = levels(as_jax(module)), arrays(module.named_parameters())
    expected = module(torch.from_numpy(np.array(jnp.eye(3)))).detach()
    for call in (apply, jax.jit(apply)):
        np.testing.assert_allclose(call(params, jnp.eye(3)), expected, rtol=1e-5, atol=1e-6)


# --- the module is never touched --------------------------------------------------------------------------------------


class Keeps(nn.Module):
    """Whatever it is given, as an attribute and in a list of its class; it writes to a parameter too."""

    seen: list[torch.Tensor] = []

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1 << 14))
        self.cache: torch.Tensor | None = None
        self.own: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache = x
        self.seen.append(x[1:])
        self.own.append(x)
        with torch.no_grad():
            self.weight.mul_(2)
        return self.weight * x


def test_what_a_module_keeps_is_no_view_of_memory_that_is_gone() -> None:
    """What is the module's own is kept by a copy of it; what is kept elsewhere stays what it was."""
    module = Keeps()
    module.seen.clear()
    apply, params = levels(as_jax(module)), arrays(module.named_parameters())
    run = jax.jit(lambda p, a: apply(p, a * 3) + 1)
    for call in (run, apply):
        call(params, jnp.ones(1 << 14)).block_until_ready()
    jax.grad(lambda p: apply(p, jnp.ones(1 << 14)).sum())(params)
    junk = [jnp.full(1 << 14, 7.0) + i for i in range(20)]
    kept = [t for t in module.seen if not isinstance(t, torch._subclasses.FakeTensor)]
    assert [(t.min().item(), t.max().item()) for t in kept] == [(3, 3), (1, 1), (1, 1)]
    assert module.cache is None
    assert float(params["weight"].max()) == module.weight.max().item() == 1
    assert module.weight._version == 0
    assert module.weight.grad is None
    del junk


def test_a_list_of_the_module_is_not_touched_either() -> None:
    module = Keeps()
    apply = levels(as_jax(module))
    jax.jit(apply)(arrays(module.named_parameters()), jnp.ones(1 << 14)).block_until_ready()
    assert module.own == []


class Shows(nn.Module):
    """Waits in the middle, so that threads meet."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(32, 32), nn.Tanh())])
        self.norm = nn.BatchNorm1d(32).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers(x)
        threading.Event().wait(0.001)
        return self.norm(x) * self.layers[0].weight.sum()


def test_a_module_in_many_threads_with_weights_of_their_own() -> None:
    module = Shows()
    before = contents(module)
    apply = levels(as_jax(module))
    data = jnp.asarray(torch.randn(16, 32).numpy())
    mine = [{name: v * (1 + i) for name, v in arrays(module.named_parameters()).items()} for i in range(8)]
    run, slope = jax.jit(apply), jax.grad(lambda p: apply(p, data).sum())
    expected = [(apply(p, data), slope(p)["layers.0.weight"]) for p in mine]

    def work(i: int) -> None:
        for _ in range(5):
            for call in (apply, run):
                np.testing.assert_allclose(call(mine[i], data), expected[i][0], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(slope(mine[i])["layers.0.weight"], expected[i][1], rtol=1e-3, atol=1e-3)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert contents(module) == before
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


def test_buffers_of_many_threads_at_once() -> None:
    module = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), Counts8())
    before = contents(module)
    apply, params, buffers = mutable(module)
    run = jax.jit(apply)
    data = [jnp.asarray(np.random.default_rng(i).normal(size=(16, 3)), jnp.float32) for i in range(8)]
    expected = [apply({**params, **buffers}, d) for d in data]

    def work(i: int) -> None:
        for _ in range(10):
            for call in (apply, run):
                out, new = call({**params, **buffers}, data[i])
                np.testing.assert_allclose(out, expected[i][0], rtol=1e-5, atol=1e-5)
                for name, value in expected[i][1].items():
                    np.testing.assert_allclose(new[name], value, rtol=1e-5, atol=1e-5)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert contents(module) == before


class Counts8(Counts):
    """The same, eight wide."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))


# --- train and eval ---------------------------------------------------------------------------------------------------


class Moody(nn.Module):
    """Twice in training, three times in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * (2 if self.training else 3)


MODES: dict[str, Any] = {
    "call": lambda f: f,
    "grad": lambda f: jax.grad(f),
    "vmap of grad": lambda f: lambda p: jax.vmap(jax.grad(f))(p[None])[0],
    "jvp": lambda f: lambda p: jax.jvp(f, (p,), (jnp.ones(()),))[1],
    "second order": lambda f: lambda p: jax.grad(jax.grad(lambda p: f(p) ** 2))(p) ** 0.5 / 2**0.5,
    "jit": lambda f: lambda p: jax.jit(lambda p: f(p))(p),
    "jit of grad": lambda f: lambda p: jax.jit(lambda p: jax.grad(f)(p))(p),
    "jit of the value with its gradient": lambda f: lambda p: jax.jit(lambda p: jax.value_and_grad(f)(p)[0])(p),
    "grad of checkpoint": lambda f: lambda p: jax.grad(jax.checkpoint(lambda p: f(p)))(p),
    "grad of scan": lambda f: jax.grad(lambda p: jax.lax.scan(lambda c, _: (c, f(p)), 0, None, length=1)[1][0]),
}


@pytest.mark.parametrize("way", MODES.values(), ids=MODES)
def test_the_mode_is_read_at_each_trace(way: Callable[[Fn], Fn]) -> None:
    """Of a part of the module too."""
    module = nn.Sequential(nn.Identity(), Moody())
    apply = levels(as_jax(module))
    ask = way(lambda p: apply({"1.weight": p}, jnp.ones(3)).sum())
    one = jnp.ones(())
    assert ask(one) == 6
    module.eval()
    assert ask(one) == 9
    module.train()
    assert ask(one) == 6
    module[1].eval()
    assert ask(one) == 9


@pytest.mark.parametrize("name", ["jit", "jit of grad"])
def test_a_program_keeps_the_mode_it_was_traced_with(name: str) -> None:
    """A value and its gradient are of one function."""
    module = Moody()
    apply = levels(as_jax(module))

    def loss(p: Any) -> Any:
        return apply({"weight": p}, jnp.ones(3)).sum()

    run, one = jax.jit(loss if name == "jit" else jax.grad(loss)), jnp.ones(())
    assert run(one) == 6
    module.eval()
    assert run(one) == 6
    assert apply({"weight": one}, jnp.ones(3)).sum() == 9


def test_a_module_that_draws_only_in_training() -> None:
    """Traced in evaluation before, it is an effect all the same."""
    net = nn.Dropout(0.5).eval()
    apply = levels(as_jax(net))
    assert jax.jit(lambda x: apply({}, x))(ones).tolist() == ones.tolist()
    net.train()
    run = jax.jit(lambda x: (apply({}, x), x + 1)[1])
    before = state()
    run(ones).block_until_ready()
    jax.effects_barrier()
    assert state() != before


# --- a gradient that would be lost ------------------------------------------------------------------------------------

weight = torch.ones(3, requires_grad=True)


def by_default(x: torch.Tensor, w: torch.Tensor = weight) -> torch.Tensor:
    """In the place of an argument that is not given."""
    return (x * w).sum()


def by_keyword(x: torch.Tensor, *, w: torch.Tensor = weight) -> torch.Tensor:
    """The same, keyword-only."""
    return (x * w).sum()


def _in_a_container(w: torch.Tensor) -> Fn:
    held = {"w": (w, 1)}
    return lambda x: (x * held["w"][0]).sum()


HIDDEN: dict[str, tuple[Fn, str]] = {
    "default": (by_default, r"by_default: .*\bw\b.*requires grad"),
    "keyword default": (by_keyword, r"by_keyword: .*\bw\b.*requires grad"),
    "container": (_in_a_container(weight), r"held\['w'\]\[0\] requires grad"),
}
LOST: dict[str, Fn] = {
    "grad": lambda f: jax.grad(f)(jnp.ones(3)),
    "jit of grad": lambda f: jax.jit(jax.grad(f))(jnp.ones(3)),
    "jvp": lambda f: jax.jvp(f, (jnp.ones(3),), (jnp.ones(3),)),
    "linearize": lambda f: jax.linearize(f, jnp.ones(3)),
    "vmap of grad": lambda f: jax.vmap(jax.grad(f))(jnp.ones((2, 3))),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f))(jnp.ones(3)),
}


@pytest.mark.parametrize("ask", LOST.values(), ids=LOST)
@pytest.mark.parametrize(("fn", "name"), HIDDEN.values(), ids=HIDDEN)
def test_a_tensor_that_requires_grad_and_is_no_argument(fn: Fn, name: str, ask: Fn) -> None:
    """Its gradient would be lost: it is named, whatever derivative is asked."""
    with pytest.raises(interop.InteropError, match=name):
        ask(levels(as_jax(fn)))


def test_a_default_that_is_replaced_loses_nothing() -> None:
    f = levels(as_jax(by_default))
    assert jax.grad(lambda w: f(jnp.ones(3), w))(jnp.ones(3)).tolist() == [1, 1, 1]
