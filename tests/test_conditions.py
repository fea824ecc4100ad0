"""Torch functions that ask whether something is true of values, in compiled programs: every answer is followed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.distributions import Binomial, Categorical, Dirichlet, Independent, MultivariateNormal, Normal, kl_divergence

import interop
from interop import as_jax, differentiable, jittable

Fn = Callable[..., Any]


def levels(fn: Fn, **options: Any) -> Fn:
    """With everything declared but the shapes."""
    return jittable(differentiable(as_jax(fn, **options)))


def is_fake(t: torch.Tensor) -> bool:
    """Whether a trace is looking."""
    return isinstance(t, torch._subclasses.FakeTensor)


@pytest.fixture(autouse=True)
def _validated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first use of `torch.compile` turns these checks off in the whole process."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)


class Counted:
    """A function that counts how often Python enters it, on values and on fakes."""

    def __init__(self, fn: Fn) -> None:
        self.fn = fn
        self.real = self.fake = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.fake += is_fake(x)
        self.real += not is_fake(x)
        return self.fn(x)


# --- branches ---------------------------------------------------------------------------------------------------------


def scaled_down(x: torch.Tensor) -> torch.Tensor:
    """Until it is small."""
    for _ in range(4):
        if bool((x.abs() < 1).all()):
            break
        x = x / 2
    return x.sin()


def nested(x: torch.Tensor) -> torch.Tensor:
    """One question after another, of which the second depends on the first."""
    if x.sum() > 0:
        return x * 2 if x[0] > 1 else x.exp()
    assert x[1] < 10
    return x**2


def filled(x: torch.Tensor) -> torch.Tensor:
    """By a constant that is none any more when it is asked."""
    made = torch.zeros(3)
    made[:2] = x[:2]
    return x.sin() if (made > 0).any() else x.cos()


BRANCHES: dict[str, Fn] = {
    "if": lambda x: x.sin() if x.sum() > 0 else x.cos() * 2,
    "nested": nested,
    "steps": scaled_down,
    "count": lambda x: x * sum(1 for v in x if v > 0),
    "any": lambda x: x.clamp(-1) if torch.any(x < -1) else x * 3,
    "equal": lambda x: x.sin() if torch.equal(x, x.abs()) else x.exp(),
    "not": lambda x: x.sin() if not (x > 0).all() else x,
    "filled": filled,
}
EXAMPLES = torch.tensor([[0.5, 1.0, 1.5], [-0.5, -1.0, -1.7], [3.0, -2.0, 0.1]])


def of_torch(fn: Fn, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The value and the gradient of its sum."""
    x = x.clone().requires_grad_()
    out = fn(x)
    return out.detach(), torch.autograd.grad(out.sum(), x)[0]


def of_jax(f: Fn, x: Any) -> tuple[jax.Array, jax.Array]:
    """The same."""
    return f(x), jax.grad(lambda x: f(x).sum())(x)


ASKED: dict[str, Callable[[Fn, Any], Any]] = {
    "eager": lambda f, xs: [of_jax(f, x) for x in xs],
    "jit": lambda f, xs: [jax.jit(lambda x: of_jax(f, x))(x) for x in xs],
    "vmap": lambda f, xs: zip(*jax.vmap(lambda x: of_jax(f, x))(xs), strict=True),
    "jit of vmap": lambda f, xs: zip(*jax.jit(jax.vmap(lambda x: of_jax(f, x)))(xs), strict=True),
    "map": lambda f, xs: zip(*jax.lax.map(lambda x: of_jax(f, x), xs), strict=True),
    "forward": lambda f, xs: [(f(x), jax.jit(jax.jacfwd(lambda x: f(x).sum()))(x)) for x in xs],
}


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("fn", BRANCHES.values(), ids=BRANCHES)
def test_each_example_takes_its_own_branch(fn: Fn, ask: Callable[[Fn, Any], Any]) -> None:
    """Nothing is declared: on every way through it the shape is the same."""
    found = list(ask(levels(fn), jnp.asarray(EXAMPLES.numpy())))
    for (value, gradient), x in zip(found, EXAMPLES, strict=True):
        expected, derivative = of_torch(fn, x)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradient, derivative, rtol=1e-5, atol=1e-6)


def test_branches_that_disagree_are_named() -> None:
    for other, shapes in (
        (lambda x: x[:1], r"\(f32\[3\]\) or \(f32\[1\]\)"),
        (lambda x: x.int(), r"\(f32\[3\]\) or \(i32\[3\]\)"),
        (lambda x: (x, x), r"\(f32\[3\]\) or \(f32\[3\], f32\[3\]\)"),
        (lambda x: {"x": x}, r"\(f32\[3\]\) or \(f32\[3\]\)"),
    ):
        f = levels(lambda x, other=other: x if x.sum() > 0 else other(x))
        with pytest.raises(
            interop.AbstractEvalError, match=rf"the result depends on values: got {shapes}.*every branch"
        ):
            jax.jit(f)(jnp.ones(3))
        assert jax.tree.leaves(f(jnp.ones(3)))[0].tolist() == [1, 1, 1]


def test_ways_without_an_end_are_not_followed() -> None:
    """Where the shape is declared, it runs."""

    def halved(x: torch.Tensor) -> torch.Tensor:
        while x.norm() > 1:
            x = x / 2
        return x

    x = jnp.full(3, 8.0)
    with pytest.raises(interop.AbstractEvalError, match=r"can't be inferred.*@jittable\(example_output="):
        jax.jit(levels(halved))(x)
    declared = jittable(example_output=lambda x: x)(as_jax(halved))
    assert jax.jit(declared)(x).tolist() == [0.5, 0.5, 0.5]


def test_a_function_that_draws_on_one_way_is_random() -> None:
    f = levels(lambda x: x * torch.rand(3) if x.sum() > 0 else x)
    compiled = jax.jit(f)
    one, other = (compiled(jnp.ones(3)).tolist() for _ in range(2))
    assert one != other
    assert compiled(-jnp.ones(3)).tolist() == [-1, -1, -1]
    with pytest.raises(interop.UnsupportedError, match="rng="):
        jax.jit(jax.grad(lambda x: f(x).sum()))(jnp.ones(3))


def test_what_a_trace_knows_it_does_not_ask() -> None:
    """A constant has one answer."""
    fn = Counted(lambda x: x if torch.tensor(True) else x[:1])
    assert jax.jit(levels(fn))(jnp.ones(3)).shape == (3,)
    assert (fn.fake, fn.real) == (1, 1)


# --- checks -----------------------------------------------------------------------------------------------------------


def positive(x: torch.Tensor) -> torch.Tensor:
    """Of what it takes alone."""
    if (x <= 0).any():
        raise ValueError("it must be positive\nall of it")
    return x.log()


def _refuse(text: str) -> Any:
    raise ValueError(text)


def spread(x: torch.Tensor) -> torch.Tensor:
    """A matrix that is positive definite."""
    return torch.eye(3) + x[:, None] * x


CHECKED: dict[str, Fn] = {
    "raise": positive,
    "equal": lambda x: x.log() if torch.equal(x, x.abs()) else _refuse("it must be positive"),
    "normal": lambda x: Normal(x, x).log_prob(x * 2),
    "categorical": lambda x: Categorical(x / x.sum()).entropy(),
    "dirichlet": lambda x: Dirichlet(x).log_prob(x / x.sum()),
    "several": lambda x: MultivariateNormal(x, spread(x)).log_prob(x * 2) + Independent(Normal(x, x), 1).log_prob(x),
    "divergence": lambda x: kl_divergence(Normal(x, x.exp()), Normal(-x, x)),
    "gaussian_nll_loss": lambda x: torch.nn.functional.gaussian_nll_loss(x, x * 2, x, reduction="none"),
}
RAN: dict[str, Callable[[Fn, Any], Any]] = {
    "value": jax.jit,
    "gradient": lambda f: jax.jit(jax.grad(lambda x: f(x).sum())),
    "batch": lambda f: lambda x: jax.jit(jax.vmap(f))(x[None])[0],
    "batch of gradients": lambda f: lambda x: jax.jit(jax.vmap(jax.grad(lambda x: f(x).sum())))(x[None])[0],
}  # fmt: skip


def in_torch(run: Fn, fn: Fn, x: torch.Tensor) -> torch.Tensor:
    """What one of these computes, by torch itself."""
    value, gradient = of_torch(fn, x)
    return gradient if run in (RAN["gradient"], RAN["batch of gradients"]) else value


@pytest.mark.parametrize("fn", CHECKED.values(), ids=CHECKED)
@pytest.mark.parametrize("run", RAN.values(), ids=RAN)
def test_what_a_function_checks_is_checked_in_a_program(fn: Fn, run: Fn) -> None:
    """Also where the gradient is a captured graph. Afterwards everything works."""
    call, x = run(levels(fn)), torch.tensor([0.2, 0.5, 1.5])
    good, bad = jnp.asarray(x.numpy()), jnp.array([0.2, -0.5, 1.5])
    expected = in_torch(run, fn, x)
    np.testing.assert_allclose(call(good), expected, rtol=1e-4, atol=1e-5)
    said = r"(?s)(<lambda>|positive): ValueError: (it must be positive|Expected parameter|var has).*test_conditions.py:"
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=said):
        jax.block_until_ready(call(bad))
    np.testing.assert_allclose(call(good), expected, rtol=1e-4, atol=1e-5)


def test_a_function_with_checks_is_captured() -> None:
    """It is followed once, once more for each check, and traced with its gradient; its gradient does not run it."""
    fn = Counted(lambda x: Normal(x, x).log_prob(positive(x)).sum())
    gradient = jax.jit(jax.grad(levels(fn)))
    for _ in range(2):
        assert np.isfinite(gradient(jnp.array([1.5, 2.0, 3.0]))).all()
    checks = 4  # the mean, the deviation, what is in its support; and that it is positive
    assert (fn.real, fn.fake) == (0, 1 + checks + 1)


OBSERVED, SPREAD, MASK = torch.tensor([1.0, 0.0, 4.0]), torch.tensor([0.3, 2.0, 1.1]), torch.zeros(2, dtype=torch.bool)

# They ask of what they close over too, before and after they ask of their argument.
CONSTANTS: dict[str, Fn] = {
    "a distribution of constants": lambda x: Normal(x, SPREAD).log_prob(OBSERVED),
    "counts": lambda x: Binomial(5, logits=x).log_prob(OBSERVED),
    "a branch not taken": lambda x: positive(x).sin() if not MASK.any() else x.cos(),
    "after a check": lambda x: positive(x) * (2 if (SPREAD * 2).square().max() < 1 else 3),
    "equal": lambda x: positive(x) * (2 if torch.equal(SPREAD + 1, OBSERVED) else 3),
}


@pytest.mark.parametrize("run", RAN.values(), ids=RAN)
@pytest.mark.parametrize("fn", CONSTANTS.values(), ids=CONSTANTS)
def test_what_is_asked_of_constants_is_known(fn: Fn, run: Fn, caplog: pytest.LogCaptureFixture) -> None:
    """And no reason not to capture."""
    x = torch.tensor([0.2, 0.5, 1.5])
    expected = in_torch(run, fn, x)
    with caplog.at_level("DEBUG", logger="interop"):
        np.testing.assert_allclose(run(levels(fn))(jnp.asarray(x.numpy())), expected, rtol=1e-4, atol=1e-5)
    assert "recomputed" not in caplog.text


def test_what_is_true_of_a_constant_no_more_is_said() -> None:
    """By what was captured while it was; another trace knows better."""
    flag = torch.zeros((), dtype=torch.bool)
    f = levels(lambda x: (x**2 if flag else x**3).sum())
    gradient, x = jax.jit(jax.grad(lambda x: f(x))), jnp.ones(2)
    assert gradient(x).tolist() == [3, 3]
    flag.fill_(True)
    with pytest.raises(
        (jax.errors.JaxRuntimeError, ValueError), match="what was False of a tensor that it closes over.*trace it"
    ):
        jax.block_until_ready(gradient(x))
    assert jax.jit(jax.grad(lambda x: f(x)))(x).tolist() == jax.grad(f)(x).tolist() == [2, 2]


def test_a_sample_and_its_gradient_are_one_draw() -> None:
    """Without a key, in a compiled program."""
    f = levels(lambda mean, deviation: Normal(mean, deviation).rsample())
    step = jax.jit(lambda m, s: jax.vjp(f, m, s)[1](jnp.ones(3)) + (f(m, s),))
    value, pull = jax.jit(lambda m, s: jax.vjp(f, m, s))(jnp.ones(3), jnp.full(3, 2.0))
    of_mean, of_deviation = pull(jnp.ones(3))
    assert of_mean.tolist() == [1, 1, 1]
    np.testing.assert_allclose(1 + 2 * of_deviation, value, rtol=1e-5)
    assert step(jnp.ones(3), jnp.ones(3))[1].tolist() != step(jnp.ones(3), jnp.ones(3))[1].tolist()


def test_a_function_that_always_raises_says_why() -> None:
    def refuses(x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            raise KeyError("positive")
        raise ValueError("not positive")

    with pytest.raises((KeyError, ValueError), match="positive"):
        jax.jit(levels(refuses))(jnp.ones(3))
