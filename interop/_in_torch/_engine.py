"""The engine: a flat JAX function as a torch operation. Mirror of `_in_jax`.

Two entries over one `JaxFlat`. A call on plain tensors runs the jitted function directly, and under autograd a jitted
forward that also returns its residuals (`_Eager`). Everything else goes through one dispatcher op, `interop::jax_call`,
which knows what it is under fake tensors and tracers (`_Traced`), and below `torch.func` and forward AD
(`_Transformed`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import torch

from interop._abstract import Aval
from interop._derive import Static, fill
from interop._errors import InteropError, NotDifferentiableError, NotJittableError
from interop._in_torch._flat import FLATS, JaxFlat, Plan
from interop._leaf import (
    NESTING,
    NUMPY_READS,
    PLAIN,
    TORCH_OF,
    WIDE_FLOATS,
    argument_of,
    describe,
    export,
    jax_dtype,
    refuse_nested,
    too_large,
    x64_enabled,
)
from interop._private import torch as torch_private
from interop._side import Leaf, Leaves

_Result: TypeAlias = "tuple[Sequence[torch.Tensor], Any]"
_SYMBOLS = frozenset({torch.SymInt, torch.SymFloat})  # numbers that a trace of torch keeps open
_NUMBERS = frozenset({int, float, complex}) | _SYMBOLS
_functorch_active, _dispatch_modes = torch_private.functorch_active, torch_private.dispatch_modes
_forward_ad = torch.autograd.forward_ad
_config: Any = jax.config


# --- call -------------------------------------------------------------------------------------------------------------


def call(flat: JaxFlat, leaves: Sequence[Leaf]) -> _Result:
    """Call the function on tensors and Python numbers; returns `(tensors, structure)`."""
    if NESTING.foreign:
        refuse_nested()
    if x64_enabled():
        flat = flat.wide()
    if _functorch_active() or _forward_ad._current_level >= 0:
        return _call_op(flat, leaves, _Transformed)
    if _dispatch_modes():
        return _call_op(flat, leaves, _Traced)
    arrays = views_of(leaves)
    if arrays is None:
        return _call_carefully(flat, leaves)
    outs, structure = evaluate(flat, arrays)
    return [export(out) for out in outs], structure.value


def views_of(leaves: Sequence[Leaf]) -> list[Any] | None:
    """The leaves as `jax.jit` takes them fastest; None if one needs more care.

    Numbers as they are, tensors as numpy views: 1 us, against 4 us through DLPack. What a view can't express, torch
    refuses.
    """
    views: list[Any] = []
    try:
        for leaf in leaves:
            kind = type(leaf)
            if kind in PLAIN:
                if leaf.dtype not in NUMPY_READS or leaf.requires_grad:
                    return None
                views.append(leaf.numpy())
            elif kind in _NUMBERS and kind not in _SYMBOLS:
                views.append(leaf)
            else:
                return None
    except (TypeError, RuntimeError):
        return None
    return views


def _call_carefully(flat: JaxFlat, leaves: Sequence[Leaf]) -> _Result:
    """A call with a leaf that is differentiated, 64-bit, of an unusual layout, or refused."""
    tensors = [leaf for leaf in leaves if type(leaf) not in _NUMBERS]
    if any(torch_private.is_fake(t) for t in tensors) or any(type(leaf) in _SYMBOLS for leaf in leaves):
        return _call_op(flat, leaves, _Traced)
    if any(t.dtype in WIDE_FLOATS for t in tensors):
        flat = flat.wide()
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        outs, structure = evaluate(flat, arrays_of(leaves, x64=flat.x64))
        return [export(out) for out in outs], structure.value
    check_differentiable(flat, [type(x) not in _NUMBERS and x.requires_grad for x in leaves])
    if torch_private.saved_tensors_are_watched():
        return _call_op(flat, leaves, _Traced)
    *outs, structure = _Eager.apply(flat, *leaves)
    return outs, structure


def evaluate(flat: JaxFlat, arrays: Sequence[Any]) -> tuple[Leaves, Static]:
    """The jitted function in its own width, whatever this thread has set. Its outputs never alias its inputs."""
    if flat.x64 != x64_enabled():
        with jax.enable_x64(flat.x64):
            return evaluate(flat, arrays)
    if _config.jax_disable_jit:  # residuals are told apart in a trace: there has to be one
        with jax.disable_jit(False):
            return evaluate(flat, arrays)
    try:
        return flat.jitted(*arrays)
    except jax.errors.JaxRuntimeError as error:
        if "Disallowed host-to-device transfer" not in str(error):
            raise
    with jax.transfer_guard_host_to_device("allow"):  # a crossing is meant; that it goes through numpy is our affair
        return flat.jitted(*arrays)


def arrays_of(leaves: Sequence[Leaf], *, x64: bool) -> list[Any]:
    """The leaves as arguments of the jitted function, for the length of this call; raises for one that can't cross."""
    arrays: list[Any] = []
    for index, leaf in enumerate(leaves):
        try:
            arrays.append(leaf if type(leaf) in _NUMBERS else argument_of(leaf, x64=x64))
        except InteropError as error:
            raise error.at(index)  # noqa: B904 - the same error, located
    return arrays


def check_differentiable(flat: JaxFlat, wanted: Sequence[bool]) -> None:
    """Raise where a derivative is asked that was not declared, naming the first leaf that asks."""
    for index, (asked, refused) in enumerate(
        zip(wanted, itertools.chain(flat.nondiff, itertools.repeat(False)), strict=False)
    ):
        if asked and not flat.levels.differentiable:
            raise NotDifferentiableError(
                "a tensor that requires grad into a function that is not differentiable",
                hint="Stack @differentiable, or pass x.detach()",
            ).at(index)
        if asked and refused:
            raise NotDifferentiableError(
                "a tensor that requires grad for an argument named in nondiff_argnames", hint="Pass x.detach()"
            ).at(index)


# --- eager ------------------------------------------------------------------------------------------------------------


class _Eager(torch.autograd.Function):
    """Plain tensors under autograd: one jitted forward with residuals, one jitted backward from them."""

    @staticmethod
    def forward(ctx: Any, flat: JaxFlat, *xs: Leaf) -> tuple[Any, ...]:
        arrays = arrays_of(xs, x64=flat.x64)
        full, static = evaluate(flat.residual(ctx.needs_input_grad[1:]), arrays)
        plan: Plan = static.value
        outs = [export(out) for out in full[: plan.count]]
        ctx.set_materialize_grads(False)
        ctx.flat, ctx.plan, ctx.xs = flat, plan, xs
        if not plan.smooth:
            ctx.mark_non_differentiable(*[out for out, inexact in zip(outs, plan.inexact, strict=True) if not inexact])
        # New residuals stay arrays that nobody else sees; what is the user's input or output goes to torch to be
        # guarded.
        ctx.arrays, of = full[plan.count :], {"input": xs, "output": outs}
        ctx.save_for_backward(*[of[origin][i] for origin, i in plan.saved if origin != "residual"])
        ctx.versions = [_version(x) for x in xs]
        return *outs, plan.structure.value

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        present = tuple([c is not None for c in cotangents[:-1]])
        need = ctx.needs_input_grad[1:]
        if not any(present):
            return (None,) * (len(need) + 1)
        given = [c for c in cotangents if c is not None]
        saved = _saved_leaves(ctx)
        if torch.is_grad_enabled():  # create_graph: from the original function and its primals, so any order works
            grads, _ = call(ctx.flat.vjp(need, present), [*_primals(ctx), *given])
        else:
            grads, _ = _call_backward(ctx.plan.backward(need, present), saved, given)
        if not torch_private.keeps_graph():
            ctx.arrays = ctx.xs = None
        return None, *fill((None,) * len(need), need, tuple(grads))


def _version(x: Leaf) -> int:
    return 0 if type(x) in _NUMBERS or x.is_inference() else x._version


def _saved_leaves(ctx: Any) -> list[Any]:
    """The residuals in the order of the plan: tensors from torch (which checks their versions), and arrays of ours."""
    guarded = iter(ctx.saved_tensors)
    if ctx.xs is None:
        raise RuntimeError(
            "Trying to backward through the graph a second time: its residuals have been freed. Specify "
            "retain_graph=True if you need to backward through the graph a second time."
        )
    return [ctx.arrays[i] if origin == "residual" else next(guarded) for origin, i in ctx.plan.saved]


def _primals(ctx: Any) -> Leaves:
    """The inputs of the forward; raises as torch does if one was changed in place since."""
    for x, version in zip(ctx.xs, ctx.versions, strict=True):
        if _version(x) != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{describe(x)} is at version {x._version}; expected version {version} instead."
            )
    return tuple(ctx.xs)


def _call_backward(backward: JaxFlat, saved: list[Any], cotangents: list[torch.Tensor]) -> _Result:
    """The jitted backward; through the op where a cotangent is not a plain value (a batch of them, say)."""
    if _functorch_active() or _dispatch_modes():
        return call(backward, [*map(_as_tensor, saved), *cotangents])
    if any(map(torch_private.is_legacy_batched, cotangents)):
        return jax_call([*map(_as_tensor, saved), *cotangents], backward.number), None
    x64 = backward.x64
    arrays = [x if isinstance(x, jax.Array) else argument_of(x, x64=x64) for x in (*saved, *cotangents)]
    outs, _ = evaluate(backward, arrays)
    return [export(out) for out in outs], None


def _as_tensor(x: Any) -> torch.Tensor:
    return export(x) if isinstance(x, jax.Array) else x


# --- the op -----------------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("interop", "FRAGMENT")


def _op(xs: list[torch.Tensor], flat: int) -> list[torch.Tensor]:
    """The op on real tensors."""
    return [export(out) for out in evaluate(FLATS[flat], arrays_of(xs, x64=FLATS[flat].x64))[0]]


def _op_fake(xs: list[torch.Tensor], flat: int) -> list[torch.Tensor]:
    """The op on tensors without values: shapes and dtypes from tracing the JAX function."""
    function = FLATS[flat]
    if not function.levels.jittable:
        raise NotJittableError("traced by torch", hint="Stack @jittable")
    device = xs[0].device if xs else torch.device("cpu")
    outs = function.outputs(_avals(function, xs)).avals
    return [torch.empty(out.shape, dtype=TORCH_OF[out.dtype], device=device) for out in outs]


def _op_vmap(_info: Any, in_dims: tuple[Any, ...], xs: list[torch.Tensor], flat: int) -> tuple[list[torch.Tensor], Any]:
    """The op over a batch, for a graph that holds it and is itself mapped."""
    dims = tuple(in_dims[0]) if isinstance(in_dims[0], list | tuple) else (in_dims[0],) * len(xs)
    outs = jax_call(xs, FLATS[flat].vmap(dims).number)
    return outs, [0] * len(outs)


def _op_legacy_batched(xs: list[torch.Tensor], flat: int) -> list[torch.Tensor]:
    """The op over a batch of the older vmap, that of `is_grads_batched`: one level."""
    batched = [torch_private.is_legacy_batched(x) for x in xs]
    plain = [torch_private.unbatch(x) if b else x for x, b in zip(xs, batched, strict=True)]
    outs = jax_call(plain, FLATS[flat].vmap(tuple(0 if b else None for b in batched)).number)
    return [torch_private.batch(out) for out in outs]


if not hasattr(torch.ops.interop, "jax_call"):  # a reload of the module finds it registered
    _LIBRARY.define("jax_call(Tensor[] xs, int flat) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl("jax_call", _op, "CompositeExplicitAutograd")
    torch.library.register_fake("interop::jax_call", _op_fake, lib=_LIBRARY)
    _LIBRARY.impl("jax_call", _op_legacy_batched, "Batched")
    torch.library.register_vmap("interop::jax_call", _op_vmap, lib=_LIBRARY)
jax_call = torch.ops.interop.jax_call.default


def _avals(flat: JaxFlat, xs: Sequence[torch.Tensor]) -> tuple[Aval, ...]:
    """The avals in which JAX sees these tensors. A symbolic size is specialised."""
    return tuple(Aval(tuple(map(int, x.shape)), jax_dtype(x.dtype, x64=flat.x64)) for x in xs)


def _call_op(flat: JaxFlat, leaves: Sequence[Leaf], function: Any) -> _Result:
    """Call through the op: numbers become tensors, and the structure is found without values."""
    is_number = tuple(type(leaf) in _NUMBERS for leaf in leaves)
    if any(leaf.dtype in WIDE_FLOATS for leaf in leaves if type(leaf) not in _NUMBERS):
        flat = flat.wide()
    fake = next((leaf for leaf in leaves if torch_private.is_fake(leaf)), None)
    tensors = [_lift(x, fake, x64=flat.x64) if number else x for x, number in zip(leaves, is_number, strict=True)]
    flat = flat.lifted(is_number)
    outs = function.apply(flat, *tensors)
    return list(outs), flat.outputs(_avals(flat, tensors)).structure.value


def _lift(number: Any, fake: Any, *, x64: bool) -> Any:
    """A number as a 0-d tensor of the dtype that JAX would give it; fake beside fakes."""
    kind: Any = type(number)
    wide = _WIDTHS[kind]
    # What a symbol stands for is known when the graph runs: it goes whole, to be checked there as any tensor is.
    dtype = wide if kind is torch.SymInt else TORCH_OF[jax_dtype(wide, x64=x64)]
    try:
        if fake is not None:
            return fake.new_full((), number, dtype=dtype, device="cpu")
        return torch.scalar_tensor(number, dtype=dtype)
    except (RuntimeError, OverflowError):
        raise too_large(int(complex(number).real)) from None


_WIDTHS: dict[Any, torch.dtype] = {
    int: torch.int64,
    float: torch.float64,
    complex: torch.complex128,
    torch.SymInt: torch.int64,
    torch.SymFloat: torch.float64,
}


class _Traced(torch.autograd.Function):
    """Tensors without values, or whose saved tensors are watched: forward with residuals and backward, both as ops."""

    @staticmethod
    def forward(ctx: Any, flat: JaxFlat, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        active = ctx.needs_input_grad[1:]
        check_differentiable(flat, active)
        ctx.set_materialize_grads(False)
        ctx.flat, ctx.count = flat, len(xs)
        if not any(active):
            return tuple(jax_call(list(xs), flat.number))
        forward = flat.residual(active)
        full = jax_call(list(xs), forward.number)
        plan: Plan = forward.outputs(_avals(flat, xs)).structure.value
        outs = full[: plan.count]
        ctx.plan = plan
        ctx.mark_non_differentiable(*[out for out, inexact in zip(outs, plan.inexact, strict=True) if not inexact])
        of = {"input": xs, "output": outs, "residual": full[plan.count :]}
        ctx.save_for_backward(*xs, *(of[origin][i] for origin, i in plan.saved))
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        present = tuple(c is not None for c in cotangents)
        need = ctx.needs_input_grad[1:]
        if not any(present):
            return (None,) * (len(need) + 1)
        kept = ctx.saved_tensors  # unpacked once: checkpoint allows no more
        primals, saved = kept[: ctx.count], kept[ctx.count :]
        given = [c for c in cotangents if c is not None]
        if torch.is_grad_enabled():
            grads, _ = call(ctx.flat.vjp(need, present), [*primals, *given])
        else:
            grads, _ = call(ctx.plan.backward(need, present), [*saved, *given])
        return None, *fill((None,) * len(need), need, tuple(grads))


class _Transformed(torch.autograd.Function):
    """Below `torch.func` and forward AD: torch peels one transform at a time and asks for the derived function."""

    @staticmethod
    def forward(flat: JaxFlat, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(jax_call(list(xs), flat.number))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        flat, *xs = inputs
        check_differentiable(flat, ctx.needs_input_grad[1:])
        ctx.flat = flat
        ctx.inexact = tuple(out.is_floating_point() or out.is_complex() for out in output)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[out for out, inexact in zip(output, ctx.inexact, strict=True) if not inexact])
        ctx.save_for_backward(*xs)
        ctx.save_for_forward(*xs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        present = tuple(c is not None for c in cotangents)
        need = ctx.needs_input_grad[1:]
        if not any(present):
            return (None,) * (len(need) + 1)
        grads, _ = call(ctx.flat.vjp(need, present), [*ctx.saved_tensors, *(c for c in cotangents if c is not None)])
        return None, *fill((None,) * len(need), need, tuple(grads))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        tangents = tangents[1:]  # the first would be that of the flat function
        nonzero = tuple(t is not None for t in tangents)
        check_differentiable(ctx.flat, nonzero)
        outs, _ = call(ctx.flat.jvp(nonzero), [*ctx.saved_tensors, *(t for t in tangents if t is not None)])
        return fill((None,) * len(ctx.inexact), ctx.inexact, tuple(outs))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:  # noqa: ARG004 - torch's name for it
        flat, *xs = inputs
        outs = _Transformed.apply(flat.vmap(tuple(in_dims[1:])), *xs)
        return outs, (0,) * len(outs)
