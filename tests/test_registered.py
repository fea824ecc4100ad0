"""Types of other libraries: containers that are registered with a framework, and leaves that `register_leaf` opens."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.utils._pytree as torch_pytree

import interop
from interop import as_jax, as_torch, differentiable, explain, jax_to_torch, jittable, register_leaf, torch_to_jax

Fn = Callable[..., Any]


class Quantity:
    """A value with a unit, over any array."""

    def __init__(self, value: Any, unit: Any) -> None:
        self.value, self.unit = value, unit

    def doubled(self, k: Any) -> Any:
        return type(self)(2 * k * self.value, self.unit)


class OfJax(Quantity):
    """Registered with JAX alone."""


class OfTorch(Quantity):
    """Registered with torch alone."""


class Opened(Quantity):
    """Registered with neither, but as a leaf."""


jax.tree_util.register_pytree_node(OfJax, lambda q: ((q.value,), q.unit), lambda unit, c: OfJax(c[0], unit))
torch_pytree.register_pytree_node(OfTorch, lambda q: ([q.value], q.unit), lambda c, unit: OfTorch(c[0], unit))
register_leaf(Opened, unwrap=lambda q: (q.value, q.unit), wrap=Opened)


class Length(torch.Tensor):
    """A subclass, with a twin in JAX."""

    unit: Any = None

    @property
    def value(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class JaxLength:
    value: Any
    unit: Any = dataclasses.field(metadata={"static": True})


def length(value: Any, unit: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return JaxLength(value, unit)
    made = value.as_subclass(Length)
    made.unit = unit
    return made


register_leaf(Length, lambda x: (x.value, x.unit), length)
register_leaf(JaxLength, lambda x: (x.value, x.unit), length)

# by the type: makes one of a tensor, and one of an array
KINDS: dict[str, tuple[Fn, type, type]] = {
    "registered with JAX": (OfJax, OfJax, OfJax),
    "registered with torch": (OfTorch, OfTorch, OfTorch),
    "an object": (Opened, Opened, Opened),
    "a subclass, and its twin": (length, Length, JaxLength),
}
kinds = pytest.mark.parametrize(("make", "in_torch", "in_jax"), KINDS.values(), ids=KINDS)


def levels(crossed: Any) -> Any:
    return jittable(differentiable(crossed))


def squared(make: Fn, traces: list[Any] | None = None) -> Fn:
    """Of a quantity, a quantity; in kilometres another one."""

    def fn(q: Any) -> Any:
        if traces is not None:
            traces.append(type(q))
        return make(q.value**2 * (1000 if q.unit == "km" else 1), q.unit)

    return fn


x = torch.tensor([1.0, 2.0, 3.0])
a = jnp.array([1.0, 2.0, 3.0])


# --- a JAX function in torch ------------------------------------------------------------------------------------------


@kinds
def test_in_torch_it_arrives_as_its_twin_and_comes_back(make: Fn, in_torch: type, in_jax: type) -> None:
    traces: list[Any] = []
    f = levels(as_torch(squared(make, traces)))
    for unit, factor in (("m", 1), ("km", 1000), ("m", 1)):
        out = f(make(x, unit))
        assert type(out) is in_torch
        assert out.unit == unit
        assert out.value.tolist() == [factor, 4 * factor, 9 * factor]
    assert traces == [in_jax, in_jax]  # another static is another trace, and the same is none
    assert isinstance(f(dict(q=[make(x, "m")])["q"][0]), in_torch)


@kinds
def test_in_torch_gradients_reach_the_tensor_inside(make: Fn, in_torch: type, in_jax: type) -> None:
    f = levels(as_torch(squared(make)))
    w = x.clone().requires_grad_()
    f(make(1 * w, "km")).value.sum().backward()
    assert w.grad is not None
    assert w.grad.tolist() == [2000, 4000, 6000]

    def of(w: torch.Tensor) -> torch.Tensor:
        return f(make(w, "m")).value

    assert torch.func.grad(lambda w: of(w).sum())(x).tolist() == [2, 4, 6]
    assert torch.func.jvp(of, (x,), (x,))[1].tolist() == [2, 8, 18]
    assert torch.func.vmap(of)(x).tolist() == [1, 4, 9]
    with pytest.raises(interop.NotDifferentiableError, match="q"):
        as_torch(squared(make))(make(1 * w, "m"))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "a subclass, and its twin"])
def test_in_torch_it_is_compiled(kind: str) -> None:
    """torch itself compiles no subclass that `as_subclass` makes."""
    make, in_torch, _ = KINDS[kind]
    f = levels(as_torch(squared(make)))
    w = x.clone().requires_grad_()
    inside = torch.compile(lambda w: f(make(w, "km")).value.sum(), fullgraph=True, backend="aot_eager")
    inside(w).backward()
    assert w.grad is not None
    assert w.grad.tolist() == [2000, 4000, 6000]
    through = torch.compile(lambda q: f(q), fullgraph=True, backend="aot_eager")
    unequal = [("km", True)] if kind == "an object" else []  # what a framework registers is compared as it compares
    for unit in ("m", 1, 2, 3, ("km", 1), *unequal, torch.float32):
        out = through(make(x, unit))
        assert type(out) is in_torch
        assert out.unit == unit
        assert repr(out.unit) == repr(unit)
        assert out.value.tolist() == [1, 4, 9]
    assert through(make(x, "km")).value.tolist() == [1000, 4000, 9000]


# --- a torch function in JAX ------------------------------------------------------------------------------------------


@kinds
def test_in_jax_it_arrives_as_its_twin_and_comes_back(make: Fn, in_torch: type, in_jax: type) -> None:
    seen: list[Any] = []
    g = levels(as_jax(squared(make, seen)))
    for unit, factor in (("m", 1), ("km", 1000), ("m", 1)):
        out = g(make(a, unit))
        assert type(out) is in_jax
        assert out.unit == unit
        assert out.value.tolist() == [factor, 4 * factor, 9 * factor]
    assert set(seen) == {in_torch}


@kinds
def test_in_jax_every_transform(make: Fn, in_torch: type, in_jax: type) -> None:
    example = None if in_torch is not Length else lambda q: make(torch.zeros(q.value.shape), q.unit)
    g = jittable(differentiable(as_jax(squared(make))), example_output=example)  # torch has no fake of `as_subclass`

    def of(a: Any) -> Any:
        return g(make(a, "km")).value

    gradient = jax.grad(lambda a: of(a).sum())
    for transform in (lambda f: f, jax.jit):
        assert transform(of)(a).tolist() == [1000, 4000, 9000]
        assert transform(gradient)(a).tolist() == [2000, 4000, 6000]
        assert transform(jax.vmap(of))(a).tolist() == [1000, 4000, 9000]


@pytest.mark.parametrize("kind", ["registered with JAX", "a subclass, and its twin"])
def test_what_is_registered_with_jax_leaves_its_transforms(kind: str) -> None:
    make, in_torch, in_jax = KINDS[kind]
    example = None if in_torch is not Length else lambda q: make(torch.zeros(q.value.shape), q.unit)
    g = jittable(differentiable(as_jax(squared(make))), example_output=example)
    assert type(jax.jit(g)(make(a, "m"))) is in_jax
    assert jax.jit(g)(make(a, "km")).value.tolist() == [1000, 4000, 9000]
    assert jax.grad(lambda q: g(q).value.sum())(make(a, "m")).value.tolist() == [2, 4, 6]


# --- values, modules, methods, reports --------------------------------------------------------------------------------


@kinds
def test_bare_values(make: Fn, in_torch: type, in_jax: type) -> None:
    there = torch_to_jax([make(x, "m")])[0]
    assert type(there) is in_jax
    assert isinstance(there.value, jax.Array)
    back = jax_to_torch({"q": there})["q"]
    assert type(back) is in_torch
    assert back.unit == "m"
    assert torch.equal(back.value, x)


def test_a_parameter_of_a_module() -> None:
    class Scale(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = torch.nn.Parameter(length(x.clone(), "km"))

        def forward(self, y: torch.Tensor) -> torch.Tensor:
            assert isinstance(self.by, Length)
            return (self.by.value * y).sum()

    apply, params = interop.make_functional(Scale())
    assert type(params["by"]) is JaxLength
    gradient = jax.grad(apply)(params, a)["by"]
    assert type(gradient) is JaxLength
    assert gradient.value.tolist() == a.tolist()


def test_a_method_of_it() -> None:
    crossed = levels(as_torch(Opened.doubled))
    Opened.twice = crossed  # type: ignore[attr-defined]
    w = x.clone().requires_grad_()
    Opened(w, "m").twice(jnp.ones(3)).value.sum().backward()  # type: ignore[attr-defined]
    assert w.grad is not None
    assert w.grad.tolist() == [2, 2, 2]


def test_a_value_of_several_parts_is_named_by_its_parts() -> None:
    class Masked:
        def __init__(self, data: Any, mask: Any) -> None:
            self.data, self.mask = data, mask

    register_leaf(Masked, lambda m: ({"data": m.data, "mask": m.mask}, None), lambda parts, _: Masked(**parts))
    f = as_torch(lambda m: Masked(jnp.where(m.mask, m.data, 0), m.mask))
    out = f(Masked(x, x > 1))
    assert out.data.tolist() == [0, 2, 3]
    assert out.mask.tolist() == [False, True, True]
    assert "m['data']" in str(explain(f, Masked(x, x > 1)))
    with pytest.raises(interop.LeafError, match=r"argument m\['mask'\]: .*sparse"):
        f(Masked(x, torch.eye(2).to_sparse()))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_the_refusal_of_an_unknown_type_names_the_way_out_which_then_works() -> None:
    class Later(torch.Tensor):
        pass

    f, later = as_torch(lambda q: 2 * q), x.as_subclass(Later)
    with pytest.raises(interop.LeafError, match=r"Later can't cross\. .*interop\.register_leaf"):
        f(later)
    register_leaf(Later, lambda q: (q.as_subclass(torch.Tensor), None), lambda value, _: value)
    assert f(later).tolist() == [2, 4, 6]


@pytest.mark.parametrize(
    "array", [np.ma.masked_array([1.0, 2.0], [True, False]), np.rec.array([1.0, 2.0])], ids=["mask", "record"]
)
def test_an_array_of_numpy_that_is_more_than_its_memory(array: Any) -> None:
    with pytest.raises(interop.LeafError, match="argument q: a numpy array of type .*register_leaf"):
        as_torch(lambda q: q)(array)


BAD: dict[str, tuple[Fn, str]] = {
    "no pair": (lambda q: q.value, r"unwrap of Bad returned no pair: got f32\[3\], expected \(value, static\)"),
    "itself": (lambda q: (q, None), "unwrap of Bad returned a Bad again"),
    "itself, deeper": (lambda q: ([q], None), "unwrap of Bad returned a Bad again"),
    "a static with a value": (lambda q: ("m", [q.value]), r"unwrap of Bad returned a static that holds a value"),
    "a static that can't be compared": (lambda q: (q.value, {1}), "a set is neither a value"),
}


@pytest.mark.parametrize(("unwrap", "says"), BAD.values(), ids=BAD)
def test_a_bad_unwrap_is_reported_by_name(unwrap: Fn, says: str) -> None:
    class Bad(Quantity):
        pass

    register_leaf(Bad, unwrap, Bad)
    with pytest.raises(interop.ContainerError, match=rf"^f: argument q\['k'\]: {says}"):
        as_torch(named)({"k": Bad(x, "m")})
    with pytest.raises(interop.ContainerError, match=rf"argument x\[0\]: {says}"):
        torch_to_jax([Bad(x, "m")])


def named(q: Any) -> Any:
    return q


named.__name__ = "f"


def test_an_error_of_unwrap_is_the_users_own() -> None:
    class Broken(Quantity):
        pass

    register_leaf(Broken, lambda q: (q.nothing, None), Broken)
    with pytest.raises(AttributeError, match="nothing"):
        as_torch(named)(Broken(x, "m"))


@pytest.mark.parametrize(
    "taken", [Opened, Length, torch.Tensor, torch.nn.Parameter, np.ndarray, dict, int, jax.Array, type(a), "x"], ids=str
)
def test_what_crosses_already_is_not_registered(taken: Any) -> None:
    with pytest.raises(interop.OptionError):
        register_leaf(taken, lambda q: (q, None), lambda q, _: q)


def test_a_subclass_of_it_is_another_type() -> None:
    class Width(Length):
        pass

    with pytest.raises(interop.LeafError, match="Width"):
        as_torch(named)(x.as_subclass(Width))
