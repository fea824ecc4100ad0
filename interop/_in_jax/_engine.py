"""The engine: a flat torch function as primitives of JAX. Mirror of `_in_torch`.

A call on values runs torch directly. Everything else goes through primitives, with one rule for each transform:

    torch_call      the function
    torch_forward   the function with its residuals, from a captured graph
    torch_linear    its derivative along tangents: linear in them, so that JAX can transpose it
    torch_backward  the transpose on residuals, from a captured graph

Where gradients come from: eagerly from torch's own graph (`_live`), in a trace from captured graphs (`_capture`), and
by recomputing where neither is to be had. Higher orders are always derived from the original function.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.core
import numpy as np
from jax.experimental import jet
from jax.experimental.buffer_callback import buffer_callback
from jax.interpreters import ad, batching, mlir

from interop._abstract import Aval, Outputs, aval_of
from interop._derive import NOTHING, Mask, Static, fill, pick
from interop._errors import InteropError, NotDifferentiableError, NotJittableError, UnsupportedError
from interop._in_jax import _live
from interop._in_jax._callback import callback
from interop._in_jax._capture import Capture, capture
from interop._in_jax._flat import TorchFlat, is_inexact, run, warn_gathered
from interop._in_jax._random import Draws, Watched, refused
from interop._private import jax as jax_private
from interop._side import Leaf

_Result: TypeAlias = "tuple[Sequence[jax.Array], Any]"
_Tracer = jax.core.Tracer
_Zero = ad.Zero
ArrayImpl, _is_tracing = jax_private.ArrayImpl, jax_private.is_tracing


# --- call -------------------------------------------------------------------------------------------------------------


def call(flat: TorchFlat, leaves: Sequence[Leaf]) -> _Result:
    """Call the function on arrays; returns `(arrays, structure)`."""
    for leaf in leaves:
        if type(leaf) is not ArrayImpl and isinstance(leaf, _Tracer):
            return _call_traced(flat, leaves)
    if _is_tracing():  # a program is made, and the call is part of it, though nothing in it depends on the arguments
        return _call_traced(flat, leaves)
    outs, structure = run(flat, leaves)
    return outs, structure.value


def _call_traced(flat: TorchFlat, leaves: Sequence[Leaf]) -> _Result:
    flat = flat.here()
    _ran.structures.pop(flat, None)
    outs = torch_call.bind(*jax_private.vary(list(leaves)), flat=flat)
    # Where the values were there, it has run, and said what it returned; else its outputs were inferred.
    structure = _ran.structures.pop(flat, None) or flat.outputs(tuple(map(aval_of, leaves))).structure
    _ran.structures.clear()
    return outs, structure.value


class _Ran(threading.local):
    """The structures of the outputs of functions that ran in this thread during a bind."""

    def __init__(self) -> None:
        self.structures: dict[TorchFlat, Static] = {}


_ran = _Ran()


def _run(flat: TorchFlat, arrays: Sequence[Any]) -> list[jax.Array]:
    outs, structure = run(flat, arrays)
    _ran.structures[flat.origin or flat] = structure
    return outs


def check_differentiable(flat: TorchFlat, wanted: Sequence[bool]) -> None:
    """Raise where a derivative is asked that was not declared, naming the first leaf that asks."""
    refused = (*flat.nondiff, *(False,) * (len(wanted) - len(flat.nondiff)))
    for index, (asked, no) in enumerate(zip(wanted, refused, strict=False)):
        if asked and not flat.levels.differentiable:
            raise _named(
                flat,
                NotDifferentiableError(
                    "a derivative of a function that is not differentiable",
                    hint="Stack @differentiable, or use jax.lax.stop_gradient",
                ),
                index,
            )
        if asked and no:
            raise _named(
                flat,
                NotDifferentiableError(
                    "a derivative in an argument named in nondiff_argnames", hint="Use jax.lax.stop_gradient on it"
                ),
                index,
            )
    lost = flat.lost() if flat.lost else None
    if lost:
        raise NotDifferentiableError(
            f"{lost} requires grad, and is no argument: its gradient would be lost",
            hint="Pass it as an argument, or detach it. Of a module: as_jax(module)",
        ).of(flat.name)


def _named(flat: TorchFlat, error: InteropError, index: int) -> InteropError:
    """The error with names in it: a rule of JAX may run long after our frame has gone."""
    error.argument = flat.path(index) if flat.path else None
    return error.of(flat.name)


# --- primitives -------------------------------------------------------------------------------------------------------

torch_call = jax_private.eager_primitive("torch_call")
torch_forward = jax_private.eager_primitive("torch_forward")
torch_linear = jax_private.eager_primitive("torch_linear")
torch_backward = jax_private.eager_primitive("torch_backward")


def _shaped(avals: Sequence[Aval], like: Sequence[Any]) -> list[Any]:
    return [jax_private.shaped_array(aval.shape, aval.dtype, tuple(like)) for aval in avals]


_Avals: TypeAlias = "tuple[list[Any], frozenset[Any]]"  # with the effects


def _call_avals(*ins: Any, flat: TorchFlat) -> _Avals:
    outputs = flat.outputs(tuple(map(aval_of, ins)))
    return _shaped(outputs.avals, ins), _effects(flat, outputs)


def _forward_avals(*ins: Any, flat: TorchFlat, active: Mask, cut: Capture) -> _Avals:
    del active
    outputs = flat.outputs(tuple(map(aval_of, ins)))
    return _shaped([*outputs.avals, *cut.residuals], ins), _effects(flat, outputs)


def _linear_avals(*ins: Any, flat: TorchFlat, active: Mask, source: Any, outs: tuple[Aval, ...]) -> _Avals:
    del flat, active, source
    return _shaped([out for out in outs if is_inexact(out)], ins), frozenset()


def _backward_avals(*ins: Any, flat: TorchFlat, active: Mask, cut: Capture) -> _Avals:
    del flat
    primals = ins[len(cut.saved) : len(cut.saved) + len(active)]
    return _shaped([aval_of(x) for x in pick(tuple(primals), active)], ins), frozenset()


def _effects(flat: TorchFlat, outputs: Outputs) -> frozenset[Any]:
    return frozenset({Draws(flat.name)}) if outputs.random else frozenset()


def _split(operands: Sequence[Any], active: Mask, source: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """The operands of `torch_linear`: residuals, primals, tangents. The source says what the residuals are."""
    kept = len(source.saved) if isinstance(source, Capture) else int(source == "live")
    count = len(active)
    return list(operands[:kept]), list(operands[kept : kept + count]), list(operands[kept + count :])


# --- derivatives ------------------------------------------------------------------------------------------------------


def _call_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, flat: TorchFlat) -> Any:
    active = tuple(type(t) is not _Zero for t in tangents)
    check_differentiable(flat, active)
    given = [t for t in tangents if type(t) is not _Zero]
    flat = flat.exact or flat  # it is differentiated again
    outs, source, residuals = _linearized(flat, primals, active, given)
    return outs, _linear(flat, outs, residuals, primals, given, active, source)


def _linearized(flat: TorchFlat, primals: Sequence[Any], active: Mask, tangents: Sequence[Any]) -> Any:
    """The outputs, and where their transpose will come from."""
    if not all(isinstance(t, _Tracer) for t in tangents):  # forward mode: nothing will be transposed
        return torch_call.bind(*primals, flat=flat), "recompute", []
    if not any(isinstance(p, _Tracer) for p in primals):
        outs, structure, handle = _live.forward(flat, primals, active)
        _ran.structures[flat.origin or flat] = structure
        return outs, "live", [handle]
    cut = capture(flat, tuple(map(aval_of, primals)), active)
    if cut is None:
        return torch_call.bind(*primals, flat=flat), "recompute", []
    results = torch_forward.bind(*primals, flat=flat, active=active, cut=cut)
    return results[: cut.count], cut, cut.find(primals, results)


def _linear(
    flat: TorchFlat, outs: Sequence[Any], residuals: Any, primals: Any, tangents: Any, active: Mask, source: Any
) -> list[Any]:
    """The tangents of the outputs: those of the inexact ones through `torch_linear`, zero for the others."""
    if source == "recompute":
        _refuse_random(flat, primals)
    operands = jax_private.vary([*residuals, *primals, *tangents])
    avals = tuple(map(aval_of, outs))
    moved = iter(torch_linear.bind(*operands, flat=flat, active=active, source=source, outs=avals))
    return [next(moved) if is_inexact(out) else _Zero(jax.typeof(out).to_tangent_aval()) for out in outs]


def _refuse_random(flat: TorchFlat, primals: Sequence[Any]) -> None:
    """Raise for a function that draws random numbers where a derivative runs it again: it would draw others."""
    traced = any(isinstance(p, _Tracer) for p in primals)
    if traced and flat.outputs(tuple(map(aval_of, primals))).random:  # of values, the run itself will tell
        raise refused(flat.name, "a derivative would run it again, and draw others")


def _forward_jvp(primals: Any, tangents: Any, *, flat: TorchFlat, active: Mask, cut: Capture) -> Any:
    """Of second order: the residuals count as constants, because what reads them is derived from the primals again."""
    results = torch_forward.bind(*primals, flat=flat, active=active, cut=cut)
    outs, kept = results[: cut.count], results[cut.count :]
    again = tuple(type(t) is not _Zero for t in tangents)
    given = [t for t in tangents if type(t) is not _Zero]
    moved = _linear(flat, outs, [], primals, given, again, "recompute")
    return results, [*moved, *(_Zero(jax.typeof(x).to_tangent_aval()) for x in kept)]


def _linear_jvp(primals: Any, tangents: Any, *, flat: TorchFlat, active: Mask, source: Any, outs: Any) -> Any:
    del outs
    _, points, directions = _split(primals, active, source)
    _, dpoints, ddirections = _split(tangents, active, source)
    return _call_jvp([*points, *directions], [*dpoints, *ddirections], flat=flat.jvp(active))


def _linear_transpose(
    cotangents: Any, *operands: Any, flat: TorchFlat, active: Mask, source: Any, outs: tuple[Aval, ...]
) -> list[Any]:
    residuals, primals, _ = _split(operands, active, source)
    present = tuple(type(c) is not _Zero for c in cotangents)
    given = [c for c in cotangents if type(c) is not _Zero]
    if not given:
        return [None] * len(operands)
    if isinstance(source, Capture):
        lost = [p and u for p, u in zip(present, source.unfollowed, strict=True)]
        flat.refuse_graphless(primals, active, lost)
        dense = [ad.instantiate_zeros(c) for c in cotangents]
        operands_ = jax_private.vary([*residuals, *primals, *dense])
        grads = torch_backward.bind(*operands_, flat=flat, active=active, cut=source)
    else:
        grads = _transposed(flat, residuals, primals, given, active, present, source, outs)
    return [None] * (len(operands) - len(grads)) + list(grads)


def _call_transpose(cotangents: Any, *operands: Any, flat: TorchFlat) -> list[Any]:
    """The transpose of a function that is linear in the operands that are not there."""
    active = tuple(ad.is_undefined_primal(x) for x in operands)
    check_differentiable(flat, active)
    avals = tuple(aval_of(x.aval if a else x) for x, a in zip(operands, active, strict=True))
    cut = capture(flat, avals, active)
    if cut is None or not cut.linear:
        message = (
            "a transpose of a function that is not linear" if cut else "a transpose of a function that can't be traced"
        )
        raise UnsupportedError(message, hint="Use jax.vjp").of(flat.name)
    zeros = [jax.numpy.zeros(v.shape, v.dtype) if a else x for x, v, a in zip(operands, avals, active, strict=True)]
    results = torch_forward.bind(*jax_private.vary(zeros), flat=flat, active=active, cut=cut)
    inexact = [c for c, out in zip(cotangents, results, strict=False) if is_inexact(out)]
    dense = [ad.instantiate_zeros(c) for c in inexact]
    saved = cut.find(zeros, results)
    grads = torch_backward.bind(*jax_private.vary([*saved, *zeros, *dense]), flat=flat, active=active, cut=cut)
    return list(fill((None,) * len(active), active, tuple(grads)))


def _transposed(
    flat: TorchFlat, residuals: Any, primals: Any, given: Any, active: Mask, present: Mask, source: Any, outs: Any
) -> Any:
    if source == "live" and not any(isinstance(x, _Tracer) for x in (*given, *residuals)):
        cotangents = fill((None,) * len(present), present, tuple(given))
        return _live.of(residuals[0]).pull(cotangents)
    _refuse_random(flat, primals)
    return torch_call.bind(*jax_private.vary([*primals, *given]), flat=_vjp(flat, active, outs, present))


def _vjp(flat: TorchFlat, active: Mask, outs: Sequence[Any], present: Mask | None = None) -> TorchFlat:
    """The transpose by recomputing. `present` is over the inexact outputs, all of them if None."""
    here = iter(present or (True,) * len(outs))
    return flat.vjp(active, tuple(next(here) if is_inexact(out) else False for out in outs))


def _backward_jvp(primals: Any, tangents: Any, *, flat: TorchFlat, active: Mask, cut: Capture) -> Any:
    outs = torch_backward.bind(*primals, flat=flat, active=active, cut=cut)
    kept = len(cut.saved)
    points, moved = primals[kept:], tangents[kept:]
    again = tuple(type(t) is not _Zero for t in moved)
    given = [t for t in moved if type(t) is not _Zero]
    if not given:
        return outs, [_Zero(jax.typeof(out).to_tangent_aval()) for out in outs]
    _refuse_random(flat, points[: len(active)])
    results = flat.outputs(tuple(map(aval_of, points[: len(active)]))).avals
    return outs, _linear(_vjp(flat, active, results), outs, [], points, given, again, "recompute")


def _backward_transpose(cotangents: Any, *operands: Any, flat: TorchFlat, active: Mask, cut: Capture) -> list[Any]:
    """The backward is linear in its cotangents, and its transpose is the derivative along tangents."""
    kept = len(cut.saved)
    saved, primals = operands[:kept], operands[kept : kept + len(active)]
    tangents = [ad.instantiate_zeros(c) for c in cotangents]
    count = iter(cut.inexact)
    outs = tuple(next(count) if is_inexact(out) else out for out in flat.outputs(tuple(map(aval_of, primals))).avals)
    operands_ = jax_private.vary([*saved, *primals, *tangents])
    moved = torch_linear.bind(*operands_, flat=flat, active=active, source=cut, outs=outs)
    return [None] * (kept + len(active)) + list(moved)


def _taylor(primitive: Any, primals: Sequence[Any], series: Sequence[Sequence[Any]], **params: Any) -> Any:
    """The Taylor coefficients of the outputs along a curve whose coefficients are given: each by one more `jax.jvp`."""

    def along(t: Any) -> list[Any]:
        points = [x + sum(c * t**k for k, c in enumerate(terms, 1)) if is_inexact(x) else x
                  for x, terms in zip(primals, series, strict=True)]  # fmt: skip
        return [primitive.bind(*jax_private.vary(points), **params)]

    order = len(series[0])
    for _ in range(order):
        along = functools.partial(_one_more_order, along)
    outs, *moved = along(0.0)
    terms = [[m / math.factorial(k) if is_inexact(out) else jax.numpy.zeros_like(out) for k, m in enumerate(column, 1)]
             for out, column in zip(outs, zip(*moved, strict=True), strict=True)]  # fmt: skip
    return outs, terms


def _one_more_order(along: Callable[[Any], list[Any]], t: Any) -> list[Any]:
    known, moved = jax.jvp(along, (t,), (jax.numpy.ones_like(t),))
    return [*known, moved[-1]]


# --- batching ---------------------------------------------------------------------------------------------------------


def _size(args: Sequence[Any], dims: Sequence[Any]) -> int:
    return int(next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None))


def _in_front(args: Sequence[Any], dims: Sequence[Any]) -> list[Any]:
    """The batch as the first axis of every operand."""
    size = _size(args, dims)
    return [
        jax.numpy.broadcast_to(x, (size, *np.shape(x))) if d is None else jax.numpy.moveaxis(x, d, 0)
        for x, d in zip(args, dims, strict=True)
    ]


def _call_vmap(args: Any, dims: Any, *, flat: TorchFlat) -> Any:
    outs = torch_call.bind(*args, flat=flat.vmap(tuple(dims)))
    return outs, [0] * len(outs)


def _forward_vmap(args: Any, dims: Any, *, flat: TorchFlat, active: Mask, cut: Capture) -> Any:
    batched, size = _in_front(args, dims), _size(args, dims)
    outs = torch_forward.bind(*batched, flat=flat.vmap((0,) * len(args)), active=active, cut=cut.vmap(size))
    return outs, [0] * len(outs)


def _linear_vmap(args: Any, dims: Any, *, flat: TorchFlat, active: Mask, source: Any, outs: Any) -> Any:
    size = _size(args, dims)
    residuals, primals, tangents = _split(_in_front(args, dims), active, source)
    if isinstance(source, Capture):
        source = source.vmap(size)
    else:
        residuals, source = [], "recompute"
    batched = flat.vmap((0,) * len(active))
    wider = tuple(Aval((size, *out.shape), out.dtype) for out in outs)
    moved = torch_linear.bind(*residuals, *primals, *tangents, flat=batched, active=active, source=source, outs=wider)
    return moved, [0] * len(moved)


def _backward_vmap(args: Any, dims: Any, *, flat: TorchFlat, active: Mask, cut: Capture) -> Any:
    size, batched = _size(args, dims), flat.vmap((0,) * len(active))
    outs = torch_backward.bind(*_in_front(args, dims), flat=batched, active=active, cut=cut.vmap(size))
    return outs, [0] * len(outs)


# --- evaluation and lowering ------------------------------------------------------------------------------------------


def _forward_run(*ins: Any, flat: TorchFlat, active: Mask, cut: Capture) -> list[jax.Array]:
    del flat, active
    return run(cut.forward, ins)[0]


def _linear_run(*ins: Any, flat: TorchFlat, active: Mask, source: Any, outs: Any) -> list[jax.Array]:
    del outs
    generators = Watched()
    moved = run(_linear_flat(flat, active, source), _linear_operands(ins, active, source))[0]
    if generators.were_drawn_from():
        raise refused(flat.name, "the value came from another run, which drew others")
    return moved


def _linear_flat(flat: TorchFlat, active: Mask, source: Any, **_: Any) -> TorchFlat:
    """The derivative along tangents: of a function that draws random numbers, of the run that gave the value."""
    return source.push if isinstance(source, Capture) and source.draws else flat.jvp(active)


def _linear_operands(ins: Sequence[Any], active: Mask, source: Any, **_: Any) -> list[Any]:
    residuals, primals, tangents = _split(ins, active, source)
    return [*(residuals if isinstance(source, Capture) and source.draws else primals), *tangents]


def _backward_run(*ins: Any, flat: TorchFlat, active: Mask, cut: Capture) -> list[jax.Array]:
    del flat
    return run(cut.backward, _without_primals(ins, active, cut))[0]


def _without_primals(ins: Sequence[Any], active: Mask, cut: Capture) -> list[Any]:
    """The operands that the captured backward reads: the primals are there for higher orders alone."""
    kept = len(cut.saved)
    return [*ins[:kept], *ins[kept + len(active) :]]


def _lowering(
    flat_of: Callable[..., TorchFlat],
    operands_of: Callable[..., Sequence[Any]],
    *,
    trusted: bool,
    effects_of: Callable[..., frozenset[Any]] | None = None,
) -> Any:
    """The rule by which a compiled program calls back: check what was declared, then emit one `buffer_callback`."""

    def emit(*ins: Any, out_avals: Sequence[Aval], has_effect: bool, flat: TorchFlat, **params: Any) -> Any:
        target = flat_of(flat=flat, **params)
        structs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in out_avals]
        structure = NOTHING if trusted else target.outputs(tuple(map(aval_of, operands_of(ins, **params)))).structure
        body = callback(target, out_avals, structure, trusted=trusted)
        return buffer_callback(body, structs, has_side_effect=has_effect)(*operands_of(ins, **params))

    def lower(context: Any, *ins: Any, flat: TorchFlat, **params: Any) -> Any:
        if not flat.levels.jittable:
            raise NotJittableError("traced by JAX into a compiled program", hint="Stack @jittable").of(flat.name)
        if jax_private.is_exported(context):
            raise UnsupportedError(
                "jax.export can't write a program that calls back into torch: a callback can't be serialised",
                hint="Export the torch function with torch.export, or the rest of the program",
            ).of(flat.name)
        if jax_private.device_count(context) > 1:
            warn_gathered()
        avals = tuple(Aval(tuple(a.shape), np.dtype(a.dtype)) for a in context.avals_out)
        effects = effects_of and effects_of(flat, flat.outputs(tuple(map(aval_of, context.avals_in))))
        fn = functools.partial(emit, out_avals=avals, has_effect=bool(effects), flat=flat, **params)
        return mlir.lower_fun(fn, multiple_results=True)(context, *ins)

    return lower


def _register(primitive: Any, run_rule: Any, avals: Any, vmap: Any, lowering: Any) -> None:
    primitive.def_impl(run_rule)
    primitive.def_effectful_abstract_eval(avals)
    batching.primitive_batchers[primitive] = vmap
    mlir.register_lowering(primitive, lowering)
    jet.jet_rules[primitive] = functools.partial(_taylor, primitive)
    jax_private.look_for_nan(primitive)


_register(
    torch_call,
    lambda *ins, flat: _run(flat, ins),
    _call_avals,
    _call_vmap,
    _lowering(lambda flat: flat, lambda ins: ins, trusted=False, effects_of=_effects),
)
_register(
    torch_forward,
    _forward_run,
    _forward_avals,
    _forward_vmap,
    _lowering(lambda cut, **_: cut.forward, lambda ins, **_: ins, trusted=True, effects_of=_effects),
)
_register(
    torch_linear,
    _linear_run,
    _linear_avals,
    _linear_vmap,
    _lowering(
        _linear_flat,
        _linear_operands,
        trusted=False,
    ),
)
_register(
    torch_backward,
    _backward_run,
    _backward_avals,
    _backward_vmap,
    _lowering(
        lambda cut, **_: cut.backward,
        _without_primals,
        trusted=True,
    ),
)
ad.primitive_jvps[torch_call] = _call_jvp
ad.primitive_jvps[torch_forward] = _forward_jvp
ad.primitive_jvps[torch_linear] = _linear_jvp
ad.primitive_jvps[torch_backward] = _backward_jvp
ad.primitive_transposes[torch_call] = _call_transpose
ad.primitive_transposes[torch_linear] = _linear_transpose
ad.primitive_transposes[torch_backward] = _backward_transpose
