"""The exact text of each kind of error: the function, the argument's path, what, got, expected, the way out, the page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch

import interop
from interop import as_jax, as_torch, differentiable, jax_to_torch, jittable, torch_to_jax

x = torch.ones(2, 3)
a = jnp.ones((2, 3))


def energy(params: Any, x: Any, *, scale: float = 1.0) -> Any:
    """What the messages are about; written for either framework."""
    return (params["w"][0] * x * scale).sum()


class Unknown(torch.Tensor):
    """A subclass that nobody has said anything about."""


class Cache:
    """An object that hides a tensor."""

    def __init__(self, content: Any) -> None:
        self.content = content


def place(kind: type[Exception]) -> str:
    """How every text of this kind ends: with the section that explains it."""
    return f" [errors.md#{kind.__name__.lower()}]"


def params(leaf: Any) -> dict[str, Any]:
    """The leaf, two containers deep."""
    return {"w": [leaf]}


in_torch, in_jax = as_torch(energy), as_jax(energy)

Bad = tuple[Callable[[], Any], type[Exception], str]

# --- leaves -----------------------------------------------------------------------------------------------------------

LEAVES: dict[str, Bad] = {
    "sparse": (
        lambda: in_torch(params(torch.eye(3).to_sparse()), x),
        interop.LeafError,
        "energy: argument params['w'][0]: a sparse_coo tensor can't cross. Pass x.to_dense()",
    ),
    "subclass": (
        lambda: in_torch(params(x.as_subclass(Unknown)), x),
        interop.LeafError,
        f"energy: argument params['w'][0]: a tensor of type {__name__}.Unknown can't cross. "
        "Convert it to a plain torch.Tensor first, or say what it is made of: interop.register_leaf",
    ),
    "dtype": (
        lambda: in_torch(params(torch.ones(2, dtype=torch.complex32)), x),
        interop.LeafError,
        "energy: argument params['w'][0]: dtype torch.complex32 has no counterpart in JAX.",
    ),
    "meta": (
        lambda: in_torch(params(x), torch.ones(2, 3, device="meta")),
        interop.LeafError,
        "energy: argument x: a tensor on the 'meta' device has no values. Materialise it with to_empty()",
    ),
    "key": (
        lambda: in_jax(params(jax.random.key(0)), a),
        interop.LeafError,
        "energy: argument params['w'][0]: a typed PRNG key can't cross: got key<fry>[]. Pass jax.random.key_data(key)",
    ),
    "array dtype": (
        lambda: in_jax(params(jnp.ones(2, jnp.int4)), a),
        interop.LeafError,
        "energy: argument params['w'][0]: dtype int4 has no counterpart in torch.",
    ),
    "a tensor that would lose its gradient": (
        lambda: in_jax(params(torch.ones(2, 3, requires_grad=True)), a),
        interop.LeafError,
        "energy: argument params['w'][0]: a tensor that requires grad would lose its gradient in a function that JAX calls: "
        "got f32[2,3]. Pass x.detach(), or call the torch function itself",
    ),
}

# --- containers -------------------------------------------------------------------------------------------------------

CONTAINERS: dict[str, Bad] = {
    "object": (
        lambda: in_torch(params(Cache(x)), x),
        interop.ContainerError,
        "energy: argument params['w'][0]: a Cache hides f32[2,3] in .content and can't be opened. "
        "Register it with jax.tree_util, or pass its parts",
    ),
    "object of arrays": (
        lambda: in_jax(params(Cache([a])), a),
        interop.ContainerError,
        "energy: argument params['w'][0]: a Cache hides f32[2,3] in .content[0] and can't be opened. "
        "Register it with jax.tree_util, or pass its parts",
    ),
    "unhashable": (
        lambda: as_torch(lambda x, kind: x, static_argnames="kind")(x, {1, 2}),
        interop.ContainerError,
        "<lambda>: argument kind: a set is neither a value, a known container, nor hashable. "
        "Register it with jax.tree_util, or pass its parts",
    ),
}

# --- 64 bits ----------------------------------------------------------------------------------------------------------

WIDE: dict[str, Bad] = {
    "int64 in": (
        lambda: in_torch(params(torch.tensor([0, 2**40])), x),
        interop.NarrowingError,
        f"energy: argument params['w'][0]: the value {2**40} does not fit into int32: got i64[2]. "
        "JAX keeps 32 bits: set jax.config.update('jax_enable_x64', True)",
    ),
    "a number in": (
        lambda: in_torch(params(x), x, scale=2**40),
        interop.NarrowingError,
        f"energy: argument scale: the value {2**40} does not fit into int32. "
        "JAX keeps 32 bits: set jax.config.update('jax_enable_x64', True)",
    ),
    "int64 out": (
        lambda: as_jax(lambda t: {"i": t.long() + 2**40})(a),
        interop.NarrowingError,
        f"<lambda>: result['i']: the value {2**40 + 1} does not fit into int32: got i64[2,3]. "
        "JAX keeps 32 bits: set jax.config.update('jax_enable_x64', True)",
    ),
    "float64 out": (
        lambda: as_jax(lambda t: {"y": t.double()})(a),
        interop.PrecisionError,
        "<lambda>: result['y']: a float64 result has nowhere to go: got f64[2,3]. "
        "Return y.float(), or set jax.config.update('jax_enable_x64', True)",
    ),
}

# --- levels -----------------------------------------------------------------------------------------------------------

LEVELS: dict[str, Bad] = {
    "gradient in torch": (
        lambda: in_torch(params(torch.ones(2, 3, requires_grad=True)), x),
        interop.NotDifferentiableError,
        "energy: argument params['w'][0]: a tensor that requires grad into a function that is not differentiable. "
        "Stack @differentiable, or pass x.detach()",
    ),
    "gradient in JAX": (
        lambda: jax.grad(in_jax)(params(a), a),
        interop.NotDifferentiableError,
        "energy: argument params['w'][0]: a derivative of a function that is not differentiable. "
        "Stack @differentiable, or use jax.lax.stop_gradient",
    ),
    "excluded in torch": (
        lambda: differentiable(nondiff_argnames="params")(in_torch)(params(torch.ones(2, 3, requires_grad=True)), x),
        interop.NotDifferentiableError,
        "energy: argument params['w'][0]: a tensor that requires grad for an argument named in nondiff_argnames. "
        "Pass x.detach()",
    ),
    "jit in JAX": (
        lambda: jax.jit(in_jax)(params(a), a),
        interop.NotJittableError,
        "energy: traced by JAX into a compiled program. Stack @jittable",
    ),
    "a tracer into a torch crossing": (
        lambda: jax.jit(lambda b: in_torch(params(b), b))(a),
        interop.LeafError,
        "energy: argument params['w'][0]: a tracer (f32[2,3]) has no values to share. Stack @jittable and @as_jax",
    ),
}

# --- options ----------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Bad] = {
    "static_argnames": (
        lambda: as_torch(static_argnames="depth")(energy),
        interop.OptionError,
        "energy: static_argnames names 'depth', which is no parameter: expected (params, x, *, scale=1.0).",
    ),
    "nondiff_argnames": (
        lambda: differentiable(nondiff_argnames="depth")(in_torch),
        interop.OptionError,
        "energy: nondiff_argnames names 'depth', which is no parameter: expected (params, x, *, scale=1.0).",
    ),
    "not callable": (
        lambda: as_torch(3),
        interop.OptionError,
        "a int can't be decorated: expected a callable. Options are keyword-only",
    ),
    "vmap": (
        lambda: as_jax(vmap="no")(energy),
        interop.OptionError,
        "vmap='no': expected 'auto' or 'sequential'.",
    ),
}

# --- bare values ------------------------------------------------------------------------------------------------------

VALUES: dict[str, Bad] = {
    "tensor": (
        lambda: torch_to_jax(params(torch.eye(2).to_sparse())),
        interop.LeafError,
        "torch_to_jax: argument x['w'][0]: a sparse_coo tensor can't cross. Pass x.to_dense()",
    ),
    "int64": (
        lambda: torch_to_jax(params(torch.tensor(2**40))),
        interop.NarrowingError,
        f"torch_to_jax: argument x['w'][0]: the value {2**40} does not fit into int32: got i64[]. "
        "JAX keeps 32 bits: set jax.config.update('jax_enable_x64', True)",
    ),
    "array": (
        lambda: jax_to_torch(params(jax.random.key(0))),
        interop.LeafError,
        "jax_to_torch: argument x['w'][0]: a typed PRNG key (key<fry>) can't cross. Pass jax.random.key_data(key)",
    ),
    "container": (
        lambda: torch_to_jax(params(Cache(x))),
        interop.ContainerError,
        "torch_to_jax: argument x['w'][0]: a Cache hides f32[2,3] in .content and can't be opened. "
        "Register it with jax.tree_util, or pass its parts",
    ),
    "device": (
        lambda: torch_to_jax(torch.device("xpu")),
        interop.DeviceError,
        "tensors on a 'xpu' device can't cross. Move them to 'cpu' or 'cuda'",
    ),
}

# --- promises ---------------------------------------------------------------------------------------------------------

wrong = jax.ShapeDtypeStruct((3,), jnp.float32)

PROMISES: dict[str, Bad] = {
    "shape": (
        lambda: jittable(example_output=wrong)(in_jax)(params(a), a),
        interop.OutputMismatchError,
        "energy: the result disagrees with what was promised for it: got (f32[]), expected (f32[3]). "
        "Correct example_output, or return what it says",
    ),
    "shape in torch": (
        lambda: jittable(example_output=wrong)(in_torch)(params(x), x),
        interop.OutputMismatchError,
        "energy: the result disagrees with what was promised for it: got (f32[]), expected (f32[3]). "
        "Correct example_output, or return what it says",
    ),
    "no shape": (
        lambda: jax.jit(jittable(as_jax(lambda t: t[t > 0])))(a),
        interop.AbstractEvalError,
        "<lambda>: the output shapes can't be inferred (DynamicOutputShapeException: aten.nonzero.default). "
        "Declare them: @jittable(example_output=...)",
    ),
}


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (
            jax.random.key,
            "<lambda>: result['r']: a typed PRNG key (key<fry>) can't cross. Return jax.random.key_data(key)",
        ),
        (lambda i: jnp.ones(2, jnp.int4), "<lambda>: result['r']: dtype int4 has no counterpart in torch."),
    ],
    ids=["key", "dtype"],
)
def test_a_result_that_can_not_cross_is_named(result: Callable[[int], Any], text: str) -> None:
    with pytest.raises(interop.LeafError) as caught:
        as_torch(lambda x: {"r": result(0)})(x)
    assert str(caught.value) == text + place(interop.LeafError)


ALL = LEAVES | CONTAINERS | WIDE | LEVELS | OPTIONS | {f"bare {k}": v for k, v in VALUES.items()} | PROMISES


@pytest.mark.parametrize(("bad", "kind", "text"), ALL.values(), ids=ALL)
def test_text(bad: Callable[[], Any], kind: type[Exception], text: str) -> None:
    """Word for word; and the library works afterwards."""
    with pytest.raises(kind) as caught:
        bad()
    assert type(caught.value) is kind
    assert str(caught.value) == text + place(kind)
    assert in_torch(params(x), x) == 6
    assert in_jax(params(a), a) == 6


def test_the_parts_are_attributes() -> None:
    with pytest.raises(interop.InteropError) as caught:
        in_torch(params(torch.tensor([2**40])), x)
    error = caught.value
    assert (error.function, error.argument) == ("energy", "params['w'][0]")
    assert error.got == "i64[1]"


# --- the place in the documentation -----------------------------------------------------------------------------------


def test_the_place_is_that_of_the_class_or_of_the_nearest_of_ours() -> None:
    class Finer(interop.PrecisionError):
        """Of a user."""

    assert str(interop.InteropError("no")) == "no. [errors.md#interoperror]"
    assert str(Finer("no")) == "no. [errors.md#precisionerror]"


def test_the_place_is_told_once_at_the_end() -> None:
    """Also of an error that is made of the text of another, as `DataLoader` makes one of a worker's."""
    error = interop.LeafError("no", hint="Do this")
    again = interop.LeafError(f"Caught LeafError in a worker:\n{error}\n")
    assert str(again) == f"Caught LeafError in a worker:\nno. Do this{place(interop.LeafError)}\n"


def test_the_place_is_left_out_inside_a_sentence() -> None:
    """The report of a call goes on after the reason why a gradient can't be captured."""
    nested = as_jax(lambda t: differentiable(as_torch(jnp.sin))(t))
    report = interop.explain(jittable(example_output=a)(differentiable(nested)), a)
    assert report.gradient.endswith("it can't be captured (NotJittableError: sin: traced by torch. Stack @jittable)")


# --- wrong calls ------------------------------------------------------------------------------------------------------

CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "missing": (lambda f: f({}), "energy() missing 1 required positional argument: 'x'"),
    "too many": (lambda f: f({}, 1, 2), "energy() takes 2 positional arguments but 3 were given"),
    "unknown": (lambda f: f({}, 1, depth=2), "energy() got an unexpected keyword argument 'depth'"),
    "twice": (lambda f: f({}, 1, x=2), "energy() got multiple values for argument 'x'"),
}


@pytest.mark.parametrize("crossing", [in_torch, in_jax], ids=["torch", "jax"])
@pytest.mark.parametrize(("call", "text"), CALLS.values(), ids=CALLS)
def test_a_wrong_call_reads_as_pythons_own(crossing: Any, call: Callable[[Any], Any], text: str) -> None:
    with pytest.raises(TypeError) as ours:
        call(crossing)
    with pytest.raises(TypeError) as pythons:
        call(energy)
    assert type(ours.value) is TypeError
    assert str(ours.value) == str(pythons.value) == text


# --- the user's own errors --------------------------------------------------------------------------------------------


class Custom(Exception):
    """Of the user's program."""


def fails(x: Any) -> Any:
    """Raises."""
    raise Custom("mine")


USERS: dict[str, Callable[[], Any]] = {
    "torch": lambda: as_torch(fails)(x),
    "torch under vmap": lambda: torch.func.vmap(as_torch(fails))(x),
    "torch with gradient": lambda: differentiable(as_torch(fails))(torch.ones(2, requires_grad=True)),
    "jax": lambda: as_jax(fails)(a),
    "jax under vmap": lambda: jax.vmap(as_jax(fails))(a),
    "jax under grad": lambda: jax.grad(differentiable(as_jax(fails)))(a),
    "jax while tracing": lambda: jax.jit(jittable(as_jax(fails)))(a),
}


@pytest.mark.parametrize("call", USERS.values(), ids=USERS)
def test_a_users_error_keeps_its_type_and_shows_its_line(call: Callable[[], Any]) -> None:
    with pytest.raises(Custom, match="mine") as caught:
        call()
    assert any(entry.name == "fails" for entry in caught.traceback)


TRACED = "as_torch traces a function, as jax.jit does"
LONG = "an int32 of JAX is an int32 in torch"
logits, labels = jnp.ones((2, 4)), jnp.array([0, 1])
batch_norm = differentiable(as_jax(lambda mean, x: torch.nn.functional.batch_norm(x, mean, torch.ones(2)).sum()))
cross_entropy = jittable(differentiable(as_jax(torch.nn.functional.cross_entropy)))
NOTED: dict[str, tuple[Callable[[], Any], str]] = {
    "a branch on a value": (lambda: as_torch(lambda x: x if x.sum() > 0 else -x)(x), TRACED),
    "a number": (lambda: as_torch(lambda x: float(x.sum()))(x), TRACED),
    "a size": (lambda: as_torch(lambda x, n: jnp.zeros(n))(x, torch.tensor(3)), TRACED),
    "a function of torch": (lambda: as_torch(torch.sin)(x), "sin: as_torch takes a function of JAX's arrays"),
    "a function of JAX": (lambda: as_jax(jnp.sin)(a), "sin: as_jax takes a function of torch's tensors"),
    "neither, with a tensor": (lambda: jittable(jnp.sin)(x), "sin: it is called as it is, since neither"),
    "neither, with an array": (lambda: jittable(torch.sin)(a), "sin: it is called as it is, since neither"),
    "buffers": (
        lambda: jax.grad(batch_norm)(jnp.ones(2), jnp.ones((2, 2))),
        "<lambda>: of buffers there is no gradient",
    ),
    "labels": (lambda: cross_entropy(logits, labels), f"cross_entropy: {LONG}"),
    "labels, differentiated": (lambda: jax.grad(cross_entropy)(logits, labels), f"cross_entropy: {LONG}"),
}


@pytest.mark.parametrize(("call", "note"), NOTED.values(), ids=NOTED)
def test_an_error_that_has_a_way_out_here_is_noted(call: Callable[[], Any], note: str) -> None:
    """Below its own text, once, and its type stays."""
    with pytest.raises((TypeError, RuntimeError)) as caught:
        call()
    assert not isinstance(caught.value, interop.InteropError)
    assert [note in text for text in caught.value.__notes__ if "removed its internal frames" not in text] == [True]


def test_the_way_out_of_an_error_in_a_compiled_program_is_in_its_text() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match=LONG):
        jax.block_until_ready(jax.jit(cross_entropy)(logits, labels))
    long = jittable(as_jax(lambda logits, labels: torch.nn.functional.cross_entropy(logits, labels.long())))
    assert jnp.allclose(jax.jit(long)(logits, labels), jnp.log(4.0))


def test_an_error_with_no_way_out_here_has_no_note() -> None:
    for call in (
        lambda: as_torch(lambda x: [] + 1)(x),
        lambda: as_jax(lambda x: [] + 1)(a),
        lambda: as_jax(lambda x: x.long().sub_(1.5))(a),
        lambda: jittable(fails)(1),
    ):
        with pytest.raises((TypeError, RuntimeError, Custom)) as caught:
            call()
        assert [n for n in getattr(caught.value, "__notes__", []) if "removed its internal frames" not in n] == []


def test_a_keyboard_interrupt_passes() -> None:
    def interrupted(t: Any) -> Any:
        raise KeyboardInterrupt

    for call in (lambda: as_torch(interrupted)(x), lambda: as_jax(interrupted)(a)):
        with pytest.raises(KeyboardInterrupt):
            call()


def test_an_error_inside_a_compiled_program_says_whose_it_is() -> None:
    """JAX allows its own type alone there: the crossing, the user's type, message and line are in the text."""

    def late(t: Any) -> Any:
        if not isinstance(t, torch._subclasses.FakeTensor):
            raise Custom("at run time")
        return t * 2

    with pytest.raises(Exception, match="at run time") as caught:
        jax.jit(jittable(as_jax(late)))(a).block_until_ready()
    text = str(caught.value)
    for part in ("late", "Custom", "at run time", "test_messages.py"):
        assert part in text
    assert jax.jit(jittable(in_jax))(params(a), a) == 6


def test_frames_of_the_library_hide() -> None:
    with pytest.raises(interop.InteropError) as caught:
        in_torch(params(torch.eye(3).to_sparse()), x)
    shown = [entry for entry in caught.traceback.filter(caught) if "interop/interop" in str(entry.path)]
    assert not shown
