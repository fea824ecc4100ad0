"""Signatures: binding a call as Python would, and showing the guest's signature in the host's types."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import jax
import torch

from interop._side import JAX, Side

_ANY = inspect.Signature(
    [
        inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),
        inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
    ]
)


def signature_of(fn: Callable[..., Any]) -> inspect.Signature:
    """The signature of a callable, annotations resolved where they can be; `(*args, **kwargs)` if none."""
    for resolve in (True, False):
        try:
            return _resolved(inspect.signature(fn, eval_str=resolve), fn)
        except (ValueError, TypeError):
            return _ANY
        except Exception:  # noqa: BLE001, S112 - whatever evaluating an annotation raises: it stays a string
            continue
    return _ANY


def _resolved(signature: inspect.Signature, fn: Any) -> inspect.Signature:
    """The signature with what is still a string looked up where the function under its wrappers was written."""
    names = getattr(inspect.unwrap(fn), "__globals__", {})

    def resolve(annotation: Any) -> Any:
        if isinstance(annotation, str):
            with contextlib.suppress(Exception):  # whatever evaluating it raises: it stays a string
                return eval(annotation, names)  # noqa: S307 - as `inspect` does
        return annotation

    parameters = [p.replace(annotation=resolve(p.annotation)) for p in signature.parameters.values()]
    return signature.replace(parameters=parameters, return_annotation=resolve(signature.return_annotation))


_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


class _Omitted:
    def __repr__(self) -> str:
        return "..."  # as it is shown in the signature of the binder


_OMITTED = _Omitted()


def compile_binder(
    signature: inspect.Signature, name: str
) -> tuple[Callable[..., tuple[tuple[Any, ...], dict[str, Any]]], tuple[str, ...]]:
    """A function with this very parameter list that returns `(positional, keywords)`, and the names of the positional.

    Python binds its calls: a wrong one raises Python's own `TypeError` under the function's name, in 1 us against the
    11 to 40 of `Signature.bind`. A default is left to the function itself. The last name is that of `*args`.
    """
    parameters = list(signature.parameters.values())
    namespace: dict[str, Any] = {"omitted": _OMITTED}
    declared: list[str] = []
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    others = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    only = sum(p.kind is p.POSITIONAL_ONLY for p in parameters)
    for index, p in enumerate(parameters):
        if p.kind is p.KEYWORD_ONLY and rest is None and "*" not in declared:
            declared.append("*")
        default = "" if p.default is p.empty else "=omitted"
        declared.append(_STARS.get(p.kind, "") + p.name + default)
        if index + 1 == only:
            declared.append("/")
    first = "".join(f"{n}, " for n in positional) + (f"*{rest}, " if rest else "")
    second = "".join(f"{n!r}: {n}, " for n in keywords) + (f"**{others}" if others else "")
    exec(f"def bind({', '.join(declared)}): return ({first}), {{{second}}}", namespace)  # noqa: S102 - of names alone
    bind = namespace["bind"]
    bind.__name__ = bind.__qualname__ = name
    names = (*positional, rest or "")
    return (functools.partial(_given, bind, names) if "=omitted" in "".join(declared) else bind), names


def _given(
    bind: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]], names: tuple[str, ...], *args: Any, **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What was given of a call: behind the first argument that was not, positional ones become keywords."""
    positional, keywords = bind(*args, **kwargs)
    if any(value is _OMITTED for value in keywords.values()):
        keywords = {name: value for name, value in keywords.items() if value is not _OMITTED}
    count = next((i for i, value in enumerate(positional) if value is _OMITTED), None)
    if count is None:
        return positional, keywords
    late = {n: v for n, v in zip(names[count:], positional[count:], strict=False) if v is not _OMITTED}
    return positional[:count], {**late, **keywords}


def translate_signature(signature: inspect.Signature, host: Side) -> inspect.Signature:
    """The signature with the guest's array type replaced by the host's, wherever it occurs."""
    old, new = (torch.Tensor, jax.Array) if host is JAX else (jax.Array, torch.Tensor)
    translate = functools.partial(_translate, old=old, new=new)
    parameters = [p.replace(annotation=translate(p.annotation)) for p in signature.parameters.values()]
    return signature.replace(parameters=parameters, return_annotation=translate(signature.return_annotation))


def _translate(annotation: Any, *, old: type, new: type) -> Any:
    if annotation is old:
        return new
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if not arguments or origin in (typing.Literal, Callable):
        return annotation
    translated = tuple(_translate(a, old=old, new=new) for a in arguments)
    if origin is types.UnionType or origin is typing.Union:
        return functools.reduce(lambda a, b: a | b, translated)
    if origin is typing.Annotated:
        return typing.Annotated[(translated[0], *annotation.__metadata__)]
    return annotation.copy_with(translated) if hasattr(annotation, "copy_with") else origin[translated]


def with_key(signature: inspect.Signature, name: str) -> inspect.Signature:
    """The signature with one more keyword, required."""
    parameters = list(signature.parameters.values())
    at = len(parameters) - any(p.kind is p.VAR_KEYWORD for p in parameters)
    parameters.insert(at, inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=jax.Array))
    return signature.replace(parameters=parameters)
