"""The forward and the backward of a JAX function as two programs, with the residuals between. Mirror of `_capture`.

The function is traced once into a jaxpr, and pulled back from it. What the pull-back reads is what has to be kept: as
little of it as is worth its price. A residual that is cheap to compute again from what is kept anyway is not kept; one
that *is* an input or an output is left to torch, whose version counter then guards it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from interop._abstract import kept_words
from interop._derive import NOTHING, FlatFn, Mask, Static, fill, join, pick
from interop._in_torch._effects import Effectful, program_of
from interop._in_torch._flat import JaxFlat
from interop._leaf import computes_on_cpu
from interop._log import tell
from interop._private import jax as jax_private
from interop._side import JAX, Leaf, Leaves


@dataclass(eq=False)
class Plan:
    """What one trace of a residual forward found out about its backward.

    Attributes:
        count: the number of outputs; the new residuals follow them.
        structure: of the outputs, as the function itself returned it.
        saved: where each residual is found: ("input", i), ("output", i) or ("residual", i).
        inexact: for each output, whether it is of floating-point or complex numbers.
        rough: the outputs that have no derivative in any active input.
        guarded: of what is saved, what is an input or an output.
        reached: for each output that is inexact, the active inputs that its cotangent reaches.
        scaled: whether what is saved are the gradients themselves, those of the first number of the outputs, to be
            multiplied by its cotangent; for each input then, which of them is its own.
        price: nanoseconds that those gradients take, by estimate; 0 where they are asked for at any rate.
        pull: `(saved, cotangents)` to the cotangents of the active primals, under a trace.
    """

    count: int
    structure: Static
    saved: tuple[tuple[str, int], ...]
    inexact: Mask
    reached: tuple[Mask, ...]
    pull: Callable[[Leaves, Leaves], Leaves]
    flat: JaxFlat
    active: Mask
    scaled: bool = False
    price: float = 0.0
    backwards: dict[tuple[Mask, Mask], tuple[Mask, JaxFlat]] = field(
        default_factory=dict[tuple[Mask, Mask], "tuple[Mask, JaxFlat]"], repr=False
    )

    def __post_init__(self) -> None:
        smooth = iter(map(any, self.reached))
        self.rough = [i for i, inexact in enumerate(self.inexact) if not (inexact and next(smooth))]
        self.guarded = tuple(place for place in self.saved if place[0] != "residual")
        if self.scaled:
            order, reached = itertools.count(), iter(self.reached[0])
            self.gradients = tuple(next(order) if active and next(reached) else None for active in self.active)

    def serves(self, cotangents: Sequence[Any]) -> bool:
        """Whether what is saved is enough: where it is the gradients of one output, the others can't ask."""
        if not self.scaled or self.count == 1:
            return True
        first, *others = pick(tuple(cotangents), self.inexact)
        return first is not None and all(c is None for c in others)

    def reach(self, need: Mask, present: Mask) -> Mask:
        """Those of the inputs under `need` that a cotangent under `present` reaches: the others have no gradient."""
        rows = [row for row, there in zip(self.reached, pick(present, self.inexact), strict=True) if there]
        reached = iter(tuple(map(any, zip(*rows, strict=True))) or (False,) * len(need))
        return tuple(a and next(reached) and n for n, a in zip(need, self.active, strict=True))

    def backward(self, need: Mask, present: Mask) -> tuple[Mask, JaxFlat]:
        """The inputs that have a gradient, and `(*saved, *cotangents)` to their gradients."""
        found = self.backwards.get((need, present))
        return found or self.backwards.setdefault((need, present), self._backward(need, present))

    def _backward(self, need: Mask, present: Mask) -> tuple[Mask, JaxFlat]:
        wanted = self.reach(need, present)

        def fn(*leaves: Leaf) -> tuple[Leaves, Static]:
            given = iter(leaves[len(self.saved) :])
            cotangents = tuple(next(given) if p else None for p in pick(present, self.inexact))
            return pick(self.pull(leaves[: len(self.saved)], cotangents), pick(wanted, self.active)), NOTHING

        backward = self.flat.variant(fn, x64=self.flat.x64)
        backward.name = f"{self.flat.name}.backward"
        backward.path = None  # its leaves are no arguments
        return wanted, backward


def with_residuals(flat: JaxFlat, active: Mask, *, watched: bool = False) -> JaxFlat:
    """The forward that returns its residuals behind its outputs, and as structure the `Plan` of the backward.

    Of a call that is `watched`, `flat.unasked` counts the gradients that were not asked for.
    """
    limit = _WATCHED if watched and computes_on_cpu() and flat.unasked < _IN_VAIN else _AT_ONCE
    found = flat.memos.get((active, limit))
    if found is None:  # `memo` itself would make a closure for each call
        found = flat.memo((active, limit), lambda: flat.variant(_residual_forward(flat, active, limit), x64=flat.x64))
    return found


def _residual_forward(flat: JaxFlat, active: Mask, limit: float) -> FlatFn:
    """The function that returns its new residuals behind its outputs, and as structure the `Plan` of the backward.

    Its trace raises `Effectful` for a function with effects: `_effects` makes a pure one of it.
    """

    def forward(*leaves: Leaf) -> tuple[Leaves, Static]:
        program, structure = program_of(flat.fn, leaves)
        if program.effects:
            raise Effectful
        inexact = tuple(flat.side.is_inexact(aval) for aval in program.out_avals)
        others_too = tuple(not i for i in inexact)

        def inexact_part(*primals: Leaf) -> tuple[Leaves, Leaves]:
            outs = tuple(jax_private.inlined(program, fill(leaves, active, primals)))
            return pick(outs, inexact), pick(outs, others_too)  # the others leave as aux: no float0 anywhere

        cost, primals = _cost(program.jaxpr), pick(leaves, active)
        is_random = any(e.primitive.name in _RANDOM for e in _operations(program.jaxpr))
        scaled = _come_at_once(flat, program, inexact, primals, cost <= limit)
        if scaled:
            some, pull, others = jax.vjp(inexact_part, *primals, has_aux=True)
        else:
            # What is random is never run again, as if it took for ever.
            some, pull, others = _pulled_back(inexact_part, max(cost, _UNKNOWN if is_random else 0.0), primals)
        outs = join(inexact, some, others)
        residuals, saved, pulled, reached = _described(pull, leaves, outs, some, sum(active))
        if scaled:
            of = {"input": leaves, "output": outs, "residual": residuals}
            upstream = (jnp.ones_like(some[0]), *(None,) * (len(some) - 1))
            grads = pulled(tuple(of[origin][i] for origin, i in saved), upstream)
            residuals = pick(grads, reached[0])
            saved = tuple(("residual", i) for i in range(len(residuals)))
            pulled = _scaling(reached[0], primals)

        def kept() -> str:
            if scaled:
                return "nothing, it is computed with the value"
            return kept_words(saved, residuals, flat.path, structure)

        tell(flat.name, "gradient captured (kept for it: %s)", kept)
        price = 0.0 if flat.levels.at_once or not scaled else cost
        plan = Plan(len(outs), structure, saved, inexact, reached, pulled, flat, active, scaled, price)
        return (*outs, *residuals), Static(plan)

    return forward


# --- what is kept -----------------------------------------------------------------------------------------------------

# Nanoseconds: what an element costs, of operations that are fused with what reads them, and of others.
_CHEAP, _ELEMENT, _PRODUCT = 0.3, 5.0, 0.05
_KEPT = 1e3  # what one more residual costs: an output of the forward, an input of the backward


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operations that are computed again rather than kept: each reads little more than it writes.
_FUSED = _words(
    "abs add and bitcast_convert_type broadcast_in_dim ceil clamp complex conj convert_element_type copy copy_p div eq "
    "expand_dims floor ge gt imag integer_pow iota is_finite le lt max min mul ne neg not or real reshape rev round "
    "select_n shift_left shift_right_arithmetic shift_right_logical sign slice split square squeeze stop_gradient sub "
    "transpose xor"
)
_ELEMENTWISE = _words(
    "acos acosh argmax argmin asin asinh atan atan2 atanh cbrt concatenate cos cosh cummax cummin cumprod cumsum "
    "digamma dynamic_slice dynamic_update_slice erf erf_inv erfc exp exp2 expm1 gather lgamma log log1p logistic "
    "nextafter pad pow reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_window_max "
    "reduce_window_min reduce_window_sum rem rsqrt scatter scatter-add sin sinh sqrt stack tan tanh"
)
_RANDOM = _words(
    "random_bits random_clone random_fold_in random_seed random_split random_unwrap random_wrap threefry2x32"
)
_LOOPS = frozenset({"scan", "while"})
_UNKNOWN = 1e9  # a factorisation, a sort, a callback: kept, whatever it costs


def _pulled_back(part: Callable[..., Any], cost: float, primals: Leaves) -> tuple[Leaves, Any, Leaves]:
    """`jax.vjp`, with as few residuals as are worth their price.

    A loop is never run again.
    """
    if cost < math.inf:
        nothing = jax.checkpoint_policies.nothing_saveable
        try:
            kept = jax.vjp(_rematerialised(part, _is_worth_keeping), *primals, has_aux=True)
            new = {id(x) for x in jax.tree.leaves(kept[1])} - {id(x) for x in (*primals, *kept[0])}
            return kept if cost > _KEPT * len(new) else jax.vjp(_rematerialised(part, nothing), *primals, has_aux=True)
        except (NotImplementedError, TypeError):
            pass  # JAX rematerialises neither an effect in a rule of the user's, nor a complex number that is kept
    return jax.vjp(part, *primals, has_aux=True)


def _rematerialised(part: Callable[..., Any], policy: Callable[..., bool]) -> Callable[..., Any]:
    # Forward and backward are two programs: nothing can be merged that should be computed again.
    return jax.checkpoint(part, policy=policy, prevent_cse=False)


def _is_worth_keeping(primitive: Any, *_: Any, **params: Any) -> bool:
    inner = jax_private.inner_program(primitive, params)
    if inner is None:
        return primitive.name not in _FUSED
    return any(e.primitive.name not in _FUSED for e in _operations(inner))


def _cost(program: Any) -> float:
    """Roughly the nanoseconds that a program takes."""
    return sum(map(_cost_of, _operations(program)))


def _operations(program: Any) -> Iterator[Any]:
    """The equations of a program, with those of a program inside in its place."""
    for equation in program.eqns:
        inner = jax_private.inner_program(equation.primitive, equation.params)
        yield from (equation,) if inner is None else _operations(inner)


def _cost_of(equation: Any) -> float:
    name, size = equation.primitive.name, sum(_size(v) for v in equation.outvars)
    if name in _LOOPS:
        return math.inf
    if name == "dot_general":
        left = equation.invars[0].aval.shape
        return _PRODUCT * size * math.prod(left[i] for i in equation.params["dimension_numbers"][0][0])
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        return _PRODUCT * size * kernel.size / kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    if name in _FUSED or name in _ELEMENTWISE or name in _RANDOM:
        return (_CHEAP if name in _FUSED else _ELEMENT) * max(size, *(_size(v) for v in equation.invars), 1)
    return _UNKNOWN


def _size(variable: Any) -> float:
    return math.prod(getattr(variable.aval, "shape", ()))


def _kept_bytes(program: Any) -> int:
    """Roughly what the residuals of a program take: all that is written and worth keeping."""
    return sum(_bytes(v.aval) for e in _operations(program) if e.primitive.name not in _FUSED for v in e.outvars)


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize


# Nanoseconds that gradients may take which come with the value, before anybody asks for them: one program takes a sixth
# to a third less than two. More where calls and backwards are counted, until those in vain add up to the last number;
# not on a GPU, where whether the cotangent is 1 can't be looked at, and each gradient would be multiplied by it.
_AT_ONCE, _WATCHED, _IN_VAIN = 3e3, 1e8, 1e9
_FEW_BYTES = 2**20  # gradients may be kept, as long as they are few, or fewer than the residuals


def _come_at_once(flat: JaxFlat, program: Any, inexact: Mask, primals: Leaves, cheap: bool) -> bool:
    """Whether the gradients are computed with the value: those of one number, the first of the outputs.

    They are its pull-back of 1, and the pull-back of any cotangent is a multiple of them: not where a rule of the
    user's may be none, and not in 16 bits, where a loss is scaled because its gradients would underflow.
    """
    values = pick(tuple(program.out_avals), inexact)
    if not values or values[0].shape:
        return False
    dtypes = {x.dtype for x in (values[0], *primals)}
    if len(dtypes) > 1 or not dtypes <= _WIDE or not jax_private.is_linear_in_cotangents(program.jaxpr):
        return False
    are_few = sum(map(_bytes, primals)) <= max(_FEW_BYTES, _kept_bytes(program.jaxpr))
    is_alone = all(pick(jax_private.stopped(program.jaxpr), inexact)[1:])  # aux and new state have no derivative
    return flat.levels.at_once or (is_alone and cheap and are_few)


_WIDE = {jnp.dtype("float32"), jnp.dtype("float64")}


def _scaling(reached: Mask, primals: Leaves) -> Callable[[Leaves, Leaves], Leaves]:
    """The pull-back from the gradients."""
    avals = [jax.typeof(x) for x in primals]

    def pulled(gradients: Leaves, cotangents: Leaves) -> Leaves:
        cotangent, rest = cotangents[0], iter(gradients)
        return tuple(
            next(rest) * cotangent if there else jnp.zeros(aval.shape, aval.dtype)
            for there, aval in zip(reached, avals, strict=True)
        )

    return pulled


# --- where it is found ------------------------------------------------------------------------------------------------


def _described(
    pull: Any, inputs: Leaves, outs: Leaves, some: Leaves, active: int
) -> tuple[Leaves, tuple[tuple[str, int], ...], Callable[[Leaves, Leaves], Leaves], tuple[Mask, ...]]:
    """The new residuals, where each residual is found later, the pull-back from them, and what it reaches.

    Residuals are told apart by the identity of tracers: on the outside, a jitted function copies one that is an input.
    """
    values, treedef = jax.tree.flatten(pull)
    origin = {id(x): ("output", i) for i, x in enumerate(outs)} | {id(x): ("input", i) for i, x in enumerate(inputs)}
    traced = {id(x): x for x in values if isinstance(x, jax.core.Tracer)}
    order = {key: i for i, key in enumerate(traced)}
    kept = [_Kept(x) for x in traced.values()]

    def unpacked(leaves: Sequence[Leaf], cotangents: Leaves) -> list[Any]:
        again = [kept[order[id(x)]].typed(leaves[order[id(x)]]) if id(x) in order else x for x in values]
        return list(jax.tree.unflatten(treedef, again)(cotangents))

    try:
        program = jax.make_jaxpr(unpacked)([k.plain for k in kept], tuple(some))
    except Exception:  # noqa: BLE001 - in a rule of the user's: raised when a gradient is asked for, if it still is
        run, depends = unpacked, [-1] * active
    else:
        run = lambda leaves, cotangents: jax_private.inlined(program, (*leaves, *cotangents))  # noqa: E731
        depends = jax_private.dependences(program.jaxpr)
    read = [any(mask >> i & 1 for mask in depends) for i in range(len(kept))]
    reached = tuple(tuple(bool(m >> (len(kept) + i) & 1) for m in depends) for i in range(len(some)))

    residuals: list[Leaf] = []
    saved: list[tuple[str, int]] = []
    for (key, k), needed in zip(zip(traced, kept, strict=True), read, strict=True):
        if needed:
            saved.append(origin.get(key) or ("residual", len(residuals)))
            if key not in origin:
                residuals.append(k.plain)
        k.plain = None  # the trace ends before the plan does

    shapes = [jax.typeof(out) for out in some]

    def pulled(given: Leaves, cotangents: Leaves) -> Leaves:
        """In torch's complex convention; an absent cotangent is zero."""
        rest = iter(given)
        leaves = [next(rest) if needed else k.zeros() for k, needed in zip(kept, read, strict=True)]
        dense = [
            jnp.zeros(shape.shape, shape.dtype) if c is None else JAX.conjugated(c)
            for c, shape in zip(cotangents, shapes, strict=True)
        ]
        return tuple(map(JAX.conjugated, run(leaves, tuple(dense))))

    return tuple(residuals), tuple(saved), pulled, reached


class _Kept:
    """One value that a pull-back reads; a typed PRNG key is kept as its data."""

    def __init__(self, value: Any) -> None:
        is_key = jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
        self.impl = jax.random.key_impl(value) if is_key else None
        self.plain = jax.random.key_data(value) if is_key else value
        self.aval = jax.typeof(self.plain)

    def typed(self, plain: Any) -> Any:
        """The value again."""
        return plain if self.impl is None else jax.random.wrap_key_data(plain, impl=self.impl)

    def zeros(self) -> Any:
        """What stands for a value that is not read."""
        return jnp.zeros(self.aval.shape, self.aval.dtype)
