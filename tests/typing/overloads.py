"""Writes the overloads, all from one table: `python tests/typing/overloads.py --write`."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FILE = ROOT / "interop" / "_overloads.py"
CLASSES = ROOT / "interop" / "_module_in_torch.py"

# What has an exact type on the other side: A is an array, S[T] a structure whose twin is T. The first that fits counts.
SHAPES = [
    "None",
    "A",
    "A | None",
    "S[T]",
    "tuple[A, A]",
    "tuple[A, A, A]",
    "tuple[A, A, A, A]",
    "tuple[A, S[T]]",
    "tuple[A, tuple[A, A]]",
    "tuple[A, list[A]]",
    "tuple[A, dict[K, A]]",
    "tuple[dict[K, A], A]",
    "tuple[dict[K, A], dict[K2, A]]",
    "tuple[A, Plain]",
    "tuple[dict[K, A], Plain]",
    "tuple[A, ...]",
    "list[A]",
    "list[tuple[A, A]]",
    "list[list[A]]",
    "list[dict[K, A]]",
    "dict[K, A]",
    "dict[K, tuple[A, A]]",
    "dict[K, list[A]]",
    "dict[K, dict[K2, A]]",
    "Plain",
    "tuple[A, Any]",
    "list[Any]",
    "dict[K, Any]",
]
# Of a module or a model
FEW = ["A", "S[T]", "tuple[A, A]", "tuple[A, dict[K, A]]", "tuple[A, Plain]", "dict[K, A]", "tuple[A, Any]"]

SIDES = {"torch": ("Array", "SupportsTorch", "Tensor"), "jax": ("Tensor", "SupportsJax", "Array")}

HEADER = '''"""The overloads of the decorators and the conversions. Written by tests/typing/overloads.py: edit its table."""

# The first overload that fits counts, so that they overlap is meant.
# pyright: reportOverlappingOverload=false
# mypy: disable-error-code="overload-overlap"

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, overload

import jax
import numpy as np
import torch
from jax import Array
from torch import Tensor
from typing_extensions import Unpack

from interop._types import (
    ConstantJaxOptions,
    ConstantModuleOptions,
    Crossed,
    Function,
    HasForward,
    JaxDevice,
    JaxOptions,
    ModuleOptions,
    SupportsJax,
    SupportsTorch,
    TorchOptions,
    Untyped,
)

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
K = TypeVar("K")
K2 = TypeVar("K2")
Same = TypeVar("Same", bound=type | Tensor | torch.nn.Module)
Plain = TypeVar("Plain", bound=bool | int | float | complex | str | bytes | None)  # comes back as it is
'''


def sides(shape: str, host: str) -> tuple[str, str]:
    """The shape in the guest's types, and in the host's."""
    guest, supports, own = SIDES[host]
    found = re.sub(r"\bA\b", guest, shape).replace("S[T]", f"{supports}[T]")
    return found, re.sub(r"\bA\b", own, shape).replace("S[T]", "T")


def overload(parameters: str, result: str, name: str = "__call__") -> str:
    """One overload of a method."""
    return f"    @overload\n    def {name}({parameters}) -> {result}: ...\n"


def of_functions(host: str, options: str) -> Iterator[str]:
    """A function by the type of its result."""
    if host == "torch":
        yield overload(f"self, fn: jax.stages.Wrapped, /, {options}", "Crossed[..., Any]")
    rows = [("Untyped", "Any"), *(sides(shape, host) for shape in SHAPES), ("Any", "Any")]
    for guest, own in rows:
        yield overload(f"self, fn: Function[P, {guest}], /, {options}", f"Crossed[P, {own}]")


def of_modules(parameters: str, result: str, *, params: str = "Mapping[str, Array]", out: str = "OUT") -> Iterator[str]:
    """A torch module by the type of the result of its `forward`: IN as it is, OUT across, CALL the crossing."""
    call = f"Crossed[Concatenate[{params}, P], {out}]"
    rows = [("Untyped", "Any"), *(sides(shape, "jax") for shape in FEW), ("Any", "Any")]
    for guest, own in rows:
        yield overload(parameters.replace("IN", guest), result.replace("CALL", call).replace("OUT", own))


def of_values(host: str, options: str) -> Iterator[str]:
    """A value by its type."""
    for shape in SHAPES:
        guest, own = sides(shape, host)
        yield overload(f"self, x: {guest}, /, {options}", own)


def exact(options: str) -> Iterator[str]:
    """A function whose signature is given, now or by the decorator that this makes."""
    yield overload(f"self, fn: Function[..., Any], /, *, signature: Callable[P, R], {options}", "Callable[P, R]")
    yield overload(f"self, *, signature: Callable[P, R], {options}", "Callable[[Function[..., Any]], Callable[P, R]]")


# --- the file ---------------------------------------------------------------------------------------------------------

TORCH = "**options: Unpack[TorchOptions]"
JAX, MODULE = "**options: Unpack[ConstantJaxOptions]", "**options: Unpack[ConstantModuleOptions]"
MUTABLE_JAX = "*, mutable: Literal[True], **options: Unpack[JaxOptions]"
MUTABLE_MODULE = "*, mutable: Literal[True], **options: Unpack[ModuleOptions]"
MAYBE_JAX, MAYBE_MODULE = (o.replace("Literal[True]", "bool") for o in (MUTABLE_JAX, MUTABLE_MODULE))
COPY = "*, copy: bool = ..."
BUFFERS = "tuple[OUT, dict[str, Array]]"
BY_NAME, BY_POSITION = "tuple[CALL, dict[str, Array]]", "tuple[CALL, tuple[Array, ...]]"
ANY_MODULE = f"Callable[[Callable[..., Any]], Crossed[..., {BUFFERS.replace('OUT', 'Any')}]]"


def as_torch() -> Iterator[str]:
    yield from exact(TORCH)
    yield from of_functions("torch", TORCH)
    yield overload(f"self, {TORCH}", "AsTorch")


def as_jax() -> Iterator[str]:
    yield from exact("mutable: bool = ..., **options: Unpack[JaxOptions]")
    yield from of_modules(f"self, fn: HasForward[P, IN], /, {MUTABLE_JAX}", "CALL", out=BUFFERS)
    yield from of_modules(f"self, fn: HasForward[P, IN], /, {JAX}", "CALL")
    yield from of_functions("jax", JAX)
    yield overload(f"self, {MUTABLE_JAX}", ANY_MODULE)
    yield overload(f"self, {JAX}", "AsJax")
    yield overload(f"self, fn: Function[..., Any], /, {MAYBE_JAX}", "Crossed[..., Any]")


def jax_to_torch() -> Iterator[str]:
    yield overload(f"self, x: JaxDevice, /, {COPY}", "torch.device")
    yield overload(f"self, x: np.dtype[Any], /, {COPY}", "torch.dtype")
    yield overload(f"self, x: Same, /, {COPY}", "Same")
    yield from of_values("torch", COPY)
    yield from of_functions("torch", COPY)
    yield overload(f"self, x: Any, /, {COPY}", "Any")


def torch_to_jax() -> Iterator[str]:
    yield overload(f"self, x: torch.device, /, {COPY}", "JaxDevice")
    yield overload(f"self, x: torch.dtype, /, {COPY}", "np.dtype[Any]")
    yield from of_values("jax", COPY)
    yield from of_modules(f"self, x: HasForward[P, IN], /, {COPY}", BY_NAME)
    yield from of_functions("jax", COPY)
    yield overload(f"self, x: Any, /, {COPY}", "Any")


def make_functional() -> Iterator[str]:
    yield from of_modules(f"self, module: HasForward[P, IN], /, {MUTABLE_MODULE}", BY_NAME, out=BUFFERS)
    yield from of_modules(f"self, module: HasForward[P, IN], /, {MODULE}", BY_NAME)
    yield overload(f"self, module: torch.nn.Module, /, {MAYBE_MODULE}", BY_NAME.replace("CALL", "Crossed[..., Any]"))


def torch_module_to_jax() -> Iterator[str]:
    parameters = "self, model: HasForward[P, IN], example_output: Any = ..."
    yield from of_modules(parameters, BY_POSITION, params="Sequence[Array]")


FUNCTIONS = (as_torch, as_jax, jax_to_torch, torch_to_jax, make_functional, torch_module_to_jax)


def protocol(function: Callable[[], Iterator[str]]) -> str:
    """The type of one function."""
    name = function.__name__.title().replace("_", "")
    return f'\n\nclass {name}(Protocol):\n    """What `{function.__name__}` is."""\n\n' + "".join(function())


def of_wrapper(name: str) -> str:
    """The `__init__` of a torch module that is made of a JAX function, with or without a state, or of a model."""
    callables = [
        ("OfParams[Q, IN], jax_params: Any", ["A", "S[T]", "tuple[A, A]", "tuple[A, dict[K, A]]", "tuple[A, Any]"]),
        ("OfParamsAndState[Q, tuple[IN, Any]], jax_params: Any, *, state: Any", ["A", "tuple[A, Any]"]),
        ("Callable[Q, IN]", ["A", "tuple[A, Any]"]),
    ]
    rows = ""
    for parameters, shapes in callables:
        for guest, own in [("Untyped", "Any"), *(sides(shape, "torch") for shape in shapes)]:
            rest = f"jax_function: {parameters.replace('IN', guest)}, **options: Unpack[WrapperOptions]"
            rows += overload(f"self: {name}[Q, {own}], {rest}", "None", "__init__")
    flags = "has_aux: bool = ..., clone_params: bool = ..."
    rest = f"jax_function: Any, jax_params: Any = ..., {flags}, *, state: Any = ..., rngs: Names = ..."
    return rows + overload(f"self: {name}[..., Any], {rest}", "None", "__init__")


def with_wrappers(text: str) -> str:
    """The file of the wrappers with their overloads in it."""
    first, *parts = re.split(rf"{MARKS[0]}.*?{MARKS[1]}", text, flags=re.DOTALL)
    names = ("WrappedJaxFunction", "WrappedJaxScalarFunction")
    rows = (f"{MARKS[0]}{of_wrapper(name)}{MARKS[1]}{part}" for name, part in zip(names, parts, strict=True))
    return first + "".join(rows)


MARKS = "    # The overloads are written by tests/typing/overloads.py\n", "    # end of the overloads\n"


def formatted(text: str) -> str:
    """As ruff formats it."""
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(FILE), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def written() -> dict[Path, str]:
    """What the files are to be."""
    file = HEADER + "".join(protocol(function) for function in FUNCTIONS)
    return {FILE: formatted(file), CLASSES: formatted(with_wrappers(CLASSES.read_text()))}


if __name__ == "__main__":
    for path, text in written().items():
        print("same" if path.exists() and path.read_text() == text else "other", path.name)
        if "--write" in sys.argv:
            path.write_text(text)
