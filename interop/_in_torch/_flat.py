"""A flat JAX function, jitted, and the names by which graphs of torch know such functions."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import torch
from jax.extend.core import jaxpr_as_fun

from interop._abstract import Aval, Outputs, infer_jax
from interop._derive import Axes, Flat, FlatFn, Mask, Static, fill, join, pick
from interop._errors import AbstractEvalError, UnsupportedError
from interop._in_torch._effects import record, replay
from interop._leaf import copy_tensor, describe_all
from interop._log import tell
from interop._private import jax as jax_private
from interop._side import Leaf, Leaves

_config: Any = jax.config


class Names:
    """Flat functions by the names that the op calls them by.

    A name is weak: whoever made a function keeps it alive. But a graph holds nothing else, and may outlive them all, so
    the last functions that were traced into one are kept. A name in an exported program says how the function is found
    in another process: its module, its qualified name, and what was derived from it. Any other name is of this process
    alone: Inductor finds graphs of earlier ones by their text.
    """

    CAPACITY = 4096

    def __init__(self) -> None:
        self.flats: weakref.WeakValueDictionary[str, JaxFlat] = weakref.WeakValueDictionary()
        self.traced: OrderedDict[str, JaxFlat] = OrderedDict()
        self.load: Callable[[Any], JaxFlat] | None = None
        self.numbers = itertools.count()
        self.new_process()

    def new_process(self) -> None:
        """Give names that no other process gives."""
        self.process = secrets.token_hex(8)

    def add(self, flat: JaxFlat) -> str:
        """A new name, for this process."""
        name = f"#{next(self.numbers)} of {self.process}"
        self.flats[name] = flat
        return name

    def keep(self, name: str, flat: JaxFlat) -> None:
        """Remember a function that a graph names now."""
        self.flats[name] = self.traced[name] = flat
        self.traced.move_to_end(name)
        if len(self.traced) > self.CAPACITY:
            self.traced.popitem(last=False)

    def __getitem__(self, name: str) -> JaxFlat:
        found = self.flats.get(name)
        if found is not None:
            return found
        if name.startswith("#") or self.load is None:
            raise UnsupportedError(
                "a graph calls a function that is gone", hint="Keep the crossing as long as its graphs"
            )
        recipe = json.loads(name)
        found = self.load(recipe["function"])
        for method, *arguments in recipe["derived"]:
            found = getattr(found, method)(*map(tuple, arguments))
        self.keep(name, found)
        return found


# Whoever imports the library a second time shares the operation that is registered, and its names.
FLATS: Names = vars(torch.ops.interop).setdefault("_names", Names())
os.register_at_fork(after_in_child=FLATS.new_process)


class _Ran(threading.local):
    """The structures of the outputs of functions that can't be traced, and ran in this thread during a call."""

    def __init__(self) -> None:
        self.structures: weakref.WeakKeyDictionary[JaxFlat, Static] = weakref.WeakKeyDictionary()


RAN = _Ran()


class _Tracing(threading.local):
    """Whether a function is traced for one that is derived from it."""

    inside = False


_TRACING = _Tracing()


def owned(x: Any) -> Any:
    """A value in memory that nobody else has, and that is there: what is not traced may keep it, or be given away."""
    if isinstance(x, int | float | complex | jax.core.Tracer):
        return x
    return jax.block_until_ready(copy_tensor(x) if isinstance(x, np.ndarray) else jnp.array(x, copy=True))


@dataclass(eq=False)
class JaxFlat(Flat):
    """A flat JAX function, jitted, in 32 or 64 bits.

    Attributes:
        x64: whether it runs under `jax.enable_x64`, whatever the calling thread has set.
        origin: of a function over a batch, the function of one example: they share the structure of their outputs.
        located: how another process finds the function that this one is derived from; raises where it can't.
        derived_by: the methods, with their arguments, that lead here from that function; None for a step between
            forward and backward, which belongs to one trace.
        records: whether it is there for its effects.
        effectful: whether it is known to have effects; found out when it is first traced for a derivative.
        unasked: nanoseconds, by estimate, of gradients that came with a value and were not asked for.
        name_of_op: the name that the op calls it by in this process.
        since: when the trace began that is being compiled; None but in a call that traces.
        body: the function as it was given; `fn` is what a trace has made of it.
        jitted: the compiled function; `jax.jit` keeps one program per shapes and dtypes. For `as_torch(jit=False)`, the
            function itself, on values of its own.
    """

    x64: bool = False
    origin: JaxFlat | None = None
    located: Callable[[], Any] | None = None
    derived_by: tuple[tuple[Any, ...], ...] | None = ()
    records: bool = False
    effectful: bool = field(default=False, init=False)
    unasked: float = field(default=0.0, init=False)
    name_of_op: str = field(init=False)
    since: float | None = field(default=None, init=False)
    body: FlatFn = field(init=False, repr=False)
    jitted: Callable[..., tuple[Leaves, Static]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.body = self.fn
        self.jitted = jax.jit(self._traced) if self.levels.jit else self._run
        if self.levels.jit:
            self.fn = self._as_traced
        self.name_of_op = FLATS.add(self)

    def exported_name(self) -> str:
        """The name that the op calls it by in a graph that leaves this process."""
        if self.located is None or self.derived_by is None:
            raise UnsupportedError("a gradient that was captured can't be exported", hint="Export the function itself")
        name = json.dumps({"function": self.located(), "derived": self.derived_by})
        FLATS.keep(name, self)
        return name

    def jvp(self, nonzero: Mask) -> Self:
        """The derivative along tangents."""
        return self._named_after(super().jvp(nonzero), None, "jvp", nonzero)

    def vjp(self, nonzero: Mask, present: Mask) -> Self:
        """The transpose of the derivative."""
        return self._named_after(super().vjp(nonzero, present), None, "vjp", nonzero, present)

    def vmap(self, in_axes: Axes) -> Self:
        """The function over a batch."""
        return self._named_after(super().vmap(in_axes), self.origin or self, "vmap", in_axes)

    def wide(self) -> JaxFlat:
        """The same function in 64 bits."""
        if self.x64:
            return self
        return self._named_after(self.memo("wide", lambda: self.variant(self.fn, x64=True)), None, "wide")

    def lifted(self, is_number: Mask) -> JaxFlat:
        """The same function with its Python numbers given as 0-d tensors: the op takes nothing else."""
        if not any(is_number):
            return self

        def fn(*leaves: Leaf) -> tuple[Leaves, Static]:
            numbers = map(jax_private.weaken, pick(leaves, is_number))
            return self.fn(*fill(leaves, is_number, tuple(numbers)))

        lifted = self.memo(("lifted", is_number), lambda: self.variant(fn, x64=self.x64))
        return self._named_after(lifted, None, "lifted", is_number)

    def _traced(self, *leaves: Leaf) -> tuple[Leaves, Static]:
        if _config.jax_disable_jit:  # residuals are told apart in a trace: there has to be one
            with jax.disable_jit(False):
                return self.jitted(*leaves)
        if _TRACING.inside:  # whoever asks has told
            return self.body(*leaves)
        tell(self.name, "traced for %s", lambda: describe_all(leaves))
        self.since = time.perf_counter()
        try:
            return self.body(*leaves)
        except BaseException:
            self.since = None
            raise

    def _as_traced(self, *leaves: Leaf) -> tuple[Leaves, Static]:
        """The function as its compiled program has it, for what is derived from it.

        What it reads beside its arguments was read once, when it was first traced for such arguments.
        """
        before, _TRACING.inside = _TRACING.inside, True
        try:
            with jax.disable_jit(False) if _config.jax_disable_jit else contextlib.nullcontext():
                traced: Any = self.jitted.trace(*leaves)  # type: ignore[attr-defined]
        finally:
            _TRACING.inside = before
        outs = jaxpr_as_fun(traced.jaxpr)(*leaves)
        return jax.tree.unflatten(jax.tree.structure(traced.out_info), outs)

    def tell_compiled(self) -> None:
        """Tell of the trace and the compilation that the call has just had."""
        since, self.since = self.since, None
        if since is not None:  # another thread may have told
            self.tell_time(lambda: "traced and compiled", time.perf_counter() - since)

    def _run(self, *arrays: Any) -> tuple[Leaves, Static]:
        outs, structure = self.fn(*map(owned, arrays))
        RAN.structures[self.origin or self] = structure
        return tuple(map(owned, outs)), structure

    def pulled_back(self, active: Mask, arrays: Sequence[Any]) -> tuple[Leaves, Static, Callable[..., Leaves]]:
        """The outputs, their structure, and the pull-back, of a function that can't be traced: on values.

        The pull-back takes a cotangent for each inexact output, or None, in torch's complex convention.
        """
        leaves, found = tuple(map(owned, arrays)), list[tuple[Mask, Static]]()

        def parts(*primals: Leaf) -> tuple[Leaves, Leaves]:
            outs, structure = self.fn(*fill(leaves, active, primals))
            mask = tuple(self.side.is_inexact(out) for out in outs)
            found[:] = [(mask, structure)]
            return pick(outs, mask), pick(outs, tuple(not m for m in mask))

        with jax.enable_x64(self.x64):
            some, pull, others = jax.vjp(parts, *pick(leaves, active), has_aux=True)
            ((inexact, structure),) = found
            outs = tuple(map(owned, join(inexact, some, others)))

        def pulled(*cotangents: Any) -> Leaves:
            with jax.enable_x64(self.x64):
                pairs = zip(cotangents, some, strict=True)
                dense = tuple(jnp.zeros_like(out) if c is None else self.side.conjugated(owned(c)) for c, out in pairs)
                return tuple(owned(self.side.conjugated(g)) for g in pull(dense))

        return outs, structure, pulled

    def recording(self) -> JaxFlat:
        """The effects of the function alone: what they answered."""
        made = self.memo("recording", lambda: self.variant(record(self.fn), x64=self.x64))
        made.records = True
        return self._named_after(made, None, "recording")

    def replaying(self, count: tuple[int]) -> JaxFlat:
        """The function of so many leaves without its effects: their answers follow the leaves."""
        made = self.memo(("replaying", count), lambda: self.variant(replay(self.fn, *count), x64=self.x64))
        return self._named_after(made, None, "replaying", count)

    def outputs(self, avals: tuple[Aval, ...]) -> Outputs:
        """What is known of the outputs for inputs of these avals."""
        return self.memo(("outputs", avals), lambda: self._outputs(avals))

    def _outputs(self, avals: tuple[Aval, ...]) -> Outputs:
        if self.levels.jit:
            return infer_jax(self, avals, x64=self.x64)
        if self.levels.example_output is not None:
            promised: Outputs = self.levels.example_output(avals)
            return promised
        try:
            return infer_jax(self, avals, x64=self.x64)
        except jax.errors.JAXTypeError as error:
            raise AbstractEvalError(
                "the output shapes of a function with jit=False can't be inferred",
                hint="Declare them: @jittable(example_output=...)",
            ) from error

    def variant(self, fn: FlatFn, *, x64: bool) -> JaxFlat:
        """Another function over the same leaves, with what is known of them."""
        return JaxFlat(
            self.side, fn, self.name, self.levels, self.nondiff, self.path, self.lost,
            x64=x64, located=self.located, derived_by=None, records=self.records,
        )  # fmt: skip

    def _named_after(self, made: Any, origin: JaxFlat | None, *step: Any) -> Any:
        made.origin = origin
        if self.derived_by is not None:
            made.derived_by = (*self.derived_by, step)
        return made
