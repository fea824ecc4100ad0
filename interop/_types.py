"""The types of a crossing: what stays of a function's type, and what a structure says of its twin."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Concatenate, Literal, Protocol, TypeAlias, TypedDict, TypeVar, overload

from typing_extensions import ParamSpec

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
T_co = TypeVar("T_co", covariant=True)
D = TypeVar("D")


class Crossed(Protocol[P, R_co]):
    """A crossed function: the guest's parameters, taking the host's values; the result in the host's types.

    No type of Python says "these parameters, with tensors for arrays": what an editor shows is the function's own
    parameters, and any argument is accepted. With `signature=` the arguments are checked.
    """

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    @overload
    def __call__(self, *args: Any, **kwargs: Any) -> R_co: ...


class SupportsTorch(Protocol[T_co]):
    """A structure of arrays that says what it is with tensors in their place: for type checkers alone.

        A = TypeVar("A", Array, Tensor)

        @dataclass
        class State(Generic[A]):
            x: A
            v: A

            def __interop_torch__(self) -> "State[Tensor]":
                raise NotImplementedError

            def __interop_jax__(self) -> "State[Array]":
                raise NotImplementedError

        @as_torch
        def step(s: State[Array]) -> State[Array]:
            return State(s.x + s.v, s.v)

    A checker then knows `step(s)` as a `State[Tensor]`. Neither method is ever called. Without them the structure
    crosses all the same, and the result is `Any` to a checker.
    """

    def __interop_torch__(self) -> T_co:
        """Only its annotation is read."""
        ...


class SupportsJax(Protocol[T_co]):
    """A structure of tensors that says what it is with arrays in their place. Mirror of `SupportsTorch`."""

    def __interop_jax__(self) -> T_co:
        """Only its annotation is read."""
        ...


# --- what the overloads are written in --------------------------------------------------------------------------------

Function: TypeAlias = "Callable[P, R] | classmethod[Any, P, R]"  # what is decorated; a classmethod is not callable
OfParams: TypeAlias = Callable[Concatenate[Any, P], R]
OfParamsAndState: TypeAlias = Callable[Concatenate[Any, Any, P], R]
Names: TypeAlias = str | Collection[str]


class HasForward(Protocol[P, R_co]):
    """A torch module: its `__call__` takes anything, its `forward` says what."""

    @property
    def forward(self) -> Callable[P, R_co]: ...


class JaxDevice(Protocol):
    """A `jax.Device`, which is a name that JAX binds when it runs, and no type to a checker."""

    @property
    def platform(self) -> str: ...
    @property
    def device_kind(self) -> str: ...


class Untyped:
    """What only a result matches that has no type: of an unannotated function, whose crossing has none either."""


class TorchOptions(TypedDict, total=False):
    """The options of `as_torch`."""

    static_argnames: Names
    jit: bool


class JaxOptions(TypedDict, total=False):
    """The options of `as_jax`, but for `mutable`."""

    static_argnames: Names
    rng: str | None
    vmap: str


class ModuleOptions(TypedDict, total=False):
    """The options of `make_functional`, but for `mutable`."""

    rng: str | None
    example_output: Any


class ConstantJaxOptions(JaxOptions, total=False):
    """Those of a function, or of a module whose buffers are constants."""

    mutable: Literal[False]


class ConstantModuleOptions(ModuleOptions, total=False):
    """Those of a module whose buffers are constants."""

    mutable: Literal[False]


class WrapperOptions(TypedDict, total=False):
    """The options of `WrappedJaxFunction`."""

    has_aux: bool
    clone_params: bool
    rngs: Names


def typed(declared: Callable[[], type[D]]) -> Callable[[Any], D]:
    """The function itself, of the declared type: its overloads stand in a file that only type checkers load."""
    del declared
    return lambda function: function
