"""Binding as Python binds, and the guest's signature in the host's types."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import pytest
import torch

from interop._side import JAX, TORCH
from interop._signature import compile_binder, signature_of, translate_signature

FUNCTIONS = {
    "positional": lambda x, w: None,
    "defaults": lambda x, w=2, b=None: None,
    "positional only": lambda x, /, w=1: None,
    "keyword only": lambda x, *, train=True, mask: None,
    "varargs": lambda x, *rest, scale=1.0: None,
    "keywords": lambda x, **kw: None,
    "everything": lambda a, /, b, c=3, *rest, d, e=5, **kw: None,
    "nothing": lambda: None,
}
CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((), {}),
    ((1,), {}),
    ((1, 2), {}),
    ((1, 2, 3, 4), {}),
    ((1,), {"w": 5}),
    ((1,), {"mask": 0}),
    ((1,), {"mask": 0, "train": 7}),
    ((1, 2), {"d": 4}),
    ((1, 2, 3, 4), {"d": 4, "z": 9}),
    ((), {"x": 1}),
    ((1,), {"x": 1}),
    ((1,), {"scale": 2.0, "unknown": 1}),
]


@pytest.mark.parametrize("fn", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_it_binds_as_inspect_does(fn: Callable[..., Any], call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    args, kwargs = call
    bind, _ = compile_binder(signature_of(fn), "f")
    try:
        expected = inspect.signature(fn).bind(*args, **kwargs)
    except TypeError:
        with pytest.raises(TypeError, match=r"^f\(\)"):
            bind(*args, **kwargs)
        return
    assert bind(*args, **kwargs) == (expected.args, expected.kwargs)


def test_a_wrong_call_is_pythons_own_error() -> None:
    bind, _ = compile_binder(signature_of(FUNCTIONS["positional"]), "energy")
    with pytest.raises(TypeError, match=r"^energy\(\) missing 1 required positional argument: 'w'$"):
        bind(1)


def test_names_of_positional_arguments() -> None:
    assert compile_binder(signature_of(FUNCTIONS["everything"]), "f")[1] == ("a", "b", "c", "rest")


def test_a_callable_without_signature_takes_anything() -> None:
    bind, _ = compile_binder(signature_of(torch.positive), "positive")
    assert bind(1, 2, out=3) == ((1, 2), {"out": 3})


def test_partials_and_bound_methods_lose_what_is_given() -> None:
    assert list(signature_of(functools.partial(FUNCTIONS["positional"], 1)).parameters) == ["w"]


def test_string_annotations_are_resolved() -> None:
    def f(x: "jax.Array") -> "jax.Array":
        return x

    for fn in (f, jax.jit(f), functools.partial(f)):
        assert signature_of(fn).parameters["x"].annotation is jax.Array
    assert "Array" not in str(translate_signature(signature_of(jnp.sin), TORCH))


def test_an_annotation_that_can_not_be_resolved_stays() -> None:
    def f(x: "Missing", y: "jax.Array") -> None:  # noqa: F821
        return x

    parameters = signature_of(f).parameters
    assert parameters["x"].annotation == "Missing"
    assert parameters["y"].annotation is jax.Array


ANNOTATIONS = [
    (jax.Array, torch.Tensor),
    (jax.Array | None, torch.Tensor | None),
    (tuple[jax.Array, int], tuple[torch.Tensor, int]),
    (tuple[jax.Array, ...], tuple[torch.Tensor, ...]),
    (dict[str, list[jax.Array]], dict[str, list[torch.Tensor]]),
    (Annotated[jax.Array, "b c"], Annotated[torch.Tensor, "b c"]),
    (int, int),
    (Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]),
]


@pytest.mark.parametrize(("of_jax", "of_torch"), ANNOTATIONS, ids=str)
def test_annotations_are_translated_both_ways(of_jax: Any, of_torch: Any) -> None:
    def shown(annotation: Any, host: Any) -> Any:
        parameter = inspect.Parameter("x", inspect.Parameter.POSITIONAL_ONLY, annotation=annotation)
        signature = inspect.Signature([parameter], return_annotation=annotation)
        translated = translate_signature(signature, host)
        assert translated.return_annotation == translated.parameters["x"].annotation
        return translated.return_annotation

    assert shown(of_jax, TORCH) == of_torch
    if of_jax is not of_torch and of_jax != of_torch:
        assert shown(of_torch, JAX) == of_jax
