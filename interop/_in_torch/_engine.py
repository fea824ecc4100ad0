"""The engine: a flat JAX function as a torch operation. Mirror of `_in_jax`.

Two entries over one `JaxFlat`. A call on plain tensors runs the jitted function directly, and under autograd a jitted
forward that also returns its residuals (`_Eager`). Everything else goes through one dispatcher op, `interop::jax_call`,
which knows what it is under fake tensors and tracers (`_Traced`), and below `torch.func` and forward AD
(`_Transformed`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import torch

from interop._derive import Mask, Static, fill, pick
from interop._errors import InteropError, LeafError, NotDifferentiableError, NotJittableError, UnsupportedError
from interop._in_torch._effects import Effectful
from interop._in_torch._flat import FLATS, RAN, JaxFlat
from interop._in_torch._residuals import Plan, with_residuals
from interop._in_torch._sizes import avals_of, is_open, shaped
from interop._leaf import (
    AT_HOME,
    PLAIN,
    TORCH_OF,
    WIDE_FLOATS,
    argument_of,
    computes_on_cpu,
    describe,
    device_of,
    export,
    jax_device,
    jax_dtype,
    refuse_two_devices,
    resolve,
    too_large,
    view_of,
)
from interop._log import tell
from interop._private import jax as jax_private
from interop._private import torch as torch_private
from interop._side import Leaf, Leaves
from interop._threads import THREAD, has_turn, refuse_waiting, turn_given_away

_Result: TypeAlias = "tuple[Sequence[torch.Tensor], Any]"
_SYMBOLS = frozenset({torch.SymInt, torch.SymFloat})  # numbers that a trace of torch keeps open
_PYTHON_NUMBERS = frozenset({int, float, complex})
_NUMBERS = _PYTHON_NUMBERS | _SYMBOLS
_CPU = torch.device("cpu")
_NUMBER = torch.zeros((), device="cpu")
_ARRAYS = _PYTHON_NUMBERS | {jax_private.ArrayImpl}  # what a jitted function takes as it is
_functorch_active, _dispatch_modes = torch_private.functorch_active, torch_private.dispatch_modes
_forward_ad = torch.autograd.forward_ad
_is_grad_enabled, _is_tracing = torch.is_grad_enabled, torch_private.is_tracing
_saved_tensors_are_watched, _keeps_graph = torch_private.saved_tensors_are_watched, torch_private.keeps_graph
_is_legacy_batched = torch_private.is_legacy_batched
_config: Any = jax.config


# --- call -------------------------------------------------------------------------------------------------------------


def call(flat: JaxFlat, leaves: Sequence[Leaf]) -> _Result:
    """Call the function on tensors and Python numbers; returns `(tensors, structure)`."""
    if THREAD.cannot_wait or has_turn():
        return _call_nested(flat, leaves)
    if _config.jax_enable_x64:
        flat = flat.wide()
    if _functorch_active() or _forward_ad._current_level >= 0:
        return _call_transformed(flat, leaves)
    if _dispatch_modes() or _is_tracing():
        return _call_op(flat, leaves, _Traced)
    if not AT_HOME and not computes_on_cpu():
        return _call_carefully(flat, leaves)
    arrays = []
    differentiated = False
    for leaf in leaves:
        kind = type(leaf)
        if kind in PLAIN:
            view = view_of(leaf)
            if view is None:
                return _call_carefully(flat, leaves)
            arrays.append(view)
            if leaf.requires_grad:
                differentiated = True
        elif kind in _PYTHON_NUMBERS:
            arrays.append(leaf)
        else:
            return _call_carefully(flat, leaves)
    if differentiated and _is_grad_enabled():
        return _call_differentiated(flat, leaves, arrays)
    outs, structure = run(flat, arrays)
    return [export(out) for out in outs], structure.value


def _call_nested(flat: JaxFlat, leaves: Sequence[Leaf]) -> _Result:
    """A call from inside a compiled program of JAX."""
    before = THREAD.cannot_wait
    if before:
        refuse_waiting()
    THREAD.cannot_wait = False
    try:
        with turn_given_away():
            return call(flat, leaves)
    finally:
        THREAD.cannot_wait = before


def _call_transformed(flat: JaxFlat, leaves: Sequence[Leaf]) -> _Result:
    """Call the function below `torch.func` or forward AD.

    A batch that is innermost is peeled off here, which costs less than torch's way of asking an autograd function.
    """
    peeled = None if torch.compiler.is_exporting() else torch_private.peel_vmap(leaves)
    if peeled is None:
        torch_private.teach_functionalize(_Transformed)
        return _call_op(flat, leaves, _Transformed)
    plain, axes, outside, wrap = peeled
    batched = any(axis is not None for axis in axes)
    with outside:
        outs, structure = call(flat.vmap(axes) if batched else flat, plain)
    return (wrap(outs) if batched else outs), structure


def _call_differentiated(flat: JaxFlat, leaves: Sequence[Leaf], arrays: list[Any]) -> _Result:
    """Call the function under autograd; the arrays have the values of the leaves."""
    if not flat.levels.differentiable or flat.nondiff:
        check_differentiable(flat, asked(leaves))
    if _saved_tensors_are_watched():
        return _call_op(flat, leaves, _Traced)
    if flat.effectful:
        return _call_effectful(flat, leaves)
    running = [flat, arrays]
    try:
        outs = (_apply_eager if flat.levels.jit else _Unjitted.apply)(running, *leaves)
    except Effectful:
        flat.effectful = True
        return _call_effectful(flat, leaves)
    return outs, running[2]


def asked(leaves: Sequence[Leaf]) -> Mask:
    """The leaves that a derivative is asked in."""
    return tuple(_is_grad_enabled() and type(x) not in _NUMBERS and x.requires_grad for x in leaves)


def _call_effectful(flat: JaxFlat, leaves: Sequence[Leaf]) -> _Result:
    """Call a function with effects where a derivative is asked, or a graph is made: they happen once, on their own."""
    tell(flat.name, "fell back on two programs, one for its effects, and one for the rest")
    plain = [x if type(x) in _NUMBERS else x.detach() for x in leaves]
    answers, _ = call(flat.recording(), plain)
    return call(flat.replaying((len(leaves),)), [*leaves, *answers])


def _call_carefully(flat: JaxFlat, leaves: Sequence[Leaf]) -> _Result:
    """A call with a leaf that is 64-bit, of an unusual layout, traced, batched by the older vmap, or refused."""
    leaves = [x if type(x) in _NUMBERS else torch_private.unwrap_if_dead(x) for x in leaves]
    tensors = [leaf for leaf in leaves if type(leaf) not in _NUMBERS]
    is_meta = flat.levels.jittable and any(t.is_meta for t in tensors)
    if is_meta or any(map(torch_private.is_fake, tensors)) or any(type(leaf) in _SYMBOLS for leaf in leaves):
        return _call_op(flat, leaves, _Traced)
    if any(map(_is_legacy_batched, tensors)):
        return _call_legacy_batched(flat, leaves)
    if in_64_bits(tensors):
        flat = flat.wide()
    arrays = arrays_of(leaves, x64=flat.x64)
    if _is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _call_differentiated(flat, leaves, arrays)
    outs, structure = evaluate(flat, arrays)
    return [export(out) for out in outs], structure.value


def _call_legacy_batched(flat: JaxFlat, leaves: Sequence[Leaf]) -> _Result:
    """A call on batches of the older vmap, that of `is_grads_batched`: one level, below autograd's."""
    batched = [type(x) not in _NUMBERS and _is_legacy_batched(x) for x in leaves]
    plain = [torch_private.unbatch(x) if b else x for x, b in zip(leaves, batched, strict=True)]
    outs, structure = call(flat.vmap(tuple(0 if b else None for b in batched)), plain)
    return [torch_private.batch(out) for out in outs], structure


def in_64_bits(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a function of these tensors runs in 64 bits: where JAX keeps them, or a float has them."""
    return _config.jax_enable_x64 or any(t.dtype in WIDE_FLOATS for t in tensors)


def evaluate(flat: JaxFlat, arrays: Sequence[Any]) -> tuple[Leaves, Static]:
    """The jitted function in its own width, whatever this thread has set. Its outputs never alias its inputs."""
    if THREAD.cannot_wait:
        refuse_waiting()
    if AT_HOME and flat.x64 is _config.jax_enable_x64:
        return run(flat, arrays)
    with jax.enable_x64(flat.x64), contextlib.nullcontext() if AT_HOME else _where_torch_is(arrays):
        return run(flat, arrays)


def _where_torch_is(arrays: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """Numbers alone are computed on where torch would, not where JAX would."""
    if any(isinstance(array, jax.Array) for array in arrays):
        return contextlib.nullcontext()
    return jax.default_device(jax_device(_CPU if any(type(a) not in _NUMBERS for a in arrays) else device_of(())))


def run(flat: JaxFlat, arrays: Sequence[Any]) -> tuple[Leaves, Static]:
    """The same in a thread that is known to have this width."""
    try:
        found = flat.jitted(*arrays)
    except jax.errors.JaxRuntimeError as error:
        if "Disallowed host-to-device transfer" not in str(error):
            raise
        # A crossing is meant; that it goes through numpy is our affair.
        with jax.transfer_guard_host_to_device("allow"):
            found = flat.jitted(*arrays)
    if flat.since is not None:
        flat.tell_compiled()
    if not found[0]:
        jax.effects_barrier()  # no output to wait for, and the caller may write to the inputs next
    return found


def arrays_of(leaves: Sequence[Leaf], *, x64: bool) -> list[Any]:
    """The leaves as arguments of the jitted function, for the length of this call; raises for one that can't cross."""
    arrays: list[Any] = []
    for index, leaf in enumerate(leaves):
        try:
            arrays.append(leaf if type(leaf) in _NUMBERS else argument_of(leaf, x64=x64))
        except InteropError as error:
            raise error.at(index)  # noqa: B904 - the same error, located
    refuse_two_devices([_NUMBER if type(leaf) in _NUMBERS else leaf for leaf in leaves])
    return arrays


def check_differentiable(flat: JaxFlat, wanted: Sequence[bool]) -> None:
    """Raise where a derivative is asked that was not declared, naming the first leaf that asks."""
    refused = (*flat.nondiff, *(False,) * (len(wanted) - len(flat.nondiff)))
    for index, (asked, no) in enumerate(zip(wanted, refused, strict=False)):
        if asked and not flat.levels.differentiable:
            raise NotDifferentiableError(
                "a tensor that requires grad into a function that is not differentiable",
                hint="Stack @differentiable, or pass x.detach()",
            ).at(index)
        if asked and no:
            raise NotDifferentiableError(
                "a tensor that requires grad for an argument named in nondiff_argnames", hint="Pass x.detach()"
            ).at(index)


# --- eager ------------------------------------------------------------------------------------------------------------


class _Eager(torch.autograd.Function):
    """Values under autograd: one jitted forward with residuals, one jitted backward from them."""

    @staticmethod
    def forward(ctx: Any, running: list[Any], *xs: Leaf) -> tuple[torch.Tensor, ...]:
        """What goes in beside the leaves is `[flat, arrays]`; the structure of the outputs comes out there."""
        flat, arrays = running
        full, static = evaluate(with_residuals(flat, ctx.needs_input_grad[1:], watched=True), arrays)
        plan: Plan = static.value
        flat.unasked += plan.price
        running.append(plan.structure.value)
        outs = tuple([export(out) for out in full[: plan.count]])
        if plan.count != 1:
            ctx.set_materialize_grads(False)
        if plan.rough:
            ctx.mark_non_differentiable(*[outs[i] for i in plan.rough])
        # New residuals stay arrays that nobody else sees; what is the user's input or output torch keeps and guards.
        if plan.guarded:
            of = {"input": xs, "output": outs}
            guarded = [of[origin][i] for origin, i in plan.guarded]
            ctx.save_for_backward(*[x for x in guarded if type(x) not in _NUMBERS])
        ctx.kept = flat, plan, xs, _versions(xs), full[plan.count :]
        return outs

    @staticmethod
    @torch_private.never_traced  # by compiled autograd: what is kept is no tensor
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        if ctx.kept is None:
            raise _freed()
        flat, plan, xs, versions, residuals = ctx.kept
        if plan.scaled and not _is_grad_enabled() and plan.serves(cotangents):
            flat.unasked = max(0.0, flat.unasked - plan.price)
            scaled = _scaled(flat, plan, residuals, cotangents)
            if scaled is not None:
                if not _keeps_graph():
                    ctx.kept = None
                return scaled
        need = ctx.needs_input_grad[1:]
        present = tuple([c is not None for c in cotangents])
        # create_graph: from the original function and its primals, so that any order works
        if _is_grad_enabled() or plan.scaled:  # what came with the value has not served
            wanted = plan.reach(need, present)
            grads = _higher_order(flat, _unchanged(xs, versions), wanted, present, cotangents)
        else:
            wanted, backward = plan.backward(need, present)
            with flat.blamed():
                grads = _from_residuals(backward, ctx, cotangents) if True in wanted else ()
        if plan.saved and not _keeps_graph():
            ctx.kept = None
        rest = iter(grads)
        return None, *[next(rest) if w else None for w in wanted]


_apply_eager = torch_private.apply_of(_Eager)


class _Unjitted(torch.autograd.Function):
    """Values under autograd, of a function that can't be traced: JAX's own pull-back is kept."""

    @staticmethod
    def forward(ctx: Any, running: list[Any], *xs: Leaf) -> tuple[torch.Tensor, ...]:
        """What goes in beside the leaves is `[flat, arrays]`; the structure of the outputs comes out there."""
        flat, arrays = running
        results, structure, pull = flat.pulled_back(ctx.needs_input_grad[1:], arrays)
        running.append(structure.value)
        outs = tuple(map(export, results))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[out for out in outs if not _is_inexact(out)])
        ctx.kept = flat, xs, _versions(xs), pull, ctx.needs_input_grad[1:], tuple(map(_is_inexact, outs))
        return outs

    @staticmethod
    @torch_private.never_traced
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        if ctx.kept is None:
            raise _freed()
        flat, xs, versions, pull, active, inexact = ctx.kept
        need, present = ctx.needs_input_grad[1:], tuple([c is not None for c in cotangents])
        if not any(present):
            return (None,) * (len(need) + 1)
        if _is_grad_enabled():
            grads = _higher_order(flat, _unchanged(xs, versions), need, present, cotangents)
        else:
            given = [None if c is None else argument_of(c, x64=flat.x64) for c in pick(cotangents, inexact)]
            grads = list(map(export, pick(pull(*given), pick(need, active))))
        if not _keeps_graph():
            ctx.kept = None
        return None, *fill((None,) * len(need), need, tuple(grads))


def _scaled(
    flat: JaxFlat, plan: Plan, gradients: Sequence[jax.Array], cotangents: Sequence[Any]
) -> tuple[Any, ...] | None:
    """Gradients that came with the value, times the one cotangent; None first, for what is no leaf.

    None instead, where a product is not finite that might be: an infinity may be one of the gradients of 1 alone, and
    times zero it is no number.
    """
    cotangent = cotangents[0] if plan.count == 1 else pick(tuple(cotangents), plan.inexact)[0]
    if type(cotangent) not in PLAIN and not torch_private.is_traced(cotangent):
        with flat.blamed():
            resolve(cotangent)
    view = view_of(cotangent)
    number = None if view is None else view.item()
    # The cotangent of a loss: to look costs less than to multiply. Of a retained graph, they are asked for again.
    if number == 1 and not _keeps_graph():
        return None, *[None if i is None else export(gradients[i]) for i in plan.gradients]
    products = [None if i is None else export(gradients[i]) * cotangent for i in plan.gradients]
    is_safe = number is None or 1 <= abs(number) < math.inf
    if is_safe or all(product is None or torch.isfinite(product).all() for product in products):
        return None, *products
    return None


def _freed() -> RuntimeError:
    return RuntimeError(
        "Trying to backward through the graph a second time: its residuals have been freed. Specify retain_graph=True "
        "if you need to backward through the graph a second time."
    )


def _versions(xs: Leaves) -> list[int]:
    try:
        return [x._version for x in xs]
    except (AttributeError, RuntimeError):  # numbers and inference tensors have none
        return [0 if type(x) in _NUMBERS else torch_private.version_of(x) for x in xs]


def _unchanged(xs: Leaves, versions: Sequence[int]) -> Leaves:
    """The inputs of the forward; raises as torch does if one was changed in place since."""
    for x, version, now in zip(xs, versions, _versions(xs), strict=True):
        if now != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{describe(x)} is at version {now}; expected version {version} instead."
            )
    return xs


def _higher_order(
    flat: JaxFlat, primals: Sequence[Any], wanted: Mask, present: Mask, cotangents: Sequence[Any]
) -> Sequence[Any]:
    """The gradients of the wanted inputs by the derived function, which has gradients itself."""
    if not any(wanted):
        return ()
    return call(flat.vjp(wanted, present), [*primals, *(c for c in cotangents if c is not None)])[0]


def _from_residuals(backward: JaxFlat, ctx: Any, cotangents: Sequence[Any]) -> Sequence[Any]:
    """The gradients by the jitted backward; through `call` where a cotangent is no plain value (a batch, say)."""
    _, plan, xs, _, residuals = ctx.kept
    given = [c for c in cotangents if c is not None]
    guarded = iter(ctx.saved_tensors if plan.guarded else ())  # torch checks their versions
    saved = [
        residuals[i] if origin == "residual"
        else xs[i] if origin == "input" and type(xs[i]) in _NUMBERS
        else next(guarded)
        for origin, i in plan.saved
    ]  # fmt: skip
    if _functorch_active() or _dispatch_modes() or any(map(_is_legacy_batched, given)):
        leaves = [x if type(x) in _NUMBERS or isinstance(x, torch.Tensor) else export(x) for x in (*saved, *given)]
        return call(backward, leaves)[0]
    arrays = [x if type(x) in _ARRAYS else argument_of(x, x64=backward.x64) for x in (*saved, *given)]
    return [export(out) for out in evaluate(backward, arrays)[0]]


# --- the op -----------------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("interop", "FRAGMENT")


def _op(xs: list[torch.Tensor], function: str) -> list[torch.Tensor]:
    """The op on real tensors."""
    flat = FLATS[function]
    arrays = [view_of(x) for x in xs]
    with flat.blamed():
        if not computes_on_cpu() or any(array is None for array in arrays):
            arrays = arrays_of(xs, x64=flat.x64)
        return [export(out) for out in evaluate(flat, arrays)[0]]


def _op_fake(xs: list[torch.Tensor], function: str) -> list[torch.Tensor]:
    """The op on tensors without values: shapes and dtypes from tracing the JAX function."""
    flat = FLATS[function]
    if not flat.levels.jittable:
        raise NotJittableError("traced by torch", hint="Stack @jittable")
    without = [i for i, x in enumerate(xs) if x.is_meta]
    with flat.blamed():
        if without and len(without) < len(xs):
            error = LeafError("a tensor on the 'meta' device has no values", hint="Materialise it with to_empty()")
            raise error.at(without[0])
        refuse_two_devices(xs)
    if not torch_private.is_compiled():
        FLATS.keep(function, flat)
    device = device_of(xs)
    outs = shaped(flat, xs)
    return [torch.empty(s, dtype=dtype, device=device) for s, dtype in zip(outs.shapes, outs.dtypes, strict=True)]


def _op_autograd(xs: list[torch.Tensor], function: str) -> list[torch.Tensor]:
    """The op in a graph that is differentiated later: an exported program, or one that `make_fx` has recorded."""
    if _functorch_active() or torch_private.has_tangent(xs):
        return list(_Transformed.apply(FLATS[function], *xs))
    if _is_grad_enabled() and any(x.requires_grad for x in xs):
        return list(_Traced.apply(FLATS[function], *xs))
    if not _dispatch_modes() and all(type(x) in PLAIN and not x.is_meta for x in xs):
        return _op(xs, function)  # where the dispatcher would lead
    with torch_private.below_autograd():
        return list(jax_call(xs, function))


def _op_vmap(_info: Any, in_dims: tuple[Any, ...], xs: list[torch.Tensor], function: str) -> tuple[list[Any], Any]:
    """The op over a batch, for a graph that holds it and is itself mapped."""
    dims = tuple(in_dims[0]) if isinstance(in_dims[0], list | tuple) else (in_dims[0],) * len(xs)
    outs = jax_call(xs, FLATS[function].vmap(dims).name_of_op)
    return outs, [0] * len(outs)


def _op_legacy_batched(xs: list[torch.Tensor], function: str) -> list[torch.Tensor]:
    """The op over a batch of the older vmap."""
    return list(_call_legacy_batched(FLATS[function], xs)[0])


if not hasattr(torch.ops.interop, "jax_call"):  # a reload of the module finds it registered
    _LIBRARY.define("jax_call(Tensor[] xs, str function) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.define("jax_effect(Tensor[] xs, str function) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
    for _name in ("jax_call", "jax_effect"):
        _LIBRARY.impl(_name, _op, "CompositeExplicitAutograd")
        torch_private.register_fake(_LIBRARY, _name, _op_fake)
    if torch_private.below_autograd is not None:
        _LIBRARY.impl("jax_call", _op_autograd, "Autograd")
    _LIBRARY.impl("jax_call", _op_legacy_batched, "Batched")
    torch.library.register_vmap("interop::jax_call", _op_vmap, lib=_LIBRARY)
jax_call = torch.ops.interop.jax_call.default


def _call_op(flat: JaxFlat, leaves: Sequence[Leaf], function: Any) -> _Result:
    """Call through the op: numbers become tensors, and the structure is found without values."""
    if _is_tracing():
        raise UnsupportedError("torch.jit.trace sees nothing of a JAX function", hint="Use torch.export")
    flat, tensors = lifted(flat, leaves)
    if _dispatch_modes() and not torch_private.is_compiled():
        FLATS.keep(flat.name_of_op, flat)
    if flat.levels.jit and not flat.records and shaped(flat, tensors).effects:
        return _call_effectful(flat, tensors)
    RAN.structures.pop(flat, None)
    # Whoever runs an exported program transforms and differentiates the op itself.
    exporting = torch.compiler.is_exporting()
    outs = jax_call(tensors, flat.exported_name()) if exporting else function.apply(flat, *tensors)
    ran = RAN.structures.pop(flat, None)  # where it ran, it has said what it returned
    return list(outs), (ran or shaped(flat, tensors).structure).value


def lifted(flat: JaxFlat, leaves: Sequence[Leaf]) -> tuple[JaxFlat, list[torch.Tensor]]:
    """The function in the width of its leaves, of tensors alone."""
    is_number = tuple(type(leaf) in _NUMBERS for leaf in leaves)
    given = [leaf for leaf in leaves if type(leaf) not in _NUMBERS]
    if in_64_bits(given):
        flat = flat.wide()
    traced = next(filter(torch_private.is_traced, given), None)
    device = device_of(given)
    tensors: list[torch.Tensor] = []
    for index, leaf in enumerate(leaves):
        try:
            tensors.append(_lift(leaf, traced, device, x64=flat.x64) if is_number[index] else leaf)
        except InteropError as error:
            raise error.at(index)  # noqa: B904 - the same error, located
    return flat.lifted(is_number), tensors


def _refuse(leaves: Sequence[Leaf]) -> None:
    """Raise for a tensor whose memory is not its value, before torch looks for a rule of the op for it."""
    for index, leaf in enumerate(leaves):
        if not torch_private.is_traced(leaf) and not leaf.is_meta:
            try:
                resolve(leaf)
            except InteropError as error:
                raise error.at(index)  # noqa: B904 - the same error, located


def _lift(number: Any, traced: Any, device: torch.device, *, x64: bool) -> Any:
    """A number as a 0-d tensor of the dtype that JAX would give it, beside the others; traced beside traced ones."""
    kind: Any = type(number)
    wide = _WIDTHS[kind]
    if kind is torch.SymInt:
        # What the symbol stands for is known when the graph runs: it goes whole, to be checked there as any tensor is.
        return torch.scalar_tensor(number, dtype=wide, device="cpu")
    if kind is torch.SymFloat:  # torch keeps a float open that only multiplies tensors
        return (torch.ones((), dtype=wide, device="cpu") * number).to(TORCH_OF[jax_dtype(wide, x64=x64)])
    if kind is int and not x64 and not -(2**31) <= number < 2**31:
        raise too_large(number)
    dtype = TORCH_OF[jax_dtype(wide, x64=x64)]
    if traced is not None:
        return traced.new_full((), number, dtype=dtype, device="cpu")
    return torch.scalar_tensor(number, dtype=dtype, device=device)


_WIDTHS: dict[Any, torch.dtype] = {
    int: torch.int64,
    float: torch.float64,
    complex: torch.complex128,
    torch.SymInt: torch.int64,
    torch.SymFloat: torch.float64,
}


def _is_inexact(x: torch.Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _in_graph(flat: JaxFlat, xs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Call the op; for what has effects, the one that torch neither drops nor merges."""
    if not flat.records:
        return tuple(jax_call(list(xs), flat.name_of_op))
    torch_private.keep_effects("interop::jax_effect")
    return tuple(torch.ops.interop.jax_effect.default(list(xs), flat.name_of_op))


class _Traced(torch.autograd.Function):
    """Tensors without values, or whose saved tensors are watched: forward with residuals and backward, both as ops."""

    @staticmethod
    def forward(ctx: Any, flat: JaxFlat, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        active = ctx.needs_input_grad[1:]
        check_differentiable(flat, active)
        _refuse(xs)
        ctx.set_materialize_grads(False)
        # Another size may have other residuals, and what can't be traced has none: the primals alone are kept.
        if is_open(xs) or not any(active) or not flat.levels.jit:
            outs = _in_graph(flat, xs)
            ctx.mark_non_differentiable(*[out for out in outs if not _is_inexact(out)])
            ctx.kept = flat, None, len(xs)
            ctx.save_for_backward(*xs)
            return outs
        forward = with_residuals(flat, active)
        full = jax_call(list(xs), forward.name_of_op)
        plan: Plan = forward.outputs(avals_of(flat, xs)).structure.value
        outs = tuple(full[: plan.count])
        ctx.mark_non_differentiable(*[outs[i] for i in plan.rough])
        of = {"input": xs, "output": outs, "residual": full[plan.count :]}
        ctx.kept = flat, plan, len(xs)
        ctx.save_for_backward(*xs, *(of[origin][i] for origin, i in plan.saved))
        return outs

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        flat, plan, count = ctx.kept
        need = ctx.needs_input_grad[1:]
        present = tuple(c is not None for c in cotangents)
        wanted = plan.reach(need, present) if plan else need if any(present) else (False,) * count
        grads: Sequence[Any] = ()
        if any(wanted):
            kept = ctx.saved_tensors  # unpacked once: checkpoint allows no more
            if plan is None or _is_grad_enabled() or not plan.serves(cotangents):
                grads = _higher_order(flat, kept[:count], wanted, present, cotangents)
            else:
                given = [c for c in cotangents if c is not None]
                grads, _ = call(plan.backward(need, present)[1], [*kept[count:], *given])
        return None, *fill((None,) * len(need), wanted, tuple(grads))


class _Transformed(torch.autograd.Function):
    """Below `torch.func` and forward AD: torch peels one transform at a time and asks for the derived function."""

    @staticmethod
    def forward(flat: JaxFlat, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        _refuse(xs)
        return _in_graph(flat, xs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        flat, *xs = inputs
        check_differentiable(flat, ctx.needs_input_grad[1:])
        ctx.flat = flat
        ctx.inexact = tuple(map(_is_inexact, output))
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
        grads = _higher_order(ctx.flat, ctx.saved_tensors, need, present, cotangents)
        return None, *fill((None,) * len(need), need, tuple(grads))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        tangents = tangents[1:]  # the first would be that of the flat function
        nonzero = tuple(t is not None for t in tangents)
        check_differentiable(ctx.flat, nonzero)
        outs, _ = call(ctx.flat.jvp(nonzero), [*ctx.saved_tensors, *pick(tangents, nonzero)])
        return fill((None,) * len(ctx.inexact), ctx.inexact, tuple(outs))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:  # noqa: ARG004 - torch's name for it
        flat, *xs = inputs
        outs = _Transformed.apply(flat.vmap(tuple(in_dims[1:])), *xs)
        return outs, (0,) * len(outs)
