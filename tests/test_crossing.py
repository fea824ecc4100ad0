"""The wrapper: it is itself, it is one flat layer whatever the order of the stack, and it behaves as the function it wraps.

The functions here betray who runs them: the guest adds 1, the host adds 100. A wrapper that a compiler looked through
shows in the number.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import itertools
import pickle
import pydoc
import typing
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import interop
from interop import as_jax, as_torch, differentiable, jittable


def by_torch(x: Any) -> Any:
    """Adds 1 if torch runs it, 100 if JAX does."""
    return x + (1 if isinstance(x, torch.Tensor) else 100)


def by_jax(x: Any) -> Any:
    """Adds 1 if JAX runs it, 100 if torch does."""
    return x + (1 if isinstance(x, jax.Array) else 100)


def levels(crossing: Callable[..., Any]) -> Callable[..., Any]:
    """The crossing with every level on."""
    return jittable(differentiable(crossing))


# --- identity: JAX as the host ----------------------------------------------------------------------------------------


def test_jit_tells_two_crossings_of_one_function_apart() -> None:
    """A cache keyed by equality would give the second the program of the first."""

    def k(x: Any) -> Any:
        return x * x + 1

    plain = jittable(as_jax(k))
    full = jittable(differentiable(as_jax(k)))
    assert jax.jit(plain)(jnp.float32(3)) == 10
    with pytest.raises(interop.NotDifferentiableError):
        jax.grad(jax.jit(plain))(3.0)
    assert jax.grad(jax.jit(full))(3.0) == 6


@pytest.mark.parametrize("differentiable_first", [True, False])
def test_a_level_of_one_crossing_is_not_lent_to_another(differentiable_first: bool) -> None:
    """Whichever was called first."""

    def k(x: Any) -> Any:
        return x * x

    a = jittable(as_jax(k))
    b = differentiable(a)
    calls = {
        True: lambda: jax.grad(jax.jit(b))(3.0) == 6,
        False: lambda: pytest.raises(interop.NotDifferentiableError, jax.grad(jax.jit(a)), 3.0) is not None,
    }
    assert calls[differentiable_first]()
    assert calls[not differentiable_first]()


JAX_TRANSFORMS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "jit": lambda f: jax.jit(f)(jnp.float32(1)),
    "vmap": lambda f: jax.vmap(f)(jnp.ones(1))[0],
    "scan": lambda f: jax.lax.scan(lambda c, x: (f(c), None), jnp.float32(1), jnp.ones(1))[0],
    "scan_over_it": lambda f: jax.lax.scan(lambda c, x: (c, f(x)), 0, jnp.ones(1))[1][0],
    "checkpoint": lambda f: jax.checkpoint(f)(jnp.float32(1)),
    "jvp": lambda f: jax.jvp(f, (jnp.float32(1),), (jnp.float32(1),))[0],
    "vjp": lambda f: jax.vjp(f, jnp.float32(1))[0],
    "value_and_grad": lambda f: jax.value_and_grad(f)(jnp.float32(1))[0],
    "cond": lambda f: jax.lax.cond(True, f, f, jnp.float32(1)),
    "make_jaxpr": lambda f: jax.core.eval_jaxpr(*_opened(jax.make_jaxpr(f)(1.0)), jnp.float32(1))[0],
}


def _opened(closed: Any) -> tuple[Any, Any]:
    return closed.jaxpr, closed.consts


@pytest.mark.parametrize("order", ["raw first", "crossing first"])
@pytest.mark.parametrize("transform", JAX_TRANSFORMS)
def test_jax_tells_a_function_from_its_crossing(transform: str, order: str) -> None:
    def k(x: Any) -> Any:
        return by_torch(x)

    crossing, apply = levels(as_jax(k)), JAX_TRANSFORMS[transform]
    expected = [(k, 101), (crossing, 2)]
    for f, value in expected if order == "raw first" else reversed(expected):
        assert apply(f) == value


def test_eval_shape_tells_a_function_from_its_crossing() -> None:
    def k(x: Any) -> Any:
        return x.double() if isinstance(x, torch.Tensor) else x[None]

    narrow = levels(as_jax(lambda x: k(x).float()))
    assert jax.eval_shape(k, jnp.ones(2)).shape == (1, 2)
    assert jax.eval_shape(narrow, jnp.ones(2)).shape == (2,)


# --- identity: torch as the host --------------------------------------------------------------------------------------

crossed_global = levels(as_torch(by_jax))


class Holder(torch.nn.Module):
    """Calls a crossing that it has as an attribute."""

    def __init__(self, crossing: Any) -> None:
        super().__init__()
        self.crossing = crossing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Call it."""
        return self.crossing(x)


class Plain:
    """Crossings as methods of every kind."""

    @levels
    @as_torch
    def method(self, x: Any) -> Any:
        """An ordinary method."""
        return by_jax(x)

    @staticmethod
    @levels
    @as_torch
    def static(x: Any) -> Any:
        """A static method."""
        return by_jax(x)

    @classmethod
    @levels
    @as_torch
    def of_class(cls, x: Any) -> Any:
        """A class method."""
        return by_jax(x)


plain = Plain()


def _closure() -> Callable[..., Any]:
    crossing = levels(as_torch(by_jax))
    return lambda x: crossing(x)


_with_default = levels(as_torch(lambda x, by=None: by_jax(x)))
_wrapped_by_user = functools.wraps(by_jax)(lambda x: crossed_global(x))

COMPILED_FORMS: dict[str, Callable[[], Callable[..., Any]]] = {
    "global": lambda: lambda x: crossed_global(x),
    "closure": _closure,
    "argument": lambda: lambda x, f=crossed_global: f(x),
    "default": lambda: lambda x: _with_default(x),
    "keyword": lambda: lambda x: _with_default(x=x),
    "module attribute": lambda: Holder(levels(as_torch(by_jax))),
    "method": lambda: lambda x: plain.method(x),
    "static method": lambda: lambda x: Plain.static(x),
    "static method of an instance": lambda: lambda x: plain.static(x),
    "bound method itself": lambda: plain.method,
    "under functools.wraps": lambda: lambda x: _wrapped_by_user(x),
    "partial": lambda: (lambda p: lambda x: p(x))(functools.partial(_with_default, by=None)),
    "itself": lambda: levels(as_torch(by_jax)),
}


@pytest.mark.parametrize("fullgraph", [False, True], ids=["breaks", "fullgraph"])
@pytest.mark.parametrize("form", COMPILED_FORMS)
def test_dynamo_tells_a_function_from_its_crossing(form: str, fullgraph: bool) -> None:
    f = COMPILED_FORMS[form]()
    assert torch.compile(f, backend="eager", fullgraph=fullgraph)(torch.ones(2)).tolist() == [2, 2]


def test_a_plain_crossing_is_a_graph_break() -> None:
    """And under fullgraph an error that names the decorator."""
    f = as_torch(by_jax)
    g = lambda x: f(x * 2) * 2  # noqa: E731
    assert torch.compile(g, backend="eager")(torch.ones(2)).tolist() == [6, 6]
    torch._dynamo.reset()
    with pytest.raises(Exception, match="@jittable"):
        torch.compile(g, backend="eager", fullgraph=True)(torch.ones(2))


# --- identity: as a value ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decorate", [as_torch, as_jax, jittable, differentiable])
def test_a_crossing_equals_nothing_but_itself(decorate: Callable[..., Any]) -> None:
    one, two = decorate(by_jax), decorate(by_jax)
    assert one == one  # noqa: PLR0124
    assert one != two
    assert one != by_jax
    assert by_jax != one
    assert by_jax not in {one: 1}
    assert one not in {by_jax: 1}
    assert hash(one) != hash(two)
    assert len({one, two, by_jax}) == 3


def test_a_crossing_is_of_its_own_class() -> None:
    f = as_torch(by_jax)
    assert type(f) is f.__class__
    assert not inspect.isfunction(f)
    assert callable(f)


# --- the stack --------------------------------------------------------------------------------------------------------

STACKS = list(itertools.permutations([as_jax, differentiable, jittable]))


def _name(stack: Any) -> str:
    return " of ".join(d.__name__ for d in stack)


@pytest.mark.parametrize("stack", STACKS, ids=_name)
def test_every_order_of_the_stack_is_the_same_into_jax(stack: tuple[Callable[..., Any], ...]) -> None:
    f = lambda x: (x**3).sum()  # noqa: E731
    crossing = functools.reduce(lambda g, decorate: decorate(g), reversed(stack), f)
    assert jax.jit(jax.grad(crossing))(jnp.float32(2)) == 12
    assert repr(crossing) == repr(jittable(differentiable(as_jax(f))))
    assert crossing.__wrapped__ is f


@pytest.mark.parametrize("stack", list(itertools.permutations([as_torch, differentiable, jittable])), ids=_name)
def test_every_order_of_the_stack_is_the_same_into_torch(stack: tuple[Callable[..., Any], ...]) -> None:
    f = lambda x: (x**3).sum()  # noqa: E731
    crossing = functools.reduce(lambda g, decorate: decorate(g), reversed(stack), f)
    x = torch.tensor(2.0, requires_grad=True)
    torch.compile(crossing, fullgraph=True, backend="aot_eager")(x).backward()
    assert x.grad is not None
    assert x.grad.item() == 12
    assert repr(crossing) == repr(jittable(differentiable(as_torch(f))))
    assert crossing.__wrapped__ is f


OPTIONS: dict[str, Callable[..., Any]] = {
    "as_jax": as_jax(static_argnames="kind"),
    "differentiable": differentiable(nondiff_argnames="y"),
    "jittable": jittable(example_output=jax.ShapeDtypeStruct((), jnp.float32)),
}


@pytest.mark.parametrize("stack", list(itertools.permutations(OPTIONS)), ids=" of ".join)
def test_every_order_of_the_stack_keeps_its_options(stack: tuple[str, ...]) -> None:
    def f(x: Any, y: Any, kind: str) -> Any:
        return {"times": x * y, "plus": x + y}[kind]

    crossing = functools.reduce(lambda g, name: OPTIONS[name](g), reversed(stack), f)
    assert jax.jit(jax.grad(lambda x: crossing(x, jnp.float32(3), kind="times")))(2.0) == 3
    with pytest.raises(interop.NotDifferentiableError, match="nondiff_argnames"):
        jax.grad(lambda y: crossing(jnp.float32(2), y, kind="times"))(3.0)
    with pytest.raises(Exception, match="example_output"):
        jax.jit(lambda x: crossing(x, x, kind="plus"))(jnp.ones(2)).block_until_ready()


def test_a_level_before_the_crossing_is_remembered() -> None:
    """And until then the function is itself, called without anything in between."""
    early = differentiable(by_torch)
    assert early(jnp.zeros(())) == 100
    assert jax.grad(lambda x: as_jax(early)(x))(0.0) == 1


def test_options_and_bare_are_the_same() -> None:
    assert as_torch()(by_jax)(torch.zeros(())) == 1
    assert as_jax()(by_torch)(jnp.zeros(())) == 1
    assert jittable()(differentiable()(as_torch()(by_jax)))(torch.zeros(())) == 1


@pytest.mark.parametrize(("there", "back"), [(as_torch, as_jax), (as_jax, as_torch)])
def test_crossing_back_unwraps(there: Callable[..., Any], back: Callable[..., Any]) -> None:
    """Options given on the way are dropped."""
    assert back(there(by_jax)) is by_jax
    assert back(levels(there(static_argnames="x")(by_jax))) is by_jax


def test_crossing_twice_the_same_way_is_crossing_once() -> None:
    f = as_torch(as_torch(by_jax))
    assert f(torch.zeros(())) == 1
    assert f.__wrapped__ is by_jax


def test_a_refined_crossing_leaves_the_first_alone() -> None:
    first = as_torch(by_jax)
    second = differentiable(first)
    x = torch.zeros((), requires_grad=True)
    assert second(x).requires_grad
    with pytest.raises(interop.NotDifferentiableError):
        first(x)


# --- what can be decorated --------------------------------------------------------------------------------------------


class Scale:
    """A callable object."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, x: Any) -> Any:
        """Multiply."""
        return by_jax(x) * self.by

    def method(self, x: Any) -> Any:
        """Multiply, under a name."""
        return by_jax(x) * self.by


DECORABLE: dict[str, Callable[[], Any]] = {
    "function": lambda: by_jax,
    "lambda": lambda: lambda x: by_jax(x),
    "partial": lambda: functools.partial(lambda k, x: by_jax(x) + k - k, 3.0),
    "keyword partial": lambda: functools.partial(lambda x, k: by_jax(x), k="text"),
    "callable object": lambda: Scale(1.0),
    "bound method": lambda: Scale(1.0).method,
    "jitted function": lambda: jax.jit(by_jax),
    "vmapped function": lambda: jax.vmap(by_jax),
    "custom derivative": lambda: _custom(),
    "builtin": lambda: functools.partial(jnp.add, 1),
    "wrapped by a user": lambda: functools.wraps(by_jax)(lambda x: by_jax(x)),
}


def _custom() -> Any:
    f = jax.custom_jvp(lambda x: by_jax(x))
    f.defjvp(lambda primals, tangents: (f(*primals), 7 * tangents[0]))
    return f


@pytest.mark.parametrize("make", DECORABLE.values(), ids=DECORABLE)
def test_anything_callable_crosses_into_torch(make: Callable[[], Any]) -> None:
    f = levels(as_torch(make()))
    x = torch.zeros(2, requires_grad=True)
    y = f(x)
    assert y.tolist() == [1, 1]
    y.sum().backward()
    assert x.grad is not None
    assert set(x.grad.tolist()) <= {1, 7}
    assert torch.func.vmap(f)(torch.zeros(3, 2)).tolist() == [[1, 1]] * 3


TORCH_DECORABLE: dict[str, Callable[[], Any]] = {
    "function": lambda: by_torch,
    "partial": lambda: functools.partial(lambda k, x: by_torch(x) + k - k, 3.0),
    "callable object": lambda: type("Callable", (), {"__call__": lambda self, x: by_torch(x)})(),
    "builtin": lambda: torch.positive,
    "torch.func.vmap": lambda: torch.func.vmap(by_torch),
}


@pytest.mark.parametrize("make", TORCH_DECORABLE.values(), ids=TORCH_DECORABLE)
def test_anything_callable_crosses_into_jax(make: Callable[[], Any]) -> None:
    f = levels(as_jax(make()))
    for call in (f, jax.jit(f)):
        assert call(jnp.zeros(2)).tolist() in ([1, 1], [0, 0])
    assert jax.grad(lambda x: f(x).sum())(jnp.zeros(2)).tolist() == [1, 1]


def test_a_module_is_a_function_of_its_parameters() -> None:
    """`as_jax(module)` is `apply(params, *args)`."""
    net = torch.nn.Linear(2, 1)
    params = {name: jnp.asarray(p.detach().numpy()) for name, p in net.named_parameters()}
    apply = levels(as_jax(net))
    x = jnp.ones((3, 2))
    assert jnp.allclose(apply(params, x), x @ params["weight"].T + params["bias"])
    grads = jax.jit(jax.grad(lambda p: apply(p, x).sum()))(params)
    assert grads["weight"].tolist() == [[3, 3]]
    assert grads["bias"].tolist() == [3]
    assert all(p.grad is None for p in net.parameters())


class Methods:
    """Methods of every kind, decorated in the class."""

    def __init__(self, by: float) -> None:
        self.by = by

    @levels
    @as_torch
    def method(self, x: Any, power: int = 1) -> Any:
        """Reads `self`."""
        return (x * self.by) ** power

    @levels
    @as_torch
    @staticmethod
    def static(x: Any) -> Any:
        """Decorated around the static method."""
        return x * 2

    @staticmethod
    @levels
    @as_torch
    def static_outside(x: Any) -> Any:
        """Decorated inside the static method."""
        return x * 2

    @levels
    @as_torch
    @classmethod
    def of_class(cls, x: Any) -> Any:
        """Decorated around the class method."""
        return x * len(cls.__name__)

    @classmethod
    @levels
    @as_torch
    def of_class_outside(cls, x: Any) -> Any:
        """Decorated inside the class method."""
        return x * len(cls.__name__)


class Longer(Methods):
    """A subclass: what a class method sees."""


def test_methods() -> None:
    x = torch.tensor(2.0, requires_grad=True)
    assert Methods(3).method(x) == 6
    assert Methods(4).method(x, power=2) == 64
    assert Methods.method(Methods(3), x) == 6
    assert [Methods(k).method(x).item() for k in range(3)] == [0, 2, 4]
    Methods(3).method(x, 2).backward()
    assert x.grad is not None
    assert x.grad.item() == 36


@pytest.mark.parametrize(
    "owner", [Methods, Methods(1), Longer, Longer(1)], ids=["class", "instance", "subclass", "its instance"]
)
def test_static_and_class_methods(owner: Any) -> None:
    x = torch.tensor(3.0)
    cls = owner if isinstance(owner, type) else type(owner)
    assert owner.static(x) == 6
    assert owner.static_outside(x) == 6
    assert owner.of_class(x) == 3 * len(cls.__name__)
    assert owner.of_class_outside(x) == 3 * len(cls.__name__)


def test_a_method_is_decorated_on_an_instance() -> None:
    f = levels(as_torch(Scale(2.0).method))
    assert f(torch.zeros(())) == 2


def test_not_many_instances_are_kept_alive() -> None:
    """A method's crossing remembers what it traced for an instance, of the latest ones."""
    owners = [Methods(k) for k in range(100)]
    gone = [weakref.ref(owner) for owner in owners]
    for owner in owners:
        owner.method(torch.ones(()))
    del owner, owners
    gc.collect()
    assert sum(ref() is not None for ref in gone) <= 64


def test_a_new_instance_is_not_taken_for_an_old_one() -> None:
    for k in range(50):
        assert Methods(k).method(torch.ones(())) == k


# --- arguments --------------------------------------------------------------------------------------------------------


def test_every_kind_of_parameter() -> None:
    def f(a: Any, /, b: Any, c: float = 2.0, *rest: Any, d: Any, e: Any = None, **more: Any) -> Any:
        return a + 10 * b + 100 * c + 1000 * sum(rest) + d + (0 if e is None else e) + sum(more.values())

    one = torch.tensor(1.0)
    g = as_torch(f)
    assert g(one, one, d=one) == 212
    assert g(one, one, 3.0, d=one) == 312
    assert g(one, one, 3.0, one, one, d=one, e=one, x=one, y=one) == 2315
    h = as_jax(f)
    ones = jnp.float32(1)
    assert h(ones, ones, 3.0, ones, ones, d=ones, e=ones, x=ones, y=ones) == 2315


@pytest.mark.parametrize("wrap", [as_torch, as_jax])
def test_a_wrong_call_raises_pythons_own_error(wrap: Callable[..., Any]) -> None:
    def volume(radius: Any, *, height: Any) -> Any:
        return radius * height

    for args, kwargs in [((), {}), ((1, 2), {}), ((1,), {"height": 1, "depth": 2})]:
        with pytest.raises(TypeError, match=r"volume\(\)") as caught:
            wrap(volume)(*args, **kwargs)
        assert not isinstance(caught.value, interop.InteropError)


@pytest.mark.parametrize(("wrap", "leaf"), [(as_torch, torch.ones(2)), (as_jax, jnp.ones(2))], ids=["torch", "jax"])
def test_a_wrong_call_is_refused_after_right_ones(wrap: Callable[..., Any], leaf: Any) -> None:
    f = wrap(lambda x, y, *, sign=1: sign * (x + y))
    assert f(leaf, y=leaf).tolist() == f(leaf, leaf).tolist() == [2, 2]
    for args, kwargs in [((), {}), ((leaf,), {}), ((leaf,) * 3, {}), ((leaf, leaf), {"y": leaf})]:
        with pytest.raises(TypeError, match="argument"):
            f(*args, **kwargs)
    assert f(leaf, leaf, sign=-1).tolist() == [-2, -2]


def test_values_of_the_guest_and_of_numpy_pass() -> None:
    f = as_torch(lambda x, y: x + y)
    assert f(torch.ones(2), jnp.ones(2)).tolist() == [2, 2]
    assert f(torch.ones(2), np.ones(2, np.float32)).tolist() == [2, 2]
    g = as_jax(lambda x, y: x + y)
    assert g(jnp.ones(2), torch.ones(2)).tolist() == [2, 2]
    assert g(jnp.ones(2), np.ones(2, np.float32)).tolist() == [2, 2]


@pytest.mark.parametrize("number", [3.0, np.float32(3)], ids=["float", "numpy"])
def test_jax_differentiates_at_a_number(number: Any) -> None:
    """Its transforms take Python and numpy numbers for arrays, and hand them to the rules as they are."""
    f = levels(as_jax(lambda x: x**3))
    assert f(number) == 27
    assert jax.grad(f)(number) == 27
    assert jax.jit(jax.grad(f))(number) == 27
    assert jax.hessian(f)(number) == 18
    assert jax.jacfwd(f)(number) == 27
    assert jax.grad(jax.grad(jax.grad(f)))(number) == 6
    assert jax.jvp(f, (number,), (number,)) == (27, 81)
    assert jax.linearize(f, number)[1](number) == 81


def test_a_function_without_array_arguments() -> None:
    assert as_torch(lambda: jnp.ones(2))().tolist() == [1, 1]
    assert as_jax(lambda: torch.ones(2))().tolist() == [1, 1]
    assert jax.jit(jittable(as_jax(lambda: torch.ones(2))))().tolist() == [1, 1]


def test_dict_order_and_statics_of_a_result() -> None:
    out = as_torch(lambda x: {"z": x, "a": (x, None, "text", 3)})(torch.ones(()))
    assert list(out) == ["z", "a"]
    assert out["a"][1:] == (None, "text", 3)
    out = as_jax(lambda x: {"z": x, "a": (x, None, "text", 3)})(jnp.ones(()))
    assert list(out) == ["z", "a"]
    assert out["a"][1:] == (None, "text", 3)


# --- how it looks -----------------------------------------------------------------------------------------------------


@levels
@as_torch
def documented(x: jax.Array, n: int = 3, *, mask: jax.Array | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What it does."""
    return x * n, {"x": x}


@levels
@as_jax
def documented_in_torch(x: torch.Tensor, n: int = 3) -> list[torch.Tensor]:
    """What it does, in torch."""
    return [x * n]


def test_it_looks_like_the_function_in_host_types() -> None:
    assert documented.__name__ == "documented"
    assert documented.__qualname__ == "documented"
    assert documented.__module__ == __name__
    assert documented.__doc__ == "What it does."
    parameters = inspect.signature(documented, eval_str=True).parameters
    assert parameters["x"].annotation is torch.Tensor
    assert parameters["n"].annotation is int
    assert parameters["n"].default == 3
    assert parameters["mask"].annotation == torch.Tensor | None
    assert (
        inspect.signature(documented, eval_str=True).return_annotation == tuple[torch.Tensor, dict[str, torch.Tensor]]
    )
    assert typing.get_type_hints(documented_in_torch) == {"x": jax.Array, "n": int, "return": list[jax.Array]}


def test_the_function_itself_keeps_its_types() -> None:
    assert typing.get_type_hints(documented.__wrapped__)["x"] is jax.Array


def test_help_shows_host_types() -> None:
    text = pydoc.plain(pydoc.render_doc(documented))
    assert "Tensor" in text
    assert "jax" not in text.split("What it does.")[0].replace("interop", "")
    assert "What it does." in text


def test_a_methods_signature_has_no_self() -> None:
    assert list(inspect.signature(Methods(1).method).parameters) == ["x", "power"]
    assert list(inspect.signature(Methods.method).parameters) == ["self", "x", "power"]
    assert Methods(1).method.__name__ == "method"
    assert Methods(1).method.__doc__ == "Reads `self`."


def test_a_stub_gives_the_signature() -> None:
    def stub(x: torch.Tensor, *, scale: float) -> torch.Tensor: ...

    f = as_torch(signature=stub)(lambda x, *, scale: x * scale)
    assert inspect.signature(f) == inspect.signature(stub)


def test_under_functools_wraps() -> None:
    @functools.wraps(documented)
    def outer(*args: Any, **kwargs: Any) -> Any:
        return documented(*args, **kwargs)

    assert outer.__name__ == "documented"
    assert outer(torch.ones(()))[0] == 3


# --- as an object -----------------------------------------------------------------------------------------------------


def test_pickle_finds_it_by_name() -> None:
    assert pickle.loads(pickle.dumps(documented)) is documented


def test_pickle_rebuilds_a_stack_over_a_name() -> None:
    again = pickle.loads(pickle.dumps(levels(as_torch(by_jax))))
    x = torch.zeros((), requires_grad=True)
    assert again(x) == 1
    assert again(x).requires_grad


def test_pickle_refuses_what_it_can_not_find() -> None:
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(as_torch(lambda x: x))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copies_work(duplicate: Callable[[Any], Any]) -> None:
    again = duplicate(documented)
    assert again(torch.ones(()))[0] == 3
    module = Holder(levels(as_torch(by_jax)))
    assert duplicate(module)(torch.zeros(())) == 1


def test_weak_references() -> None:
    f = as_torch(lambda x: x)
    f(torch.ones(2))
    gone = weakref.ref(f)
    assert gone() is f
    del f
    gc.collect()
    assert gone() is None


def test_attributes_can_be_set() -> None:
    f = as_torch(lambda x: x)
    f.note = "mine"
    assert f.note == "mine"


def test_repr_names_the_stack() -> None:
    assert repr(documented) == "<jittable differentiable as_torch documented>"


def test_threads_share_a_crossing() -> None:
    from concurrent.futures import ThreadPoolExecutor

    f = levels(as_torch(lambda x, k: x * k))

    def work(k: int) -> bool:
        x = torch.full((3,), float(k), requires_grad=True)
        y = f(x, float(k))
        y.sum().backward()
        return y.tolist() == [k * k] * 3 and x.grad is not None and x.grad.tolist() == [k] * 3

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))
