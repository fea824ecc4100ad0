"""The four decorators."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

from interop._crossing import refine
from interop._errors import OptionError
from interop._private import torch as torch_private
from interop._side import JAX, TORCH
from interop._types import Function, typed

if TYPE_CHECKING:
    from interop._overloads import AsJax, AsTorch

F = TypeVar("F", bound="Function[..., Any]")


class _Keep(Protocol):
    """A decorator that does not change the type of what it decorates."""

    def __call__(self, fn: F, /) -> F: ...


@typed(lambda: AsTorch)
@torch_private.never_traced
def as_torch(
    fn: Any = None,
    /,
    *,
    static_argnames: str | Collection[str] = (),
    jit: bool = True,
    signature: Callable[..., Any] | None = None,
) -> Any:
    """A JAX function as a function of torch.

    It takes and returns tensors, wherever JAX has arrays: alone, or in tuples, lists, dicts, dataclasses, named tuples
    and every container registered with either framework. It is compiled by `jax.jit`, once for each combination of
    shapes, dtypes and static arguments, and composes with `torch.func.vmap`. Stack `differentiable` for derivatives
    and `jittable` for `torch.compile`, in any order.

    What crosses: a dense, 64-byte aligned CPU tensor is shared with JAX for the length of the call, any other layout is
    copied; results are handed over without a copy and belong to the caller. Dtypes are kept. While `jax_enable_x64` is
    off, a call with a 64-bit float runs under a scoped `jax.enable_x64` in forward and backward (constants that the
    function makes are then 64-bit too), and 64-bit integers are range-checked and cross as 32-bit.

    Python numbers are traced, weakly typed; they become static by themselves when the trace needs their value. `str`,
    `bool`, `None` and other hashable objects are static. What the function reads from a closure, or from `self`, is
    read when it is traced. A key of `jax.random` passes through, on its own or in a container; a seed may be a tensor.

    The modes of torch do not reach into JAX: under `torch.autocast` the function computes in the dtypes it is given, a
    default dtype or device does not concern it, and torch's generator is left alone.

    Args:
        fn: a function of arrays, or anything callable; without it, the decorator with these options.
        static_argnames: arguments that are static whatever they are.
        jit: False for a function that can't be traced (it looks at values, calls numpy): it runs as it is, operation by
            operation, on copies of its arguments, and its results are copied. With `differentiable` it may do what JAX
            allows on values that are being differentiated: compare them, but not make a Python number of one.
        signature: a stub whose signature is shown, and checked statically, instead of the translated one.

    Returns:
        The crossing: it looks like `fn`, with tensors in its signature.

    Raises:
        LeafError: an argument or a result can't cross (sparse, quantised, an unknown subclass, a dtype without
        counterpart). ContainerError: an argument hides a tensor in an object that can't be opened.
        NarrowingError: a 64-bit integer does not fit into 32 bits while x64 is off.
        NotDifferentiableError: a tensor that requires grad, without `differentiable`.
        NotJittableError: a trace by torch, without `jittable`.
    """
    options = {"host": TORCH, "static_argnames": _names(static_argnames), "jit": jit, "signature": signature}
    return _decorate(fn, options)


@typed(lambda: AsJax)
@torch_private.never_traced
def as_jax(
    fn: Any = None,
    /,
    *,
    static_argnames: str | Collection[str] = (),
    rng: str | None = None,
    vmap: str = "auto",
    mutable: bool = False,
    signature: Callable[..., Any] | None = None,
) -> Any:
    """A torch function as a function of JAX.

    It takes and returns arrays, wherever torch has tensors, in the same containers as `as_torch`. Real torch runs,
    eagerly on the caller's thread, or as a callback of a compiled program. It composes with `jax.vmap`. Stack
    `differentiable` for derivatives and `jittable` for `jax.jit` and its kin, in any order.

    What crosses: the function works on its own copy of its arguments, so that it may write to them, and its results are
    copied, since it may return what it keeps. Dtypes are kept; while `jax_enable_x64` is off, an `int64` result
    is range-checked and comes as `int32`, and a `float64` result raises.

    Python numbers are given as they are. A tensor among the arguments passes through, copied.

    A function that draws random numbers from torch's generator does so at each call; in a compiled program it is an
    effect, which is never merged with its twin, and never left out. The backward sees the numbers of the forward.
    JAX admits no such effect in `checkpoint` and in rules of `custom_vjp` and `custom_jvp`: use `rng`.

    A module is a function of its parameters: `as_jax(module)(params, *args)`, with `params` a mapping by name, and
    buffers in it if they are given. The module itself is never touched. Whether it trains is read at each trace, with
    the modes of torch; what a function reads from a closure is read at the latest when its gradient is traced.

    Args:
        fn: a function of tensors, or anything callable; without it, the decorator with these options.
        static_argnames: arguments that are static whatever they are.
        rng: the name of a keyword that the crossing then takes, a key of JAX (typed, or its data). torch's generator,
            and any other that the function draws from, is seeded from it around the call, and put back: the function is
            pure, and draws the same in forward and backward, eagerly and compiled. Over a batch, each example draws as
            it would alone.
        vmap: "auto" batches by `torch.func.vmap`, and by a loop where torch has no rule; "sequential" always loops.
        mutable: of a module: it returns `(out, buffers)`, with all its buffers by name as it left them. It starts from
            those in the mapping of parameters, else from its own, which are never written to.
        signature: a stub whose signature is shown, and checked statically, instead of the translated one.

    Returns:
        The crossing: it looks like `fn`, with arrays in its signature.

    Raises:
        LeafError: an argument or a result can't cross.
        PrecisionError: the function returned a 64-bit float while x64 is off.
        ContainerError: an argument hides an array in an object that can't be opened.
        NotDifferentiableError: a derivative, without `differentiable`.
        NotJittableError: a compiled program, without `jittable`.
        UnsupportedError: a module would update its buffers, without `mutable`; random numbers where each run of a
            function has to draw the same.
        AbstractEvalError: under a trace, the output shapes can't be inferred: declare `example_output`.
    """
    if vmap not in ("auto", "sequential"):
        raise OptionError(f"vmap={vmap!r}", expected="'auto' or 'sequential'")
    options = {
        "host": JAX,
        "static_argnames": _names(static_argnames),
        "rng": rng,
        "vmap": vmap,
        "mutable": mutable,
        "signature": signature,
    }
    return _decorate(fn, options)


@overload
def differentiable(fn: F, /) -> F: ...
@overload
def differentiable(*, nondiff_argnames: str | Collection[str] = ...) -> _Keep: ...
@torch_private.never_traced
def differentiable(fn: Any = None, /, *, nondiff_argnames: str | Collection[str] = ()) -> Any:
    """Derivatives cross: the gradient of the crossing is the gradient of the function, at every order.

    In torch: `backward`, double backward, `torch.func.*`, forward-mode AD. In JAX: `grad`, `jvp`, `hessian`,
    `linearize`. Gradients come in the dtype of their input, and for complex values in the host's convention (torch's
    is the conjugate of JAX's). Integer and bool leaves beside float ones have no gradient.

    In torch, what the backward needs is kept as torch keeps it: an input or an output that is written to in between
    raises torch's own error, one that is not needed may be. An input that the function does not use has no gradient
    (None), an output without a derivative requires none. Cheap values are computed again rather than kept. Higher
    orders are derived from the function itself, but its effects (a print, a callback) happen once a call.

    Args:
        fn: a crossing, or a function that a later `as_torch` or `as_jax` will cross.
        nondiff_argnames: arguments of which no derivative is taken; asking for one raises.

    Raises:
        NotDifferentiableError: at the call, a derivative in an argument of `nondiff_argnames`.
    """
    return _decorate(fn, {"differentiable": True, "nondiff_argnames": _names(nondiff_argnames)})


@overload
def jittable(fn: F, /) -> F: ...
@overload
def jittable(*, example_output: Any) -> _Keep: ...
@torch_private.never_traced
def jittable(fn: Any = None, /, *, example_output: Any = None) -> Any:
    """The crossing may be traced: by `torch.compile` and its kin, or by `jax.jit` and its kin.

    Output shapes are inferred. A torch function that branches on values is followed on every branch, up to 64 ways, and
    all that do not raise have to agree. For a function whose shapes can't be inferred (a torch function in which they
    depend on values, or that computes with `.item()`; a JAX function with `jit=False`), `example_output` says them; a
    result that disagrees raises.

    In torch: `torch.compile` with any backend, fullgraph, `make_fx`, fake and meta tensors. Sizes that torch keeps open
    stay open where JAX can infer the shapes from them; else they are fixed, and guarded by torch. A graph keeps the
    width, 32 or 64 bits, that JAX had when it was traced. What `torch.export` writes names the function by its module
    and qualified name, and runs where that module can be imported; a lambda or a closure is refused. `torch.jit` is
    refused.

    In JAX: `jit`, loops, branches, `checkpoint`, `shard_map`, `pmap`. A call runs the function again at each execution,
    in the modes of torch that it was traced in. A gradient does not: forward and backward are captured as graphs when
    they are traced, with the residuals between them; where a function can't be captured (it branches on values, or
    calls numpy), its gradient runs it again, which the logger `interop` says at debug level. `jax.export` is refused.

    Args:
        fn: a crossing, or a function that a later `as_torch` or `as_jax` will cross.
        example_output: a pytree of arrays, tensors or `jax.ShapeDtypeStruct`s, of which only shape and dtype are read,
            or a function from the inputs' `ShapeDtypeStruct`s to one.

    Raises:
        OutputMismatchError: at the call, a result that is not what `example_output` says.
    """
    return _decorate(fn, {"jittable": True, "example_output": example_output})


def _decorate(fn: Any, options: dict[str, Any]) -> Any:
    """Bare or with options."""
    if fn is None:
        return lambda function: refine(function, **options)
    return refine(fn, **options)


def _names(names: str | Collection[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
